"""
Soft Preference Optimization (arXiv 2405.00747), and methods to compare it with: DPO, IPO, SLiC-HF, HyPO.

Reads from top to bottom in the order of the paper: log pi(y), one function per loss, the KL on the model's own
samples, and the training loop that adds them up (Eq. 1). Equation numbers are the paper's. The losses need nothing
but torch; copy the one you want.

    python spo.py --algo spo --alpha 0.01
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import threading
import time

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from model import (BOS, Parser, Progress, UserError, atomic_write, file_hash, format_time, generate, limit_threads,
                   load, load_checkpoint, run_main, save, screen_width, upcast, wrap)

# ---------------------------------------------------------------------------------------------------
# log pi(y): a sum over the tokens of a response y, the BOS that ends it included, so that pi is a distribution over
# responses. A sum, not a mean: alpha = 0.001 .. 0.1 only makes sense for differences of tens of nats.

MAX_LOGITS = 1 << 24  # in memory at a time: those of 524 positions if the vocabulary has 32,000 tokens


def response_mask(tokens, prompt_length=1):
    """
    tokens (N, T): BOS, a prompt or none, a response, BOS, padding with BOS; prompt_length: the tokens of the prompts,
    BOS included, one number or (N,) -> mask (N, T), 1 on the response and the BOS that ends it.

        1 5 6 1 1 1  ->  0 1 1 1 0 0
        1 5 6 7 8 9  ->  0 1 1 1 1 1    cut at the length limit, so it has no end
        1 5 6 7 8 1  ->  0 0 0 1 1 1    with prompt_length 3
    """
    is_bos = tokens[:, 1:] == BOS
    num_bos = is_bos.cumsum(1)
    counts = (num_bos == 0) | ((num_bos == 1) & is_bos)                             # (N, T-1)
    positions = torch.arange(1, tokens.shape[1], device=tokens.device)
    counts &= positions >= torch.as_tensor(prompt_length, device=tokens.device).view(-1, 1)
    return F.pad(counts, (1, 0)).long()


def sum_over_tokens(fn, vocab_size, mask, *inputs):
    """
    fn at the positions where mask (N, T) is 1, summed over each row -> (N,). inputs (N, T, ...); fn gets them as
    (M, ...) and returns (M,). vocab_size: the logits that fn holds per position. With more than MAX_LOGITS of them,
    each chunk of positions is computed again in the backward pass, so that the logits of only one are in memory.
    """
    chunk_size = max(1, MAX_LOGITS // vocab_size)
    chunks = list(zip(*(x[mask].split(chunk_size) for x in inputs)))
    if len(chunks) > 1:
        values = [torch.utils.checkpoint.checkpoint(fn, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        values = [fn(*chunk) for chunk in chunks]
    values = torch.cat(values)                                                      # (M,)
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)


def seq_logp(model, tokens, mask):
    """
    log pi(y | x) in nats -> (N,). tokens (N, T): prompt and response. mask (N, T): 1 on the tokens that count, those
    of the response and its end. model: a Transformer, or any function from tokens to logits.
    """
    assert mask.shape == tokens.shape, f"mask {tuple(mask.shape)} is not that of tokens {tuple(tokens.shape)}"
    if tokens[:, 1:].numel() == 0:  # no row, or nothing after BOS
        return torch.zeros(len(tokens), device=tokens.device)
    if hasattr(model, "hidden"):
        hidden = model.hidden(tokens[:, :-1])                                       # (N, T-1, dim)
        lm_head, vocab_size = model.output, model.args.vocab_size
    else:
        hidden = model(tokens[:, :-1])                                              # (N, T-1, V)
        lm_head, vocab_size = torch.nn.Identity(), hidden.shape[-1]

    def token_logp(hidden, targets):                                                # (M, dim), (M,) -> (M,)
        return -F.cross_entropy(upcast(lm_head(hidden)), targets, reduction="none")

    return sum_over_tokens(token_logp, vocab_size, mask[:, 1:].bool(), hidden, tokens[:, 1:])


# ---------------------------------------------------------------------------------------------------
# Preference losses, not reduced. logp_w, logp_l, ref_w, ref_l (B,): log pi_theta and log pi_ref of the preferred and
# of the rejected response. logp (B, n): log pi_theta of n responses.

def spo_loss(logp_w, logp_l, alpha, mu=None):
    """
    Eq. 9, or Eq. 11 with weights mu (B,): -1/alpha log(pi_w^alpha / (pi_w^alpha + pi_l^alpha)) -> (B,).
    At alpha = 0, Eq. 10 and 12, which are unbounded below. No gradient flows through mu (Eq. 13).
    """
    margin = logp_w - logp_l
    loss = -F.logsigmoid(alpha * margin) / alpha if alpha > 0 else -margin / 2
    return loss if mu is None else mu.detach() * loss


def pair_weight(logp_w, logp_l, gamma, log_mean=None):
    """
    Section 4's example of a mu, (pi_w + pi_l)^gamma, in log space and divided by exp(log_mean) -> (B,). None: by its
    mean over the batch, which makes it depend on the batch; training has a log_mean of all the data.
    """
    log_mu = gamma * torch.logaddexp(logp_w, logp_l).detach()
    return len(log_mu) * log_mu.softmax(0) if log_mean is None else (log_mu - log_mean).exp()


def stage_weights(logp, gamma, log_mean):
    """A mu for each stage of Eq. 15: pair_weight of response i and all after it -> (B, n-1). Eq. 14 has the first."""
    return torch.stack([pair_weight(logp[:, i], logp[:, i + 1:].logsumexp(1), gamma, log_mean[i])
                        for i in range(logp.shape[1] - 1)], 1)


def log_mean_weights(logp, gamma):
    """The log of each stage's mean weight, not yet divided, over rows of data; logp (N, n) -> n-1 numbers."""
    return [(gamma * logp[:, i:].logsumexp(1)).logsumexp(0) - math.log(len(logp)) for i in range(logp.shape[1] - 1)]


def best_of_n_loss(logp, best, alpha, mu=None):
    """
    Eq. 14: -1/alpha log(pi_best^alpha / sum_i pi_i^alpha) -> (B,). best (B,): the index of the best of n; mu (B,).
    The paper has alpha > 0; at alpha = 0 this is the limit without its constant, log(n)/alpha.
    """
    logp_best = logp.gather(1, best[:, None]).squeeze(1)
    loss = (alpha * logp).logsumexp(1) / alpha - logp_best if alpha > 0 else logp.mean(1) - logp_best
    return loss if mu is None else mu.detach() * loss


def ranked_loss(logp, alpha, mu=None):
    """Eq. 15: each response is the best of itself and those after it -> (B,). logp: best first; mu (B, n-1)."""
    first = torch.zeros(len(logp), dtype=torch.long, device=logp.device)
    return sum((best_of_n_loss(logp[:, i:], first, alpha, None if mu is None else mu[:, i])
                for i in range(logp.shape[1] - 1)), logp.new_zeros(len(logp)))


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """Eq. 5: -log sigmoid(beta ((logp_w - ref_w) - (logp_l - ref_l))) -> (B,)."""
    return -F.logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l)))


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """IPO (arXiv 2310.12036), its Eq. 17 with beta for tau: (log-ratio difference - 1/(2 beta))^2 -> (B,)."""
    return ((logp_w - ref_w) - (logp_l - ref_l) - 1 / (2 * beta)) ** 2


def slic_loss(logp_w, logp_l, delta):
    """SLiC-HF's calibration loss (arXiv 2305.10425), its Eq. 1: max(0, delta - logp_w + logp_l) -> (B,)."""
    return (delta - logp_w + logp_l).clamp(min=0)


def preference_loss(args, logp, ref_logp, mu):
    """
    PreferenceLoss of Eq. 1, per row -> (B,). logp, ref_logp (B, n): log pi of n responses, best first. mu (B, n-1):
    the weights of Eq. 15's stages, of which pairs and best_of_n have the first.
    """
    logp_w, logp_l = logp[:, 0], logp[:, 1]
    ref_w, ref_l = ref_logp[:, 0], ref_logp[:, 1]
    if args.algo == "spo":
        return spo_loss(logp_w, logp_l, args.alpha, mu[:, 0])
    if args.algo == "best_of_n":
        best = torch.zeros(len(logp), dtype=torch.long, device=logp.device)
        return best_of_n_loss(logp, best, args.alpha, mu[:, 0])
    if args.algo == "ranked":
        return ranked_loss(logp, args.alpha, mu)
    if args.algo in ("dpo", "hypo"):
        return dpo_loss(logp_w, logp_l, ref_w, ref_l, args.beta)
    if args.algo == "ipo":
        return ipo_loss(logp_w, logp_l, ref_w, ref_l, args.beta)
    if args.algo == "slic":
        return slic_loss(logp_w, logp_l, args.delta)


# ---------------------------------------------------------------------------------------------------
# The regularizer (Section 3, Appendix D): the KL to the reference on the model's own samples, not on the data

def kl_per_token(logits, ref_logits):
    """KL(pi_theta(. | prefix) || pi_ref(. | prefix)) over the full vocabulary, (..., V) -> (...)."""
    logp = upcast(logits).log_softmax(-1)
    ref_logp = upcast(ref_logits).log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def token_kl(logits, ref_logits, mask):
    """
    Appendix D: kl_per_token summed over the tokens of each sample -> (R,) nats. logits, ref_logits (R, T, V); mask
    (R, T) is 1 where the next token counts: with tokens and their mask as in seq_logp, logits of tokens[:, :-1] go
    with mask[:, 1:]. The mean over fresh samples of pi_theta is an unbiased estimate of D_KL(pi_theta || pi_ref). Its
    gradient is not: it leaves out how theta moves the prefixes.
    """
    assert mask.shape == logits.shape[:2], f"mask {tuple(mask.shape)} is not that of logits {tuple(logits.shape)}"
    return (kl_per_token(logits, ref_logits) * mask).sum(1)


def rollout_kl(policy, ref, y, mask, ref_hidden):
    """token_kl of the rollouts y (R, T) without ever holding (R, T, V) logits -> (R,)."""
    def kl_at(hidden, ref_hidden):                                                  # (M, dim), (M, dim) -> (M,)
        return kl_per_token(policy.output(hidden), ref.output(ref_hidden))
    hidden = policy.hidden(y[:, :-1])                                               # (R, T-1, dim)
    return sum_over_tokens(kl_at, policy.args.vocab_size, mask[:, 1:].bool(), hidden, ref_hidden)


def no_prompts(n):
    """The prompts of n samples that start from BOS alone -> (n, 1)."""
    return torch.full((n, 1), BOS)


@torch.no_grad()
def sample(model, prompts, max_new_tokens, generator, generate=generate):
    """
    A sample of pi(y | x) for each prompt x (n, P), padded with -1, at temperature 1 and from all tokens -> tokens
    (n, T), padded with BOS. max_new_tokens counts the prompt too, but for its BOS.
    """
    prompts = prompts.to(next(model.parameters()).device)
    num_tokens = 1 + max_new_tokens - prompts.shape[1]
    assert num_tokens > 0, f"prompts of {prompts.shape[1]} tokens, BOS included, but {max_new_tokens} in all"
    progress, samples = Progress("sampled", len(prompts)), []
    for part in prompts.split(256):
        samples.append(generate(model, part, num_tokens, generator=generator))
        progress.add(len(part))
    return trim_padding(torch.cat(samples))


# ---------------------------------------------------------------------------------------------------
# Data. A file holds tokens (N, n, T), uint16: n responses per row, best first. Every random draw has a generator of
# its own, seeded by what it is for and when, so that a resumed run draws what it would have drawn.

PROMPT_LENGTH = "_prompt_length.npy"  # the lengths of pairs.npy's prompts, if any, are in pairs_prompt_length.npy
BATCH, SLIC_BATCH, ROLLOUT, EVAL, SHOW, PROMPT = range(6)  # purposes; extras/judge.py draws for EVAL and SHOW


def rng(*key):
    """A generator seeded by (seed, purpose) and, where there is one, the step or epoch."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    seed = int(digest[:15], 16)
    return torch.Generator().manual_seed(seed)


class Responses:
    """tokens (N, n, T), and prompt_length (N,): the tokens of each row's prompt, BOS included, by default BOS alone."""

    def __init__(self, tokens, prompt_length=None):
        self.tokens = tokens
        self.prompt_length = torch.ones(len(tokens), dtype=torch.long)
        if prompt_length is not None:
            self.prompt_length = torch.from_numpy(prompt_length.astype("int64"))

    def __len__(self):
        return len(self.tokens)

    def prompts(self, rows):
        """The prompts of some rows -> (b, P), padded with -1."""
        lengths = self.prompt_length[rows]
        tokens = torch.from_numpy(self.tokens[rows.numpy(), 0, :lengths.max()].astype("int64"))
        return tokens.masked_fill(torch.arange(lengths.max()) >= lengths[:, None], -1)


def load_responses(path, model_args, min_rows=1, num_responses=None):
    """
    The token file at path, and the prompts' lengths where a file has them, checked -> Responses of N >= min_rows rows
    and n = num_responses (None: 2 or more).
    """
    import numpy as np  # here, because the losses need nothing but torch
    lengths_path = path.removesuffix(".npy") + PROMPT_LENGTH
    try:
        tokens, lengths = np.load(path), None
        if tokens.dtype != np.uint16 or tokens.ndim != 3 or tokens.size == 0:
            raise ValueError(f"it holds {tokens.dtype} {tokens.shape}, not uint16 (rows, responses, tokens)")
        N, n, T = tokens.shape
        if os.path.exists(lengths_path):
            lengths = np.load(lengths_path)
            if lengths.shape != (N,) or lengths.min() < 1 or lengths.max() >= T:
                raise ValueError(f"{os.path.basename(lengths_path)} is not of its rows")
            if ((tokens != tokens[:, :1]) & (np.arange(T) < lengths[:, None, None])).any():
                raise ValueError("the responses of a row have different prompts")
    except Exception as e:  # a damaged file can fail in any way
        reason = " ".join(str(e).split())[:80]
        raise UserError(f"{path} cannot be read as a token file ({reason}): `make data` creates it, for a "
                        "published model with MODEL= and SOURCE=.") from None
    if N < min_rows:
        raise UserError(f"{path} has {N} rows, but {min_rows} are needed (--batch_size).")
    if num_responses is None and n < 2:
        raise UserError(f"{path} has rows of {n} responses, not of two or more.")
    if num_responses is not None and n != num_responses:
        raise UserError(f"{path} has rows of {n} responses, not of {num_responses}.")
    longest, last = model_args.max_seq_len + 1, model_args.vocab_size - 1
    if not 2 <= T <= longest or tokens.max() > last or (tokens[..., 0] != BOS).any():
        raise UserError(f"{path} holds tokens or lengths that this model does not have: create it for this model.")
    return Responses(tokens, lengths)


def epoch_batches(num_rows, batch_size, seed, purpose, epoch):
    """The rows in a new order for every epoch, in batches; the last one can be smaller."""
    return torch.randperm(num_rows, generator=rng(seed, purpose, epoch)).split(batch_size)


def batch_indices(num_rows, batch_size, seed, purpose, step):
    """The rows in this step's batch. The smaller batch at the end of an epoch is left out."""
    epoch, i = divmod(step, num_rows // batch_size)
    return epoch_batches(num_rows, batch_size, seed, purpose, epoch)[i]


def micro_batches(data, rows, micro_batch_size, device):
    """Rows of the Responses, longest first so that little is padding -> rows (b,), tokens and mask (b * n, T' <= T)."""
    y = torch.from_numpy(data.tokens[rows.numpy()].astype("int64"))                 # (B, n, T)
    n = y.shape[1]
    prompt_length = data.prompt_length[rows].repeat_interleave(n)                   # (B * n,)
    mask = response_mask(y.flatten(0, 1), prompt_length).view(y.shape)              # (B, n, T)
    ends = (mask * torch.arange(y.shape[2])).amax((1, 2))                           # (B,)
    order = ends.argsort(descending=True, stable=True)
    for i in order.split(max(1, micro_batch_size // n)):
        length = 1 + int(ends[i].max())
        yield rows[i], y[i, :, :length].flatten(0, 1).to(device), mask[i, :, :length].flatten(0, 1).to(device)


def trim_padding(tokens):
    """Without the columns that are padding in every row."""
    longest = int(response_mask(tokens).sum(1).max())
    return tokens[:, :1 + longest]


@torch.no_grad()
def dataset_logp(model, data, batches, micro_batch_size):
    """log pi of the rows in some batches -> (N, n), 0 elsewhere."""
    device = next(model.parameters()).device
    logp = torch.zeros(data.tokens.shape[:2], device=device)
    progress = Progress("log pi of row", sum(map(len, batches)))
    for batch in batches:
        for rows, y, mask in micro_batches(data, batch, micro_batch_size, device):
            logp[rows] = seq_logp(model, y, mask).view(len(rows), -1)               # (b, n)
        progress.add(len(batch))
    return logp


# ---------------------------------------------------------------------------------------------------
# Training

def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def get_lr(step, args):
    """Linear warm-up, then constant."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


# What is kept of every step, in this order, until the mean of several is logged
METRICS = ("loss", "pref", "margin", "accuracy", "chosen", "rejected", "tokens", "reg", "grad_norm", "seconds")


def batch_metrics(pref, logp, mask, batch_size):
    """
    A micro-batch's share of METRICS' pref to tokens -> (6,). chosen: log pi of the best response; rejected: of the
    others' most probable one; margin: their difference; accuracy: the share of rows where it is positive.
    """
    chosen = logp[:, 0]                                                             # (b,)
    rejected = logp[:, 1:].amax(1)
    margin = chosen - rejected
    means = [x.sum() / batch_size for x in (margin, (margin > 0).float(), chosen, rejected)]
    return torch.stack((pref.detach(), *means, mask.sum()))


@torch.no_grad()
def sample_rollouts(args, policy, ref, data, step, generate):
    """
    R samples of the policy, for the prompts of R rows drawn from the data, in micro-batches: [(y (r, T), its mask, the
    reference's hidden states on it (r, T-1, dim))].
    """
    rows = torch.randint(len(data), (args.num_rollouts,), generator=rng(args.seed, PROMPT, step))
    y = sample(policy, data.prompts(rows), args.max_new_tokens, rng(args.seed, ROLLOUT, step), generate)
    mask = response_mask(y, data.prompt_length[rows])
    parts = zip(y.split(args.micro_batch_size), mask.split(args.micro_batch_size))
    return [(y, mask, ref.hidden(y[:, :-1])) for y, mask in parts]


def is_best(record, best_win_rate, max_kl):
    """Whether an evaluation's win rate is above best_win_rate, and its KL at most max_kl; None was not finite."""
    win_rate, kl = record.get("win_rate"), record.get("kl", 0.0)
    if win_rate is None or kl is None:
        return False
    return kl <= max_kl and win_rate > best_win_rate


def train(args, evaluate=None, generate=generate, stop=None):
    """
    Minimizes Eq. 1 from the model in args.init, which is also the reference -> the policy. evaluate(policy, ref, step)
    -> dict to log; best.pt has the highest "win_rate". generate samples the rollouts. stop: a threading.Event.
    """
    policy, ref = load(args.init, args.device), load(args.init, args.device).requires_grad_(False)
    data, ref_samples = load_data(args, policy.args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    open_folder(args)
    state = dict(step=0, rollouts=[], history=[], best_win_rate=-1.0, skipped=0)
    if args.resume:
        state = load_run(args, policy, optimizer)
        if state["step"] == args.steps and (state["evaluated"] or evaluate is None):
            print(wrap(f"{args.out} is finished at step {args.steps}: more --steps (make: STEPS=) train it longer"))
            return policy
    start_step, rollouts, history = state["step"], state["rollouts"], state["history"]
    best_win_rate, skipped, in_a_row = state["best_win_rate"], state["skipped"], 0
    reg_weight = args.beta_kl if args.algo == "hypo" else args.beta  # hypo's beta is that of DPO's loss
    use_kl = args.algo in ("spo", "best_of_n", "ranked", "hypo") and reg_weight > 0
    use_mu = args.algo in ("spo", "best_of_n", "ranked") and args.gamma > 0
    # DPO's and IPO's losses, and mu, compare with log pi_ref of the data, which never changes. It is read in the
    # first epoch's batches: the same shapes round alike, so that policy and reference agree to the last bit at step 0.
    reads_ref = args.algo in ("dpo", "ipo", "hypo") or use_mu
    batches = epoch_batches(len(data), args.batch_size, args.seed, BATCH, 0) if reads_ref else []
    with autocast(args):
        ref_logp = dataset_logp(ref, data, batches, args.micro_batch_size)          # (N, n), 0 if not read
    log_mean = log_mean_weights(ref_logp, args.gamma) if use_mu else None  # fixed: mean mu is 1 at step 0

    print(table_row(dict(zip(COLUMNS, COLUMNS))))
    for step in range(start_step, args.steps + 1):
        # 0. save, then evaluate: a run that is killed in between evaluates again when it is resumed
        stopped = stop is not None and stop.is_set() and start_step < step < args.steps
        if stopped or step % args.eval_every == 0 or step == args.steps:
            save(policy, f"{args.out}/ckpt.pt", step=step, optimizer=optimizer.state_dict(), rollouts=rollouts,
                 history=history, best_win_rate=best_win_rate, skipped=skipped, args=vars(args))
            if evaluate and not stopped:
                results = evaluate(policy, ref, step)
                if is_best(results, best_win_rate, args.max_kl):
                    best_win_rate = results["win_rate"]
                    save(policy, f"{args.out}/best.pt")
                log(args, step=step, **results)
        if stopped:
            print(wrap(f"stopped at step {step}, saved in {args.out}: continue with --resume (make: RESUME=1)"))
        if stopped or step == args.steps:
            break
        step_time, lr = time.perf_counter(), get_lr(step, args)
        optimizer.param_groups[0]["lr"] = lr

        # 1. every k steps, R fresh rollouts from the current policy; the reference reads them once (Appendix D)
        if use_kl and step % args.rollout_every == 0:
            with autocast(args):
                rollouts = sample_rollouts(args, policy, ref, data, step, generate)

        # 2. the preference loss, on a batch of the data
        optimizer.zero_grad()
        batch = batch_indices(len(data), args.batch_size, args.seed, BATCH, step)
        metrics = torch.zeros(6, device=args.device)
        for rows, y, mask in micro_batches(data, batch, args.micro_batch_size, args.device):
            with autocast(args):
                logp = seq_logp(policy, y, mask).view(len(rows), -1)                # (b, n)
            mu = stage_weights(logp, args.gamma, log_mean) if use_mu else torch.ones_like(logp[:, 1:])  # (b, n-1)
            pref = preference_loss(args, logp, ref_logp[rows], mu).sum() / args.batch_size
            pref.backward()
            metrics += batch_metrics(pref, logp.detach(), mask, args.batch_size)

        # 3. + its weight * the regularizer: the KL on the rollouts; for SLiC-HF the NLL of samples of the reference
        reg = torch.zeros(1, device=args.device)
        for y, mask, ref_hidden in rollouts:
            with autocast(args):
                kl = rollout_kl(policy, ref, y, mask, ref_hidden).sum() / args.num_rollouts
            (reg_weight * kl).backward()
            reg += kl.detach()
        if args.algo == "slic":
            batch = batch_indices(len(ref_samples), args.batch_size, args.seed, SLIC_BATCH, step)
            for _, y, mask in micro_batches(ref_samples, batch, args.micro_batch_size, args.device):
                with autocast(args):
                    nll = -seq_logp(policy, y, mask).sum() / args.batch_size
                (reg_weight * nll).backward()
                reg += nll.detach()

        # 4. AdamW on the gradient, clipped at norm 1; a step that is not finite is skipped
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        loss = metrics[:1] + reg_weight * reg  # reg is 0 for DPO and IPO
        if (grad_norm + loss).isfinite():
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            print(f"step {step} is skipped: its loss or gradient is not finite")
            if in_a_row == 5:
                advice = "start again with a lower --lr" if step > 4 else "a setting or the data is to blame, not --lr"
                raise UserError(f"steps {step - 4} to {step} were not finite: {advice}.")

        # 5. log the mean since the last record
        seconds = torch.tensor([time.perf_counter() - step_time], device=args.device)
        history.append(torch.cat((loss, metrics, reg, grad_norm[None], seconds)))
        if step == 0 or (step + 1) % args.log_every == 0:
            log_training(args, step + 1, history, lr, skipped)
            history = []
    return policy


# ---------------------------------------------------------------------------------------------------
# A run's folder: settings.json, log.jsonl, best.pt, and ckpt.pt, which --resume continues from

def require_file(args, name):
    """Raises UserError, which says what creates it, where args.data has no file of this name."""
    if not os.path.exists(f"{args.data}/{name}"):
        source = "" if args.model in ("toy", "toy-naive") else " SOURCE=..."
        raise UserError(f"{args.data}/{name} does not exist: create it with `make data MODEL={args.model} "
                        f"DATA={args.data}{source}`; ranked.npy and best.npy need rows of responses (docs/data.md).")


def hash_files(args, *names):
    """Records which of these files of args.data the run reads, to be compared when it is resumed."""
    for name in names:
        if os.path.exists(f"{args.data}/{name}"):
            args.hashes[name] = file_hash(f"{args.data}/{name}")


def check_length(max_new_tokens, max_seq_len):
    if max_new_tokens > max_seq_len:
        raise UserError(f"--max_new_tokens is {max_new_tokens}, but the model reads {max_seq_len}.")


def check_prompts(args, data, name):
    longest = int(data.prompt_length.max())
    if longest > args.max_new_tokens:
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}, but a prompt in {args.data}/{name} has {longest} "
                        "tokens, BOS included: give that many or more.")


def recorded_hashes(args):
    """
    name -> sha256 of what the data folder was made from and of its files, as prepare_data.py recorded them; {} where
    it did not make the folder. Refuses another tokenizer than that of the folder's tokens.
    """
    path = f"{args.data}/settings.json"
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as f:
            content = json.load(f)
        recorded = {**content["inputs"], **content["files"]}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged, or of another program or version: name another --data.") from None
    tokenizer = recorded.get("tokenizer.model", recorded.get("tokenizer"))
    if tokenizer and os.path.exists(args.tokenizer) and file_hash(args.tokenizer) != tokenizer:
        raise UserError(f"{args.tokenizer} is not the tokenizer that {args.data} was made with: name that one with "
                        "--tokenizer.")
    return recorded


def load_data(args, model_args):
    """The preference data, and for SLiC-HF samples of the reference, as Responses."""
    name = {"best_of_n": "best.npy", "ranked": "ranked.npy"}.get(args.algo, "pairs.npy")
    require_file(args, name)
    data = load_responses(f"{args.data}/{name}", model_args, args.batch_size, 2 if name == "pairs.npy" else None)
    args.hashes["init"] = file_hash(args.init)
    hash_files(args, name, name.removesuffix(".npy") + PROMPT_LENGTH)
    check_prompts(args, data, name)
    recorded = recorded_hashes(args)  # which refuses another tokenizer, for every algorithm
    check_length(args.max_new_tokens, model_args.max_seq_len)
    if args.algo != "slic":
        return data, None
    if recorded.get("sft.pt", args.hashes["init"]) != args.hashes["init"]:
        raise UserError(f"{args.data}/ref.npy, which slic learns from, has samples of another model than {args.init}: "
                        f"create a folder for it with `make data MODEL=NAME SOURCE=PAIRS ARGS='--init {args.init} "
                        f"--tokenizer {args.tokenizer}'`.")
    hash_files(args, "ref.npy", f"ref{PROMPT_LENGTH}")
    return data, load_responses(f"{args.data}/ref.npy", model_args, args.batch_size, 1)


def open_folder(args):
    """Creates args.out, which must not hold a run unless it is to be resumed."""
    used = [name for name in ("ckpt.pt", "best.pt", "log.jsonl") if os.path.exists(f"{args.out}/{name}")]
    if used and not args.resume:
        raise UserError(f"{args.out} holds an earlier run, {differences(args)}: continue it with --resume (make: "
                        "RESUME=1), or name another folder with --out (OUT=).")
    if args.resume and "ckpt.pt" not in used:
        raise UserError(f"{args.out} has no ckpt.pt, so there is nothing to resume: leave out --resume.")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise UserError(f"{args.out} cannot be created ({e.strerror}): name another folder with --out.") from None
    for name in os.listdir(args.out):
        if name.endswith(".part"):  # of a run that was killed while it saved
            os.remove(f"{args.out}/{name}")
    if not args.resume:
        write_settings(args)


def differences(args):
    """What distinguishes these settings from those of the run in args.out, for a message."""
    try:
        with open(f"{args.out}/settings.json") as f:
            earlier = json.load(f)
        changed = [f"{name} {x} instead of {earlier.get(name)}" for name, x in vars(args).items()
                   if x != earlier.get(name) and name not in ("hashes", "resume")]
    except (OSError, ValueError, AttributeError):
        return "of unknown settings"
    return f"now with {', '.join(changed)}" if changed else "of the same settings"


def write_settings(args):
    with atomic_write(f"{args.out}/settings.json") as f:
        f.write(json.dumps(vars(args), indent=1).encode())


# What may differ when a run is resumed. Files are compared by their hashes, wherever they are now.
MAY_DIFFER = {"resume", "out", "device", "micro_batch_size", "fast_sampling", "data", "init", "tokenizer", "model",
              "steps", "hashes"}


def must_match(settings):
    """What has to be the same when a run is resumed -> dict: settings, and the hashes of the files it reads."""
    return {name: x for name, x in settings.items() if name not in MAY_DIFFER} | settings["hashes"]


def load_run(args, policy, optimizer):
    """Loads args.out's checkpoint into policy and optimizer, and cuts the log back to it -> the checkpoint."""
    path = f"{args.out}/ckpt.pt"
    checkpoint = load_checkpoint(path, args.device)
    try:
        earlier, now = must_match(checkpoint["args"]), must_match(vars(args))
        for name in sorted(earlier.keys() | now.keys()):
            if earlier.get(name) != now.get(name):
                raise UserError(f"{args.out} was started with {name} {str(earlier.get(name))[:20]}, not "
                                f"{str(now.get(name))[:20]}: resume with the same, or start another run with --out.")
        if checkpoint["step"] > args.steps:
            raise UserError(f"{args.out} is at step {checkpoint['step']} already: give --steps that many or more.")
        policy.load_state_dict(checkpoint.pop("model"))
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
        assert all(row.shape == (len(METRICS),) for row in checkpoint["history"]), "history"
        assert all(y.max() < policy.args.vocab_size for y, _, _ in checkpoint["rollouts"]), "rollouts"
        records = cut_log(args, checkpoint["step"])
        checkpoint["evaluated"] = any(r["step"] == checkpoint["step"] and "loss" not in r for r in records)
        for record in records:
            if is_best(record, checkpoint["best_win_rate"], args.max_kl):
                checkpoint["best_win_rate"] = record["win_rate"]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as e:
        raise UserError(f"{args.out} is not what a run from {args.init} leaves, in ckpt.pt or log.jsonl: "
                        f"{' '.join(str(e).split())[:80]}.") from None
    write_settings(args)
    return checkpoint


def cut_log(args, step):
    """Removes what was logged after the checkpoint of this step, and its evaluation if train repeats it -> the rest."""
    with open(f"{args.out}/log.jsonl", "a+") as f:  # which creates it for a run killed before its first record
        f.seek(0)
        records = [json.loads(line) for line in f if line.endswith("\n")]  # a killed run can leave half a line
    repeated = step % args.eval_every == 0 and step != args.steps
    before = [r for r in records if r["step"] < step]
    at_step = [r for r in records if r["step"] == step and ("loss" in r or not repeated)]
    kept = before + at_step
    with atomic_write(f"{args.out}/log.jsonl") as f:
        f.write("".join(json.dumps(r) + "\n" for r in kept).encode())
    return kept


COLUMNS = {"step": 6, "loss": 9, "reg": 8, "margin": 9, "accuracy": 9, "chosen": 9, "rejected": 10, "grad_norm": 10,
           "eta": 10}  # what a training record shows on the screen, and how wide
LEAST_IMPORTANT = ("chosen", "rejected", "grad_norm", "accuracy", "reg")  # left out, in this order, on narrow screens


def table_row(cells):
    """The cells of COLUMNS that there are, and that fit the screen, as a row; cells: column -> text."""
    widths = {name: width for name, width in COLUMNS.items() if name in cells}
    for name in LEAST_IMPORTANT:
        if sum(widths.values()) > screen_width():
            widths.pop(name, None)
    return "".join(cells[name].rjust(width) for name, width in widths.items())


def log(args, **record):
    """Appends a record to log.jsonl, so that it is on the disk before the next checkpoint, and shows it."""
    entry = {**record, "time": round(time.time(), 1)}
    for name, x in entry.items():
        if isinstance(x, float) and not math.isfinite(x):
            entry[name] = None  # JSON has no nan and inf
    with open(f"{args.out}/log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")
        f.flush()
        os.fsync(f.fileno())
    cells = {name: f"{x:.3f}" if isinstance(x, float) else str(x) for name, x in record.items()}
    if "loss" in record:
        print(table_row(cells), flush=True)
    else:
        print(wrap("  ".join(f"{name} {x}" for name, x in cells.items())), flush=True)
        if record.get("kl", 0.0) > args.max_kl:
            print(f"warning: kl is above --max_kl {args.max_kl:g}: best.pt stays as it is", flush=True)


def log_training(args, step, history, lr, skipped):
    """Logs the mean of the steps in history."""
    record = dict(zip(METRICS, torch.stack(history).mean(0).tolist()))
    seconds = record.pop("seconds")
    record |= dict(lr=lr, skipped=skipped, ms=1e3 * seconds, tokens_per_s=record["tokens"] / seconds)
    if args.device == "cuda":
        record["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    log(args, step=step, **record, eta=format_time(seconds * (args.steps - step)))


# ---------------------------------------------------------------------------------------------------
# Command line

# What each algorithm reads; a flag that it does not read is an error. The defaults of dpo, hypo, ipo and slic are
# chosen by E.2's sweep on the toy world (docs/results.md), spo's are gentler. The paper does not say which won its own.
ALGOS = {
    "spo": dict(alpha=0.01, beta=0.05, gamma=0.0, num_rollouts=8, rollout_every=8),
    "best_of_n": dict(alpha=0.01, beta=0.1, gamma=0.0, num_rollouts=8, rollout_every=8),
    "ranked": dict(alpha=0.01, beta=0.1, gamma=0.0, num_rollouts=8, rollout_every=8),
    "dpo": dict(beta=0.3),
    "hypo": dict(beta=0.1, beta_kl=0.003, num_rollouts=8, rollout_every=8),  # arXiv 2406.01462
    "ipo": dict(beta=0.03),
    "slic": dict(beta=0.01, delta=1.0),
}
HELP = dict(alpha="softness: the fixed point is softmax(r / alpha)", gamma="exponent of Section 4's weight mu; 0: none",
            beta="weight of the regularizer; for dpo and hypo DPO's beta, for ipo its tau",
            beta_kl="weight of the regularizer, SPO's KL", delta="SLiC-HF's margin",
            num_rollouts="samples per rollout, R", rollout_every="steps between rollouts, Appendix D's k")
# Per model. REAL and REAL_ALGOS were measured on stories260K with the readability judge (docs/results.md). For wider
# models the learning rate is divided by the ratio of the widths, a guess; stories110M has E.2's batch, steps and so on.
TOY = dict(batch_size=16, micro_batch_size=64, warmup=50, steps=500, max_new_tokens=100, eval_every=50,
           num_eval_samples=256, judge="toy", max_kl=100.0)
REAL = dict(batch_size=8, micro_batch_size=32, warmup=10, steps=60, max_new_tokens=255, eval_every=20,
            num_eval_samples=256, judge="reward", max_kl=6.0)
PAPER = dict(batch_size=128, warmup=5000, steps=40000, eval_every=1000, num_eval_samples=1000, num_rollouts=32)
MODELS = {"toy": TOY, "toy-naive": TOY | {"judge": "toy-naive"}, "stories260K": REAL, "stories15M": REAL,
          "stories42M": REAL, "stories110M": REAL | PAPER}
TOY_LR = {"spo": 2e-4, "best_of_n": 2e-4, "ranked": 2e-4, "dpo": 4e-4, "hypo": 4e-4, "ipo": 2e-4, "slic": 2e-4}
CPU_MICRO_BATCH_SIZE = {"stories260K": 16, "stories15M": 2, "stories42M": 2}  # the fastest; 42M's a guess
WIDTHS = {"stories15M": 288, "stories42M": 512, "stories110M": 768}  # others are taken for 64, that of stories260K
REAL_ALGOS = {"spo": dict(beta=0.5, lr=5e-5), "best_of_n": dict(beta=0.5, lr=5e-5), "ranked": dict(beta=0.5, lr=5e-5),
              "dpo": dict(beta=0.1, lr=2e-5), "hypo": dict(beta=0.1, beta_kl=0.05, lr=2e-5),  # hypo's are a guess
              "ipo": dict(beta=0.03, lr=2e-5), "slic": dict(beta=0.3, delta=10.0, lr=5e-5)}
JUDGES = ("none", "toy", "toy-naive", "reward", "readability", "llm")
AT_LEAST_1 = ("num_rollouts", "rollout_every", "batch_size", "micro_batch_size", "steps", "max_new_tokens",
              "eval_every", "num_eval_samples", "log_every")


def model_defaults(model):
    """The settings in MODELS; any other model, of the user's own, has those of stories260K."""
    return MODELS.get(model, MODELS["stories260K"])


def get_args(argv=None):
    """The command line, checked; its defaults depend on --algo and --model."""
    first = Parser(add_help=False)
    first.add_argument("--algo", choices=ALGOS, default="spo", help="the preference loss")
    first.add_argument("--model", default="toy", help="which folder under data/, and whose defaults: "
                       f"{', '.join(MODELS)}, or a name given with --init to prepare_data.py")
    chosen, _ = first.parse_known_args(argv)
    algo, model = chosen.algo, chosen.model
    p = Parser(
        parents=[first], usage="spo.py [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Align a model by SPO (arXiv 2405.00747), or by a method it is compared with. The flags and "
        "defaults shown are those of the given --algo and --model.")
    g = p.add_argument_group(f"method ({algo})")
    for name, default in ALGOS[algo].items():
        g.add_argument(f"--{name}", type=type(default), default=default, help=HELP[name])
    g = p.add_argument_group("optimization")
    g.add_argument("--batch_size", type=int, help="rows of the preference data per step")
    g.add_argument("--micro_batch_size", type=int, help="responses per forward pass; fewer need less memory")
    g.add_argument("--lr", type=float, help="AdamW's learning rate after warm-up")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--steps", type=int, help="training steps")
    g.add_argument("--max_new_tokens", type=int, help="longest sample in tokens, its prompt included")
    g = p.add_argument_group("evaluation")
    g.add_argument("--judge", choices=JUDGES,
                   help="of win rates: the toy world's experts, <data>/reward.pt, a readability formula, an endpoint")
    g.add_argument("--eval_every", type=int, help="steps between evaluations, and checkpoints")
    g.add_argument("--num_eval_samples", type=int, help="samples per evaluation")
    g.add_argument("--max_kl", type=float, help="best.pt is of an evaluation whose KL is at most this, in nats")
    g.add_argument("--log_every", type=int, default=10, help="steps between training records")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    g = p.add_argument_group("run")
    g.add_argument("--data", default=f"data/{model}", help="folder of sft.pt and the token files")
    g.add_argument("--init", default="<data>/sft.pt", help="the model to start from, and the reference")
    g.add_argument("--tokenizer",
                   default="tokenizer.model" if model in ("toy", "toy-naive") else "<data>/tokenizer.model",
                   help="the model's own sentencepiece model, with which the judge reads samples")
    g.add_argument("--out", default="out/<data>-<algo>-<settings>-seed<seed>", help="the run's folder")
    g.add_argument("--seed", type=int, default=0, help="of batches, rollouts and evaluations")
    g.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    g.add_argument("--fast_sampling", action="store_true", help="compiled sampling (extras/fast_generate.py)")
    g.add_argument("--resume", action="store_true", help="continue from <out>/ckpt.pt")
    defaults = dict(model_defaults(model))
    if model in ("toy", "toy-naive"):
        defaults["lr"] = TOY_LR[algo]
    else:
        defaults |= REAL_ALGOS[algo]
        defaults["lr"] = float(f"{defaults['lr'] * 64 / WIDTHS.get(model, 64):.1e}")  # two digits are enough
    if devices[0] == "cpu" and model in CPU_MICRO_BATCH_SIZE:
        defaults["micro_batch_size"] = CPU_MICRO_BATCH_SIZE[model]
    if "num_rollouts" not in ALGOS[algo]:
        defaults.pop("num_rollouts", None)  # a model's default for a flag that this algorithm does not have
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    if model not in MODELS and not os.path.isdir(args.data):
        p.error(f"--model is {model}, none of {', '.join(MODELS)}, and there is no folder {args.data}")
    for name, x in vars(args).items():
        low = 1 if name in AT_LEAST_1 else 0
        if isinstance(x, (int, float)) and not low <= x < math.inf:
            p.error(f"--{name} is {x}: it must be a finite number, {low} or more")
    if args.num_eval_samples < 2:
        p.error("--num_eval_samples is 1: a standard error needs 2 or more")
    if algo == "ipo" and args.beta == 0:
        p.error("--beta is 0, but ipo's target margin is 1/(2 beta)")
    settings = [f"{name}{getattr(args, name):g}" for name in ("alpha", "beta", "beta_kl", "gamma", "delta")
                if name in ALGOS[algo]]
    name = "-".join([os.path.basename(os.path.abspath(args.data)), algo, *settings, f"seed{args.seed}"])
    args.out = args.out.replace("<data>-<algo>-<settings>-seed<seed>", name).rstrip("/")
    args.init = args.init.replace("<data>", args.data)
    args.tokenizer = args.tokenizer.replace("<data>", args.data)
    args.hashes = {}  # of the files that the run reads, compared when it is resumed
    return args


def stop_on_signal():
    """An Event that the first Ctrl-C, SIGTERM or SIGHUP sets, so that train finishes its step; a second one ends."""
    import signal
    stop, on_terminal = threading.Event(), os.isatty(1)
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it, and so it stays
        signals.append(signal.SIGHUP)

    def handler(number, frame):
        stop.set()
        for other in signals:  # a shell that is closed may send SIGHUP twice
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        if number == signal.SIGHUP and on_terminal:  # it is closed, and printing to it would fail
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        os.write(1, b"finishing this step or evaluation; Ctrl-C again stops now\n")  # print is not safe here

    for number in signals:
        signal.signal(number, handler)
    return stop


def main(argv=None, train=train):
    args = get_args(argv)
    if args.init == f"{args.data}/sft.pt":
        require_file(args, "sft.pt")
    limit_threads(args.init)
    evaluate = None
    sampler = generate
    if args.judge != "none":
        from extras.judge import make_evaluate  # win rate, KL and entropy of fresh samples
        evaluate = make_evaluate(args)
    if args.fast_sampling:
        from extras.fast_generate import fast_generate as sampler
    settings = [f"{name}={x}" for name, x in vars(args).items() if name != "hashes"]
    print(wrap(" ".join(settings)))
    stop = stop_on_signal()
    train(args, evaluate, sampler, stop)
    if os.path.exists(f"{args.out}/best.pt"):
        where = "" if args.data == f"data/{args.model}" else f" DATA={shlex.quote(args.data)}"
        checkpoint = shlex.quote(f"{args.out}/best.pt")
        print(f"to read samples: make sample MODEL={args.model}{where} N=3 \\\n  CHECKPOINT={checkpoint}")
    if stop.is_set():
        sys.exit(130)


if __name__ == "__main__":
    run_main(main)
