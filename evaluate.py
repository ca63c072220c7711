"""
Stories as tokens and as text, and what they are worth: the judge, and the win-rate it gives a model
against its reference.
"""
import json
import os
from collections.abc import Iterable

import torch

import toyworld
from model import ModelArgs, UserError


def load_tokenizer(path: str, vocab_size: int):
    """The sentencepiece model at path, which must be the one of a checkpoint with vocab_size tokens."""
    import sentencepiece  # here, and numpy below: spo's losses are to be imported with nothing but torch
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: name the checkpoint's own tokenizer with --tokenizer.")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.Load(path)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a sentencepiece model: name the checkpoint's own.") from None
    if tokenizer.vocab_size() != vocab_size:
        raise UserError(f"{path} has {tokenizer.vocab_size()} tokens but the checkpoint {vocab_size}: "
                        "name the checkpoint's own tokenizer with --tokenizer.")
    return tokenizer


def load_tokens(path: str, args: ModelArgs, responses: Iterable[int], rows: int):
    """
    A token file for a model with these args: uint16 (N, n, T), at least so many rows of one of these
    numbers of responses, best first; each BOS, a story, BOS to the end.
    """
    import numpy as np
    try:
        data = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: `make data` makes the toy world's.") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is not a token file ({str(e)[:80]}): make it with `make data`.") from None
    if not isinstance(data, np.ndarray) or data.dtype != np.uint16 or data.ndim != 3 or data.size == 0:
        raise UserError(f"{path} is not a token file: make it with `make data`.")
    if data.max() >= args.vocab_size or not 2 <= data.shape[2] <= args.max_seq_len + 1:
        raise UserError(f"{path} holds tokens or lengths this model does not have: make it with `make data`.")
    if data.shape[1] not in responses:
        raise UserError(f"{path} has {data.shape[1]} responses a row, which does not suit the loss.")
    if len(data) < rows:
        raise UserError(f"{path} has {len(data)} rows, fewer than --batch {rows}: make it larger, or batch smaller.")
    return data


def expert(stories: list[str]) -> torch.Tensor:
    """The toy world's judge: its known reward r of each story, (N,)."""
    return torch.tensor([toyworld.reward(story) for story in stories])


def win_rate(r: torch.Tensor, r_ref: torch.Tensor) -> tuple[float, float]:
    """
    E[sigmoid(r(y) - r(y_ref))] over every y with reward in r (N,) against every y_ref with reward in
    r_ref (M,): the chance, without label noise, that the expert prefers the model's story to the
    reference's (Eq. 2). With its standard error, both samples counted.
    """
    wins = torch.sigmoid(r[:, None] - r_ref)  # (N, M)
    variance = wins.mean(1).var() / len(r) + wins.mean(0).var() / len(r_ref)
    return wins.mean().item(), variance.sqrt().item()


def read_log(out: str) -> list[dict]:
    """The records of the run in folder out: each has a step, and the loss or an evaluation after it."""
    try:
        with open(f"{out}/log.jsonl") as f:
            return [json.loads(line) for line in f if line.endswith("\n")]  # a killed run leaves half a line
    except (OSError, ValueError) as e:
        raise UserError(f"{out}/log.jsonl cannot be read ({e}).") from None


def peak(out: str) -> dict:
    """The evaluation with the highest win-rate."""
    return max((r for r in read_log(out) if "win" in r), key=lambda r: r["win"])
