"""
Sampling in fixed shapes: every token is the same kernels on the same memory, fused by torch.compile and on GPUs
recorded once as a CUDA graph. The samples are those of model.generate up to rounding. --fast_sampling selects it.

Each batch size and length is compiled once per process, 10 to 25 s on a CPU; finished rows stay in the batch. It is
worth it on GPUs and in long runs. torch.compile keeps eight shapes; more run as they are, not compiled.
"""
import math
import os
import shutil
import sysconfig

import torch
import torch.nn.functional as F

from model import BOS, UserError, upcast


def rotate(x, freqs_cis):
    """model.apply_rotary_emb in real numbers, which torch.compile can fuse. x (B, 1, H, head_dim)."""
    a, b = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = upcast(freqs_cis).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def attend(attention, x, freqs_cis, keys, values, pos):
    """
    Self-attention of one new token per row, x (B, 1, dim) -> (B, 1, dim). Its key and value are written to keys and
    values (B, n_kv_heads, max_len, head_dim) at pos; the buffers are read whole, with later positions masked.
    """
    B, n_kv_heads, max_len, head_dim = keys.shape
    q = rotate(attention.wq(x).view(B, 1, -1, head_dim), freqs_cis)
    k = rotate(attention.wk(x).view(B, 1, -1, head_dim), freqs_cis)
    v = attention.wv(x).view(B, 1, -1, head_dim)
    keys.index_copy_(2, pos, k.transpose(1, 2))
    values.index_copy_(2, pos, v.transpose(1, 2))
    q = q.reshape(B, n_kv_heads, -1, head_dim)              # the query heads of one key head, side by side
    scores = q @ keys.mT * head_dim ** -0.5                                         # (B, n_kv_heads, .., max_len)
    later = torch.arange(max_len, device=x.device) > pos
    weights = scores.masked_fill(later, -math.inf).softmax(-1).type_as(values)
    return attention.wo((weights @ values).view(B, 1, -1))


def sample_step(model, cache, tokens, uniforms, lengths, finished, finite, pos):
    """
    Reads tokens (B, length) at pos, writes them at pos + 1 unless they are the prompt's there, and advances pos; all in
    place. lengths (B,): of the prompts. finished (B,): the rows that have ended. finite: whether all logits so far
    were; model.sample_token asks at once, so it would wait here.
    """
    freqs_cis = model.freqs_cis.index_select(0, pos)
    x = model.tok_embeddings(tokens.index_select(1, pos))                           # (B, 1, dim)
    for layer, (keys, values) in zip(model.layers, cache):
        x = x + attend(layer.attention, layer.attention_norm(x), freqs_cis, keys, values, pos)
        x = x + layer.feed_forward(layer.ffn_norm(x))
    logits = upcast(model.output(model.norm(x))[:, 0])                              # (B, V)
    finite &= logits.amax(-1).isfinite().all()
    cumulative = logits.softmax(-1).cumsum(-1)                                      # (B, V)
    uniform = uniforms.index_select(1, pos) * cumulative[:, -1:]
    next_token = torch.searchsorted(cumulative, uniform, right=True)[:, 0]
    next_token = torch.where(finished | ~finite, BOS, next_token)
    pos += 1
    given = pos < lengths
    next_token = torch.where(given, tokens.index_select(1, pos)[:, 0], next_token)
    tokens.index_copy_(1, pos, next_token[:, None])
    finished |= (next_token == BOS) & ~given


def check_compiler():
    """On a CPU torch.compile builds C++ with Python's headers."""
    compiler = os.environ.get("CXX", "g++")
    header = f"{sysconfig.get_path('include')}/Python.h"
    for name, found in ((compiler, shutil.which(compiler)), (header, os.path.exists(header))):
        if not found:
            raise UserError(f"--fast_sampling needs a C++ compiler and Python's headers, but {name} does not exist: "
                            "install it (CXX names another compiler), or leave the flag out.")


@torch.no_grad()
def fast_generate(model, prompt, max_new_tokens, generator=None):
    """Continues prompt (B, P) to tokens (B, P + max_new_tokens) as model.generate does. generator: on the CPU."""
    B, P = prompt.shape
    device = prompt.device
    assert P + max_new_tokens <= model.args.max_seq_len + 1, f"the model reads {model.args.max_seq_len} tokens"
    if device.type == "cpu":
        check_compiler()
    lengths = (prompt >= 0).sum(1)
    uniforms = torch.rand(B, P + max_new_tokens - 1, generator=generator).to(device)
    tokens = F.pad(prompt.masked_fill(prompt < 0, BOS), (0, max_new_tokens), value=BOS)
    pos = torch.zeros(1, dtype=torch.long, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones(1, dtype=torch.bool, device=device)
    attention = model.layers[0].attention
    k = attention.wk(model.tok_embeddings(tokens[:, :1]))  # for its dtype, which under autocast is another
    shape = (B, k.shape[-1] // attention.head_dim, tokens.shape[1] - 1, attention.head_dim)
    cache = [(k.new_zeros(shape), k.new_zeros(shape)) for layer in model.layers]
    compiled_step = torch.compile(sample_step, dynamic=False)

    def step():
        compiled_step(model, cache, tokens, uniforms, lengths, finished, finite, pos)

    for t in range(tokens.shape[1] - 1):
        if t == 3 and tokens.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        step()
        if t % 16 == 0 and finished.all():  # not at every step, for it waits for the device
            break
    if not finite:
        raise UserError("the model has diverged: its logits are not finite. Train with a lower learning rate.")
    return tokens
