"""
Win rates against the reference, and what else is measured on fresh samples: KL, entropy, length.

    python -m extras.judge out/.../best.pt --judge toy --n 1000     # a checkpoint; other flags are spo.py's
"""
import argparse
import json
import os
import sys
import textwrap

import torch

import spo
from extras import toyworld
from extras.fast_generate import fast_generate
from extras.llm_judge import get_endpoint, judge_pairs, llm_win_rate
from extras.reward_model import load_reward_model, reward_at_end
from model import BOS, UserError, atomic_write, file_hash, generate, load, load_tokenizer, upcast

BATCH = 64                    # samples per forward pass, whatever training uses: no gradient, so memory is no concern
NUM_REF = 2000                # rows of ref.npy that win rates during training compare with
FRESH, FRESH_REF = 200, 201   # purposes of spo.rng: samples of a finished checkpoint, and of the reference


def win_rate(r, r_ref):
    """
    E[sigmoid(r(y) - r(y_ref))] over all pairs of rewards r (N,) and r_ref (M,): the probability, without label noise,
    that the judge prefers the policy's sample (Eq. 2) -> (mean, its standard error from both samples).
    """
    wins = torch.sigmoid(r[:, None] - r_ref)                                        # (N, M)
    variance = wins.mean(1).var() / len(r) + wins.mean(0).var() / len(r_ref)
    return wins.mean().item(), variance.sqrt().item()


def load_rewards(args, tokenizer):
    """The rewards that args.judge, a toy expert or the reward model, gives, as a function of samples (N, T) -> (N,)."""
    if args.judge in toyworld.TASTES:
        def rewards(y):
            stories = tokenizer.decode(y.tolist())
            return torch.tensor([toyworld.reward(story, toyworld.TASTES[args.judge]) for story in stories])
        return rewards

    path = f"{args.data}/reward.pt"
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: create it with `python prepare_data.py {args.model} --reward_steps "
                        "1000`, or name another --judge.")
    model = load_reward_model(path, args.device)

    @torch.no_grad()
    def rewards(y):
        return torch.cat([reward_at_end(model, part, spo.response_mask(part)) for part in y.split(BATCH)]).cpu()
    return rewards


def make_judge(args, tokenizer, y_ref):
    """
    The judge args.judge as a function of samples y (N, T) -> dict: their win rate against the samples y_ref (M, T) of
    the reference, with its standard error, and what else that judge knows. The llm compares row i with row i.
    """
    if args.judge == "llm":
        def judge(y):
            assert len(y) <= len(y_ref), f"{len(y)} samples, but only {len(y_ref)} of the reference"
            pairs = list(zip(tokenizer.decode(y.tolist()), tokenizer.decode(y_ref.tolist())))
            return llm_win_rate(judge_pairs(pairs, f"{args.data}/verdicts.jsonl"))
        return judge

    rewards = load_rewards(args, tokenizer)
    r_ref = rewards(y_ref)

    def judge(y):
        r = rewards(y)
        mean, standard_error = win_rate(r, r_ref)
        result = {"win_rate": mean, "win_rate_se": standard_error, "reward": r.mean().item()}
        if args.judge in toyworld.TASTES:
            result["grammar"] = sum(toyworld.in_grammar(text) for text in tokenizer.decode(y.tolist())) / len(y)
        return result
    return judge


@torch.no_grad()
def evaluate_samples(policy, ref, y, micro_batch_size):
    """
    Of samples y (N, T) of the policy, averaged: KL to the reference and entropy in nats per story, length in tokens
    with the end token, and finished, the share that has one. The caller enters autocast.
    """
    def token_entropy(hidden):                                                      # (M, dim) -> (M,)
        return torch.special.entr(upcast(policy.output(hidden)).softmax(-1)).sum(-1)

    kl, entropy = [], []
    for part in y.split(micro_batch_size):
        kl.append(spo.rollout_kl(policy, ref, part, ref.hidden(part[:, :-1])))
        mask = spo.response_mask(part)[:, 1:].bool()
        entropy.append(spo.sum_over_tokens(token_entropy, mask, policy.hidden(part[:, :-1])))
    length = spo.response_mask(y).sum(1, keepdim=True)                              # (N, 1)
    finished = y.gather(1, length) == BOS
    return dict(kl=torch.cat(kl).mean().item(), entropy=torch.cat(entropy).mean().item(),
                length=length.float().mean().item(), finished=finished.float().mean().item())


def sample(args, model, n, *key):
    """n samples of the model, with the random numbers of spo.rng(seed, *key) -> (n, T)."""
    with spo.autocast(args):
        sampler = fast_generate if args.fast_sampling else generate
        return spo.sample(model, n, args.max_new_tokens, spo.rng(args.seed, *key), sampler)


def measure(args, policy, ref, judge, y):
    """What the judge and evaluate_samples say of samples y of the policy -> dict, one record of the log."""
    with spo.autocast(args):
        metrics = evaluate_samples(policy, ref, y, BATCH)
    name = get_endpoint().model if args.judge == "llm" else args.judge
    return {"n": len(y), "judge": name, **judge(y), **metrics}


def wrap(label, text):
    """At most 80 columns. Control characters, which a model may sample, do not reach the terminal."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.fill(f"{label}: {printable}", 80, subsequent_indent=" " * (len(label) + 2))


def compare_samples(args, policy, ref, tokenizer):
    """Three samples before and after training, drawn with the same random numbers, as text."""
    before, after = (tokenizer.decode(sample(args, model, 3, spo.SHOW).tolist()) for model in (ref, policy))
    return "".join(f"{wrap('before', x)}\n{wrap(' after', y)}\n" for x, y in zip(before, after))


def make_evaluate(args):
    """
    The function evaluate(policy, ref, step) -> dict that spo.train calls. It prints a sample, and after the last step
    three more beside the reference's, which it also writes to samples.txt. Adds the files it reads to args.hashes.
    """
    path = f"{args.data}/ref.npy"
    if not os.path.exists(path):
        raise UserError(f"{path}, samples of the reference, does not exist: create it with `make data "
                        f"MODEL={args.model}`, for a published model with SOURCE= too, or take --judge none.")
    model_args = load(args.init).args
    ref_samples = spo.load_responses(path, model_args, 2, 1)[:NUM_REF, 0]
    if args.judge == "llm" and args.num_eval_samples > len(ref_samples):
        raise UserError(f"--num_eval_samples is {args.num_eval_samples}, but the llm compares each with another of "
                        f"{len(ref_samples)} samples in {path}: lower it.")
    y_ref = spo.trim_padding(torch.from_numpy(ref_samples.astype("int64")).to(args.device))
    tokenizer = load_tokenizer(args.tokenizer, model_args.vocab_size)
    judge = make_judge(args, tokenizer, y_ref)
    args.hashes |= {"ref.npy": file_hash(path), "tokenizer": file_hash(args.tokenizer)}
    if args.judge == "reward":
        args.hashes["reward.pt"] = file_hash(f"{args.data}/reward.pt")
    if args.judge == "llm":
        args.judge_model = get_endpoint().model  # a setting, which must be the same when the run is resumed

    def evaluate(policy, ref, step):
        y = sample(args, policy, args.num_eval_samples, spo.EVAL, step)
        print(wrap("sample", tokenizer.decode(y[0].tolist())), flush=True)
        if step == args.steps:
            text = compare_samples(args, policy, ref, tokenizer)
            print(text, end="", flush=True)
            with atomic_write(f"{args.out}/samples.txt") as f:
                f.write(text.encode())
        return measure(args, policy, ref, judge, y)
    return evaluate


def read_log(out):
    """The records of the run in folder out, training records (with "loss") and evaluations (with "win_rate")."""
    path = f"{out}/log.jsonl"
    try:
        with open(path) as f:
            records = [json.loads(line) for line in f if line.endswith("\n")]  # a killed run can leave half a line
        if not all(record["step"] >= 0 for record in records):
            raise ValueError("a step below 0")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as the log of a run ({str(e)[:80]}): name a folder of spo.py, or "
                        "restart that run.") from None
    return records


def best_evaluation(out):
    """The evaluation with the highest win rate of the run in folder out, the first of equal ones -> dict."""
    evaluations = [record for record in read_log(out) if record.get("win_rate") is not None]
    if not evaluations:
        raise UserError(f"{out}/log.jsonl has no evaluation with a win rate: train with a --judge.")
    return max(evaluations, key=lambda record: record["win_rate"])


def main(argv=None):
    p = argparse.ArgumentParser(description="The win rate of a checkpoint against the reference, on fresh samples of "
                                "both. All other flags are those of spo.py.", allow_abbrev=False)
    p.add_argument("checkpoint", help="a .pt or .bin file; comes before the flags")
    p.add_argument("--n", type=int, default=1000, help="fresh samples of each model")
    own, rest = p.parse_known_args(argv)
    args = spo.get_args(rest)
    if own.n < 2 or args.judge == "none":
        p.error("--n must be at least 2, and --judge not none")
    policy, ref = load(own.checkpoint, args.device), load(args.init, args.device)
    max_seq_len = min(policy.args.max_seq_len, ref.args.max_seq_len)
    if policy.args.vocab_size != ref.args.vocab_size or args.max_new_tokens > max_seq_len:
        raise UserError(f"{own.checkpoint} and {args.init} must have the same tokens and a context of at least "
                        f"--max_new_tokens {args.max_new_tokens}.")
    tokenizer = load_tokenizer(args.tokenizer, policy.args.vocab_size)
    judge = make_judge(args, tokenizer, sample(args, ref, own.n, FRESH_REF))
    result = measure(args, policy, ref, judge, sample(args, policy, own.n, FRESH))
    cells = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in result.items()]
    print(textwrap.fill("  ".join(cells), 80, break_on_hyphens=False))
    with open(f"{os.path.dirname(own.checkpoint) or '.'}/evaluations.jsonl", "a") as f:
        f.write(json.dumps({"checkpoint": os.path.basename(own.checkpoint), **result}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
