"""
The paper's experiment on the toy world, and what its readers ask.

    python report.py                      # Table 1 and Figure 1: table.md and figure1.png in out/report/toy
    python report.py --model toy-naive    # the same under the naive expert
    python report.py --questions          # one setting of SPO changed at a time: out/report/questions
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import spo
from model import UserError, cli, load, writing
from run import Parser, peak, read_log, sha256, write_whole

# ---------------------------------------------------------------------------------------------------
# Table 1 and Figure 1. Each method is tuned over four settings, two learning rates by two of its own, by
# its mean peak on two seeds; the best runs on five others. The peak is the highest evaluation of the first
# STEPS steps, and that model is evaluated again on 1,000 fresh stories; training then goes on to OVER times
# as many steps, and over-training is looked at OVER times after the peak.

STEPS, OVER = 300, 5
TUNE, SEEDS = (100, 101), (0, 1, 2, 3, 4)
ESTIMATE = 300  # what stories are sampled for: a key of spo.rng
GRID = {"spo": ("--alpha 0.1 --beta 0.05", "--alpha 0.3 --beta 0.05"),
        "dpo": ("--beta 0.1", "--beta 0.3"),
        "ipo": ("--beta 0.03", "--beta 0.1"),
        "slic": ("--delta 10 --beta 0.1", "--delta 10 --beta 0.3")}
GRID = {algo: [f"--algo {algo} {own} --lr {lr}" for own in settings for lr in ("4e-4", "6e-4")]
        for algo, settings in GRID.items()}


def program(*argv: str) -> None:
    """One of our programs, on one thread of the CPU, its output kept for when it fails."""
    done = subprocess.run([sys.executable, *argv], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise UserError(f"{' '.join(argv)} failed: {(done.stderr.splitlines() or ['killed'])[-1]}")


def same_world(data: str, folder: str) -> None:
    """Refuses to mix runs on these data with runs on others."""
    world = {name: sha256(f"{data}/{name}") for name in ("sft.pt", "pairs.npy", "ref.npy")}
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/world.json"):
        write_whole(f"{folder}/world.json", json.dumps(world, indent=1))
    with open(f"{folder}/world.json") as f:
        if json.load(f) != world:
            raise UserError(f"the runs in {folder} are on other data than {data} has now: move them away.")


def run(flags: str, steps: int, out: str) -> dict:
    """Trains to so many steps, or on to them, unless they are done -> the peak so far."""
    if not os.path.exists(f"{out}/ckpt.pt"):
        program("spo.py", *flags.split(), "--steps", str(steps), "--out", out)
    elif max((r["step"] for r in read_log(out) if "win" in r), default=-1) < steps:  # killed, or not as far
        program("spo.py", *flags.split(), "--steps", str(steps), "--out", out, "--resume")
    found = peak(out)
    print(f"{out}: peak {found['win']:.3f} at step {found['step']}", flush=True)
    return found


def report(model: str, folder: str) -> None:
    """Makes in folder every run, table.md and figure1.png. What is there already is not run again."""
    same_world(f"data/{model}", folder)

    def out(flags, seed):
        return f"{folder}/{'-'.join(flags.replace('--', '').split()[1:])}-seed{seed}"

    def tune(flags, seed):
        return run(f"{flags} --model {model} --seed {seed}", STEPS, out(flags, seed))["win"]

    def full(flags, seed):
        where, flags = out(flags, seed), f"{flags} --model {model} --seed {seed}"
        if not os.path.exists(f"{where}/peak.json"):
            at = run(flags, STEPS, where)["step"]
            program("evaluate.py", f"{where}/best.pt", *flags.split())
            with open(f"{where}/evaluations.jsonl") as f:
                again = json.loads(f.readlines()[-1])
            write_whole(f"{where}/peak.json", json.dumps(dict(step=at) | again, indent=1))
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
    text = table(runs, tuned) + "\n" + frontier(runs)
    write_whole(f"{folder}/table.md", text)
    figure(runs, f"{folder}/figure1.png")
    print(text)


def mean_se(values, digits: int = 3) -> str:
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"


def table(runs: dict, tuned: dict) -> str:
    """Table 1 as markdown; runs: algorithm -> for each seed, its peak and its evaluations."""
    at = {algo: [{r["step"]: r["win"] for r in log} for _, log in seeds] for algo, seeds in runs.items()}
    again = {algo: [found["win"] for found, _ in seeds] for algo, seeds in runs.items()}
    after = {algo: [wins[OVER * found["step"]] for wins, (found, _) in zip(at[algo], seeds)]
             for algo, seeds in runs.items()}
    lines = [f"| method | peak win-rate | SPO's lead | its step | KL there | entropy there | at step {STEPS} | "
             f"at {OVER}x the peak's step | SPO's lead | at step {OVER * STEPS} |", "|" + " --- |" * 10]
    for algo, seeds in runs.items():
        ahead = [[a - b for a, b in zip(x["spo"], x[algo])] for x in (again, after)]
        lead = ["", ""] if algo == "spo" else [mean_se(difference) for difference in ahead]
        step, kl, entropy = ([found[name] for found, _ in seeds] for name in ("step", "kl", "entropy"))
        cells = [f"`{tuned[algo].removeprefix('--algo ')}`", mean_se(again[algo]), lead[0], mean_se(step, 0),
                 mean_se(kl, 1), mean_se(entropy, 1), mean_se([wins[STEPS] for wins in at[algo]]),
                 mean_se(after[algo]), lead[1], mean_se([wins[OVER * STEPS] for wins in at[algo]])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def frontier(runs: dict) -> str:
    """Win-rate at equal KL as markdown: the mean of all seeds' and steps' evaluations in a band of KL."""
    bands = [(1, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 15), (15, 25), (25, 100)]
    lines = [f"| KL, nats a story | {' | '.join(f'{low} to {high}' for low, high in bands)} |",
             "|" + " --- |" * 9]
    for algo, seeds in runs.items():
        cells = [[r["win"] for _, log in seeds for r in log if low <= r["kl"] < high] for low, high in bands]
        means = [f"{sum(wins) / len(wins):.3f} ({len(wins)})" if wins else "-" for wins in cells]
        lines.append(f"| `{algo}` | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def figure(runs: dict, path: str) -> None:
    """Figure 1: win-rate against steps and KL; means over the seeds, bands of a standard deviation."""
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
        line, = by_step.plot(step[0], win.mean(0), label=algo.upper().replace("SLIC", "SLiC-HF"))
        by_step.fill_between(step[0], win.mean(0) - win.std(0), win.mean(0) + win.std(0), alpha=0.2, lw=0)
        by_kl.plot(kl[:, 1:].flatten(), win[:, 1:].flatten(), ".", ms=3, alpha=0.4, color=line.get_color())
        by_kl.plot(kl[:, 1:].mean(0), win[:, 1:].mean(0), color=line.get_color(), lw=1)
    by_step.axvline(STEPS, color="grey", lw=0.8, ls=":")
    by_step.set(xlabel="training step (dotted: the end of tuning)", ylabel="win-rate against the SFT model")
    by_kl.set(xlabel="KL to the SFT model, nats a story", xscale="log")
    by_kl.set_xticks(ticks := [1, 2, 5, 10, 20, 50], map(str, ticks))
    by_kl.minorticks_off()
    by_step.legend(frameon=False)
    for axes in (by_step, by_kl):
        axes.grid(alpha=0.3)
    plot.tight_layout()
    with writing(path) as f:
        plot.savefig(f, format="png", dpi=110)


# ---------------------------------------------------------------------------------------------------
# One setting changed at a time, on one seed; and the two estimators of the KL's gradient

SPO = "--algo spo --alpha 0.3 --beta 0.05 --lr 4e-4"  # what Table 1 tunes it to
QUESTIONS = ["", *(f"--beta {beta}" for beta in (0, 0.01, 0.2, 1)),
             *(f"--beta 0.001 --alpha {alpha}" for alpha in (0.01, 0.1, 1)), "--algo dpo --beta 0.001 --lr 4e-4",
             *(f"--gamma {gamma}" for gamma in (0.03, 0.1, 0.3, 1)), "--k 1", "--k 32", "--R 32", "--R 128",
             "--kl sequence", "--kl sequence --k 1"]


def questions(folder: str) -> None:
    """Makes in folder the runs of QUESTIONS and questions.md."""
    same_world("data/toy", folder)

    def one(change):
        out = f"{folder}/{change.replace('--', '').replace(' ', '-') or 'spo'}"
        return run(change if change.startswith("--algo") else f"{SPO} {change}", STEPS, out), read_log(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(QUESTIONS, pool.map(one, QUESTIONS)))
    lines = [f"| changed | peak (step) | at step {STEPS} | KL there | entropy there | ms a step |",
             "|" + " --- |" * 6]
    for change, (top, log) in found.items():
        ms = torch.tensor([r["ms"] for r in log if "ms" in r]).median()
        lines.append(f"| `{change or SPO}` | {top['win']:.3f} ({top['step']}) | {log[-1]['win']:.3f} | "
                     f"{log[-1]['kl']:.1f} | {log[-1]['entropy']:.1f} | {ms:.0f} |")
    text = "\n".join(lines) + "\n\n" + estimators(f"{folder}/spo/best.pt")
    write_whole(f"{folder}/questions.md", text)
    print(text)


def estimators(checkpoint: str, batches: int = 400) -> str:
    """
    The KL's gradient at a checkpoint from batches of R fresh stories, by Appendix D's token-wise KL and by the
    score function: bias and noise, relative to the true gradient's norm, from each half of the batches.
    """
    s = spo.get_args(["--algo", "spo", "--device", "cpu"])
    policy, ref = load(checkpoint), load(s.init)
    gradients = {"token": [], "sequence": []}
    for i in range(batches):
        y = spo.sample(policy, s.R, s, (ESTIMATE, i))
        logp, ref_logp = (spo.seq_logp(model, y, spo.story_mask(y)) for model in (policy, ref))
        for name, kl in (("token", spo.rollout_kl(policy, ref, y, policy.states(y[:, :-1]),
                                                    ref.states(y[:, :-1]).detach())),
                         ("sequence", spo.sequence_kl(logp, ref_logp))):
            parts = torch.autograd.grad(kl.mean(), policy.parameters(), retain_graph=True)
            gradients[name].append(torch.cat([part.flatten() for part in parts]))
    halves = zip(*(torch.stack(gradients[name]).chunk(2) for name in ("token", "sequence")))
    line = "KL gradient: token-wise bias {:.2f}, noise {:.2f}; score function noise {:.2f}; cosine {:.2f}\n"
    return "".join(line.format(*compare_gradients(*half)) for half in halves)


def compare_gradients(g, unbiased):
    """
    Of two estimates of a gradient, (batches, parameters): the first's bias, the noise of both, relative to the
    norm of the second's mean, and the cosine of their means; all less what the batches' noise adds to them.
    """
    def product(a, b):  # of the two means: over pairs of different batches, whose noise is independent
        return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1))).item()

    size = product(unbiased, unbiased)
    bias = max(0.0, product(g - unbiased, g - unbiased))
    noise = [x.var(0).sum().item() for x in (g, unbiased)]
    return [*((x / size) ** 0.5 for x in (bias, *noise)), product(g, unbiased) / (size * product(g, g)) ** 0.5]


def main(argv=None) -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=("toy", "toy-naive"), default="toy", help="whose expert")
    p.add_argument("--questions", action="store_true", help="instead, one setting of SPO changed at a time")
    a = p.parse_args(argv)
    if a.questions:
        questions("out/report/questions")
    else:
        report(a.model, f"out/report/{a.model}")


if __name__ == "__main__":
    cli(main)
