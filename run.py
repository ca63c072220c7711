"""
What is around training: its settings, and a run's folder with lock, log and checkpoints.
"""
import argparse
import contextlib
import datetime
import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import textwrap

import torch

from evaluate import JUDGES, load_tokenizer
from model import UserError, read_checkpoint, writing


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help).")


# ---------------------------------------------------------------------------------------------------
# Settings: one line a flag; the defaults live in spo.LOSSES (per algorithm) and here (per model).

TOY = dict(judge="expert", batch=16, micro=64, steps=500, warmup=50, lr=2e-4, max_new=100, eval_every=50,
           eval_stories=256)
# E.2's, but for lr, which the paper does not give: ours, and not measured yet
PAPER = dict(judge="reward", batch=128, micro=32, steps=40000, warmup=5000, lr=1e-5, max_new=255,
             eval_every=1000, eval_stories=1000, R=32)
MODELS = ({"toy": TOY, "toy-naive": TOY | dict(judge="naive")}
          | dict.fromkeys(("stories260K", "stories15M", "stories42M", "stories110M"), PAPER))


def settings(losses: dict, argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked, with every default filled in; losses: spo.LOSSES."""
    p = Parser(description="Align a story writer by SPO (arXiv 2405.00747), DPO, IPO or SLiC-HF.",
               argument_default=argparse.SUPPRESS)
    p.add_argument("--algo", choices=losses, default="spo", help="the loss; sft and reward: other training")
    p.add_argument("--alpha", type=float, help="softness: the target is softmax(r / alpha)")
    p.add_argument("--beta", type=float, help="weight of the regulariser; DPO: Eq. 5's; IPO: its tau")
    p.add_argument("--gamma", type=float, help="exponent of Section 4's pair weight mu; 0: unweighted")
    p.add_argument("--delta", type=float, help="SLiC-HF's margin")
    p.add_argument("--R", type=int, help="stories in a rollout")
    p.add_argument("--k", type=int, help="steps a rollout is used for")
    p.add_argument("--kl", choices=("token", "sequence"), help="Appendix D's, or the score-function estimate")
    p.add_argument("--model", choices=MODELS, default="toy", help="whose defaults, and files under data/")
    p.add_argument("--data", help="folder of sft.pt and token files; default data/<model>")
    p.add_argument("--init", help="start and reference; default <data>/sft.pt")
    p.add_argument("--tokenizer", help="the checkpoint's own; toy: tokenizer.model, else in <data>")
    p.add_argument("--judge", choices=JUDGES, help="of the evaluations: see evaluate.py")
    p.add_argument("--out", help="the run's folder; default out/<model>-<algo>-<settings>")
    p.add_argument("--seed", type=int, default=0, help="of batches, rollouts and evaluations")
    p.add_argument("--steps", type=int, help="how many")
    p.add_argument("--batch", type=int, help="rows of the preference data a step")
    p.add_argument("--micro", type=int, help="stories at a time, of those of a gradient: less, less memory")
    p.add_argument("--lr", type=float, help="AdamW's learning rate after warm-up")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up")
    p.add_argument("--max_new", type=int, help="longest story, in tokens; a longer one is cut")
    p.add_argument("--eval_every", type=int, help="steps between evaluations")
    p.add_argument("--eval_stories", type=int, help="fresh stories an evaluation")
    p.add_argument("--log_every", type=int, default=10, help="steps a logged line")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    p.add_argument("--device", choices=devices, default=devices[0])
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    p.add_argument("--compile", action="store_true", default=False, help="the sampling")
    p.add_argument("--resume", action="store_true", default=False, help="go on from <out>/ckpt.pt")
    s = p.parse_args(argv)

    s.rank, s.world = 0, 1
    if torch.distributed.is_torchelastic_launched():
        s.rank, s.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    reads = losses[s.algo][2]
    unread = {name for _, _, settings in losses.values() for name in settings} - reads.keys()
    for name in unread & vars(s).keys():
        p.error(f"--{name} is not read by {s.algo}, which reads {', '.join(reads) or 'none of these'}")
    for name, default in (reads | MODELS[s.model]).items():
        if name not in unread:
            setattr(s, name, getattr(s, name, default))
    lowest = dict(alpha=0, beta=0, gamma=0, delta=0, lr=0, seed=0, warmup=0, R=1, k=1,
                  steps=1, batch=1, micro=1, max_new=1, eval_every=1, eval_stories=2, log_every=1)
    for name, low in lowest.items():
        if not low <= getattr(s, name, low) < math.inf:
            p.error(f"--{name} is {getattr(s, name)}: it must be a number from {low} on")
    if s.world > min(s.batch, getattr(s, "R", s.batch)):
        p.error(f"{s.world} processes are more than --batch or --R")
    if getattr(s, "kl", "") == "sequence" and s.R > (s.micro if s.world == 1 else 0):
        p.error("--kl sequence takes its R stories, each the others' baseline, in one piece: "
                "R at most --micro, one process")
    header = sysconfig.get_path("include") + "/Python.h"
    if s.compile and not (shutil.which(cxx := os.environ.get("CXX", "g++")) and os.path.exists(header)):
        p.error(f"--compile needs a C++ compiler, {cxx}, and {header}: install them, or leave --compile out")
    if s.algo == "ipo" and s.beta == 0:
        p.error("--beta is 0: ipo's target margin is 1/(2 beta), so it must be above 0")

    if s.judge == "llm":
        s.judge_model = os.environ.get("JUDGE_MODEL")
    s.data = getattr(s, "data", f"data/{s.model}")
    s.init = getattr(s, "init", f"{s.data}/sft.pt")
    own = "tokenizer.model" if s.model.startswith("toy") else f"{s.data}/tokenizer.model"
    s.tokenizer = getattr(s, "tokenizer", own)
    choices = [f"{name}{getattr(s, name)}".removesuffix(".0") for name in [*reads, "seed"]]
    s.out = getattr(s, "out", "-".join([f"out/{s.model}", s.algo, *choices])).rstrip("/")
    return s


@contextlib.contextmanager
def ranks(s):
    """Joins the processes that torchrun started, one a GPU where there are any; only the first prints."""
    if s.world == 1:
        yield
        return
    if s.device == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs, fewer than RANKS.")
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if s.device == "cuda" else "gloo",
                                         timeout=datetime.timedelta(days=1))
    with contextlib.redirect_stdout(open(os.devnull, "w") if s.rank else sys.stdout):
        yield
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------
# A run's folder

def write_whole(path: str, content: str | bytes) -> None:
    with writing(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def folder(s):
    """
    Makes or takes up a run's folder, and holds it: a second run is refused. An earlier run of that name
    moves aside. Lists the signals that come: the first is for the run to finish its step, a second one
    leaves at once.
    """
    signals, names = [], (signal.SIGINT, signal.SIGTERM)

    def come(number, _):
        signals.append(number)
        for name in names:
            signal.signal(name, signal.SIG_DFL)

    def hold():
        os.makedirs(s.out, exist_ok=True)
        held.callback(os.close, lock := os.open(f"{s.out}/lock", os.O_CREAT | os.O_WRONLY))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    if s.resume and not os.path.exists(f"{s.out}/ckpt.pt"):
        raise UserError(f"{s.out}/ckpt.pt is not there: nothing was saved yet, so begin without --resume.")
    with contextlib.ExitStack() as held:
        try:
            if not s.rank:  # the other ranks are its guests
                hold()
                if not s.resume and os.path.exists(f"{s.out}/log.jsonl"):
                    aside = next(a for i in itertools.count(1) if not os.path.exists(a := f"{s.out}.{i}"))
                    os.rename(s.out, aside)
                    print(f"the earlier run in {s.out} is now in {aside}")
                    hold()
                for part in glob.glob(f"{glob.escape(s.out)}/*.part"):  # a killed run's
                    os.remove(part)
        except BlockingIOError:
            raise UserError(f"another run is writing to {s.out}: wait for it, or give another --out.") from None
        except OSError as e:
            raise UserError(f"{s.out} cannot be written ({e.strerror}): give another --out.") from None
        if s.world > 1:
            torch.distributed.barrier()
        for name in names:
            held.callback(signal.signal, name, signal.signal(name, come))
        yield signals


def record(s, **r):
    """Adds a line to the run's log and shows it, in at most 80 characters."""
    if s.rank:
        return
    known = {name: x if isinstance(x, str) or math.isfinite(x) else None for name, x in r.items()}
    with open(f"{s.out}/log.jsonl", "a") as f:
        f.write(json.dumps(known) + "\n")
    if "loss" in r:
        print("{step:6d} {loss:8.3f} {pref:8.3f} {kl:6.2f} {margin:7.2f} {accuracy:5.2f} {lr:8.1e} "
              "{ms:6.1f} {tokens_s:6.0f}".format(**r).replace("nan", "  -"),
              "{:3.0f}:{:02.0f}".format(*divmod(int(r["left"]), 60)), flush=True)
    else:
        digits = dict(win=3, win_se=3, kl=2, entropy=1, length=0, closed=2, nats=2, right=3)
        found = [f"{name} {r[name]:.{d}f}" for name, d in digits.items() if name in r]
        print(f"@{r['step']}", *found, flush=True)


def read_log(out: str) -> list[dict]:
    """The records of the run in folder out: each has a step, and the loss or an evaluation after it."""
    try:
        with open(f"{out}/log.jsonl") as f:
            log = [json.loads(line) for line in f if line.endswith("\n")]  # a killed run leaves half a line
        return [r for r in log if r["step"] >= 0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f"{out}/log.jsonl cannot be read ({e}).") from None


def cut_log(s, step: int) -> int:
    """Takes out of the log what comes after step -> the step of the last evaluation in it."""
    kept = [r for r in read_log(s.out) if r["step"] <= step]
    if not s.rank:
        write_whole(f"{s.out}/log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    return max((r["step"] for r in kept if "loss" not in r), default=-1)


def peak(out: str) -> dict:
    """The evaluation with the highest win-rate."""
    log = read_log(out) if os.path.exists(f"{out}/log.jsonl") else []
    wins = [r for r in log if r.get("win") is not None]
    return max(wins, key=lambda r: r["win"], default=dict(win=-1.0))


def show(s, vocab_size: int, y_ref, y) -> None:
    """The peak, and stories before and after, drawn with the same random numbers."""
    tokenizer = load_tokenizer(s.tokenizer, vocab_size)
    text = "".join(textwrap.fill(f"{when}: {story}", 80, subsequent_indent="        ") + "\n"
                   for pair in zip(*(tokenizer.decode(stories.tolist()) for stories in (y_ref, y)))
                   for when, story in zip(("before", " after"), pair))
    print("peak win-rate {win:.3f} ± {win_se:.3f} at step {step}, kl {kl:.2f}\n".format(**peak(s.out)))
    print(text, end="")
    if not s.rank:
        write_whole(f"{s.out}/stories.txt", text)


def take_up(s, policy, optimizer):
    """Begins or goes on from the checkpoint -> step, the one last evaluated, rollout, window, skipped steps."""
    if not s.resume:
        return 0, -1, None, [], []
    path, kinds = f"{s.out}/ckpt.pt", dict(settings=dict, step=int, window=list, skipped=list)
    checkpoint = read_checkpoint(path, s.device)
    if not {"optimizer", "rollout"} | kinds.keys() <= checkpoint.keys():
        raise UserError(f"{path} is a model without its run: name it with --init instead.")
    free = {"resume", "out", "device", "micro", "compile", "rank", "world", "data", "init", "tokenizer", "model"}
    free |= {"steps"} if s.algo != "sft" else set()  # a cosine knows its end
    try:
        assert all(type(checkpoint[name]) is kind for name, kind in kinds.items())
        begun, now = ({name: x for name, x in both.items() if name not in free}
                      for both in (checkpoint["settings"], vars(s)))
        if begun["inputs"] != now["inputs"]:
            raise UserError(f"{s.out} was begun from other files than {s.init} and {s.data} are: begin anew.")
        for name in begun | now:
            if begun.get(name) != now.get(name):
                raise UserError(f"{s.out} was begun with --{name} {begun.get(name)}, not {now.get(name)}: "
                                "resume with the same.")
        if not 0 <= checkpoint["step"] <= s.steps:
            raise UserError(f"{s.out} is at step {checkpoint['step']} already: give --steps that many or more.")
        policy.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        assert checkpoint["rollout"] is None or policy.args.vocab_size > checkpoint["rollout"].max() and (
            checkpoint["rollout"].min() >= 0)
        assert all(terms.shape == (6,) and seconds > 0 for terms, seconds in checkpoint["window"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:80]
        raise UserError(f"{path} is not what a run of {s.init} wrote ({reason}).") from None
    return [checkpoint["step"], cut_log(s, checkpoint["step"]),
            *(checkpoint[name] for name in ("rollout", "window", "skipped"))]
