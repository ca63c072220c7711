"""
Two estimators of the KL's gradient: Appendix D's token-wise KL, which training uses, is biased; the score function,
which the paper sets aside, is unbiased and noisier. How much, at a checkpoint:

    python -m extras.kl_estimators out/.../best.pt --batches 400    # other flags are spo.py's
"""
import math

import torch

import spo
from extras.judge import get_prompts, sample
from model import Parser, load, run_main, wrap

ESTIMATE = 300  # purpose of spo.rng


def score_function_kl(logp, ref_logp):
    """
    The log-ratio of R samples, from their logp and ref_logp (R,) -> (R,). Its gradient is the score function's:
    (ratio - baseline) grad log pi_theta(y), with the mean ratio of the other samples as the baseline (of one alone, 0).
    """
    ratio = (logp - ref_logp).detach()
    baseline = (ratio.sum() - ratio) / max(1, len(logp) - 1)
    return ratio + (ratio - baseline) * (logp - logp.detach())


def flat_gradient(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def mean_product(a, b):
    """E[a] . E[b], unbiased, for a, b (batches, parameters): over pairs of different batches."""
    return (a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1))


def compare_gradients(token, score):
    """
    Estimates by the token-wise KL and by the score function, (batches, parameters) each -> dict: bias and noise of
    the first and noise of the second, relative to the norm of the second's mean, and the cosine of the two means.
    These are estimates themselves: a cosine may exceed 1, and is nan where the noise hides the gradient.
    """
    norm = mean_product(score, score).sqrt()
    cosine = mean_product(token, score) / (norm * mean_product(token, token).sqrt())
    bias = mean_product(token - score, token - score).clamp(min=0).sqrt() / norm
    noise, score_noise = token.std(0).norm() / norm, score.std(0).norm() / norm
    return dict(bias=bias.item(), noise=noise.item(), score_noise=score_noise.item(), cosine=cosine.item())


def estimate_gradients(policy, ref, args, batches):
    """Both estimates on the same fresh samples, num_rollouts per batch -> two tensors (batches, parameters)."""
    token, score = [], []
    all_prompts = get_prompts(args, policy.args, batches * args.num_rollouts)
    for i, prompts in enumerate(all_prompts.split(args.num_rollouts)):
        y = sample(args, policy, prompts, ESTIMATE, i)
        mask = spo.response_mask(y, (prompts >= 0).sum(1))
        with spo.autocast(args):
            with torch.no_grad():
                ref_logp, ref_hidden = spo.seq_logp(ref, y, mask), ref.hidden(y[:, :-1])
            token_kl = spo.rollout_kl(policy, ref, y, mask, ref_hidden)
            score_kl = score_function_kl(spo.seq_logp(policy, y, mask), ref_logp)
        token.append(flat_gradient(token_kl.mean(), policy))
        score.append(flat_gradient(score_kl.mean(), policy))
    return torch.stack(token), torch.stack(score)


def main(argv=None):
    p = Parser(description="Other flags are those of spo.py.")
    p.add_argument("checkpoint", help="a .pt or .bin file; comes before the flags")
    p.add_argument("--batches", type=int, default=400, help="how many, each of --num_rollouts samples")
    own, rest = p.parse_known_args(argv)
    args = spo.get_args(rest)
    if own.batches < 4 or "num_rollouts" not in vars(args):
        p.error("--batches must be at least 4, and --algo one with rollouts")
    policy, ref = load(own.checkpoint, args.device), load(args.init, args.device)
    token, score = estimate_gradients(policy, ref, args, own.batches)
    print(wrap("relative to the norm of the KL's gradient, in two halves of the batches:"))
    print("  token KL bias  its noise  score function noise  cosine")
    for token_half, score_half in zip(token.chunk(2), score.chunk(2)):
        row = compare_gradients(token_half, score_half)
        print(f"  {row['bias']:13.2f} {row['noise']:10.2f} {row['score_noise']:21.2f} {row['cosine']:7.2f}")
        if math.isnan(row["cosine"]):
            print(wrap("  nan: the noise hides the gradient, or there is none: take more --batches"))


if __name__ == "__main__":
    run_main(main)
