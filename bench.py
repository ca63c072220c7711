"""
How fast this is here: against the machine's own limits, and against the plain way of doing the same.

    python bench.py --model stories15M --threads 1      # make bench: toy, stories260K and stories15M

Weights and tokens are random, of the true shapes and full length. Times are medians (min to max).
"""
import argparse
import resource
import statistics
import time

import numpy as np
import torch

import spo
from model import BOS, ModelArgs, Transformer, cli, generate
from prepare_data import WRITER
from run import Parser

# model: its shape; pairs a step, tokens a story, stories at a time
SHAPES = {
    "toy": (WRITER, 16, 90, 32),
    "stories260K": (dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=4,
                         max_seq_len=512), 32, 128, 16),
    "stories15M": (dict(dim=288, n_layers=6, n_heads=6, multiple_of=32, max_seq_len=256), 8, 256, 2),
    "stories110M": (dict(dim=768, n_layers=12, n_heads=12, multiple_of=32, max_seq_len=1024), 8, 256, 2),
}


def measure(f, a) -> list[float]:
    """Seconds of f(), a.reps times, after once to warm up."""
    times = []
    for _ in range(a.reps + 1):
        began = time.perf_counter()
        f()
        if a.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def peaks(a) -> float:
    """Prints what matrix products and copies reach here -> FLOP/s of the former."""
    dtype = torch.float32 if a.dtype == "float32" else torch.bfloat16
    n = 8192 if a.device == "cuda" else 2048
    x, y = (torch.randn(n, n, device=a.device, dtype=dtype) for _ in range(2))
    flops = 2 * n ** 3 / min(measure(lambda: x @ y, a))
    block, copy = (torch.zeros(1 << 28 if a.device == "cuda" else 1 << 24, device=a.device) for _ in range(2))
    copied = 2 * 4 * len(block) / min(measure(lambda: copy.copy_(block), a))
    print(f"{a.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: {flops / 1e9:.0f} "
          f"GFLOP/s in {a.dtype} matrix products, copies at {copied / 1e9:.0f} GB/s")
    return flops


def memory(a) -> str:
    """The most this process has held so far, of the device's memory."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return f"{(torch.cuda.max_memory_allocated() if a.device == 'cuda' else used) >> 20} MiB"


def stories(vocab_size, *shape):
    """Random tokens as in a token file, uint16 of that shape, that never close."""
    y = np.random.default_rng(0).integers(2, vocab_size, shape, np.uint16)
    y[..., 0] = BOS
    return y


class Endless:
    """A model that never closes a story."""
    def __init__(self, model):
        self.model = model

    def __call__(self, tokens, cache=None):
        logits = self.model(tokens, cache)
        logits[..., BOS] = -torch.inf
        return logits


def bench(a) -> None:
    shape, pairs, length, micro = SHAPES[a.model][0], a.pairs, a.length, a.micro
    flags = f"--model {a.model} --device {a.device} --dtype {a.dtype} --batch {pairs} --micro {micro}"
    algos = {algo: spo.get_args(["--algo", algo, *flags.split()]) for algo in ("spo", "slic")}
    s = algos["spo"]
    s.R = max(1, pairs // 4)  # the paper's proportion
    peak = peaks(a)
    torch.manual_seed(0)
    policy = Transformer(ModelArgs(**shape)).to(a.device)
    args, params = policy.args, sum(p.numel() for p in policy.parameters())
    print(f"{a.model}: {params:,} parameters, {pairs} pairs of {length} tokens, {micro} stories at a time; "
          f"R = {s.R}, k = {s.k}")
    print(f"{'':36} {'seconds':>22} {'tokens/s':>9} {'of peak':>8} {'peak so far':>12}")

    def show(name, times, tokens, context=length, share=1.0):
        """share: of the 6 N + 12 L dim T floating-point operations a token, forward (a third) and backward."""
        middle, flop = statistics.median(times), share * (6 * params + 12 * args.n_layers * args.dim * context)
        print(f"{name:36} {middle:8.3f} ({min(times):.3f}-{max(times):.3f}) {tokens / middle:9,.0f} "
              f"{tokens * flop / middle / peak:8.1%} {memory(a):>12}", flush=True)
        return middle

    data, others = (stories(args.vocab_size, pairs, n, length) for n in (2, 1))
    ref_logp = torch.zeros(pairs, 2, device=a.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True)
    read = pairs * 2 * (length - 1)

    def step(s, ref=None, rollout=(), preferences=True):
        optimizer.zero_grad()
        if preferences:
            spo.preference(policy, data, ref_logp, s, 0)
        for part in spo.regulariser(policy, ref, rollout, others, s, 0):
            (s.beta * part).backward()
        if preferences:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    dpo = show("preference step, ref log-probs known", measure(lambda: step(s), a), read)
    show("SLiC-HF step", measure(lambda: step(algos["slic"]), a), read * 3 // 2)
    ref = Transformer(ModelArgs(**shape)).to(a.device).requires_grad_(False)
    y = torch.from_numpy(stories(args.vocab_size, s.R, length).astype(int)).to(a.device)
    rollout = list(spo.read_by(ref, y, s))
    kl = show("SPO's KL on R rollouts", measure(lambda: step(s, ref, rollout, False), a), s.R * (length - 1))
    bos = torch.ones(s.R, 1, dtype=torch.long, device=a.device)

    def roll_out():
        with spo.autocast(s):
            generate(Endless(policy), bos, length - 1, compiled=a.compile)
        return list(spo.read_by(ref, y, s))

    fresh = show("SPO's R rollouts, read by ref", measure(roll_out, a), s.R * (length - 1), share=2 / 3)

    def plain():
        """One forward for y_w, one for y_l, the reference's each step, logits of every position, one batch."""
        optimizer.zero_grad()
        y = torch.from_numpy(data.astype(int)).to(a.device)

        def logp(model, part):
            logits = model(part[:, :-1]).flatten(0, 1).float()
            nll = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="none")
            return -nll.view(pairs, -1).sum(1)

        with spo.autocast(s):
            w, l, ref_w, ref_l = (logp(model, part) for model in (policy, ref) for part in y.unbind(1))
        spo.dpo_loss(w, l, ref_w, ref_l, 0.1).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    half = torch.from_numpy(stories(args.vocab_size, 32, length // 2).astype(int)).to(a.device)
    with torch.no_grad(), spo.autocast(s):
        for n in a.batches:
            bos = torch.ones(n, 1, dtype=torch.long, device=a.device)
            for new in sorted({length // 4, length // 2, length - 1}):
                torch.compiler.reset()  # it keeps eight shapes at most
                times = measure(lambda: generate(Endless(policy), bos, new, compiled=a.compile), a)
                show(f"sampling, batch {n}, {new} tokens", times, n * new, new // 2, 1 / 3)
        show(f"without cache, 32, after {length // 2} tokens", measure(
            lambda: policy.output(policy.states(half)[:, -1]), a), 32, 0, 1 / 3)
    plainly = show("plain DPO step", measure(plain, a), read)
    print(f"an SPO step is {(dpo + kl + fresh / s.k) / dpo:.2f} DPO steps: KL {kl / dpo:.2f}, rollouts / k "
          f"{fresh / s.k / dpo:.2f}; the plain DPO step is {plainly / dpo:.2f}\n")


def main(argv=None) -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    p.add_argument("--model", choices=SHAPES, default="toy")
    p.add_argument("--pairs", type=int, help="a step")
    p.add_argument("--length", type=int, help="of a story, in tokens")
    p.add_argument("--micro", type=int, help="stories at a time")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 256], help="of the sampling")
    p.add_argument("--reps", type=int, default=3, help="how often each thing is measured, after a warm-up")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--device", choices=devices, default=devices[0])
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    p.add_argument("--compile", action="store_true", help="the sampling")
    a = p.parse_args(argv)
    shape, *usual = SHAPES[a.model]
    for name, default in zip(("pairs", "length", "micro"), usual):
        setattr(a, name, default if getattr(a, name) is None else getattr(a, name))
    bounds = dict(pairs=(1, 4096), length=(2, shape["max_seq_len"]), micro=(1, 4096), batches=(1, 4096),
                  reps=(1, 99), threads=(1, 999))
    for name, (low, high) in bounds.items():
        if np.min(given := getattr(a, name)) < low or np.max(given) > high:
            p.error(f"--{name} is {given}: it must be from {low} to {high}")
    torch.set_num_threads(a.threads)
    bench(a)


if __name__ == "__main__":
    cli(main)
