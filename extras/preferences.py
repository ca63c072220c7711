"""Reads preferences, as text, from files and from the paper's release. Formats: docs/data.md."""
import codecs
import collections
import functools
import gzip
import io
import json
import os
import re
import tempfile
import zipfile
import zlib

from extras.download import full_url, stream
from extras.llm_judge import with_retries
from model import UserError, file_hash

PROMPTS = ("prompt", "instruction", "question", "request", "context", "query")
RESPONSES = {"chosen", "rejected", "responses", "best", "story1", "story2", "label"}
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".arrow")  # the last two to say what to do with them
RELEASES = ("SPO-4159", "SP0-4159")  # the paper's text can be read either way
EXPORT = "export it as JSON Lines, for example with to_json of the datasets library"
FOREIGN = {b"PAR1": f"it is Parquet: {EXPORT}", b"ARROW1": f"it is Arrow: {EXPORT}",
           b"\xff\xff\xff\xff": f"it is an Arrow stream: {EXPORT}", b"PK\3\4": "it is a zip archive: unpack it"}


# ---------------------------------------------------------------------------------------------------
# One record

def prompt_fields(record):
    """The names of the fields that hold the record's prompt: the first of PROMPTS that is not empty."""
    for name in PROMPTS:
        if record.get(name):
            return (name, "input") if name == "instruction" and record.get("input") else (name,)
    return ()


def unread_fields(record):
    """The names of fields with text that parse_preference does not read."""
    texts = {name for name, value in record.items() if value and isinstance(value, (str, list))}
    return texts - RESPONSES - set(prompt_fields(record))


def message_texts(value):
    """The texts of a string, or of a list of messages, {"role", "content"} or {"from", "value"}. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    messages = value if isinstance(value, list) and value else [None]
    texts = [m.get("content", m.get("value")) if isinstance(m, dict) else None for m in messages]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a response or the prompt is neither a string nor a list of messages")
    return texts


def split_prompt(prompts, responses, newline):
    """
    The prompt and the responses without it, as strings, where each of them is a string or a list of messages. The
    responses may repeat the prompt. Messages are joined by a newline, and so are, where newline says so, the prompt and
    a response that does not repeat it.
    """
    has_messages = not all(isinstance(value, str) for value in (*prompts, *responses))
    prompts = [text for value in prompts for text in message_texts(value)]
    responses = [message_texts(response) for response in responses]
    shared = 0  # messages at the beginning of all responses
    while all(len(texts) > shared + 1 and texts[shared] == responses[0][shared] for texts in responses):
        shared += 1
    leading = responses[0][:shared]
    prompts = [text for text in prompts if text not in leading] + leading
    prompt = "\n".join(prompts)
    responses = ["\n".join(texts[shared:]) for texts in responses]
    if all(response.startswith(prompt) for response in responses):
        responses = [response[len(prompt):] for response in responses]
    elif (newline or has_messages) and not prompt.endswith("\n"):
        prompt += "\n"
    return prompt, responses


def parse_preference(record):
    """
    One record -> the token file it is for, "pairs", "ranked" or "best"; its prompt, "" if it has none; its responses
    without the prompt, best first. Raises ValueError.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is not an object but a {type(record).__name__}: scores or texts alone are no preferences")
    kind, best = "pairs", 0
    if {"story1", "story2", "label"} <= record.keys():  # the paper's authors'
        responses = [record["story1"], record["story2"]]
        if str(record["label"]) not in ("1", "2"):
            raise ValueError(f"its label is {record['label']!r:.20}, not 1 or 2")
        best = int(record["label"]) - 1
    elif {"chosen", "rejected"} <= record.keys():       # TRL's
        responses = [record["chosen"], record["rejected"]]
    elif isinstance(record.get("responses"), list):
        kind, responses = "ranked", list(record["responses"])
        if record.get("best") is not None:
            kind, best = "best", record["best"]
    else:
        raise ValueError("it has neither chosen and rejected, nor responses, nor story1, story2 and label")
    if len(responses) < 2:
        raise ValueError("it has fewer than two responses")
    if type(best) is not int or best not in range(len(responses)):
        raise ValueError(f"its best is {best!r:.20}, not the index of a response")
    for name, value in record.items():
        are_numbers = isinstance(value, list) and value and all(type(x) in (int, float) for x in value)
        if kind == "ranked" and are_numbers:
            raise ValueError(f"its {name} are numbers: order its responses, best first, and leave {name} out")
    names = prompt_fields(record)
    newline = names not in ((), ("prompt",))
    prompt, responses = split_prompt([record[name] for name in names], responses, newline)
    "".join([prompt, *responses]).encode()  # raises UnicodeEncodeError, a ValueError, at half of a surrogate pair
    responses.insert(0, responses.pop(best))
    return kind, prompt, responses


# ---------------------------------------------------------------------------------------------------
# Files

def open_utf8(f):
    """The content of the binary file f as UTF-8, unpacked, after a byte order mark. Raises ValueError."""
    start = f.read(8)
    f.seek(0)
    if start.startswith(b"\x1f\x8b"):
        f = gzip.GzipFile(fileobj=f)
        start = f.read(8)
        f.seek(0)
    for magic, trouble in FOREIGN.items():
        if start.startswith(magic):
            raise ValueError(trouble)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BytesIO(f.read().decode("utf-16").encode())
    if b"\0" in start:
        raise ValueError("it is not text, or UTF-16 without a byte order mark: save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        f.seek(len(codecs.BOM_UTF8))
    return f


def list_records(content):
    """The records in a JSON text: a list, an object of lists, or a single record."""
    if isinstance(content, dict) and not RESPONSES & content.keys():
        lists = [part for part in content.values() if isinstance(part, list)]
        if lists:
            return [record for part in lists for record in part]
    return content if isinstance(content, list) else [content]


def read_items(f):
    """
    Yields "line 3" or "item 3", and the record, of JSON Lines a line at a time, of one JSON text after reading
    all of it. f: a binary file of UTF-8. Raises ValueError.
    """
    start = f.tell()
    lines = (line for line in f if line.strip())
    first, second = next(lines, b""), next(lines, b"")
    f.seek(start)
    try:
        content = json.loads(first)
        is_lines = second != b"" or list_records(content) == [content]
    except ValueError:
        is_lines = False
    if is_lines:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
                yield f"line {number}", record
    elif first.lstrip().startswith((b"{", b"[")):
        for number, record in enumerate(list_records(json.load(f)), 1):
            yield f"item {number}", record
    elif first:
        raise ValueError(f"it is not JSON but text, or CSV: {EXPORT}")


def read_records(files):
    """Yields where it is, "pairs.jsonl, line 3", and the record, of each record in files."""
    for name, open_file in files.items():
        try:
            with open_file() as f:
                for where, record in read_items(open_utf8(f)):
                    yield f"{name}, {where}", record
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{name}, {error}.") from None


def read_rows(files, kind):
    """Yields prompt and responses, best first, of rows of a kind; None: of all rows, the first and last response."""
    for _, record in read_records(files):
        row_kind, prompt, responses = parse_preference(record)
        if kind is None:
            responses = [responses[0], responses[-1]]
        if kind in (None, row_kind) and all(text.strip() for text in responses):
            yield prompt, responses


def import_preferences(source, files):
    """
    The preferences in files, name -> function that opens it -> {"pairs", "ranked", "best" where there are any: an
    iterator over rows (prompt, responses), best first, which reads the files anew, all of which are checked here}.
    Without pairs, these are the first and the last response of each row.
    """
    counts, widths, unread, num_empty = collections.Counter(), {}, set(), 0
    for where, record in read_records(files):
        try:
            kind, _, responses = parse_preference(record)
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from None
        width = widths.setdefault(kind, len(responses))
        if len(responses) != width:
            raise UserError(f"{where}: it has {len(responses)} responses, those before it {width}.")
        unread |= unread_fields(record)
        if all(text.strip() for text in responses):
            counts[kind] += 1
        else:
            num_empty += 1
    if not counts:
        raise UserError(f"{source} holds no preferences ({num_empty} rows with an empty response): give a file of JSON "
                        "Lines or JSON, or a folder of such files.")
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    print(f"{source}: {kinds}; left out, with an empty response: {num_empty}")
    if unread:
        print(f"  fields that are not read: {', '.join(sorted(unread))}")
    rows = {kind: read_rows(files, kind) for kind in ("ranked", "best", "pairs") if kind in counts}
    if "pairs" not in counts:
        print("  pairs are the first and the last response of each row")
        rows["pairs"] = read_rows(files, None)
    return rows  # pairs last: where their file exists, all do


# ---------------------------------------------------------------------------------------------------
# Sources

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
                    files = {member: functools.partial(io.BytesIO, archive.read(member)) for member in members}
            return import_preferences(url, files)
        except (UserError, zipfile.BadZipFile) as error:
            failures.append(str(error))
    raise UserError(f"the released pairs cannot be imported ({' '.join(failures)}): use --source made, or name a "
                    "folder of files that you downloaded.")


def find_files(source):
    """The paths of a file, or of a folder's files of preferences. Raises UserError."""
    if os.path.isdir(source):
        paths = sorted(f"{source}/{name}" for name in os.listdir(source) if name.endswith(ENDINGS))
        if not paths:
            raise UserError(f"{source} holds no file that ends with {', '.join(ENDINGS[:4])}: name a file itself.")
        return paths
    if not os.path.exists(source):
        remedy = "--source takes a file of preferences or a folder of them, made, or released"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(ENDINGS):
            remedy = f"if it is a data set of the Hugging Face hub, {EXPORT}, and give that file"
        raise UserError(f"{source} does not exist: {remedy}.")
    return [source]


def read_preferences(folder):
    """The preferences of folder's source -> as import_preferences; {} where its token files exist, or are not text."""
    source = folder.settings["source"]
    if source in (None, "toy", "made"):
        return {}
    complete = folder.has("pairs.npy", "heldout_pairs.npy", *folder.files)
    if complete and (source == "released" or not os.path.exists(source)):
        return {}
    if source == "released":
        return download_released_pairs()
    paths = find_files(source)
    folder.check_input("source", {os.path.basename(path): file_hash(path) for path in paths})
    if complete:
        return {}
    return import_preferences(source, {path: functools.partial(open, path, "rb") for path in paths})
