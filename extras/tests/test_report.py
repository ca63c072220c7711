"""The report on made-up logs and programs, so that every number is known; the benchmark under a fake clock."""
import itertools
import json
import os
import sys

import numpy as np
import pytest

from extras import bench, report
from model import UserError


def evaluation(step, win_rate, kl=2.0):
    return dict(step=step, win_rate=win_rate, kl=kl, entropy=40.0, length=60.0)


def write_run(folder, records):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


def made_up_runs():
    def seeds(first, *peaks):
        log = [evaluation(step, first + step / 10_000, step / 100) for step in range(0, 1501, 50)]
        return [(evaluation(step, win_rate), log) for step, win_rate in peaks]
    return {"spo": seeds(0.5, (100, 0.8), (200, 0.9)), "dpo": seeds(0.3, (100, 0.7), (100, 0.6))}


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "---" not in line]


def test_table():
    heads, *rows = cells(report.table(made_up_runs(), {"spo": "--algo spo --alpha 1", "dpo": "--algo dpo"}, 300))
    spo, dpo = rows[::2], rows[1::2]
    assert dict(zip(heads, spo[0])) == {
        "method": "`spo --alpha 1`", "evaluation": "peak", "step": "150 ± 50", "win_rate": "0.850 ± 0.050",
        "kl": "2.0 ± 0.0", "entropy": "40.0 ± 0.0", "length": "60.0 ± 0.0", "SPO's lead": ""}
    assert [row[2] for row in spo[1:]] == ["300 ± 0", "750 ± 250", "1500 ± 0"]
    assert [row[3] for row in spo[1:]] == ["0.530 ± 0.000", "0.575 ± 0.025", "0.650 ± 0.000"]
    assert [row[3] for row in dpo] == ["0.650 ± 0.050", "0.330 ± 0.000", "0.350 ± 0.000", "0.450 ± 0.000"]
    assert [row[7] for row in dpo] == ["0.200 ± 0.100", "0.200 ± 0.000", "0.225 ± 0.025", "0.200 ± 0.000"]


def test_winrate_by_kl_counts_every_evaluation():
    log = [evaluation(0, i / 10, kl) for i, kl in enumerate([-1e-7, 0, 0.99, 1, 3.99, 4, 24.9, 25, 100, 1e6])]
    heads, row = cells(report.winrate_by_kl({"spo": [(None, log)]}))
    assert heads[:3] + heads[-2:] == ["kl", "below 1", "1 to 2", "15 to 25", "25 and more"]
    assert row[1:] == ["0.100 (3)", "0.300 (1)", "0.400 (1)", "0.500 (1)", *"---", "0.600 (1)", "0.800 (3)"]


def test_no_seed_is_tuned_on_and_reported():
    for steps, tuning_seeds, seeds, grid in report.PROTOCOLS.values():
        assert not set(tuning_seeds) & set(seeds) and len(set(map(len, grid.values()))) == 1
        assert {algo: {flags.split()[1] for flags in grid[algo]} for algo in grid} == {algo: {algo} for algo in grid}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The programs that a report runs, replaced by ones that log win rates known from alpha, seed and step."""
    def fake_program(*argv):
        calls.append(argv)
        if argv[:2] == ("-m", "extras.judge"):
            folder, name = os.path.split(argv[2])
            assert name == "best.pt" and report.read_log(folder)[-1]["step"] == 4  # before it is a later model
            return report.write_text(f"{folder}/evaluations.jsonl", json.dumps(evaluation(0, 0.5)) + "\n")
        flags = dict(zip(argv[1:], argv[2:]))
        out, alpha, seed = flags["--out"], float(flags.get("--alpha", 0.5)), int(flags.get("--seed", 0))
        assert os.path.exists(f"{out}/ckpt.pt") == ("--resume" in argv)
        win_rate = alpha if seed in (100, 101) else 1 - alpha  # on the reported seeds another alpha is best
        log = [evaluation(step, win_rate - abs(step - 2) / 100) for step in range(0, int(flags["--steps"]) + 1, 2)]
        if alpha == 0.1:
            log[-1] |= dict(win_rate=0.99, kl=1000.0)  # beyond the bound, so it is not chosen for this
        write_run(out, [dict(step=0, loss=1.0, ms=20.0), *log])
        open(f"{out}/ckpt.pt", "w").close()

    calls, grid = [], {"spo": [f"--algo spo --alpha {alpha}" for alpha in (0.1, 0.9, 0.5)]}
    os.makedirs(tmp_path / "data/toy")
    for name in ("sft.pt", "pairs.npy", "ref.npy"):
        (tmp_path / "data/toy" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for name, x in dict(run_program=fake_program, figure=lambda *_: None, OVERTRAIN=2,
                        PROTOCOLS={"toy": (4, (100, 101), (0, 1, 2, 3, 4), grid)}).items():
        monkeypatch.setattr(report, name, x)
    return calls


def test_report_tunes_on_other_seeds_and_runs_nothing_twice(calls):
    report.report("toy", "r")
    table = open("r/table.md", encoding="utf-8").read()
    assert cells(table)[1][:4] == ["`spo --alpha 0.9`", "peak", "2 ± 0", "0.500 ± 0.000"]
    assert [argv[0] for argv in calls].count("-m") == 5 and len(calls) == 3 * 2 + 3 * 5
    calls.clear()
    report.report("toy", "r")
    assert calls == [] and open("r/table.md", encoding="utf-8").read() == table
    killed, overtrained = (f"r/spo-alpha-0.9-model-toy-seed-{seed}" for seed in (100, 3))
    write_run(killed, [])  # after its first checkpoint, before its first evaluation
    write_run(overtrained, report.read_log(overtrained)[:-1])
    report.report("toy", "r")
    assert [argv[-2:] for argv in calls] == [(killed, "--resume"), (overtrained, "--resume")]


def test_the_report_on_real_text_asks_its_judge(calls, monkeypatch):
    monkeypatch.setitem(report.PROTOCOLS, "stories260K", report.PROTOCOLS["toy"])
    os.rename("data/toy", "data/stories260K")
    report.report("stories260K", "r")
    judges = [argv[argv.index("--judge") + 1] for argv in calls]
    assert set(judges) == {"readability"} and all("stories260K" in argv for argv in calls)


@pytest.mark.parametrize("name", ["sft.pt", "pairs.npy", "ref.npy"])
def test_report_refuses_other_data(calls, name):
    report.same_data("data/toy", "r")
    os.truncate(f"data/toy/{name}", 1)
    with pytest.raises(UserError, match="r are on other data than data/toy"):
        report.report("toy", "r")
    assert calls == []


def test_ablations(calls):
    report.ablations("a")
    flags = {" ".join(argv[1:argv.index("--steps")]) for argv in calls}
    assert len(flags) == len(report.ABLATIONS)
    assert {f"{report.SPO} --gamma 0.1", "--algo dpo --beta 0.001 --lr 4e-4"} <= flags
    rows = cells(open("a/table.md", encoding="utf-8").read())[1:]
    assert len(rows) == 2 * len(flags) and rows[1][1:4] == ["last", "4", "0.680"]
    assert rows[0] == [f"`{report.SPO}`", "peak", "2", "0.700", "2.0", "40.0", "60.0", "20"]


def test_compare_trains_past_the_peaks(calls, monkeypatch, capsys):
    monkeypatch.setattr(report, "COMPARE_STEPS", 8)
    report.compare("c")
    assert {" ".join(argv[1:argv.index("--out")]) for argv in calls} == {f"{x} --steps 8" for x in report.COMPARE}
    rows = capsys.readouterr().out.splitlines()[-4:-1]
    assert " ".join(rows[1].split()) == "spo alpha 0.3 lr 4e-4 0.700 ( 2) 2.0 0.640 ( 8) 2.0"
    assert all(len(row) <= 60 for row in rows)


def test_figures_draw_what_is_in_the_logs(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **more: drawn.append(subplots(*args, **more)) or drawn[-1])
    monkeypatch.chdir(tmp_path)
    for name, win_rate in (("a", 0.5), ("b", 0.6)):
        write_run(name, [evaluation(0, win_rate, 0.0), dict(step=1, loss=1.0), evaluation(2, win_rate + 0.1, 3.0)])
    report.main(["--plot", "a", "b", "--out", "plot.png"])
    report.figure(made_up_runs(), "figure.png")
    (fig, plots), (_, means) = drawn  # each of win_rate by step, kl by step, win_rate by kl
    a, b, half = plots[0].lines
    assert np.allclose(half.get_ydata(), 0.5) and np.allclose(b.get_xydata(), [[0, 0.6], [2, 0.7]])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b", "0.5: level with the reference"]
    assert a.get_linestyle() != b.get_linestyle() and a.get_marker() != b.get_marker()
    assert "one seed per curve" in fig.get_suptitle() and all(x % 1 == 0 for x in plots[0].get_xticks())
    assert "mean of 2 seeds; band: standard deviation" in drawn[1][0].get_suptitle()
    steps = np.arange(0, 1501, 50)
    win_rate, kl = 0.3 + steps / 10_000, steps / 100
    for ax, expected in zip(means, ((steps, win_rate), (steps, kl), (2 * [*kl], 2 * [*win_rate]))):
        assert np.allclose(ax.lines[1].get_data(), expected)


def test_mistakes_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    report.run_program("-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '1'")
    with pytest.raises(UserError, match="failed: error: lr is -1"):
        report.run_program("-c", "import sys; print('step 1'); sys.exit('error: lr is -1')")
    with pytest.raises(UserError, match="ref.npy does not exist"):
        report.same_data(str(tmp_path), str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.figure(made_up_runs(), str(tmp_path / "plot.png"))
    with pytest.raises(SystemExit):
        report.main(["--out", "x.png"])


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
