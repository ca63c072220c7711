"""
The speed of each part of training: python -m extras.bench --model stories15M --threads 1

Weights and tokens are random, of the true shapes and at full length. Times are medians (min-max); limit is the
share of this machine's speed in matrix products, MiB the most memory so far. The last line is JSON of all numbers.
--peers adds other programs and the ratios to them (bench_peers.py).
"""
import json
import os
import resource
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import spo
from extras.bench_peers import bench_peers
from extras.fast_generate import fast_generate
from extras.toyworld import MODEL_ARGS
from model import BOS, ModelArgs, Parser, Transformer, generate, run_main, screen_width, wrap

MODEL_260K = dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=4, max_seq_len=512)
MODEL_15M = dict(dim=288, n_layers=6, n_heads=6, multiple_of=32, max_seq_len=256)
MODEL_110M = dict(dim=768, n_layers=12, n_heads=12, multiple_of=32, max_seq_len=1024)
# model -> its shape, pairs per step, tokens per response, responses per forward pass
SHAPES = {"toy": (MODEL_ARGS, 16, 90, 32), "stories260K": (MODEL_260K, 32, 128, 16),
          "stories15M": (MODEL_15M, 8, 256, 2), "stories110M": (MODEL_110M, 8, 256, 2)}


def measure(fn, args):
    """Seconds per call of fn() under autocast, args.reps times, after one call to warm up."""
    times = []
    for _ in range(args.reps + 1):
        start = time.perf_counter()
        with spo.autocast(args):
            fn()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


class Table:
    """Measures parts of training, prints a row for each, and keeps the numbers."""

    def __init__(self, args, model):
        n = 8192 if args.device == "cuda" else 2048
        x, y = torch.randn(2, n, n, device=args.device).to(getattr(torch, args.dtype))
        self.args, self.dims = args, model.args
        self.limit = 2 * n ** 3 / min(measure(lambda: x @ y, args))                 # FLOP/s
        self.num_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.results = {**vars(args), "torch": torch.__version__, "gflops": self.limit / 1e9}
        print(wrap(f"{args.device}, {args.threads} threads, {args.dtype}, {self.limit / 1e9:.0f} GFLOP/s; "
                   f"{args.model}, {self.num_params:,} parameters"))
        self.print_row("", f"{'seconds':21}", "tokens/s", "limit", "MiB")

    def print_row(self, name, seconds, tokens_per_s, limit, memory):
        """A row of 80 columns; on a narrower screen of 59, without the times' range and the memory."""
        if screen_width() < 80:
            seconds, memory = seconds[:7], ""
        print(f"{name:36}{seconds} {tokens_per_s:>9}{limit:>6}{memory:>7}".rstrip(), flush=True)

    def row(self, name, fn, tokens, context, passes):
        """Measures fn -> its median in seconds."""
        return self.add_row(name, measure(fn, self.args), tokens, context, passes)

    def add_row(self, name, times, tokens, context, passes):
        """Keeps and prints times -> median. FLOP per token: passes (1 forward, 2 backward) of 2 N + 4 L dim context."""
        seconds = float(np.median(times))
        flop = passes * (2 * self.num_params + 4 * self.dims.n_layers * self.dims.dim * context) * tokens
        limit = flop / seconds / self.limit
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10           # MiB, the most so far
        if self.args.device == "cuda":
            memory = torch.cuda.max_memory_allocated() >> 20
        self.results[name] = dict(seconds=seconds, tokens_per_s=tokens / seconds, memory_mib=memory,
                                  share_of_limit=limit)
        spread = f"({min(times):.3f}-{max(times):.3f})"
        self.print_row(name, f"{seconds:7.3f} {spread:13}", f"{tokens / seconds:,.0f}", f"{limit:.0%}", memory)
        return seconds


def random_pairs(args, vocab_size):
    """Token ids of args.pairs pairs at full length, BOS first -> (pairs, 2, T)."""
    data = np.random.default_rng(0).integers(2, vocab_size, (args.pairs, 2, args.length), np.uint16)
    data[..., 0] = BOS
    return data


def bench_training(args, table, policy, ref, sampler):
    """The parts of a training step, and how many DPO steps an SPO step takes."""
    pairs, length, num_rollouts = args.pairs, args.length, max(1, args.pairs // 4)  # the paper's proportion
    data = random_pairs(args, policy.args.vocab_size)
    responses = spo.Responses(data)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def preference_step():
        for rows, y, mask in spo.micro_batches(responses, torch.arange(pairs), args.micro_batch_size, args.device):
            logp_w, logp_l = spo.seq_logp(policy, y, mask).view(len(rows), 2).T
            (spo.spo_loss(logp_w, logp_l, 0.01).sum() / pairs).backward()
        update()

    def rollout():
        y = spo.sample(policy, spo.no_prompts(num_rollouts), length - 1, spo.rng(0), sampler)
        parts = y.split(args.micro_batch_size)
        with torch.no_grad():
            rollouts[:] = [(part, spo.response_mask(part), ref.hidden(part[:, :-1])) for part in parts]

    def kl_gradient():
        for y, mask, ref_hidden in rollouts:
            (0.05 * spo.rollout_kl(policy, ref, y, mask, ref_hidden).sum() / num_rollouts).backward()

    def straightforward_step():
        """A forward pass each for y_w and y_l, the reference's in every step, and logits of all positions."""
        logp = []
        for model in (policy, ref):
            for y in torch.from_numpy(data.astype("int64")).to(args.device).unbind(1):
                logits = model(y[:, :-1]).float()
                logp.append(-cross_entropy(logits.mT, y[:, 1:], reduction="none").sum(1))
        spo.dpo_loss(*logp, 0.1).mean().backward()
        update()

    rollouts, tokens, rollout_tokens = [], 2 * pairs * (length - 1), num_rollouts * (length - 1)
    dpo = table.row("preference step", preference_step, tokens, length, 3)
    fresh = table.row("rollouts, read by the reference", rollout, rollout_tokens, length, 2)
    kl = table.row("KL of the rollouts", kl_gradient, rollout_tokens, length, 3)
    plain = table.row("straightforward DPO step", straightforward_step, tokens, length, 3)
    fresh /= spo.ALGOS["spo"]["rollout_every"]
    spo_over_dpo = (dpo + kl + fresh) / dpo
    table.results |= dict(spo_over_dpo=spo_over_dpo, straightforward_over_dpo=plain / dpo)
    print(f"an SPO step is {spo_over_dpo:.2f} DPO steps: KL {kl / dpo:.2f}, rollouts {fresh / dpo:.2f};\n"
          f"the straightforward DPO step is {plain / dpo:.2f}")


@torch.no_grad()
def bench_sampling(args, table, policy, sampler):
    """Sampling at several batch sizes and lengths, and one token of 32 samples without a cache."""
    half = args.length // 2
    for n in args.batches:
        prompt = torch.full((n, 1), BOS, device=args.device)
        for new in (half // 2, half, args.length - 1):
            torch.compiler.reset()  # torch.compile keeps eight shapes
            table.row(f"sampling, batch {n}, {new} tokens", lambda: sampler(policy, prompt, new), n * new, new // 2, 1)
    y = torch.randint(2, policy.args.vocab_size, (32, half), device=args.device)
    table.row(f"without cache, 32, after {half} tokens", lambda: policy.output(policy.hidden(y)[:, -1]), 32, 0, 1)
    weights = 4 * table.num_params  # bytes, in float32
    cache = 8 * len(policy.layers) * policy.layers[0].attention.wk.out_features
    table.results |= dict(weight_bytes_per_step=weights, cache_bytes_per_position=cache)
    print(wrap(f"one step of sampling reads {weights / 1e6:.1f} MB of weights for the whole batch, and for each sample "
               f"{cache / 1e3:.1f} KB of keys and values per earlier position"))


def main(argv=None):
    p = Parser(description="The speed of each part of training.")
    p.add_argument("--model", choices=SHAPES, default="toy", help="whose shape")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 256], help="batch sizes of sampling")
    p.add_argument("--length", type=int, help="tokens per response (default: those of its training)")
    p.add_argument("--reps", type=int, default=3, help="how often each part is measured")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    p.add_argument("--fast", action="store_true", help="sample with extras/fast_generate.py")
    p.add_argument("--peers", action="store_true", help="measure TRL, transformers, llama.cpp and run.c as well")
    p.add_argument("--run_c", metavar="PATH", help="llama2.c's run.c, for --peers")
    args = p.parse_args(argv)
    if args.peers and (args.device != "cpu" or args.dtype != "float32" or not {1, 32} <= set(args.batches)):
        p.error("--peers compares on the CPU, in float32, at batch 1 and 32: give --device cpu --dtype float32, and "
                "both among --batches")
    if args.run_c and not (args.peers and os.path.isfile(args.run_c)):
        p.error(f"--run_c is {args.run_c}: give the path of a copy of llama2.c's run.c, and --peers")
    if args.length is not None and args.length < 8:
        p.error(f"--length is {args.length}: give 8 or more")
    shape, args.pairs, length, args.micro_batch_size = SHAPES[args.model]
    args.length = args.length or length
    shape = shape | {"max_seq_len": args.length}
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy = Transformer(ModelArgs(**shape)).to(args.device)
    ref = Transformer(ModelArgs(**shape)).to(args.device).requires_grad_(False)
    never_bos = -1e4 * (torch.arange(policy.args.vocab_size, device=args.device) == BOS)  # no sample ends early
    policy.output.bias = torch.nn.Parameter(never_bos, requires_grad=False)
    table = Table(args, policy)
    sampler = fast_generate if args.fast else generate
    bench_training(args, table, policy, ref, sampler)
    bench_sampling(args, table, policy, sampler)
    if args.peers:
        bench_peers(args, table, policy, ref, random_pairs(args, policy.args.vocab_size))
    print(json.dumps(table.results))


if __name__ == "__main__":
    run_main(main)
