"""Preferences from files, the paper's release or a judge: what becomes of them, and what is refused."""
import collections
import functools
import gzip
import io
import json
import os
import zipfile

import numpy as np
import pytest

import prepare_data
from extras import make_pairs, preferences, token_files, toyworld
from extras.data_folder import open_folder
from extras.tests.conftest import ROOT
from extras.tests.test_data import FEW, SMALLEST, hashes, pairs_file, prepare_toy, texts, write_stories
from extras.token_files import PAIR_FILES, encode_rows, save_preferences
from model import BOS, UserError, file_hash, load_tokenizer

LONG = "a " * 120
PLAIN = [("Q: 1?\nHow?\n", ["é A.", "B."]), ("Q: 2?\nWhy?\n", ["C.", "Q. D."]), ("3\n4\n", ["E.", "F."])]


def read(content, name="p"):
    """The rows of a file as lists, by kind."""
    rows = preferences.import_preferences(name, {name: functools.partial(io.BytesIO, content)})
    return {kind: list(kept) for kind, kept in rows.items()}


def dump(records, form="lines"):
    if form == "lines":
        return "\n\n".join(map(json.dumps, records)).encode()
    return json.dumps(records if form == "list" else {"set_1": records[:1], "set_2": records[1:], "date": "x"}).encode()


def message(role, text, keys=("role", "content")):
    return dict(zip(keys, (role, text)))


def conversation(prompt, response, keys=("role", "content")):
    """The prompt's two lines as messages, then the response."""
    return [*(message("user", line, keys) for line in prompt.splitlines()), message("gpt", response, keys)]


RECORDS = {
    "plain": [dict(prompt=x, chosen=a, rejected=b) for x, (a, b) in PLAIN],
    "repeated": [dict(prompt=x, chosen=x + a, rejected=x + b) for x, (a, b) in PLAIN],
    "authors": [dict(prompt=x, story1=b, story2=a, label="2") for x, (a, b) in PLAIN],
    "ranked": [dict(prompt=x, responses=[b, a], best=1) for x, (a, b) in PLAIN],
    "implicit": [dict(chosen=conversation(x, a), rejected=conversation(x, b)) for x, (a, b) in PLAIN],
    "from": [{k: conversation(x, y, ("from", "value")) for k, y in zip(("chosen", "rejected"), ys)} for x, ys in PLAIN],
    "explicit": [dict(prompt=conversation(x, "")[:2], chosen=[message("gpt", a)], rejected=[message("gpt", b)])
                 for x, (a, b) in PLAIN],
    "both": [dict(prompt=x.splitlines()[0], chosen=conversation(x, a), rejected=conversation(x, b))
             for x, (a, b) in PLAIN],
    "input": [dict(instruction=x.partition("\n")[0], input=x.partition("\n")[2], chosen=a, rejected=b)
              for x, (a, b) in PLAIN],
    **{name: [{name: x, "prompt": "", "chosen": a, "rejected": b} for x, (a, b) in PLAIN]
       for name in ("instruction", "question", "request", "context", "query")},
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_is_its_plain_form(name):
    assert read(dump(RECORDS[name]))["pairs"] == PLAIN


def test_what_a_file_holds_is_told_by_its_content(capsys):
    contents = [dump(RECORDS["plain"], form) for form in ("lines", "list", "object")]
    contents += [json.dumps(RECORDS["plain"], indent=1).encode(), contents[0].replace(b"\n", b"\r\n")]
    contents += [x.decode().encode(code) for x in contents for code in ("utf-8-sig", "utf-16")]
    contents += [b"\xfe\xff" + contents[0].decode().encode("utf-16-be"), *map(gzip.compress, contents)]
    for content in contents:
        assert read(content)["pairs"] == PLAIN
    assert read(json.dumps(RECORDS["plain"][0], indent=1).encode())["pairs"] == PLAIN[:1]
    assert "not read" not in capsys.readouterr().out


def test_what_has_no_prompt_and_what_is_not_read(capsys):
    """Texts that begin alike; an empty response; a second prompt; a prompt that only one response repeats."""
    records = [dict(chosen="Once a", rejected="Once b", note="x", number=3), dict(chosen="a", rejected=" "),
               dict(question="q", query="r", input="s", output="", chosen="qa", rejected="b", context=None)]
    assert read(dump(records)) == dict(pairs=[("", ["Once a", "Once b"]), ("q\n", ["qa", "b"])])
    out = capsys.readouterr().out
    assert "p: 2 pairs; left out, with an empty response: 1\n  fields that are not read: input, note, query\n" in out
    rows = read(b'[{"responses": ["a", "b", "c"], "prompt": "x"}]')
    assert rows == dict(ranked=[("x", ["a", "b", "c"])], pairs=[("x", ["a", "c"])])


class MergingTokenizer:
    """A character is a token, its code; but "ab" is one token, 7. Unknown are digits, 0."""

    def encode(self, text):
        return [0 if c.isdigit() else ord(c) for c in text.replace("ab", "\7")]


def load_pairs(path):
    """The rows of pairs.npy, then heldout_pairs.npy -> tokens (N, 2, T), lengths (N,) of their prompts or None."""
    y = np.concatenate([np.load(path / name) for name in PAIR_FILES])
    files = [path / name.replace(".npy", "_prompt_length.npy") for name in PAIR_FILES]
    assert y.dtype == np.uint16 and files[0].exists() == files[1].exists()
    return y, np.concatenate([np.load(file) for file in files]) if files[0].exists() else None


@pytest.fixture
def save(tmp_path, monkeypatch):
    """A function that saves rows of texts as pairs, the last one held out -> as load_pairs."""
    counter = iter(range(99))
    monkeypatch.setattr(token_files, "is_held_out", lambda prompt, responses: False)

    def run(rows, limit=8, **settings):
        path = tmp_path / f"saved{next(counter)}"
        with open_folder(str(path)) as folder:
            folder.settings = dict(max_new_tokens=limit, **settings)
            save_preferences(folder, "pairs", encode_rows(MergingTokenizer(), rows), 0)
        return load_pairs(path)
    return run


def test_a_row_of_tokens_and_the_length_of_its_prompt(save):
    """A token that a response shares with its prompt's end is the response's; the prompt counts for the limit."""
    x, a, b, c, d = map(ord, "xabcd")
    y, lengths = save([("", ["x", "cd"]), ("", ["ccccccccc", "d"])])
    assert lengths is None
    assert y.tolist() == [[[1, x, *[1] * 7], [1, c, d, *[1] * 6]], [[1, *[c] * 8], [1, d, *[1] * 7]]]
    y, lengths = save([("xa", ["b", "c"]), ("xa", ["cd", "d"]), ("", ["xc", "xd"]), ("xabc", ["d", "c"])])
    assert y.tolist() == [[[1, x, 7, 1, 1, 1], [1, x, a, c, 1, 1]], [[1, x, a, c, d, 1], [1, x, a, d, 1, 1]],
                          [[1, x, c, 1, 1, 1], [1, x, d, 1, 1, 1]], [[1, x, 7, c, d, 1], [1, x, 7, c, c, 1]]]
    assert lengths.tolist() == [2, 3, 1, 4]


def test_what_is_cut_and_left_out_is_counted_before_it_is(save, capsys):
    rows = [("", responses) for responses in (
        ["a", "b"], ["b", "b"], ["a", "b"], ["b", "a"],
        ["ccccccccc", "a"], ["ccccccccd", "a"], ["ccccccccd", "ccccccccc"], ["1cccccccc", "1cccccccc"])]
    rows += [("ccccccc", ["a", "b"]), ("cccccccc", ["a", "b"])]
    assert len(save(rows)[0]) == 4
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if "making" not in line)
    assert ("pairs: 10 rows, 10 responses cut at 8 tokens left out: 2 identical, 1 duplicated, 2 identical only "
            "because of the cut, 1 prompt too long unknown characters: 2.04% of the tokens") in " ".join(out.split())
    assert "as <unk>" in out and "  3 rows to train on, 1 held out" in out
    assert len(save(rows, drop_long=True)[0]) == 2
    out = capsys.readouterr().out
    assert "10 responses over 8 tokens\n  left out: 1 identical, 1 duplicated, 5 too long, 1 prompt too long" in out
    assert len(save([*rows[:1], *rows[4:7]], limit=10)[0]) == 4
    assert "as <unk>" not in capsys.readouterr().out
    too_few = dict(length=rows[5:8], prompt=rows[9:] * 2, more=rows[:3])
    remedy = "give --max_new_tokens above 8, or with --drop_long more rows that fit"
    for name, words in dict(length=remedy, prompt=remedy, more="give more preferences").items():
        with pytest.raises(UserError, match=f"rows are left for .*, left out: .*: {words}"):
            save(too_few[name])


def test_rows_of_many_responses_from_text_to_tokens_and_back(published, tmp_path):
    """What the token files hold is the text, best first, and each row is in one of two files."""
    data, run = published
    stories = write_stories(60)
    ranked, best, pairs = ([stories[i:i + 3] for i in range(start, start + 18, 3)] for start in (0, 18, 36))
    records = [dict(responses=row) for row in ranked]
    records += [dict(responses=[row[1], row[2], row[0]], best=2) for row in best]
    records += [dict(chosen=a, rejected=b, prompt="Soon ") for a, b, _ in pairs]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.json").write_bytes(gzip.compress(dump(records[:9])))
    (tmp_path / "s/b.jsonl.gz").write_bytes(dump(records[9:], "object"))
    run("--source", str(tmp_path / "s"), *FEW)
    pairs = [["Soon " + a, "Soon " + b] for a, b, _ in pairs]
    for name, rows in (("pairs", pairs), ("ranked", ranked), ("best", best)):
        assert sorted(texts(data, name, f"heldout_{name}")) == sorted(rows)
    lengths = sorted(path.name for path in data.glob("*_prompt_length.npy"))
    assert lengths == [f"{name}_prompt_length.npy" for name in ("heldout_pairs", "pairs", "ref")]


def test_rows_are_held_out_by_prompt_or_else_by_their_responses(tmp_path):
    """One in twenty; the same prompt is on one side, and without one the same responses in any order."""
    y = np.random.default_rng(0).integers(2, 600, (4000, 3, 5)).tolist()
    rows = [(x, [x + a, x + b]) for x, a, b in y[:2000]]
    rows += [(x, [x + a, x + b]) for (x, _, _), (_, a, b) in zip(y[:2000], y[2000:])]
    rows += [([], [a, b]) for _, a, b in y] + [([], [b, a]) for _, a, b in y]
    sides = collections.defaultdict(list)
    with open_folder(str(tmp_path / "data")) as folder:
        folder.settings = dict(max_new_tokens=20)
        save_preferences(folder, "pairs", rows, 0)
        for name in PAIR_FILES:
            lengths = np.load(f"{folder.path}/{name.replace('.npy', '_prompt_length.npy')}")
            for row, length in zip(np.load(f"{folder.path}/{name}"), lengths, strict=True):
                key = row[0, :length] if length > 1 else np.sort(row, 0)
                sides[length, key.tobytes()].append(name)
    assert len(sides) == 6000 and all(names in ([names[0]] * 2,) for names in sides.values())
    for length, n in ((6, 2000), (1, 4000)):
        held_out = [names[0] == PAIR_FILES[1] for (key, _), names in sides.items() if key == length]
        assert len(held_out) == n and 0.03 < np.mean(held_out) < 0.065
    for given, prompts, expected in (([0, 1, 0], [1, 1, 1], [0, 1, 0]), ([0, 0, 0], [5, 6, 5], [1, 0, 1]),
                                     ([1, 1, 1], [5, 6, 6], [0, 1, 1]), ([1, 1], [5, 5], [0, 1])):
        assert token_files.hold_out_some(np.array(given) > 0, np.array(prompts)).tolist() == expected


REAL = f"{ROOT}/../shared/real"


@pytest.mark.skipif(not os.path.exists(REAL), reason="needs real files")
@pytest.mark.parametrize("name, limit, kept", [
    ("instructions", 255, 1094), ("instructions", 60, 892), ("shard", 300, 21)])
def test_every_row_of_real_files(tmp_path, name, limit, kept):
    """Against a plain loop over the file, with the published tokenizer of 512 pieces."""
    tokenizer = load_tokenizer(f"{REAL}/tok512.model", 512)
    with open_folder(str(tmp_path / "data")) as folder:
        folder.settings = dict(source=f"{REAL}/{name}.json", max_new_tokens=limit)
        rows = encode_rows(tokenizer, preferences.read_preferences(folder)["pairs"])
        save_preferences(folder, "pairs", rows, tokenizer.unk_id())
    rows, lengths = load_pairs(tmp_path / "data")
    expected = set()
    with open(f"{REAL}/{name}.json") as f:
        records = json.load(f)
    for record in records:
        prompt = record.get("request") or "\n".join(filter(None, (record["instruction"], record["input"])))
        prompt += "\n" * (not prompt.endswith("\n"))
        row = [tokenizer.encode(prompt + record[key]) for key in ("chosen", "rejected")]
        length = len(os.path.commonprefix([tokenizer.encode(prompt), *row])) + 1
        row = [([BOS, *tokens, *[BOS] * limit])[:limit + 1] for tokens in row]
        if row[0] != row[1] and length <= limit:
            expected.add((length, np.array(row, np.uint16)[:, :rows.shape[2]].tobytes()))
    assert {(length, row.tobytes()) for length, row in zip(lengths, rows)} == expected and len(rows) == kept


@pytest.mark.parametrize("line, words", [
    ("{", "line 3: Expecting"),
    ("\xff", "line 3: "),
    ("7", "line 3: it is not an object"),
    ('{"chosen": "a"}', "line 3: it has neither"),
    ('{"responses": "ab"}', "line 3: it has neither"),
    ('{"chosen": "a", "rejected": 3}', "line 3: .* is neither a string nor a list of messages"),
    ('{"prompt": ["x"], "chosen": "a", "rejected": "b"}', "line 3: .* is neither a string"),
    ('{"chosen": [], "rejected": [{"role": "user"}]}', "line 3: .* is neither a string"),
    ('{"responses": ["a", "b"], "scores": [0.1, 2]}', "line 3: its scores are numbers: order its responses"),
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
        read(content, "p.jsonl")


@pytest.mark.parametrize("content, words", [
    (b"{", "p, Expecting property name"), (b"{}", "p, line 1: it has neither"), (b"", "p holds no preferences"),
    (b'{"set_1": []}', "p holds no preferences"), (dump([dict(chosen="", rejected="b")]), "1 rows with an empty"),
    (b"[3]", "p, item 1: .* but a int: scores"), (b"0.5\n1\n", "p, line 1: .* but a float: scores"),
    (b"PAR1\x15\4", "it is Parquet: export it as JSON Lines"), (b"ARROW1\0\0", "it is Arrow: export"),
    (b"\xff\xff\xff\xff\x10", "Arrow stream: export"), (b"PK\3\4", "zip archive: unpack"),
    (b"chosen,rejected\na,b\n", "it is not JSON but text, or CSV: export"), (b"{\0", "save it as UTF-8"),
    (gzip.compress(dump(RECORDS["plain"]))[:-20], "p, Compressed file ended"),
])
def test_files_that_cannot_be_used_are_refused_with_what_they_are(content, words):
    with pytest.raises(UserError, match=words):
        read(content)


def test_which_files_of_a_folder_are_read_and_what_does_not_exist(tmp_path):
    names = ["a.jsonl", "b.json.gz", "c.parquet"]
    for name in [*names, "README.md"]:
        (tmp_path / name).touch()
    assert preferences.find_files(str(tmp_path)) == [f"{tmp_path}/{name}" for name in names]
    assert preferences.find_files(f"{tmp_path}/README.md") == [f"{tmp_path}/README.md"]
    (tmp_path / "empty").mkdir()
    for source, words in (("someone/some-data", "of the Hugging Face hub, export it"),
                          (f"{tmp_path}/empty", "holds no file that ends with .json, .jsonl"),
                          ("data/p.jsonl", "^data/p.jsonl does not exist: --source takes")):
        with pytest.raises(UserError, match=words):
            preferences.find_files(source)


def test_the_release_is_dead_and_then_found_under_its_second_spelling(published, tmp_path, mirror, monkeypatch):
    data, run = published
    stories, archive = write_stories(60), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as f:
        f.writestr("README.md", "{")
        f.write(pairs_file(tmp_path, stories), "../../evil.jsonl")
    monkeypatch.setenv("RELEASE_ENDPOINT", mirror.url)
    before, files = hashes(data), set(tmp_path.rglob("*"))
    mirror.replies = [(410, b"", None), (200, b"<html>", None)]
    with pytest.raises(UserError, match="answers 410.*not a zip file.*use --source made, or name a folder"):
        run("--source", "released", *FEW)
    assert hashes(data) == before
    mirror.asked.clear()
    mirror.replies = [(410, b"", None), (206, archive.getvalue(), 50), (200, archive.getvalue(), None)]
    run("--source", "released", *FEW)
    assert {path.parent for path in set(tmp_path.rglob("*")) - files} == {data}  # the archive's names are not used
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(map(list, zip(stories[::2], stories[1::2])))
    run()
    assert [path.split("/")[3] for path, _ in mirror.asked] == ["SPO-4159", "SP0-4159", "SP0-4159"]


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
    kept, _ = load_pairs(data)  # not tokens of its text
    assert {y.tobytes().rstrip(b"\0\1") for y in kept.reshape(48, -1)} <= sampled
    assert sorted(texts(data, "pairs", "heldout_pairs")) == sorted(expected)


def test_the_toy_worlds_expert_as_a_judge(tmp_path):
    """Of each model it is the judge that is the default; it prefers by three points or more."""
    prepare_toy(tmp_path, "--source", "made", *SMALLEST, "--num_pairs", "60")
    with open(tmp_path / "made.jsonl") as f:
        records = [json.loads(line) for line in f]
    assert len(records) > 2 and {record["judge"] for record in records} == {"toy"}
    for record in records:
        chosen, rejected = toyworld.score(record["chosen"]), toyworld.score(record["rejected"])
        first, second = (chosen, rejected) if record["better"] == 0 else (rejected, chosen)
        better = 1 + record["better"]
        assert chosen - rejected >= 3 and record["verdicts"] == [[first, second, better], [second, first, 3 - better]]
