"""
A compact Llama with llama2.c's parameter names, so that its published checkpoints load as they are.

    model = load("stories15M.pt")
    logits = model(tokens)                              # (B, T) -> (B, T, V), every position
    tokens = generate(model, bos, max_new_tokens=255)   # cached sampling, one token a step
"""
import contextlib
import ctypes
import math
import os
import struct
import sys
import warnings
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

BOS = 1  # delimits stories: each begins with it and is closed by it (no EOS was ever trained)


class UserError(Exception):
    """Something the user can mend. Its text is one sentence: what was found, where, what to do."""


def cli(main) -> None:
    """Runs a program; the user's mistake is one sentence and exit status 2, Ctrl-C is exit status 130."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors' memory back to the kernel, and takes it again page by page: a fifth of a
        # step of the 15M model. M_MMAP_MAX = 0 and a high M_TRIM_THRESHOLD have it keep what it has.
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: take fewer stories at a time (--micro, MICRO=).", file=sys.stderr)
    except OSError as e:
        print(f"error: {e.filename or 'a file'} cannot be read or written ({e.strerror}).", file=sys.stderr)
    sys.exit(2)


@dataclass
class ModelArgs:
    """Field for field what llama2.c stores as `model_args`."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None   # fewer than n_heads: grouped-query attention
    vocab_size: int = 32000
    hidden_dim: int | None = None   # of the feed-forward; None: 8/3 dim, rounded up to a multiple of
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0            # kept for the file format; this model has none


class KVCache:
    """
    Keys and values of the positions seen so far: one buffer a layer, written in place. Where length is a
    tensor (1,), every step of one token has the same shapes: it reads whole buffers, the rest masked.
    """
    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0             # positions filled; the model moves it on once a forward
        self.buffers = {}           # layer -> keys, values (B, n_kv_heads, max_len, head_dim)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k, v (B, n_kv_heads, T, head_dim), not for training; returns all of them so far."""
        B, H, T, head_dim = k.shape
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_zeros(B, H, self.max_len, head_dim) for x in (k, v)]
        if torch.is_tensor(self.length):
            return [buffer.index_copy_(2, self.length, x) for buffer, x in zip(self.buffers[layer], (k, v))]
        end = self.length + T
        assert end <= self.max_len, f"{end} positions in a cache of {self.max_len}"
        keys, values = self.buffers[layer]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k.detach(), v.detach()
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Forgets the rows of the batch that are not in rows, a mask (B,)."""
        self.buffers = {layer: [x[rows] for x in both] for layer, both in self.buffers.items()}


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """x in float32 at least, whatever the dtype of autocast or of the model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_turns(head_dim: int, length: int) -> torch.Tensor:
    """cos and sin (length, 1, head_dim / 2, 2): position t turns a head's pair i by t / 10000^(2i / head_dim)."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))[:, None]


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RoPE: x (B, T, H, head_dim) turned, neighbouring entries as one complex number."""
    pairs = torch.view_as_complex(full_precision(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(full_precision(turns))).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        kv_dim = (args.n_kv_heads or args.n_heads) * self.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, turns, mask, layer, cache):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k, v = (z.transpose(1, 2) for z in (rotate(q, turns), rotate(k, turns), v))  # (B, H, T, hd)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                            # (B, H, S, hd)
        if T == 1 and mask is not None:  # a compiled step, which fuses what is between plain products
            q = q.reshape(B, k.shape[1], -1, self.head_dim)                             # (B, n_kv_heads, .., hd)
            weights = (q @ k.mT * self.head_dim ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)
            return self.wo((weights.type_as(v) @ v).view(B, T, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):  # SwiGLU
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, hidden_dim: int):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, hidden_dim)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, *position):
        x = x + self.attention(self.attention_norm(x), *position)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        m = args.multiple_of
        self.hidden_dim = args.hidden_dim or m * math.ceil(int(2 * 4 * args.dim / 3) / m)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, self.hidden_dim) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight  # tied
        turns = rope_turns(args.dim // args.n_heads, args.max_seq_len)
        self.register_buffer("turns", turns, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 if name.startswith("tok_embeddings") else args.dim ** -0.5)

    def scalar_head(self):
        """Turns this into a reward model: one number a position in the place of the logits, 0 to begin with."""
        if len(self.output.weight) > 1:
            self.output = nn.Linear(self.args.dim, 1, bias=False, device=self.output.weight.device)
            nn.init.zeros_(self.output.weight)
        return self

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """
        tokens (B, T) -> logits (B, T, V); logits[:, t] are those of the token after tokens[:, t].
        With a cache, tokens follow on those already in it, and are added to it.
        """
        return self.output(self.states(tokens, cache))

    def states(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """What the output layer reads, (B, T, dim)."""
        start, T = cache.length if cache else 0, tokens.shape[1]
        if torch.is_tensor(start):
            turns, mask = self.turns[start], torch.arange(cache.max_len, device=start.device)[None] <= start
        else:
            end, longest = start + T, self.args.max_seq_len
            assert end <= longest, f"{end} tokens, but max_seq_len is {longest}"
            # is_causal aligns its mask top-left, which is wrong for several new tokens behind a filled cache
            turns, mask = self.turns[start:end], None
            if start and T > 1:
                mask = tokens.new_ones(T, end, dtype=torch.bool).tril(start)
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, turns, mask, i, cache)
        if cache:
            cache.length += T
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def generate(model, prompt: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, generator: torch.Generator | None = None,
             compiled: bool = False) -> torch.Tensor:
    """
    Continues prompt (B, P) to tokens (B, P + max_new_tokens); a row that has closed its story with BOS
    holds BOS from there on. Temperature 0 is greedy. Closed stories leave the batch, a quarter at a time.

    One uniform number a token, drawn beforehand: so a row's draws do not depend on what the other rows wrote
    or when they ended. compiled: see `compiled_steps`.
    """
    B, P = prompt.shape
    device = generator.device if generator is not None else prompt.device
    u = torch.rand(B, max_new_tokens, generator=generator, device=device).to(prompt.device)
    tokens = torch.cat((prompt, prompt.new_full((B, max_new_tokens), BOS)), 1)
    rows = torch.arange(B, device=prompt.device)  # those in the cache, some of them closed already
    closed = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    cache = KVCache(P + max_new_tokens - 1)       # the last token is not read again
    new = prompt
    for t in range(max_new_tokens):
        pick, finite = draw(model(new, cache)[:, -1], u[rows, t:t + 1], temperature, top_k)
        check(finite)
        pick = torch.where(closed, BOS, pick)
        tokens[rows, P + t] = pick
        closed |= pick == BOS
        if compiled:
            compiled_steps(model, cache, tokens, closed, u, temperature, top_k)
            break
        if 4 * closed.sum() >= len(rows):  # seldom, for it copies the cache
            cache.keep(~closed)
            rows, pick, closed = rows[~closed], pick[~closed], closed[~closed]
            if len(rows) == 0:
                break
        new = pick[:, None]
    return tokens


def draw(logits, u, temperature, top_k):
    """
    A token a row -> (B,), from logits (B, V), by the inverse of the cumulative distribution at u (B, 1); and
    whether that distribution is finite.
    """
    logits = full_precision(logits)
    if temperature == 0:
        return logits.argmax(-1), ~logits.isnan().any()
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    cumulative = logits.softmax(-1).cumsum(-1)
    # times the last entry, which rounding leaves near 1: then every u has its token
    pick = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
    return pick, cumulative[:, -1].isfinite().all()


def check(finite):
    if not finite:
        raise UserError("the model has diverged, its probabilities are not finite: train with a lower --lr.")


def compiled_steps(model, cache, tokens, closed, u, temperature, top_k):
    """
    The rest of what generate has begun, every step the same kernels on the same memory: fused by torch.compile,
    on GPUs recorded once and launched together. Closed stories stay; a row's draws are those of generate.
    """
    P = cache.length
    cache.length = torch.full((1,), P, device=tokens.device)
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)

    def step():
        new, u_t = tokens.index_select(1, cache.length), u.index_select(1, cache.length + 1 - P)
        pick, fine = draw(model(new, cache)[:, -1], u_t, temperature, top_k)
        pick = torch.where(closed | ~fine, BOS, pick)
        tokens.index_copy_(1, cache.length, pick[:, None])  # the model has moved on by one
        closed.logical_or_(pick == BOS)
        finite.logical_and_(fine)

    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")  # RoPE's
    step = torch.compile(step, dynamic=False)
    for t in range(1, u.shape[1]):
        if t == 3 and tokens.is_cuda:
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                step()
            step = graph.replay
        step()
        if t % 16 == 0 and closed.all():  # seldom, for it waits for the GPU
            break
    check(finite)


# ---------------------------------------------------------------------------------------------------
# Files

def load(path: str, device: str = "cpu", scalar: bool = False) -> Transformer:
    """
    The model in a checkpoint of llama2.c's layout, with or without torch.compile's prefix on its names:
    a writer, or a reward model where scalar.
    """
    checkpoint = read_checkpoint(path, device)
    known = {f.name for f in fields(ModelArgs)}
    try:
        args = ModelArgs(**{k: v for k, v in checkpoint["model_args"].items() if k in known})
        weights = {name.removeprefix("_orig_mod."): w.float() for name, w in checkpoint["model"].items()}
        a, head_dim = args, args.dim // args.n_heads
        if not (0 < a.max_seq_len * a.dim <= 1 << 26 and 0 < a.n_layers < len(weights) and 0 < a.norm_eps < 1
                and head_dim * a.n_heads == a.dim and head_dim % 2 == 0 and a.n_heads % (a.n_kv_heads or 1) == 0
                and all(w.is_contiguous() for w in weights.values())):
            raise ValueError(f"{args}"[:100])
        with torch.device("meta"):  # whatever sizes the file claims, nothing is allocated that it does not hold
            model = Transformer(args)
            if scalar:
                model.scalar_head()
        model.load_state_dict(weights, strict=True, assign=True)
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("some are not finite")
        model.turns = rope_turns(head_dim, args.max_seq_len)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"{path}: its weights do not fit its model_args ({reason}).") from None
    if not scalar:
        model.output.weight = model.tok_embeddings.weight
    return model.to(device)


def read_checkpoint(path: str, device: str = "cpu") -> dict:
    """The dict in a checkpoint file, with `model` and `model_args`. Tensors and plain data, never code."""
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: make it with `make data` or `make train`, or name another.")
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a damaged file can fail in any of the unpickler's ways
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:120]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): "
                        "it is cut short or something else; make it again.") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not a llama2.c checkpoint: it lacks `model` or `model_args`.")
    return checkpoint


@contextlib.contextmanager
def writing(path: str):
    """A binary file to write, which takes path's place once it is whole and on the disk; else path stays."""
    try:
        with open(f"{path}.part", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(f"{path}.part")
        raise UserError(f"{path} cannot be written ({getattr(e, 'strerror', None) or 'is the disk full?'}): "
                        "what was there before is as it was.") from None


def save(model: Transformer, path: str, **more) -> None:
    """Writes what `load` reads, and `more` beside it."""
    with writing(path) as f:
        torch.save({"model": model.state_dict(), "model_args": asdict(model.args), **more}, f)


def export(model: Transformer, path: str) -> None:
    """llama2.c's version-0 `.bin`, for its `run`: a header of 7 int32, then float32 weights by kind."""
    a, layers = model.args, model.layers
    header = struct.pack("7i", a.dim, model.hidden_dim, a.n_layers, a.n_heads, a.n_kv_heads or a.n_heads,
                         a.vocab_size, a.max_seq_len)  # vocab_size positive: the classifier is shared
    weights = [model.tok_embeddings.weight]
    for kind in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
                 "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        weights += [layer.get_submodule(kind).weight for layer in layers]
    weights += [model.norm.weight, model.turns[..., 0], model.turns[..., 1]]
    with writing(path) as f:
        f.write(header)
        for w in weights:
            f.write(w.detach().float().cpu().numpy().tobytes())
