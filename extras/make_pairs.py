"""
Preference pairs by Appendix E.1's protocol: pairs of the model's own samples, judged in both orders, then filtered.
`python prepare_data.py MODEL --source made` calls it; --judge names the judge.
"""
import collections
import json
import os
from functools import partial

import numpy as np

from extras import toyworld
from extras.judge import load_readability
from extras.llm_judge import consistent_choice, judge_pairs
from model import BOS, atomic_write, load


def score_verdicts(pair, score):
    """The function score as a judge of two stories -> verdict, verdict on the pair swapped."""
    a, b = map(score, pair)
    return (a, b, 1 if a > b else 2), (b, a, 1 if b > a else 2)


def apply_filter(verdict, swapped):
    """
    E.1's filter on the verdicts of both orders -> the better story of the pair, 0 or 1, or why the pair is dropped:
    "invalid", "inconsistent" or "too close".
    """
    if verdict is None or swapped is None:
        return "invalid"
    choice = consistent_choice(verdict, swapped)
    if choice is None:
        return "inconsistent"
    for score_1, score_2, better in (verdict, swapped):
        lead = score_1 - score_2 if better == 1 else score_2 - score_1
        if lead < (2 if better == 1 else 3):  # a judge favours the story it is shown second: that one needs 3 points
            return "too close"
    return choice


def make_pairs(folder, tokenizer):
    """
    Judges and filters the pairs of samples in the DataFolder's made.npy (N, 2, T) -> rows of two lists of tokens, the
    better one first. Writes what was decided of each pair that is kept to made.jsonl, which can be imported again.
    """
    y = np.load(f"{folder.path}/made.npy").astype(int)
    texts = [tokenizer.decode(pair.tolist()) for pair in y]
    judge = folder.settings["judge"]
    if judge == "llm":
        verdicts = judge_pairs(texts, f"{folder.path}/verdicts.jsonl")  # where they are kept, and not asked for again
        judge = os.environ["JUDGE_MODEL"].strip()
    elif judge == "readability":
        model_args = load(f"{folder.path}/sft.pt").args
        readability = load_readability(f"{folder.path}/ref.npy", model_args, tokenizer)
        verdicts = [score_verdicts(pair, readability.score) for pair in texts]
    else:
        taste = toyworld.TASTES[judge]
        verdicts = [score_verdicts(pair, partial(toyworld.score, taste=taste)) for pair in texts]
    rows, records, counts = [], [], collections.Counter()
    for i, (verdict, swapped) in enumerate(verdicts):
        better = apply_filter(verdict, swapped)
        counts[better] += 1
        if better in (0, 1):
            worse = 1 - better
            rows.append([[token for token in y[i, k].tolist() if token != BOS] for k in (better, worse)])
            records.append(dict(prompt="", chosen=texts[i][better], rejected=texts[i][worse], pair=i, better=better,
                                verdicts=[verdict, swapped], judge=judge))
    print(f"{len(texts)} pairs judged by {judge} in both orders: {len(rows)} kept")
    print(f"  {counts['inconsistent']} inconsistent, {counts['too close']} too close, {counts['invalid']} invalid")
    with folder.new_file("made.jsonl") as path, atomic_write(path) as f:
        f.write("".join(json.dumps(record) + "\n" for record in records).encode())
    return rows
