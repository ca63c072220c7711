"""README, docs and Makefile: what they name exists, what they say to type works, what they print is true."""
import os
import re
import shlex
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch

import model
import prepare_data
import spo
from extras.tests.conftest import ROOT
from test_spo import tiny

PAGES = ["README.md", *(f"docs/{name}" for name in sorted(os.listdir(f"{ROOT}/docs")) if name.endswith(".md"))]


def read(path):
    with open(f"{ROOT}/{path}", encoding="utf-8") as f:
        return f.read()


def make(*argv, **env):
    outer = {name: x for name, x in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", f"PY={sys.executable}", *argv], cwd=ROOT, text=True, capture_output=True,
                          env=outer | {"OMP_NUM_THREADS": "1"} | env)  # as if pytest were not run by make


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_exist(page):
    for link in re.findall(r"\]\(([\w./-]+)\)", read(page)):
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), link)), link
    source = "".join(read(path) for path in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True,
                                                           capture_output=True).stdout.split())
    rows = [row for row in read(page).splitlines() if row.startswith("|") and ("Eq." in row or "Appendix" in row)]
    assert rows or page not in ("README.md", "docs/design.md")
    for row in rows:
        for name in re.findall(r"`(\w+)`", row.split("|")[2]):
            assert re.search(rf"^(def {name}\(|{name} = |.*\b{name}\b)", source, re.M), name


def test_the_formula_and_the_example_are_the_code():
    lines = re.search(r"```python\n(margin = .*?)```", read("README.md"), re.S)[1]
    assert all(line.partition("#")[0].strip() in read("spo.py") for line in lines.splitlines())
    names, shown = {}, 0
    for line in re.search(r"```python\n(import torch\n.*?)```", read("docs/design.md"), re.S)[1].splitlines():
        code, _, expected = (part.strip() for part in line.partition("#"))
        if expected.startswith("tensor"):
            assert repr(eval(code, names)) == expected
            shown += 1
        else:
            exec(code, names)
    assert shown == 2


def test_the_losses_in_another_trainer():
    class Model(torch.nn.Module):  # with a Hugging Face model's call
        def __init__(self, seed):
            super().__init__()
            self.llama = tiny(10, seed)

        def forward(self, tokens):
            return types.SimpleNamespace(logits=self.llama(tokens))

    block = re.search(r"```python\n(import torch\nfrom spo import seq_logp.*?)```", read("docs/design.md"), re.S)[1]
    names = dict(model=Model(0), ref=Model(1))
    exec(block, names)
    y, (policy, ref) = names["tokens"], (names[name].llama for name in ("model", "ref"))
    rows = [[1, 6, 2], [1, 7, 8, 2]]
    logp = [sum(policy(y[i:i + 1])[0, 1 + t].log_softmax(-1)[token] for t, token in enumerate(row[1:]))
            for i, row in enumerate(rows)]
    assert names["pref"](y, names["mask"]).item() == pytest.approx(spo.spo_loss(*logp, 0.01).item(), rel=1e-5)
    kl = [sum(spo.kl_per_token(policy(y[i:i + 1])[0, 1 + t], ref(y[i:i + 1])[0, 1 + t]) for t in range(len(row) - 1))
          for i, row in enumerate(rows)]
    assert names["kl"](y, names["mask"]).item() == pytest.approx(sum(kl).item() / 2, rel=1e-5)


COMMANDS = sorted({line.partition("#")[0].replace("...", "").strip() for page in PAGES
                   for line in re.findall(r"^(?:\$ )?make [a-z]+.*$|(?<=`)make [a-z][^`\n]*(?=`)", read(page), re.M)}
                  - {"make sample", "make evaluate", "make plot"})  # named in a sentence, without what they need
PROGRAMS = dict(train="spo.py", data="prepare_data.py", theory="test_spo.py", test="-m pytest", sample="model.py",
                evaluate="-m extras.judge", report="-m extras.report", ablations="-m extras.report --ablations",
                compare="-m extras.report --compare",
                plot="-m extras.tables", bench="-m extras.bench", clean="rm -rf out")


@pytest.mark.parametrize("line", COMMANDS)
def test_every_make_command_runs_its_program_with_flags_that_it_takes(line):
    target, *settings = shlex.split(line)[1:]
    done = make("-n", target, *settings)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.replace("\\\n", " ").replace(sys.executable, "python").splitlines()
    assert PROGRAMS[target] in commands[-1], commands
    for command in commands:
        program, *argv = shlex.split(command.removeprefix("python "))
        if program == "spo.py":
            args = spo.get_args(argv)
            for name, value in (setting.split("=", 1) for setting in settings):
                if name.lower() in vars(args):
                    assert str(vars(args)[name.lower()]) == str(type(vars(args)[name.lower()])(value)), name
        elif program == "prepare_data.py":
            prepare_data.get_args(argv)


def test_the_first_command_of_the_readme(world, tmp_path):
    line = re.search(r"make (train ALGO=spo ALPHA=0.01)", read("README.md"))[1]
    flags = "--batch_size 8 --num_eval_samples 16 --eval_every 2"
    done = make(*line.split(), f"DATA={world}", "STEPS=4", f"OUT={tmp_path}/my run", f"ARGS={flags}",
                COLUMNS="60", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "alpha=0.01" in done.stdout and all(len(x) <= 60 for x in done.stdout.splitlines() if "/" not in x)
    assert "  step     loss     reg   margin accuracy       eta\n" in done.stdout
    assert {"ckpt.pt", "best.pt", "log.jsonl", "samples.txt"} <= set(os.listdir(tmp_path / "my run"))


@pytest.mark.parametrize("settings, words", [
    ("train ALHPA=0.5", "does not read ALHPA"), ("train alpha=0.5", "does not read alpha"),
    ("train BATCH_SIZE=4", "does not read BATCH_SIZE"), ("report STEPS=10", "does not read STEPS"),
    ("train RESUME=yes", "RESUME is yes"), ("plot", "needs RUNS="), ("sample N=2", "needs CHECKPOINT="),
])
def test_a_setting_that_is_not_read_is_an_error(settings, words):
    done = make("-n", *settings.split())
    assert done.returncode == 2 and words in done.stderr


def test_errors_name_makes_variables(capsys):
    assert set(re.findall(r"call flag,\w+,--?(\w+)", read("Makefile"))) | {"resume"} <= {*model.MAKE_FLAGS.split("|")}
    for text, named in (("--steps is 0", "--steps (make: STEPS=) is 0"), ("-n must", "-n (make: N=) must"),
                        *((x, x) for x in ("held-out", "--num_pairs", "--lr", "--n_x", "--resume (make: RESUME=1)"))):
        assert model.name_variables(text) == named
    with pytest.raises(SystemExit):
        spo.get_args(["--steps", "0"])
    assert "--steps (make: STEPS=) is 0" in capsys.readouterr().err

    for error, ending in (
            (model.UserError("--seed is 9, --num_ref 1"), (2, "error: --seed (make: SEED=) is 9, --num_ref 1\n")),
            (OSError(28, "No space"), (2, "error: [Errno 28] No space\n")), (KeyboardInterrupt(), (130, ""))):
        with pytest.raises(SystemExit) as ended:
            model.run_main(mock.Mock(side_effect=error))
        assert (ended.value.code, capsys.readouterr().err) == ending


def test_make_passes_on_what_is_given_and_nothing_else():
    assert "--" not in make("-n", "train", "RESUME=0", ALGO="dpo", STEPS="3").stdout.splitlines()[-1]
    given = make("-n", "train", "RESUME=1", "OUT=my out").stdout
    assert "--resume" in given and "--out 'my out'" in given
    given = make("-n", "train", "SEED=1", "ARGS=--lr 1").stdout.splitlines()  # of the run, not of its data
    assert "--seed '1'" in given[-1] and "--lr 1" in given[-1]
    assert not any("--seed" in command or "--lr" in command for command in given[:-1])
    for settings, expected in (("MODEL=stories15M", "data/stories15M"), ("MODEL=stories15M DATA=data/b", "data/b")):
        given = make("-n", "sample", "CHECKPOINT=a.pt", *settings.split()).stdout
        assert f"--tokenizer {expected}/tokenizer.model" in given
    for target, names in re.findall(r"^(\w+)_reads = (.*)", read("Makefile"), re.M):
        settings = {name: f"my {name.lower()}" for name in names.split() if name != "RESUME"}
        given = make("-n", target, *(f"{name}={x}" for name, x in settings.items())).stdout
        if target == "sample":
            del settings["MODEL"]  # which is in the tokenizer's path, unless DATA is
        assert all(x in given for x in settings.values()), given
        assert "CHECKPOINT" not in settings or "'my checkpoint'" in given
    targets = re.findall(r"^make (\w+)", make().stdout, re.M)
    assert set(targets) == {*PROGRAMS, "help"}
