"""
The paper's experiment on the toy world, and plots of any runs. Repeated after a stop, it trains what is missing.

    python -m extras.report                     # Table 1 and Figure 1, in out/report/toy
    python -m extras.report --model toy-naive   # the same under the naive expert; or stories260K, on real text
    python -m extras.report --ablations         # one setting of SPO changed at a time, in out/report/ablations
    python -m extras.report --compare           # SPO and DPO side by side, a few minutes, in out/compare
    python -m extras.report --plot out/A out/B --out plot.png
"""
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from extras.judge import best_evaluation, read_evaluations, read_log
from model import Parser, UserError, atomic_write, file_hash, run_main
from spo import MODELS

# Each method is tuned over four settings by its mean peak on tuning seeds; the best one runs on other seeds. The peak
# is the best evaluation of the first steps, with a KL within --max_kl; that model is evaluated again on 1,000 fresh
# samples, since the highest of several is biased upwards. Training then continues to OVERTRAIN times as many steps.
OVERTRAIN = 5
TOY_GRID = {
    "spo": [f"--algo spo --alpha {alpha} --beta 0.05 --num_rollouts 8 --lr {lr}"
            for alpha in (0.1, 0.3) for lr in ("4e-4", "6e-4")],
    "dpo": [f"--algo dpo --beta {beta} --lr {lr}" for beta in (0.1, 0.3) for lr in ("4e-4", "6e-4")],
    "ipo": [f"--algo ipo --beta {beta} --lr {lr}" for beta in (0.03, 0.1) for lr in ("4e-4", "6e-4")],
    "slic": [f"--algo slic --delta 10 --beta {beta} --lr {lr}" for beta in (0.1, 0.3) for lr in ("4e-4", "6e-4")],
}
REAL_GRID = {
    "spo": [f"--algo spo --alpha 0.01 --beta {beta} --lr {lr}" for beta in (0.3, 0.5) for lr in ("2e-5", "5e-5")],
    "dpo": [f"--algo dpo --beta {beta} --lr {lr}" for beta in (0.1, 0.3) for lr in ("2e-5", "5e-5")],
    "ipo": [f"--algo ipo --beta {beta} --lr {lr}" for beta in (0.03, 0.1) for lr in ("2e-5", "5e-5")],
    "slic": [f"--algo slic --delta 10 --beta {beta} --lr {lr}" for beta in (0.3, 1) for lr in ("2e-5", "5e-5")],
}
JUDGE = {"stories260K": " --judge readability"}  # where it is not the model's default
# Model -> steps, tuning seeds, seeds, settings
PROTOCOLS = {"toy": (300, (100, 101), (0, 1, 2, 3, 4), TOY_GRID),
             "toy-naive": (300, (100, 101), (0, 1, 2, 3, 4), TOY_GRID),
             "stories260K": (60, (100,), (0, 1, 2), REAL_GRID)}
SPO = "--algo spo --alpha 0.3 --beta 0.05 --num_rollouts 8 --lr 4e-4"  # Table 1's choice, which ablations change
ABLATIONS = ["", "--beta 0", "--beta 0.01", "--beta 0.2", "--beta 1", "--beta 0.001 --alpha 0.01",
             "--beta 0.001 --alpha 0.1", "--beta 0.001 --alpha 1", "--algo dpo --beta 0.001 --lr 4e-4",
             "--gamma 0.03", "--gamma 0.1", "--gamma 0.3", "--gamma 1", "--rollout_every 1", "--rollout_every 32",
             "--num_rollouts 32", "--num_rollouts 128"]
# Field of an evaluation -> digits; the last two are the readability judge's
COLUMNS = {"step": 0, "win_rate": 3, "kl": 1, "entropy": 1, "length": 1, "unknown_words": 3, "unseen_trigrams": 3}
LINES = (("black", "-", "o"), ("C0", "--", "s"), ("C1", "-.", "^"), ("C4", ":", "D"))  # color, style, marker
# For `make compare`, past their peaks: the README's first command, and the settings of SPO and DPO that fall least
COMPARE = ("--algo spo --alpha 0.01", "--algo spo --alpha 0.3 --lr 4e-4", "--algo dpo --beta 0.3 --lr 4e-4")
COMPARE_STEPS = 1000
KL_BANDS = (1, 2, 4, 6, 8, 10, 15, 25)  # where one band of KL ends and the next begins, nats per story


def run_program(*argv):
    """Runs one of our programs on one CPU thread. Its output is not shown, but for the error if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *argv], env=env, text=True, capture_output=True)
    if done.returncode != 0:
        raise UserError(f"{' '.join(argv)} failed: {done.stderr}")


def write_text(path, text):
    with atomic_write(path) as f:
        f.write(text.encode())


def same_data(data, folder):
    """Raises UserError if the runs in `folder` were trained on other files than `data` holds now."""
    if not os.path.exists(f"{data}/ref.npy"):
        raise UserError(f"{data}/ref.npy does not exist: create {data} with `make data` first.")
    hashes = {name: file_hash(f"{data}/{name}") for name in ("sft.pt", "pairs.npy", "ref.npy")}
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/data.json"):
        write_text(f"{folder}/data.json", json.dumps(hashes, indent=1))
    with open(f"{folder}/data.json") as f:
        if json.load(f) != hashes:
            raise UserError(f"the runs in {folder} are on other data than {data} holds now: move {folder} away.")


def train_until(steps, flags, folder, max_kl=math.inf):
    """Trains to so many steps, resuming a run that was stopped or is shorter -> the run's own folder."""
    out = f"{folder}/{'-'.join(flags.replace('--', '').split()[1:])}"
    argv = ["spo.py", *flags.split(), "--steps", str(steps), "--out", out]
    if not os.path.exists(f"{out}/ckpt.pt"):
        run_program(*argv)
    elif max((r["step"] for r in read_evaluations(out)), default=-1) < steps:
        run_program(*argv, "--resume")
    best = best_evaluation(out, max_kl)
    print(f"peak {best['win_rate']:.3f} at step {best['step']}: {os.path.basename(out)}", flush=True)
    return out


def report(model, folder):
    """Makes in `folder` every run, table.md and figure1.png."""
    same_data(f"data/{model}", folder)
    steps, tuning_seeds, seeds, grid = PROTOCOLS[model]
    max_kl, of_model = MODELS[model]["max_kl"], f"--model {model}{JUDGE.get(model, '')}"

    def tune(flags):
        runs = [train_until(steps, f"{flags} {of_model} --seed {seed}", folder, max_kl) for seed in tuning_seeds]
        return np.mean([best_evaluation(out, max_kl)["win_rate"] for out in runs])

    def run(flags):
        out = train_until(steps, flags, folder, max_kl)
        if not os.path.exists(f"{out}/peak.json"):  # now, before best.pt is a later model
            run_program("-m", "extras.judge", f"{out}/best.pt", *flags.split())
            with open(f"{out}/evaluations.jsonl") as f:
                peak = json.loads(f.readlines()[-1]) | {"step": best_evaluation(out, max_kl)["step"]}
            write_text(f"{out}/peak.json", json.dumps(peak, indent=1))
        train_until(OVERTRAIN * steps, flags, folder, max_kl)
        with open(f"{out}/peak.json") as f:
            return json.load(f), read_evaluations(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        means = {algo: pool.map(tune, settings) for algo, settings in grid.items()}     # map starts them all
        tuned = {algo: settings[np.argmax(list(means[algo]))] for algo, settings in grid.items()}
        chosen = [f"{flags} {of_model} --seed {seed}" for flags in tuned.values() for seed in seeds]
        results = list(pool.map(run, chosen))
    runs = {algo: results[i * len(seeds):(i + 1) * len(seeds)] for i, algo in enumerate(tuned)}
    write_text(f"{folder}/table.md", table(runs, tuned, steps) + "\n" + winrate_by_kl(runs))
    figure(runs, f"{folder}/figure1.png")
    print(f"{folder}/table.md and figure1.png are written")


def ablations(folder):
    """Makes in `folder` the runs of ABLATIONS, on one seed, and table.md."""
    same_data("data/toy", folder)
    columns = ("step", "win_rate", "kl", "entropy", "length")
    rows = [["changed", "evaluation", *columns, "ms per step"]]
    all_flags = [change if change.startswith("--algo") else f"{SPO} {change}" for change in ABLATIONS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = list(pool.map(lambda flags: train_until(PROTOCOLS["toy"][0], flags, folder), all_flags))
    for change, out in zip(ABLATIONS, folders):
        ms = np.median([r["ms"] for r in read_log(out) if "loss" in r])
        for name, r in (("peak", best_evaluation(out)), ("last", read_evaluations(out)[-1])):
            cells = [f"{r[column]:.{COLUMNS[column]}f}" for column in columns]
            rows.append([f"`{change or SPO}`", name, *cells, f"{ms:.0f}"])
    write_text(f"{folder}/table.md", markdown(rows))
    print(f"{folder}/table.md is written")


def compare(folder):
    """Trains the runs of COMPARE side by side; prints a table and draws compare.png."""
    same_data("data/toy", folder)

    def run(flags):
        return train_until(COMPARE_STEPS, flags, folder)

    runs = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for flags, out in zip(COMPARE, pool.map(run, COMPARE)):
            runs[" ".join(flags.replace("--", "").split()[1:])] = [(best_evaluation(out), read_evaluations(out))]
    print("\n                      best                last")
    print("                      win_rate (step) kl  win_rate (step) kl")
    for name, [(best, evaluations)] in runs.items():
        cells = [f"{r['win_rate']:.3f} ({r['step']:4d}) {r['kl']:5.1f}" for r in (best, evaluations[-1])]
        print(f"{name:22s}{cells[0]}  {cells[1]}")
    figure(runs, f"{folder}/compare.png")
    print(f"{folder}/compare.png is written")


# Tables and figures. runs: method -> for each seed, its peak's record and the evaluations during training
def markdown(rows):
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def mean_se(values, digits):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def table(runs, tuned, steps):
    """Table 1: means and standard errors over the seeds; leads are paired by seed. tuned: method -> flags."""
    names = ["peak", f"step {steps}", f"{OVERTRAIN}x the peak's step", f"step {OVERTRAIN * steps}"]
    columns = {name: digits for name, digits in COLUMNS.items() if name in runs["spo"][0][0]}
    rows = [["method", "evaluation", *columns, "SPO's lead"]]
    for i, name in enumerate(names):
        for algo, seeds in runs.items():                                            # "spo" comes first
            records = []
            for peak, evaluations in seeds:
                at = {r["step"]: r for r in evaluations}
                records.append((peak, at[steps], at[OVERTRAIN * peak["step"]], at[OVERTRAIN * steps])[i])
            win_rate = np.array([r["win_rate"] for r in records])
            if algo == "spo":
                spo, lead = win_rate, ""
            else:
                lead = mean_se(spo - win_rate, 3)
            cells = [mean_se([r[column] for r in records], digits) for column, digits in columns.items()]
            rows.append([f"`{tuned[algo].removeprefix('--algo ')}`", name, *cells, lead])
    return markdown(rows)


def winrate_by_kl(runs):
    """The mean win rate of all seeds' evaluations in each band of KL, and in parentheses how many there are."""
    middle = [f"{low} to {high}" for low, high in zip(KL_BANDS, KL_BANDS[1:])]
    rows = [["kl", f"below {KL_BANDS[0]}", *middle, f"{KL_BANDS[-1]} and more"]]
    for algo, seeds in runs.items():
        bands = [[] for _ in rows[0][1:]]
        for _, evaluations in seeds:
            for r in evaluations:
                bands[np.digitize(r["kl"], KL_BANDS)].append(r["win_rate"])
        rows.append([f"`{algo}`", *(f"{np.mean(band):.3f} ({len(band)})" if band else "-" for band in bands)])
    return markdown(rows)


def figure(runs, path):
    """Win rate and KL against steps, win rate against KL; means over seeds, shaded: standard deviations."""
    try:
        import matplotlib.pyplot as plt  # here, because nothing else needs it
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("figures need matplotlib: run `make plot` or `pip install matplotlib==3.11.2`.") from None
    plt.switch_backend("Agg")
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.2 + 0.2 * len(runs)), layout="constrained")
    for i, (name, seeds) in enumerate(runs.items()):
        values = [[[r["step"], r["win_rate"], r["kl"]] for r in evaluations] for _, evaluations in seeds]
        step, win_rate, kl = np.array(values, float).transpose(2, 0, 1)             # (seeds, evaluations)
        color, line, marker = LINES[i % len(LINES)]                                 # which differ in grey, too
        style = {"color": color, "marker": marker, "ms": 5}
        for ax, y in ((axes[0], win_rate), (axes[1], kl)):
            mean, deviation = y.mean(0), y.std(0, ddof=min(1, len(y) - 1))
            ax.plot(step[0], mean, label=name, markevery=max(1, len(mean) // 8), ls=line, **style)
            ax.fill_between(step[0], mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)
        axes[2].plot(kl.flatten(), win_rate.flatten(), ls="", mfc="none", alpha=0.7, **style)
    for ax, x, y in zip(axes, ("step", "step", "KL (nats)"), ("win rate", "KL (nats)", "win rate")):
        ax.set(xlabel=x, ylabel=y)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
        if y == "win rate":
            ax.axhline(0.5, color="grey", lw=1.5, label="0.5: level with the reference")
    text = "one seed per curve"
    if len(seeds) > 1:
        text = f"mean of {len(seeds)} seeds; band: standard deviation over seeds"
    fig.suptitle(f"{text}; right: every evaluation", fontsize=10)
    fig.legend(handles=axes[0].lines, loc="outside lower center", ncols=max(1, 80 // max(map(len, runs))))
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=120)


def main(argv=None):
    p = Parser(description="Table 1 and Figure 1, ablations, or plots.")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--model", choices=PROTOCOLS, default="toy", help="whose data and judge Table 1 is of")
    which.add_argument("--ablations", action="store_true", help="change one setting of SPO at a time")
    which.add_argument("--compare", action="store_true", help="two SPO runs and DPO, past their peaks")
    which.add_argument("--plot", nargs="+", metavar="RUN", help="plot the evaluations of these runs' folders")
    p.add_argument("--out", help="the PNG that --plot writes (default: plot.png)")
    args = p.parse_args(argv)
    if args.out and not args.plot:
        p.error("--out is the PNG that --plot writes")
    if args.plot:
        runs = {out: [(best_evaluation(out), read_evaluations(out))] for out in args.plot}
        figure(runs, args.out or "plot.png")
        print(f"{args.out or 'plot.png'} is written")
    elif args.compare:
        compare("out/compare")
    elif args.ablations:
        ablations("out/report/ablations")
    else:
        report(args.model, f"out/report/{args.model}")


if __name__ == "__main__":
    run_main(main)
