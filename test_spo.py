"""
Tests of spo.py and model.py that a reader of the paper wants to see; extras/tests holds the others.

    .venv/bin/python test_spo.py            # Theorems 1 to 4 as a table, for the very functions that train
    .venv/bin/python -m pytest test_spo.py  # these, the losses, the KL, the cache, three steps of every algorithm
"""
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import spo
from model import BOS, KVCache, ModelArgs, Transformer, generate, load, load_checkpoint, save, wrap

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

# ---------------------------------------------------------------------------------------------------
# The theorems. A tabular model of one x and five responses: theta (5,), log pi = log_softmax(theta). The preference
# distribution has full support, is consistent with the reward r, and compares some pairs more often than others.

r = torch.tensor([0.9, -0.6, 0.3, -0.1, -0.9], dtype=torch.float64)
pi_ref = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
ALPHAS = (0.3, 0.5, 1.0, 2.0)


def ordered_choices(n):
    """Every ordered choice of n different responses (B, n), and an uneven frequency for each set of them (B,)."""
    rows = torch.tensor(list(itertools.permutations(range(len(r)), n)))
    generator, frequency = torch.Generator().manual_seed(0), {}
    for row in rows.tolist():
        frequency.setdefault(frozenset(row), 0.05 + torch.rand((), generator=generator, dtype=torch.float64) ** 2)
    return rows, torch.stack([frequency[frozenset(row)] for row in rows.tolist()])


def plackett_luce(rows):
    """Eq. 3, for n = 2 Eq. 2: the probability of each order in rows (B, n), best first -> (B,)."""
    p = torch.ones(len(rows), dtype=torch.float64)
    for k in range(rows.shape[1] - 1):
        p *= (r[rows[:, k]] - r[rows[:, k:]].logsumexp(1)).exp()
    return p


pairs, pair_frequency = ordered_choices(2)
W, L = pairs.T
D = pair_frequency * plackett_luce(pairs)
D = D / D.sum()  # D(y_w, y_l)


def spo_objective(logp, alpha, mu=None):
    """The expectation of Eq. 9, or 11, over D."""
    return D @ spo.spo_loss(logp[W], logp[L], alpha, mu)


def eq6_objective(logp, alpha, beta):
    """Eq. 6: Eq. 9 + beta D_KL."""
    kl = spo.token_kl(logp[None, None], pi_ref.log()[None, None], torch.ones(1, 1))[0]
    return spo_objective(logp, alpha) + beta * kl


def minimize(loss, theta=None):
    """The minimizer of loss(log pi) over the tabular model, as probabilities."""
    theta = torch.zeros(len(r), dtype=torch.float64) if theta is None else theta.clone()
    theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().softmax(0)


def follow_flow(loss, steps=150):
    """
    Theorem 2's ODE, pi' = projection of -dL/dpi, from the uniform pi: mu depends on pi but is not differentiated, so
    there is no loss to minimize. It is stiff, hence linearly implicit Euler steps, shorter where pi would fall to a
    fifth. Inside the simplex the projection subtracts the mean.
    """
    n, pi, h = len(r), torch.full_like(r, 1 / len(r)), 1e-3
    identity = torch.eye(n, dtype=torch.float64)
    project = identity - 1 / n
    for _ in range(steps):
        pi.requires_grad_(True)
        v, = torch.autograd.grad(-loss(pi.log()), pi)
        jacobian = -project @ torch.autograd.functional.hessian(lambda p: loss(p.log()), pi)
        pi = pi.detach()
        step = torch.linalg.solve(identity - h * jacobian, h * project @ v)
        if (pi + step).min() < 0.2 * pi.min():
            h /= 4
        else:
            pi, h = pi + step, h * 1.2
    return pi


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


def learn_all(alpha):
    """
    Each theorem, what its loss learns, and how near it must come to softmax(r / alpha) in total variation; then three
    controls, whose mu is not symmetric and which must stay away from it (None).
    """
    trios, frequency = ordered_choices(3)
    first = torch.zeros(len(trios), dtype=torch.long)
    best_is_first = frequency * r[trios].softmax(1)[:, 0]  # n-ary Bradley-Terry
    ranked = frequency * plackett_luce(trios)
    symmetric = torch.stack([1 + 9 * pi_ref[trios[:, k:]].sum(1) ** 2 for k in range(2)], 1)
    skewed = torch.stack([1 + 9 * pi_ref[trios[:, k]] for k in range(2)], 1)

    def weighted(logp):
        return spo_objective(logp, alpha, spo.pair_weight(logp[W], logp[L], gamma=0.5))

    def weighted_by_winner(logp):
        return spo_objective(logp, alpha, logp[W].exp())

    def best_of_n(mu):
        return minimize(lambda logp: best_is_first @ spo.best_of_n_loss(logp[trios], first, alpha, mu[:, 0]))

    def ranking(mu):
        return minimize(lambda logp: ranked @ spo.ranked_loss(logp[trios], alpha, mu))

    return [("1  Eq. 9", minimize(lambda logp: spo_objective(logp, alpha)), 1e-5),
            ("2  Eq. 11", follow_flow(weighted), 1e-3),
            ("3  Eq. 14", best_of_n(symmetric), 1e-5),
            ("4  Eq. 15", ranking(symmetric), 1e-5),
            ("not 2", follow_flow(weighted_by_winner), None),
            ("not 3", best_of_n(skewed), None),
            ("not 4", ranking(skewed), None)]


def print_theorems():
    """The table; True if every row is as the theorems say."""
    print(wrap("A tabular model of five responses learns softmax(r / alpha) from pairs of uneven frequency. not 2, 3, "
               "4: with a mu that is not symmetric it must not. TV: total variation."))
    line = "{:9s}  {:24s}  {:7s}  {}"
    good = True
    for alpha in ALPHAS:
        target = (r / alpha).softmax(0)
        print("\n" + line.format(f"alpha {alpha}", "learned", "TV", "pass"))
        print(line.format("target", " ".join(f"{p:.2f}" for p in target.tolist()), "", "").rstrip())
        for name, learned, tolerance in learn_all(alpha):
            tv = total_variation(learned, target)
            passed = tv > 0.02 if tolerance is None else tv < tolerance
            cells = " ".join(f"{p:.2f}" for p in learned.tolist())
            print(line.format(name, cells, f"{tv:.1e}", "yes" if passed else "NO"))
            good = good and passed
    print("\nall as the theorems say" if good else "\nNOT as the theorems say")
    print("\nEq. 6 at alpha 0.3: from softmax(r / alpha) to pi_ref\n"
          " beta  learned                   TV to softmax  TV to pi_ref")
    for beta in (0, 0.01, 0.1, 1, 10):
        pi = minimize(lambda logp: eq6_objective(logp, 0.3, beta))
        print(f"{beta:5g}  {' '.join(f'{p:.2f}' for p in pi.tolist())}  "
              f"{total_variation(pi, (r / 0.3).softmax(0)):13.3f}  {total_variation(pi, pi_ref):12.3f}")
    sequence, token, gradient, token_gradient, _ = enumerate_kl()
    print()
    print(wrap(f"Token KL of a model whose responses can be enumerated: {token:.6f}, sequence KL {sequence:.6f}; its "
               f"gradient, which holds the prefixes fixed, is "
               f"{(token_gradient - gradient).norm() / gradient.norm():.0%} off the exact one "
               f"(cosine {F.cosine_similarity(token_gradient, gradient, 0):.2f})."))
    return good


def test_theorems_1_to_4(capsys):
    good, table = print_theorems(), capsys.readouterr().out
    assert good and "NO" not in table and table.count("  yes\n") == 7 * len(ALPHAS), table


def test_alpha_0_finds_the_best_response_only_for_even_frequencies():
    def ascend(D):
        theta = torch.zeros(len(r), dtype=torch.float64, requires_grad=True)
        for _ in range(4000):
            logp = theta.log_softmax(0)
            gradient, = torch.autograd.grad(D @ spo.spo_loss(logp[W], logp[L], 0.0), theta)
            theta = (theta - 20 * gradient).detach().requires_grad_()
        return theta.detach().softmax(0)

    even = plackett_luce(pairs)
    assert ascend(even / even.sum())[r.argmax()] > 0.999
    uneven = torch.where((pairs == r.argmax()).any(1), 0.02, 1.0) * even  # the best response is rarely compared
    uneven = uneven / uneven.sum()
    wins_minus_losses = torch.zeros_like(r).index_add(0, W, uneven).index_add(0, L, -uneven)
    assert wins_minus_losses.argmax() != r.argmax() and ascend(uneven)[wins_minus_losses.argmax()] > 0.999


def test_eq_6_moves_from_softmax_to_the_reference():
    distances = []
    for beta in (1e-7, 0.1, 1.0, 10.0, 1e4):
        pi = minimize(lambda logp: eq6_objective(logp, 0.5, beta))
        start = torch.tensor([2.0, -1, 0, 1, -2], dtype=torch.float64)
        assert total_variation(pi, minimize(lambda logp: eq6_objective(logp, 0.5, beta), start)) < 1e-5
        distances.append(total_variation(pi, pi_ref))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4
    assert distances[0] == pytest.approx(total_variation((r / 0.5).softmax(0), pi_ref), abs=1e-5)


def test_dpo_and_ipo_have_the_minimizers_of_their_papers():
    beta, ref = 0.7, pi_ref.log()
    pi = minimize(lambda logp: D @ spo.dpo_loss(logp[W], logp[L], ref[W], ref[L], beta))
    assert total_variation(pi, (ref + r / beta).softmax(0)) < 1e-5
    # IPO: both responses from one distribution; pi_ref exp(P(preferred to one drawn from it) / beta)
    drawn = torch.tensor([0.3, 0.1, 0.25, 0.2, 0.15], dtype=torch.float64)
    D_ipo = drawn[W] * drawn[L] * torch.sigmoid(r[W] - r[L])
    pi = minimize(lambda logp: D_ipo @ spo.ipo_loss(logp[W], logp[L], ref[W], ref[L], beta))
    assert total_variation(pi, (ref + torch.sigmoid(r[:, None] - r) @ drawn / beta).softmax(0)) < 1e-5


# ---------------------------------------------------------------------------------------------------
# The losses, against the paper's fractions of powers of probabilities, one row at a time

g = torch.Generator().manual_seed(1)
lw, ll, rw, rl = (3 * torch.randn(7, generator=g, dtype=torch.float64) - 5 for _ in range(4))
many = 2 * torch.randn(7, 4, generator=g, dtype=torch.float64) - 5
best = torch.tensor([0, 1, 2, 3, 0, 1, 2])
mu7, mu73 = torch.rand(7, generator=g, dtype=torch.float64), torch.rand(7, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 2.0])
def test_losses_are_the_formulas(alpha):
    for i in range(7):
        w, l, mu = lw[i].item(), ll[i].item(), mu7[i].item()
        pw, pl = math.exp(w) ** alpha, math.exp(l) ** alpha
        p = [math.exp(x) ** alpha for x in many[i].tolist()]
        ranking = [-mu73[i, k].item() * math.log(p[k] / sum(p[k:])) / alpha for k in range(3)]
        margin = (w - rw[i].item()) - (l - rl[i].item())
        table = [
            (spo.spo_loss(lw, ll, alpha), -math.log(pw / (pw + pl)) / alpha),
            (spo.spo_loss(lw, ll, alpha, mu7), -mu * math.log(pw / (pw + pl)) / alpha),
            (spo.spo_loss(lw, ll, 0.0, mu7), -mu * math.log(math.exp(w) / math.exp(l)) / 2),
            (spo.best_of_n_loss(many, best, alpha, mu7), -mu * math.log(p[best[i]] / sum(p)) / alpha),
            (spo.ranked_loss(many, alpha, mu73), sum(ranking)),
            (spo.dpo_loss(lw, ll, rw, rl, 0.3), math.log(1 + math.exp(-0.3 * margin))),
            (spo.ipo_loss(lw, ll, rw, rl, 0.3), (margin - 1 / (2 * 0.3)) ** 2),
            (spo.slic_loss(lw, ll, 1.5), max(0, 1.5 - w + l)),
        ]
        for loss, expected in table:
            assert loss.shape == (7,) and loss[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradients_and_no_gradient_through_mu():
    a, b, c = lw.clone().requires_grad_(), ll.clone().requires_grad_(), many.clone().requires_grad_()
    for alpha in (0.0, 0.01, 0.5, 2.0):
        assert torch.autograd.gradcheck(lambda a, b: spo.spo_loss(a, b, alpha, mu7), (a, b))
        assert torch.autograd.gradcheck(lambda c: spo.best_of_n_loss(c, best, alpha, mu7), c)
        assert torch.autograd.gradcheck(lambda c: spo.ranked_loss(c, alpha, mu73), c)
        # Eq. 13, also for a mu that is computed from theta
        live_mu = (a.exp() + b.exp()) ** 0.7
        gradient = torch.autograd.grad(spo.spo_loss(a, b, alpha, live_mu).sum(), (a, b))
        eq_13 = live_mu.detach() * ll.exp() ** alpha / (lw.exp() ** alpha + ll.exp() ** alpha)
        assert torch.allclose(gradient[0], -eq_13) and torch.allclose(gradient[1], eq_13)
        live = c.exp()
        for with_mu in (spo.best_of_n_loss(c, best, alpha, live[:, 0]), spo.ranked_loss(c, alpha, live[:, :3])):
            assert torch.autograd.grad(with_mu.sum(), live, allow_unused=True, retain_graph=True) == (None,)
    for loss in (spo.dpo_loss, spo.ipo_loss):
        assert torch.autograd.gradcheck(lambda a, b: loss(a, b, rw, rl, 0.3), (a, b))
    assert torch.autograd.gradcheck(lambda a, b: spo.slic_loss(a, b, 1.5), (a, b))


def test_losses_are_special_cases_of_each_other():
    two, zero = torch.stack((lw, ll), 1), torch.zeros(7, dtype=torch.long)
    for alpha in (0.0, 0.1, 1.0):
        pair = spo.spo_loss(lw, ll, alpha, mu7)
        assert torch.allclose(pair, spo.best_of_n_loss(two, zero, alpha, mu7))
        assert torch.allclose(pair, spo.ranked_loss(two, alpha, mu7[:, None]))
        only_first = mu73 * torch.tensor([1.0, 0, 0])  # Section 5
        assert torch.allclose(spo.ranked_loss(many, alpha, only_first),
                              spo.best_of_n_loss(many, zero, alpha, mu73[:, 0]))
    limit = [spo.spo_loss(lw, ll, alpha) - math.log(2) / alpha - spo.spo_loss(lw, ll, 0.0) for alpha in (1e-4, 1e-5)]
    assert limit[0].abs().max() < 1e-2 and limit[1].abs().max() < 0.11 * limit[0].abs().max()


def test_pair_weight():
    mu = spo.pair_weight(lw, ll, 0.7)
    expected = (lw.exp() + ll.exp()) ** 0.7
    assert torch.allclose(mu, expected / expected.mean()) and torch.equal(mu, spo.pair_weight(ll, lw, 0.7))
    assert spo.pair_weight(torch.tensor([-1e4, 0.0]), torch.tensor([-1e4, 0.0]), 1.0).isfinite().all()
    assert torch.allclose(spo.pair_weight(lw, ll, 0.7, -2.0), expected * math.exp(2))
    for log_mean, same in ((-2.0, True), (None, False)):  # alone as in a batch
        alone = torch.cat([spo.pair_weight(lw[i:i + 1], ll[i:i + 1], 0.7, log_mean) for i in range(7)])
        assert torch.allclose(alone, spo.pair_weight(lw, ll, 0.7, log_mean)) == same


def test_losses_are_finite_at_differences_of_ten_thousand():
    zero, ref = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    for sign in (1, -1):
        a = torch.tensor([-50.0, -50.0]).requires_grad_()
        b = torch.tensor([-50.0 - sign * 1e4, -60.0]).requires_grad_()
        losses = [spo.spo_loss(a, b, alpha) for alpha in (0.0, 0.01, 1.0)]
        losses += [spo.best_of_n_loss(torch.stack((a, b, b), 1), zero, 1.0),
                   spo.ranked_loss(torch.stack((a, b), 1), 1.0), spo.dpo_loss(a, b, ref, ref, 1.0),
                   spo.ipo_loss(a, b, ref, ref, 0.1), spo.slic_loss(a, b, 1.0)]
        for loss in losses:
            gradients = torch.autograd.grad(loss.sum(), (a, b))
            assert all(x.isfinite().all() for x in (loss, *gradients))


def test_nothing_to_predict_and_nothing_to_compare():
    for shape in ((3, 1), (0, 4)):
        tokens = torch.full(shape, BOS)
        assert spo.seq_logp(tiny(), tokens, spo.response_mask(tokens)).tolist() == [0.0] * shape[0]
    none, no_rows, no_best = torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    for alpha in (0.0, 0.5):
        losses = [spo.spo_loss(none, none, alpha, none), spo.best_of_n_loss(no_rows, no_best, alpha),
                  spo.ranked_loss(no_rows, alpha), spo.pair_weight(none, none, 0.5), spo.slic_loss(none, none, 1.0),
                  spo.dpo_loss(none, none, none, none, 0.5), spo.ipo_loss(none, none, none, none, 0.5)]
        assert all(loss.shape == (0,) for loss in losses)
        assert spo.ranked_loss(many[:, :1], alpha).tolist() == [0.0] * 7  # one response has no rival


# ---------------------------------------------------------------------------------------------------
# log pi(y) and the token KL, on a model whose responses can be enumerated

def tiny(vocab_size=5, seed=0, scale=40, **other):
    """An untrained model with an embedding scale times that at the start of training, so that nothing is uniform."""
    torch.manual_seed(seed)
    args = dict(dim=16, n_layers=2, n_heads=4, vocab_size=vocab_size, multiple_of=4, max_seq_len=64)
    model = Transformer(ModelArgs(**args | other))
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(scale)
    return model


def all_responses(vocab_size, length=4):
    """Every response of at most this length: ended by BOS, or cut."""
    others = [t for t in range(vocab_size) if t != BOS]
    ended = [y + (BOS,) * (length - n) for n in range(length) for y in itertools.product(others, repeat=n)]
    return torch.tensor([(BOS, *y) for y in ended + list(itertools.product(others, repeat=length))])


def end_of(response):
    """Where a response ends: at its first BOS after the one that begins it, or where it is cut."""
    return next((t for t in range(1, len(response)) if response[t] == BOS), len(response) - 1)


def slow_logp(model, y, prompt_length=1):
    """log pi of each response (N, T), its end included: one response at a time, no padding, no mask."""
    def one(response, start):
        end = end_of(response)
        logits = model(response[None, :end])[0]
        return -F.cross_entropy(logits[start - 1:], response[start:end + 1], reduction="sum")
    starts = torch.as_tensor(prompt_length).expand(len(y)).tolist()
    return torch.stack([one(response, start) for response, start in zip(y, starts)])


def slow_kl(policy, ref, y, prompt_length=1):
    """Appendix D's KL of each response, likewise."""
    def one(response, start):
        end = end_of(response)
        p, q = (m(response[None, :end])[0, start - 1:].softmax(-1) for m in (policy, ref))
        return (p * (p / q).log()).sum()
    starts = torch.as_tensor(prompt_length).expand(len(y)).tolist()
    return torch.stack([one(response, start) for response, start in zip(y, starts)])


def enumerate_kl():
    """Exact: sequence KL, token KL, both gradients, and the latter with the score-function term it leaves out."""
    policy, ref, y = tiny(4, 0).double(), tiny(4, 1).double(), all_responses(4)
    mask = spo.response_mask(y)
    logp = spo.seq_logp(policy, y, mask)
    assert logp.exp().sum().item() == pytest.approx(1)  # pi is a distribution over responses
    ref_logp, ref_logits = spo.seq_logp(ref, y, mask).detach(), ref(y[:, :-1]).detach()
    sequence = (logp.exp() * (logp - ref_logp)).sum()
    kl, pi = spo.token_kl(policy(y[:, :-1]), ref_logits, mask[:, 1:]), logp.exp().detach()

    def gradient(x):
        return torch.cat([p.flatten() for p in torch.autograd.grad(x, policy.parameters(), retain_graph=True)])

    score = gradient((pi * kl.detach()) @ logp)
    return sequence.item(), (pi @ kl).item(), gradient(sequence), gradient(pi @ kl), gradient(pi @ kl) + score


def test_token_kl_is_the_sequence_kl_but_its_gradient_is_not():
    sequence, token, gradient, token_gradient, completed = enumerate_kl()
    assert token == pytest.approx(sequence, rel=1e-9) and torch.allclose(completed, gradient, atol=1e-9)
    assert (token_gradient - gradient).norm() > 0.05 * gradient.norm()


def test_response_mask_counts_the_response_and_its_end():
    tokens = torch.tensor([[1, 5, 6, 1, 1, 1], [1, 5, 6, 7, 8, 9], [1, 1, 1, 1, 1, 1], [1, 5, 6, 7, 8, 1]])
    assert spo.response_mask(tokens).tolist() == [
        [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert spo.response_mask(tokens, torch.tensor([3, 2, 1, 5])).tolist() == [
        [0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_seq_logp_and_kl_against_slow_loops(monkeypatch):
    policy, ref = tiny(20, 0).double(), tiny(20, 1).double()
    y = torch.randint(2, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    y[:, 0] = BOS
    for row, end in enumerate((4, 8, 6, 5, 1, 3)):
        y[row, end:] = BOS
    y[2, 6:] = 7  # cut
    mask = spo.response_mask(y)
    logp, logits = spo.seq_logp(policy, y, mask), policy(y[:, :-1])
    assert logp.shape == (6,) and torch.allclose(logp, slow_logp(policy, y))
    assert torch.allclose(logp, spo.seq_logp(policy, y, mask.double()))     # any numeric mask
    assert torch.allclose(logp, spo.seq_logp(policy.forward, y, mask))      # any function from tokens to logits
    with_prompt = mask.clone()
    with_prompt[2, 1:3] = 0  # a prompt of two tokens, which do not count
    prompt = logits[2, :2].log_softmax(-1)[[0, 1], y[2, 1:3]].sum()
    assert torch.allclose(spo.seq_logp(policy, y, with_prompt)[2], logp[2] - prompt)
    kl = spo.token_kl(logits, ref(y[:, :-1]), mask[:, 1:])
    assert kl.dtype == torch.float64 and torch.allclose(kl, slow_kl(policy, ref, y))
    assert (spo.token_kl(logits, logits.clone(), mask[:, 1:]) == 0).all()
    ref_hidden = ref.hidden(y[:, :-1]).detach()

    def value_and_gradient():
        both = spo.seq_logp(policy, y, mask) + spo.rollout_kl(policy, ref, y, mask, ref_hidden)
        gradients = torch.autograd.grad(both @ torch.arange(6.0).double(), policy.parameters())
        return torch.cat([both.detach(), *(x.flatten() for x in gradients)])

    whole = value_and_gradient()
    assert torch.allclose(whole[:6], logp + kl)
    monkeypatch.setattr(spo, "MAX_LOGITS", 7 * policy.args.vocab_size)
    assert torch.allclose(value_and_gradient(), whole, rtol=1e-10)


def test_log_softmax_is_taken_in_float32():
    y = all_responses(4)
    mask, a, b = spo.response_mask(y), tiny(4, 0)(y[:, :-1]).bfloat16(), tiny(4, 1)(y[:, :-1]).bfloat16()
    assert torch.equal(spo.token_kl(a, b, mask[:, 1:]), spo.token_kl(a.float(), b.float(), mask[:, 1:]))
    assert torch.equal(spo.seq_logp(lambda _: a, y, mask), spo.seq_logp(lambda _: a.float(), y, mask))
    half = (a.log_softmax(-1).exp() * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    assert not torch.allclose(spo.token_kl(a, b, mask[:, 1:]), (half * mask[:, 1:]).sum(1).float(), rtol=1e-3)


# ---------------------------------------------------------------------------------------------------
# Sampling with the cache

def slow_generate(model, y, uniforms, temperature=1.0, top_k=None, prompt_length=None):
    """
    Sampling by the inverse of the cumulative distribution, without a cache, every row to the end. y (B, P): prompts,
    of which prompt_length tokens are given, and the others ignored.
    """
    given = y
    lengths = torch.full((len(y),), y.shape[1]) if prompt_length is None else prompt_length
    y = y[:, :1]
    for t in range(1, uniforms.shape[1] + 1):
        p = (model(y)[:, -1] / temperature).softmax(-1)
        if top_k is not None:
            p = torch.where(p >= p.sort(-1, descending=True).values[:, top_k - 1:top_k], p, 0)
        token = (p.cumsum(-1) <= uniforms[:, t - 1:t] * p.sum(-1, keepdim=True)).sum(1)
        for row in range(len(y)):
            if t < lengths[row]:
                token[row] = given[row, t]
            elif (y[row, lengths[row]:] == BOS).any():
                token[row] = BOS
        y = torch.cat((y, token[:, None]), 1)
    return y


@pytest.mark.parametrize("n_kv_heads, temperature, top_k", [(None, 1.0, None), (2, 0.7, 5), (1, 1.3, None)])
def test_cache_and_generate_against_the_full_forward(n_kv_heads, temperature, top_k):
    model = tiny(30, n_kv_heads=n_kv_heads).double()
    tokens = torch.randint(0, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    cache, parts = KVCache(20), []
    for part in tokens.split([5, 1, 6, 8], 1):  # also several tokens behind a filled cache
        parts.append(model(part, cache))
    assert torch.allclose(torch.cat(parts, 1), model(tokens))
    with torch.no_grad():
        model.tok_embeddings.weight.div_(10)  # so that some samples end early
    prompt = tokens[:, :3].repeat(20, 1)
    y = generate(model, prompt, 30, temperature, top_k, torch.Generator().manual_seed(5))
    uniforms = torch.rand(60, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(y, slow_generate(model, prompt, uniforms, temperature, top_k))
    assert 5 < (y[:, 3:] == BOS).any(1).sum() < 60


def test_prompts_of_mixed_lengths_are_each_continued_as_if_alone():
    model, generator = tiny(30, scale=4).double(), torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 30, (40, 7), generator=generator)
    lengths = torch.randint(2, 8, (40,), generator=generator)
    lengths[:2] = torch.tensor([2, 7])
    prompts = tokens.masked_fill(torch.arange(7) >= lengths[:, None], -1)
    y = generate(model, prompts, 20, generator=torch.Generator().manual_seed(5))
    uniforms = torch.rand(40, 26, generator=torch.Generator().manual_seed(5))
    assert torch.equal(y, slow_generate(model, tokens, uniforms, prompt_length=lengths))
    assert 5 < sum((row[n:] == BOS).any().item() for row, n in zip(y, lengths)) < 40  # some end
    assert torch.equal(generate(model, prompts[:1], 20, generator=torch.Generator().manual_seed(5))[0], y[0])
    greedy = generate(model, prompts, 20, temperature=0)
    for row, prompt, n in zip(greedy, tokens, lengths.tolist()):
        assert torch.equal(row, generate(model, prompt[None, :n], 27 - n, temperature=0)[0])
    with pytest.raises(AssertionError, match="-1 only at their end"):
        generate(model, torch.tensor([[1, -1, -1, -1], [1, 2, -1, 3]]), 4)


# ---------------------------------------------------------------------------------------------------
# Three steps of every algorithm against a plain loop: no cache, no micro-batches, one response at a time. Of spo.py it
# uses the losses and the draws of the batches.

@pytest.fixture(scope="module", params=["from BOS alone", "prompts"])
def data(request, tmp_path_factory):
    """A folder with a tiny model and random responses, also such that continue prompts of 1 to 4 tokens."""
    folder = tmp_path_factory.mktemp("data")
    model = tiny(20, scale=5, max_seq_len=32)
    save(model, folder / "sft.pt")
    for purpose, (name, n) in enumerate(dict(pairs=2, best=4, ranked=4, ref=1).items()):
        lengths = torch.ones(12, dtype=torch.long)
        if request.param == "prompts":
            lengths = torch.randint(1, 5, (12,), generator=spo.rng(purpose))
            np.save(folder / f"{name}_prompt_length.npy", lengths.numpy().astype(np.uint16))
        prompts = torch.randint(2, 20, (12, lengths.max()), generator=spo.rng(purpose))
        prompts[:, 0] = BOS
        prompts[torch.arange(lengths.max()) >= lengths[:, None]] = -1
        y = spo.sample(model, prompts.repeat_interleave(n, 0), 16, spo.rng(purpose)).view(12, n, -1)
        np.save(folder / f"{name}.npy", y.numpy().astype(np.uint16))
    return folder


def read_prompt_length(data, name):
    path = data / f"{name}_prompt_length.npy"
    return torch.from_numpy(np.load(path).astype(int)) if path.exists() else torch.ones(12, dtype=torch.long)


RUNS = ["spo", "spo --gamma 0.1", "spo --alpha 0", "best_of_n --gamma 0.1", "ranked", "ranked --gamma 0.1",
        "dpo", "hypo --beta_kl 0.3", "ipo", "slic"]


@pytest.mark.parametrize("algo", RUNS)
def test_three_steps_against_a_plain_loop(data, tmp_path, algo):
    flags = f"--steps 3 --batch_size 4 --micro_batch_size 5 --lr 3e-3 --warmup 2 --log_every 1 --max_new_tokens 16 " \
            f"--data {data} --out {tmp_path}/run --judge none --algo {algo}"
    use_kl = algo.split()[0] in ("spo", "best_of_n", "ranked", "hypo")
    args = spo.get_args((flags + " --beta 0.5 --num_rollouts 4 --rollout_every 2" * use_kl).split())
    reg_weight = getattr(args, "beta_kl", args.beta)
    trained = spo.train(args)
    log = [json.loads(line) for line in open(f"{args.out}/log.jsonl")]
    policy, ref = load(data / "sft.pt"), load(data / "sft.pt").requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    name = dict(best_of_n="best", ranked="ranked").get(args.algo, "pairs")
    rows, ref_samples = (torch.from_numpy(np.load(data / f"{x}.npy").astype(int)) for x in (name, "ref"))
    lengths, ref_lengths = read_prompt_length(data, name), read_prompt_length(data, "ref")
    with torch.no_grad():  # of all the data
        all_ref_logp = slow_logp(ref, rows.flatten(0, 1), lengths.repeat_interleave(rows.shape[1])).view(rows.shape[:2])
    gamma = getattr(args, "gamma", 0)
    for step, record in enumerate(log):
        batch = spo.batch_indices(12, 4, 0, spo.BATCH, step)
        y, starts = rows[batch], lengths[batch].repeat_interleave(rows.shape[1])    # (B, n, T), (B * n,)
        logp, ref_logp = (slow_logp(m, y.flatten(0, 1), starts).view(y.shape[:2]) for m in (policy, ref))
        w, l, ref_w, ref_l = logp[:, 0], logp[:, 1], ref_logp[:, 0], ref_logp[:, 1]
        mu, mu_0 = (torch.stack([x[:, i:].exp().sum(1) ** gamma for i in range(rows.shape[1] - 1)], 1)
                    for x in (logp.detach(), all_ref_logp))
        mu = mu / mu_0.mean(0)                                                      # (B, n-1)
        alpha, delta = getattr(args, "alpha", 1), getattr(args, "delta", 0)
        first = torch.zeros(4, dtype=torch.long)
        pref = {"spo": spo.spo_loss(w, l, alpha, mu[:, 0]),
                "best_of_n": spo.best_of_n_loss(logp, first, alpha, mu[:, 0]),
                "ranked": spo.ranked_loss(logp, alpha, mu), "dpo": spo.dpo_loss(w, l, ref_w, ref_l, args.beta),
                "hypo": spo.dpo_loss(w, l, ref_w, ref_l, args.beta),
                "ipo": spo.ipo_loss(w, l, ref_w, ref_l, args.beta), "slic": spo.slic_loss(w, l, delta)}[args.algo]
        reg = torch.zeros(())
        if use_kl:
            if step % 2 == 0:
                drawn = torch.randint(12, (4,), generator=spo.rng(0, spo.PROMPT, step))
                given = lengths[drawn]
                uniforms = torch.rand(4, 16, generator=spo.rng(0, spo.ROLLOUT, step))
                prompts = rows[drawn, 0, :given.max()]
                rollouts = slow_generate(policy, prompts, uniforms, prompt_length=given).detach()
            reg = slow_kl(policy, ref, rollouts, given).mean()
        elif args.algo == "slic":
            batch = spo.batch_indices(12, 4, 0, spo.SLIC_BATCH, step)
            reg = -slow_logp(policy, ref_samples[batch, 0], ref_lengths[batch]).mean()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 2)
        optimizer.zero_grad()
        (pref.mean() + reg_weight * reg).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        margin = w - logp[:, 1:].amax(1)
        expected = dict(pref=pref.mean(), reg=reg, loss=pref.mean() + reg_weight * reg, margin=margin.mean(),
                        accuracy=(margin > 0).float().mean(), chosen=w.mean(), grad_norm=norm)
        for key, value in expected.items():
            assert record[key] == pytest.approx(value.item(), rel=2e-3, abs=1e-4), (step, key)
    a, b, start = (torch.cat([p.flatten() for p in m.parameters()]) for m in (trained, policy, ref))
    assert (a - b).norm() < 0.02 * (b - start).norm()
    checkpoint = load_checkpoint(f"{args.out}/ckpt.pt")
    assert checkpoint["step"] == 3 and torch.equal(checkpoint["model"]["norm.weight"], trained.norm.weight)


if __name__ == "__main__":
    sys.exit(0 if print_theorems() else 1)
