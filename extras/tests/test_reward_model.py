"""The reward model of Section 2: fitted to a planted taste, saved, read at a response's own end."""
import numpy as np
import pytest
import torch

from extras import reward_model
from model import BOS, UserError, load, save
from spo import response_mask


@pytest.fixture(scope="module")
def planted():
    """Pairs (192, 2, 16) whose better response holds token 99. The first half is shorter: padded from token 10 on."""
    y = np.random.default_rng(0).integers(100, 640, (192, 2, 16), np.uint16)
    y[:, 0, 7] = 99
    y[:, :, 0] = y[:96, :, 10:] = BOS
    return y


def test_a_reward_model_learns_a_planted_taste(world, planted, tmp_path, capsys):
    for steps, lowest, highest in ((1, 0.2, 0.8), (40, 0.95, 1.0)):
        model = reward_model.fit_reward_model(f"{world}/sft.pt", planted[:160], planted[::3], steps, 3e-3, 64)
        r = reward_model.dataset_rewards(model, planted[::3], 64, "cpu")
        accuracy = (r[:, 0] > r[:, 1]).float().mean().item()
        assert lowest <= accuracy <= highest
        assert f"64 held-out pairs: {accuracy:.3f}\n" in capsys.readouterr().out
    save(model, tmp_path / "r.pt")
    again = reward_model.load_reward_model(tmp_path / "r.pt")
    assert torch.equal(reward_model.dataset_rewards(again, planted[::3], 64, "cpu"), r)
    with pytest.raises(UserError, match="is not a reward model"):
        reward_model.load_reward_model(f"{world}/sft.pt")
    with pytest.raises(UserError, match="not those of this Llama"):
        load(tmp_path / "r.pt")


def test_a_reward_is_read_at_the_responses_own_end(world, planted):
    model = reward_model.make_reward_head(load(f"{world}/sft.pt"))
    torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(0))
    tokens = torch.from_numpy(planted[:4, 0].astype(int))
    r = reward_model.reward_at_end(model, tokens, response_mask(tokens))
    assert torch.allclose(r, model(tokens[:, :11])[:, 10, 0], atol=1e-4)
    assert not torch.allclose(r, model(tokens)[:, -1, 0], atol=1e-4)
    cut = torch.full((1, 129), 99)  # one token more than the context
    r = reward_model.reward_at_end(model, cut, response_mask(cut))
    assert torch.allclose(r, model(cut[:, :128])[:, -1, 0], atol=1e-4)
