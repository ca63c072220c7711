"""
Reads preferences, as text, from .json and .jsonl files and from the paper's release. Formats: docs/data.md.
"""
import functools
import json
import os
import tempfile
import zipfile
import zlib

from extras.download import full_url, stream
from extras.llm_judge import with_retries
from model import UserError, file_hash

FIELDS = {"prompt", "chosen", "rejected", "responses", "best", "story1", "story2", "label"}
RELEASES = ("SPO-4159", "SP0-4159")  # the paper's text can be read either way
MAX_RELEASE = 1 << 30                # bytes of its zip, and of what is in it


def parse_preference(record):
    """
    One record -> the token file it is for, "pairs", "ranked" or "best"; the position at which its best response was
    shown (None: not known); its responses, best first. A prompt is the beginning of every response: it cancels in the
    losses. Raises ValueError.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    name, best = "pairs", None
    if {"story1", "story2", "label"} <= record.keys():  # the paper's authors'
        responses = [record["story1"], record["story2"]]
        if record["label"] not in (1, 2, "1", "2") or record["label"] is True:
            raise ValueError(f"its label is {record['label']!r:.20}, not 1 or 2")
        best = int(record["label"]) - 1
    elif {"chosen", "rejected"} <= record.keys():       # TRL's
        responses = [record["chosen"], record["rejected"]]
    elif isinstance(record.get("responses"), list):
        name, responses = "ranked", list(record["responses"])
        if len(responses) < 2:
            raise ValueError("it has fewer than two responses")
        if record.get("best") is not None:
            name, best = "best", record["best"]
            if type(best) is not int or not 0 <= best < len(responses):
                raise ValueError(f"its best is {best!r:.20}, not the index of a response")
    else:
        raise ValueError("it has neither chosen and rejected, nor responses, nor story1, story2 and label")
    prompt = record.get("prompt") or ""
    if not all(isinstance(text, str) for text in [prompt, *responses]):
        raise ValueError("a response or the prompt is not a string")
    responses = [prompt + text for text in responses]
    if not all(text.strip() for text in responses):
        raise ValueError("a response is empty")
    "".join(responses).encode()  # raises UnicodeEncodeError, a ValueError, at half of a surrogate pair
    responses.insert(0, responses.pop(best or 0))
    return name, best, responses


def read_records(name, f):
    """
    The records in the binary file f: of each, its line or item number and what json makes of it. name ends in .jsonl,
    or in .json for a list, or an object whose values are lists.
    """
    where = "its text"
    try:
        if name.endswith(".jsonl"):
            for number, line in enumerate(f, 1):
                where = f"line {number}"
                if line.strip():
                    yield where, json.loads(line)
            return
        records = json.load(f)
        if isinstance(records, dict):
            records = [record for part in records.values() if isinstance(part, list) for record in part]
        if not isinstance(records, list):
            raise ValueError("it is neither a list nor an object of lists")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}, {where}: {str(error)[:100]}.") from None
    for number, record in enumerate(records, 1):
        yield f"item {number}", record


def import_preferences(source, files):
    """
    The preferences in files, (name, binary file) each -> {"pairs", "ranked", "best" where there are any: rows of
    responses as text, best first}. Without pairs, these are the first and the last response of each row.
    """
    rows, positions, unread = {}, [], set()
    for name, f in files:
        for where, record in read_records(name, f):
            try:
                kind, best, responses = parse_preference(record)
                kept = rows.setdefault(kind, [])
                if kept and len(kept[0]) != len(responses):
                    raise ValueError(f"it has {len(responses)} responses, those before it {len(kept[0])}")
            except ValueError as error:
                raise UserError(f"{name}, {where}: {str(error)[:100]}.") from None
            kept.append(responses)
            positions.append(best)
            unread |= {field for field, value in record.items() if isinstance(value, str)} - FIELDS
    if not rows:
        raise UserError(f"{source} holds no preferences: give a .jsonl or .json file, or a folder of them.")
    print(f"{source}: {len(positions)} preferences")
    if None not in positions:
        print(f"  the response shown first is the better one in {positions.count(0)}")
    if unread:
        print(f"  fields that are not read: {', '.join(sorted(unread))}")
    if "pairs" not in rows:
        print("  pairs are the first and the last response of each row")
    first_and_last = [[row[0], row[-1]] for kept in rows.values() for row in kept]
    rows["pairs"] = rows.pop("pairs", first_and_last)  # in any case the last key, and the last file to be written
    return rows


def list_files(source):
    """The file source, or the .json and .jsonl files in the folder source."""
    if os.path.isdir(source):
        return sorted(f"{source}/{name}" for name in os.listdir(source) if name.endswith((".json", ".jsonl")))
    if not os.path.exists(source) or not source.endswith((".json", ".jsonl")):
        raise UserError(f"{source} is not a .json or .jsonl file, or a folder of them: --source takes one, or made, or "
                        "released.")
    return [source]


def open_files(paths):
    """(path, open binary file) of each."""
    for path in paths:
        with open(path, "rb") as f:
            yield path, f


def import_zip(url, f):
    """import_preferences of the .json and .jsonl files in the zip file f. Their names are never used as paths."""
    try:
        with zipfile.ZipFile(f) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith((".json", ".jsonl"))]
            if sum(m.file_size for m in members) > MAX_RELEASE:
                raise zipfile.BadZipFile("it is too big")
            return import_preferences(url, ((m.filename, archive.open(m)) for m in members))
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{url} is not a zip file that can be read ({error}).") from None


def download_released_pairs():
    """The paper's released pairs -> as import_preferences. Raises UserError where the link is dead."""
    failures = []
    for name in RELEASES:
        url = full_url("RELEASE_ENDPOINT", f"api/repo/{name}/zip")
        with tempfile.TemporaryFile() as f:
            try:
                with_retries(url, functools.partial(stream, url, f, MAX_RELEASE), {None: "the link may be dead"})
                return import_zip(url, f)
            except UserError as error:
                failures.append(str(error))
    raise UserError(f"the released pairs cannot be imported ({' '.join(failures)}): use --source made, or name a "
                    "folder of files that you downloaded.")


def read_preferences(folder):
    """The preferences of folder's source -> as import_preferences; {} where its token files exist, or are not text."""
    source = folder.settings["source"]
    complete = folder.has("pairs.npy", "heldout_pairs.npy", *folder.files)
    if source in (None, "toy", "made"):
        return {}
    if source == "released":
        return {} if complete else download_released_pairs()
    if complete and not os.path.exists(source):
        return {}
    files = list_files(source)
    folder.add_input("source", {os.path.basename(path): file_hash(path) for path in files})
    if complete:
        return {}
    return import_preferences(source, open_files(files))
