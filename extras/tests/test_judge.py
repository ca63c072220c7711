"""Judges and what else is measured on fresh samples, against slow loops over a planted reward or a tiny model."""
import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spo
from extras import judge, toyworld
from extras.reward_model import make_reward_head
from model import BOS, ModelArgs, Transformer, UserError, file_hash, load, load_tokenizer, save

TOKENIZER = os.path.join(os.path.dirname(spo.__file__), "tokenizer.model")


def tiny(seed, vocab_size=640):
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(16, 2, 4, vocab_size=vocab_size, multiple_of=4, max_seq_len=64))
    model.tok_embeddings.weight.data.mul_(15)  # so that nothing is nearly uniform
    return model


@pytest.fixture
def data(tmp_path):
    """A folder like data/toy, of an untrained reference."""
    save(tiny(0), tmp_path / "sft.pt")
    np.save(tmp_path / "ref.npy", spo.sample(tiny(0), 80, 40, spo.rng(0, 0))[:, None].numpy().astype(np.uint16))
    return str(tmp_path)


def get_args(data, *flags):
    argv = ["--data", data, "--out", data, "--tokenizer", TOKENIZER, "--max_new_tokens", "40", "--steps", "7"]
    return spo.get_args([*argv, "--num_eval_samples", "70", *flags])


def end_of(row):
    return next((t for t in range(1, len(row)) if row[t] == BOS), len(row) - 1)


def mean_win(r, r_ref):
    return np.mean([1 / (1 + math.exp(b - a)) for a in r for b in r_ref])


def test_win_rate_and_its_standard_error():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(300, generator=generator) + 1, torch.randn(400, generator=generator)

    r, r_ref = draw()
    mean, standard_error = judge.win_rate(r, r_ref)
    assert mean == pytest.approx(mean_win(r.tolist(), r_ref.tolist()), abs=1e-5) and mean > 0.65
    assert np.std([judge.win_rate(*draw())[0] for _ in range(200)]) == pytest.approx(standard_error, rel=0.2)


@pytest.mark.parametrize("name, taste", [("toy", "limited"), ("toy-naive", "naive")])
def test_the_toy_judges_know_the_true_reward(name, taste):
    tokenizer, rng = load_tokenizer(TOKENIZER, 640), random.Random(2)
    texts = [toyworld.write_story(rng) for _ in range(300)] + ["At last the kite was back."]
    texts = sorted(texts, key=toyworld.reward)[-40:] + texts[-1:]  # rich ones, of which the tastes differ
    rows = [[BOS, *row, BOS] for row in tokenizer.encode(texts)]
    y = torch.tensor([row + [BOS] * (max(map(len, rows)) - len(row)) for row in rows])
    result = judge.make_judge(spo.get_args(["--judge", name]), tokenizer, y[:20])(y[20:])
    r = [toyworld.reward(text, taste) for text in texts]
    expected = {"win_rate": mean_win(r[20:], r[:20]), "reward": np.mean(r[20:]), "grammar": 20 / 21}
    assert result.pop("win_rate_se") > 0 and result == pytest.approx(expected, abs=1e-6)
    other = [toyworld.reward(text, "naive" if taste == "limited" else "limited") for text in texts]
    assert mean_win(other[20:], other[:20]) != pytest.approx(expected["win_rate"], abs=1e-4)


@torch.no_grad()
def test_a_reward_model_is_read_at_the_end_of_each_sample(data):
    model = make_reward_head(tiny(1))
    model.output.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    save(model, f"{data}/reward.pt")
    y = spo.sample(tiny(2), 70, 40, spo.rng(1))  # more than one forward pass

    def reward(row, padding=0):
        return model(row[None, :end_of(row) + 1 + padding])[0, -1, 0].item()

    result = judge.make_judge(get_args(data, "--judge", "reward"), None, y[:30])(y)
    r = [reward(row) for row in y]
    assert result.pop("win_rate_se") > 0
    assert result == pytest.approx({"win_rate": mean_win(r, r[:30]), "reward": np.mean(r)}, abs=1e-4)
    assert abs(np.mean([reward(row, 1) for row in y]) - np.mean(r)) > 1e-3  # a token too far is another number


def test_the_llm_sees_ours_first_and_its_name_is_recorded(monkeypatch, data):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("JUDGE_MODEL", "judge-1")
    first, second = ((9, 1, 1), (1, 9, 2)), ((1, 9, 2), (9, 1, 1))  # which story is preferred, in both orders
    args = get_args(data, "--judge", "llm")
    tokenizer = SimpleNamespace(decode=lambda rows: ["ours" if row[1] == 5 else "theirs" for row in rows])
    for better in ("ours", "theirs"):
        monkeypatch.setattr(judge, "judge_pairs", lambda pairs, path: [
            first if story_1 == better != story_2 else second for story_1, story_2 in pairs])
        ask = judge.make_judge(args, tokenizer, torch.full((6, 3), 6))
        assert ask(torch.full((4, 3), 5))["win_rate"] == (better == "ours")
    with pytest.raises(AssertionError, match="7 samples, but only 6 of the reference"):
        ask(torch.full((7, 3), 5))
    record = judge.make_evaluate(args)(load(args.init), load(args.init), 0)
    assert record["judge"] == args.judge_model == "judge-1" and record["n"] == 70 and record["ties"] == 0
    with pytest.raises(UserError, match="--num_eval_samples is 81"):
        judge.make_evaluate(get_args(data, "--judge", "llm", "--num_eval_samples", "81"))


@torch.no_grad()
def test_an_evaluation_is_a_slow_loop_over_its_samples(data):
    args, policy, ref, tokenizer = get_args(data), tiny(0), load(f"{data}/sft.pt"), load_tokenizer(TOKENIZER, 640)
    policy.tok_embeddings.weight += 0.1 * torch.randn(640, 16, generator=torch.Generator().manual_seed(0))
    kl, entropy, length, finished, r = [], [], [], [], []
    for row in spo.sample(policy, 70, 40, spo.rng(0, spo.EVAL, 3)):
        end = end_of(row)
        p, q = (model(row[None, :end])[0].softmax(-1) for model in (policy, ref))
        kl.append((p * (p / q).log()).sum())
        entropy.append(-(p * p.log()).sum())
        length.append(end)
        finished.append(row[end] == BOS)
        r.append(toyworld.reward(tokenizer.decode(row.tolist())))
    r_ref = map(toyworld.reward, tokenizer.decode(np.load(f"{data}/ref.npy")[:, 0].tolist()))
    expected = dict(kl=np.mean(kl), entropy=np.mean(entropy), length=np.mean(length), finished=np.mean(finished),
                    win_rate=mean_win(r, list(r_ref)), reward=np.mean(r), n=70)
    evaluate = judge.make_evaluate(args)
    record = evaluate(policy, ref, 3)
    assert record.pop("judge") == "toy" and record.pop("grammar") == 0 and record.pop("win_rate_se") > 0
    assert record == pytest.approx(expected, rel=1e-3) and expected["kl"] > 0.1 and 0 < expected["finished"] < 1
    assert evaluate(policy, ref, 4)["entropy"] != record["entropy"]  # fresh samples at each step


def test_samples_are_shown_before_and_after(data, capsys):
    args, policy, ref, tokenizer = get_args(data), tiny(5), load(f"{data}/sft.pt"), load_tokenizer(TOKENIZER, 640)
    evaluate = judge.make_evaluate(args)
    evaluate(policy, ref, 0)
    y = spo.sample(policy, 70, 40, spo.rng(0, spo.EVAL, 0))
    assert capsys.readouterr().out == judge.wrap("sample", tokenizer.decode(y[0].tolist())) + "\n"
    evaluate(policy, ref, 7)
    printed, text = capsys.readouterr().out, Path(data, "samples.txt").read_text()
    assert printed.endswith(text) and max(map(len, printed.splitlines())) <= 80
    before, after = (tokenizer.decode(spo.sample(m, 3, 40, spo.rng(0, spo.SHOW)).tolist()) for m in (ref, policy))
    expected = " ".join(f"before: {x} after: {y}" for x, y in zip(before, after))
    assert text.split() == expected.split() and before != after
    assert judge.wrap("x", "a\x1b[2Jb\nc") == "x: a [2Jb c"


def test_the_files_it_reads_are_recorded_or_missed(data):
    args = get_args(data)
    judge.make_evaluate(args)
    assert args.hashes == {"ref.npy": file_hash(f"{data}/ref.npy"), "tokenizer": file_hash(TOKENIZER)}
    args.judge = "reward"
    with pytest.raises(UserError, match="reward.pt does not exist: create it with `python prepare_data.py toy"):
        judge.make_evaluate(args)
    save(make_reward_head(tiny(1)), f"{data}/reward.pt")
    judge.make_evaluate(args)
    assert args.hashes["reward.pt"] == file_hash(f"{data}/reward.pt")
    os.remove(f"{data}/ref.npy")
    with pytest.raises(UserError, match="ref.npy, samples of the reference, does not exist: .* MODEL=toy`"):
        judge.make_evaluate(args)


def test_the_program_gives_the_reference_one_half_against_itself(data, capsys, monkeypatch):
    def run(checkpoint, *flags):
        save(checkpoint, f"{data}/model.pt")
        judge.main([f"{data}/model.pt", "--n", "200", "--data", data, "--tokenizer", TOKENIZER, *flags])
        return json.loads(Path(data, "evaluations.jsonl").read_text().splitlines()[-1])

    itself = run(tiny(0), "--max_new_tokens", "40")
    assert itself["kl"] == 0 and itself["n"] == 200 and itself["checkpoint"] == "model.pt"
    assert 0 < abs(itself["win_rate"] - 0.5) < 3 * itself["win_rate_se"] < 0.2
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    model = tiny(0)
    model.tok_embeddings.weight.data[BOS] = 100.0  # it samples nothing but the end
    other = run(model, "--max_new_tokens", "40")
    assert other["kl"] > 1 and other["length"] == 1 and abs(other["win_rate"] - 0.5) > 10 * other["win_rate_se"]
    monkeypatch.setattr(judge, "fast_generate", lambda model, prompt, n, generator: prompt.expand(-1, n + 1))
    assert run(tiny(0), "--max_new_tokens", "40", "--fast_sampling")["length"] == 1
    assert Path(data, "evaluations.jsonl").read_text().count("\n") == 3
    with pytest.raises(UserError, match="must have the same tokens"):
        run(tiny(0, vocab_size=600), "--max_new_tokens", "40")
    with pytest.raises(SystemExit):
        run(tiny(0), "--judge", "none")


def test_a_log_is_read_as_far_as_it_was_written(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"step": 0, "win_rate": 0.5}, {"step": 1, "loss": 2.0}, {"step": 2, "win_rate": 0.75},
               {"step": 3, "win_rate": None}, {"step": 4, "win_rate": 0.75}]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"step": 5, "win_r')
    assert judge.read_log(tmp_path) == records and judge.best_evaluation(tmp_path) == records[2]
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="no evaluation with a win rate"):
        judge.best_evaluation(tmp_path)
    for damaged in (b'{"step": 5, "win_r\n{"step": 6}\n', b"7\n", b"{}\n", b'{"step": -1}\n', b"\xff\n", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as the log of a run"):
            judge.read_log(tmp_path)
