"""
RLHF, Section 2: Eq. 4 by policy gradient on fresh samples. It is what the methods without a reward model replace; with
the judge's own reward, it is a bound of what they can reach.

    python -m extras.rlhf --reward model    # <data>/reward.pt; or judge, the reward of --judge. The others are spo.py's
"""
import sys
import time

import torch

import spo
from extras.judge import load_readability, make_evaluate, make_rewards
from model import UserError, format_time, generate, load, load_tokenizer, run_main, save, wrap

spo.ALGOS["rlhf"] = dict(beta=0.1, reward="model")
spo.HELP["reward"] = "model: <data>/reward.pt, fitted to the pairs; judge: the reward that --judge has"
spo.TOY_LR["rlhf"] = 4e-4
spo.REAL_ALGOS["rlhf"] = dict(beta=0.5, lr=5e-5)  # those of spo, not tried


def rlhf_advantage(r, logp, ref_logp, beta):
    """
    Of R samples of pi_theta with rewards r (R,): r - beta log(pi_theta / pi_ref), less its mean over the other samples
    -> (R,). -mean(advantage * grad logp) is an unbiased estimate of the gradient of Eq. 4.
    """
    penalized = r - beta * (logp - ref_logp)
    baseline = (penalized.sum() - penalized) / (len(r) - 1)  # leave one out: independent of the sample itself
    return penalized - baseline


def make_reward(args, tokenizer):
    """The reward that args.reward names, as a function of samples (R, T) -> (R,)."""
    if args.reward == "model":
        return make_rewards(args, "reward", tokenizer)
    if args.reward != "judge" or args.judge in ("llm", "none"):
        raise UserError(f"--reward is {args.reward} and --judge {args.judge}: --reward must be model, or judge with a "
                        "judge that is a reward.")
    readability = None
    if args.judge == "readability":
        readability = load_readability(f"{args.data}/ref.npy", load(args.init).args, tokenizer)
    return make_rewards(args, args.judge, tokenizer, readability)


def train(args, reward, evaluate=None, generate=generate, stop=None):
    """spo.train for Eq. 4: 2 * batch_size fresh samples per step, as many as pairs have responses -> the policy."""
    policy, ref = load(args.init, args.device), load(args.init, args.device).requires_grad_(False)
    data, _ = spo.load_data(args, policy.args)  # for its prompts
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    spo.open_folder(args)
    state = dict(step=0, rollouts=[], history=[], best_win_rate=-1.0, skipped=0)
    if args.resume:
        state = spo.load_run(args, policy, optimizer)
        if state["step"] == args.steps and (state["evaluated"] or evaluate is None):
            print(wrap(f"{args.out} is finished at step {args.steps}: more --steps (make: STEPS=) train it longer"))
            return policy
    start_step, best_win_rate = state["step"], state["best_win_rate"]
    for step in range(start_step, args.steps + 1):
        stopped = stop is not None and stop.is_set() and start_step < step < args.steps
        if stopped or step % args.eval_every == 0 or step == args.steps:
            save(policy, f"{args.out}/ckpt.pt", step=step, optimizer=optimizer.state_dict(), rollouts=[], history=[],
                 best_win_rate=best_win_rate, skipped=0, args=vars(args))
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
        step_time = time.perf_counter()
        optimizer.param_groups[0]["lr"] = spo.get_lr(step, args)

        # 1. fresh samples and their rewards
        rows = torch.randint(len(data), (2 * args.batch_size,), generator=spo.rng(args.seed, spo.PROMPT, step))
        generator = spo.rng(args.seed, spo.ROLLOUT, step)
        with spo.autocast(args):
            y = spo.sample(policy, data.prompts(rows), args.max_new_tokens, generator, generate)
        mask = spo.response_mask(y, data.prompt_length[rows])
        r = reward(y).to(args.device)                                               # (R,)

        # 2. the policy gradient of Eq. 4
        parts = list(zip(y.split(args.micro_batch_size), mask.split(args.micro_batch_size)))
        with torch.no_grad(), spo.autocast(args):
            logp, ref_logp = (torch.cat([spo.seq_logp(model, *part) for part in parts]) for model in (policy, ref))
        advantage = rlhf_advantage(r, logp, ref_logp, args.beta)                    # (R,)
        optimizer.zero_grad()
        for (y, mask), weight in zip(parts, advantage.split(args.micro_batch_size)):
            with spo.autocast(args):
                loss = -(weight * spo.seq_logp(policy, y, mask)).sum() / len(r)
            loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not grad_norm.isfinite():
            raise UserError(f"the gradient of step {step} is not finite: start again with a lower --lr.")
        optimizer.step()

        if (step + 1) % args.log_every == 0:
            kl, seconds = (logp - ref_logp).mean().item(), time.perf_counter() - step_time
            spo.log(args, step=step + 1, loss=args.beta * kl - r.mean().item(), reg=kl, reward=r.mean().item(),
                    grad_norm=grad_norm.item(), ms=1e3 * seconds, eta=format_time(seconds * (args.steps - step)))
    return policy


def main(argv=None):
    args = spo.get_args(["--algo", "rlhf", *(sys.argv[1:] if argv is None else argv)])
    tokenizer = load_tokenizer(args.tokenizer, load(args.init).args.vocab_size)
    reward = make_reward(args, tokenizer)
    evaluate = make_evaluate(args) if args.judge != "none" else None
    sampler = generate
    if args.fast_sampling:
        from extras.fast_generate import fast_generate as sampler
    stop = spo.stop_on_signal()
    train(args, reward, evaluate, sampler, stop)
    if stop.is_set():
        sys.exit(130)


if __name__ == "__main__":
    run_main(main)
