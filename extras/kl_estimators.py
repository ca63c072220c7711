"""
Two estimators of the KL's gradient: Appendix D's token-wise KL, which training uses, and the score function, which the
paper sets aside. The first is biased, the second unbiased and noisier. How much, at a checkpoint:

    python -m extras.kl_estimators out/.../best.pt --batches 400    # other flags are spo.py's
"""
import argparse
import math
import sys

import torch

import spo
from extras.judge import sample
from model import UserError, load

ESTIMATE = 300  # purpose of spo.rng


def score_function_kl(logp, ref_logp):
    """
    log pi_theta(y) - log pi_ref(y) of R samples, from their logp and ref_logp (R,) -> (R,). The gradient is that of
    the score-function estimate, unbiased on fresh samples: (ratio - baseline) grad log pi_theta(y), where the baseline
    of a sample is the mean ratio of the others. A single sample has none.
    """
    ratio = (logp - ref_logp).detach()
    baseline = (ratio.sum() - ratio) / max(1, len(logp) - 1)
    return ratio + (ratio - baseline) * (logp - logp.detach())


def mean_product(a, b):
    """
    An unbiased estimate of E[a] . E[b] for a, b (batches, parameters): over pairs of different batches, whose noise is
    independent. The product of the two means would add the noise's.
    """
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1))).item()


def compare_gradients(token, score):
    """
    Gradients estimated by the token-wise KL and by the score function, (batches, parameters) each -> dict. bias, of
    the first, and noise and score_noise, standard deviations, are relative to the norm of the true gradient, which is
    the mean of the second; cosine is that of the two means. The batches' noise is taken out of bias and cosine, which
    may so exceed 1. All are nan where the noise hides the true gradient.
    """
    size = mean_product(score, score)                       # the true gradient's squared norm
    token_size = mean_product(token, token)
    if min(size, token_size) <= 0:
        return dict.fromkeys(("bias", "noise", "score_noise", "cosine"), math.nan)
    bias = max(0.0, mean_product(token - score, token - score))
    return dict(bias=math.sqrt(bias / size), noise=math.sqrt(token.var(0).sum().item() / size),
                score_noise=math.sqrt(score.var(0).sum().item() / size),
                cosine=mean_product(token, score) / math.sqrt(size * token_size))


def estimate_gradients(policy, ref, args, batches):
    """Both estimates on the same fresh samples, num_rollouts per batch -> two tensors (batches, parameters)."""
    token, score = [], []
    for i in range(batches):
        y = sample(args, policy, args.num_rollouts, ESTIMATE, i)
        mask = spo.response_mask(y)
        with spo.autocast(args):
            with torch.no_grad():
                ref_logp, ref_hidden = spo.seq_logp(ref, y, mask), ref.hidden(y[:, :-1])
            token_kl = spo.rollout_kl(policy, ref, y, ref_hidden)
            score_kl = score_function_kl(spo.seq_logp(policy, y, mask), ref_logp)
        for kl, gradients in ((token_kl, token), (score_kl, score)):
            parts = torch.autograd.grad(kl.mean(), list(policy.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(token), torch.stack(score)


def main(argv=None):
    p = argparse.ArgumentParser(description="Bias and noise of two estimators of the KL's gradient at a checkpoint. "
                                "All other flags are those of spo.py.", allow_abbrev=False)
    p.add_argument("checkpoint", help="a .pt or .bin file; comes before the flags")
    p.add_argument("--batches", type=int, default=400, help="how many, each of --num_rollouts samples")
    own, rest = p.parse_known_args(argv)
    args = spo.get_args(rest)
    if own.batches < 4 or "num_rollouts" not in vars(args):
        p.error("--batches must be at least 4, and --algo one with rollouts")
    policy, ref = load(own.checkpoint, args.device), load(args.init, args.device)
    token, score = estimate_gradients(policy, ref, args, own.batches)
    print("relative to the norm of the KL's gradient, in two halves of the batches:")
    print("  token KL bias   token KL noise   score function noise   cosine")
    for token_half, score_half in zip(token.chunk(2), score.chunk(2)):
        row = compare_gradients(token_half, score_half)
        print(f"  {row['bias']:13.2f} {row['noise']:16.2f} {row['score_noise']:22.2f} {row['cosine']:8.2f}")
        if math.isnan(row["bias"]):
            print("  nan: the noise hides the gradient, or there is none: take more --batches")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
