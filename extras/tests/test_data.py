"""Data folders: what prepare_data.py puts in them, what it keeps, continues and refuses."""
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import prepare_data
import spo
from extras import token_files, toyworld
from extras.data_folder import open_folder
from extras.tests.conftest import ROOT, TINY, TOKENIZER
from model import UserError, export, file_hash, load, load_tokenizer, save
from test_spo import tiny

FEW = ["--num_ref", "4", "--reward_steps", "0"]
SMALLEST = ["--num_stories", "32", "--sft_steps", "1", "--num_pairs", "8", "--num_ref", "4"]


def prepare_toy(data, *flags):
    prepare_data.main(["toy", "--data", str(data), "--tokenizer", TOKENIZER, *flags])


def write_stories(n, seed=0):
    rng = random.Random(seed)
    return [toyworld.write_story(rng) for _ in range(n)]


def pairs_file(folder, stories):
    """Pairs of neighbouring stories as .jsonl, with empty lines -> its path."""
    lines = [json.dumps(dict(chosen=a, rejected=b)) for a, b in zip(stories[::2], stories[1::2])]
    (folder / "p.jsonl").write_text("\n\n".join(lines))
    return str(folder / "p.jsonl")


def hashes(folder):
    """name -> sha256 of every file in folder, hidden ones too."""
    return {name: file_hash(f"{folder}/{name}") for name in os.listdir(folder)}


def texts(folder, *names):
    """The rows of token files as lists of texts."""
    tokenizer = load_tokenizer(TOKENIZER, 640)
    rows = np.concatenate([np.load(f"{folder}/{name}.npy") for name in names]).astype(int)
    return [tokenizer.decode(row.tolist()) for row in rows]


def test_the_files_are_what_they_say(world):
    shapes = {name: np.load(f"{world}/{name}.npy").shape[:2] for name in ("stories", "pairs", "ranked", "ref")}
    assert shapes == dict(stories=(200, 1), pairs=(48, 2), ranked=(24, 4), ref=(64, 1))
    assert texts(world, "stories")[:9] == [[story] for story in write_stories(9)]
    assert texts(world, "heldout")[:9] == [[story] for story in write_stories(9, seed=1)]
    for a, b in (("stories", "heldout"), ("pairs", "heldout_pairs"), ("pairs", "ref")):
        assert not set(sum(texts(world, a), [])) & set(sum(texts(world, b), []))
    with open(f"{world}/settings.json") as f:
        recorded = json.load(f)["files"]
    assert {**recorded, "settings.json": file_hash(f.name)} == hashes(world)


def test_a_folder_depends_on_the_seed_alone_and_pairs_on_the_experts_taste(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        prepare_data.main(["toy-naive", "--data", str(tmp_path / name), "--tokenizer", TOKENIZER, *SMALLEST,
                           "--num_pairs", "60", "--seed", seed])
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and not set(a.values()) & set(c.values())
    data = tmp_path / "a"
    assert texts(data, "stories")[0] == write_stories(1, seed=6)
    assert texts(data, "heldout")[0] == write_stories(1, seed=7)
    y = spo.sample(load(data / "sft.pt"), spo.no_prompts(120), 100, spo.rng(3, prepare_data.PAIRS)).view(60, 2, -1)
    stories = load_tokenizer(TOKENIZER, 640).decode(y.flatten(0, 1).tolist())

    def pairs(taste, seed):
        r = torch.tensor([toyworld.reward(story, taste) for story in stories]).view(60, 2)
        return prepare_data.sample_ranking(y, r, spo.rng(seed, prepare_data.LABELS, prepare_data.PAIRS)).numpy()

    assert np.array_equal(np.load(data / "pairs.npy"), pairs("naive", 3))
    assert not np.array_equal(np.load(data / "pairs.npy"), pairs("naive", 0))


def test_prompted_pairs_continue_the_opening_sentence_of_a_story(tmp_path):
    data = str(tmp_path / "data")
    prepare_data.main(["toy", "--data", data, "--tokenizer", TOKENIZER, *SMALLEST, "--num_pairs", "40", "--prompted"])
    tokenizer, args = load_tokenizer(TOKENIZER, 640), load(f"{data}/sft.pt").args
    sources = dict(pairs="stories", ranked="stories", heldout_pairs="heldout", ref="stories")
    for name, stories in sources.items():
        responses = spo.load_responses(f"{data}/{name}.npy", args, 1, 1 if name == "ref" else None)
        first = [toyworld.parse(story)[0][0] for [story] in texts(data, stories)]
        prompts = responses.prompts(torch.arange(len(responses)))
        given = [[token for token in prompt.tolist() if token >= 0] for prompt in prompts]
        assert tokenizer.decode(given) == (2 * first)[:len(responses)]  # from the first story again, for 40 of 32
        rows, lengths = torch.from_numpy(responses.tokens.astype(int)), (prompts >= 0).sum(1)
        for row, prompt, n in zip(rows, prompts, lengths):
            assert (row[:, :n] == prompt[:n]).all()
    best, ranked = (np.load(f"{data}/{name}_prompt_length.npy") for name in ("best", "ranked"))
    assert np.array_equal(best, ranked) and len(set(ranked)) > 1


def test_pretraining_reaches_what_it_prints_and_learns(world, capsys):
    stories, heldout = np.load(f"{world}/stories.npy"), np.load(f"{world}/heldout.npy")[:64]
    y = torch.from_numpy(heldout[:, 0].astype(int))
    for steps, lowest, highest in ((1, 250, 999), (40, 50, 250)):
        model = prepare_data.pretrain(stories, heldout, steps, seed=0, dim=64)
        nats = -spo.seq_logp(model, y, spo.response_mask(y)).mean().item()
        assert lowest < nats < highest and f"held out: {nats:.2f} nats" in capsys.readouterr().out


def test_labels_follow_plackett_luce():
    """Eq. 2 and 3: how often each order of three responses with rewards r is drawn; a biased r is told apart."""
    n = 30_000
    y = torch.arange(3)[None, :, None].expand(n, 3, 1)
    r = torch.tensor([0.5, -0.5, 1.0]).expand(n, 3)
    ranked = prepare_data.sample_ranking(y, r, torch.Generator().manual_seed(0))[:, :, 0]

    def largest_z(rewards):
        z = []
        for order in itertools.permutations(range(3)):
            weights = [math.exp(rewards[i]) for i in order]
            p = weights[0] / sum(weights) * weights[1] / sum(weights[1:])
            share = (ranked == torch.tensor(order)).all(1).float().mean().item()
            z.append(abs(share - p) / math.sqrt(p * (1 - p) / n))
        return max(z)

    assert largest_z([0.5, -0.5, 1.0]) < 5 < largest_z([0.4, -0.5, 1.0])


def test_label_noise_flips_pairs_alone_and_more_of_it_flips_more_of_them(tmp_path):
    flags, flipped = [*SMALLEST, "--num_pairs", "400", "--max_new_tokens", "8"], {}
    for p in ("0", "0.1", "0.2"):
        prepare_toy(tmp_path / p, *flags, "--label_noise", p)
        clean, noisy = (np.load(tmp_path / name / "pairs.npy") for name in ("0", p))
        flipped[p] = (clean != noisy).any((1, 2))
        assert np.array_equal(np.where(flipped[p][:, None, None], clean[:, ::-1], clean), noisy)
        a, b = hashes(tmp_path / "0"), hashes(tmp_path / p)
        assert {name for name in a if a[name] != b[name]} == ({"pairs.npy", "settings.json"} if float(p) else set())
    assert 16 < flipped["0.1"].sum() < 60 < flipped["0.2"].sum() < 112
    assert (flipped["0.1"] <= flipped["0.2"]).all()


def test_models_of_other_widths(tmp_path):
    for dim in (8, 32):
        prepare_toy(tmp_path / str(dim), *SMALLEST, "--dim", str(dim))
        args = load(tmp_path / str(dim) / "sft.pt").args
        assert (args.dim, args.n_heads) == (dim, 4)


def test_a_folder_of_an_earlier_version_has_the_defaults_of_later_settings(world, tmp_path):
    data = shutil.copytree(world, tmp_path / "data")
    now = json.loads((data / "settings.json").read_text())
    earlier = {name: x for name, x in now["settings"].items() if name not in ("dim", "label_noise")}
    (data / "settings.json").write_text(json.dumps(now | {"settings": earlier}))
    others = (("dim", "32", "dim 64, not 32"), ("label_noise", "0.2", "label_noise 0.0, not 0.2"))
    for flag, value, words in others:
        with pytest.raises(UserError, match=words):
            prepare_toy(data, f"--{flag}", value)
    prepare_toy(data, "--dim", "64", "--label_noise", "0")
    assert json.loads((data / "settings.json").read_text()) == now


def test_the_tokenizer_is_the_committed_one(tmp_path):
    argv = ["tokenizer", "--tokenizer", str(tmp_path / "t.model")]
    prepare_data.main(argv)
    assert file_hash(tmp_path / "t.model") == file_hash(TOKENIZER)
    with pytest.raises(UserError, match="t.model exists"):
        prepare_data.main(argv)


def test_settings_are_kept_and_others_refused(world, tmp_path, monkeypatch):
    data = shutil.copytree(world, tmp_path / "data")
    before = hashes(data)
    prepare_toy(data)           # as `make train` does: everything stays as it was made
    prepare_toy(data, *TINY)
    for name, value, words in (("num_pairs", "49", "num_pairs 48, not 49"), ("source", "made", "source toy, not made")):
        with pytest.raises(UserError, match=words):
            prepare_toy(data, f"--{name}", value)
    for name in ("tokenizer", "toyworld.py"):
        with monkeypatch.context() as m, pytest.raises(UserError, match=f"made from another .*{name}"):
            m.setattr(prepare_data, "file_hash", lambda path: "x" if name in path else file_hash(path))
            prepare_toy(data)
    assert hashes(data) == before
    prepare_toy(data, "--reward_steps", "1")  # it was not set
    after = hashes(data)
    assert {name for name in after if after[name] != before.get(name)} == {"settings.json"}  # of 6 pairs none is made
    with pytest.raises(UserError, match="reward_steps 1, not 2"):
        prepare_toy(data, "--reward_steps", "2")


def test_preferences_of_the_users_for_the_toy_model(tmp_path, capsys):
    stories = write_stories(40)
    prepare_toy(tmp_path / "data", "--source", pairs_file(tmp_path, stories), *SMALLEST[:4], *FEW)
    rows = texts(tmp_path / "data", "pairs", "heldout_pairs")
    assert sorted(rows) == sorted([list(pair) for pair in zip(stories[::2], stories[1::2])])
    assert not os.path.exists(tmp_path / "data/ranked.npy")
    assert capsys.readouterr().out.count("still judged by the toy world's expert") == 1
    prepare_toy(tmp_path / "data")  # as `make train` does
    assert "expert" not in capsys.readouterr().out


def test_another_source_is_refused(published, tmp_path):
    data, run = published
    source = pairs_file(tmp_path, write_stories(40))
    run()
    run("--source", source, *FEW)
    before = hashes(data)
    pairs_file(tmp_path, write_stories(42))
    with pytest.raises(UserError, match="another source"):
        run()
    os.remove(source)   # all of it is in the token files
    run()
    assert hashes(data) == before
    os.remove(data / "pairs.npy")
    with pytest.raises(UserError, match="p.jsonl does not exist"):
        run()


@pytest.mark.parametrize("flags, words", [
    ("toy --num_pairs 0", "num_pairs is 0"),
    ("toy --label_noise 0.6", "label_noise is 0.6, but must be from 0 to 0.5"),
    ("toy --label_noise nan", "label_noise is nan"),
    ("toy --label_noise 0.1 --source bad.jsonl", "label_noise is not read by toy with source bad.jsonl"),
    ("toy --dim 36", "dim is 36, but must be a multiple of 8"),
    ("stories15M --dim 32", "dim is not read by stories15M"),
    ("toy --max_new_tokens 129 --source bad.jsonl", "max_new_tokens is 129, but the model reads 128"),
    ("toy --drop_long", "drop_long is not read by toy with source toy"),
    ("toy --source bad.jsonl", "bad.jsonl, line 1"),
    ("toy --source made --judge llm", "OPENAI_BASE_URL"),
    ("toy --tokenizer bad.jsonl", "not a sentencepiece"),
    ("toy --data bad.jsonl", "File exists: .*bad.jsonl"),
    ("toy --data run", "another program"),
    ("stories15M", "HF_ENDPOINT is nowhere"),
    ("stories15M --tokenizer x", "tokenizer is not read"),
    ("tokenizer --seed 1", "no other setting"),
    ("toy --seed 18446744073709551616", "seed is 18446744073709551616"),
    ("toy --num_ref 1000000000000", "num_ref is 1000000000000"),
    ("stories15m", "stories15m is none of toy, .*stories15M"),
    ("../x", "../x is not a name"),
    ("toy --init a.pt --tokenizer tokenizer.model", "a name that is not the toy world's"),
    ("mine --init a.pt", "--init needs --tokenizer"),
    ("mine --init nowhere.pt --tokenizer tokenizer.model", "nowhere.pt is not a file"),
    ("mine --init a.pt --tokenizer bad.jsonl", "not a sentencepiece"),
    ("mine --init a.pt --tokenizer tokenizer.model --source bad.jsonl", "is 255, but the model reads 64"),
    ("toy --prompted --max_new_tokens 19", "must be at least 20 with --prompted"),
    ("mine --init a.pt --tokenizer tokenizer.model --source bad.jsonl --max_new_tokens 64", "bad.jsonl, line 1"),
    ("stories15M --init small.pt --tokenizer tokenizer.model", "640 tokens, but the checkpoint 30"),
])
def test_mistakes_are_found_first_and_leave_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    monkeypatch.setattr(prepare_data, "prepare_toy", lambda *_: pytest.fail("work has begun"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    save(tiny(640), "a.pt")
    save(tiny(30), "small.pt")
    for name in ("data", "run"):
        os.mkdir(name)
    for name in ("bad.jsonl", "run/settings.json"):
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UserError, OSError), match=words):
        prepare_data.main(flags.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_published_model_reads_no_more_than_its_context(published, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(dict(chosen="a", rejected="b")))
    with pytest.raises(UserError, match="max_new_tokens is 129, but the model reads 128"):
        published[1]("--source", str(tmp_path / "p.jsonl"), "--max_new_tokens", "129", *FEW)


@pytest.mark.parametrize("name", ["sft.pt", "pairs.npy", "heldout_best.npy", "reward.pt"])
def test_files_of_the_users_are_never_replaced(published, tmp_path, name):
    data, run = published
    source = pairs_file(tmp_path, write_stories(40))
    (data / name).write_text("mine")
    before = hashes(data)
    with pytest.raises(UserError, match=f"{name} was not written by prepare_data.py, or was changed since"):
        run("--source", source, *FEW)
    assert hashes(data) == before


def test_a_run_killed_at_any_moment_continues(published, tmp_path, monkeypatch):
    """Killed before and after every file that is moved into place, settings.json among them."""
    data, run = published
    flags = ["--source", pairs_file(tmp_path, write_stories(40)), *FEW]
    start, replace = shutil.copytree(data, tmp_path / "start"), os.replace
    run(*flags)
    whole = hashes(data)
    for moment in range(2 * 3 * 3):  # each of three files: written, recorded, moved into place
        shutil.rmtree(data)
        shutil.copytree(start, data)
        moments = itertools.count()

        def dying_replace(source, target):
            if next(moments) == moment:
                raise KeyboardInterrupt
            replace(source, target)
            if next(moments) == moment:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", dying_replace)
        with pytest.raises(KeyboardInterrupt):
            run(*flags)
        monkeypatch.setattr(os, "replace", replace)
        run(*flags)
        assert hashes(data) == whole, moment
    os.remove(data / "pairs.npy")
    monkeypatch.setattr(token_files, "is_held_out", lambda prompt, responses: responses[0][0] % 2)
    with pytest.raises(UserError, match="another pairs.npy before"):
        run()
    assert not (data / "pairs.npy").exists()


@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_a_checkpoint_of_the_users(tmp_path, monkeypatch, ending):
    """Copied with its tokenizer under a name of its own, published or not, without a download; then not asked for."""
    init, data, before = str(tmp_path / f"m.{ending}"), tmp_path / "data", tiny(640)
    (save if ending == "pt" else export)(before, init)
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    name = "mine-2.0" if ending == "pt" else "stories42M"
    flags = ["--init", init, "--tokenizer", TOKENIZER]

    def run(*flags):
        prepare_data.main([name, "--data", str(data), *flags])

    run(*flags, "--source", pairs_file(tmp_path, write_stories(40)), *FEW, "--max_new_tokens", "64")
    made = hashes(data)
    assert made["tokenizer.model"] == file_hash(TOKENIZER) and os.path.exists(init)
    assert ending == "bin" or made["sft.pt"] == file_hash(init)
    after = load(data / "sft.pt").state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.state_dict().items())
    assert np.load(data / "ref.npy").shape[2] <= 65
    run()
    run(*flags)
    assert hashes(data) == made
    with pytest.raises(UserError, match="was made with model"):
        prepare_data.main(["stories15M", "--data", str(data)])
    shutil.copy(TOKENIZER, tmp_path / "t.model")
    with open(tmp_path / "t.model", "ab") as f:
        f.write(b"\x18\x00")  # an unknown field: the same 640 tokens, another file
    with pytest.raises(UserError, match="made from another tokenizer"):
        run("--init", init, "--tokenizer", str(tmp_path / "t.model"))
    save(tiny(640, seed=1), tmp_path / "other.pt")
    with pytest.raises(UserError, match="made from another init"):
        run("--init", str(tmp_path / "other.pt"), "--tokenizer", TOKENIZER)
    os.remove(data / "sft.pt")
    with pytest.raises(UserError, match="lacks sft.pt or tokenizer.model: give --init and --tokenizer again"):
        run()
    run(*flags)
    assert hashes(data) == made


def test_a_checkpoint_of_the_users_does_not_replace_another(published, tmp_path):
    data, run = published
    save(tiny(640), tmp_path / "a.pt")
    flags = ["--init", str(tmp_path / "a.pt"), "--tokenizer", TOKENIZER]
    with pytest.raises(UserError, match="was not written by prepare_data.py"):
        run(*flags)
    run()
    before = hashes(data)
    with pytest.raises(UserError, match="was made without --init"):
        run(*flags)
    assert hashes(data) == before


def test_a_truncated_file_of_ours_is_moved_aside_and_made_again(tmp_path, capsys):
    data = tmp_path / "data"
    prepare_toy(data, *SMALLEST)
    before = hashes(data)
    for name in ("pairs.npy", "ref.npy", "sft.pt"):
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[:-1000])
        prepare_toy(data)
        assert f"{name} is damaged: moved to" in capsys.readouterr().out
        cut = file_hash(data / f"{name}.damaged")
        assert hashes(data) == before | {f"{name}.damaged": cut} and cut != before[name]
        (data / name).write_bytes(whole[:-2000])  # damaged again: the earlier one is not replaced
        with pytest.raises(UserError, match=f"{name} was not written by prepare_data.py, or was changed since"):
            prepare_toy(data)
        os.remove(data / f"{name}.damaged")
        if name.endswith(".npy"):
            np.save(data / name, np.load(f"{data}/heldout_pairs.npy"))  # whole, but another
            with pytest.raises(UserError, match="or was changed since"):
                prepare_toy(data)
        (data / name).write_bytes(whole)


def test_two_at_once(published):
    data, run = published
    with open_folder(str(data)), pytest.raises(UserError, match="another prepare_data.py is writing"):
        run()
    run()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    argv = [sys.executable, f"{ROOT}/prepare_data.py", "toy", "--num_ref", "1"]
    done = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --num_ref is 1, but must be from 2 to 10000000.\n"
