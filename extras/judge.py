"""
Win rates against the reference, and what else is measured on fresh samples: KL, entropy, length.

    python -m extras.judge out/.../best.pt --judge toy --n 1000     # a checkpoint; some flags are spo.py's
"""
import json
import math
import os

import torch

import spo
from extras import toyworld
from extras.data_folder import DataFolder
from extras.fast_generate import fast_generate
from extras.llm_judge import ask_test_question, get_endpoint, judge_pairs, llm_win_rate
from extras.readability import Readability
from extras.reward_model import load_reward_model, reward_at_end
from model import (BOS, Parser, UserError, atomic_write, file_hash, generate, limit_threads, load, load_tokenizer,
                   run_main, upcast)
from model import wrap as wrap_text

BATCH = 64                    # samples per forward pass, which needs little memory without gradients
NUM_REF = 2000                # rows of ref.npy that win rates during training compare with
NUM_HELDOUT = 200             # rows of heldout_pairs.npy of which heldout_accuracy is a share
MIN_DICTIONARY = 1000         # rows after those, at least, for the readability judge
FRESH, FRESH_REF, EVAL_REF = 200, 201, 202  # purposes of spo.rng: a finished checkpoint's samples, the reference's


def bradley_terry(r, r_ref):
    """The probability, by Eq. 2, that the response with reward r is preferred."""
    return torch.sigmoid(r - r_ref)


def higher(r, r_ref):
    """Whether r is higher: 1, 0, or 1/2 for equal ones."""
    return (r > r_ref) + 0.5 * (r == r_ref)


def win_rate(r, r_ref, prefer=bradley_terry):
    """
    The mean of prefer over all pairs of rewards r (N,) of the policy's samples and r_ref (M,) of the reference's ->
    (mean, its standard error from both samples).
    """
    wins = prefer(r[:, None], r_ref)                                                # (N, M)
    variance = wins.mean(1).var() / len(r) + wins.mean(0).var() / len(r_ref)
    return wins.mean().item(), variance.sqrt().item()


def paired_win_rate(r, r_ref, prefer=bradley_terry):
    """The mean of prefer over N pairs of samples for the same prompts -> (mean, standard error)."""
    wins = prefer(r, r_ref)                                                         # (N,)
    return wins.mean().item(), wins.std().item() / len(wins) ** 0.5


def length_controlled_win_rate(wins, longer):
    """
    The win rate at equal lengths: a logistic regression of wins on longer, by how much the policy's sample is longer
    than the reference's, read at 0, as AlpacaEval 2 (arXiv 2404.04475) does; both of one shape. Without a model of the
    prompts, and linear in the difference.
    """
    x = torch.stack((torch.ones_like(longer), longer / longer.std().clamp(min=1e-6))).flatten(1).double()   # (2, N)
    w = torch.zeros(2, dtype=torch.double)
    for _ in range(8):  # Newton's method; the small curvature bounds w where the lengths decide every comparison
        p = (w @ x).sigmoid()
        gradient = x @ (p - wins.flatten()) / len(p)
        curvature = x * p * (1 - p) @ x.T / len(p) + 1e-4 * torch.eye(2)
        w -= torch.linalg.solve(curvature, gradient + 1e-4 * w)
    return w[0].sigmoid().item()


def check_num_ref(num_ref, path):
    if num_ref < NUM_REF + MIN_DICTIONARY:
        raise UserError(f"{num_ref} samples in {path} are too few for the readability judge, whose dictionary is all "
                        f"but the first {NUM_REF}: create another folder, DATA=..., with ARGS='--num_ref 12000'.")


def load_readability(path, model_args, tokenizer):
    """The readability judge by the samples in ref.npy, path, that win rates do not compare with."""
    ref_samples = spo.load_responses(path, model_args, 1, 1).tokens[:, 0]
    check_num_ref(len(ref_samples), path)
    return Readability(tokenizer.decode(ref_samples[NUM_REF:].tolist()))


def load_reward_judge(args):
    """The fitted reward model <data>/reward.pt, whose hash is recorded. Raises UserError where there is none."""
    path = f"{args.data}/reward.pt"
    if not os.path.exists(path):
        reason = DataFolder(args.data).settings.get("no_reward_model")
        if reason is not None:
            raise UserError(f"{path} does not exist, for no reward model was found better than chance "
                            f"({reason}): give more preferences, in another folder, or another --judge.")
        raise UserError(f"{path} does not exist: create it with `make data MODEL={args.model} "
                        "ARGS='--reward_steps 1000'`, or name another --judge.")
    args.hashes["reward.pt"] = file_hash(path)
    return load_reward_model(path, args.device)


def make_rewards(args, name, tokenizer, readability=None):
    """The rewards of the judge called name as a function of samples y (N, T) -> (N,). readability: that judge's own."""
    if name == "reward":
        model = load_reward_judge(args)
    if name == "readability" and readability is None:
        readability = load_readability(f"{args.data}/ref.npy", load(args.init).args, tokenizer)

    @torch.no_grad()
    def rewards(y):
        if name == "reward":
            return torch.cat([reward_at_end(model, part, spo.response_mask(part)) for part in y.split(BATCH)]).cpu()
        stories = tokenizer.decode(y.tolist())
        if name == "readability":
            return torch.tensor([readability.score(story) for story in stories])
        return torch.tensor([toyworld.reward(story, toyworld.TASTES[name]) for story in stories])
    return rewards


def make_judge(args, tokenizer, y_ref, paired=False):
    """
    The judge args.judge as a function of samples y (N, T) -> dict: its name, their win rate against the samples
    y_ref (M, T) of the reference, with its standard error, and what else it knows. paired, or the llm: row i is
    compared with row i.
    """
    if args.judge == "llm":
        args.judge_model = get_endpoint().model  # a setting, which must be the same when a run is resumed

        def ask_llm(y):
            pairs = list(zip(tokenizer.decode(y.tolist()), tokenizer.decode(y_ref.tolist())))
            return {"judge": args.judge_model, **llm_win_rate(judge_pairs(pairs, f"{args.data}/verdicts.jsonl"))}
        return ask_llm

    readability = None
    if args.judge == "readability":
        spo.hash_files(args, "ref.npy")
        readability = load_readability(f"{args.data}/ref.npy", load(args.init).args, tokenizer)
    rewards = make_rewards(args, args.judge, tokenizer, readability)
    r_ref, length_ref = rewards(y_ref), spo.response_mask(y_ref).sum(1).cpu().float()
    prefer = higher if args.judge == "readability" else bradley_terry  # a formula's preference has no noise

    def judge(y):
        r = rewards(y)
        length = spo.response_mask(y).sum(1).cpu().float()
        if paired:
            mean, standard_error = paired_win_rate(r, r_ref, prefer)
            at_equal_length = length_controlled_win_rate(prefer(r, r_ref), length - length_ref)
        else:
            mean, standard_error = win_rate(r, r_ref, prefer)
            at_equal_length = length_controlled_win_rate(prefer(r[:, None], r_ref), length[:, None] - length_ref)
        result = dict(judge=args.judge, win_rate=mean, win_rate_se=standard_error, win_rate_lc=at_equal_length,
                      reward=r.mean().item())
        if args.judge in toyworld.TASTES:
            in_grammar = [toyworld.in_grammar(story) for story in tokenizer.decode(y.tolist())]
            result["grammar"] = sum(in_grammar) / len(y)
        if args.judge == "readability":
            measured = [readability.measure(story) for story in tokenizer.decode(y.tolist())]
            for name in ("unknown_words", "unseen_trigrams"):
                result[name] = sum(m[name] for m in measured) / len(y)
        return result
    return judge


@torch.no_grad()
def evaluate_samples(args, policy, ref, y, mask):
    """
    Means over samples y (N, T) of the policy, with the mask of their responses: KL and entropy in nats, length in
    tokens, the share with an end.
    """
    def token_kl(hidden, ref_hidden):                                               # (M, dim), (M, dim) -> (M,)
        return spo.kl_per_token(policy.output(hidden), ref.output(ref_hidden))

    def token_entropy(hidden):
        return torch.special.entr(upcast(policy.output(hidden)).softmax(-1)).sum(-1)

    kl, entropy, V = [], [], policy.args.vocab_size
    with spo.autocast(args):
        for part, counts in zip(y[:, :-1].split(BATCH), mask[:, 1:].bool().split(BATCH)):
            hidden = policy.hidden(part)                                            # read by both, (b, T-1, dim)
            kl.append(spo.sum_over_tokens(token_kl, V, counts, hidden, ref.hidden(part)))
            entropy.append(spo.sum_over_tokens(token_entropy, V, counts, hidden))
    finished = (mask * (y == BOS)).sum(1)                                           # (N,)
    return dict(kl=torch.cat(kl).mean().item(), entropy=torch.cat(entropy).mean().item(),
                length=mask.sum(1).float().mean().item(), finished=finished.float().mean().item())


@torch.no_grad()
def heldout_accuracy(args, policy, data):
    """
    The share of the pairs of which the policy, by Eq. 7, prefers y_w: log pi_w > log pi_l, one half where they are
    equal. At most NUM_HELDOUT pairs of the Responses.
    """
    rows = torch.arange(min(NUM_HELDOUT, len(data)))
    with spo.autocast(args):
        logp_w, logp_l = spo.dataset_logp(policy, data, [rows], BATCH)[rows].T
    return higher(logp_w, logp_l).mean().item()


def get_prompts(args, model_args, n):
    """The prompts of n held-out rows, the first ones again where there are fewer -> (n, P) as spo.sample takes them."""
    lengths = [f"{args.data}/{name}{spo.PROMPT_LENGTH}" for name in ("pairs", "heldout_pairs")]
    if not any(map(os.path.exists, lengths)):
        return spo.no_prompts(n)
    if not all(map(os.path.exists, lengths)):
        raise UserError(f"of {' and '.join(lengths)} one does not exist: evaluations need the held-out prompts.")
    heldout = spo.load_responses(f"{args.data}/heldout_pairs.npy", model_args)
    spo.check_prompts(args, heldout, "heldout_pairs.npy")
    return heldout.prompts(torch.arange(n) % len(heldout))


def sample(args, model, prompts, *key):
    """A sample of the model for each prompt (n, P), with the random numbers of spo.rng(seed, *key) -> (n, T)."""
    sampler = fast_generate if args.fast_sampling else generate
    with spo.autocast(args):
        return spo.sample(model, prompts, args.max_new_tokens, spo.rng(args.seed, *key), sampler)


def wrap(label, text):
    """Lines that fit the screen. Control characters, which a model may sample, do not reach the terminal."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return wrap_text(f"{label}: {printable}", " " * (len(label) + 2)) + "\n"


def reference_samples(args, model, prompts):
    """
    Samples of the reference, the model in args.init, that win rates during training compare with -> (M, T): with
    prompts one for each; else ref.npy, hashed, or new ones where its samples are another model's.
    """
    if prompts.shape[1] > 1:
        return sample(args, model, prompts, EVAL_REF)
    init = file_hash(args.init)
    if spo.recorded_hashes(args).get("sft.pt", init) != init:
        return sample(args, model, spo.no_prompts(NUM_REF), EVAL_REF)
    spo.hash_files(args, "ref.npy")
    tokens = spo.load_responses(f"{args.data}/ref.npy", model.args, 2, 1).tokens[:NUM_REF, 0]
    if (tokens[:, -1] != BOS).any() and args.max_new_tokens >= tokens.shape[1]:
        return sample(args, model, spo.no_prompts(NUM_REF), EVAL_REF)  # ref.npy has samples that were cut earlier
    tokens = tokens[:, :1 + args.max_new_tokens]
    return spo.trim_padding(torch.from_numpy(tokens.astype("int64")).to(args.device))


def make_evaluate(args):
    """
    The function evaluate(policy, ref, step) -> dict that spo.train calls. It prints a sample, and after the last step
    three beside the reference's, also to samples.txt. The files it reads are added to args.hashes.
    """
    spo.require_file(args, "ref.npy")
    reference = load(args.init, args.device)
    spo.check_length(args.max_new_tokens, reference.args.max_seq_len)
    tokenizer = load_tokenizer(args.tokenizer, reference.args.vocab_size)
    prompts = get_prompts(args, reference.args, args.num_eval_samples)
    heldout = None
    if os.path.exists(f"{args.data}/heldout_pairs.npy"):
        spo.hash_files(args, "heldout_pairs.npy", f"heldout_pairs{spo.PROMPT_LENGTH}")
        heldout = spo.load_responses(f"{args.data}/heldout_pairs.npy", reference.args, num_responses=2)
    if args.judge == "llm":
        evaluations = 1 + math.ceil(args.steps / args.eval_every)
        ask_test_question(2 * args.num_eval_samples * evaluations)
    y_ref = reference_samples(args, reference, prompts)
    if args.judge == "llm" and args.num_eval_samples > len(y_ref):
        raise UserError(f"--num_eval_samples must be at most {len(y_ref)}, the rows the llm compares with.")
    judge = make_judge(args, tokenizer, y_ref, paired=prompts.shape[1] > 1)  # samples for the same prompt
    args.hashes["tokenizer"] = file_hash(args.tokenizer)

    def evaluate(policy, ref, step):
        y = sample(args, policy, prompts, spo.EVAL, step)
        mask = spo.response_mask(y, (prompts >= 0).sum(1))
        print(wrap("sample", tokenizer.decode(y[0].tolist())), end="", flush=True)
        if step == args.steps:
            before, after = (tokenizer.decode(sample(args, m, prompts[:3], spo.SHOW).tolist()) for m in (ref, policy))
            text = "".join(wrap("before", a) + wrap(" after", b) for a, b in zip(before, after))
            print(text, end="", flush=True)
            with atomic_write(f"{args.out}/samples.txt") as f:
                f.write(text.encode())
        record = {"n": len(y), **judge(y), **evaluate_samples(args, policy, ref, y, mask)}
        if heldout is not None:
            record["heldout_accuracy"] = heldout_accuracy(args, policy, heldout)
        return record
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


def best_evaluation(out, max_kl=math.inf):
    """
    The evaluation with the highest win rate of the run in folder out, of those whose KL is at most max_kl; the first of
    equal ones -> dict.
    """
    best = {"win_rate": -1.0}
    for record in read_evaluations(out):
        if spo.is_best(record, best["win_rate"], max_kl):
            best = record
    if "step" not in best:
        raise UserError(f"{out}/log.jsonl has no evaluation with a win rate: train with a --judge.")
    return best


READ = ("model", "data", "init", "tokenizer", "judge", "seed", "max_new_tokens", "device", "dtype", "fast_sampling")


def main(argv=None):
    p = Parser(description=f"The win rate of a checkpoint against the reference. Flags of spo.py: {', '.join(READ)}.")
    p.add_argument("checkpoint", help="a .pt or .bin file; comes before the flags")
    p.add_argument("--n", type=int, default=1000, help="fresh samples of each model")
    own, rest = p.parse_known_args(argv)
    for flag in rest:
        if flag.startswith("--") and flag[2:].split("=")[0] not in READ:
            p.error(f"{flag} is not read here: leave it out")
    args = spo.get_args(rest)
    if own.n < 2 or args.judge == "none":
        p.error("--n must be at least 2, and --judge not none")
    limit_threads(own.checkpoint)
    policy, ref = load(own.checkpoint, args.device), load(args.init, args.device)
    for model in (policy, ref):
        spo.check_length(args.max_new_tokens, model.args.max_seq_len)
    spo.recorded_hashes(args)  # refuses another tokenizer
    tokenizer = load_tokenizer(args.tokenizer, policy.args.vocab_size)
    if args.judge == "llm":
        ask_test_question(2 * own.n)
    prompts = get_prompts(args, policy.args, own.n)
    judge = make_judge(args, tokenizer, sample(args, ref, prompts, FRESH_REF), prompts.shape[1] > 1)
    y = sample(args, policy, prompts, FRESH)
    mask = spo.response_mask(y, (prompts >= 0).sum(1))
    result = {"n": own.n, **judge(y), **evaluate_samples(args, policy, ref, y, mask)}
    cells = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in result.items()]
    print(wrap_text("  ".join(cells)))
    settings = {name: getattr(args, name) for name in ("seed", "data", "max_new_tokens", "dtype")}
    with open(os.path.join(os.path.dirname(own.checkpoint), "evaluations.jsonl"), "a") as f:
        f.write(json.dumps({"checkpoint": os.path.basename(own.checkpoint), **settings, **result}) + "\n")


if __name__ == "__main__":
    run_main(main)
