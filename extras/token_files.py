"""
Turns rows of text into token files: encodes them, leaves out those that cannot be used, cuts long responses, holds
some rows out, and prints how many. A row is a prompt and n responses, best first; as lists of tokens, BOS is not
among them, and each response has the prompt before it. A token file holds (N, n, T) uint16, as docs/data.md says.
"""
import array
import collections
import hashlib
import os

import numpy as np

from model import BOS, UserError, wrap
from spo import PROMPT_LENGTH

PAIR_FILES = ("pairs.npy", "heldout_pairs.npy")
TOO_LONG = ("prompt too long", "too long", "identical only because of the cut")  # not with a higher limit


def encode_rows(tokenizer, rows):
    """
    Yields rows of (prompt, responses) as lists of tokens instead of text. Each response has its prompt before it and
    is encoded with it: as the model reads it.
    """
    for prompt, responses in rows:
        yield tokenizer.encode(prompt), [tokenizer.encode(prompt + response) for response in responses]


def pad(tokens, lengths, width):
    """The responses in tokens, one after another, lengths (N, n) -> (N, n, width): BOS, response, BOS to the end."""
    rows = np.full((*lengths.shape, width), BOS, np.uint16)
    rows[:, :, 1:][np.arange(width - 1) < lengths[:, :, None]] = tokens
    return rows


def is_held_out(prompt, responses):
    """One row in twenty, by a hash of its prompt, which is so on one side, or else of its responses, sorted."""
    texts = [prompt] if prompt else responses
    texts = sorted(array.array("H", [BOS, *tokens]).tobytes().rstrip(b"\0\1") for tokens in texts)
    return hashlib.sha256(b"".join(texts)).digest()[0] < 256 // 20


def hold_out_some(held_out, prompt_ids):
    """held_out (N,); where all rows are or none is, those of the last prompt alone. Each side has at least one row."""
    if held_out.all() or not held_out.any():
        held_out = prompt_ids == prompt_ids[-1]
    if held_out.all():
        held_out = np.arange(len(held_out)) == len(held_out) - 1
    return held_out


def why_left_out(prompt_length, responses, limit, drop_long, seen):
    """
    Why a row is not used, "" if it is. prompt_length: the tokens that its responses share, BOS included; limit: the
    length that responses are cut to; seen: digests of earlier rows, to which this one's are added.
    """
    cut = [tokens[:limit] for tokens in responses]
    if prompt_length > limit:
        return "prompt too long"
    if drop_long and any(len(tokens) >= limit for tokens in responses):
        return "too long"
    if any(tokens in responses[:i] for i, tokens in enumerate(responses)):
        return "identical"
    if any(tokens in cut[:i] for i, tokens in enumerate(cut)):
        return "identical only because of the cut"
    whole, after = (hashlib.sha256(repr((prompt_length, texts)).encode()).digest() for texts in (responses, cut))
    if whole in seen:
        return "duplicated"
    if after in seen:
        return "identical only because of the cut"
    seen.update((whole, after))
    return ""


def select_rows(rows, limit, drop_long, unk_id, counts, left_out):
    """
    Yields the prompt, its length with BOS, and the responses, cut to limit, of each row that is used. Adds up in
    counts what the rows hold before that, and in left_out how many why_left_out gives each reason for.
    """
    seen = set()
    for prompt, responses in rows:
        counts["rows"] += 1
        for tokens in responses:
            counts["tokens"] += len(tokens)
            counts["unknown"] += tokens.count(unk_id)
            counts["long"] += len(tokens) >= limit
        prompt_length = 1 + len(os.path.commonprefix([prompt, *responses]))  # of lists, here
        reason = why_left_out(prompt_length, responses, limit, drop_long, seen)
        if reason:
            left_out[reason] += 1
        else:
            yield prompt, prompt_length, [tokens[:limit] for tokens in responses]


def report_counts(folder, name, counts, left_out):
    """Prints what select_rows counted. Raises UserError where fewer than two rows are left."""
    limit, drop_long = folder.settings["max_new_tokens"], folder.settings.get("drop_long")
    verb = "over" if drop_long else "cut at"
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    print(f"{name}: {counts['rows']} rows, {counts['long']} responses {verb} {limit} tokens")
    print(wrap(f"  left out: {reasons}", indent="    "))
    unknown = counts["unknown"] / max(1, counts["tokens"])
    print(f"  unknown characters: {unknown:.2%} of the tokens", flush=True)
    if unknown > 0.01:
        print("  The tokenizer lacks these characters: the model reads all of them as <unk>.")
    num_left = counts["rows"] - left_out.total()
    if num_left < 2:
        remedy = "give more preferences, or with --source made more --num_pairs"
        if num_left + sum(left_out[reason] for reason in TOO_LONG) > 1:
            remedy = f"give --max_new_tokens above {limit}, or with --drop_long more rows that fit"
        raise UserError(f"only {num_left} of {counts['rows']} rows are left for {folder.path}/{name}.npy, left out: "
                        f"{reasons}: {remedy}, in another --data.")


def save_preferences(folder, name, rows, unk_id):
    """
    Writes rows to the DataFolder as <name>.npy and heldout_<name>.npy, and where there are prompts their lengths
    (N,) as <name>_prompt_length.npy. Responses are cut at max_new_tokens; with drop_long their rows are left out.
    """
    limit, drop_long = folder.settings["max_new_tokens"], folder.settings.get("drop_long")
    counts, left_out = collections.Counter(), collections.Counter()
    tokens, lengths, prompt_lengths, prompt_ids = (array.array(code) for code in "HHHq")  # compact
    held_out = []
    for prompt, prompt_length, responses in select_rows(rows, limit, drop_long, unk_id, counts, left_out):
        for response in responses:
            tokens.extend(response)
            lengths.append(len(response))
        prompt_lengths.append(prompt_length)
        prompt_ids.append(hash(tuple(prompt)) if prompt else len(prompt_ids))
        held_out.append(is_held_out(prompt, responses))
    report_counts(folder, name, counts, left_out)
    lengths = np.array(lengths).reshape(len(held_out), -1)                          # (N, n)
    width = 1 + min(limit, lengths.max() + 1)  # with the BOS at its beginning, and one at its end unless it was cut
    tokens, prompt_lengths = pad(tokens, lengths, width), np.array(prompt_lengths)
    held_out = hold_out_some(np.array(held_out), np.array(prompt_ids))
    print(f"  {(~held_out).sum()} rows to train on, {held_out.sum()} held out")
    for file, part in ((name, ~held_out), (f"heldout_{name}", held_out)):
        if prompt_lengths.max() > 1:
            folder.save_tokens(f"{file}{PROMPT_LENGTH}", prompt_lengths[part])
        folder.save_tokens(f"{file}.npy", tokens[part])  # after it: where it exists, both are complete
