"""Judges and what else is measured on fresh samples, against slow loops over a planted reward or a tiny model."""
import json
import math
import os
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spo
import test_spo
from extras import judge, toyworld
from extras.reward_model import make_reward_head, reward_at_end
from extras.tests.conftest import TOKENIZER
from model import BOS, UserError, file_hash, load, load_tokenizer, save
from test_spo import end_of

tiny = partial(test_spo.tiny, 640, scale=15)


@pytest.fixture
def data(tmp_path):
    """A folder like data/toy, of an untrained reference."""
    save(tiny(0), tmp_path / "sft.pt")
    y = spo.sample(tiny(0), spo.no_prompts(80), 40, spo.rng(0, 0))
    np.save(tmp_path / "ref.npy", y[:, None].numpy().astype(np.uint16))
    return str(tmp_path)


def get_args(data, *flags):
    argv = ["--data", data, "--out", data, "--tokenizer", TOKENIZER, "--max_new_tokens", "40", "--steps", "7"]
    return spo.get_args([*argv, "--num_eval_samples", "70", *flags])


def mean_win(r, r_ref):
    return np.mean([1 / (1 + math.exp(b - a)) for a in r for b in r_ref])


def test_win_rate_and_its_standard_error():
    generator = torch.Generator().manual_seed(0)
    draws = [(torch.randn(300, generator=generator) + 1, torch.randn(400, generator=generator)) for _ in range(200)]
    mean, standard_error = judge.win_rate(*draws[0])
    assert mean == pytest.approx(mean_win(*draws[0]), abs=1e-5) and mean > 0.65
    assert np.std([judge.win_rate(*draw)[0] for draw in draws]) == pytest.approx(standard_error, rel=0.2)


def test_the_naive_judge_knows_its_taste_and_the_grammar():
    tokenizer, rng = load_tokenizer(TOKENIZER, 640), random.Random(2)
    texts = sorted([toyworld.write_story(rng) for _ in range(300)], key=toyworld.reward)
    texts = texts[-40:] + ["At last the kite was back."]  # rich ones, of which the tastes differ
    rows = [[BOS, *row, BOS] for row in tokenizer.encode(texts)]
    y = torch.tensor([row + [BOS] * (max(map(len, rows)) - len(row)) for row in rows])
    result = judge.make_judge(spo.get_args(["--judge", "toy-naive"]), tokenizer, y[:20])(y[20:])
    naive, limited = ([toyworld.reward(text, taste) for text in texts] for taste in ("naive", "limited"))
    assert result["reward"] == pytest.approx(np.mean(naive[20:])) and result["grammar"] == 20 / 21
    assert result["win_rate"] == pytest.approx(mean_win(naive[20:], naive[:20]), abs=1e-6)
    assert result["win_rate"] != pytest.approx(mean_win(limited[20:], limited[:20]), abs=1e-4)


@torch.no_grad()
def test_a_reward_model_is_read_at_the_end_of_each_sample(data):
    model = make_reward_head(tiny(1))
    model.output.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    save(model, f"{data}/reward.pt")
    y = spo.sample(tiny(2), spo.no_prompts(70), 40, spo.rng(1))  # more than one forward pass

    def reward(row, padding=0):
        return model(row[None, :end_of(row) + 1 + padding])[0, -1, 0].item()

    args = get_args(data, "--judge", "reward")
    result = judge.make_judge(args, None, y[:30])(y)
    r = [reward(row) for row in y]
    assert result["win_rate"] == pytest.approx(mean_win(r, r[:30]), abs=1e-4)
    assert result["reward"] == pytest.approx(np.mean(r), abs=1e-4)
    assert abs(np.mean([reward(row, 1) for row in y]) - np.mean(r)) > 1e-3  # a token too far is another number
    cut = torch.full((1, 65), 99)  # one token more than the context
    assert reward_at_end(model, cut, spo.response_mask(cut)) == pytest.approx(reward(cut[0, :64]), abs=1e-4)
    assert args.hashes == {"reward.pt": file_hash(f"{data}/reward.pt")}


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
    calls = []
    monkeypatch.setattr(judge, "ask_test_question", calls.append)
    record = judge.make_evaluate(args)(load(args.init), load(args.init), 0)
    assert calls == [2 * 70 * 2]  # two evaluations in both orders: at steps 0 and 7
    assert record["judge"] == args.judge_model == "judge-1" and record["n"] == 70
    with pytest.raises(UserError, match="--num_eval_samples must be at most 80"):
        judge.make_evaluate(get_args(data, "--judge", "llm", "--num_eval_samples", "81"))


@torch.no_grad()
def test_an_evaluation_is_a_slow_loop_over_its_samples_and_shows_some(data, capsys):
    args, policy, ref, tokenizer = get_args(data), tiny(0), load(f"{data}/sft.pt"), load_tokenizer(TOKENIZER, 640)
    policy.tok_embeddings.weight += 0.1 * torch.randn(640, 16, generator=torch.Generator().manual_seed(0))
    kl, entropy, length, finished, r = [], [], [], [], []
    y = spo.sample(policy, spo.no_prompts(70), 40, spo.rng(0, spo.EVAL, 7))
    for row in y:
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
    record = evaluate(policy, ref, 7)
    printed, text = capsys.readouterr().out, Path(data, "samples.txt").read_text()
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert expected["kl"] > 0.1 and 0 < expected["finished"] < 1
    assert evaluate(policy, ref, 4)["entropy"] != record["entropy"]  # fresh samples at each step
    assert printed == judge.wrap("sample", tokenizer.decode(y[0].tolist())) + text
    assert max(map(len, printed.splitlines())) <= 80 and judge.wrap("x", "a\x1b[2Jb\nc") == "x: a [2Jb c\n"
    shown = [spo.sample(m, spo.no_prompts(3), 40, spo.rng(0, spo.SHOW)).tolist() for m in (ref, policy)]
    before, after = map(tokenizer.decode, shown)
    expected = " ".join(f"before: {x} after: {y}" for x, y in zip(before, after))
    assert text.split() == expected.split() and before != after
    assert args.hashes == {"ref.npy": file_hash(f"{data}/ref.npy"), "tokenizer": file_hash(TOKENIZER)}


@torch.no_grad()
@pytest.mark.parametrize("program", [False, True])
def test_with_prompts_the_samples_for_the_same_held_out_prompt_are_compared(data, tmp_path, program):
    """In training, and by `make evaluate`."""
    tokenizer, prompts = load_tokenizer(TOKENIZER, 640), [[BOS, 9, 8], [BOS], [BOS, 7, 6, 5]]
    rows = np.full((3, 2, 9), 20, np.uint16)
    for row, prompt in zip(rows, prompts):
        row[:, :len(prompt)] = prompt
    np.save(f"{data}/heldout_pairs.npy", rows)
    np.save(f"{data}/heldout_pairs_prompt_length.npy", np.array([3, 1, 4], np.uint16))
    with pytest.raises(UserError, match="pairs_prompt_length.npy one does not exist"):
        judge.make_evaluate(get_args(data))
    np.save(f"{data}/pairs_prompt_length.npy", np.ones(3, np.uint16))
    padded = torch.tensor([prompt + [-1] * (4 - len(prompt)) for prompt in prompts])[torch.arange(20) % 3]
    flags = ["--num_eval_samples", "20"]
    args, policy, ref = get_args(data, *flags), tiny(3), load(f"{data}/sft.pt")
    if program:
        save(policy, tmp_path / "p.pt")
        judge.main([f"{tmp_path}/p.pt", "--n", "20", "--data", data, "--tokenizer", TOKENIZER,
                    "--max_new_tokens", "40"])
        record = json.loads((tmp_path / "evaluations.jsonl").read_text())
        y = spo.sample(policy, padded, 40, spo.rng(0, judge.FRESH))
        y_ref = spo.sample(ref, padded, 40, spo.rng(0, judge.FRESH_REF))
    else:
        record = judge.make_evaluate(args)(policy, ref, 5)
        assert set(args.hashes) == {"heldout_pairs.npy", "heldout_pairs_prompt_length.npy", "tokenizer"}
        y = spo.sample(policy, padded, 40, spo.rng(0, spo.EVAL, 5))
        y_ref = spo.sample(ref, padded, 40, spo.rng(0, judge.EVAL_REF))
    r, r_ref = ([toyworld.reward(text) for text in tokenizer.decode(x.tolist())] for x in (y, y_ref))
    wins = [1 / (1 + math.exp(b - a)) for a, b in zip(r, r_ref)]
    kl, length = [], []
    for i, row in enumerate(y):
        end, start = end_of(row), len(prompts[i % 3])
        p, q = (model(row[None, :end])[0, start - 1:].softmax(-1) for model in (policy, ref))
        kl.append((p * (p / q).log()).sum())
        length.append(end - start + 1)
    expected = dict(win_rate=np.mean(wins), win_rate_se=np.std(wins, ddof=1) / 20 ** 0.5, kl=np.mean(kl),
                    length=np.mean(length))
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert record["win_rate"] != pytest.approx(mean_win(r, r_ref), rel=1e-3)


@torch.no_grad()
def test_heldout_accuracy(data):
    """Of a model for which a response that ends at once is likelier than any other."""
    args, policy, ref = get_args(data), tiny(0), load(f"{data}/sft.pt")
    policy.tok_embeddings.weight[BOS] = 100.0
    assert "heldout_accuracy" not in judge.make_evaluate(args)(policy, ref, 0)
    short, long = [BOS, BOS, BOS, BOS], [BOS, 5, 6, BOS]
    rows = 100 * [[short, long]] + 60 * [[long, short]] + 40 * [[short, short]] + 100 * [[long, short]]
    np.save(f"{data}/heldout_pairs.npy", np.array(rows, np.uint16))
    assert judge.make_evaluate(args)(policy, ref, 0)["heldout_accuracy"] == pytest.approx(120 / 200)  # of the first 200
    assert args.hashes["heldout_pairs.npy"] == file_hash(f"{data}/heldout_pairs.npy")
    np.save(f"{data}/heldout_pairs.npy", np.array(rows[:150], np.uint16))
    assert judge.make_evaluate(args)(policy, ref, 0)["heldout_accuracy"] == pytest.approx(100 / 150)


def test_length_controlled_win_rate():
    generator = torch.Generator().manual_seed(0)
    length, length_ref = (mean + 10 * torch.randn(500, generator=generator) for mean in (70, 60))
    longer = length[:, None] - length_ref
    planted_length, planted_quality = (0.05 * longer).sigmoid(), (0.05 * longer + 0.7).sigmoid()
    quality, mean_quality = 1 / (1 + math.exp(-0.7)), planted_quality.mean().item()
    assert planted_length.mean() > 0.6
    assert judge.length_controlled_win_rate(planted_length, longer) == pytest.approx(0.5, abs=1e-3)
    assert judge.length_controlled_win_rate(planted_quality, longer) == pytest.approx(quality, abs=1e-3)
    same = torch.zeros(500, 500)
    assert judge.length_controlled_win_rate(planted_quality, same) == pytest.approx(mean_quality, abs=1e-3)
    assert 0.45 < judge.length_controlled_win_rate((longer > 0).float(), longer) < 0.55  # lengths decide every pair


def test_the_reference_has_samples_of_the_same_length_limit(data, monkeypatch):
    """ref.npy, of 40 tokens, is cut where training samples fewer, and not used where it samples more."""
    monkeypatch.setattr(judge, "NUM_REF", 30)
    ref, tokens = load(f"{data}/sft.pt"), torch.from_numpy(np.load(f"{data}/ref.npy")[:30, 0].astype(int))
    assert (tokens[:, -1] != BOS).any()
    for limit, expected in ((40, tokens), (20, tokens[:, :21])):
        args = get_args(data, "--max_new_tokens", str(limit))
        assert torch.equal(judge.reference_samples(args, ref, spo.no_prompts(9)), spo.trim_padding(expected))
        assert "ref.npy" in args.hashes
    args = get_args(data, "--max_new_tokens", "50")
    expected = spo.sample(ref, spo.no_prompts(30), 50, spo.rng(0, judge.EVAL_REF))
    assert torch.equal(judge.reference_samples(args, ref, spo.no_prompts(9)), expected)


def test_another_init_is_compared_with_its_own_samples(world, data, tmp_path):
    """Of the aligned model itself the win rate is 1/2 at step 0, not what it is against the folder's sft.pt."""
    aligned = load(f"{world}/sft.pt")
    aligned.norm.weight.data.mul_(3)
    save(aligned, tmp_path / "aligned.pt")
    reward_model = make_reward_head(load(f"{world}/sft.pt"))
    reward_model.output.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    known = shutil.copytree(world, tmp_path / "known")
    save(reward_model, known / "reward.pt")
    for name in ("sft.pt", "ref.npy", "reward.pt"):  # where ref.npy is from is not known without a settings.json
        shutil.copy(known / name, data)
    leads, compared_with_file = [], []
    for folder in (str(known), data):
        args = get_args(folder, "--init", str(tmp_path / "aligned.pt"), "--judge", "reward", "--seed", "2",
                        "--max_new_tokens", "100")
        record = judge.make_evaluate(args)(aligned, aligned, 0)
        leads.append(abs(record["win_rate"] - 0.5) / record["win_rate_se"])
        compared_with_file.append("ref.npy" in args.hashes)
    assert leads[0] < 2 and leads[1] > 3 and compared_with_file == [False, True], leads


def test_missing_files(data):
    with pytest.raises(UserError, match="reward.pt does not exist: create it with `make data MODEL=toy"):
        judge.make_evaluate(get_args(data, "--judge", "reward"))
    os.remove(f"{data}/ref.npy")
    with pytest.raises(UserError, match="ref.npy does not exist: create it with `make data MODEL=toy"):
        judge.make_evaluate(get_args(data))


def test_the_program_gives_the_reference_one_half_against_itself(data, capsys, monkeypatch):
    def run(checkpoint, *flags):
        save(checkpoint, f"{data}/model.pt")
        flags = ["--n", "200", "--data", data, "--tokenizer", TOKENIZER, "--max_new_tokens", "40", *flags]
        judge.main([f"{data}/model.pt", *flags])
        return json.loads(Path(data, "evaluations.jsonl").read_text().splitlines()[-1])

    itself = run(tiny(0))
    assert itself["kl"] == 0 and itself["n"] == 200 and itself["checkpoint"] == "model.pt"
    assert (itself["seed"], itself["data"], itself["max_new_tokens"], itself["dtype"]) == (0, data, 40, "float32")
    assert 0 < abs(itself["win_rate"] - 0.5) < 3 * itself["win_rate_se"] < 0.2
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    model = tiny(0)
    model.tok_embeddings.weight.data[BOS] = 100.0  # it samples nothing but the end
    other = run(model)
    assert other["kl"] > 1 and other["length"] == 1 and abs(other["win_rate"] - 0.5) > 10 * other["win_rate_se"]
    monkeypatch.setattr(judge, "fast_generate", lambda model, prompt, n, generator: prompt.expand(-1, n + 1))
    assert run(tiny(0), "--fast_sampling")["length"] == 1
    assert Path(data, "evaluations.jsonl").read_text().count("\n") == 3
    for flags, words in ((("--judge", "none"), "--judge not none"), (("--steps", "5"), "is not read here")):
        with pytest.raises(SystemExit):
            run(tiny(0), *flags)
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_log_is_read_as_far_as_it_was_written(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"step": 0, "win_rate": 0.5}, {"step": 1, "loss": 2.0}, {"step": 2, "win_rate": 0.75},
               {"step": 4, "win_rate": 0.75}]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"step": 5, "win_r')
    assert judge.read_log(tmp_path) == records and judge.best_evaluation(tmp_path) == records[2]
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="no evaluation with a win rate"):
        judge.best_evaluation(tmp_path)
