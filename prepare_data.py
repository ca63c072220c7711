"""
Everything that puts files under data/.

    python prepare_data.py toy          # the embedded world: its writer, and preferences over its stories
    python prepare_data.py tokenizer    # tokenizer.model, which is committed

Each step is skipped when its output is there and was made from the same settings and inputs.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

import spo
import toyworld
from evaluate import expert, load_tokenizer
from model import BOS, ModelArgs, Transformer, UserError, cli, load, save

# The toy world's writer: 189,632 parameters, and a pre-training that takes it to the grammar's entropy.
VOCAB = 640
WRITER = dict(dim=64, n_layers=3, n_heads=4, multiple_of=4, max_seq_len=128, vocab_size=VOCAB)
SFT = "--batch 32 --lr 5e-3 --log_every 100 --eval_every 250"
PAIRS, RANKED, REF = range(100, 103)  # what stories are sampled for: keys of spo.rng


def train_tokenizer(path: str) -> None:
    """The toy world's BPE, learned from its own stories; without byte fallback, most words are one piece."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(toyworld.write_story(rng) for _ in range(20_000)), model_type="bpe",
            vocab_size=VOCAB, character_coverage=1.0, normalization_rule_name="identity",
            model_prefix=f"{folder}/toy", minloglevel=2)
        shutil.copy(f"{folder}/toy.model", f"{path}.part")
    os.replace(f"{path}.part", path)


def make(path: str, maker, inputs: list[str], **settings) -> None:
    """Has maker(path, **settings) make path, unless the same settings and inputs made it, as path.json notes."""
    note = dict(settings)
    for file in inputs:
        with open(file, "rb") as f:
            note[os.path.basename(file)] = hashlib.sha256(f.read()).hexdigest()
    if os.path.exists(path) and os.path.exists(f"{path}.json"):
        with open(f"{path}.json") as f:
            if f.read() == json.dumps(note, indent=1):
                return
        os.remove(f"{path}.json")  # from here on, until path is made, it is nobody's
    print(f"making {path}", flush=True)
    maker(path, **settings)
    with open(f"{path}.json.part", "w") as f:
        f.write(json.dumps(note, indent=1))
    os.replace(f"{path}.json.part", f"{path}.json")


def write_tokens(path: str, tokens: torch.Tensor) -> None:
    """tokens (N, n, T) as a token file, the form that load_tokens reads."""
    with open(f"{path}.part", "wb") as f:
        np.save(f, tokens.numpy().astype(np.uint16))
    os.replace(f"{path}.part", path)


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """Tokens (.., T_i) of several lengths, filled up with BOS and joined: (sum .., T)."""
    length = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, (0, length - row.shape[-1]), value=BOS) for row in rows])


def sample_stories(model, n: int, s, purpose: int) -> torch.Tensor:
    """n stories of the model, in batches -> tokens (n, T)."""
    return pad([spo.sample(model, min(500, n - i), s, (purpose, i)).cpu() for i in range(0, n, 500)])


def rank(stories: torch.Tensor, r: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    stories (N, n, T) with rewards r (N, n), each row in an order drawn from Eq. 3 (for n = 2, Eq. 2; the
    first of it is Section 5's best of n): that of r plus Gumbel noise.
    """
    gumbel = -torch.rand(r.shape, generator=generator).log().neg().log()
    order = (r + gumbel).argsort(1, descending=True)
    return stories.gather(1, order[:, :, None].expand_as(stories))


def toy(a) -> None:
    """The embedded world: the grammar's stories, the writer they train, its stories as the expert ranks them."""
    os.makedirs(a.data, exist_ok=True)
    tokenizer = load_tokenizer(a.tokenizer, VOCAB)
    s = spo.get_args([*f"--algo sft --seed {a.seed} --steps {a.sft_steps} {SFT}".split(), "--data", a.data,
                      "--init", f"{a.data}/init.pt", "--out", f"{a.data}/sft", "--tokenizer", a.tokenizer])

    def write(path, n, seed):
        rng = random.Random(seed)
        stories = tokenizer.encode([toyworld.write_story(rng) for _ in range(n)])
        write_tokens(path, pad([torch.tensor([[[BOS, *story, BOS]]]) for story in stories]))

    def pretrain(path, seed, steps, flags, **args):
        torch.manual_seed(seed)
        save(Transformer(ModelArgs(**args)), s.init)
        shutil.rmtree(s.out, ignore_errors=True)  # it takes a minute: an interrupted one begins anew
        if spo.train(s) < steps:
            raise KeyboardInterrupt
        save(load(f"{s.out}/ckpt.pt"), path)

    def collect(path, rows, n, seed, purpose):
        stories = sample_stories(load(f"{a.data}/sft.pt", s.device), rows * n, s, purpose)
        r = expert(tokenizer.decode(stories.tolist())).view(rows, n)
        write_tokens(path, rank(stories.view(rows, n, -1), r, spo.rng(seed, purpose)))

    world = [a.tokenizer, toyworld.__file__]
    make(f"{a.data}/stories.npy", write, world, n=a.stories, seed=2 * a.seed)
    make(f"{a.data}/heldout.npy", write, world, n=1000, seed=2 * a.seed + 1)
    make(f"{a.data}/sft.pt", pretrain, [f"{a.data}/stories.npy"], seed=a.seed, steps=a.sft_steps,
         flags=SFT, **WRITER)
    for name, rows, n, purpose in (("pairs", a.pairs, 2, PAIRS), ("ranked", a.pairs // 2, 4, RANKED),
                                   ("ref", a.ref, 1, REF)):
        make(f"{a.data}/{name}.npy", collect, [f"{a.data}/sft.pt", *world], rows=rows, n=n, seed=a.seed,
             purpose=purpose)
    print(f"{a.data} is ready; a perfect writer would have {toyworld.entropy():.2f} nats a story")


def main(argv=None) -> None:
    def error(message):
        raise UserError(f"{message} (see python prepare_data.py --help).")

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("toy", "tokenizer"))
    p.add_argument("--data", default="data/toy", help="folder the files go to")
    p.add_argument("--tokenizer", default="tokenizer.model")
    p.add_argument("--seed", type=int, default=0, help="of the stories, the training and the sampling")
    p.add_argument("--stories", type=int, default=20_000, help="stories of the grammar to learn from")
    p.add_argument("--sft_steps", type=int, default=1000, help="steps of pre-training")
    p.add_argument("--pairs", type=int, default=4000, help="pairs; half as many rows of four ranked stories")
    p.add_argument("--ref", type=int, default=2000, help="stories of the writer, to compare with and for SLiC-HF")
    p.error = error
    a = p.parse_args(argv)
    for name in ("stories", "sft_steps", "pairs", "ref"):
        if getattr(a, name) < 2:
            error(f"--{name} is {getattr(a, name)}: it must be 2 or more")
    try:
        train_tokenizer(a.tokenizer) if a.what == "tokenizer" else toy(a)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be written or read ({e.strerror}).") from None


if __name__ == "__main__":
    cli(main)
