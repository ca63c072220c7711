"""Preferences from files, the paper's release or a judge: what becomes of them, and what is refused."""
import io
import json
import zipfile

import numpy as np
import pytest

import prepare_data
from extras import make_pairs, preferences, toyworld
from extras.tests.conftest import TOKENIZER
from extras.tests.test_data import FEW, as_lines, hashes, texts, write_stories
from model import BOS, UserError, file_hash, load_tokenizer


# ---------------------------------------------------------------------------------------------------
# Preferences from files and from the release

def authors_record(i, better, worse):
    """The authors' format, in either spelling of a label and either order."""
    if i % 2 == 0:
        return dict(story1=better, story2=worse, label=(1, "1")[i // 2 % 2])
    return dict(story1=worse, story2=better, label=(2, "2")[i // 2 % 2])


def test_a_row_from_text_to_tokens_and_back(published, tmp_path, capsys):
    """Every format: what the token files hold is the text, best first, and each row is in one of two files."""
    data, run = published
    stories = write_stories(290)
    pairs = [list(pair) for pair in zip(stories[0:200:2], stories[1:200:2])]
    records = [authors_record(i, *pair) for i, pair in enumerate(pairs[:50])]
    records += [dict(prompt=None, chosen=a, rejected=b) for a, b in pairs[50:90]]
    for pair in pairs[90:]:
        start, pair[1] = pair[0][:9], pair[0][:9] + pair[1]
        records.append(dict(prompt=start, chosen=pair[0][9:], rejected=pair[1][9:], note="x"))
    ranked = [stories[i:i + 3] for i in range(200, 245, 3)]
    best = [stories[i:i + 3] for i in range(245, 290, 3)]
    records += [dict(responses=row) for row in ranked]
    records += [dict(responses=[row[1], row[2], row[0]], best=2) for row in best]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.json").write_text(json.dumps({"set_1": records[:30], "set_2": records[30:60], "date": "x"}))
    (tmp_path / "s/b.jsonl").write_text("\n\n".join(map(json.dumps, records[60:])))
    run("--source", str(tmp_path / "s"), *FEW)
    out = capsys.readouterr().out
    assert "s: 130 preferences" in out and "fields that are not read: note" in out
    for name, rows in (("pairs", pairs), ("ranked", ranked), ("best", best)):
        assert sorted(texts(data, name, f"heldout_{name}")) == sorted(rows)


def test_a_row_of_tokens(published, tmp_path):
    """BOS, the tokens of the text, BOS to the end; cut at max_new_tokens."""
    data, run = published
    tokenizer = load_tokenizer(TOKENIZER, 640)
    stories = [*write_stories(3), "a " * 200]
    (tmp_path / "p.jsonl").write_text(as_lines(stories))
    run("--source", str(tmp_path / "p.jsonl"), *FEW)
    rows = [np.load(data / name) for name in prepare_data.PAIR_FILES]
    assert [y.dtype for y in rows] == [np.uint16] * 2
    rows = np.concatenate(rows).reshape(4, 101).tolist()
    for story in stories:
        ids = tokenizer.encode(story)
        assert [BOS, *ids, *[BOS] * 100][:101] in rows and BOS not in ids


def test_rows_are_held_out_by_their_responses_alone(published, tmp_path, capsys):
    """One in twenty, however its responses are ordered and padded, and whatever else is in the file."""
    data, run = published
    stories = write_stories(400)
    (tmp_path / "p.jsonl").write_text(as_lines(stories))
    run("--source", str(tmp_path / "p.jsonl"), *FEW)
    train, heldout = (np.load(data / name) for name in prepare_data.PAIR_FILES)
    assert len(train) + len(heldout) == 200 and 3 <= len(heldout) <= 17
    for y, expected in ((train, False), (heldout, True)):
        swapped = np.pad(y[:, ::-1], ((0, 0), (0, 0), (0, 9)), constant_values=BOS)
        assert {prepare_data.is_held_out(row) for row in swapped} == {expected}
    assert f"{len(train)} rows to train on, {len(heldout)} held out" in capsys.readouterr().out


LONG = "a " * 120


@pytest.mark.parametrize("stories, cut, error", [
    (["a b", "a b"] * 3, 0, "0 of 3 rows .*3 have a response twice, 0 only because it is cut at 100 tokens, 0 are dup"),
    ([LONG + "b", LONG, LONG + "c", LONG], 4, "0 of 2 rows .*0 have a response twice, 2 only because it is cut"),
    (["a", "b"] * 3, 0, "1 of 3 rows .*0 have a response twice, 0 only because it is cut at 100 tokens, 2 are dup"),
])
def test_why_nothing_is_left(published, tmp_path, capsys, stories, cut, error):
    data, run = published
    (tmp_path / "p.jsonl").write_text(as_lines(stories))
    with pytest.raises(UserError, match=error):
        run("--source", str(tmp_path / "p.jsonl"), *FEW)
    assert f"{cut} responses without an end in 100 tokens" in capsys.readouterr().out
    assert not (data / "pairs.npy").exists()


@pytest.mark.parametrize("by_hash, train, heldout", [(False, 2, 1), (True, 1, 2)])
def test_what_is_left_out_is_counted(published, tmp_path, monkeypatch, capsys, by_hash, train, heldout):
    data, run = published
    monkeypatch.setattr(prepare_data, "is_held_out", lambda row: by_hash)  # of every row: one of each kind is needed
    stories = [LONG, "b", "a", "b", "b", "a", "a", "b", "b", "b", LONG + "b", "b", LONG, LONG + "a"]
    (tmp_path / "p.jsonl").write_text(as_lines(stories))
    run("--source", str(tmp_path / "p.jsonl"), *FEW)
    out = " ".join(capsys.readouterr().out.split())
    assert "7 rows, 4 responses without an end in 100 tokens" in out
    assert "1 have a response twice, 1 only because it is cut at 100 tokens, 2 are duplicates." in out
    assert f"{train} rows to train on, {heldout} held out" in out
    assert [len(np.load(data / name)) for name in prepare_data.PAIR_FILES] == [train, heldout]


def test_pairs_are_the_last_file_and_without_them_first_and_last():
    ranking, pair = dict(responses=["a", "b", "c"]), dict(chosen="d", rejected="e")
    for records, pairs in (([ranking], [["a", "c"]]), ([pair, ranking], [["d", "e"]])):
        f = io.BytesIO(json.dumps(records).encode())
        rows = preferences.import_preferences("p.json", [("p.json", f)])
        assert list(rows.items()) == [("ranked", [["a", "b", "c"]]), ("pairs", pairs)]


GOOD = json.dumps(dict(chosen="A story.", rejected="Another."))


@pytest.mark.parametrize("line, words", [
    ("{", "line 3: "),
    ("[" * 100_000, "line 3: "),
    ("\xff", "line 3: "),
    ("7", "it is not an object"),
    ("{}", "it has neither chosen"),
    ('{"chosen": "a"}', "it has neither"),
    ('{"responses": "ab"}', "it has neither"),
    ('{"chosen": "a", "rejected": 3}', "is not a string"),
    ('{"prompt": ["x"], "chosen": "a", "rejected": "b"}', "is not a string"),
    ('{"responses": ["a", null]}', "is not a string"),
    ('{"chosen": "a", "rejected": " "}', "is empty"),
    ('{"chosen": "a", "rejected": "\\ud800"}', "line 3: "),
    ('{"story1": "a", "story2": "b", "label": 3}', "label is 3, not 1 or 2"),
    ('{"story1": "a", "story2": "b", "label": "a"}', "label is 'a'"),
    ('{"story1": "a", "story2": "b", "label": true}', "label is True"),
    ('{"story1": "a", "story2": "b", "label": null}', "label is None"),
    ('{"story1": "a", "story2": "b", "label": [1]}', "label is .1."),
    ('{"responses": ["a"]}', "fewer than two"),
    ('{"responses": ["a", "b"], "best": 2}', "best is 2"),
    ('{"responses": ["a", "b"], "best": -1}', "best is -1"),
    ('{"responses": ["a", "b"], "best": "0"}', "best is '0'"),
    ('{"responses": ["a", "b"], "best": true}', "best is True"),
    ('{"responses": ["a", "b"]}\n{"responses": ["a", "b", "c"]}', "line 4: it has 3 responses, those before it 2"),
])
def test_malformed_lines_are_refused_by_number_and_reason(line, words):
    f = io.BytesIO(f"{GOOD}\n\n{line}\n".encode("latin-1"))
    with pytest.raises(UserError, match=words) as error:
        preferences.import_preferences("p.jsonl", [("p.jsonl", f)])
    message = str(error.value)
    assert message.startswith("p.jsonl, line ") and "\n" not in message and len(message) < 200


@pytest.mark.parametrize("body", [b"{", b"3", b"[3]", b'"x"', b"\xff", b"{}", b"[]", b'{"a": 3}'])
def test_malformed_files_are_refused(body):
    with pytest.raises(UserError, match="p.json(, its text:|, item 1:| holds no preferences)"):
        preferences.import_preferences("p.json", [("p.json", io.BytesIO(body))])


def zipped(files):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return f.getvalue()


def test_the_release_under_its_second_spelling(published, tmp_path, mirror, monkeypatch):
    data, run = published
    stories = write_stories(60)
    first, second = as_lines(stories[:30]), as_lines(stories[30:])
    archive = zipped({"README.md": "{", "../../evil.jsonl": first, "/a/b.jsonl": second})
    monkeypatch.setenv("RELEASE_ENDPOINT", mirror.url)
    mirror.replies = [(410, b"", None), (200, archive, 50), ("no ranges", archive, None)]
    before = set(tmp_path.rglob("*"))
    run("--source", "released", *FEW)
    new_files = set(tmp_path.rglob("*")) - before
    assert {path.parent for path in new_files} == {data}  # the names in the archive are not used
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(map(list, zip(stories[::2], stories[1::2])))
    run()
    assert [path.split("/")[3] for path, _ in mirror.asked] == ["SPO-4159", "SP0-4159", "SP0-4159"]


@pytest.mark.parametrize("reply, words", [
    ((410, b"", None), "answers 410"),
    ((200, b"<html>", None), "not a zip file"),
    ((200, bytes(2000), None), "not a zip file"),
    ((200, zipped({"a.md": ""}), None), "holds no preferences"),
    ((200, zipped({"a.json": "[{}]"}), None), "a.json, item 1: it has neither"),
    ((200, zipped({"a.json": GOOD * 99}), None), "not a zip file that can be read .it is too big"),
    ((200, zipped({"a.json": GOOD})[:-9], None), "not a zip file"),
])
def test_a_dead_release_says_what_else_there_is(published, mirror, monkeypatch, reply, words):
    data, run = published
    before = hashes(data)
    monkeypatch.setenv("RELEASE_ENDPOINT", mirror.url)
    monkeypatch.setattr(preferences, "MAX_RELEASE", 1000)
    mirror.replies = [reply]
    with pytest.raises(UserError, match=words) as error:
        run("--source", "released", *FEW)
    assert "use --source made, or name a folder" in str(error.value) and "\n" not in str(error.value)
    assert hashes(data) == before


# ---------------------------------------------------------------------------------------------------
# Made pairs

@pytest.mark.parametrize("verdict, swapped, outcome", [
    ((7, 5, 1), (4, 7, 2), 0),              # story 1 by 2 points where it is shown first, by 3 where second
    ((4, 7, 2), (7, 5, 1), 1),
    ((7, 5, 1), (5, 7, 2), "too close"),
    ((6, 5, 1), (4, 8, 2), "too close"),
    ((5, 7, 2), (9, 1, 1), "too close"),
    ((4, 7, 2), (7, 6, 1), "too close"),
    ((5, 5, 1), (5, 5, 2), "too close"),
    ((7, 4, 1), (7, 4, 1), "inconsistent"),
    ((1, 9, 2), (1, 9, 2), "inconsistent"),
    (None, (1, 9, 2), "invalid"),
    ((1, 9, 2), None, "invalid"),
])
def test_the_filter_of_e1(verdict, swapped, outcome):
    assert make_pairs.apply_filter(verdict, swapped) == outcome


def much_longer(a, b):
    return len(a) > len(b) + 40


def scripted_verdict(a, b):
    """A judge that likes long stories and of two alike, as judges do, the second."""
    return (8, 4, 1) if much_longer(a, b) else (4, 8, 2)


def test_made_pairs_are_the_models_own_tokens(published, monkeypatch, capsys):
    """The judge fails once, half-way; after that nothing is sampled again, and what is kept is what it liked."""
    data, run = published
    asked = []

    def judge_pairs(pairs, path):
        asked.append(pairs)
        if len(asked) == 1:
            raise UserError("the key has run out.")
        return [(scripted_verdict(a, b), scripted_verdict(b, a)) for a, b in pairs]

    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("JUDGE_MODEL", "scripted")
    monkeypatch.setattr(make_pairs, "judge_pairs", judge_pairs)
    with pytest.raises(UserError, match="run out"):
        run("--source", "made", "--num_pairs", "48", *FEW)
    made = file_hash(data / "made.npy")
    run()
    run()  # all is there
    assert asked[0] == asked[1] and len(asked) == 2 and file_hash(data / "made.npy") == made

    expected = {}  # index of the pair -> better, worse
    for i, (a, b) in enumerate(asked[0]):
        if much_longer(a, b):
            expected[i] = [a, b]
        elif much_longer(b, a):
            expected[i] = [b, a]
    assert len(asked[0]) == 48 and 5 < len(expected) < 48
    assert f"{48 - len(expected)} inconsistent, 0 too close, 0 invalid" in capsys.readouterr().out
    records = [json.loads(line) for line in open(data / "made.jsonl")]
    assert {x["pair"]: [x["chosen"], x["rejected"]] for x in records} == expected
    assert {x["judge"] for x in records} == {"scripted"}
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(expected.values())
    sampled = {y.tobytes().rstrip(b"\0\1") for y in np.load(data / "made.npy").reshape(96, -1)}
    for name in prepare_data.PAIR_FILES:  # the model's own tokens, not those of its text
        y = np.load(data / name)
        assert {response.tobytes().rstrip(b"\0\1") for response in y.reshape(2 * len(y), -1)} <= sampled


def test_the_toy_worlds_expert_as_a_judge():
    stories = sorted(write_stories(50), key=toyworld.score)
    low, high = stories[0], stories[-1]
    for judge, taste in (("toy", "limited"), ("toy-naive", "naive")):
        (verdict, swapped), = make_pairs.get_verdicts([(high, low)], judge, None)
        scores = toyworld.score(high, taste), toyworld.score(low, taste)
        assert verdict == (*scores, 1) and swapped == (*scores[::-1], 2)
