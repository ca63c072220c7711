"""Runs: what they log and keep, and what stops, kills, full disks and wrong settings do to them."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import model
import spo
from extras.judge import best_evaluation, make_evaluate, read_log
from extras.tests.conftest import ROOT

SHORT = ["--steps", "10", "--batch_size", "8", "--warmup", "2", "--log_every", "3", "--eval_every", "5",
         "--num_eval_samples", "8", "--max_new_tokens", "30"]
TIMES = ("ms", "tokens_per_s", "eta", "time")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
ALGOS = [[algo] for algo in spo.ALGOS if algo != "rlhf"] + [["spo", "--gamma", "0.1"], ["spo", "--dtype", "bfloat16"]]


def get_args(world, out, *flags):
    defaults = [*SHORT, "--lr", "1e-3", "--data", world, "--tokenizer", f"{ROOT}/tokenizer.model", "--out", str(out)]
    return spo.get_args([*defaults, *flags])


def run(world, out, *flags, **how):
    """A short run in this process -> the records of its log."""
    args = get_args(world, out, *flags)
    evaluate = make_evaluate(args) if args.judge != "none" else None
    spo.train(args, evaluate, **how)
    return read_log(out)


def without_times(log):
    return [{name: x for name, x in record.items() if name not in TIMES} for record in log]


def weights(path):
    return torch.cat([w.flatten() for w in torch.load(path)["model"].values()])


@contextlib.contextmanager
def dying_after_checkpoint(monkeypatch, step):
    def save(m, path, **extra):
        model.save(m, path, **extra)
        if extra.get("step") == step:
            raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(spo, "save", save)
        yield


@pytest.mark.parametrize("flags", ALGOS, ids=" ".join)
def test_a_run_starts_at_the_reference_and_resumes_exactly(world, tmp_path, monkeypatch, flags):
    """10 steps at once, and 5 + 5: neither the rollouts' 8 nor the log's 3 divides 5."""
    flags = ["--algo", *flags]
    log = run(world, tmp_path / "a", *flags)
    assert [r["step"] for r in log] == [0, 1, 3, 5, 6, 9, 10] and log[0]["kl"] == 0 < log[-1]["kl"]
    assert log[1]["reg"] == 0 or "slic" in flags
    assert flags[1] not in ("dpo", "hypo") or log[1]["loss"] == torch.tensor(2.0).log().item()
    with dying_after_checkpoint(monkeypatch, 5):
        run(world, tmp_path / "b", *flags)
    again = run(world, tmp_path / "b", *flags, "--resume")
    assert without_times(again) == without_times(log)
    assert torch.equal(weights(tmp_path / "b/ckpt.pt"), weights(tmp_path / "a/ckpt.pt"))


def test_bfloat16_is_near_float32(world, tmp_path):
    full, half = (run(world, tmp_path / dtype, "--dtype", dtype, "--log_every", "1")
                  for dtype in ("float32", "bfloat16"))
    for name, tolerance in dict(margin=1.5, chosen=3, reg=0.3).items():
        a, b = ([r[name] for r in log if "loss" in r] for log in (full, half))
        assert a != b and a == pytest.approx(b, abs=tolerance, rel=0.1), name


KILLS = """
import os, random, signal, sys, time
import spo, torch._dynamo  # which torch imports when an optimizer is made: in time for the forks
out, argv = sys.argv[1], sys.argv[2:]
def child(name):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        try:
            spo.train(spo.get_args(argv + ["--out", name] + ["--resume"] * os.path.exists(f"{name}/ckpt.pt")))
            os._exit(0)
        finally:
            os._exit(1)
    return pid
began, moments = time.monotonic(), random.Random(0)
assert os.waitpid(child(f"{out}/undisturbed"), 0)[1] == 0
whole = time.monotonic() - began
for _ in range(20):
    pid = child(f"{out}/killed")
    time.sleep(whole * moments.uniform(0, 1 / 6))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(torch.load(f"{out}/killed/ckpt.pt")["step"] if os.path.exists(f"{out}/killed/ckpt.pt") else None)
assert os.waitpid(child(f"{out}/killed"), 0)[1] == 0
"""


def test_killed_at_20_moments_and_resumed_it_is_the_same_run(world, tmp_path):
    argv = [*SHORT, "--data", world, "--steps", "40", "--eval_every", "2", "--rollout_every", "3", "--judge", "none"]
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path, *argv], cwd=ROOT, text=True, capture_output=True,
                          env=ONE_THREAD | {"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    steps = done.stdout.split()
    assert len(steps) == 20 and len(set(steps)) > 5, steps  # kills before, between and after checkpoints
    logs = [without_times(read_log(tmp_path / name)) for name in ("undisturbed", "killed")]
    assert logs[0] == logs[1] and not list(tmp_path.glob("*/*.part"))
    a, b = (torch.load(tmp_path / name / "ckpt.pt") for name in ("undisturbed", "killed"))
    assert all(torch.equal(w, b["model"][name]) for name, w in a["model"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(x, b["optimizer"]["state"][i][name]) for name, x in state.items())


def test_a_step_that_is_not_finite_is_skipped_and_five_in_a_row_stop(world, tmp_path, monkeypatch, capsys):
    real, bad, step = spo.preference_loss, {1, 4, 5, 7, 8}, 0

    def preference_loss(args, logp, ref_logp, mu):
        nonlocal step
        step += 1
        return real(args, logp, ref_logp, mu) * (math.nan if step - 1 in bad else 1)

    monkeypatch.setattr(spo, "preference_loss", preference_loss)
    log = run(world, tmp_path / "a", "--log_every", "1")
    assert [r["skipped"] for r in log if "loss" in r] == [0, 1, 1, 1, 2, 3, 3, 4, 5, 5]
    assert [r["step"] for r in log if r.get("loss", 0) is None] == [2, 5, 6, 8, 9]  # null, for JSON has no nan
    assert "step 4 is skipped" in capsys.readouterr().out and weights(tmp_path / "a/ckpt.pt").isfinite().all()
    resumed = run(world, tmp_path / "a", "--log_every", "1", "--steps", "11", "--resume")
    assert [r["skipped"] for r in resumed if "loss" in r][10:] == [5]
    bad, step = set(range(6, 11)), 0
    with pytest.raises(model.UserError, match="steps 6 to 10 were not finite: start again with a lower --lr"):
        run(world, tmp_path / "b", "--steps", "20")
    bad, step = set(range(5)), 0
    with pytest.raises(model.UserError, match="steps 0 to 4 were not finite: a setting or the data is to blame, not"):
        run(world, tmp_path / "c")
    assert torch.load(tmp_path / "b/ckpt.pt")["step"] == 10 and weights(tmp_path / "b/ckpt.pt").isfinite().all()


def test_the_best_model_is_kept_before_its_win_rate_is_logged(world, tmp_path, monkeypatch):
    wins = iter([0.4, 0.6, 0.6, 0.5])  # of two equal ones the first is the best

    def evaluate(policy, ref, step):
        return dict(win_rate=next(wins))

    flags = ["--judge", "none", "--eval_every", "2", "--steps", "6"]
    spo.train(get_args(world, tmp_path / "a", *flags), evaluate)
    assert best_evaluation(tmp_path / "a")["step"] == 2
    spo.train(get_args(world, tmp_path / "b", *flags, "--steps", "2"))
    assert torch.equal(weights(tmp_path / "a/best.pt"), weights(tmp_path / "b/ckpt.pt"))
    # resumed, a lower win rate does not replace it, whatever the log says
    os.remove(tmp_path / "a/log.jsonl")
    wins = iter([0.5, 0.55])
    spo.train(get_args(world, tmp_path / "a", *flags, "--steps", "8", "--resume"), evaluate)
    assert [r["step"] for r in read_log(tmp_path / "a") if "win_rate" in r] == [6, 8]
    assert torch.equal(weights(tmp_path / "a/best.pt"), weights(tmp_path / "b/ckpt.pt"))

    # a last evaluation that is not one of the regular ones is not repeated, and counts
    flags = ["--judge", "none", "--eval_every", "4"]
    wins = iter([0.4, 0.5, 0.7, 0.6])
    spo.train(get_args(world, tmp_path / "d", *flags, "--steps", "6"), evaluate)
    best = weights(tmp_path / "d/best.pt")
    spo.train(get_args(world, tmp_path / "d", *flags, "--steps", "8", "--resume"), evaluate)
    assert [r["step"] for r in read_log(tmp_path / "d") if "win_rate" in r] == [0, 4, 6, 8]
    assert torch.equal(weights(tmp_path / "d/best.pt"), best)

    def log(args, **record):
        raise KeyboardInterrupt

    wins = iter([0.4])
    monkeypatch.setattr(spo, "log", log)
    with pytest.raises(KeyboardInterrupt):
        spo.train(get_args(world, tmp_path / "c", *flags), evaluate)
    assert os.path.exists(tmp_path / "c/best.pt")


def test_hypo_is_dpos_loss_with_spos_regularizer(world, tmp_path, monkeypatch):
    flags = ["--judge", "none", "--log_every", "1", "--algo"]
    for name, algo in (("dpo", "dpo --beta 0.2"), ("hypo", "hypo --beta 0.2 --beta_kl 0")):
        run(world, tmp_path / name, *flags, *algo.split())
    assert torch.equal(weights(tmp_path / "hypo/ckpt.pt"), weights(tmp_path / "dpo/ckpt.pt"))
    # the regularizer alone, from a policy that is not the reference
    logs = []
    monkeypatch.setattr(spo, "preference_loss", lambda args, logp, ref_logp, mu: 0 * logp[:, 0])
    for algo in ("spo --beta 0.3", "hypo --beta_kl 0.3", "hypo --beta_kl 0.1"):
        policy, ref = model.load(f"{world}/sft.pt"), model.load(f"{world}/sft.pt")
        policy.norm.weight.data.mul_(1.5)
        models = iter((policy, ref))
        monkeypatch.setattr(spo, "load", lambda *_: next(models))
        logs.append(without_times(run(world, tmp_path / algo, *flags, *algo.split())))
    assert torch.equal(weights(tmp_path / "spo --beta 0.3/ckpt.pt"), weights(tmp_path / "hypo --beta_kl 0.3/ckpt.pt"))
    assert logs[0] == logs[1] and logs[0][0]["reg"] > 1
    assert logs[2][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"] / 3, rel=1e-4)


def test_rollouts_every_k_steps_by_the_given_sampler(world, tmp_path):
    sampled = []

    def sampler(policy, prompt, max_new_tokens, generator):
        sampled.append(policy.norm.weight.detach().clone())
        return model.generate(policy, prompt, max_new_tokens, generator=generator)

    began = time.perf_counter()
    log = run(world, tmp_path / "a", "--rollout_every", "3", "--judge", "none", generate=sampler)
    assert 0 < sum(r["ms"] * n for r, n in zip(log, (1, 2, 3, 3), strict=True)) / 1e3 < time.perf_counter() - began
    assert len(sampled) == 4 and not any(torch.equal(a, b) for a, b in zip(sampled, sampled[1:]))


def test_a_record_is_the_mean_of_its_steps_and_tells_the_time_left(world, tmp_path):
    every, some = (run(world, tmp_path / n, "--log_every", n, "--judge", "none") for n in ("1", "4"))
    for record, steps in zip(some, (every[:1], every[1:4], every[4:8]), strict=True):
        for name in ("loss", "reg", "margin", "accuracy", "grad_norm", "tokens"):
            assert record[name] == pytest.approx(np.mean([r[name] for r in steps]), rel=1e-5)
        assert record["step"] == steps[-1]["step"]
        assert record["eta"] == model.format_time(record["ms"] / 1e3 * (10 - record["step"]))


def test_learning_rate_batches_and_seeds(world):
    assert not torch.equal(spo.batch_indices(48, 8, 0, spo.BATCH, 0), spo.batch_indices(48, 8, 1, spo.BATCH, 0))
    assert not torch.equal(torch.rand(9, generator=spo.rng(0, 1, 2)), torch.rand(9, generator=spo.rng(1, 1, 2)))
    args = spo.get_args("--warmup 10 --lr 1".split())
    assert [spo.get_lr(step, args) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    epochs = [torch.cat([spo.batch_indices(43, 8, 0, spo.BATCH, 5 * epoch + i) for i in range(5)]) for epoch in (0, 1)]
    assert all(len(epoch.unique()) == 40 for epoch in epochs) and not torch.equal(*epochs)
    data = spo.Responses(np.ones((9, 4, 6), np.uint16))
    sizes = [len(y) for _, y, _ in spo.micro_batches(data, torch.arange(9), 8, "cpu")]
    assert sizes == [8, 8, 8, 8, 4]


# ---------------------------------------------------------------------------------------------------
# The command line

def test_defaults_are_e2s_and_one_flag_belongs_to_one_algorithm(capsys, monkeypatch):
    for has_gpu, sizes in ((True, [64, 32, 32, 32]), (False, [64, 16, 2, 32])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        models = ("toy", "stories260K", "stories15M", "stories110M")
        assert [spo.get_args(["--model", name]).micro_batch_size for name in models] == sizes
    args = spo.get_args(["--model", "stories110M"])
    assert (args.batch_size, args.steps, args.warmup) == (128, 40000, 5000)
    assert (args.num_rollouts, args.rollout_every) == (32, 8)
    assert args.tokenizer == "data/stories110M/tokenizer.model" and args.init == "data/stories110M/sft.pt"
    assert args.lr == 4.2e-6 and spo.get_args(["--model", "mine", "--data", "extras", "--algo", "dpo"]).lr == 2e-5
    toy = spo.get_args(["--model", "toy-naive", "--algo", "dpo"])
    assert (toy.judge, toy.lr, toy.beta, toy.tokenizer) == ("toy-naive", 4e-4, 0.3, "tokenizer.model")
    assert spo.get_args([]).lr == 2e-4
    others = ("", "--seed 1", "--algo dpo", "--beta 0.1", "--model toy-naive")
    outs = [spo.get_args(flags.split()).out for flags in others]
    assert len(set(outs)) == 5 and outs[0] == "out/toy-spo-alpha0.01-beta0.05-gamma0-seed0"
    assert spo.get_args(["--algo", "dpo", "--data", "data/toy-8000/"]).out == "out/toy-8000-dpo-beta0.3-seed0"
    for algo, own in spo.ALGOS.items():
        with contextlib.suppress(SystemExit):
            spo.get_args(["--algo", algo, "--help"])
        shown = capsys.readouterr().out
        for name in spo.HELP:
            assert (f"--{name} " in shown) == (name in own) == hasattr(spo.get_args(["--algo", algo]), name)


@pytest.mark.parametrize("flags, words", [
    ("--algo ppo", "invalid choice"), ("--delta 1", "unrecognized arguments: --delta 1"), ("--alph 1", "unrecognized"),
    ("--algo dpo --alpha 0.1", "unrecognized arguments: --alpha 0.1"), ("--alpha -1", "alpha is -1"),
    ("--alpha nan", "alpha is nan"), ("--alpha inf", "alpha is inf"), ("--beta -0.1", "beta is -0.1"),
    ("--algo ipo --beta 0", "beta is 0"), ("--num_rollouts 0", "num_rollouts is 0"), ("--steps ten", "invalid int"),
    ("--num_eval_samples 1", "num_eval_samples is 1"), ("--rollout_every 0", "rollout_every is 0"),
    ("--batch_size 100", "has 48 rows"), ("--device nowhere", "nowhere"),
    ("--max_new_tokens 129", "the model reads 128"), ("--init nowhere.pt", "nowhere.pt is not a file"),
    ("--data {tmp}/four", "rows of 4 responses"), ("--data {tmp}/long", "lengths that this model does not have"),
    ("--data {tmp}/word", "holds tokens or lengths"), ("--data nowhere", "nowhere/"),
    ("--tokenizer nowhere.model", "nowhere.model is missing"),
    ("--out {tmp}/file/run", "cannot be created"), ("--resume", "nothing to resume"), ("--judge gpt", "invalid choice"),
    ("--model stories15m --data nowhere", "--model is stories15m, none of toy"),
])
def test_a_wrong_flag_is_one_sentence_and_status_2(world, tmp_path, flags, words, capsys):
    (tmp_path / "file").write_text("text")
    word = np.ones((9, 2, 20), np.uint16)
    word[8, 1, 19] = 640  # the first token that there is not
    for name, tokens in dict(four=np.ones((9, 4, 20)), long=np.ones((9, 2, 130)), word=word).items():
        shutil.copytree(world, tmp_path / name)
        np.save(tmp_path / name / "pairs.npy", tokens.astype(np.uint16))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((model.UserError, SystemExit)) as error:
        run(world, tmp_path / "run", *flags.format(tmp=tmp_path).split())
    said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    said = re.sub(r" \(make: [A-Z]+=\)", "", said)
    assert words in said and len(said) < 350 and (error.type is not SystemExit or error.value.code == 2)
    assert sorted(os.listdir(tmp_path)) == before  # nothing half-written


def test_best_is_within_the_bound_on_the_kl(world, tmp_path, capsys):
    """A run that diverges: its win rate rises, but beyond the bound; resuming knows that too."""
    evaluations = {0: (0.5, 0.0), 5: (0.6, 3.0), 10: (0.9, 12.0), 15: (0.7, None), 20: (0.55, 1.0), 25: (0.58, 1.0)}

    def evaluate(policy, ref, step):
        win_rate, kl = evaluations[step]
        return dict(win_rate=win_rate, kl=float("nan") if kl is None else kl)

    for out, flags in (("a", ["--steps", "25"]), ("b", ["--steps", "20"])):
        args = get_args(world, tmp_path / out, "--max_kl", "10", *flags)
        spo.train(args, evaluate)
        if out == "b":
            spo.train(get_args(world, tmp_path / out, "--max_kl", "10", "--steps", "25", "--resume"), evaluate)
        assert capsys.readouterr().out.count("warning: kl is above --max_kl 10: best.pt stays as it is") == 1
        spo.train(get_args(world, tmp_path / f"{out}5", "--max_kl", "10", "--steps", "5"), evaluate)
        assert torch.equal(weights(tmp_path / out / "best.pt"), weights(tmp_path / f"{out}5/best.pt"))
        assert torch.load(tmp_path / out / "ckpt.pt")["best_win_rate"] == 0.6
    spo.train(get_args(world, tmp_path / "free", "--steps", "20"), evaluate)
    assert not torch.equal(weights(tmp_path / "free/best.pt"), weights(tmp_path / "a/best.pt"))


def test_prompts_that_do_not_fit_or_differ_are_refused(world, tmp_path):
    data = shutil.copytree(world, tmp_path / "data")
    pairs, lengths = np.load(data / "pairs.npy"), np.full(48, 3, np.uint16)
    pairs[:, :, 1:3] = 9
    np.save(data / "pairs.npy", pairs)
    np.save(data / "pairs_prompt_length.npy", lengths)
    args, policy = get_args(str(data), tmp_path / "a", "--max_new_tokens", "3"), model.load(f"{world}/sft.pt")
    assert spo.load_data(args, policy.args)[0].prompts(torch.arange(48)).tolist() == 48 * [[1, 9, 9]]
    assert "pairs_prompt_length.npy" in args.hashes
    with pytest.raises(model.UserError, match="max_new_tokens is 2, but a prompt in .*pairs.npy has 3 tokens"):
        spo.load_data(get_args(str(data), tmp_path / "a", "--max_new_tokens", "2"), policy.args)
    pairs[7, 1, 2] = 8
    np.save(data / "pairs.npy", pairs)
    with pytest.raises(model.UserError, match="the responses of a row have different prompts"):
        spo.load_data(args, policy.args)
    np.save(data / "pairs_prompt_length.npy", lengths[1:])
    with pytest.raises(model.UserError, match="pairs_prompt_length.npy is not of its rows"):
        spo.load_data(args, policy.args)


def test_what_may_differ_when_resuming_and_nothing_else(world, tmp_path):
    data = shutil.copytree(world, tmp_path / "data")
    run(str(data), tmp_path / "a", "--steps", "2")
    saved = torch.load(tmp_path / "a/ckpt.pt")["args"]
    assert spo.MAY_DIFFER == {"resume", "out", "device", "micro_batch_size", "fast_sampling", "data", "init",
                              "tokenizer", "model", "steps", "hashes"}
    assert set(saved["hashes"]) == {"init", "pairs.npy", "heldout_pairs.npy", "ref.npy", "tokenizer"}

    def resume(args):
        policy = model.load(f"{world}/sft.pt")
        spo.load_run(args, policy, torch.optim.AdamW(policy.parameters()))

    for name, x in saved.items():
        args = get_args(str(data), tmp_path / "a", "--resume")
        args.hashes = dict(saved["hashes"])
        setattr(args, name, x + 1 if isinstance(x, (int, float)) else "other")
        if name not in ("hashes", "out", "device"):
            if name in spo.MAY_DIFFER:
                resume(args)
            else:
                with pytest.raises(model.UserError, match=f"was started with {name}"):
                    resume(args)
    for name in ("pairs.npy", "ref.npy"):
        np.save(data / name, np.load(f"{world}/{name}")[::-1])
        with pytest.raises(model.UserError, match=f"was started with {name}"):
            run(str(data), tmp_path / "a", "--resume")
        shutil.copy(f"{world}/{name}", data)
    other = model.load(f"{world}/sft.pt")
    other.norm.weight.data[0] += 1
    model.save(other, tmp_path / "other.pt")
    with pytest.raises(model.UserError, match="was started with init"):
        run(str(data), tmp_path / "a", "--resume", "--init", str(tmp_path / "other.pt"))
    with pytest.raises(model.UserError, match="is at step 2 already"):
        run(str(data), tmp_path / "a", "--resume", "--steps", "1")
    whole = torch.load(tmp_path / "a/ckpt.pt")
    for damage in (dict(args=None), dict(step="2"), dict(history=[1]), dict(rollouts=torch.full((8, 9), 640)),
                   dict(optimizer={}), dict(model={})):
        torch.save(whole | damage, tmp_path / "a/ckpt.pt")
        with pytest.raises(model.UserError, match="is not what a run from"):
            run(str(data), tmp_path / "a", "--resume", "--steps", "2")
    torch.save(whole, tmp_path / "a/ckpt.pt")
    for log in ("{]\n", "[" * 100_000 + "\n", "7\n", "{}\n"):
        (tmp_path / "a/log.jsonl").write_text(log)
        with pytest.raises(model.UserError, match="log.jsonl"):
            run(str(data), tmp_path / "a", "--resume")
    shutil.copy(f"{world}/sft.pt", tmp_path / "a/ckpt.pt")
    with pytest.raises(model.UserError, match="not what a run from"):
        run(str(data), tmp_path / "a", "--resume")


def test_what_the_folder_was_not_made_from_is_refused(world, tmp_path):
    """SLiC-HF on another model's samples, and another tokenizer of as many tokens; the others take another --init."""
    policy = model.load(f"{world}/sft.pt")
    policy.norm.weight.data.mul_(1.01)
    model.save(policy, tmp_path / "aligned.pt")
    flags = ["--init", str(tmp_path / "aligned.pt"), "--judge", "none", "--steps", "1", "--algo"]
    run(world, tmp_path / "a", *flags, "spo")
    with pytest.raises(model.UserError, match="ref.npy, which slic learns from, has samples of another model"):
        run(world, tmp_path / "b", *flags, "slic")
    args = get_args(world, tmp_path / "b", "--algo", "slic")
    spo.load_data(args, policy.args)
    assert set(args.hashes) == {"init", "pairs.npy", "ref.npy"}  # all that it learns from, for when it is resumed
    shutil.copy(f"{ROOT}/tokenizer.model", tmp_path)
    with open(tmp_path / "tokenizer.model", "ab") as f:
        f.write(b"\x18\x00")  # an unknown field: the same tokens, another file
    for judge in ("none", "toy"):
        with pytest.raises(model.UserError, match="is not the tokenizer that .* was made with"):
            run(world, tmp_path / "c", "--tokenizer", str(tmp_path / "tokenizer.model"), "--judge", judge)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
    (tmp_path / "mine").mkdir()
    args = spo.get_args(["--model", "my-toy", "--data", str(tmp_path / "mine")])
    assert args.lr == 5e-5 and args.tokenizer == f"{tmp_path}/mine/tokenizer.model"


def test_a_used_folder_is_refused_and_half_written_files_are_removed(world, tmp_path):
    out = tmp_path / "a[1]"
    run(world, out, "--steps", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flags, words in (([], "of the same settings"), (["--lr", "0.5"], "now with lr 0.5 instead of 0.001")):
        with pytest.raises(model.UserError, match=f"holds an earlier run, {words}: continue it with --resume"):
            run(world, out, "--steps", "2", *flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert json.loads(before["settings.json"])["lr"] == 1e-3
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):  # each alone is a run that is not to be replaced
        (tmp_path / name).mkdir()
        shutil.copy(out / name, tmp_path / name)
        with pytest.raises(model.UserError, match="holds an earlier run, of unknown settings"):
            run(world, tmp_path / name)
    (out / "best.pt.part").write_bytes(b"half")
    (out / "log.jsonl").write_bytes(before["log.jsonl"] + b'{"step": 3, "lo')  # as a kill leaves them
    assert run(world, out, "--resume")[-1]["step"] == 10 and not list(out.glob("*.part"))


def test_a_finished_run_is_left_as_it_is(world, tmp_path, monkeypatch, capsys):
    flags = ["--steps", "5", "--eval_every", "5", "--log_every", "5"]
    with dying_after_checkpoint(monkeypatch, 5):
        run(world, tmp_path / "a", *flags)
    run(world, tmp_path / "a", *flags, "--resume")  # its last evaluation is missing: not finished
    assert [r["step"] for r in read_log(tmp_path / "a") if "win_rate" in r] == [0, 5]
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != "settings.json"}
    capsys.readouterr()
    run(world, tmp_path / "a", *flags, "--resume")
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "a is finished at step 5: more --steps (make: STEPS=) train it longer")
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in before}


def test_a_missing_file_names_the_command_that_creates_it(world, tmp_path):
    imported = shutil.copytree(world, tmp_path / "imported")
    os.remove(imported / "ranked.npy")
    for flags, words in (
            (["--algo", "ranked"], r"imported/ranked.npy does not exist: .* ranked.npy and best.npy need rows of resp"),
            (["--model", "stories15M", "--data", f"{tmp_path}/none"],
             r"none/pairs.npy .*`make data MODEL=stories15M DATA=.*none SOURCE=...`"),
            (["--data", f"{tmp_path}/none"], r"none/pairs.npy .*`make data MODEL=toy DATA=.*none`")):
        with pytest.raises(model.UserError, match=words):
            spo.load_data(get_args(str(imported), tmp_path / "a", *flags), model.load(f"{world}/sft.pt").args)


def test_the_training_table_fits_the_screen(monkeypatch):
    heads = dict(zip(spo.COLUMNS, spo.COLUMNS))
    for columns, missing in ((200, set()), (80, set()), (79, {"chosen"}), (60, {"chosen", "rejected", "grad_norm"})):
        monkeypatch.setenv("COLUMNS", str(columns))
        row = spo.table_row(heads)
        assert len(row) <= columns and set(spo.COLUMNS) - set(row.split()) == missing


def test_a_full_disk_leaves_the_old_checkpoint(world, tmp_path):
    import resource
    run(world, tmp_path / "a", "--steps", "5")
    before, limits = (tmp_path / "a/ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(model.UserError, match="a/ckpt.pt cannot be written .*earlier version of it is unchanged"):
            run(world, tmp_path / "a", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a/ckpt.pt").read_bytes() == before and not list(tmp_path.glob("a/*.part"))


def test_a_folder_that_goes_away_is_an_error_that_names_it(world, tmp_path):
    def evaluate(policy, ref, step):
        shutil.rmtree(tmp_path / "a")
        return {}

    with pytest.raises(OSError, match=f"{tmp_path}/a/log.jsonl"):
        spo.train(get_args(world, tmp_path / "a"), evaluate)


def start_program(world, out, *flags):
    argv = [*SHORT, "--data", world, "--out", str(out), "--lr", "1e-3", *flags]
    return subprocess.Popen([sys.executable, "-u", "spo.py", *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=ONE_THREAD)


@pytest.mark.parametrize("number, others", [(signal.SIGINT, []), (signal.SIGTERM, ["--num_eval_samples", "512"])])
def test_the_first_signal_finishes_the_step_and_saves(world, tmp_path, number, others):
    program = start_program(world, tmp_path / "a", "--steps", "100000", "--eval_every", "100000", *others)
    wait_for = "  step" if others else "     3"  # in the first evaluation, or between steps
    next(line for line in program.stdout if line.startswith(wait_for))
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130 and "RESUME=1" in out and "finishing this step" in out and not err
    step = torch.load(tmp_path / "a/ckpt.pt")["step"]
    assert step >= 1
    log = run(world, tmp_path / "a", "--steps", str(step + 1), "--eval_every", "100000", "--resume", *others)
    assert log[-1]["step"] == step + 1


def test_a_closed_terminal_saves_too(world, tmp_path):
    ours, theirs = os.openpty()
    argv = [*SHORT, "--data", world, "--out", str(tmp_path / "a"), "--judge", "none", "--steps", "100000"]
    program = subprocess.Popen([sys.executable, "spo.py", *argv], cwd=ROOT, stdout=theirs, stderr=theirs,
                               stdin=theirs, env=ONE_THREAD, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    os.close(theirs)
    shown = b""
    while b"     3" not in shown:
        shown += os.read(ours, 1000)
    program.send_signal(signal.SIGHUP)
    os.close(ours)
    assert program.wait(timeout=60) == 130 and torch.load(tmp_path / "a/ckpt.pt")["step"] >= 3
    nohup = subprocess.Popen(["nohup", sys.executable, "spo.py", *argv[:-1], "20", "--out", str(tmp_path / "b")],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ONE_THREAD)
    next(line for line in nohup.stdout if line.startswith("     3"))
    nohup.send_signal(signal.SIGHUP)
    nohup.communicate(timeout=60)
    assert nohup.returncode == 0 and torch.load(tmp_path / "b/ckpt.pt")["step"] == 20


def test_the_second_signal_ends_at_once(world, tmp_path):
    program = start_program(world, tmp_path / "a", "--num_eval_samples", "100000")
    next(line for line in program.stdout if line.startswith("  step"))  # an evaluation of minutes begins
    program.send_signal(signal.SIGINT)
    next(line for line in program.stdout if line.startswith("finishing"))
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=20) == -signal.SIGTERM


def test_a_stop_before_the_first_step_finishes_one(world, tmp_path):
    stop = threading.Event()
    stop.set()
    assert run(world, tmp_path / "a", stop=stop)[-1]["step"] == 1 == torch.load(tmp_path / "a/ckpt.pt")["step"]


def test_spo_and_model_alone_train_resume_and_refuse_a_used_folder(world, tmp_path):
    for name in ("spo.py", "model.py"):
        shutil.copy(f"{ROOT}/{name}", tmp_path)
    argv = [sys.executable, "spo.py", *SHORT, "--data", world, "--out", "run", "--judge", "none"]

    def program(*flags):
        return subprocess.run([*argv, *flags], cwd=tmp_path, text=True, capture_output=True, env=ONE_THREAD)

    first, again, resumed = program(), program(), program("--resume", "--steps", "12")
    assert first.returncode == 0 and re.match("algo=spo model=toy .*\n", first.stdout), first.stderr
    assert again.returncode == 2 and "error: run holds an earlier run, of the same settings" in again.stderr
    assert resumed.returncode == 0 and read_log(tmp_path / "run")[-1]["step"] == 12, resumed.stderr
    assert all(len(line) <= 80 for line in first.stdout.splitlines())
    # the losses need nothing but torch, on any system
    missing = "dict.fromkeys(('numpy', 'sentencepiece', 'fcntl', 'resource'))"
    program = f"import sys; sys.modules |= {missing}; from spo import spo_loss, token_kl"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
