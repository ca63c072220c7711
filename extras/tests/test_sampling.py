"""fast_generate against model.generate, and the two estimators of the KL's gradient against enumeration."""
import itertools
import os
import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import spo
import test_spo
from extras.fast_generate import fast_generate
from extras.kl_estimators import compare_gradients, estimate_gradients, flat_gradient, main, score_function_kl
from model import BOS, UserError, generate, save

PROMPT = torch.full((20, 1), BOS)
tiny = partial(test_spo.tiny, scale=8)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_the_samples_are_those_of_generate(not_compiled, n_kv_heads):
    model = tiny(30, n_kv_heads=n_kv_heads)
    for max_new_tokens in (0, 1, 40):
        expected = generate(model, PROMPT, max_new_tokens, generator=seeded())
        assert torch.equal(fast_generate(model, PROMPT, max_new_tokens, seeded()), expected)
    assert not torch.equal(fast_generate(model, PROMPT, 40, seeded(2)), expected)
    assert 0 < (expected[:, 1:11] == BOS).any(1).sum() < 20  # some end early
    prompts = torch.randint(2, 30, (20, 6), generator=seeded())
    prompts[torch.arange(6) > torch.arange(20)[:, None]] = -1
    for prompt in (prompts, prompts[2:]):  # of one to six tokens, and of three or more
        y = generate(model, prompt, 20, generator=seeded())
        assert torch.equal(fast_generate(model, prompt, 20, seeded()), y) and (y[10:, :6] == prompt[10:]).all()


def test_it_stops_where_all_rows_are_finished_and_where_it_cannot_sample(not_compiled, monkeypatch):
    model, steps = tiny(8), []
    model.norm.register_forward_hook(lambda *_: steps.append(1))
    is_bos = torch.arange(8) == BOS
    for bias, expected in ((-1e4, 40), (1e4, 1)):  # BOS is never sampled, or always
        steps.clear()
        model.output.bias = torch.nn.Parameter(bias * is_bos)
        samples = fast_generate(model, PROMPT, 40)
        assert len(steps) == expected and (samples[:, 1:] == BOS).all() == (expected == 1)
    model.norm.weight.data.fill_(3e38)
    for sampler in (generate, fast_generate):
        with pytest.raises(UserError, match="the model has diverged: its logits are not finite"):
            sampler(model, PROMPT, 9)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(UserError, match="/nowhere/Python.h does not exist"):
        fast_generate(model, PROMPT, 9)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C.. compiler .* no-such-compiler does not exist"):
        fast_generate(model, PROMPT, 9)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_it_is_the_same():
    counters.clear()
    samples = [sampler(tiny(8), PROMPT, 30, generator=seeded()) for sampler in (fast_generate, generate)]
    assert torch.equal(*samples) and len(samples[0].unique(dim=0)) > 10
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # one piece, compiled once


def test_the_bias_of_both_estimators_is_that_of_enumeration():
    policy, ref = tiny(3, 1, scale=15).double(), tiny(3, 2, scale=15).double().requires_grad_(False)
    y = test_spo.all_responses(3)  # all that four new tokens can be
    mask = spo.response_mask(y)
    logp, ref_logp = spo.seq_logp(policy, y, mask), spo.seq_logp(ref, y, mask)
    pi = logp.exp().detach()
    exact = (logp.exp() * (logp - ref_logp)).sum()
    token = pi @ spo.rollout_kl(policy, ref, y, mask, ref.hidden(y[:, :-1]))
    score = 0.0
    for i, j in itertools.product(range(len(y)), repeat=2):  # two samples, each the other's baseline
        score += pi[i] * pi[j] * score_function_kl(logp[[i, j]], ref_logp[[i, j]]).mean()
    assert score.item() == pytest.approx(exact.item()) == token.item()
    exact, token, score = (flat_gradient(kl, policy) for kl in (exact, token, score))
    assert torch.allclose(score, exact)
    bias, cosine = (token - exact).norm() / exact.norm(), torch.cosine_similarity(token, exact, 0)
    alone = score_function_kl(logp[:1], ref_logp[:1]).sum()  # without a baseline
    assert torch.autograd.grad(alone, logp)[0][0].item() == pytest.approx((logp - ref_logp)[0].item())
    args = spo.get_args(["--num_rollouts", "64", "--max_new_tokens", "4"])
    measured = compare_gradients(*estimate_gradients(policy, ref, args, 80))
    assert bias > 0.5 and measured["bias"] == pytest.approx(bias.item(), rel=0.1)
    assert cosine < 0.95 and measured["cosine"] == pytest.approx(cosine.item(), abs=0.02)


def test_gradients_are_compared_without_their_noise():
    true, side = torch.eye(50)[:2]
    noise, score_noise = torch.randn(2, 4000, 50, generator=seeded()) * torch.tensor([0.5, 1.0])[:, None, None]
    expected = dict(bias=2 ** 0.5, noise=0.5 * 50 ** 0.5, score_noise=50 ** 0.5, cosine=2 / 5 ** 0.5)
    assert compare_gradients(2 * true + side + noise, true + score_noise) == pytest.approx(expected, rel=0.05)
    few, score_few = true + noise[:400], true + score_noise[:400]  # whose means differ by noise alone
    assert compare_gradients(few, score_few)["bias"] < 0.25 < 0.35 < (few - score_few).mean(0).norm()


def test_the_program_prints_a_row_per_half(tmp_path, capsys):
    save(tiny(8, 0), tmp_path / "sft.pt")
    save(tiny(8, 1), tmp_path / "policy.pt")
    for name, hidden in (("policy.pt", 0), ("sft.pt", 2)):  # the second is the reference: gradient 0
        main([str(tmp_path / name), "--batches", "16", "--data", str(tmp_path), "--max_new_tokens", "6"])
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 4 + hidden and max(map(len, printed)) <= 80
