"""RLHF: its gradient by enumeration, its fixed point, and runs that resume exactly."""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import model
import spo
from extras import rlhf
from extras.judge import make_evaluate, read_log
from extras.reward_model import make_reward_head
from extras.tests.conftest import ROOT
from extras.tests.test_train import ONE_THREAD, SHORT, weights, without_times

# Every response of at most two tokens out of three, 1 being BOS
RESPONSES = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 2, 1], [1, 0, 0], [1, 0, 2], [1, 2, 0], [1, 2, 2]])
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.0, 1.5, -0.7], dtype=torch.double)


def tiny_model(seed):
    torch.manual_seed(seed)
    args = model.ModelArgs(dim=8, n_layers=1, n_heads=2, multiple_of=4, max_seq_len=4, vocab_size=3)
    return model.Transformer(args).double()


def gradient(policy):
    flat = torch.cat([w.grad.flatten() for w in policy.parameters()])
    policy.zero_grad()
    return flat


def test_the_gradient_is_that_of_eq_4(monkeypatch):
    """Its expectation over all pairs of samples, against the derivative of -E[r] + beta * KL over all responses."""
    policy, ref, beta, mask = tiny_model(0), tiny_model(1), 0.3, spo.response_mask(RESPONSES)
    args = SimpleNamespace(beta=beta, micro_batch_size=2, device="cpu", dtype="float64")
    logp, ref_logp = (spo.seq_logp(m, RESPONSES, mask) for m in (policy, ref))
    p = logp.exp()
    assert p.sum().item() == pytest.approx(1)
    (p * (beta * (logp - ref_logp) - REWARDS)).sum().backward()
    exact = gradient(policy)

    def expectation():
        total = 0
        for i in range(7):
            for j in range(7):
                rlhf.policy_gradient(args, policy, ref, RESPONSES[[i, j]], mask[[i, j]], REWARDS[[i, j]])
                total = total + (p[i] * p[j]).item() * gradient(policy)
        return total

    assert torch.allclose(expectation(), exact, atol=1e-10)
    args.beta = 0.0
    assert not torch.allclose(expectation(), exact, rtol=0.1)  # without the KL
    args.beta = beta

    def own_sample_in_the_baseline(r, logp, ref_logp, beta):
        penalized = r - beta * (logp - ref_logp)
        return penalized - penalized.mean()

    monkeypatch.setattr(rlhf, "rlhf_advantage", own_sample_in_the_baseline)
    assert torch.allclose(expectation(), exact / 2, atol=1e-10)  # biased


def test_micro_batches_add_up():
    policy, ref, mask, gradients = tiny_model(0), tiny_model(1), spo.response_mask(RESPONSES), []
    for size in (1, 3, 7):
        args = SimpleNamespace(beta=0.3, micro_batch_size=size, device="cpu", dtype="float64")
        rlhf.policy_gradient(args, policy, ref, RESPONSES, mask, REWARDS)
        gradients.append(gradient(policy))
    assert torch.allclose(gradients[0], gradients[2]) and torch.allclose(gradients[1], gradients[2])


def test_a_tabular_policy_ends_at_the_reference_times_exp_r_over_beta():
    ref_logp = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.05, 0.1, 0.1], dtype=torch.double).log()
    logits, beta, generator = ref_logp.clone().requires_grad_(), 0.7, torch.Generator().manual_seed(0)
    for _ in range(3000):
        logp = logits.log_softmax(0)
        y = torch.multinomial(logp.exp().detach(), 32, True, generator=generator)
        advantage = rlhf.rlhf_advantage(REWARDS[y], logp[y].detach(), ref_logp[y], beta)
        [g] = torch.autograd.grad(-(advantage * logp[y]).mean(), logits)
        logits.data -= 0.5 * g

    def distance(target):  # total variation
        return (logits.softmax(0) - target.softmax(0)).abs().sum().item() / 2

    assert distance(ref_logp + REWARDS / beta) < 0.01 < 0.1 < distance(REWARDS / beta)
    assert distance(ref_logp + REWARDS / (2 * beta)) > 0.1


@pytest.fixture(scope="module")
def rewarded(world, tmp_path_factory):
    """The world with a reward model that was fitted to nothing, but has rewards."""
    data = shutil.copytree(world, tmp_path_factory.mktemp("rlhf") / "data")
    reward_model = make_reward_head(model.load(data / "sft.pt"))
    torch.nn.init.normal_(reward_model.output.weight, generator=torch.Generator().manual_seed(0))
    model.save(reward_model, data / "reward.pt")
    return str(data)


@pytest.mark.parametrize("flags", [["--reward", "model"], ["--reward", "judge"], ["--dtype", "bfloat16"]],
                         ids=" ".join)
def test_a_run_starts_at_the_reference_and_resumes_exactly(rewarded, tmp_path, monkeypatch, flags):
    def run(out, *more):
        argv = [*SHORT, "--lr", "1e-3", "--data", rewarded, "--num_rollouts", "6", "--micro_batch_size", "4",
                "--tokenizer", f"{ROOT}/tokenizer.model", "--out", str(tmp_path / out)]
        args = spo.get_args(["--algo", "rlhf", *argv, *flags, *more])
        rlhf.train(args, make_evaluate(args))
        return read_log(tmp_path / out)

    def die_in_step(step):
        def rng(*key):
            if key[1:] == (spo.ROLLOUT, step):
                raise KeyboardInterrupt
            return real(*key)
        return rng

    log, real = run("a"), spo.rng
    assert [r["step"] for r in log] == [0, 1, 3, 5, 6, 9, 10] and log[0]["kl"] == 0 < log[-1]["kl"]
    assert log[1]["reg"] == 0 != log[2]["reg"] and log[1]["loss"] == -log[1]["reward"]
    for step, more in ((3, []), (5, ["--resume"]), (7, ["--resume"])):  # before, at and after the checkpoint of step 5
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(spo, "rng", die_in_step(step))
            run("b", *more)
    assert without_times(run("b", "--resume")) == without_times(log)
    assert all(torch.equal(weights(tmp_path / "b" / x), weights(tmp_path / "a" / x)) for x in ("ckpt.pt", "best.pt"))
    with pytest.raises(model.UserError, match="was started with beta 0.05, not 0.2"):
        run("b", "--beta", "0.2", "--resume")


@pytest.mark.parametrize("flags, words", [
    ("--batch_size 16", "batch_size are not read"), ("--batch_size=16", "batch_size are not read"),
    ("--algo dpo", "--algo and"), ("--num_rollouts 1", "num_rollouts is 1"), ("--reward expert", "reward is expert"),
    ("--reward judge --judge none", "judge none has no reward"), ("--reward judge --judge llm", "llm has no reward"),
    ("--judge toy", "reward.pt does not exist"), ("--alpha 1", "unrecognized"), ("--rollout_every 8", "unrecognized"),
])
def test_wrong_flags_end_before_any_work(world, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(spo, "stop_on_signal", lambda: None)
    argv = ["--data", world, "--tokenizer", f"{ROOT}/tokenizer.model", "--out", str(tmp_path / "run"), *flags.split()]
    with pytest.raises((model.UserError, SystemExit)) as error:
        rlhf.main(argv)
    assert words in str(error.value) + capsys.readouterr().err and not os.path.exists(tmp_path / "run")


def test_the_program(rewarded, tmp_path):
    argv = [sys.executable, "-m", "extras.rlhf", "--data", rewarded, "--steps", "2", "--num_eval_samples", "4"]
    done = subprocess.run([*argv, "--out", tmp_path / "run"], cwd=ROOT, text=True, capture_output=True, env=ONE_THREAD)
    assert done.returncode == 0 and "reward=model" in done.stdout, done.stderr
    assert {"settings.json", "log.jsonl", "best.pt", "ckpt.pt"} <= set(os.listdir(tmp_path / "run"))
