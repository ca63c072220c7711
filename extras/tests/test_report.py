"""The report on made-up programs, so that every number is known; its statistics; the benchmark under a fake clock."""
import itertools
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from extras import bench, report, tables
from extras.judge import read_log
from model import UserError


def evaluation(step, win_rate, kl=2.0):
    return dict(step=step, win_rate=win_rate, kl=kl, entropy=40.0, length=60.0)


def write_run(folder, records):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
            if line.startswith("|") and "---" not in line]


# ---------------------------------------------------------------------------------------------------
# Statistics and tables

def test_the_interval_is_students():
    assert tables.mean_ci([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * 2.5 ** 0.5 / 5 ** 0.5))
    assert tables.mean_ci([1, 3]) == pytest.approx((2, 12.706))
    rng, covered = np.random.default_rng(0), []
    for _ in range(4000):  # 1.96 instead of 4.303 would cover 0.81
        mean, half_width = tables.mean_ci(rng.normal(size=3))
        covered.append(abs(mean) < half_width)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def made_up_runs():
    def worlds(first, *peaks):
        log = [evaluation(step, first + step / 10_000, step / 100) for step in range(0, 1001, 50)]
        return "--flags", [(evaluation(step, win_rate), log) for step, win_rate in peaks]
    return {"SPO": worlds(0.5, (100, 0.8), (200, 0.9)), "DPO": worlds(0.3, (100, 0.7), (100, 0.6))}


def test_table():
    heads, spo, dpo, late, dpo_late = cells(tables.table(made_up_runs(), 1000))
    assert dict(zip(heads, spo)) == {
        "method": "SPO: `--flags`", "evaluation": "peak", "step": "150 ± 635", "win_rate": "0.850 ± 0.635",
        "kl": "2.0 ± 0.0", "entropy": "40.0 ± 0.0", "length": "60.0 ± 0.0", "lead of SPO": ""}
    assert dpo[3] == "0.650 ± 0.635" and dpo[-1] == "0.200 ± 1.271"  # paired by world: 0.1 and 0.3
    assert late[1:4] == ["step 1000", "1000 ± 0", "0.600 ± 0.000"] and dpo_late[-1] == "0.200 ± 0.000"


def test_winrate_by_kl_counts_every_evaluation():
    log = [evaluation(0, i / 10, kl) for i, kl in enumerate([-1e-7, 0, 0.99, 1, 3.99, 4, 24.9, 25, 100, 1e6])]
    heads, row = cells(tables.winrate_by_kl({"SPO": ("", [(None, log)])}))
    assert heads[:3] + heads[-2:] == ["kl", "below 1", "1 to 2", "15 to 25", "25 and more"]
    assert row[1:] == ["0.100 (3)", "0.300 (1)", "0.400 (1)", "0.500 (1)", *"---", "0.600 (1)", "0.800 (3)"]


# ---------------------------------------------------------------------------------------------------
# The protocol

def test_the_grid_is_e2s_and_no_seed_is_tuned_on_and_reported():
    sizes = {method: len(set(settings)) for method, (_, settings) in report.TOY_GRID.items()}
    assert sizes == {"SPO": 35, "DPO": 7, "IPO": 7, "SLiC-HF": 42, "RLHF": 7, "RL, true reward": 7}
    for steps, late, seeds, methods in report.PROTOCOLS.values():
        assert report.TUNING_SEED not in seeds and steps < late
        for middle, settings in methods.values():
            assert middle is None or middle in settings


class FakePrograms:
    """
    Takes the place of run_program. Win rates follow from beta, learning rate and seed: on the tuning world 0.1 is best
    by its peak and 0.3 by its mean, if the learning rate is 4e-4; elsewhere a win rate is 0.6 + seed / 100.
    """

    def __init__(self):
        self.calls = []

    def __call__(self, *argv):
        self.calls.append(argv)
        flags = dict(zip(argv[1:], argv[2:]))
        if argv[0] == "prepare_data.py":
            os.makedirs(flags["--data"], exist_ok=True)
            for name in ("sft.pt", "pairs.npy", "ref.npy"):
                with open(f"{flags['--data']}/{name}", "w") as f:
                    f.write(flags["--seed"])
        elif argv[:2] == ("-m", "extras.judge"):
            folder, name = os.path.split(argv[2])
            assert name == "best.pt" and read_log(folder)[-1]["step"] == 4  # before it is a later model
            with open(f"{folder}/evaluations.jsonl", "w") as f:
                f.write(json.dumps(evaluation(0, 0.5 + int(flags["--seed"]) / 100)) + "\n")
        else:
            self.train(flags, "--resume" in argv)

    def train(self, flags, resume):
        out, beta, seed = flags["--out"], float(flags["--beta"]), int(flags["--seed"])
        assert os.path.exists(f"{out}/ckpt.pt") == resume and flags["--data"].startswith(f"data/toy-seed{seed}")
        peak = 0.6 + seed / 100
        if seed == report.TUNING_SEED:
            peak = {0.1: 0.9, 0.3: 0.8, 1: 0.3}.get(beta, 0.7) - (flags["--lr"] != "4e-4") / 100
        low = peak if beta == 0.3 else 0.2
        records = [evaluation(0, 0.5), evaluation(2, peak), evaluation(4, low), evaluation(6, low)]
        if beta == 1 and seed == report.TUNING_SEED:
            records[2] |= dict(win_rate=0.99, kl=1000.0)  # beyond --max_kl, so it is not chosen by its peak
        write_run(out, [dict(step=0, loss=1.0), *records[:2 + int(flags["--steps"]) // 2 - 1]])
        open(f"{out}/ckpt.pt", "w").close()


@pytest.fixture
def programs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    programs = FakePrograms()
    grid = {"SPO": ("--algo spo --beta 0.1", [f"--algo spo --beta {beta}" for beta in (0.1, 0.2, 0.3, 1)]),
            "RLHF": ("--reward model --beta 0.1", ["--reward model --beta 0.1"])}
    for name in ("figure", "draw_sweep", "draw_curves"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(report, "run_program", programs)
    monkeypatch.setitem(report.PROTOCOLS, "toy", (4, 6, (0, 1, 2), grid))
    return programs


def test_report_tunes_on_another_world_and_runs_nothing_twice(programs, capsys):
    report.report("toy", "r")
    text = open("r/table.md", encoding="utf-8").read()
    by_peak, by_mean = text.split("Settings chosen by the rule mean")
    assert "`--algo spo --beta 0.1 --lr 4e-4`" in by_peak and "`--algo spo --beta 0.3 --lr 4e-4`" in by_mean
    spo, _, late, _ = cells(by_peak)[1:5]
    assert spo[1:4] == ["peak", "2 ± 0", f"0.510 ± {4.303 * 0.01 / 3 ** 0.5:.3f}"] and late[3] == "0.200 ± 0.000"
    kinds = [argv[1] if argv[0] == "-m" else argv[0] for argv in programs.calls]
    # 4 worlds; learning rates and settings: 3 + 3 of SPO, 3 of RLHF; 3 settings are chosen, for 3 worlds, in 2 parts
    assert (kinds.count("prepare_data.py"), kinds.count("extras.judge"), kinds.count("spo.py")) == (4, 9, 6 + 6 * 2)
    assert kinds.count("extras.rlhf") == 3 + 3 * 2
    assert "sweep: 5 of 5, 0:00:00 left" in capsys.readouterr().out
    assert len(cells(open("r/sweep.md", encoding="utf-8").read())) == 1 + 5

    programs.calls.clear()
    report.report("toy", "r")
    assert {argv[0] for argv in programs.calls} == {"prepare_data.py"}  # which finds that nothing is missing
    assert open("r/table.md", encoding="utf-8").read() == text
    killed = "r/seed100/spo-beta-0.2-lr-4e-4"
    late = next(f"r/seed2/{name}" for name in os.listdir("r/seed2") if name.startswith("model"))
    write_run(killed, [])  # after its first checkpoint, before its first evaluation
    write_run(late, read_log(late)[:-1])
    programs.calls.clear()
    report.report("toy", "r")
    again = [argv for argv in programs.calls if argv[0] != "prepare_data.py"]
    assert [argv[-2:] for argv in again] == [(killed, "--resume"), (late, "--resume")]


@pytest.mark.parametrize("name", ["sft.pt", "pairs.npy", "ref.npy"])
def test_report_refuses_other_data(programs, monkeypatch, name):
    report.World("toy", "r", 100).prepare()
    prepare = report.World("toy", "r", 100)
    monkeypatch.setattr(report, "run_program", lambda *argv: os.truncate(f"data/toy-seed100/{name}", 1))
    with pytest.raises(UserError, match="r/seed100 are on other data than data/toy-seed100"):
        prepare.prepare()


LEFT_BEHIND = """
import subprocess, sys
left = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
open("pid", "w").write(str(left.pid))
"""


def test_report_waits_for_a_program_that_a_killed_one_left(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with report.lock("r"):
        report.run_program("-c", LEFT_BEHIND)
    with pytest.raises(UserError, match="another report, or a program it started, is writing to r: wait"):
        report.lock("r")
    os.kill(int(open("pid").read()), signal.SIGKILL)
    time.sleep(0.5)
    report.lock("r").close()


def test_ablations(programs, monkeypatch):
    methods = report.PROTOCOLS["toy"][3]
    for name in ("DPO", "IPO", "SLiC-HF"):
        methods[name] = (f"--algo {name} --beta 0.1", [f"--algo {name} --beta 0.1"])
    monkeypatch.setattr(report, "TOY_GRID", methods)
    monkeypatch.setattr(report, "WHY_GRID", {"SPO, no KL": ("--algo spo --beta 0", ["--algo spo --beta 0"])})
    report.ablations("r")
    text = open("r/ablations.md", encoding="utf-8").read()
    assert "SPO, no KL: `--algo spo --beta 0 --lr 4e-4`" in text
    assert "ranked: `--algo ranked --beta 0.3 --lr 4e-4`" in text and "--num_rollouts 32`" in text
    assert "share of labels flipped" in text and "| SPO | 0.510 ± 0.025 |" in text
    changed = {argv[-2:] for argv in programs.calls if argv[0] == "prepare_data.py"}
    assert ("--label_noise", "0.4") in changed and ("--num_pairs", "500") in changed and ("--dim", "128") in changed


def test_compare_trains_past_the_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    FakePrograms()("prepare_data.py", "toy", "--data", "data/toy", "--seed", "0")
    logs = []

    def train(*argv):
        logs.append(" ".join(argv[1:argv.index("--steps")]))
        write_run(argv[-1], [evaluation(0, 0.5), evaluation(2, 0.7), evaluation(int(argv[-3]), 0.64)])

    monkeypatch.setattr(report, "run_program", train)
    monkeypatch.setattr(report, "figure", lambda *_: None)
    report.compare("c")
    assert sorted(logs) == sorted(report.COMPARE)
    rows = capsys.readouterr().out.splitlines()[-4:-1]
    assert " ".join(rows[1].split()) == "spo alpha 0.3 lr 4e-4 0.700 ( 2) 2.0 0.640 (1000) 2.0"
    assert all(len(row) <= 60 for row in rows)


# ---------------------------------------------------------------------------------------------------
# Figures, mistakes, the benchmark

def test_figures_draw_what_is_in_the_logs(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **more: drawn.append(subplots(*args, **more)) or drawn[-1])
    monkeypatch.chdir(tmp_path)
    for name, win_rate in (("a", 0.5), ("out/a-run-of-a-long-name", 0.6)):
        write_run(name, [evaluation(0, win_rate, 0.0), dict(step=1, loss=1.0), evaluation(2, win_rate + 0.1, 3.0)])
    tables.main(["a", "out/a-run-of-a-long-name", "--out", "plot.png"])
    tables.figure({method: worlds for method, (_, worlds) in made_up_runs().items()}, "figure.png")
    (fig, plots), (_, means) = drawn  # each of win_rate by step, kl by step, win_rate by kl
    a, b, half = plots[0].lines
    assert np.allclose(half.get_ydata(), 0.5) and np.allclose(b.get_xydata(), [[0, 0.6], [2, 0.7]])
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["a", "out/a-run-of-a-long-name", "0.5: level with the reference"]
    assert a.get_linestyle() != b.get_linestyle() and a.get_marker() != b.get_marker()
    assert "one run per curve" in fig.get_suptitle() and all(x % 1 == 0 for x in plots[0].get_xticks())
    assert "mean of 2 runs; band: standard deviation" in drawn[1][0].get_suptitle()
    steps = np.arange(0, 1001, 50)
    win_rate, kl = 0.3 + steps / 10_000, steps / 100
    for ax, expected in zip(means, ((steps, win_rate), (steps, kl), (kl, win_rate))):
        assert np.allclose(ax.lines[1].get_data(), expected)
    assert {text.get_text().strip(): text.get_position() for text in means[0].texts}["DPO"] == (1000, 0.4)


def test_the_other_figures(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **more: drawn.append(subplots(*args, **more)) or drawn[-1])
    tables.draw_sweep({"SPO": [dict(peak=0.8, last=0.7)], "DPO": [dict(peak=0.6, last=0.2)]}, 500, tmp_path / "s.png")
    assert [line.get_xydata().tolist() for line in drawn[0][1].lines[:2]] == [[[0.8, 0.7]], [[0.6, 0.2]]]
    tables.draw_curves({"pairs": {"SPO": {500: [0.5, 0.7], 4000: [0.8, 0.8]}}}, tmp_path / "c.png")
    ax = drawn[1][1][0, 0]
    assert ax.lines[0].get_xydata().tolist() == [[500, 0.6], [4000, 0.8]] and ax.get_xscale() == "log"


def test_mistakes_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    report.run_program("-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '1'")
    with pytest.raises(UserError, match="failed: error: lr is -1"):
        report.run_program("-c", "import sys; print('step 1'); sys.exit('error: lr is -1')")
    with pytest.raises(UserError, match="ref.npy does not exist"):
        report.same_data(str(tmp_path), str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        tables.figure({"SPO": made_up_runs()["SPO"][1]}, str(tmp_path / "plot.png"))


def test_bench_by_a_fake_clock(monkeypatch, capsys):
    ticks = itertools.accumulate(itertools.cycle((0, 9, 0, 1)))  # each part takes 9 s when it is warmed up, then one
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setitem(bench.SHAPES, "toy", (bench.MODEL_ARGS, 2, 8, 32))
    bench.main("--reps 1 --batches 2 --threads 1".split())
    *table, numbers = capsys.readouterr().out.splitlines()
    results = json.loads(numbers)
    assert results["gflops"] == 2 * 2048 ** 3 / 1e9 and "17 GFLOP/s" in table[0] and max(map(len, table)) <= 80
    assert table[2].split()[:6] == ["preference", "step", "1.000", "(1.000-1.000)", "28", "0%"]
    assert "an SPO step is 2.12 DPO steps: KL 1.00, rollouts 0.12;" in table and results["spo_over_dpo"] == 2.125
    assert [row["tokens_per_s"] for row in results.values() if isinstance(row, dict)] == [28, 7, 7, 28, 4, 8, 14, 32]
    share = results["preference step"]["share_of_limit"]
    assert share == pytest.approx(28 * (6 * 189_632 + 12 * 3 * 64 * 8) / (2 * 2048 ** 3))
    bench.main("--reps 1 --batches 2 --threads 1 --length 16".split())
    assert "sampling, batch 2, 15 tokens" in json.loads(capsys.readouterr().out.splitlines()[-1])
