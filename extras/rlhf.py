"""
RLHF, Section 2: Eq. 4, -E[r] + beta * KL, by policy gradient on fresh samples. It is what the methods without a
reward model replace; with the judge's own reward, it is a bound of what they can reach.

    python -m extras.rlhf --reward model    # <data>/reward.pt; or judge, the reward of --judge. Other flags: spo.py's
"""
import sys
import time

import torch

import spo
from extras.judge import make_rewards
from model import UserError, format_time, generate, load, load_tokenizer, run_main, save, wrap

spo.ALGOS["rlhf"] = dict(beta=0.05, reward="model", num_rollouts=32)
spo.HELP["reward"] = "model: <data>/reward.pt, fitted to the pairs; judge: the reward that --judge has"
spo.TOY_LR["rlhf"] = 4e-4
spo.REAL_ALGOS["rlhf"] = dict(beta=0.5, lr=5e-5)  # those of spo, not tried
COLUMNS = ("step", "loss", "reg", "grad_norm", "eta")  # of spo.COLUMNS


def rlhf_advantage(r, logp, ref_logp, beta):
    """
    Of R samples of pi_theta with rewards r (R,): r - beta log(pi_theta / pi_ref), less its mean over the others ->
    (R,). The mean of -advantage * grad logp is an unbiased estimate of the gradient of Eq. 4, whose fixed point is
    proportional to pi_ref exp(r / beta): there every advantage is 0. spo.rollout_kl on the same samples, whose gradient
    is biased, takes longer and did no better (docs/design.md).
    """
    penalized = r - beta * (logp - ref_logp)
    baseline = (penalized.sum() - penalized) / (len(r) - 1)  # leave one out: independent of the sample itself
    return penalized - baseline


def policy_gradient(args, policy, ref, y, mask, r):
    """Adds an estimate of Eq. 4's gradient by samples y (R, T), rewards r (R,) to policy's -> its log-ratios (R,)."""
    parts = list(zip(y.split(args.micro_batch_size), mask.split(args.micro_batch_size)))
    with torch.no_grad(), spo.autocast(args):
        logp = torch.cat([spo.seq_logp(policy, *part) for part in parts])
        ref_logp = torch.cat([spo.seq_logp(ref, *part) for part in parts])
    advantage = rlhf_advantage(r, logp, ref_logp, args.beta)                        # (R,)
    for part, weight in zip(parts, advantage.split(args.micro_batch_size)):
        with spo.autocast(args):
            loss = -(weight * spo.seq_logp(policy, *part)).sum() / len(r)
        loss.backward()
    return logp - ref_logp


def make_reward(args):
    """The reward that args.reward names, as a function of samples (R, T) -> (R,)."""
    if args.reward == "model":
        return make_rewards(args, "reward", None)
    tokenizer = load_tokenizer(args.tokenizer, load(args.init).args.vocab_size)
    return make_rewards(args, args.judge, tokenizer)


def train(args, evaluate=None, generate=generate, stop=None):
    """spo.train for Eq. 4: every step has num_rollouts fresh samples, for prompts of the data -> the policy."""
    policy, ref = load(args.init, args.device), load(args.init, args.device).requires_grad_(False)
    data, _ = spo.load_data(args, policy.args)
    reward = make_reward(args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    spo.open_folder(args)
    state = dict(step=0, best_win_rate=-1.0)
    if args.resume:
        state = spo.load_run(args, policy, optimizer)
        if state["step"] == args.steps and (state["evaluated"] or evaluate is None):
            print(wrap(f"{args.out} is finished at step {args.steps}: more --steps train it longer"))
            return policy
    start_step, best_win_rate = state["step"], state["best_win_rate"]

    print(spo.table_row({name: name for name in COLUMNS}))
    for step in range(start_step, args.steps + 1):
        # 0. save, then evaluate, as spo.train does
        stopped = stop is not None and stop.is_set() and start_step < step < args.steps
        if stopped or step % args.eval_every == 0 or step == args.steps:
            save(policy, f"{args.out}/ckpt.pt", step=step, optimizer=optimizer.state_dict(), rollouts=[], history=[],
                 best_win_rate=best_win_rate, args=vars(args))
            if evaluate and not stopped:
                results = evaluate(policy, ref, step)
                if spo.is_best(results, best_win_rate, args.max_kl):
                    best_win_rate = results["win_rate"]
                    save(policy, f"{args.out}/best.pt")
                spo.log(args, step=step, **results)
        if stopped:
            print(wrap(f"stopped at step {step}, saved in {args.out}: continue with --resume"))
        if stopped or step == args.steps:
            break
        step_time, lr = time.perf_counter(), spo.get_lr(step, args)
        optimizer.param_groups[0]["lr"] = lr

        # 1. R fresh samples of the current policy, and their rewards
        rows = torch.randint(len(data), (args.num_rollouts,), generator=spo.rng(args.seed, spo.PROMPT, step))
        generator = spo.rng(args.seed, spo.ROLLOUT, step)
        with spo.autocast(args):
            y = spo.sample(policy, data.prompts(rows), args.max_new_tokens, generator, generate)
        mask = spo.response_mask(y, data.prompt_length[rows])
        r = reward(y).to(args.device)                                               # (R,)

        # 2. the policy gradient, clipped at norm 1; AdamW
        optimizer.zero_grad()
        kl = policy_gradient(args, policy, ref, y, mask, r).mean()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not grad_norm.isfinite():
            raise UserError(f"the gradient of step {step} is not finite: start again with a lower --lr.")
        optimizer.step()

        # 3. log this step; reg is the KL's estimate on its samples
        seconds = time.perf_counter() - step_time
        if step == 0 or (step + 1) % args.log_every == 0:
            loss, eta = args.beta * kl - r.mean(), format_time(seconds * (args.steps - step))
            spo.log(args, step=step + 1, loss=loss.item(), reward=r.mean().item(), reg=kl.item(),
                    grad_norm=grad_norm.item(), lr=lr, ms=1e3 * seconds, eta=eta)
    return policy


def check_args(argv):
    """Refuses what spo.get_args accepts and this program does not read."""
    args = spo.get_args(argv)
    if args.algo != "rlhf" or any(flag.split("=")[0] == "--batch_size" for flag in argv):
        raise UserError("--algo and --batch_size are not read here: each step has --num_rollouts samples.")
    if args.num_rollouts < 2:
        raise UserError("--num_rollouts is 1, but must be at least 2: the baseline of a sample is the others' mean.")
    if args.reward not in ("model", "judge"):
        raise UserError(f"--reward is {args.reward}, but must be model or judge.")
    if args.reward == "judge" and args.judge in ("none", "llm"):
        raise UserError(f"--reward is judge, but --judge {args.judge} has no reward.")


def main(argv=None):
    argv = ["--algo", "rlhf", *(sys.argv[1:] if argv is None else argv)]
    check_args(argv)
    spo.main(argv, train)


if __name__ == "__main__":
    run_main(main)
