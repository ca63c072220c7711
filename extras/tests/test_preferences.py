"""Preferences from files, the paper's release or a judge: what becomes of them, and what is refused."""
import io
import json
import zipfile

import numpy as np
import pytest

import prepare_data
from extras import make_pairs, preferences, toyworld
from extras.tests.conftest import TOKENIZER
from extras.tests.test_data import FEW, hashes, pairs_file, texts, write_stories
from model import BOS, UserError, file_hash, load_tokenizer

LONG = "a " * 120


def test_every_format_from_text_to_tokens_and_back(published, tmp_path, capsys):
    """What the token files hold is the text, best first, and each row is in one of two files."""
    data, run = published
    stories = write_stories(58)
    pairs = [list(pair) for pair in zip(stories[:40:2], stories[1:40:2])]
    records = [dict(story1=a, story2=b, label=1) for a, b in pairs[:5]]
    records += [dict(story1=b, story2=a, label="2") for a, b in pairs[5:10]]
    records += [dict(prompt=None, chosen=a, rejected=b) for a, b in pairs[10:15]]
    for pair in pairs[15:]:
        records.append(dict(prompt="Once ", chosen=pair[0], rejected=pair[1], note="x"))
        pair[:] = ["Once " + pair[0], "Once " + pair[1]]
    ranked, best = ([stories[i:i + 3] for i in range(start, start + 9, 3)] for start in (40, 49))
    records += [dict(responses=row) for row in ranked]
    records += [dict(responses=[row[1], row[2], row[0]], best=2) for row in best]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.json").write_text(json.dumps({"set_1": records[:3], "set_2": records[3:12], "date": "x"}))
    (tmp_path / "s/b.jsonl").write_text("\n\n".join(map(json.dumps, records[12:])))
    run("--source", str(tmp_path / "s"), *FEW)
    out = capsys.readouterr().out
    assert "s: 20 pairs, 3 ranked, 3 best" in out and "fields that are not read: note" in out
    for name, rows in (("pairs", pairs), ("ranked", ranked), ("best", best)):
        assert sorted(texts(data, name, f"heldout_{name}")) == sorted(rows)


def test_a_row_of_tokens(published, tmp_path):
    """BOS, the tokens of the text, BOS to the end; cut at max_new_tokens."""
    data, run = published
    tokenizer = load_tokenizer(TOKENIZER, 640)
    stories = [*write_stories(3), LONG]
    run("--source", pairs_file(tmp_path, stories), *FEW)
    rows = np.concatenate([np.load(data / name) for name in prepare_data.PAIR_FILES]).reshape(4, 101).tolist()
    for story in stories:
        assert [BOS, *tokenizer.encode(story), *[BOS] * 100][:101] in rows


def test_rows_are_held_out_by_their_responses_alone(published, tmp_path):
    """One in twenty, however its responses are ordered and padded."""
    data, run = published
    run("--source", pairs_file(tmp_path, write_stories(400)), *FEW)
    train, heldout = (np.load(data / name) for name in prepare_data.PAIR_FILES)
    assert len(train) + len(heldout) == 200 and 3 <= len(heldout) <= 17
    for y, expected in ((train, False), (heldout, True)):
        swapped = np.pad(y[:, ::-1], ((0, 0), (0, 0), (0, 9)), constant_values=BOS)
        assert {prepare_data.is_held_out(row) for row in swapped} == {expected}


def test_what_is_left_out_is_counted(published, tmp_path, monkeypatch, capsys):
    data, run = published
    monkeypatch.setattr(prepare_data, "is_held_out", lambda row: False)  # of every row: but one is needed
    stories = ["b", "a", "b", "b", "a", "b", "a", "b", LONG + "b", LONG, LONG, "a"]
    with pytest.raises(UserError, match="1 of 5 rows .*2 have a response twice, 2 are duplicates"):
        run("--source", pairs_file(tmp_path, [*stories[2:8], *stories[4:6], *stories[8:10]]), *FEW)
    run("--source", pairs_file(tmp_path, stories), *FEW)
    out = capsys.readouterr().out
    assert "6 rows, 3 responses without an end in 100 tokens\n  left out: 2 have a response twice, 1 are dup" in out
    assert "2 rows to train on, 1 held out" in out
    assert [len(np.load(data / name)) for name in prepare_data.PAIR_FILES] == [2, 1]


def test_without_pairs_these_are_the_first_and_the_last():
    rows = preferences.import_preferences("p.json", {"p.json": b'[{"responses": ["a", "b", "c"]}]'})
    assert rows == dict(ranked=[["a", "b", "c"]], pairs=[["a", "c"]])


@pytest.mark.parametrize("line, words", [
    ("{", "line 3: Expecting"),
    ("\xff", "line 3: "),
    ("7", "line 3: it is not an object"),
    ('{"chosen": "a"}', "line 3: it has neither"),
    ('{"responses": "ab"}', "line 3: it has neither"),
    ('{"chosen": "a", "rejected": 3}', "line 3: .* is not a string"),
    ('{"prompt": ["x"], "chosen": "a", "rejected": "b"}', "line 3: .* is not a string"),
    ('{"chosen": "a", "rejected": " "}', "line 3: a response is empty"),
    ('{"chosen": "a", "rejected": "\\ud800"}', "line 3: .*surrogates"),
    ('{"story1": "a", "story2": "b", "label": 0}', "line 3: its label is 0, not 1 or 2"),
    ('{"responses": ["a"]}', "line 3: it has fewer than two"),
    ('{"responses": ["a", "b"], "best": 2}', "line 3: its best is 2"),
    ('{"responses": ["a", "b"], "best": "0"}', "line 3: its best is '0'"),
    ('{"responses": ["a", "b"]}\n{"responses": ["a", "b", "c"]}', "line 4: it has 3 responses, those before it 2"),
])
def test_malformed_lines_are_refused_by_number_and_reason(line, words):
    content = f'{{"chosen": "A story.", "rejected": "Another."}}\n\n{line}\n'.encode("latin-1")
    with pytest.raises(UserError, match=f"^p.jsonl, {words}"):
        preferences.import_preferences("p.jsonl", {"p.jsonl": content})


@pytest.mark.parametrize("content, words", [(b"{", "its text"), (b"[3]", "item 1"), (b"{}", "holds no preferences")])
def test_malformed_files_are_refused(content, words):
    with pytest.raises(UserError, match=words):
        preferences.import_preferences("p.json", {"p.json": content})


def test_the_release_under_its_second_spelling(published, tmp_path, mirror, monkeypatch):
    data, run = published
    stories, archive = write_stories(60), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as f:
        f.writestr("README.md", "{")
        f.write(pairs_file(tmp_path, stories), "../../evil.jsonl")
    monkeypatch.setenv("RELEASE_ENDPOINT", mirror.url)
    mirror.replies = [(410, b"", None), (206, archive.getvalue(), 50), (200, archive.getvalue(), None)]
    before = set(tmp_path.rglob("*"))
    run("--source", "released", *FEW)
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} == {data}  # the archive's names are not used
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(map(list, zip(stories[::2], stories[1::2])))
    run()
    assert [path.split("/")[3] for path, _ in mirror.asked] == ["SPO-4159", "SP0-4159", "SP0-4159"]


def test_a_dead_release_says_what_else_there_is(published, mirror, monkeypatch):
    data, run = published
    before = hashes(data)
    monkeypatch.setenv("RELEASE_ENDPOINT", mirror.url)
    mirror.replies = [(410, b"", None), (200, b"<html>", None)]
    with pytest.raises(UserError, match="answers 410.*not a zip file.*use --source made, or name a folder"):
        run("--source", "released", *FEW)
    assert hashes(data) == before


@pytest.mark.parametrize("verdict, swapped, outcome", [
    ((7, 5, 1), (4, 7, 2), 0),              # story 1 by 2 points where it is shown first, by 3 where second
    ((4, 7, 2), (7, 5, 1), 1),
    ((7, 5, 1), (5, 7, 2), "too close"),
    ((6, 5, 1), (4, 8, 2), "too close"),
    ((5, 7, 2), (9, 1, 1), "too close"),
    ((4, 7, 2), (7, 6, 1), "too close"),
    ((1, 9, 2), (1, 9, 2), "inconsistent"),
    (None, (1, 9, 2), "invalid"),
    ((1, 9, 2), None, "invalid"),
])
def test_the_filter_of_e1(verdict, swapped, outcome):
    assert make_pairs.apply_filter(verdict, swapped) == outcome


def test_made_pairs_are_the_models_own_tokens(published, monkeypatch, capsys):
    """The judge fails once, half-way; after that nothing is sampled again, and what is kept is what it liked."""
    data, run = published
    asked_before, asked = [], []
    answers = [((8, 4, 1), (4, 8, 2)), ((4, 8, 2), (8, 4, 1)), ((8, 4, 1), (8, 4, 1)), (None, (8, 4, 1))]

    def judge_pairs(pairs, path):
        asked.append(pairs)
        if len(asked) == 1:
            raise UserError("the key has run out.")
        return 12 * answers

    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("JUDGE_MODEL", "scripted")
    monkeypatch.setattr(make_pairs, "judge_pairs", judge_pairs)
    monkeypatch.setattr(prepare_data, "ask_test_question", asked_before.append)
    with pytest.raises(UserError, match="run out"):
        run("--source", "made", "--num_pairs", "48", *FEW)
    made = file_hash(data / "made.npy")
    assert asked_before == [96]
    run()
    run()  # all is there
    assert asked[0] == asked[1] and len(asked) == 2 and file_hash(data / "made.npy") == made
    assert "48 pairs judged by scripted in both orders: 24 kept\n  12 inconsistent, 0 too close, 12 invalid" in (
        capsys.readouterr().out)
    expected = sorted(list(pair) for pair in asked[0][::4]) + sorted([b, a] for a, b in asked[0][1::4])
    with open(data / "made.jsonl") as f:
        records = [json.loads(line) for line in f]
    assert sorted([x["chosen"], x["rejected"]] for x in records) == sorted(expected)
    sampled = {y.tobytes().rstrip(b"\0\1") for y in np.load(data / "made.npy").reshape(96, -1)}
    kept = np.concatenate([np.load(data / name) for name in prepare_data.PAIR_FILES])  # not tokens of its text
    assert {y.tobytes().rstrip(b"\0\1") for y in kept.reshape(48, -1)} <= sampled
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(expected)


def test_the_toy_worlds_expert_as_a_judge():
    stories = sorted(write_stories(50), key=toyworld.score)
    low, high = toyworld.score(stories[0]), toyworld.score(stories[-1])
    assert make_pairs.toy_verdicts((stories[-1], stories[0]), "limited") == ((high, low, 1), (low, high, 2))
