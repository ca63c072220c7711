"""The reward model of Section 2: fitted to a planted taste, saved, read at a response's own end."""
import os
import shutil

import numpy as np
import pytest
import torch

import prepare_data
import spo
from extras import judge, reward_model
from extras.data_folder import open_folder
from extras.tests.conftest import TOKENIZER
from model import BOS, ModelArgs, Transformer, UserError, load, save


@pytest.fixture(scope="module")
def planted():
    """Pairs (192, 2, 16) whose better response holds token 99. The first half is shorter: padded from token 10 on."""
    y = np.random.default_rng(0).integers(100, 640, (192, 2, 16), np.uint16)
    y[:, 0, 7] = 99
    y[:, :, 0] = y[:96, :, 10:] = BOS
    return y


def test_a_reward_model_learns_a_planted_taste(world, planted, tmp_path):
    test = planted[::3]
    for steps, lowest, highest in ((0, 0.5, 0.5), (40, 0.9, 1.0)):
        model = reward_model.fit_reward_model(f"{world}/sft.pt", planted[:160], test, steps, 64)
        accuracy = reward_model.heldout_accuracy(model, test, 64)
        r = reward_model.dataset_rewards(model, test, 64, "cpu")
        assert lowest <= accuracy <= highest and 0.5 * ((r[:, 0] > r[:, 1]).sum() + (r[:, 0] >= r[:, 1]).sum()) == (
            64 * accuracy)
    save(model, tmp_path / "r.pt")
    again = reward_model.load_reward_model(tmp_path / "r.pt")
    assert torch.equal(reward_model.dataset_rewards(again, planted[::3], 64, "cpu"), r)
    with pytest.raises(UserError, match="is not a reward model"):
        reward_model.load_reward_model(f"{world}/sft.pt")
    with pytest.raises(UserError, match="not those of this Llama"):
        load(tmp_path / "r.pt")


def test_accuracy_and_margin_with_their_standard_errors(monkeypatch, capsys):
    leads = [0.5, -0.25, 2.0, 0.0, 1.0]
    monkeypatch.setattr(reward_model, "dataset_rewards", lambda *_: torch.tensor([[x + 1, 1.0] for x in leads]))
    assert reward_model.heldout_accuracy(None, leads, 64) == pytest.approx(3.5 / 5)

    def standard_error(values):
        mean = sum(values) / 5
        return (sum((x - mean) ** 2 for x in values) / 4 / 5) ** 0.5

    errors = standard_error([1, 0, 1, 0.5, 1]), standard_error(leads)
    assert capsys.readouterr().out == (f"on 5 other held-out pairs:\n  accuracy 0.700, standard error {errors[0]:.3f}\n"
                                       f"  margin 0.650, standard error {errors[1]:.3f}\n")


def test_the_best_evaluation_is_kept_not_the_last(world, planted, monkeypatch):
    """Four evaluations of scripted losses, the second the lowest; without a lower one the fit stops after two more."""
    leads, seen = iter([0.1, 0.5, 0.4, 0.3]), []

    def dataset_rewards(model, *_):
        seen.append(model.norm.weight.detach().clone())
        return torch.tensor([[next(leads), 0.0]])

    monkeypatch.setattr(reward_model, "dataset_rewards", dataset_rewards)
    monkeypatch.setattr(reward_model, "EVAL_EVERY", 2)
    monkeypatch.setattr(reward_model, "PATIENCE", 2)
    model = reward_model.fit_reward_model(f"{world}/sft.pt", planted[:32], planted[32:], 100, 64)
    assert len(seen) == 4 and torch.equal(model.norm.weight, seen[1]) and not torch.equal(seen[1], seen[3])
    leads = iter([-0.1, -0.2])
    model = reward_model.fit_reward_model(f"{world}/sft.pt", planted[:32], planted[32:], 100, 64)
    assert torch.equal(model.norm.weight, load(f"{world}/sft.pt").norm.weight) and not model.output.weight.any()


def test_the_pairs_that_select_a_step_do_not_test_it_and_wider_models_learn_slower(world, tmp_path, monkeypatch):
    read, rates = [], []
    monkeypatch.setattr(reward_model, "fit_reward_model", lambda init, pairs, selection, *_: read.append(selection))
    monkeypatch.setattr(reward_model, "heldout_accuracy", lambda model, test, *_: read.append(test) or 0.0)
    with open_folder(str(shutil.copytree(world, tmp_path / "data"))) as folder:
        heldout = np.arange(80).reshape(20, 2, 2).astype(np.uint16)
        np.save(f"{folder.path}/heldout_pairs.npy", heldout)
        folder.settings["reward_steps"] = 1
        reward_model.save_reward_model(folder)
    rows = [row.tolist() for part in read for row in part]
    assert len(read[0]) == len(read[1]) == 10 and sorted(rows) == heldout.tolist()
    monkeypatch.undo()
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **more: rates.append(lr) or adamw(p, lr, **more))
    y = np.full((4, 2, 6), 9, np.uint16)
    y[:, :, 0] = BOS
    for dim in (64, 128):
        save(Transformer(ModelArgs(dim, 1, 2, vocab_size=20, multiple_of=4, max_seq_len=8)), tmp_path / "m.pt")
        reward_model.fit_reward_model(str(tmp_path / "m.pt"), y, y, 1, 8)
    assert rates == [1e-3, 5e-4]


@pytest.mark.parametrize("labels, heldout, reason", [
    ("planted", 40, None), ("shuffled", 40, r"accuracy 0\.\d+ on 20 held-out pairs is not above 0.724"),
    ("planted", 9, "only 9 held-out pairs")])
def test_a_reward_model_no_better_than_chance_is_not_kept(world, tmp_path, monkeypatch, labels, heldout, reason):
    """Planted: the longer response is the better one. Shuffled: either may be."""
    generator, data = np.random.default_rng(1), str(shutil.copytree(world, tmp_path / "data"))
    y = generator.integers(100, 640, (160 + heldout, 2, 16), np.uint16)
    y[:, :, 0] = y[:, 1, 8:] = BOS
    if labels == "shuffled":
        swapped = generator.random(len(y)) < 0.5
        y[swapped] = y[swapped, ::-1]
    with open_folder(data) as folder:
        for name, rows in (("pairs.npy", y[:160]), ("heldout_pairs.npy", y[160:])):
            del folder.files[name]
            folder.save_tokens(name, rows)
        folder.settings["reward_steps"] = 40
        reward_model.save_reward_model(folder)
        folder.save()
    monkeypatch.setattr(reward_model, "fit_reward_model", lambda *_: pytest.fail("it is fitted again"))
    prepare_data.main(["toy", "--data", data, "--tokenizer", TOKENIZER])
    args = spo.get_args(["--judge", "reward", "--data", data])
    tokens = torch.from_numpy(y[:3, 0].astype(int))
    assert os.path.exists(f"{data}/reward.pt") == (reason is None)
    if reason is None:
        assert judge.make_judge(args, None, tokens)(tokens)["win_rate"] == pytest.approx(0.5, abs=0.2)
    else:
        with pytest.raises(UserError, match=f"no reward model was found better than chance .{reason}"):
            judge.make_judge(args, None, tokens)
