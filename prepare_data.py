"""
Everything that puts files under data/.

    python prepare_data.py toy          # the embedded world: its writer, and preferences over its stories
    python prepare_data.py stories15M   # a published checkpoint and its tokenizer, fetched and checked
    python prepare_data.py tokenizer    # tokenizer.model, which is committed

Each step is skipped when its output is there and was made from the same settings and inputs.
"""
import argparse
import hashlib
import http.client
import io
import json
import os
import random
import shutil
import time
import urllib.error
import urllib.request

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
PAIRS, RANKED, REF, HELDOUT = range(100, 104)  # what stories are sampled for: keys of spo.rng


def train_tokenizer(path: str) -> None:
    """The toy world's BPE, learned from its own stories; without byte fallback, most words are one piece."""
    rng, learned = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(toyworld.write_story(rng) for _ in range(20_000)), model_writer=learned,
        model_type="bpe", vocab_size=VOCAB, character_coverage=1.0, normalization_rule_name="identity",
        minloglevel=2)
    with open(f"{path}.part", "wb") as f:
        f.write(learned.getvalue())
    os.replace(f"{path}.part", path)


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make(path: str, maker, inputs: list[str], **settings) -> None:
    """Has maker(path, **settings) make path, unless the same settings and inputs made it, as path.json notes."""
    note = settings | {os.path.basename(file): sha256(file) for file in inputs}
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
    s = spo.get_args([*f"--algo sft --model {a.what} --seed {a.seed} --steps {a.sft_steps} {SFT}".split(), "--data", a.data,
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
        taste = "naive" if s.judge == "naive" else "limited"
        r = expert(tokenizer.decode(stories.tolist()), taste).view(rows, n)
        write_tokens(path, rank(stories.view(rows, n, -1), r, spo.rng(seed, purpose)))

    world = [a.tokenizer, toyworld.__file__]
    make(f"{a.data}/stories.npy", write, world, n=a.stories, seed=2 * a.seed)
    make(f"{a.data}/heldout.npy", write, world, n=1000, seed=2 * a.seed + 1)
    make(f"{a.data}/sft.pt", pretrain, [f"{a.data}/stories.npy"], seed=a.seed, steps=a.sft_steps,
         flags=SFT, **WRITER)
    for name, rows, n, purpose in (("pairs", a.pairs, 2, PAIRS), ("heldout_pairs", a.pairs // 8, 2, HELDOUT),
                                   ("ranked", a.pairs // 2, 4, RANKED), ("ref", a.ref, 1, REF)):
        make(f"{a.data}/{name}.npy", collect, [f"{a.data}/sft.pt", *world], rows=rows, n=n, seed=a.seed,
             purpose=purpose)
    make(f"{a.data}/best.npy", lambda path: shutil.copyfile(f"{a.data}/ranked.npy", path), [f"{a.data}/ranked.npy"])
    print(f"{a.data} is ready; a perfect writer would have {toyworld.entropy():.2f} nats a story")


# ---------------------------------------------------------------------------------------------------
# Published checkpoints, each with its own tokenizer. HF_ENDPOINT and LLAMA2C_ENDPOINT put a mirror in the
# place of the two hosts.

HF = "{HF_ENDPOINT}/karpathy/tinyllamas/resolve"
ENDPOINTS = dict(HF_ENDPOINT="https://huggingface.co", LLAMA2C_ENDPOINT="https://raw.githubusercontent.com")
LLAMA2 = ("{LLAMA2C_ENDPOINT}/karpathy/llama2.c/350e04fe35433e6d2941dce5a1f53308f87058eb/tokenizer.model", 499_723,
          "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347")
# model: address, bytes (0: not known) and sha256 of its checkpoint, and of its tokenizer. The revision that
# the paper cites, 5c22d0a, has no stories110M.pt.
PUBLISHED = {
    "stories260K": ((f"{HF}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/stories260K.pt", 0,
                     "eec953f9d0f139e894ef8996302680e64b24813c7a98425424f5c85f7cf4abb1"),
                    (f"{HF}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/tok512.model", 0,
                     "dfff07d929db979913f166ec94a6f5ecad4c70cfed8eb5c9cbe7e464455e46f5")),
    "stories15M": ((f"{HF}/32cc2486abd3c2100a6fcf0ef68a7ee3842407b7/stories15M.pt", 60_789_090,
                    "3da00c0fef684f3f83b457736837c46ab55e92a26662b61d6104de2d271c708d"), LLAMA2),
    "stories42M": ((f"{HF}/58e1696980dcbdf80b2dfe876819104a174f5e78/stories42M.pt", 166_787_298,
                    "fbe124df8794c2e033432c22b59cff64485455b4644046c52a456d0bbd8859fe"), LLAMA2),
    "stories110M": ((f"{HF}/302d182797471b93cb4d6af3608e501efeeda0c2/stories110M.pt", 438_163_693,
                     "cdef30b5108d1b5d1c232fcf7e2ea433cc6cdc473aa876af9d8d6ce83bf4b5e0"), LLAMA2),
}
TRIES, PAUSE, TIMEOUT = 5, 2.0, 30.0  # of a fetch; seconds before the second try, doubled after each; of silence


def fetch(url: str, size: int, digest: str, path: str) -> None:
    """
    Fetches url to path unless the right file is there: to path.part, taken up again after a cut, and moved
    into place only when its size and sha256 are right.
    """
    if os.path.exists(path) and sha256(path) == digest:
        print(f"{path} is there")
        return
    part, wait = f"{path}.part", PAUSE
    for left in reversed(range(TRIES)):
        try:
            download(url, part)
            break
        except urllib.error.HTTPError as e:
            trouble, after = f"it answers {e.code} {e.reason}", e.headers.get("Retry-After", "")
            passing = e.code in (416, 425, 429) or e.code >= 500
            if e.code == 416:  # nothing is left to send: what is here is too long, or was never checked
                forget(part)
        except (OSError, http.client.HTTPException) as e:  # no connection, silence, a cut in mid-body
            trouble, after, passing = str(getattr(e, "reason", e)) or type(e).__name__, "", True
        if not passing or not left:
            raise UserError(f"{url} cannot be fetched ({trouble}): try later, or name a mirror in HF_ENDPOINT or "
                            "LLAMA2C_ENDPOINT.")
        pause = min(float(after), 60.0) if after.isdigit() else wait
        print(f"{url}: {trouble}; again in {pause:.0f} s", flush=True)
        time.sleep(pause)
        wait *= 2
    got, length = sha256(part), os.path.getsize(part)
    if got != digest or length != (size or length):
        with open(part, "rb") as f:
            page = ", a web page" if f.read(512).lstrip()[:1] == b"<" else ""
        forget(part)
        raise UserError(f"{url} gave {length} bytes with sha256 {got[:8]}..{page}, not {size or 'those'} with "
                        f"{digest[:8]}..: nothing was kept; try later or name a mirror.")
    os.replace(part, path)
    forget(part)


def forget(part: str) -> None:
    for file in (f"{part}.etag", part):
        if os.path.exists(file):
            os.remove(file)


def download(url: str, part: str) -> None:
    """Writes the body of url to part; goes on where an earlier one was cut while the entity tag is the same."""
    tag, headers = f"{part}.etag", {"User-Agent": "spo"}
    if os.path.exists(part) and os.path.exists(tag):
        with open(tag) as f:
            headers |= {"Range": f"bytes={os.path.getsize(part)}-", "If-Range": f.read()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        going_on = response.status == 206
        have = first = os.path.getsize(part) if going_on else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        began = shown = time.monotonic()
        if not going_on:
            forget(part)
            etag = response.headers.get("ETag", "W/")
            if not etag.startswith("W/"):  # a weak tag does not promise the same bytes
                with open(tag, "w") as f:
                    f.write(etag)
        with open(part, "ab") as f:
            while block := response.read(1 << 18):
                f.write(block)
                have, now = have + len(block), time.monotonic()
                if now - shown > 1:
                    rate, shown = (have - first) / (now - began), now
                    print(f"\r{os.path.basename(part)[:-5]} {have >> 20} of {total >> 20} MiB, "
                          f"{rate / 2**20:.1f} MiB/s, {max(0, total - have) / rate:.0f} s left ", end="", flush=True)
        if shown > began:
            print()
    if have < total:
        raise OSError(f"cut after {have} of {total} bytes")


def published(a) -> None:
    """A checkpoint of the TinyStories models as data/<model>/sft.pt, and its tokenizer beside it."""
    os.makedirs(a.data, exist_ok=True)
    endpoints = {name: os.environ.get(name, host).rstrip("/") for name, host in ENDPOINTS.items()}
    for (url, size, digest), name in zip(PUBLISHED[a.what], ("sft.pt", "tokenizer.model")):
        fetch(url.format(**endpoints), size, digest, f"{a.data}/{name}")
    args = load(f"{a.data}/sft.pt").args
    load_tokenizer(f"{a.data}/tokenizer.model", args.vocab_size)
    print(f"{a.data} is ready: {args}")


def main(argv=None) -> None:
    def error(message):
        raise UserError(f"{message} (see python prepare_data.py --help).")

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("toy", "toy-naive", *PUBLISHED, "tokenizer"))
    p.add_argument("--data", help="folder the files go to; default data/<what>")
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
    a.data = a.data or f"data/{a.what}"
    try:
        if a.what == "tokenizer":
            train_tokenizer(a.tokenizer)
        else:
            toy(a) if a.what.startswith("toy") else published(a)
    except OSError as e:
        raise UserError(f"{e.filename or a.data} cannot be written or read ({e.strerror}).") from None


if __name__ == "__main__":
    cli(main)
