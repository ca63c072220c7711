"""
Everything that puts files under data/.

    python prepare_data.py toy          # the embedded world: its writer, and preferences over its stories
    python prepare_data.py stories15M   # a published checkpoint and its tokenizer, fetched and checked
    python prepare_data.py stories15M --source made          # and pairs of its stories, judged and filtered
    python prepare_data.py stories15M --source pairs.jsonl   # or pairs of your own, or --source released
    python prepare_data.py tokenizer    # tokenizer.model, which is committed

Each step is skipped when its output is there and was made from the same settings and inputs.
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

import spo
import toyworld
from evaluate import (JUDGES, TASTES, TIMEOUT, body_of, expert, judge_pairs, load_tokenizer, load_tokens,
                      patiently, preferred)
from model import BOS, ModelArgs, Transformer, UserError, cli, load, save, writing
from run import Parser, sha256, write_whole

# The toy world's writer: 189,632 parameters, and a pre-training that takes it to the grammar's entropy.
VOCAB = 640
WRITER = dict(dim=64, n_layers=3, n_heads=4, multiple_of=4, max_seq_len=128, vocab_size=VOCAB)
SFT = "--batch 32 --micro 16 --lr 5e-3 --log_every 100 --eval_every 250"
PAIRS, RANKED, REF, HELDOUT, MADE = range(100, 105)  # what stories are sampled for: keys of spo.rng


def train_tokenizer(path: str) -> None:
    """The toy world's BPE, learned from its own stories; without byte fallback, most words are one piece."""
    rng, learned = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(toyworld.write_story(rng) for _ in range(20_000)), model_writer=learned,
        model_type="bpe", vocab_size=VOCAB, character_coverage=1.0, normalization_rule_name="identity",
        minloglevel=2)
    write_whole(path, learned.getvalue())


def make(path: str, maker, inputs: list[str], **settings) -> None:
    """Has maker(path, **settings) make path, unless path.json says the same settings and inputs made it."""
    note, made_from = settings | {os.path.basename(file): sha256(file) for file in inputs}, read_note(path)
    if os.path.exists(path) and made_from == note:
        return
    if os.path.exists(path) and "source" in made_from:
        print(f"{path} is from {made_from['source']}, and stays: remove it to have the toy world's own")
        return
    print(f"making {path}", flush=True)
    write_note(path, {})  # until path is made, it is nobody's
    maker(path, **settings)
    write_note(path, note)


def write_note(path: str, note: dict) -> None:
    write_whole(f"{path}.json", json.dumps(note, indent=1))


def read_note(path: str) -> dict:
    """What write_note wrote; empty where there is none."""
    try:
        with open(f"{path}.json") as f:
            return dict(json.load(f))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def write_tokens(path: str, tokens) -> None:
    """tokens (N, n, T) as a token file, the form that load_tokens reads."""
    with writing(path) as f:
        np.save(f, np.asarray(tokens).astype(np.uint16))


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """Tokens (.., T_i) of several lengths, filled up with BOS and joined: (sum .., T)."""
    length = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, (0, length - row.shape[-1]), value=BOS) for row in rows])


def stories_of(writer: str, rows: int, n: int, s, purpose: int) -> torch.Tensor:
    """Rows of n stories of the checkpoint writer -> tokens (rows, n, T)."""
    return spo.sample(load(writer, s.device), rows * n, s, (purpose,)).cpu().view(rows, n, -1)


def rank(stories: torch.Tensor, r: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    stories (N, n, T) with rewards r (N, n), each row in an order drawn from Eq. 3 (for n = 2, Eq. 2; the
    first of it is Section 5's best of n): that of r plus Gumbel noise.
    """
    gumbel = -torch.rand(r.shape, generator=generator).log().neg().log()
    order = (r + gumbel).argsort(1, descending=True)
    return stories.gather(1, order[:, :, None].expand_as(stories))


def toy(a) -> None:
    """The embedded world: the grammar's stories, the writer they train, its stories as an expert ranks them."""
    tokenizer = load_tokenizer(a.tokenizer, VOCAB)
    s = spo.get_args([*f"--algo sft --model {a.what} --seed {a.seed} --steps {a.sft_steps} {SFT}".split(),
                      "--data", a.data, "--init", f"{a.data}/init.pt", "--out", f"{a.data}/sft",
                      "--tokenizer", a.tokenizer])

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

    def collect(path, rows, n, seed, purpose, taste):
        stories = stories_of(f"{a.data}/sft.pt", rows, n, s, purpose)
        r = expert(tokenizer.decode(stories.flatten(0, 1).tolist()), taste).view(rows, n)
        write_tokens(path, rank(stories, r, spo.rng(seed, purpose)))

    world = [a.tokenizer, toyworld.__file__]
    make(f"{a.data}/stories.npy", write, world, n=a.stories, seed=2 * a.seed)
    make(f"{a.data}/heldout.npy", write, world, n=1000, seed=2 * a.seed + 1)
    make(f"{a.data}/sft.pt", pretrain, [f"{a.data}/stories.npy"], seed=a.seed, steps=a.sft_steps,
         flags=SFT, **WRITER)
    wanted = [("ranked", a.pairs // 2, 4, RANKED), ("ref", a.ref, 1, REF)]
    if not a.source:
        wanted += [("pairs", a.pairs, 2, PAIRS), ("heldout_pairs", max(1, a.pairs // 8), 2, HELDOUT)]
    for name, rows, n, purpose in wanted:
        make(f"{a.data}/{name}.npy", collect, [f"{a.data}/sft.pt", *world], rows=rows, n=n, seed=a.seed,
             purpose=purpose, taste=TASTES[s.judge])
    ranked = f"{a.data}/ranked.npy"
    make(f"{a.data}/best.npy", lambda path: shutil.copyfile(ranked, path), [ranked])
    print(f"{a.data} is ready; a perfect writer would have {toyworld.entropy():.2f} nats a story")


# ---------------------------------------------------------------------------------------------------
# Published checkpoints, each with its own tokenizer. The environment can put a mirror in a host's place.

HF = "{HF_ENDPOINT}/karpathy/tinyllamas/resolve"
ENDPOINTS = dict(HF_ENDPOINT="https://huggingface.co", LLAMA2C_ENDPOINT="https://raw.githubusercontent.com",
                 RELEASE_ENDPOINT="https://anonymous.4open.science")
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


def fetch(url: str, size: int, digest: str, path: str) -> None:
    """
    Fetches url to path unless it is there: to path.part, taken up again after a cut, and moved into place
    only when its size and sha256 are right. Another file that is there is not replaced.
    """
    if os.path.exists(path):
        if (there := sha256(path)) != digest:
            raise UserError(f"{path} is not the published one (sha256 {there[:8]}.., not {digest[:8]}..): move "
                            "it away, or name another folder.")
        print(f"{path} is there")
        return
    part = f"{path}.part"
    patiently(url, lambda: download(url, part, size or 1 << 26),
              {None: "try later, or name a mirror in " + " or ".join(ENDPOINTS)})
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


def download(url: str, part: str, most: int) -> None:
    """
    Writes the body of url, at most so many bytes, to part; goes on where an earlier one was cut while the
    entity tag is the same.
    """
    tag, headers = f"{part}.etag", {"User-Agent": "spo"}
    if os.path.exists(part) and os.path.exists(tag):
        with open(tag) as f:
            headers |= {"Range": f"bytes={os.path.getsize(part)}-", "If-Range": f.read()}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing is left to send: what is here is too long, or was never checked
            forget(part)
        raise
    with response:
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
            while have <= most and (block := response.read(1 << 18)):
                f.write(block)
                have, now = have + len(block), time.monotonic()
                if now - shown > 1:
                    rate, shown = (have - first) / (now - began), now
                    print(f"\r{os.path.basename(part)[:-5]} {have >> 20} of {total >> 20} MiB, "
                          f"{rate / 2**20:.1f} MiB/s, {max(0, total - have) / rate:.0f} s left ",
                          end="", flush=True)
        if shown > began:
            print()
    if have < min(total, most):
        raise OSError(f"cut after {have} of {total} bytes")


def endpoints() -> dict:
    return {name: (os.environ.get(name) or host).rstrip("/") for name, host in ENDPOINTS.items()}


def published(a) -> None:
    """A checkpoint of the TinyStories models as data/<model>/sft.pt, and its tokenizer beside it."""
    for (url, size, digest), name in zip(PUBLISHED[a.what], ("sft.pt", "tokenizer.model")):
        fetch(url.format(**endpoints()), size, digest, f"{a.data}/{name}")
    args = load(f"{a.data}/sft.pt").args
    load_tokenizer(f"{a.data}/tokenizer.model", args.vocab_size)
    print(f"{a.data} is ready: {args}")


# ---------------------------------------------------------------------------------------------------
# Pairs from elsewhere: made by E.1's protocol, of a file, or the paper's release. All end in token files:
# pairs.npy, ranked.npy or best.npy, best first, and their held-out rows in heldout_<that>.npy.

def held_out(row: np.ndarray) -> bool:
    """The fixed rule: one row in twenty, by a hash of its stories in whatever order, however padded."""
    stories = sorted(story.tobytes().rstrip(b"\0\1") for story in row)
    return hashlib.sha256(b"".join(stories)).digest()[0] < 256 // 20


def write_rows(a, name: str, rows: np.ndarray) -> None:
    """Rows (N, n, T), best first, as token files; without copies of a row and rows of twice the same story."""
    different = np.array([row for row in rows if len({story.tobytes() for story in row}) == len(row)])
    kept = np.array(list({row.tobytes(): row for row in different}.values()))
    if len(kept) < 2:
        raise UserError(f"only {len(kept)} different rows for {name}.npy are left: give more.")
    out, length = np.array([held_out(row) for row in kept]), (kept != BOS).sum(2)
    out[-1] |= not out.any()
    print(f"{name}: {len(rows)} rows; {len(rows) - len(different)} with the same story twice and "
          f"{len(different) - len(kept)} duplicates dropped\n  {(~out).sum()} to train on, {out.sum()} held out; "
          f"{(kept[:, :, -1] != BOS).sum()} stories cut at {rows.shape[2] - 1} tokens\n  mean length of the best "
          f"{length[:, 0].mean():.0f}, of the last {length[:, -1].mean():.0f}; the best is longer in "
          f"{(length[:, 0] > length[:, -1]).mean():.0%}")
    for file, part in ((name, kept[~out]), (f"heldout_{name}", kept[out])):
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{a.data}/{file}.npy.json")  # until both are there, they are nobody's
        write_tokens(f"{a.data}/{file}.npy", part)
        write_note(f"{a.data}/{file}.npy", dict(source=a.source))


def rows_from(item) -> tuple[str, int | None, list[str]]:
    """
    One line of a file -> which token file it is for, the position of the best as it was shown if that is
    known, and the stories, best first. A prompt is the beginning of each story: it cancels in the losses.
    """
    if not isinstance(item, dict):
        raise ValueError("it is not an object")
    if {"story1", "story2", "label"} <= item.keys():  # the paper's authors'
        if item["label"] not in (1, 2, "1", "2") or item["label"] is True:
            raise ValueError(f"its label is {item['label']!r:.20}, not 1 or 2")
        best = int(item["label"]) - 1
        name, stories = "pairs", [item["story1"], item["story2"]][::-1 if best else 1]
    elif {"chosen", "rejected"} <= item.keys():       # TRL's
        name, best, stories = "pairs", None, [item["chosen"], item["rejected"]]
    elif isinstance(item.get("responses"), list):
        name, best, stories = "ranked", item.get("best"), list(item["responses"])
        if len(stories) < 2:
            raise ValueError("it has fewer than two responses")
        if best is not None:
            if type(best) is not int or not 0 <= best < len(stories):
                raise ValueError(f"its best is {best!r:.20}, not the index of a response")
            name = "best"
            stories.insert(0, stories.pop(best))
    else:
        raise ValueError("it has neither chosen and rejected, nor responses, nor story1, story2 and label")
    stories = [item.get("prompt") or "", *stories]
    if len(stories) > 100:
        raise ValueError("it has more than 99 responses")
    if not all(isinstance(story, str) for story in stories):
        raise ValueError("a story or the prompt is not a string")
    stories = [stories[0] + story for story in stories[1:]]
    if not all(story.strip() for story in stories):
        raise ValueError("a story is empty")
    "".join(stories).encode()  # lone surrogates: a ValueError
    return name, best, stories


LONGEST = 1 << 24  # bytes of a line


def items_of(path: str):
    """Where and what: each line of a .jsonl as bytes, or each item of a .json list (or of a dict of lists)."""
    with open(path, "rb") as f:
        if not path.endswith(".json"):
            lines = iter(lambda: f.readline(LONGEST + 1), b"")
            yield from ((f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip())
            return
        whole = json.load(f)
    if isinstance(whole, dict):
        whole = [item for part in whole.values() if isinstance(part, list) for item in part]
    yield from ((f"item {i}", item) for i, item in enumerate(whole, 1))


def imported(a, source: str) -> None:
    """The rows of a file, or of every .json and .jsonl in a folder, as token files of a.data's model."""
    files = [source]
    if os.path.isdir(source):
        files = sorted(f"{source}/{file}" for file in os.listdir(source) if file.endswith((".json", ".jsonl")))
    longest = spo.get_args(["--model", a.what]).max_new + 1
    tokenizer = load_tokenizer(a.tokenizer, load(f"{a.data}/sft.pt").args.vocab_size)
    rows, shown = {}, []
    for file in files:
        where = "its text"
        try:
            for where, item in items_of(file):
                if isinstance(item, bytes) and len(item) > LONGEST:
                    raise ValueError(f"it is longer than {LONGEST} bytes")
                name, best, stories = rows_from(json.loads(item) if isinstance(item, bytes) else item)
                same = rows.setdefault(name, [])
                if same and len(same[0]) != len(stories):
                    raise ValueError(f"it has {len(stories)} responses, those before it {len(same[0])}")
                same.append(np.full((len(stories), longest), BOS, np.uint16))
                for row, story in zip(same[-1], tokenizer.encode(stories)):
                    row[1:1 + len(story)] = story[:longest - 1]
                shown.append(best)
        except (ValueError, TypeError, RecursionError) as e:
            raise UserError(f"{file}, {where}: {str(e)[:100]}.") from None
    if not rows:
        raise UserError(f"{source} holds no preferences: give a .jsonl or .json file, or a folder of them.")
    print(f"{source}: {len(shown)} preferences" + (
        f"; the story shown first is the better one in {shown.count(0)}" if None not in shown else ""))
    for name, tokens in rows.items():
        write_rows(a, name, np.stack(tokens))
    if "pairs" not in rows:
        print("pairs: the first and the last of each row")
        write_rows(a, "pairs", np.stack([tokens[[0, -1]] for same in rows.values() for tokens in same]))


def released(a) -> None:
    """The paper's released pairs, if the link still works, imported as they are."""
    host, tried = endpoints()["RELEASE_ENDPOINT"], []

    def get(path, most=1 << 24):
        request = urllib.request.Request(f"{host}/api/repo/{path}", headers={"User-Agent": "spo"})

        def attempt():
            with urllib.request.urlopen(request, timeout=TIMEOUT) as f:
                return body_of(f, most)
        return patiently(request.full_url, attempt, {None: "the release is not to be had there"})

    def files(name, under=""):
        """Data files and sizes; a listing is a list of entries, or a dict of folders, files having a size."""
        listing = json.loads(get(f"{name}/files/?path={urllib.parse.quote(under)}"))
        if isinstance(listing, list):
            listing = {entry["name"]: entry for entry in listing}
        for file, entry in listing.items():
            path = f"{under}/{file}".strip("/")
            if file.endswith((".json", ".jsonl")):
                yield path, entry["size"]
            elif "size" not in entry and path.count("/") < 8:
                yield from files(name, path)

    for name in ("SPO-4159", "SP0-4159"):  # the paper's text can be read either way
        folder = f"{a.data}/{name}"
        try:
            get(f"{name}/options")
            found = list(itertools.islice(files(name), 1000))
            if not found:
                raise UserError(f"{host} lists no .json file")
            os.makedirs(folder, exist_ok=True)
            for i, (path, size) in enumerate(found):
                local = f"{folder}/{i:03d}-{re.sub('[^A-Za-z0-9._-]', '_', path)[-80:]}"
                if not os.path.exists(local):
                    body = get(f"{name}/file/{urllib.parse.quote(path)}", 1 << 28)
                    if len(body) != size:
                        raise UserError(f"{path!r:.80} has {len(body)} bytes, not the {size!r:.20} listed")
                    write_whole(local, body)
            break
        except UserError as e:
            tried.append(str(e).rstrip("."))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            tried.append(f"{host}'s list of files cannot be read")
    else:
        raise UserError(f"the released pairs cannot be fetched ({'; '.join(tried)}): take --source made, or a "
                        "file of your own.")
    imported(a, folder)


def filtered(verdict, swapped) -> int | str:
    """E.1's filter -> which story of the pair is better, 0 or 1, or why the pair is dropped."""
    if None in (verdict, swapped):
        return "invalid"
    if preferred(verdict, swapped) is None:
        return "inconsistent"
    for score_1, score_2, better in (verdict, swapped):
        # three points where the story shown second wins: judges favour it
        if (score_1 - score_2 if better == 1 else score_2 - score_1) < (2 if better == 1 else 3):
            return "too close"
    return preferred(verdict, swapped)


def made(a) -> None:
    """E.1: pairs of the model's own stories, judged in both orders and filtered."""
    s = spo.get_args(["--model", a.what, "--seed", str(a.seed), "--init", f"{a.data}/sft.pt"])
    args = load(s.init).args
    tokenizer = load_tokenizer(a.tokenizer, args.vocab_size)
    judge = a.judge or ("llm" if s.judge == "reward" else s.judge)

    def collect(path, n, seed):
        write_tokens(path, stories_of(s.init, n, 2, s, MADE))

    make(f"{a.data}/made.npy", collect, [s.init], n=a.pairs, seed=a.seed)
    rows = np.array(load_tokens(f"{a.data}/made.npy", args, (2,), 1))
    texts = [tuple(tokenizer.decode(row.astype(int).tolist())) for row in rows]
    verdicts = judge_pairs(texts, judge, f"{a.data}/verdicts.jsonl")
    better = [filtered(*both) for both in verdicts]
    judge = os.environ["JUDGE_MODEL"] if judge == "llm" else judge
    counts = {reason: better.count(reason) for reason in ("inconsistent", "too close", "invalid")}
    kept = [i for i, which in enumerate(better) if which in (0, 1)]
    print(f"{len(rows)} pairs judged by {judge} in both orders:",
          ", ".join(f"{n} {reason}" for reason, n in counts.items()))
    print(f"  {len(kept)} kept, of which the first is better in {sum(better[i] == 0 for i in kept)}")
    lines = []
    for i in kept:
        chosen, rejected = texts[i][::-1 if better[i] else 1]
        lines.append(json.dumps(dict(prompt="", chosen=chosen, rejected=rejected, pair=i, verdicts=verdicts[i],
                                     better=better[i], judge=judge, seed=a.seed)) + "\n")
    write_whole(f"{a.data}/made.jsonl", "".join(lines))
    order = [[better[i], 1 - better[i]] for i in kept]
    write_rows(a, "pairs", np.array([rows[i][best_first] for i, best_first in zip(kept, order)]))


def with_rewards(a) -> None:
    """What a model needs to be trained and judged without an expert: stories of its own, and a reward model."""
    rows = len(load_tokens(f"{a.data}/pairs.npy", load(f"{a.data}/sft.pt").args, (2,), 2))
    s = spo.get_args(["--model", a.what, "--seed", str(a.seed), "--data", a.data, "--tokenizer", a.tokenizer,
                      "--algo", "reward", "--out", f"{a.data}/reward", "--steps", str(a.reward_steps),
                      "--batch", str(min(32, rows)), "--warmup", str(a.reward_steps // 10),
                      "--eval_every", str(a.reward_steps)])

    def fit(path, **_):
        shutil.rmtree(s.out, ignore_errors=True)
        if spo.train(s) < s.steps:
            raise KeyboardInterrupt
        save(load(f"{s.out}/ckpt.pt", scalar=True), path)
        os.remove(f"{s.out}/ckpt.pt")  # three times the model's size

    if a.what in PUBLISHED:
        make(f"{a.data}/ref.npy", lambda path, n, seed: write_tokens(path, stories_of(s.init, n, 1, s, REF)),
             [s.init], n=a.ref, seed=a.seed)
    make(f"{a.data}/reward.pt", fit, [s.init, f"{a.data}/pairs.npy"], steps=s.steps, seed=a.seed)


def main(argv=None) -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("toy", "toy-naive", *PUBLISHED, "tokenizer"))
    p.add_argument("--data", help="folder the files go to; default data/<what>")
    p.add_argument("--tokenizer", help="default: tokenizer.model, of a published model in <data>")
    p.add_argument("--source", help="of pairs: made, released, or a .jsonl or .json file or a folder of them")
    p.add_argument("--judge", choices=JUDGES, help="who labels made pairs; default: toy: its expert, else llm")
    p.add_argument("--reward_steps", type=int, help="of fitting a reward model; default: toy: 0, else 1000")
    p.add_argument("--seed", type=int, help="of the stories, the training and the sampling")
    p.add_argument("--stories", type=int, help="stories of the grammar to learn from")
    p.add_argument("--sft_steps", type=int, help="steps of pre-training")
    p.add_argument("--pairs", type=int, help="pairs to make; half as many rows of four")
    p.add_argument("--ref", type=int, help="stories of the writer: to compare with, for SLiC-HF")
    a = p.parse_args(argv)
    a.data = a.data or f"data/{a.what}"
    a.tokenizer = a.tokenizer or (f"{a.data}/" if a.what in PUBLISHED else "") + "tokenizer.model"
    if a.what == "tokenizer":
        return train_tokenizer(a.tokenizer)
    # what is not given is as the folder was made, so that a plain `make train` leaves it as it is
    how = dict(seed=0, stories=20_000, sft_steps=1000, pairs=4000, ref=2000)
    for known in read_note(f"{a.data}/settings"), vars(a):
        how |= {name: n for name, n in known.items() if name in how and type(n) is int}
    vars(a).update(how)
    if a.reward_steps is None:
        a.reward_steps = 1000 if a.what in PUBLISHED and a.source else 0
    for name, low in dict(stories=2, sft_steps=2, pairs=2, ref=2, reward_steps=0).items():
        if getattr(a, name) < low:
            p.error(f"--{name} is {getattr(a, name)}: it must be {low} or more")
    os.makedirs(a.data, exist_ok=True)
    write_note(f"{a.data}/settings", how)
    toy(a) if a.what.startswith("toy") else published(a)
    if a.source in ("made", "released"):
        dict(made=made, released=released)[a.source](a)
    elif a.source:
        imported(a, a.source)
    if a.reward_steps:
        with_rewards(a)


if __name__ == "__main__":
    cli(main)
