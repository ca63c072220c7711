"""
Preference pairs by Appendix E.1's protocol: pairs of the model's own samples, judged in both orders, then filtered.
`python prepare_data.py MODEL --source made` calls it; --judge names the judge.
"""
import collections
import json
import os

import numpy as np

from extras import toyworld
from extras.llm_judge import consistent_choice, judge_pairs
from model import BOS, UserError, atomic_write


def toy_verdict(story_1, story_2, taste):
    """The toy world's expert as a judge -> (score of story 1, score of story 2, better story: 1 or 2)."""
    score_1, score_2 = toyworld.score(story_1, taste), toyworld.score(story_2, taste)
    return score_1, score_2, 1 if score_1 > score_2 else 2


def get_verdicts(pairs, judge, path):
    """
    The verdicts of judge, "toy", "toy-naive" or "llm", on pairs [(story_1, story_2)] -> [(verdict, verdict on the
    pair swapped)]; an invalid one is None. The llm's are kept in the file path, and not asked for again.
    """
    if judge == "llm":
        return judge_pairs(pairs, path)
    taste = toyworld.TASTES[judge]
    return [(toy_verdict(a, b, taste), toy_verdict(b, a, taste)) for a, b in pairs]


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
    verdicts = get_verdicts(texts, judge, f"{folder.path}/verdicts.jsonl")
    judge = os.environ["JUDGE_MODEL"].strip() if judge == "llm" else judge
    rows, records, counts = [], [], collections.Counter()
    for i, (verdict, swapped) in enumerate(verdicts):
        better = apply_filter(verdict, swapped)
        counts[better] += 1
        if better in (0, 1):
            worse = 1 - better
            rows.append([[token for token in y[i, k].tolist() if token != BOS] for k in (better, worse)])
            records.append(dict(prompt="", chosen=texts[i][better], rejected=texts[i][worse], pair=i, better=better,
                                verdicts=[verdict, swapped], judge=judge))
    print(f"{len(texts)} pairs judged by {judge} in both orders")
    print(f"  {counts['inconsistent']} inconsistent, {counts['too close']} too close, {counts['invalid']} invalid")
    print(f"  {len(rows)} kept; the first sample is the better one in {counts[0]}")
    if not rows:
        raise UserError(f"no pair is left for {folder.path}/pairs.npy: judge more pairs, in a folder of their own "
                        "(--num_pairs, --data), or with another judge.")
    if not folder.has("made.jsonl"):
        with folder.new_file("made.jsonl") as path, atomic_write(path) as f:
            for record in records:
                f.write(json.dumps(record).encode() + b"\n")
    return rows
