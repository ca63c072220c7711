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
from extras import data_folder, toyworld
from extras.tests.conftest import ROOT, TINY, TOKENIZER
from model import UserError, file_hash, load, load_tokenizer

FEW = ["--num_ref", "4", "--reward_steps", "0"]
SMALLEST = ["--num_stories", "32", "--sft_steps", "1", "--num_pairs", "8", "--num_ref", "4"]


def prepare_toy(data, *flags):
    prepare_data.main(["toy", "--data", str(data), "--tokenizer", TOKENIZER, *flags])


def as_lines(stories):
    """Pairs of neighbouring stories, as .jsonl."""
    pairs = zip(stories[::2], stories[1::2])
    return "".join(json.dumps(dict(chosen=a, rejected=b)) + "\n\n" for a, b in pairs)


def pairs_file(folder):
    with open(f"{folder}/p.jsonl", "w") as f:
        f.write(as_lines(write_stories(40)))
    return f.name


def hashes(folder):
    """name -> sha256 of every file in folder, hidden ones too."""
    return {name: file_hash(f"{folder}/{name}") for name in sorted(os.listdir(folder))}


def texts(folder, *names):
    """The rows of token files as lists of texts."""
    tokenizer = load_tokenizer(TOKENIZER, 640)
    rows = np.concatenate([np.load(f"{folder}/{name}.npy") for name in names]).astype(int)
    return [tokenizer.decode(row.tolist()) for row in rows]


def write_stories(n, seed=0):
    rng = random.Random(seed)
    return [toyworld.write_story(rng) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------
# The toy world

def test_a_folder_depends_on_the_seed_and_on_nothing_else(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        prepare_toy(tmp_path / name, *SMALLEST, "--seed", seed)
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and not set(a.values()) & set(c.values())


def test_the_files_are_what_they_say(world):
    shapes = {name: np.load(f"{world}/{name}.npy").shape[:2] for name in ("stories", "pairs", "ranked", "ref")}
    assert shapes == dict(stories=(200, 1), pairs=(48, 2), ranked=(24, 4), ref=(64, 1))
    model_args = load(f"{world}/sft.pt").args
    for name, (_, n) in shapes.items():
        spo.load_responses(f"{world}/{name}.npy", model_args, num_responses=n)
    assert texts(world, "stories")[:9] == [[story] for story in write_stories(9)]
    assert texts(world, "heldout")[:9] == [[story] for story in write_stories(9, seed=1)]
    for a, b in (("stories", "heldout"), ("pairs", "heldout_pairs"), ("pairs", "ref")):
        assert not set(sum(texts(world, a), [])) & set(sum(texts(world, b), []))
    assert np.array_equal(np.load(f"{world}/best.npy"), np.load(f"{world}/ranked.npy"))
    record = json.load(open(f"{world}/settings.json"))
    assert {**record["files"], "settings.json": file_hash(f"{world}/settings.json")} == hashes(world)


def test_pretraining_reaches_what_it_prints_and_learns(world, capsys):
    stories, heldout = np.load(f"{world}/stories.npy"), np.load(f"{world}/heldout.npy")[:64]
    nats = []
    for steps in (1, 40):
        model = prepare_data.pretrain(stories, heldout, steps, seed=0)
        printed = float(capsys.readouterr().out.split("held out: ")[1].split()[0])
        y = torch.from_numpy(heldout[:, 0].astype(int))
        assert printed == pytest.approx(-spo.seq_logp(model, y, spo.response_mask(y)).mean().item(), abs=0.01)
        nats.append(printed)
    assert nats[1] < 0.8 * nats[0]


def test_labels_follow_plackett_luce():
    """Eq. 2 and 3: how often each order of three responses with rewards r is drawn; a biased r is told apart."""
    n = 30_000
    y = torch.arange(3)[None, :, None].expand(n, 3, 1)
    generator = torch.Generator().manual_seed(0)
    ranked = prepare_data.sample_ranking(y, torch.tensor([0.5, -0.5, 1.0]).expand(n, 3), generator)[:, :, 0]

    def largest_z(rewards):
        largest = 0.0
        for order in itertools.permutations(range(3)):
            weights = [math.exp(rewards[i]) for i in order]
            p = weights[0] / sum(weights) * weights[1] / sum(weights[1:])
            share = (ranked == torch.tensor(order)).all(1).float().mean().item()
            largest = max(largest, abs(share - p) / math.sqrt(p * (1 - p) / n))
        return largest

    assert largest_z([0.5, -0.5, 1.0]) < 5 < largest_z([0.4, -0.5, 1.0])


def test_the_tokenizer_is_the_committed_one(tmp_path):
    prepare_data.main(["tokenizer", "--tokenizer", str(tmp_path / "t.model")])
    assert file_hash(tmp_path / "t.model") == file_hash(TOKENIZER)
    with pytest.raises(UserError, match="t.model exists"):
        prepare_data.main(["tokenizer", "--tokenizer", str(tmp_path / "t.model")])


# ---------------------------------------------------------------------------------------------------
# Settings, interruptions, files of the user's

def test_settings_are_kept_and_others_refused(world, tmp_path):
    data = shutil.copytree(world, tmp_path / "data")
    before = hashes(data)
    prepare_toy(data)           # as `make train` does: everything stays as it was made
    prepare_toy(data, *TINY)
    assert hashes(data) == before
    for flags, words in ((["--num_pairs", "49"], "num_pairs 48, not 49"), (["--seed", "1"], "seed 0, not 1"),
                         (["--source", "made"], "source toy, not made")):
        with pytest.raises(UserError, match=words):
            prepare_toy(data, *flags)
    with pytest.raises(UserError, match="model toy, not toy-naive"):
        prepare_data.main(["toy-naive", "--data", str(data), "--tokenizer", TOKENIZER])
    assert hashes(data) == before
    prepare_toy(data, "--reward_steps", "1")  # it was not set
    changed = {name for name, digest in hashes(data).items() if digest != before.get(name)}
    assert changed == {"settings.json", "reward.pt"}
    with pytest.raises(UserError, match="reward_steps 1, not 2"):
        prepare_toy(data, "--reward_steps", "2")


def test_another_source_is_refused(published, tmp_path):
    data, run = published
    run()
    (tmp_path / "s").mkdir()
    pairs_file(tmp_path / "s")
    run("--source", str(tmp_path / "s"), *FEW)
    before = hashes(data)
    (tmp_path / "s/more.jsonl").write_text(as_lines(write_stories(2, 1)))
    with pytest.raises(UserError, match="another source"):
        run()
    shutil.rmtree(tmp_path / "s")   # all of it is in the token files
    run()
    assert hashes(data) == before
    os.remove(data / "pairs.npy")
    with pytest.raises(UserError, match="s is not a .json or .jsonl file"):
        run()


@pytest.mark.parametrize("name", ["toyworld.py", "tokenizer"])
def test_another_grammar_or_tokenizer_is_refused(world, tmp_path, monkeypatch, name):
    flags = ["toy", "--data", world, "--tokenizer", TOKENIZER]
    if name == "tokenizer":
        flags[-1] = str(tmp_path / "other.model")
        monkeypatch.setattr(prepare_data, "load_tokenizer", lambda *_: None)
    else:
        monkeypatch.setattr(toyworld, "__file__", str(tmp_path / "other.model"))
    (tmp_path / "other.model").write_text("other")
    before = hashes(world)
    with pytest.raises(UserError, match=f"another .*{name}"):
        prepare_data.main(flags)
    assert hashes(world) == before


@pytest.mark.parametrize("flags, words", [
    ("toy --num_pairs 0", "num_pairs is 0"),
    ("toy --num_stories 31", "num_stories is 31"),
    ("toy --seed -1", "seed is -1"),
    ("toy --reward_steps -1", "reward_steps is -1"),
    ("toy --judge toy", "judge is not read by toy"),
    ("toy --source {tmp}/none.jsonl", "none.jsonl is not a .json"),
    ("toy --source {tmp}/text.txt", "text.txt is not a .json"),
    ("toy --source {tmp}/bad.jsonl", "bad.jsonl, line 1"),
    ("toy --source {tmp}/empty", "empty holds no preferences"),
    ("toy --source made --judge llm", "OPENAI_BASE_URL"),
    ("toy --tokenizer {tmp}/text.txt", "not a sentencepiece"),
    ("toy --data {tmp}/text.txt", "text.txt cannot be written"),
    ("toy --data {tmp}/damaged", "settings.json is damaged"),
    ("stories15M", "HF_ENDPOINT is nowhere"),
    ("stories15M --source made", "OPENAI_BASE_URL"),
    ("stories15M --num_pairs 4", "num_pairs is not read"),
    ("stories15M --tokenizer x", "tokenizer is not read"),
    ("tokenizer --seed 1", "no other setting"),
])
def test_mistakes_are_found_first_and_leave_nothing(tmp_path, monkeypatch, flags, words):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/settings.json").write_text("{}")
    for name, value in (("OPENAI_BASE_URL", ""), ("JUDGE_MODEL", ""), ("HF_ENDPOINT", "nowhere")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(prepare_data, "prepare_toy", lambda *_: pytest.fail("work has begun"))
    before = sorted(tmp_path.rglob("*"))
    argv = flags.format(tmp=tmp_path).split()
    if argv[0] != "tokenizer" and "--data" not in argv:
        argv += ["--data", str(tmp_path / "new")]
    if argv[0] == "toy" and "--tokenizer" not in argv:
        argv += ["--tokenizer", TOKENIZER]
    with pytest.raises(UserError, match=words) as error:
        prepare_data.main(argv)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["sft.pt", "tokenizer.model", "pairs.npy", "ref.npy", "heldout_best.npy", "reward.pt"])
def test_files_of_the_users_are_never_replaced(published, tmp_path, name):
    data, run = published
    source = pairs_file(tmp_path)
    (data / name).write_text("mine")
    before = hashes(data)
    with pytest.raises(UserError, match=f"{name} was not written by prepare_data.py"):
        run("--source", source, *FEW)
    assert hashes(data) == before
    if name not in ("sft.pt", "tokenizer.model"):  # these would be downloaded
        os.remove(data / name)
        run("--source", source, *FEW)
        (data / "pairs.npy").write_text("mine now")
        with pytest.raises(UserError, match="or was changed since"):
            run()
        assert (data / "pairs.npy").read_text() == "mine now"


def test_a_run_killed_at_any_moment_continues(published, tmp_path, monkeypatch):
    """Killed before and after every file that is moved into place, settings.json among them."""
    data, run = published
    source = pairs_file(tmp_path)
    start, replace, kills = shutil.copytree(data, tmp_path / "start"), os.replace, 0
    run("--source", source, *FEW)
    whole = hashes(data)
    for moment in range(100):
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
        try:
            run("--source", source, *FEW)
            break
        except KeyboardInterrupt:
            kills += 1
        monkeypatch.setattr(os, "replace", replace)
        run("--source", source, *FEW)
        assert hashes(data) == whole, moment
    assert kills >= 2 * 3 * 3  # each of three files: written, recorded, moved into place


def test_what_is_made_again_must_be_the_same(published, tmp_path, monkeypatch):
    data, run = published
    source = pairs_file(tmp_path)
    run("--source", source, *FEW)
    before = hashes(data)
    os.remove(data / "pairs.npy")
    run()
    assert hashes(data) == before
    os.remove(data / "pairs.npy")
    monkeypatch.setattr(prepare_data, "is_held_out", lambda row: True)
    with pytest.raises(UserError, match="came out different"):
        run()
    assert not (data / "pairs.npy").exists() and not (data / "pairs.npy.new").exists()


def test_two_at_once(published):
    data, run = published
    with data_folder.DataFolder(str(data)).lock():
        with pytest.raises(UserError, match="another prepare_data.py is writing"):
            run()
    late = data_folder.DataFolder(str(data))
    run()
    with pytest.raises(UserError, match="has just changed"), late.lock():
        pytest.fail("it works with settings that are no longer there")


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    argv = [sys.executable, f"{ROOT}/prepare_data.py", "toy", "--num_ref", "1"]
    done = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --num_ref is 1, but must be at least 2.\n"
