"""
Soft Preference Optimization (arXiv 2405.00747), and the methods the paper compares it with.

Read from top to bottom it follows the paper: the probability of a story, one function an equation for
the losses, the token-wise KL on intermittent rollouts, and the loop that adds them up. Equation numbers
are the paper's. The losses need nothing but torch: copy the one you want.

    python spo.py --algo spo --alpha 0.01
"""
import argparse
import hashlib
import json
import math
import signal
import textwrap
import time

import torch
import torch.nn.functional as F

from evaluate import (JUDGES, Parser, begin, judge_of, load_tokenizer, load_tokens, peak, read_log, record,
                      story_reward, write_whole)
from model import BOS, UserError, cli, full_precision, generate, load, read_checkpoint, save

# ---------------------------------------------------------------------------------------------------
# log pi(y): the sum over a story's tokens, the closing BOS among them, so that pi is a distribution
# over stories. Sums, not averages: alpha in 0.001..0.1 only makes sense for differences of tens of nats.


def story_mask(tokens: torch.Tensor) -> torch.Tensor:
    """
    tokens (N, T), each row BOS, a story, BOS, padding -> mask (N, T), 1 on the story and the BOS that
    closes it. A story cut at the length limit has no closing BOS and counts up to its last token.
    """
    ends = (tokens[:, 1:] == BOS).cumsum(1)
    return F.pad((ends == 0) | ((ends == 1) & (tokens[:, 1:] == BOS)), (1, 0)).long()


def seq_logp(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    log pi(y | x) in nats, (N,): tokens (N, T) are prompt and response, mask (N, T) is 1 on the tokens
    that count, the response and its end.
    """
    logits = full_precision(model(tokens[:, :-1]))                                        # (N, T-1, V)
    logp = -F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (logp.view(len(tokens), -1) * mask[:, 1:]).sum(1)


# ---------------------------------------------------------------------------------------------------
# Preference losses, unreduced. logp_w, logp_l, ref_w, ref_l (B,): log pi_theta and log pi_ref of the
# preferred and the other response. logp (B, n): of n responses.


def spo_loss(logp_w, logp_l, alpha, mu=None):
    """
    Eq. 9, and Eq. 11 with weights mu (B,): -1/alpha log(pi_w^alpha / (pi_w^alpha + pi_l^alpha)) -> (B,).
    Eq. 10 and 12 at alpha = 0, where it is unbounded below.
    """
    margin = logp_w - logp_l
    loss = -F.logsigmoid(alpha * margin) / alpha if alpha > 0 else -margin / 2
    return loss if mu is None else mu * loss


def pair_weight(logp_w, logp_l, gamma):
    """
    Section 4's example: mu = (pi_w + pi_l)^gamma -> (B,), without gradient; in log space, and up to the
    factor that makes its mean over the batch 1.
    """
    return len(logp_w) * (gamma * torch.logaddexp(logp_w, logp_l).detach()).softmax(0)


def best_of_n_loss(logp, best, alpha, mu=None):
    """
    Eq. 14: -1/alpha log(pi_best^alpha / sum_i pi_i^alpha) -> (B,), for logp (B, n), best (B,) the index
    of the best, mu (B,). The paper has alpha > 0; at 0 this is the limit, less log(n)/alpha.
    """
    logp_best = logp.gather(1, best[:, None]).squeeze(1)
    loss = (alpha * logp).logsumexp(1) / alpha - logp_best if alpha > 0 else logp.mean(1) - logp_best
    return loss if mu is None else mu * loss


def ranked_loss(logp, alpha, mu=None):
    """Eq. 15: each response is the best of those from it on -> (B,); logp (B, n) best first, mu (B, n-1)."""
    best = torch.zeros(len(logp), dtype=torch.long, device=logp.device)
    return sum(best_of_n_loss(logp[:, k:], best, alpha, None if mu is None else mu[:, k])
               for k in range(logp.shape[1] - 1))


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """Eq. 5: -log sigmoid(beta ((logp_w - ref_w) - (logp_l - ref_l))) -> (B,)."""
    return -F.logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l)))


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """IPO, Eq. 17 of reference [13], with its tau called beta: (margin - 1/(2 beta))^2 -> (B,)."""
    return ((logp_w - ref_w) - (logp_l - ref_l) - 1 / (2 * beta)) ** 2


def slic_loss(logp_w, logp_l, delta):
    """SLiC-HF's calibration loss, Eq. 1 of reference [22]: max(0, delta - logp_w + logp_l) -> (B,)."""
    return (delta - logp_w + logp_l).clamp(min=0)


# algorithm: (its loss of logp (B, n), best first, and ref (B, n); the token file it learns from; the
# settings that not all read, with defaults that are ours, measured on the toy world). Whoever reads R
# is regularised by the token KL on R rollouts, taken every k steps.
LOSSES = {
    "spo": (lambda s, logp, ref: spo_loss(
                logp[:, 0], logp[:, 1], s.alpha,
                pair_weight(logp[:, 0], logp[:, 1], s.gamma) if s.gamma > 0 else None),
            "pairs", dict(alpha=0.01, beta=0.05, gamma=0.0, R=8, k=8, kl="token")),
    "best_of_n": (lambda s, logp, ref: best_of_n_loss(logp, logp.new_zeros(len(logp)).long(), s.alpha),
                  "best", dict(alpha=0.01, beta=0.1, R=8, k=8, kl="token")),
    "ranked": (lambda s, logp, ref: ranked_loss(logp, s.alpha),
               "ranked", dict(alpha=0.01, beta=0.1, R=8, k=8, kl="token")),
    "dpo": (lambda s, logp, ref: dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], s.beta),
            "pairs", dict(beta=0.1)),
    "ipo": (lambda s, logp, ref: ipo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], s.beta),
            "pairs", dict(beta=0.03)),
    "slic": (lambda s, logp, ref: slic_loss(logp[:, 0], logp[:, 1], s.delta),
             "pairs", dict(delta=10.0, beta=0.1)),
    # pre-training, and Section 2's reward model (its text dropped the log): Eq. 9 at alpha = 1, of rewards
    "sft": (lambda s, logp, ref: -logp[:, 0], "stories", dict()),
    "reward": (lambda s, r, ref: spo_loss(r[:, 0], r[:, 1], 1.0), "pairs", dict()),
}

# ---------------------------------------------------------------------------------------------------
# The regulariser (Section 3 and Appendix D): KL on the model's own stories, not on the data.


def token_kl(logits, ref_logits, mask):
    """
    Appendix D: sum over a story's tokens of KL(pi_theta(. | prefix) || pi_ref(. | prefix)) -> (R,) nats,
    over the full vocabulary; logits, ref_logits (R, T, V), mask (R, T) is 1 where the next token counts.

    Its mean over fresh stories of pi_theta is an unbiased estimate of D_KL(pi_theta || pi_ref). Its
    gradient is not: it leaves out how theta moves the prefixes.
    """
    logp, ref = full_precision(logits).log_softmax(-1), full_precision(ref_logits).log_softmax(-1)
    return ((logp.exp() * (logp - ref)).sum(-1) * mask).sum(1)


def sequence_kl(logits, ref_logits, y, mask):
    """
    What Appendix D sets aside: log pi_theta(y) - log pi_ref(y) of each story -> (R,), with the gradient of
    the score-function estimate, unbiased on fresh stories; its baseline is the mean of the other stories.
    y (R, T): the tokens that logits, ref_logits (R, T, V) are for; mask as above.
    """
    logp, ref = (-(F.cross_entropy(full_precision(x).transpose(1, 2), y, reduction="none") * mask).sum(1)
                 for x in (logits, ref_logits))
    ratio = (logp - ref).detach()
    advantage = ratio - (ratio.sum() - ratio) / max(1, len(y) - 1)
    return ratio + advantage * (logp - logp.detach())


# ---------------------------------------------------------------------------------------------------
# Draws and batches. Each draw's generator is a function of the seed, of what it is for and of the step:
# so the same command gives the same numbers, and a run can be taken up again at any step.

BATCH, SLIC, ROLLOUT, EVAL, SHOW = range(5)


def rng(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))


def sample(model, n, s, key):
    """n stories of the model -> tokens (n, T)."""
    bos = torch.full((n, 1), BOS, device=s.device)
    return trim(generate(model, bos, s.max_new, generator=rng(s.seed, *key)))


def trim(tokens):
    """Cuts the columns that are padding in every row: (N, T) -> (N, T' <= T)."""
    return tokens[:, :1 + int(story_mask(tokens).sum(1).max())]


def batch_rows(n, s, purpose, step):
    """The rows, out of n, of a step's batch: a fresh permutation each pass, its remainder left out."""
    one_pass, i = divmod(step, n // s.batch)
    return torch.randperm(n, generator=rng(s.seed, purpose, one_pass))[i * s.batch:(i + 1) * s.batch]


def get_stories(data, rows, s):
    """Rows of a token file (N, n, T) -> tokens (B * n, T'), a row's n responses next to each other."""
    return trim(torch.from_numpy(data[rows.numpy()].astype("int64")).flatten(0, 1).to(s.device))


@torch.no_grad()
def data_logp(model, data, s, score=seq_logp):
    """
    log pi (or reward) of all the data -> (N, n). In the batches of training's first pass, so in the same
    shapes and with the same roundings: at step 0 Eq. 5's margins against the reference are exactly 0.
    """
    logp = torch.empty(data.shape[:2], device=s.device)
    for rows in torch.randperm(len(data), generator=rng(s.seed, BATCH, 0)).split(s.batch):
        y = get_stories(data, rows, s)
        logp[rows] = score(model, y, story_mask(y)).view(len(rows), -1)
    return logp


# ---------------------------------------------------------------------------------------------------
# Settings: one line a flag; the defaults live in LOSSES (per algorithm) and here (per model).

TOY = dict(judge="expert", batch=16, steps=500, warmup=50, lr=2e-4, max_new=100, eval_every=50, eval_stories=256)
# E.2's, but for lr, which the paper does not give: ours, and not measured yet
PAPER = dict(judge="reward", batch=128, steps=40000, warmup=5000, lr=1e-5, max_new=255, eval_every=1000,
             eval_stories=1000, R=32)
MODELS = ({"toy": TOY, "toy-naive": TOY | dict(judge="naive")}
          | dict.fromkeys(("stories260K", "stories15M", "stories42M", "stories110M"), PAPER))


def get_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with every default filled in."""
    p = Parser(description="Align a story writer by SPO (arXiv 2405.00747), DPO, IPO or SLiC-HF.",
               argument_default=argparse.SUPPRESS)
    p.add_argument("--algo", choices=LOSSES, default="spo", help="the loss; sft: likelihood; reward: a reward model")
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
    p.add_argument("--tokenizer", help="the checkpoint's own; toy: tokenizer.model, else <data>/tokenizer.model")
    p.add_argument("--judge", choices=JUDGES, help="of the evaluations: see evaluate.py")
    p.add_argument("--out", help="the run's folder; default out/<model>-<algo>-<settings>")
    p.add_argument("--seed", type=int, default=0, help="of batches, rollouts and evaluations")
    p.add_argument("--steps", type=int, help="how many")
    p.add_argument("--batch", type=int, help="rows of the preference data a step")
    p.add_argument("--lr", type=float, help="AdamW's learning rate after warm-up")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up")
    p.add_argument("--max_new", type=int, help="longest story, in tokens; a longer one is cut")
    p.add_argument("--eval_every", type=int, help="steps between evaluations")
    p.add_argument("--eval_stories", type=int, help="fresh stories an evaluation")
    p.add_argument("--log_every", type=int, default=10, help="steps a logged line")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    p.add_argument("--device", choices=devices, default=devices[0])
    p.add_argument("--resume", action="store_true", default=False, help="go on from <out>/ckpt.pt")
    s = p.parse_args(argv)

    reads = LOSSES[s.algo][2]
    unread = {name for _, _, settings in LOSSES.values() for name in settings} - reads.keys()
    for name in unread & vars(s).keys():
        p.error(f"--{name} is not read by {s.algo}, which reads {', '.join(reads) or 'none of these'}")
    for name, default in (reads | MODELS[s.model]).items():
        if name not in unread:
            setattr(s, name, getattr(s, name, default))
    lowest = dict(alpha=0, beta=0, gamma=0, delta=0, lr=0, seed=0, warmup=0, R=1, k=1,
                  steps=1, batch=1, max_new=1, eval_every=1, eval_stories=2, log_every=1)
    for name, low in lowest.items():
        if not low <= getattr(s, name, low) < math.inf:
            p.error(f"--{name} is {getattr(s, name)}: it must be a number from {low} on")
    if s.algo == "ipo" and s.beta == 0:
        p.error("--beta is 0: ipo's target margin is 1/(2 beta), so it must be above 0")

    s.data = getattr(s, "data", f"data/{s.model}")
    s.init = getattr(s, "init", f"{s.data}/sft.pt")
    s.tokenizer = getattr(s, "tokenizer", ("" if s.model.startswith("toy") else f"{s.data}/") + "tokenizer.model")
    name = "-".join([s.model, s.algo, *(f"{n}{getattr(s, n)}".removesuffix(".0") for n in reads), f"seed{s.seed}"])
    s.out = getattr(s, "out", f"out/{name}").rstrip("/")
    return s


# ---------------------------------------------------------------------------------------------------
# Training

def learning_rate(s, step):
    """Linear warm-up, then constant; for sft a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, s.warmup))
    done = max(0, step - s.warmup) / max(1, s.steps - s.warmup) if s.algo == "sft" else 0.0
    return s.lr * warm * (1 + math.cos(math.pi * done)) / 2


def take_up(s, optimizer):
    """Goes on from a run's checkpoint -> step, rollout, window; the log is cut back to there."""
    checkpoint = read_checkpoint(f"{s.out}/ckpt.pt", s.device)
    if "settings" not in checkpoint:
        raise UserError(f"{s.out}/ckpt.pt is a model without its run: name it with --init instead.")
    free = {"resume", "out", "device"} | ({"steps"} if s.algo != "sft" else set())  # a cosine knows its end
    for name, value in checkpoint["settings"].items():
        if name not in free and getattr(s, name) != value:
            raise UserError(f"{s.out} was begun with --{name} {value}, not {getattr(s, name)}: "
                            "resume with the same.")
    optimizer.load_state_dict(checkpoint["optimizer"])
    kept = [r for r in read_log(s.out) if r["step"] <= checkpoint["step"]]
    write_whole(f"{s.out}/log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    return checkpoint["step"], checkpoint["rollout"], checkpoint["window"]


@torch.no_grad()
def measure(policy, ref, judge, s, n, key) -> dict:
    """
    Of n fresh stories: what the judge says of them; KL to the reference and entropy, in nats a story;
    length in tokens; the share that is closed.
    """
    y = sample(policy, n, s, key)
    mask = story_mask(y)
    kl, entropy = [], []
    for part, m in zip(y.split(64), mask[:, 1:].split(64)):
        logits = full_precision(policy(part[:, :-1]))
        kl.append(token_kl(logits, ref(part[:, :-1]), m))
        entropy.append((torch.distributions.Categorical(logits=logits).entropy() * m).sum(1))
    length = mask.sum(1, keepdim=True)
    closed = y.gather(1, length) == BOS
    return dict(n=n) | judge(y, mask) | dict(
        kl=torch.cat(kl).mean().item(), entropy=torch.cat(entropy).mean().item(),
        length=length.float().mean().item(), closed=closed.float().mean().item())


def evaluate(policy, ref, judge, others, s, step):
    """
    Records what measure says, and keeps the model with the highest win-rate so far in best.pt. Of sft: nats
    a held-out story; of a reward model: the share of the held-out pairs whose better story it puts first.
    """
    if s.algo == "sft":
        return record(s, step=step, nats=-data_logp(policy, others, s).mean().item())
    if s.algo == "reward":
        r = data_logp(policy, others, s, story_reward)
        return record(s, step=step, right=(r[:, 0] > r[:, 1]).float().mean().item())
    record(s, step=step, **measure(policy, ref, judge, s, s.eval_stories, (EVAL, step)))
    if peak(s.out)["step"] == step:
        save(policy, f"{s.out}/best.pt")


def take_in(s):
    """What a run reads -> reference, policy, data (N, n, T), stories or pairs to evaluate with, judge."""
    ref = load(s.init, s.device).requires_grad_(False)
    policy = load(f"{s.out}/ckpt.pt", s.device, s.algo == "reward") if s.resume else load(s.init, s.device)
    tokenizer = load_tokenizer(s.tokenizer, ref.args.vocab_size)
    file = LOSSES[s.algo][1]
    n = dict(stories=(1,), pairs=(2,)).get(file, range(2, 100))  # responses a row
    data = load_tokens(f"{s.data}/{file}.npy", ref.args, n, s.batch)
    if s.max_new > (longest := ref.args.max_seq_len):
        raise UserError(f"--max_new is {s.max_new}, but the model reads {longest} tokens at most.")
    if s.algo == "sft":
        return ref, policy, data, load_tokens(f"{s.data}/heldout.npy", ref.args, (1,), 1), None
    if s.algo == "reward":
        return ref, policy.scalar_head(), data, load_tokens(f"{s.data}/heldout_pairs.npy", ref.args, (2,), 1), None
    others = load_tokens(f"{s.data}/ref.npy", ref.args, (1,), s.batch)
    y_ref = get_stories(others, torch.arange(min(2000, len(others))), s)                    # (M, T)
    return ref, policy, data, others, judge_of(s, tokenizer, y_ref, story_mask(y_ref))


def train(s) -> int:
    """Minimises Eq. 1 from s.init, which is the reference too, on the data in s.data -> the step reached."""
    loss_of, _, reads = LOSSES[s.algo]
    score = story_reward if s.algo == "reward" else seq_logp
    ref, policy, data, others, judge = take_in(s)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.lr, betas=(0.9, 0.95), fused=True)
    step, y_kl, window = take_up(s, optimizer) if s.resume else begin(s)
    print(textwrap.fill(" ".join(f"{k}={v}" for k, v in vars(s).items()), 80, break_on_hyphens=False))

    ref_logp = data_logp(ref, data, s) if s.algo in ("dpo", "ipo") else torch.zeros(data.shape[:2])
    # the first Ctrl-C finishes the step and saves, the second leaves at once
    first, began, stop = step, time.perf_counter(), []
    signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    print("  step     loss     pref     kl  margin   acc       lr     ms  tok/s   left")
    if step == 0:
        evaluate(policy, ref, judge, others, s, step)
    while step < s.steps:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)

        # 1. every k steps, R fresh stories of the current model; the reference reads them once
        if "R" in reads and s.beta > 0 and (step % s.k == 0 or step == first):
            if step % s.k == 0:
                y_kl = sample(policy, s.R, s, (ROLLOUT, step))                          # (R, T)
            with torch.no_grad():
                ref_logits = ref(y_kl[:, :-1])                                          # (R, T-1, V)

        # 2. log pi_theta of the batch's responses, all in one forward
        rows = batch_rows(len(data), s, BATCH, step)
        y = get_stories(data, rows, s)                                                  # (B * n, T)
        logp = score(policy, y, story_mask(y)).view(s.batch, -1)                        # (B, n)

        # 3. Eq. 1: preference loss + beta * regulariser
        loss = pref = loss_of(s, logp, ref_logp[rows]).mean()
        kl = torch.full_like(pref, math.nan)
        if "R" in reads and s.beta > 0:
            logits, mask = policy(y_kl[:, :-1]), story_mask(y_kl)[:, 1:]
            kl = (token_kl(logits, ref_logits, mask) if s.kl == "token" else
                  sequence_kl(logits, ref_logits, y_kl[:, 1:], mask)).mean()
            loss = pref + s.beta * kl
        elif s.algo == "slic":
            y_ref = get_stories(others, batch_rows(len(others), s, SLIC, step), s)
            loss = pref - s.beta * seq_logp(policy, y_ref, story_mask(y_ref)).mean()

        # 4. AdamW on the clipped gradient
        optimizer.zero_grad()
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).isfinite():
            raise UserError(f"the gradient is not finite at step {step}, loss {loss:.3g}: try a lower --lr.")
        optimizer.step()
        step += 1

        # 5. log the mean of the steps since the last line; evaluate; save
        margin = logp[:, 0] - logp[:, 1:].amax(1) if logp.shape[1] > 1 else logp[:, 0] * math.nan
        terms = torch.stack((loss, pref, kl, margin.mean(), torch.where(margin > 0, 1.0, 0 * margin).mean()))
        window.append((terms.detach(), y.numel(), time.perf_counter() - started))
        if step == 1 or step % s.log_every == 0:
            terms, tokens, seconds = zip(*window)
            loss, pref, kl, margin, accuracy = torch.stack(terms).mean(0).tolist()
            record(s, step=step, loss=loss, pref=pref, kl=kl, margin=margin, accuracy=accuracy, lr=group["lr"],
                   ms=1e3 * sum(seconds) / len(window), tokens_s=sum(tokens) / sum(seconds),
                   left=(time.perf_counter() - began) / (step - first) * (s.steps - step))
            window = []
        if due := step % s.eval_every == 0 or step == s.steps:
            evaluate(policy, ref, judge, others, s, step)
        if due or stop:
            save(policy, f"{s.out}/ckpt.pt", settings=vars(s), step=step, optimizer=optimizer.state_dict(),
                 rollout=y_kl, window=window)
        if stop:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step == s.steps and judge:
        report(policy, ref, s)
    return step


def report(policy, ref, s):
    """The peak, and three stories before and after, drawn with the same random numbers."""
    tokenizer = load_tokenizer(s.tokenizer, ref.args.vocab_size)
    print("peak win-rate {win:.3f} ± {win_se:.3f} at step {step}, kl {kl:.2f}\n".format(**peak(s.out)))
    pairs = zip(*(tokenizer.decode(sample(model, 3, s, (SHOW,)).tolist()) for model in (ref, policy)))
    text = "".join(textwrap.fill(f"{when}: {story}", 80, subsequent_indent="        ") + "\n"
                   for pair in pairs for when, story in zip(("before", " after"), pair))
    with open(f"{s.out}/stories.txt", "w") as f:
        f.write(text)
    print(text, end="")


def main():
    s = get_args()
    step = train(s)
    if step < s.steps:
        print(f"stopped, and saved at step {step}: the same command with RESUME=1 (--resume) goes on")
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli(main)
