"""
Stories as tokens and as text, and what they are worth: judges, and the win-rates they give a model
against its reference.

    python evaluate.py win out/.../best.pt      # a checkpoint's win-rate, on fresh stories
    python evaluate.py report                   # Table 1 and Figure 1, on the toy world
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

import toyworld
from model import ModelArgs, UserError, cli, full_precision, load


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


# ---------------------------------------------------------------------------------------------------
# Judges. The first three give a story a reward r (N,), so that each story of the model meets each of the
# reference's; an endpoint compares two stories.

JUDGES = ("expert", "naive", "reward", "llm")


def expert(stories: list[str], taste: str = "limited") -> torch.Tensor:
    """The toy world's judge: its known reward r of each story, (N,)."""
    return torch.tensor([toyworld.reward(story, taste) for story in stories])


def story_reward(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The reward model's r(y), (N,): what its scalar head says at the story's last token, for tokens and mask
    (N, T) as in spo.seq_logp.
    """
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    longest = model.args.max_seq_len  # a story that was cut there has one token more
    return full_precision(model(tokens[:, :longest]))[torch.arange(len(tokens)), last.clamp(max=longest - 1), 0]


def win_rate(r: torch.Tensor, r_ref: torch.Tensor) -> tuple[float, float]:
    """
    E[sigmoid(r(y) - r(y_ref))] over every y with reward in r (N,) against every y_ref with reward in
    r_ref (M,): the chance, without label noise, that the expert prefers the model's story to the
    reference's (Eq. 2). With its standard error, both samples counted.
    """
    wins = torch.sigmoid(r[:, None] - r_ref)  # (N, M)
    variance = wins.mean(1).var() / len(r) + wins.mean(0).var() / len(r_ref)
    return wins.mean().item(), variance.sqrt().item()


def judge_of(s, tokenizer, y_ref, mask_ref):
    """
    The judge named s.judge, as a function of a model's stories y and their mask (N, T): the win-rate against
    the reference's, y_ref and mask_ref (M, T), and what else it knows of them.
    """
    toy = s.judge in ("expert", "naive")
    model = None if toy else load(f"{s.data}/reward.pt", s.device)

    @torch.no_grad()
    def rewards(y, mask):
        if toy:
            return expert(tokenizer.decode(y.tolist()), "naive" if s.judge == "naive" else "limited")
        return torch.cat([story_reward(model, *part) for part in zip(y.split(64), mask.split(64))]).cpu()

    def judge(y, mask):
        r = rewards(y, mask)
        win, win_se = win_rate(r, r_ref)
        more = dict(grammar=sum(map(toyworld.in_grammar, tokenizer.decode(y.tolist()))) / len(y)) if toy else {}
        return dict(win=win, win_se=win_se, reward=r.mean().item()) | more

    r_ref = rewards(y_ref, mask_ref)
    return judge


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


# ---------------------------------------------------------------------------------------------------
# A checkpoint's win-rate, on fresh stories

FRESH, FRESH_REF = 200, 201  # what stories are sampled for: keys of spo.rng


def win(argv) -> None:
    """Prints, and writes beside the checkpoint, what a judge says of it against the model it began from."""
    import spo  # which imports this file for its own evaluations
    p = argparse.ArgumentParser(prog="evaluate.py win", description=f"{win.__doc__} Other flags: spo.py's.")
    p.add_argument("checkpoint")
    p.add_argument("--n", type=int, default=1000, help="fresh stories of each")
    p.error = usage_error
    a, rest = p.parse_known_args(argv)
    if a.n < 2:
        p.error(f"--n is {a.n}: it must be 2 or more")
    s = spo.get_args(rest)
    policy, ref = load(a.checkpoint, s.device), load(s.init, s.device)
    tokenizer = load_tokenizer(s.tokenizer, policy.args.vocab_size)
    y_ref = spo.sample(ref, a.n, s, (FRESH_REF,))
    judge = judge_of(s, tokenizer, y_ref, spo.story_mask(y_ref))
    found = dict(judge=s.judge, n=a.n) | spo.measure(policy, ref, judge, s, a.n, (FRESH,))
    print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in found.items()))
    write_json(f"{a.checkpoint.removesuffix('.pt')}.json", found)


def write_json(path: str, value) -> None:
    with open(f"{path}.part", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(f"{path}.part", path)


# ---------------------------------------------------------------------------------------------------
# Table 1 and Figure 1. Each method is tuned over four settings, two learning rates by two of its own, by
# its mean peak on two seeds; the best runs on five others. The peak is the highest evaluation of the first
# STEPS steps, and that model is evaluated again on 1,000 fresh stories; training then goes on to OVER times
# as many steps, and over-training is looked at OVER times after the peak.

STEPS, OVER = 300, 5
TUNE, SEEDS = (100, 101), (0, 1, 2, 3, 4)
GRID = {"spo": ("--alpha 0.1 --beta 0.05", "--alpha 0.3 --beta 0.05"),
        "dpo": ("--beta 0.1", "--beta 0.3"),
        "ipo": ("--beta 0.03", "--beta 0.1"),
        "slic": ("--delta 10 --beta 0.1", "--delta 10 --beta 0.3")}
GRID = {algo: [f"--algo {algo} {own} --lr {lr}" for own in settings for lr in ("2e-4", "4e-4")]
        for algo, settings in GRID.items()}


def program(*argv: str) -> None:
    """One of our programs, on one thread, its output kept for when it fails."""
    done = subprocess.run([sys.executable, *argv], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{' '.join(argv)} failed: {(done.stderr.splitlines() or ['killed'])[-1]}")


def run(flags: str, steps: int, out: str) -> dict:
    """Trains to so many steps, or on to them, unless they are done -> the peak so far."""
    if not os.path.exists(f"{out}/ckpt.pt"):
        program("spo.py", *flags.split(), "--steps", str(steps), "--out", out)
    elif read_log(out)[-1]["step"] < steps:
        program("spo.py", *flags.split(), "--steps", str(steps), "--out", out, "--resume")
    found = peak(out)
    print(f"{out}: peak {found['win']:.3f} at step {found['step']}", flush=True)
    return found


def report(model: str) -> None:
    """Makes out/report/<model>: every run, table.md and figure1.png. What is there already is not run again."""
    folder = f"out/report/{model}"

    def out(flags, seed):
        return f"{folder}/{'-'.join(flags.replace('--', '').split()[1:])}-seed{seed}"

    def tune(flags, seed):
        return run(f"{flags} --model {model} --seed {seed}", STEPS, out(flags, seed))["win"]

    def full(flags, seed):
        where, flags = out(flags, seed), f"{flags} --model {model} --seed {seed}"
        if not os.path.exists(f"{where}/peak.json"):
            at = run(flags, STEPS, where)["step"]
            program("evaluate.py", "win", f"{where}/best.pt", "--model", model, "--seed", str(seed))
            with open(f"{where}/best.json") as f:
                write_json(f"{where}/peak.json", {"step": at} | json.load(f))
        run(flags, OVER * STEPS, where)
        with open(f"{where}/peak.json") as f:
            return json.load(f), [r for r in read_log(where) if "win" in r]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trials = [(flags, seed) for grid in GRID.values() for flags in grid for seed in TUNE]
        wins = dict(zip(trials, pool.map(lambda trial: tune(*trial), trials)))
        tuned = {algo: max(grid, key=lambda flags: sum(wins[flags, seed] for seed in TUNE))
                 for algo, grid in GRID.items()}
        chosen = [(flags, seed) for seed in SEEDS for flags in tuned.values()]
        runs = dict(zip(chosen, pool.map(lambda choice: full(*choice), chosen)))
    runs = {algo: [runs[flags, seed] for seed in SEEDS] for algo, flags in tuned.items()}
    text = table(runs, tuned)
    with open(f"{folder}/table.md", "w") as f:
        f.write(text)
    figure(runs, f"{folder}/figure1.png")
    print(text)


def mean_se(values) -> str:
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def table(runs: dict, tuned: dict) -> str:
    """Table 1 as markdown; runs: algorithm -> for each seed, its peak and its evaluations."""
    at = {algo: [{r["step"]: r["win"] for r in log} for _, log in seeds] for algo, seeds in runs.items()}
    again = {algo: [found["win"] for found, _ in seeds] for algo, seeds in runs.items()}
    after = {algo: [wins[OVER * found["step"]] for wins, (found, _) in zip(at[algo], seeds)]
             for algo, seeds in runs.items()}
    lines = [f"| method | peak win-rate | its step | KL there | entropy there | at step {STEPS} | at {OVER}x the "
             "peak's step | SPO's lead at the peak | and after |", "|" + " --- |" * 9]
    for algo, seeds in runs.items():
        ahead = [[a - b for a, b in zip(x["spo"], x[algo])] for x in (again, after)]
        lead = ["", ""] if algo == "spo" else [mean_se(difference) for difference in ahead]
        kl, entropy, step = (torch.tensor([found[name] for found, _ in seeds]).double().mean()
                             for name in ("kl", "entropy", "step"))
        cells = [f"`{tuned[algo].removeprefix('--algo ')}`", mean_se(again[algo]), f"{step:.0f}", f"{kl:.1f}",
                 f"{entropy:.1f}", mean_se([wins[STEPS] for wins in at[algo]]), mean_se(after[algo]), *lead]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(runs: dict, path: str) -> None:
    """Figure 1: win-rate against steps and against KL; means over the seeds, and bands of a standard deviation."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: `make report` installs it.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plot, (by_step, by_kl) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for algo, seeds in runs.items():
        step, win, kl = (torch.tensor([[r[name] for r in log] for _, log in seeds]).double()
                         for name in ("step", "win", "kl"))
        line, = by_step.plot(step[0], win.mean(0), label=algo)
        by_step.fill_between(step[0], win.mean(0) - win.std(0), win.mean(0) + win.std(0), alpha=0.2, lw=0)
        by_kl.plot(kl[:, 1:].flatten(), win[:, 1:].flatten(), ".", ms=3, alpha=0.4, color=line.get_color())
        by_kl.plot(kl[:, 1:].mean(0), win[:, 1:].mean(0), color=line.get_color(), lw=1)
    by_step.axvline(STEPS, color="grey", lw=0.8, ls=":")
    by_step.set(xlabel="training step (dotted: the end of tuning)", ylabel="win-rate against the SFT model")
    by_kl.set(xlabel="KL to the SFT model, nats a story", xscale="log")
    by_step.legend(frameon=False)
    for axes in (by_step, by_kl):
        axes.grid(alpha=0.3)
    plot.tight_layout()
    plot.savefig(f"{path}.part", format="png", dpi=110)
    os.replace(f"{path}.part", path)


def usage_error(message: str):
    raise UserError(f"{message} (see python evaluate.py --help).")


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["win"]:
        return win(argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("win", "report"))
    p.add_argument("--model", choices=("toy", "toy-naive"), default="toy")
    p.error = usage_error
    report(p.parse_args(argv).model)


if __name__ == "__main__":
    cli(main)
