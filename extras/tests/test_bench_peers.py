"""The benchmark's peers; most tests need extras/requirements-bench.txt, and run.c's a copy of it named in RUN_C."""
import copy
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks
import pytest
import torch

from extras import bench, bench_peers
from model import UserError

RUN_C = os.environ.get("RUN_C", "")
needs_run_c = pytest.mark.skipif(not RUN_C, reason="RUN_C names no copy of llama2.c's run.c")
DPO = ["straightforward DPO step", "TRL DPO, reference in every step", "TRL DPO, reference precomputed"]


def run(monkeypatch, capsys, *flags, hidden=()):
    """The benchmark on a tiny shape, as if the hidden packages were not installed -> its lines and its numbers."""
    for package in hidden:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(bench.SHAPES, "toy", (bench.MODEL_ARGS, 2, 8, 2))
    bench.main(["--peers", "--batches", "1", "32", "--reps", "1", "--threads", "1", "--device", "cpu", *flags])
    *table, numbers = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80
    return table, json.loads(numbers)


def change_model(monkeypatch, module, name):
    """Has the function of this name, which hands a model to a peer, hand over one with another weight."""
    convert = getattr(module, name)

    def convert_changed(model, *args):
        model = copy.deepcopy(model)
        model.norm.weight.data[0] += 5
        return convert(model, *args)
    monkeypatch.setattr(module, name, convert_changed)


def test_peers_that_are_missing_are_named(monkeypatch, capsys):
    table, results = run(monkeypatch, capsys, hidden=("trl", "transformers", "datasets", "llama_cpp", "gguf"))
    text = " ".join(table)
    for line in ("TRL: not measured, without trl and transformers and datasets; python -m pip install -r "
                 "extras/requirements-bench.txt", "transformers: not measured, without transformers;",
                 "llama.cpp: not measured, without llama_cpp and gguf;",
                 "run.c: not measured, without llama2.c: --run_c PATH"):
        assert line in text
    assert results["ours_over_peer"] == {}


@pytest.mark.parametrize("flags", ["--peers --dtype bfloat16", "--peers --batches 8", "--run_c there",
                                   "--peers --run_c there"])
def test_flags_that_do_not_fit_are_told(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", *flags.split()])
    assert ("both among --batches" if "run_c" not in flags else "--run_c is there") in capsys.readouterr().err


def test_every_peer_has_a_row_and_a_ratio(monkeypatch, capsys):
    for package in ("trl", "llama_cpp", "gguf"):
        pytest.importorskip(package)
    flags = ["--run_c", RUN_C] if RUN_C else []
    table, results = run(monkeypatch, capsys, *flags)
    names = [f"{peer}, batch {n}, 7 tokens" for peer in ("transformers", "llama.cpp") for n in (1, 32)]
    names += DPO + ["run.c, batch 1, 7 tokens"] * bool(RUN_C)
    assert set(results["ours_over_peer"]) == set(names)
    for name in names:
        ours = "preference step" if "DPO" in name else f"sampling, {name.split(', ', 1)[1]}"
        ratio = results[ours]["tokens_per_s"] / results[name]["tokens_per_s"]
        assert results["ours_over_peer"][name] == ratio
        assert any(line.split("  ")[1] == name and line.endswith(f" {ratio:.2f}") for line in table if line[:2] == "  ")


@pytest.mark.parametrize("peer, module, name, hidden", [
    ("trl", "extras.hf_export", "to_hf", ()),
    ("transformers", "extras.hf_export", "to_hf", ("trl",)),
    ("llama_cpp", "extras.bench_peers", "write_gguf", ("trl", "transformers")),
    pytest.param("ctypes", "extras.bench_peers", "export", ("trl", "transformers", "llama_cpp"), marks=needs_run_c)])
def test_a_peer_with_another_weight_is_refused(peer, module, name, hidden, monkeypatch, capsys):
    pytest.importorskip(peer)
    change_model(monkeypatch, pytest.importorskip(module), name)
    with pytest.raises(UserError, match="does not compute what our model does"):
        run(monkeypatch, capsys, *(["--run_c", RUN_C] if RUN_C else []), hidden=hidden)


def test_must_match_refuses_nan():
    bench_peers.must_match("peer", torch.ones(2), torch.ones(2) + 5e-4)
    with pytest.raises(UserError, match="differ by nan"):
        bench_peers.must_match("peer", torch.tensor([1, torch.nan]), torch.ones(2))
