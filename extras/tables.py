"""
Tables and figures of finished runs, and the statistics in them. A run here is (peak, evaluations): the record of its
best model on fresh samples, and the evaluations during training. A method has one run for each world.

    python -m extras.tables out/A out/B --out plot.png    # win rate and KL of any runs' folders
"""

import itertools

import numpy as np

from extras.judge import best_evaluation, read_evaluations
from model import Parser, UserError, atomic_write, run_main

# Student's t at 97.5 % for n values, n - 1 degrees of freedom
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
# Field of an evaluation -> digits in a table; the last two are the readability judge's
FIELDS = {"step": 0, "win_rate": 3, "win_rate_lc": 3, "kl": 1, "entropy": 1, "length": 1, "heldout_accuracy": 3,
          "unknown_words": 3, "unseen_trigrams": 3}
KL_BANDS = (1, 2, 4, 6, 8, 10, 15, 25)  # where one band of KL ends and the next begins, nats per story
LINES = (("black", "-", "o"), ("C0", "--", "s"), ("C1", "-.", "^"), ("C4", ":", "D"), ("C2", (0, (5, 1, 1, 1)), "v"),
         ("C5", (0, (1, 3)), "P"))  # color, line style, marker: they differ in grey, too


# ---------------------------------------------------------------------------------------------------
# Statistics

def mean_ci(values):
    """The mean of values, one for each world, and the half-width of its 95 % t interval."""
    half_width = T_95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values), half_width


def show_ci(values, digits):
    mean, half_width = mean_ci(values)
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}"


def mean_over_training(evaluations):
    """The mean win rate of all evaluations but that of step 0."""
    return np.mean([r["win_rate"] for r in evaluations if r["step"] > 0])


# ---------------------------------------------------------------------------------------------------
# Tables

def markdown(rows):
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def table(runs, late):
    """
    Means over the worlds with 95 % t intervals, at the peak and at step `late`; SPO's leads, or those of the first
    method, are paired by world. runs: method -> (its flags, its runs).
    """
    first, (_, worlds) = next(iter(runs.items()))
    fields = {name: digits for name, digits in FIELDS.items() if name in worlds[0][1][-1]}
    rows = [["method", "evaluation", *fields, f"lead of {first}"]]
    for when in ("peak", f"step {late}"):
        for method, (flags, worlds) in runs.items():
            records = [peak for peak, _ in worlds]
            if when != "peak":
                records = [r for _, evaluations in worlds for r in evaluations if r["step"] == late]
            win_rate = np.array([r["win_rate"] for r in records])
            if method == first:
                win_rate_of_first, lead = win_rate, ""
            else:
                lead = show_ci(win_rate_of_first - win_rate, 3)
            cells = [show_ci([r[name] for r in records], digits) if name in records[0] else "-"
                     for name, digits in fields.items()]
            rows.append([f"{method}: `{flags}`", when, *cells, lead])
    return markdown(rows)


def sweep_table(tuned):
    """All settings, the best by peak first. tuned: method -> records with flags, peak, step, kl, mean, last."""
    rows = [["method", "setting", "peak", "at step", "KL", "mean over training", "last"]]
    for method, records in tuned.items():
        for r in sorted(records, key=lambda r: -r["peak"]):
            rows.append([method, f"`{r['flags']}`", f"{r['peak']:.3f}", str(r["step"]), f"{r['kl']:.1f}",
                         f"{r['mean']:.3f}", f"{r['last']:.3f}"])
    return markdown(rows)


def curves_table(curves):
    """Win rates against what was varied. curves: method -> x -> a win rate for each world."""
    rows = [["method", *map(str, next(iter(curves.values())))]]
    rows += [[method, *(show_ci(values, 3) for values in points.values())] for method, points in curves.items()]
    return markdown(rows)


def winrate_by_kl(runs):
    """The mean win rate of all evaluations in each band of KL, and in parentheses how many there are."""
    middle = [f"{low} to {high}" for low, high in zip(KL_BANDS, KL_BANDS[1:])]
    rows = [["kl", f"below {KL_BANDS[0]}", *middle, f"{KL_BANDS[-1]} and more"]]
    for method, (_, worlds) in runs.items():
        bands = [[] for _ in rows[0][1:]]
        for _, evaluations in worlds:
            for r in evaluations:
                bands[np.digitize(r["kl"], KL_BANDS)].append(r["win_rate"])
        rows.append([method, *(f"{np.mean(band):.3f} ({len(band)})" if band else "-" for band in bands)])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------
# Figures

def import_pyplot():
    try:
        import matplotlib.pyplot as plt  # here, because nothing else needs it
    except ImportError:
        raise UserError("figures need matplotlib: run `make plot` or `pip install matplotlib==3.11.2`.") from None
    plt.switch_backend("Agg")
    return plt


def save_figure(fig, path):
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=120)


def label_curves(ax, x, ends):
    """Writes the names of curves at their ends, moved up where they would touch. ends: (name, color, y) at x."""
    low, high = ax.get_ylim()
    ax.set_xlim(right=1.32 * x)
    at_least = low
    for name, color, y in sorted(ends, key=lambda end: end[2]):
        y = max(y, at_least)
        ax.text(x, y, f" {name}", color=color, fontsize=8, va="center")
        at_least = y + 0.055 * (high - low)


def figure(runs, path):
    """
    Win rate and KL against steps, win rate against KL: means over the runs, shaded: standard deviations. runs: name ->
    its runs.
    """
    plt = import_pyplot()
    from matplotlib.ticker import MaxNLocator
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4 + 0.1 * len(runs)), layout="constrained")
    ends = []
    for (name, worlds), (color, line, marker) in zip(runs.items(), itertools.cycle(LINES)):
        values = [[[r["step"], r["win_rate"], r["kl"]] for r in evaluations] for _, evaluations in worlds]
        step, win_rate, kl = np.array(values, float).transpose(2, 0, 1)             # (runs, evaluations)
        style = {"color": color, "ls": line, "marker": marker, "ms": 4, "markevery": max(1, len(step[0]) // 6)}
        for ax, y in ((axes[0], win_rate), (axes[1], kl)):
            mean, deviation = y.mean(0), y.std(0, ddof=min(1, len(y) - 1))
            ax.plot(step[0], mean, label=name, **style)
            ax.fill_between(step[0], mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)
        axes[2].plot(kl.mean(0), win_rate.mean(0), **style)
        ends.append((name, color, win_rate.mean(0)[-1], kl.mean(0)[-1]))
    for ax, x, y in zip(axes, ("step", "step", "KL (nats)"), ("win rate", "KL (nats)", "win rate")):
        ax.set(xlabel=x, ylabel=y)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
        if y == "win rate":
            ax.axhline(0.5, color="grey", lw=1.5, label="0.5: level with the reference")
    text = "one run per curve" if len(worlds) == 1 else f"mean of {len(worlds)} runs; band: standard deviation"
    fig.suptitle(f"{text}; right: the same evaluations", fontsize=10)
    if max(map(len, runs)) <= 16:
        label_curves(axes[0], step[0, -1], [(name, color, y) for name, color, y, _ in ends])
        label_curves(axes[1], step[0, -1], [(name, color, y) for name, color, _, y in ends])
    else:
        fig.legend(handles=axes[0].lines, loc="outside lower center", ncols=max(1, 90 // max(map(len, runs))))
    save_figure(fig, path)


def draw_sweep(tuned, steps, path):
    """Every setting: its win rate at the last step against its peak. tuned: method -> records with peak and last."""
    plt = import_pyplot()
    fig, ax = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for (method, records), (color, _, marker) in zip(tuned.items(), LINES):
        ax.plot([r["peak"] for r in records], [r["last"] for r in records], label=f"{method} ({len(records)})", ls="",
                marker=marker, mfc="none", color=color)
    ax.axline((0.6, 0.6), slope=1, color="grey", lw=1)  # no fall from the peak
    ax.set(xlabel=f"peak win rate within {steps} steps", ylabel=f"win rate at step {steps}")
    ax.grid(alpha=0.3)
    ax.legend()
    save_figure(fig, path)


def draw_curves(panels, path):
    """Win rates with 95 % t intervals. panels: what is varied -> method -> x -> a win rate for each world."""
    plt = import_pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for ax, (label, curves) in zip(axes[0], panels.items()):
        for (method, points), (color, line, marker) in zip(curves.items(), LINES):
            means, half_widths = zip(*map(mean_ci, points.values()))
            ax.errorbar(list(points), means, half_widths, label=method, color=color, ls=line, marker=marker, ms=4,
                        capsize=3)
        if min(points) > 0:
            ax.set_xscale("log")
            ax.set_xticks(list(points), list(map(str, points)), minor=False)
            ax.minorticks_off()
        ax.set(xlabel=label, ylabel="win rate")
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(fig, path)


def main(argv=None):
    p = Parser(description="Plot the evaluations of runs.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    p.add_argument("--out", default="plot.png", help="the PNG to write (default: plot.png)")
    args = p.parse_args(argv)
    runs = {out: [(best_evaluation(out), read_evaluations(out))] for out in args.runs}
    figure(runs, args.out)
    print(f"{args.out} is written")


if __name__ == "__main__":
    run_main(main)
