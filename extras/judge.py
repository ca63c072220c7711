"""
Win rates against the reference, and what else is measured on fresh samples: KL, entropy, length.

    python -m extras.judge out/.../best.pt --judge toy --n 1000     # a checkpoint; other flags are spo.py's
"""
import json
import math
import os

import torch

import spo
from extras import toyworld
from extras.fast_generate import fast_generate
from extras.llm_judge import ask_test_question, get_endpoint, judge_pairs, llm_win_rate
from extras.reward_model import load_reward_model, reward_at_end
from model import BOS, Parser, UserError, atomic_write, file_hash, generate, load, load_tokenizer, run_main, upcast
from model import wrap as wrap_text

BATCH = 64                    # samples per forward pass, which needs little memory without gradients
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


def make_judge(args, tokenizer, y_ref):
    """
    The judge args.judge as a function of samples y (N, T) -> dict: its name, their win rate against the samples
    y_ref (M, T) of the reference, with its standard error, and what else it knows. The llm compares row i with row i.
    """
    if args.judge == "llm":
        args.judge_model = get_endpoint().model  # a setting, which must be the same when a run is resumed

        def ask_llm(y):
            pairs = list(zip(tokenizer.decode(y.tolist()), tokenizer.decode(y_ref.tolist())))
            return {"judge": args.judge_model, **llm_win_rate(judge_pairs(pairs, f"{args.data}/verdicts.jsonl"))}
        return ask_llm

    path = f"{args.data}/reward.pt"
    if args.judge == "reward":
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: create it with `make data MODEL={args.model} "
                            "ARGS='--reward_steps 1000'`, or name another --judge.")
        args.hashes["reward.pt"] = file_hash(path)
        model = load_reward_model(path, args.device)

    @torch.no_grad()
    def rewards(y):                                                                 # (N, T) -> (N,)
        if args.judge == "reward":
            return torch.cat([reward_at_end(model, part, spo.response_mask(part)) for part in y.split(BATCH)]).cpu()
        taste = toyworld.TASTES[args.judge]
        return torch.tensor([toyworld.reward(story, taste) for story in tokenizer.decode(y.tolist())])

    r_ref = rewards(y_ref)

    def judge(y):
        r = rewards(y)
        mean, standard_error = win_rate(r, r_ref)
        result = dict(judge=args.judge, win_rate=mean, win_rate_se=standard_error, reward=r.mean().item())
        if args.judge in toyworld.TASTES:
            in_grammar = [toyworld.in_grammar(story) for story in tokenizer.decode(y.tolist())]
            result["grammar"] = sum(in_grammar) / len(y)
        return result
    return judge


@torch.no_grad()
def evaluate_samples(args, policy, ref, y):
    """Means over samples y (N, T) of the policy: KL and entropy in nats, length in tokens, the share with an end."""
    def token_entropy(hidden):                                                      # (M, dim) -> (M,)
        return torch.special.entr(upcast(policy.output(hidden)).softmax(-1)).sum(-1)

    kl, entropy = [], []
    with spo.autocast(args):
        for part in y.split(BATCH):
            kl.append(spo.rollout_kl(policy, ref, part, ref.hidden(part[:, :-1])))
            mask = spo.response_mask(part)[:, 1:].bool()
            entropy.append(spo.sum_over_tokens(token_entropy, mask, policy.hidden(part[:, :-1])))
    length = spo.response_mask(y).sum(1, keepdim=True)                              # (N, 1)
    finished = y.gather(1, length) == BOS
    return dict(kl=torch.cat(kl).mean().item(), entropy=torch.cat(entropy).mean().item(),
                length=length.float().mean().item(), finished=finished.float().mean().item())


def sample(args, model, n, *key):
    """n samples of the model, with the random numbers of spo.rng(seed, *key) -> (n, T)."""
    sampler = fast_generate if args.fast_sampling else generate
    with spo.autocast(args):
        return spo.sample(model, n, args.max_new_tokens, spo.rng(args.seed, *key), sampler)


def wrap(label, text):
    """Lines that fit the screen. Control characters, which a model may sample, do not reach the terminal."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return wrap_text(f"{label}: {printable}", " " * (len(label) + 2)) + "\n"


def make_evaluate(args):
    """
    The function evaluate(policy, ref, step) -> dict that spo.train calls. It prints a sample, and after the last step
    three beside the reference's, also to samples.txt. The files it reads are added to args.hashes.
    """
    path = f"{args.data}/ref.npy"
    spo.require_file(args, "ref.npy", "--judge compares with these samples of the reference")
    model_args = load(args.init).args
    ref_samples = spo.load_responses(path, model_args, 2, 1)[:NUM_REF, 0]
    if args.judge == "llm" and args.num_eval_samples > len(ref_samples):
        raise UserError(f"--num_eval_samples must be at most {len(ref_samples)}, the rows the llm compares with.")
    y_ref = spo.trim_padding(torch.from_numpy(ref_samples.astype("int64")).to(args.device))
    tokenizer = load_tokenizer(args.tokenizer, model_args.vocab_size)
    if args.judge == "llm":
        evaluations = 1 + math.ceil(args.steps / args.eval_every)
        ask_test_question(2 * args.num_eval_samples * evaluations)
    judge = make_judge(args, tokenizer, y_ref)
    args.hashes |= {"ref.npy": file_hash(path), "tokenizer": file_hash(args.tokenizer)}

    def evaluate(policy, ref, step):
        y = sample(args, policy, args.num_eval_samples, spo.EVAL, step)
        print(wrap("sample", tokenizer.decode(y[0].tolist())), end="", flush=True)
        if step == args.steps:
            before, after = (tokenizer.decode(sample(args, m, 3, spo.SHOW).tolist()) for m in (ref, policy))
            text = "".join(wrap("before", x) + wrap(" after", y) for x, y in zip(before, after))
            print(text, end="", flush=True)
            with atomic_write(f"{args.out}/samples.txt") as f:
                f.write(text.encode())
        return {"n": len(y), **judge(y), **evaluate_samples(args, policy, ref, y)}
    return evaluate


def read_log(out):
    """The records of the run in folder out, training records (with "loss") and evaluations (with "win_rate")."""
    try:
        with open(f"{out}/log.jsonl") as f:
            return [dict(json.loads(line)) for line in f if line.endswith("\n")]  # a killed run can leave half a line
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{out}/log.jsonl cannot be read as the log of a run ({str(e)[:80]}).") from None


def read_evaluations(out):
    return [record for record in read_log(out) if record.get("win_rate") is not None]


def best_evaluation(out):
    """The evaluation with the highest win rate of the run in folder out, the first of equal ones -> dict."""
    evaluations = read_evaluations(out)
    if not evaluations:
        raise UserError(f"{out}/log.jsonl has no evaluation with a win rate: train with a --judge.")
    return max(evaluations, key=lambda record: record["win_rate"])


def main(argv=None):
    p = Parser(description="The win rate of a checkpoint against the reference. All other flags are those of spo.py.")
    p.add_argument("checkpoint", help="a .pt or .bin file; comes before the flags")
    p.add_argument("--n", type=int, default=1000, help="fresh samples of each model")
    own, rest = p.parse_known_args(argv)
    args = spo.get_args(rest)
    if own.n < 2 or args.judge == "none":
        p.error("--n must be at least 2, and --judge not none")
    policy, ref = load(own.checkpoint, args.device), load(args.init, args.device)
    if args.max_new_tokens > min(policy.args.max_seq_len, ref.args.max_seq_len):
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}, more than the models read.")
    tokenizer = load_tokenizer(args.tokenizer, policy.args.vocab_size)
    if args.judge == "llm":
        ask_test_question(2 * own.n)
    judge = make_judge(args, tokenizer, sample(args, ref, own.n, FRESH_REF))
    y = sample(args, policy, own.n, FRESH)
    result = {"n": own.n, **judge(y), **evaluate_samples(args, policy, ref, y)}
    cells = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in result.items()]
    print(wrap_text("  ".join(cells)))
    settings = {name: getattr(args, name) for name in ("seed", "data", "max_new_tokens", "dtype")}
    with open(os.path.join(os.path.dirname(own.checkpoint), "evaluations.jsonl"), "a") as f:
        f.write(json.dumps({"checkpoint": os.path.basename(own.checkpoint), **settings, **result}) + "\n")


if __name__ == "__main__":
    run_main(main)
