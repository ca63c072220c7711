"""
Soft Preference Optimization (arXiv 2405.00747), and the methods the paper compares it with.

Read from top to bottom it follows the paper: the probability of a story, one function an equation for
the losses, the token-wise KL on intermittent rollouts, and the loop that adds them up. Equation numbers
are the paper's. The losses need nothing but torch: copy the one you want.

    python spo.py --algo spo --alpha 0.01
"""
import hashlib
import math
import textwrap
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from evaluate import judge_of, load_tokenizer, load_tokens, story_reward
from model import BOS, UserError, cli, full_precision, generate, load, save
from run import folder, peak, ranks, record, settings, sha256, show, take_up

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


HEAD = 4096  # positions whose logits are held; those of more are made again for the gradient


def story_sum(f, counts, *inputs):
    """
    The sum over each row's positions that count of what f gives them -> (N,): counts (N, T), inputs
    (N, T, ..), f: inputs (n, ..) -> (n,). So nothing of the vocabulary's size is made for padding.
    """
    pieces = list(zip(*(x[counts].split(HEAD) for x in inputs)))
    values = torch.cat([checkpoint(f, *piece, use_reentrant=False) if len(pieces) > 1 else f(*piece)
                        for piece in pieces])
    return values.new_zeros(counts.shape).masked_scatter(counts, values).sum(1)


def seq_logp(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    log pi(y | x) in nats, (N,): tokens (N, T) are prompt and response, mask (N, T) is 1 on the tokens
    that count, the response and its end. model: a Transformer, or any function from tokens to logits.
    """
    states, output = (model.states, model.output) if hasattr(model, "states") else (model, lambda x: x)
    return story_sum(lambda x, y: -F.cross_entropy(full_precision(output(x)), y, reduction="none"),
                     mask[:, 1:].bool(), states(tokens[:, :-1]), tokens[:, 1:])


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


# algorithm: (its loss of logp (B, n), best first, ref (B, n) and mu (B,); the token file it learns
# from; the settings that not all read, with defaults that are ours, measured on the toy world). Whoever
# reads R is regularised by the token KL on R rollouts, taken every k steps.
LOSSES = {
    "spo": (lambda s, logp, ref, mu: spo_loss(logp[:, 0], logp[:, 1], s.alpha, mu),
            "pairs", dict(alpha=0.01, beta=0.05, gamma=0.0, R=8, k=8, kl="token")),
    "best_of_n": (lambda s, logp, ref, mu: best_of_n_loss(logp, logp.new_zeros(len(logp)).long(), s.alpha),
                  "best", dict(alpha=0.01, beta=0.1, R=8, k=8, kl="token")),
    "ranked": (lambda s, logp, ref, mu: ranked_loss(logp, s.alpha),
               "ranked", dict(alpha=0.01, beta=0.1, R=8, k=8, kl="token")),
    "dpo": (lambda s, logp, ref, mu: dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], s.beta),
            "pairs", dict(beta=0.1)),
    "ipo": (lambda s, logp, ref, mu: ipo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], s.beta),
            "pairs", dict(beta=0.03)),
    "slic": (lambda s, logp, ref, mu: slic_loss(logp[:, 0], logp[:, 1], s.delta),
             "pairs", dict(delta=10.0, beta=0.1)),
    # pre-training, and Section 2's reward model (its text dropped the log): Eq. 9 at alpha = 1, of rewards
    "sft": (lambda s, logp, ref, mu: -logp[:, 0], "stories", dict()),
    "reward": (lambda s, r, ref, mu: spo_loss(r[:, 0], r[:, 1], 1.0), "pairs", dict()),
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


def rollout_kl(policy, ref, y, states, ref_states):
    """Appendix D's KL of the stories y (R, T) -> (R,), from the states (R, T-1, dim) both have of them."""
    def f(x, r):
        return token_kl(policy.output(x)[:, None], ref.output(r)[:, None], torch.ones_like(x[:, :1]))
    return story_sum(f, story_mask(y)[:, 1:].bool(), states, ref_states)


def sequence_kl(logp, ref_logp):
    """
    What Appendix D sets aside: log pi_theta(y) - log pi_ref(y) of each story -> (R,), with the gradient of
    the score-function estimate, unbiased on fresh stories; its baseline is the mean of the other stories.
    """
    ratio = (logp - ref_logp).detach()
    advantage = ratio - (ratio.sum() - ratio) / max(1, len(logp) - 1)
    return ratio + advantage * (logp - logp.detach())


# ---------------------------------------------------------------------------------------------------
# Draws and batches. Each draw's generator is a function of the seed, of what it is for and of the step:
# so the same command gives the same numbers, and a run can be taken up again at any step.

BATCH, SLIC, ROLLOUT, EVAL, SHOW = range(5)


def rng(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))


@torch.no_grad()
def sample(model, n, s, key):
    """n stories of the model -> tokens (n, T), 256 at a time; the ranks share the work, and all get all."""
    g, each = rng(s.seed, *key), -(-n // s.world)
    torch.rand(s.rank * each, s.max_new, generator=g)  # what the ranks before this one draw
    bos = torch.full((each, 1), BOS, device=s.device)
    with autocast(s):
        y = torch.cat([generate(model, part, s.max_new, generator=g, compiled=s.compile)
                       for part in bos.split(256)])
    if s.world > 1:
        dist.all_gather(every := [torch.empty_like(y) for _ in range(s.world)], y)
        y = torch.cat(every)[:n]
    return trim(y)


def trim(tokens):
    """Cuts the columns that are padding in every row: (N, T) -> (N, T' <= T)."""
    return tokens[:, :1 + int(story_mask(tokens).sum(1).max())]


def batch_rows(n, s, purpose, step):
    """The rows, out of n, of a step's batch: a fresh permutation each pass, its remainder left out."""
    one_pass, i = divmod(step, n // s.batch)
    return torch.randperm(n, generator=rng(s.seed, purpose, one_pass))[i * s.batch:(i + 1) * s.batch]


def micro_batches(data, rows, s):
    """
    This rank's share of some rows of a token file (N, n, T), longest first to save padding, s.micro
    stories at a time: rows (b,) and tokens (b * n, T'), a row's n responses next to each other.
    """
    y = torch.from_numpy(data[rows.numpy()].astype("int64"))                                # (B, n, T)
    longest = story_mask(y.flatten(0, 1)).sum(1).view(y.shape[:2]).amax(1)
    order = longest.argsort(descending=True, stable=True)[s.rank::s.world]
    for part in order.split(max(1, s.micro // y.shape[1])) if len(order) else ():
        yield rows[part], trim(y[part].flatten(0, 1).to(s.device))


@torch.no_grad()
def data_logp(model, data, s, score=seq_logp, batches=None):
    """
    log pi (or reward) of all the data -> (N, n), or of the rows in some batches. In the batches of training's
    first pass, so in the same shapes and with the same roundings: at step 0 Eq. 5's margins are exactly 0.
    """
    logp = torch.zeros(data.shape[:2], device=s.device)
    for batch in batches or torch.randperm(len(data), generator=rng(s.seed, BATCH, 0)).split(s.batch):
        for rows, y in micro_batches(data, batch, s):
            with autocast(s):
                logp[rows] = score(model, y, story_mask(y)).view(len(rows), -1)
    return sum_of_ranks(logp, s)


def autocast(s):
    return torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bfloat16")


def sum_of_ranks(x, s):
    if s.world > 1:
        dist.all_reduce(x)
    return x


# ---------------------------------------------------------------------------------------------------
# Training

def get_args(argv=None):
    """The command line, checked, with every default filled in: those of LOSSES, and run.py's per model."""
    return settings(LOSSES, argv)


def learning_rate(s, step):
    """Linear warm-up, then constant; for sft a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, s.warmup))
    done = max(0, step - s.warmup) / max(1, s.steps - s.warmup) if s.algo == "sft" else 0.0
    return s.lr * warm * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def measure(policy, ref, judge, s, n, key) -> dict:
    """
    Of n fresh stories: what the judge says of them; KL to the reference and entropy, in nats a story;
    length in tokens; the share that is closed.
    """
    y = sample(policy, n, s, key)
    if s.rank:
        return {}
    mask, kl, entropy = story_mask(y), [], []
    for part, m in zip(y.split(64), mask.split(64)):
        with autocast(s):
            states = policy.states(part[:, :-1])
            kl.append(rollout_kl(policy, ref, part, states, ref.states(part[:, :-1])))
            entropy.append(story_sum(
                lambda x: torch.special.entr(full_precision(policy.output(x)).softmax(-1)).sum(-1),
                m[:, 1:].bool(), states))
    length = mask.sum(1, keepdim=True)
    return dict(n=n) | judge(y, mask) | dict(
        kl=torch.cat(kl).mean().item(), entropy=torch.cat(entropy).mean().item(),
        length=length.float().mean().item(), closed=(y.gather(1, length) == BOS).float().mean().item())


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
    found = measure(policy, ref, judge, s, s.eval_stories, (EVAL, step))
    if not s.rank and found["win"] > peak(s.out)["win"]:
        save(policy, f"{s.out}/best.pt")
    record(s, step=step, **found)


def take_in(s):
    """What a run reads -> reference, policy, data (N, n, T), stories or pairs to evaluate with, judge."""
    ref, policy = load(s.init, s.device).requires_grad_(False), load(s.init, s.device)
    tokenizer = load_tokenizer(s.tokenizer, ref.args.vocab_size)
    file = LOSSES[s.algo][1]
    n = dict(stories=(1,), pairs=(2,)).get(file, range(2, 100))  # responses a row
    data = load_tokens(f"{s.data}/{file}.npy", ref.args, n, s.batch)
    if s.max_new > (longest := ref.args.max_seq_len):
        raise UserError(f"--max_new is {s.max_new}, but the model reads {longest} tokens at most.")
    judged = s.algo not in ("sft", "reward")
    other = dict(sft="heldout", reward="heldout_pairs").get(s.algo, "ref")
    others = load_tokens(f"{s.data}/{other}.npy", ref.args, (2,) if s.algo == "reward" else (1,),
                         s.batch if s.algo == "slic" else 1)
    files = [s.init, s.tokenizer, f"{s.data}/{file}.npy", f"{s.data}/{other}.npy"]
    files += [f"{s.data}/reward.pt"] * (judged and s.judge == "reward")
    s.inputs = "".join(sha256(path)[:4] for path in files)
    if not judged:
        return ref, policy.scalar_head() if s.algo == "reward" else policy, data, others, None
    y_ref = trim(torch.from_numpy(others[:2000, 0].astype("int64")).to(s.device))           # (M, T)
    return ref, policy, data, others, judge_of(s, tokenizer, y_ref, story_mask(y_ref))


def preference(policy, data, ref_logp, s, step):
    """
    Adds the gradient of the preference loss on this rank's share of a step's batch -> the loss, the mean
    margin, accuracy and the tokens that count, (4,).
    """
    loss_of, score = LOSSES[s.algo][0], story_reward if s.algo == "reward" else seq_logp
    batch, mu = batch_rows(len(data), s, BATCH, step), torch.ones(len(data), device=s.device)
    if getattr(s, "gamma", 0) > 0:  # mu's scale is the whole batch's, so all of it is read beforehand
        mu[batch] = pair_weight(*data_logp(policy, data, s, score, [batch])[batch].T, s.gamma)
    terms = torch.zeros(4, device=s.device)
    for rows, y in micro_batches(data, batch, s):
        with autocast(s):
            logp = score(policy, y, mask := story_mask(y)).view(len(rows), -1)              # (b, n)
        loss = loss_of(s, logp, ref_logp[rows], mu[rows]).sum() / s.batch
        loss.backward()
        margin = logp[:, 0] - logp[:, 1:].amax(1) if logp.shape[1] > 1 else logp[:, 0] * math.nan
        won = torch.where(margin > 0, 1.0, 0 * margin)
        terms += torch.stack((loss, margin.sum() / s.batch, won.sum() / s.batch, mask.sum())).detach()
    return terms


def read_by(ref, y, s):
    """This rank's share of the rollouts y (R, T), a few at a time, and what the KL needs of the reference."""
    for part in y[s.rank::s.world].split(s.micro):
        with autocast(s), torch.no_grad():
            known = seq_logp(ref, part, story_mask(part)) if s.kl == "sequence" else ref.states(part[:, :-1])
        yield part, known


def regulariser(policy, ref, rollout, others, s, step):
    """This rank's share of the regulariser, the mean over stories, in pieces to differentiate one by one."""
    for y, of_ref in rollout:
        with autocast(s):
            kl = (sequence_kl(seq_logp(policy, y, story_mask(y)), of_ref) if s.kl == "sequence" else
                  rollout_kl(policy, ref, y, policy.states(y[:, :-1]), of_ref)).sum() / s.R
        yield kl
    if s.algo == "slic":
        for _, y in micro_batches(others, batch_rows(len(others), s, SLIC, step), s):
            with autocast(s):
                nll = -seq_logp(policy, y, story_mask(y)).sum() / s.batch
            yield nll


def train(s) -> int:
    """Minimises Eq. 1 from s.init, which is the reference too, on the data in s.data -> the step reached."""
    files = take_in(s)
    with folder(s) as signals:
        return minimise(s, signals, *files)


def minimise(s, signals, ref, policy, data, others, judge):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.lr, betas=(0.9, 0.95), fused=True)
    step, evaluated, y_kl, window, skipped = take_up(s, policy, optimizer)
    print(textwrap.fill(" ".join(f"{k}={v}" for k, v in vars(s).items()), 80, break_on_hyphens=False))

    rolls_out = "R" in LOSSES[s.algo][2] and s.beta > 0
    ref_logp = (data_logp(ref, data, s) if s.algo in ("dpo", "ipo") else
                torch.zeros(data.shape[:2], device=s.device))
    first, began, rollout = step, time.perf_counter(), []
    print("  step     loss     pref     kl  margin   acc       lr     ms  tok/s   left", flush=True)
    while True:
        # 0. what is done so far is saved, then evaluated: so a kill in between loses nothing
        stop = step > first and bool(sum_of_ranks(torch.tensor(len(signals), device=s.device), s))
        due = step % s.eval_every == 0 or step == s.steps
        if step > first and not s.rank and (stop or due):
            save(policy, f"{s.out}/ckpt.pt", settings=vars(s), step=step, optimizer=optimizer.state_dict(),
                 rollout=y_kl, window=window, skipped=skipped)
        if due and step != evaluated and (step == s.steps or not stop):
            evaluate(policy, ref, judge, others, s, step)
        if stop or step == s.steps:
            break
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)

        # 1. every k steps, R fresh stories of the current model; the reference reads them once
        if rolls_out and (step % s.k == 0 or step == first):
            if step % s.k == 0:
                y_kl = sample(policy, s.R, s, (ROLLOUT, step))                          # (R, T)
            rollout = list(read_by(ref, y_kl, s))

        # 2. and 3. Eq. 1: preference loss + beta * regulariser, each with its gradient
        optimizer.zero_grad()
        terms = preference(policy, data, ref_logp, s, step)
        reg = torch.zeros(1, device=s.device)
        for part in regulariser(policy, ref, rollout, others, s, step):
            (s.beta * part).backward()
            reg += part.detach()

        # 4. AdamW on the clipped gradient of all ranks
        for p in policy.parameters():
            sum_of_ranks(p.grad, s)
        pref, margin, accuracy, tokens, reg = sum_of_ranks(torch.cat((terms, reg)), s)
        loss = pref + getattr(s, "beta", 0) * reg
        if (torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0) + loss).isfinite():
            optimizer.step()
        else:
            skipped.append(step)
            print(f"step {step} is skipped: its loss, {loss:.3g}, or its gradient is not finite")
            if skipped[-5:] == list(range(step - 4, step + 1)):
                raise UserError(f"the loss or gradient was not finite in steps {step - 4} to {step}: begin anew "
                                f"with a lower --lr; the last good model, if there is one, is {s.out}/ckpt.pt.")
        step += 1

        # 5. log the mean of the steps since the last line
        kl = reg if rolls_out else reg * math.nan
        window.append((torch.stack((loss, pref, kl, margin, accuracy, tokens)), time.perf_counter() - started))
        if step == 1 or step % s.log_every == 0:
            terms, seconds = zip(*window)
            loss, pref, kl, margin, accuracy, tokens = torch.stack(terms).mean(0).tolist()
            ms = 1e3 * sum(seconds) / len(window)
            record(s, step=step, loss=loss, pref=pref, kl=kl, margin=margin, accuracy=accuracy, lr=group["lr"],
                   ms=ms, tokens_s=1e3 * tokens / ms, skipped=len(skipped),
                   left=(time.perf_counter() - began) / (step - first) * (s.steps - step))
            window = []
    if step == s.steps and judge:
        show(s, policy.args.vocab_size, *(sample(model, 3, s, (SHOW,)) for model in (ref, policy)))
    return step


def main():
    s = get_args()
    with ranks(s):
        if (step := train(s)) < s.steps:
            print(f"stopped, and saved at step {step}: the same command with RESUME=1 (--resume) goes on")
            raise KeyboardInterrupt


if __name__ == "__main__":
    cli(main)
