"""
A compact Llama with llama2.c's parameter names, so that its published checkpoints load as they are.

    model = load("stories15M.pt")                           # or a version-0 .bin of llama2.c
    logits = model(tokens)                                  # (B, T) -> (B, T, V), all positions
    tokens = generate(model, prompt, max_new_tokens=255)    # sampling with a key-value cache

As a program it prints samples:

    python model.py CHECKPOINT --tokenizer tokenizer.model --prompt "Once" -n 3 --temperature 0.8
"""
import argparse
import contextlib
import ctypes
import hashlib
import math
import os
import re
import shutil
import struct
import sys
import textwrap
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

BOS = 1  # delimits samples: each begins with it and ends with it (no EOS was ever trained)


class UserError(Exception):
    """A mistake the user can correct. Its text is one sentence: what was found, where, what to do."""


# ---------------------------------------------------------------------------------------------------
# The model

@dataclass
class ModelArgs:
    """Field for field what llama2.c stores as model_args."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None   # fewer than n_heads: grouped-query attention
    vocab_size: int = 32000
    hidden_dim: int | None = None   # of the feed-forward; None: 8/3 dim, rounded up to a multiple of multiple_of
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0            # kept for the file format; this model has none


class KVCache:
    """Keys and values of the positions read so far: one buffer of each per layer, written in place."""

    def __init__(self, max_len):
        self.max_len = max_len
        self.pos = 0        # positions filled; the model advances it once per forward pass
        self.keys = {}      # layer -> (B, n_kv_heads, max_len, head_dim)
        self.values = {}

    def update(self, layer, k, v):
        """Appends k, v (B, n_kv_heads, T, head_dim), without gradient -> all keys, all values so far."""
        B, H, T, head_dim = k.shape
        end = self.pos + T
        assert end <= self.max_len, f"{end} positions in a cache of {self.max_len}"
        if layer not in self.keys:
            self.keys[layer] = k.new_zeros(B, H, self.max_len, head_dim)
            self.values[layer] = v.new_zeros(B, H, self.max_len, head_dim)
        self.keys[layer][:, :, self.pos:end] = k.detach()
        self.values[layer][:, :, self.pos:end] = v.detach()
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select_rows(self, rows):
        """Keeps these rows of the batch, a mask (B,) or indices."""
        self.keys = {layer: x[rows] for layer, x in self.keys.items()}
        self.values = {layer: x[rows] for layer, x in self.values.items()}


def upcast(x):
    """To float32 at least: softmax, log-softmax and rotations are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def precompute_freqs_cis(head_dim, length):
    """RoPE: cos and sin of position t times 10000^(-2i / head_dim) -> (length, 1, head_dim / 2, 2)."""
    freqs = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), freqs)
    return torch.stack((angles.cos(), angles.sin()), -1)[:, None]


def apply_rotary_emb(x, freqs_cis):
    """Rotates each pair of neighbouring entries of x (B, T, H, head_dim), taken as one complex number."""
    pairs = torch.view_as_complex(upcast(x).unflatten(-1, (-1, 2)))
    rotated = pairs * torch.view_as_complex(upcast(freqs_cis))
    return torch.view_as_real(rotated).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        kv_dim = (args.n_kv_heads or args.n_heads) * self.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, freqs_cis, mask, layer, cache):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, -1, self.head_dim)
        k = self.wk(x).view(B, T, -1, self.head_dim)
        v = self.wv(x).view(B, T, -1, self.head_dim)
        q = apply_rotary_emb(q, freqs_cis).transpose(1, 2)                          # (B, n_heads, T, head_dim)
        k = apply_rotary_emb(k, freqs_cis).transpose(1, 2)                          # (B, n_kv_heads, T, head_dim)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                        # T grows to cache.pos + T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args, hidden_dim):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, hidden_dim)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, freqs_cis, mask, layer, cache):
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, layer, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        m = args.multiple_of
        self.hidden_dim = args.hidden_dim or m * math.ceil(int(2 * 4 * args.dim / 3) / m)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, self.hidden_dim) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight  # tied
        freqs_cis = precompute_freqs_cis(args.dim // args.n_heads, args.max_seq_len)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:  # keeps the scale of activations; normal(0.02) is the embedding's usual one
                nn.init.normal_(p, std=0.02 if name.startswith("tok_embeddings") else args.dim ** -0.5)

    def forward(self, tokens, cache=None):
        """
        tokens (B, T) -> logits (B, T, V); logits[:, t] predict the token after tokens[:, t]. With a cache, tokens
        follow those already in it, and are added to it.
        """
        return self.output(self.hidden(tokens, cache))

    def hidden(self, tokens, cache=None):
        """What the output layer reads -> (B, T, dim)."""
        start = cache.pos if cache is not None else 0
        T = tokens.shape[1]
        end = start + T
        assert end <= self.args.max_seq_len, f"{end} tokens, but max_seq_len is {self.args.max_seq_len}"
        mask = None
        if start > 0 and T > 1:  # is_causal aligns its mask top-left: wrong behind a filled cache
            mask = tokens.new_ones(T, end, dtype=torch.bool).tril(start)
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.freqs_cis[start:end], mask, i, cache)
        if cache is not None:
            cache.pos = end
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------
# Sampling

def sample_token(logits, uniforms, temperature, top_k):
    """
    One token per row -> (B,): the inverse of the cumulative distribution of logits (B, V) at uniforms (B, 1).
    Temperature 0 takes the most likely token.
    """
    logits = upcast(logits)
    if not logits.amax(-1).isfinite().all():
        raise UserError("the model has diverged: its logits are not finite. Train with a lower learning rate.")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    cumulative = logits.softmax(-1).cumsum(-1)                                      # (B, V)
    total = cumulative[:, -1:]  # only near 1; times the total, every uniform number has its token
    return torch.searchsorted(cumulative, uniforms * total, right=True)[:, 0]


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, generator=None):
    """
    Continues prompt (B, P), token ids, to tokens (B, P + max_new_tokens). Shorter prompts are padded with -1 at their
    end, and continued from there. A row that has sampled BOS is finished and holds BOS from there on; finished rows
    leave the batch, a quarter of it at a time.

    One uniform number per position is drawn beforehand, so what a row samples does not depend on the other rows.
    """
    assert torch.is_tensor(prompt) and prompt.dtype == torch.long and prompt.dim() == 2, (
        "prompt must be token ids, an int64 tensor of shape (B, P): encode text with the tokenizer, BOS first")
    assert temperature >= 0, f"temperature is {temperature}, but must not be negative"
    assert top_k is None or top_k >= 1, f"top_k is {top_k}, but must be at least 1, or None for all tokens"
    B, P = prompt.shape
    if hasattr(model, "args"):
        assert P + max_new_tokens <= model.args.max_seq_len + 1, f"the model reads {model.args.max_seq_len} tokens"
    lengths = (prompt >= 0).sum(1)                      # (B,)
    shortest = int(lengths.min())
    at_end = (torch.arange(P, device=prompt.device) >= lengths[:, None]) == (prompt < 0)
    assert shortest > 0 and at_end.all(), "prompts must hold a token or more, and -1 only at their end"
    device = prompt.device if generator is None else generator.device
    uniforms = torch.rand(B, P + max_new_tokens - 1, generator=generator, device=device).to(prompt.device)
    tokens = F.pad(prompt.masked_fill(prompt < 0, BOS), (0, max_new_tokens), value=BOS)
    rows = torch.arange(B, device=prompt.device)        # the rows in the cache, some of them finished
    finished = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    cache = KVCache(P + max_new_tokens - 1)             # the last token is not read again
    input_tokens = prompt[:, :shortest]
    for t in range(shortest, P + max_new_tokens):
        logits = model(input_tokens, cache)[:, -1]                                  # (len(rows), V)
        next_token = sample_token(logits, uniforms[rows, t - 1:t], temperature, top_k)
        next_token = torch.where(finished, BOS, next_token)
        given = t < lengths[rows]                       # these rows are still reading their prompts
        next_token = torch.where(given, tokens[rows, t], next_token)
        tokens[rows, t] = next_token
        finished |= (next_token == BOS) & ~given
        if 4 * finished.sum() >= len(rows):  # not at every end, for it copies the cache
            cache.select_rows(~finished)
            rows, next_token, finished = rows[~finished], next_token[~finished], finished[~finished]
            if len(rows) == 0:
                break
        input_tokens = next_token[:, None]
    return tokens


# ---------------------------------------------------------------------------------------------------
# Files

def load(path, device="cpu"):
    """The model in a .pt checkpoint of llama2.c's layout, or in its version-0 .bin."""
    if str(path).endswith(".bin") and os.path.exists(path):
        return build_model(read_bin(path), path).to(device)
    return build_model(load_checkpoint(path, device), path).to(device)


def load_checkpoint(path, device="cpu"):
    """The dict in a .pt file, with `model` and `model_args`. Tensors and plain data only, never code."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: create it with `make data MODEL=...` or `make train`, "
                        "or name another file.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, as torch.save never does")
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a damaged file can fail in any of the unpickler's ways
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:120]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): create or download it again.") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not a llama2.c checkpoint: it lacks `model` or `model_args`.")
    return checkpoint


MAX_POSITIONS = 1 << 26  # max_seq_len times dim: a table of angles that a damaged file may not exceed


def build_model(checkpoint, path):
    """The Transformer in a checkpoint read from path, checked: what this model cannot express is refused."""
    try:
        args = ModelArgs(**checkpoint["model_args"])
        weights = checkpoint["model"]
        if 4 * sum(w.numel() for w in weights.values()) > 8 * os.path.getsize(path):  # float16, and tied: 4 times
            raise ValueError("they are compressed, or repeat a few bytes")
        weights = {name.removeprefix("_orig_mod."): w.float() for name, w in weights.items()}
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("some are not finite")
        embedding = weights["tok_embeddings.weight"]
        if not torch.equal(weights.setdefault("output.weight", embedding), embedding):
            raise ValueError("the output layer is not tied to the embedding")
        head_dim = args.dim // args.n_heads
        if head_dim * args.n_heads != args.dim or head_dim % 2 or args.n_heads % (args.n_kv_heads or 1):
            raise ValueError(f"{args.dim} dimensions, {args.n_heads} heads, {args.n_kv_heads} of keys and values")
        if not 0 < args.max_seq_len * args.dim <= MAX_POSITIONS or not 0 < args.n_layers < len(weights):
            raise ValueError(f"{args.n_layers} layers, {args.max_seq_len} positions")
        if not 0 < args.norm_eps < 1:
            raise ValueError(f"norm_eps {args.norm_eps}")
        with torch.device("meta"):  # whatever sizes the file claims, only what it holds is allocated
            model = Transformer(args)
        model.load_state_dict({name: w.contiguous() for name, w in weights.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"{path}: its weights or model_args are not those of this Llama ({reason}).") from None
    model.output.weight = model.tok_embeddings.weight  # two tensors after load_state_dict(assign=True)
    model.freqs_cis = precompute_freqs_cis(head_dim, args.max_seq_len)
    return model


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to; it replaces path once it is complete and on the disk, else path stays."""
    try:
        with open(f"{path}.part", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(e, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} cannot be written ({reason}); an earlier version of it is unchanged.") from None
    finally:
        with contextlib.suppress(OSError):  # there only if the write failed, in whatever way
            os.remove(f"{path}.part")


def save(model, path, **extra):
    """Writes the checkpoint that `load` and llama2.c read, with `extra` beside the model."""
    model_args = asdict(model.args)
    model_args["n_kv_heads"] = model.args.n_kv_heads or model.args.n_heads  # llama2.c's export needs a number
    with atomic_write(path) as f:
        torch.save({"model": model.state_dict(), "model_args": model_args, **extra}, f)


BIN_LAYERS = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
              "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def bin_names(n_layers):
    """The parameters' names in the order of llama2.c's version-0 .bin."""
    layers = [f"layers.{i}.{kind}.weight" for kind in BIN_LAYERS for i in range(n_layers)]
    return ["tok_embeddings.weight", *layers, "norm.weight"]


def export(model, path):
    """llama2.c's version-0 .bin, for its run.c: a header of 7 int32, float32 weights, RoPE's cos and sin."""
    args, weights = model.args, model.state_dict()
    if args.norm_eps != 1e-5:
        raise UserError(f"{path} is not written: norm_eps is {args.norm_eps}, and run.c computes with 1e-5.")
    header = struct.pack("7i", args.dim, model.hidden_dim, args.n_layers, args.n_heads,
                         args.n_kv_heads or args.n_heads, args.vocab_size, args.max_seq_len)
    tensors = [weights[name] for name in bin_names(args.n_layers)]
    tensors += [model.freqs_cis[..., 0], model.freqs_cis[..., 1]]
    with atomic_write(path) as f:
        f.write(header)
        for x in tensors:
            f.write(x.float().cpu().numpy().tobytes())


def read_bin(path):
    """A checkpoint dict from llama2.c's version-0 .bin."""
    with open(path, "rb") as f:
        header, data = f.read(28), bytearray(f.read())
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    try:
        sizes = dict(zip(names, struct.unpack("7i", header)))
        if min(sizes.values()) < 1:
            raise ValueError("impossible sizes, or a negative vocab_size: an output layer of its own")
        args = ModelArgs(**sizes)
        head_dim = args.dim // args.n_heads
        layer = args.dim * (2 + 2 * args.dim + 2 * head_dim * args.n_kv_heads + 3 * args.hidden_dim)
        size = 4 * (args.vocab_size * args.dim + args.n_layers * layer + args.dim + args.max_seq_len * head_dim)
        if size != len(data):  # checked before a model of whatever sizes is built
            raise ValueError(f"{len(data)} bytes of weights, not {size}")
        with torch.device("meta"):
            weights = Transformer(args).state_dict()
        counts = [weights[name].numel() for name in bin_names(args.n_layers)]
        rope = args.max_seq_len * head_dim  # cos and sin, computed anew here
        parts = torch.frombuffer(data, dtype=torch.float32).split([*counts, rope])
    except (struct.error, ValueError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path} is not a version-0 .bin of llama2.c that this Llama can express ({str(e)[:80]})."
                        ) from None
    named = zip(bin_names(args.n_layers), parts)
    return {"model": {name: x.view(weights[name].shape) for name, x in named}, "model_args": sizes}


def file_hash(path):
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_tokenizer(path, vocab_size):
    """The sentencepiece model at path, which must have vocab_size tokens: those of the checkpoint."""
    import sentencepiece  # here, because the losses need nothing but torch
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is missing or not a sentencepiece model: name the checkpoint's own with "
                        "--tokenizer.") from None
    if tokenizer.vocab_size() != vocab_size:
        raise UserError(f"{path} has {tokenizer.vocab_size()} tokens, but the checkpoint {vocab_size}: "
                        "name the checkpoint's own with --tokenizer.")
    return tokenizer


# ---------------------------------------------------------------------------------------------------
# Command line. What the programs have in common comes first

def screen_width():
    """The terminal's columns, at most 80; 80 without a terminal."""
    return min(80, shutil.get_terminal_size().columns)


def wrap(text, indent=""):
    """text in lines that fit the screen, broken between words; indent begins all but the first."""
    return textwrap.fill(text, screen_width(), subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


def format_time(seconds):
    """h:mm:ss, with as many hours as there are."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Progress:
    """Prints a line such as "sampled 1024 of 8000, 0:01:10 left" every 10 s; nothing where all takes less."""

    def __init__(self, verb, total):
        self.verb, self.total, self.done = verb, total, 0
        self.start = self.shown = time.monotonic()

    def add(self, n):
        self.done += n
        now = time.monotonic()
        if now - self.shown >= 10 and self.done < self.total:
            self.shown = now
            seconds_left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.verb} {self.done} of {self.total}, {format_time(seconds_left)} left", flush=True)


SMALL = 4 << 20  # bytes of a checkpoint, of a million parameters


def limit_threads(path):
    """
    One CPU thread for a model whose checkpoint is small, or not there yet. A second one saves a quarter of a step where
    nothing else runs; where other programs do, it waits for them, and a step takes ten times as long. The variable
    OMP_NUM_THREADS has precedence.
    """
    small = not os.path.exists(path) or os.path.getsize(path) < SMALL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def keep_freed_memory():
    """
    Makes glibc keep the memory of freed tensors for the next ones. By default it returns the large ones' to the system,
    page by page, and takes it again: a fifth of a step of the 15M model. Other C libraries have no such setting.
    """
    if sys.platform == "linux":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4  # from malloc.h
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


MAKE_FLAGS = "algo|alpha|beta|gamma|delta|model|source|data|out|seed|steps|resume|prompt|n|temperature"


def name_variables(message):
    """The message with make's variable after each flag that has one: --steps becomes --steps (make: STEPS=)."""
    def name_variable(flag):
        return f"{flag[0]} (make: {flag[1].upper()}=)"
    return re.sub(rf"(?<![\w-])--?({MAKE_FLAGS})\b(?! \()", name_variable, message)


class Parser(argparse.ArgumentParser):
    """A parser of exact flags, whose errors name make's variables too."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        super().error(name_variables(message))


def run_main(main):
    """main() as a program: the user's mistakes end it as `error: ...` with status 2, Ctrl-C with status 130."""
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # samples may hold characters that the terminal cannot show
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {name_variables(str(error))}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: use a smaller --micro_batch_size.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    p = Parser(description="Print samples of a checkpoint.")
    p.add_argument("checkpoint", help="a .pt or .bin file")
    p.add_argument("--tokenizer", default="tokenizer.model", help="the checkpoint's own sentencepiece model")
    p.add_argument("--prompt", default="", help="the text to continue")
    p.add_argument("-n", type=int, default=1, help="number of samples")
    p.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    p.add_argument("--top_k", type=int, help="sample from the k most likely tokens (default: all)")
    p.add_argument("--max_new_tokens", type=int, help="(default: as many as the model's context holds)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.n < 1 or args.top_k is not None and args.top_k < 1 or not 0 <= args.seed < 2 ** 63:
        p.error("-n and --top_k must be at least 1, --seed from 0 to 2^63 - 1")
    if args.temperature != 0 and not 0.001 <= args.temperature < math.inf:
        p.error("--temperature must be 0, or 0.001 or more")
    limit_threads(args.checkpoint)
    model = load(args.checkpoint)
    tokenizer = load_tokenizer(args.tokenizer, model.args.vocab_size)
    prompt = torch.tensor([[BOS, *tokenizer.encode(args.prompt)]])
    space = model.args.max_seq_len + 1 - prompt.shape[1]
    length = space if args.max_new_tokens is None else args.max_new_tokens
    if not 1 <= length <= space:
        p.error(f"the prompt has {prompt.shape[1]} tokens, BOS included, of {model.args.max_seq_len} that the model "
                f"reads: --max_new_tokens must be from 1 to {space}, or the prompt shorter")
    generator = torch.Generator().manual_seed(args.seed)
    tokens = generate(model, prompt.repeat(args.n, 1), length, args.temperature, args.top_k, generator)
    texts = tokenizer.decode(tokens.tolist())
    print("\n\n".join("\n".join(map(wrap, text.split("\n"))) for text in texts))


if __name__ == "__main__":
    run_main(main)
