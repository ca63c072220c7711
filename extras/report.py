"""
The paper's experiment by the paper's protocol, and questions it leaves open. Repeated after a stop, each command trains
what is missing.

    python -m extras.report                     # Appendix E.2's sweep, Table 1 and Figure 1: out/report/toy
    python -m extras.report --model toy-naive   # the same under the naive expert; or stories260K, on real text
    python -m extras.report --ablations         # then: where the KL is, kinds of feedback, noise, data and model size
    python -m extras.report --compare           # SPO and DPO side by side, a few minutes, in out/compare
"""
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from extras import toyworld
from extras.judge import best_evaluation, read_evaluations
from extras.tables import (curves_table, draw_curves, draw_sweep, figure, mean_over_training, sweep_table, table,
                           winrate_by_kl)
from model import Parser, UserError, atomic_write, file_hash, format_time, run_main
from spo import MODELS

# ---------------------------------------------------------------------------------------------------
# The protocol. Everything random of a toy world is drawn from one seed: stories, SFT model, pairs, training. A method
# is tuned on a world of its own. First its middle setting runs at each learning rate; at the one with the highest peak
# all its settings run. Rule "peak" chooses the setting with the highest win rate of an evaluation, rule "mean" the one
# with the highest mean win rate over training. The chosen ones run on other worlds, as long: the best model is
# evaluated again, on 1,000 fresh samples, since the highest of several is biased upwards; then to the last step.

ALPHAS, DELTAS = (0.001, 0.003, 0.01, 0.03, 0.1), (0, 0.001, 0.01, 0.1, 1, 10)
BETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
LRS = ("2e-4", "4e-4", "8e-4")
RULES = ("peak", "mean")
# Method -> its middle setting, all of its settings; alpha, beta and delta are E.2's
TOY_GRID = {
    "SPO": ("--algo spo --alpha 0.01 --beta 0.03",
            [f"--algo spo --alpha {alpha} --beta {beta}" for alpha in ALPHAS for beta in BETAS]),
    "DPO": ("--algo dpo --beta 0.03", [f"--algo dpo --beta {beta}" for beta in BETAS]),
    "IPO": ("--algo ipo --beta 0.03", [f"--algo ipo --beta {beta}" for beta in BETAS]),
    "SLiC-HF": ("--algo slic --delta 0.1 --beta 0.03",
                [f"--algo slic --delta {delta} --beta {beta}" for delta in DELTAS for beta in BETAS]),
    "RLHF": ("--reward model --beta 0.03", [f"--reward model --beta {beta}" for beta in BETAS]),
    "RL, true reward": ("--reward judge --beta 0.03", [f"--reward judge --beta {beta}" for beta in BETAS]),
}
# Of {reference inside the loss} x {KL on the model's own samples} SPO and DPO are two; these are the other two
WHY_GRID = {
    "SPO, no KL": ("--algo spo --alpha 0.01 --beta 0", [f"--algo spo --alpha {alpha} --beta 0" for alpha in ALPHAS]),
    "DPO + KL": ("--algo hypo --beta 0.1 --beta_kl 0.003",
                 [f"--algo hypo --beta {beta} --beta_kl {beta_kl}"
                  for beta in (0.03, 0.1, 0.3) for beta_kl in (0.001, 0.003, 0.01)]),
}
# On real text the learning rates are two for each of two settings
REAL_GRID = {
    "SPO": (None, [f"--algo spo --alpha 0.01 --beta {beta} --lr {lr}"
                   for beta in (0.3, 0.5) for lr in ("2e-5", "5e-5")]),
    "DPO": (None, [f"--algo dpo --beta {beta} --lr {lr}" for beta in (0.1, 0.3) for lr in ("2e-5", "5e-5")]),
    "IPO": (None, [f"--algo ipo --beta {beta} --lr {lr}" for beta in (0.03, 0.1) for lr in ("2e-5", "5e-5")]),
    "SLiC-HF": (None, [f"--algo slic --delta 10 --beta {beta} --lr {lr}"
                       for beta in (0.3, 1) for lr in ("2e-5", "5e-5")]),
}
TUNING_SEED = 100
# Model -> steps, last step, seeds, methods
PROTOCOLS = {"toy": (500, 1000, (0, 1, 2, 3, 4), TOY_GRID), "toy-naive": (500, 1000, (0, 1, 2, 3, 4), TOY_GRID),
             "stories260K": (60, 300, (0, 1, 2), REAL_GRID)}
JUDGE = {"toy": "toy", "toy-naive": "toy-naive", "stories260K": "readability"}
# For `make compare`, past their peaks: the README's first command, and the settings of SPO and DPO that fall least
COMPARE = ("--algo spo --alpha 0.01", "--algo spo --alpha 0.3 --lr 4e-4", "--algo dpo --beta 0.3 --lr 4e-4")
COMPARE_STEPS = 1000


# ---------------------------------------------------------------------------------------------------
# Running programs

def lock(folder):
    """
    An open file with a lock that the programs started from here inherit: a second report does not start while another
    one, or a program that it left behind when it was killed, still writes to folder.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "w")
    os.set_inheritable(file.fileno(), True)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another report, or a program it started, is writing to {folder}: wait for it.") from None
    return file


def run_program(*argv):
    """Runs one of our programs on one CPU thread. Its output is not shown, but for the error if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *argv], env=env, text=True, capture_output=True, close_fds=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(argv)} failed: {done.stderr}")


def run_all(title, function, items):
    """function of each item, as many at a time as there are cores -> list. Prints what is done and the time left."""
    start, done, lock = time.monotonic(), [], threading.Lock()

    def run(item):
        result = function(item)
        with lock:
            done.append(item)
            seconds_left = (time.monotonic() - start) / len(done) * (len(items) - len(done))
            print(f"{title}: {len(done)} of {len(items)}, {format_time(seconds_left)} left", flush=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, items))


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


def run_name(flags):
    """The name of a run's folder: --algo spo --alpha 0.01 gives spo-alpha-0.01."""
    return "-".join(flags.replace("--", "").split()[1:])


def train_until(steps, flags, out, settings=""):
    """Trains to so many steps in the folder out, resuming a run that was stopped or is shorter -> its evaluations."""
    program = ["-m", "extras.rlhf"] if flags.startswith("--reward") else ["spo.py"]
    argv = [*program, *flags.split(), *settings.split(), "--steps", str(steps), "--out", out]
    if not os.path.exists(f"{out}/ckpt.pt"):
        run_program(*argv)
    elif max((r["step"] for r in read_evaluations(out)), default=-1) < steps:
        run_program(*argv, "--resume")
    return read_evaluations(out)


class World:
    """
    A data folder, and the folder of its runs in `folder`. The toy world is made for each seed, with more settings of
    prepare_data.py in `changed`; of other models all seeds share one folder.
    """

    def __init__(self, model, folder, seed, changed=""):
        self.model, self.changed = model, changed
        self.runs, self.data = f"{folder}/seed{seed}{changed.replace(' ', '')}", f"data/{model}"
        if model in toyworld.TASTES:
            self.data += f"-seed{seed}{changed.replace(' ', '')}"
        self.settings = f"--model {model} --data {self.data} --judge {JUDGE[model]} --seed {seed}"
        self.seed = seed

    def prepare(self):
        if self.model in toyworld.TASTES:
            changed = self.changed or "--reward_steps 1000"  # for RLHF
            run_program("prepare_data.py", self.model, "--data", self.data, "--seed", str(self.seed), *changed.split())
        same_data(self.data, self.runs)

    def train(self, flags, steps):
        """-> the run's folder, its evaluations."""
        out = f"{self.runs}/{run_name(flags)}"
        return out, train_until(steps, flags, out, self.settings)

    def train_past_the_peak(self, flags, steps, late):
        """-> the record on fresh samples of the best model within `steps`, all evaluations to the step `late`."""
        out, _ = self.train(flags, steps)
        if not os.path.exists(f"{out}/peak.json"):  # now, before best.pt is a later model
            run_program("-m", "extras.judge", f"{out}/best.pt", *self.settings.split())
            with open(f"{out}/evaluations.jsonl") as f:
                peak = json.loads(f.readlines()[-1])
            peak["step"] = best_evaluation(out, MODELS[self.model]["max_kl"])["step"]
            write_text(f"{out}/peak.json", json.dumps(peak, indent=1))
        _, evaluations = self.train(flags, late)
        with open(f"{out}/peak.json") as f:
            return json.load(f), evaluations


# ---------------------------------------------------------------------------------------------------
# Table 1

def tune(model, methods, folder):
    """Runs every setting on the tuning world -> method -> its records: flags, peak and when, mean and last win rate."""
    steps, max_kl = PROTOCOLS[model][0], MODELS[model]["max_kl"]
    world = World(model, folder, TUNING_SEED)
    world.prepare()

    def run(flags):
        out, evaluations = world.train(flags, steps)
        evaluations = [r for r in evaluations if r["step"] <= steps]
        peak = best_evaluation(out, max_kl)
        return dict(flags=flags, peak=peak["win_rate"], step=peak["step"], kl=peak["kl"],
                    mean=mean_over_training(evaluations), last=evaluations[-1]["win_rate"])

    trials = [f"{middle} --lr {lr}" for middle, _ in methods.values() if middle for lr in LRS]
    peaks = {record["flags"]: record["peak"] for record in run_all("learning rates", run, trials)}
    settings = {}
    for method, (middle, settings[method]) in methods.items():
        if middle:
            best = max((f"{middle} --lr {lr}" for lr in LRS), key=peaks.get)
            settings[method] = [f"{flags} --lr {best.split()[-1]}" for flags in settings[method]]
    records = iter(run_all("sweep", run, sum(settings.values(), [])))
    return {method: [next(records) for _ in settings[method]] for method in methods}


def compare_methods(model, methods, folder):
    """
    Tunes the methods, and runs what each rule chooses on other worlds -> tune's records, and rule -> method -> (flags,
    for each world the peak's record and all evaluations).
    """
    steps, late, seeds, _ = PROTOCOLS[model]
    tuned = tune(model, methods, folder)
    chosen = {rule: {method: max(records, key=lambda record: record[rule])["flags"]
                     for method, records in tuned.items()} for rule in RULES}
    worlds = [World(model, folder, seed) for seed in seeds]
    run_all("worlds", World.prepare, worlds)
    jobs = list(dict.fromkeys((flags, world) for rule in RULES for flags in chosen[rule].values() for world in worlds))
    done = run_all("runs", lambda job: job[1].train_past_the_peak(job[0], steps, late), jobs)
    results = dict(zip(jobs, done))
    runs = {rule: {method: (flags, [results[flags, world] for world in worlds])
                   for method, flags in chosen[rule].items()} for rule in RULES}
    return tuned, runs


def report(model, folder):
    """Makes in `folder` every run, table.md, sweep.md, sweep.png and a figure for each rule."""
    steps, late, _, methods = PROTOCOLS[model]
    tuned, runs = compare_methods(model, methods, folder)
    text = ""
    for rule in RULES:
        text += f"Settings chosen by the rule {rule}\n\n{table(runs[rule], late)}\n{winrate_by_kl(runs[rule])}\n"
        figure({method: worlds for method, (_, worlds) in runs[rule].items()}, f"{folder}/{rule}.png")
    write_text(f"{folder}/table.md", text)
    write_text(f"{folder}/sweep.md", sweep_table(tuned))
    draw_sweep(tuned, steps, f"{folder}/sweep.png")
    print(f"{folder} has table.md, sweep.md, sweep.png, {' and '.join(f'{rule}.png' for rule in RULES)}")


# ---------------------------------------------------------------------------------------------------
# Ablations, on the worlds of Table 1

# Section 9's questions -> settings of prepare_data.py, by what is on the x axis; "" is the world of Table 1
QUESTIONS = {"share of labels flipped": {0: "", **{p: f"--label_noise {p}" for p in (0.1, 0.2, 0.4)}},
             "preference pairs": {4000: "", **{n: f"--num_pairs {n}" for n in (500, 2000, 16000)}},
             "width of the model": {64: "", 32: "--dim 32", 128: "--dim 128"}}
QUESTION_SEEDS = (0, 1, 2)


def changes(spo):
    """One change at a time of the tuned SPO's flags: kinds of feedback, weights, rollouts -> name -> flags."""
    others = {algo: spo.replace("--algo spo", f"--algo {algo}") for algo in ("best_of_n", "ranked")}
    flags = ("--gamma 0.1", "--gamma 0.3", "--rollout_every 1", "--rollout_every 32", "--num_rollouts 32")
    return {"none": spo, **others, **{change: f"{spo} {change}" for change in flags}}


def ask_questions(chosen, folder):
    """QUESTIONS, with the tuned flags of each method -> for each, method -> x -> the peak's win rate in each world."""
    steps, curves = PROTOCOLS["toy"][0], {}
    worlds = {changed: [World("toy", folder, seed, changed) for seed in QUESTION_SEEDS]
              for question in QUESTIONS.values() for changed in question.values()}
    run_all("changed worlds", World.prepare, sum(worlds.values(), []))
    jobs = [(flags, world) for group in worlds.values() for world in group for flags in chosen.values()]
    done = run_all("changed worlds' runs", lambda job: job[1].train_past_the_peak(job[0], steps, steps), jobs)
    win_rates = {job: peak["win_rate"] for job, (peak, _) in zip(jobs, done)}
    for question, settings in QUESTIONS.items():
        curves[question] = {method: {x: [win_rates[flags, world] for world in worlds[changed]]
                                     for x, changed in sorted(settings.items())} for method, flags in chosen.items()}
    return curves


def ablations(folder):
    """Makes ablations.md, why.png and questions.png in the folder of Table 1; changes what the rule "mean" chose."""
    steps, late, seeds, _ = PROTOCOLS["toy"]
    _, why = compare_methods("toy", {"SPO": TOY_GRID["SPO"], "DPO": TOY_GRID["DPO"], **WHY_GRID}, folder)
    text = "".join(f"Settings chosen by the rule {rule}\n\n{table(why[rule], late)}\n" for rule in RULES)
    figure({method: worlds for method, (_, worlds) in why["mean"].items()}, f"{folder}/why.png")

    worlds = [World("toy", folder, seed) for seed in seeds]
    flags_of = changes(why["mean"]["SPO"][0])
    jobs = [(flags, world) for flags in flags_of.values() for world in worlds]
    done = iter(run_all("changes", lambda job: job[1].train_past_the_peak(job[0], steps, steps), jobs))
    text += table({name: (flags, [next(done) for _ in worlds]) for name, flags in flags_of.items()}, steps) + "\n"

    _, runs = compare_methods("toy", {method: TOY_GRID[method] for method in ("SPO", "DPO", "IPO", "SLiC-HF")}, folder)
    chosen = {method: flags for method, (flags, _) in runs["mean"].items()}
    curves = ask_questions(chosen, folder)
    text += "".join(f"{question}\n\n{curves_table(methods)}\n" for question, methods in curves.items())
    draw_curves(curves, f"{folder}/questions.png")
    write_text(f"{folder}/ablations.md", text)
    print(f"{folder} has ablations.md, why.png and questions.png")


# ---------------------------------------------------------------------------------------------------
# A first comparison, on one seed

def compare(folder):
    """Trains the runs of COMPARE side by side; prints a table and draws compare.png."""
    same_data("data/toy", folder)

    def run(flags):
        return train_until(COMPARE_STEPS, flags, f"{folder}/{run_name(flags)}")

    runs = {}
    for flags, evaluations in zip(COMPARE, run_all("runs", run, COMPARE)):
        best = max(evaluations, key=lambda r: r["win_rate"])
        runs[" ".join(flags.replace("--", "").split()[1:])] = [(best, evaluations)]
    print("\n                      best                last")
    print("                      win_rate (step) kl  win_rate (step) kl")
    for name, [(best, evaluations)] in runs.items():
        cells = [f"{r['win_rate']:.3f} ({r['step']:4d}) {r['kl']:5.1f}" for r in (best, evaluations[-1])]
        print(f"{name:22s}{cells[0]}  {cells[1]}")
    figure(runs, f"{folder}/compare.png")
    print(f"{folder}/compare.png is written")


def main(argv=None):
    p = Parser(description="Table 1 and Figure 1, ablations, a first comparison.")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--model", choices=PROTOCOLS, default="toy", help="whose data and judge Table 1 is of")
    which.add_argument("--ablations", action="store_true", help="what the settings of SPO and the data do")
    which.add_argument("--compare", action="store_true", help="two SPO runs and DPO, past their peaks")
    args = p.parse_args(argv)
    folder = "out/compare" if args.compare else f"out/report/{args.model}"
    with lock(folder):
        if args.compare:
            compare(folder)
        elif args.ablations:
            ablations(folder)
        else:
            report(args.model, folder)


if __name__ == "__main__":
    run_main(main)
