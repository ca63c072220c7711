"""Reads preferences, as text, from .json and .jsonl files and from the paper's release. Formats: docs/data.md."""
import json
import os
import tempfile
import zipfile
from pathlib import Path

from extras.download import full_url, stream
from extras.llm_judge import with_retries
from model import UserError, file_hash

FIELDS = {"prompt", "chosen", "rejected", "responses", "best", "story1", "story2", "label"}
ENDINGS = (".json", ".jsonl")
RELEASES = ("SPO-4159", "SP0-4159")  # the paper's text can be read either way


def parse_preference(record):
    """
    One record -> the token file it is for, "pairs", "ranked" or "best", and its responses, best first. A prompt is the
    beginning of every response: it cancels in the losses. Raises ValueError.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    name, best = "pairs", 0
    if {"story1", "story2", "label"} <= record.keys():  # the paper's authors'
        responses = [record["story1"], record["story2"]]
        if str(record["label"]) not in ("1", "2"):
            raise ValueError(f"its label is {record['label']!r:.20}, not 1 or 2")
        best = int(record["label"]) - 1
    elif {"chosen", "rejected"} <= record.keys():       # TRL's
        responses = [record["chosen"], record["rejected"]]
    elif isinstance(record.get("responses"), list):
        name, responses = "ranked", list(record["responses"])
        if record.get("best") is not None:
            name, best = "best", record["best"]
    else:
        raise ValueError("it has neither chosen and rejected, nor responses, nor story1, story2 and label")
    if len(responses) < 2:
        raise ValueError("it has fewer than two responses")
    if type(best) is not int or best not in range(len(responses)):
        raise ValueError(f"its best is {best!r:.20}, not the index of a response")
    prompt = record.get("prompt") or ""
    if not all(isinstance(text, str) for text in [prompt, *responses]):
        raise ValueError("a response or the prompt is not a string")
    responses = [prompt + text for text in responses]
    if not all(text.strip() for text in responses):
        raise ValueError("a response is empty")
    "".join(responses).encode()  # raises UnicodeEncodeError, a ValueError, at half of a surrogate pair
    responses.insert(0, responses.pop(best))
    return name, responses


def list_items(content):
    """The items of a .json file: of its list, or of the lists in its object."""
    items = json.loads(content)
    if isinstance(items, dict):
        items = [item for part in items.values() if isinstance(part, list) for item in part]
    return items


def import_preferences(source, files):
    """
    The preferences in files, name -> bytes -> {"pairs", "ranked", "best" where there are any: rows of responses as
    text, best first}. Without pairs, these are the first and the last response of each row.
    """
    rows, unread = {}, set()
    for name, content in files.items():
        is_lines, where = name.endswith(".jsonl"), "its text"
        try:
            for number, item in enumerate(content.splitlines() if is_lines else list_items(content), 1):
                where = f"line {number}" if is_lines else f"item {number}"
                if is_lines and not item.strip():
                    continue
                record = json.loads(item) if is_lines else item
                kind, responses = parse_preference(record)
                kept = rows.setdefault(kind, [])
                kept.append(responses)
                if len(responses) != len(kept[0]):
                    raise ValueError(f"it has {len(responses)} responses, those before it {len(kept[0])}")
                unread |= {field for field, value in record.items() if isinstance(value, str)} - FIELDS
        except ValueError as error:
            raise UserError(f"{name}, {where}: {str(error)[:100]}.") from None
    if not rows:
        raise UserError(f"{source} holds no preferences: give a .jsonl or .json file, or a folder of them.")
    print(f"{source}: " + ", ".join(f"{len(kept)} {kind}" for kind, kept in rows.items()))
    if unread:
        print(f"  fields that are not read: {', '.join(sorted(unread))}")
    if "pairs" not in rows:
        print("  pairs are the first and the last response of each row")
    first_and_last = [[row[0], row[-1]] for kept in rows.values() for row in kept]
    rows["pairs"] = rows.pop("pairs", first_and_last)  # in any case the last key, and the last file to be written
    return rows


def download_released_pairs():
    """The paper's released pairs -> as import_preferences. Raises UserError where the link is dead."""
    failures = []
    for name in RELEASES:
        url = full_url("RELEASE_ENDPOINT", f"api/repo/{name}/zip")
        try:
            with tempfile.TemporaryFile() as f:
                with_retries(url, lambda: stream(url, f), {None: "the link may be dead"})
                with zipfile.ZipFile(f) as archive:
                    members = [member for member in archive.namelist() if member.endswith(ENDINGS)]
                    return import_preferences(url, {member: archive.read(member) for member in members})
        except (UserError, zipfile.BadZipFile) as error:
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
    paths = [source]
    if os.path.isdir(source):
        paths = sorted(f"{source}/{name}" for name in os.listdir(source) if name.endswith(ENDINGS))
    elif not os.path.exists(source) or not source.endswith(ENDINGS):
        raise UserError(f"{source} is not a .json or .jsonl file, or a folder of them: --source takes one, or made, or "
                        "released.")
    folder.check_input("source", {os.path.basename(path): file_hash(path) for path in paths})
    if complete:
        return {}
    return import_preferences(source, {path: Path(path).read_bytes() for path in paths})
