"""
Section 2's reward model: the Llama with one output, read at the end of a response, fitted to pairs by maximum
likelihood under Bradley-Terry (Eq. 2). prepare_data.py saves it as reward.pt, which the judge "reward" reads.
"""
import copy
import math

import numpy as np
import torch
import torch.nn as nn

from extras.token_files import PAIR_FILES
from model import UserError, build_model, load, load_checkpoint, save, upcast, wrap
from spo import BATCH, Responses, batch_indices, micro_batches, model_defaults, spo_loss


def make_reward_head(model):
    """Replaces the output layer of model by one with a single output, 0 at first -> model."""
    model.output = nn.Linear(model.args.dim, 1, bias=False, device=model.output.weight.device)
    nn.init.zeros_(model.output.weight)
    return model


def reward_at_end(model, tokens, mask):
    """r(y) of each response -> (N,): the output at its last token, for tokens and mask (N, T) as in spo.seq_logp."""
    max_seq_len = model.args.max_seq_len  # a response that was cut there has one token more
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1).clamp(max=max_seq_len - 1)                  # (N,)
    output = upcast(model(tokens[:, :max_seq_len]))                                 # (N, T, 1)
    return output.squeeze(2).gather(1, last[:, None]).squeeze(1)


def load_reward_model(path, device="cpu"):
    """The model that fit_reward_model returned and spo.save wrote. Raises UserError where path is another model."""
    checkpoint = load_checkpoint(path, device)
    head = checkpoint["model"].pop("output.weight", None)
    model = make_reward_head(build_model(checkpoint, path))
    if head is None or head.shape != model.output.weight.shape:
        raise UserError(f"{path} is not a reward model: create one with --reward_steps of prepare_data.py.")
    model.load_state_dict({"output.weight": head}, strict=False)
    return model.to(device)


@torch.no_grad()
def dataset_rewards(model, data, micro_batch_size, device):
    """r(y) of the responses in data (N, n, T) -> (N, n)."""
    rewards = torch.zeros(data.shape[:2])
    for rows, y, mask in micro_batches(Responses(data), torch.arange(len(data)), micro_batch_size, device):
        r = reward_at_end(model, y, mask)                                           # (b * n,)
        rewards[rows] = r.view(len(rows), -1).cpu()
    return rewards


LR = 1e-3        # for models of 64 dimensions, on which it was measured; others have it times 64 / dim
EVAL_EVERY = 50  # steps between evaluations
PATIENCE = 4     # evaluations in a row without a lower loss that end the fit


def fit_reward_model(init, pairs, selection_pairs, steps, micro_batch_size, seed=0, device="cpu"):
    """
    Fits a reward model, starting from the checkpoint init, to pairs (N, 2, T), the better response first, for at most
    steps. The learning rate is constant after a warm-up of steps // 10. Returns the model of the lowest loss on
    selection_pairs (M, 2, T), that before the first step among them; so on these pairs it looks better than it is.
    """
    model = make_reward_head(load(init, device))
    lr = LR * 64 / model.args.dim
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    batch_size = min(32, len(pairs))
    warmup = max(1, steps // 10)
    best_loss, best_step, best_weights = math.log(2), 0, copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup)
        optimizer.zero_grad()
        total = 0.0
        batch = batch_indices(len(pairs), batch_size, seed, BATCH, step - 1)
        for _, y, mask in micro_batches(Responses(pairs), batch, micro_batch_size, device):
            r = reward_at_end(model, y, mask)                                       # (b * 2,)
            r_w, r_l = r.view(-1, 2).unbind(1)
            loss = spo_loss(r_w, r_l, 1.0).sum() / batch_size                       # -log sigmoid(r_w - r_l)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVAL_EVERY == 0 or step == steps:
            r_w, r_l = dataset_rewards(model, selection_pairs, micro_batch_size, device).unbind(1)
            loss = spo_loss(r_w, r_l, 1.0).mean().item()
            print(f"step {step} of {steps}, loss {total:.3f}, held out {loss:.3f}", flush=True)
            if loss < best_loss:
                best_loss, best_step, best_weights = loss, step, copy.deepcopy(model.state_dict())
            elif step - best_step >= PATIENCE * EVAL_EVERY:
                break
    model.load_state_dict(best_weights)
    print(f"step {best_step} is kept, of the lowest held-out loss")
    return model


def mean_and_error(x):
    """The mean of x (N,) and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


def heldout_accuracy(model, pairs, micro_batch_size, device="cpu"):
    """
    The share of pairs (N, 2, T), none of which the fit has seen, whose better response has the higher reward (an equal
    one counts half). Prints it and the mean lead in reward.
    """
    r_w, r_l = dataset_rewards(model, pairs, micro_batch_size, device).unbind(1)
    accuracy, accuracy_error = mean_and_error(((r_w - r_l).sign() + 1) / 2)
    margin, margin_error = mean_and_error(r_w - r_l)
    print(f"on {len(pairs)} other held-out pairs:\n  accuracy {accuracy:.3f}, standard error {accuracy_error:.3f}\n"
          f"  margin {margin:.3f}, standard error {margin_error:.3f}", flush=True)
    return accuracy


def save_reward_model(folder, device="cpu"):
    """
    Fits a reward model to the DataFolder's pairs.npy; saves it as reward.pt if it is better than chance. One half of
    the held-out pairs says which step to keep, the other, whose accuracy is therefore unbiased, how good it is.
    """
    settings = folder.settings
    pairs, heldout_pairs = (np.load(f"{folder.path}/{name}") for name in PAIR_FILES)
    selection, test = heldout_pairs[::2], heldout_pairs[1::2]
    reason = f"only {len(heldout_pairs)} held-out pairs, and a test takes 10"
    if len(test) >= 5:
        micro_batch_size = model_defaults(settings["model"])["micro_batch_size"]
        model = fit_reward_model(f"{folder.path}/sft.pt", pairs, selection, settings["reward_steps"], micro_batch_size,
                                 settings["seed"], device)
        accuracy = heldout_accuracy(model, test, micro_batch_size, device)
        lowest = 0.5 + len(test) ** -0.5  # above chance by two standard errors of a fair coin
        if accuracy > lowest:
            with folder.new_file("reward.pt") as path:
                return save(model, path)
        reason = f"accuracy {accuracy:.3f} on {len(test)} held-out pairs is not above {lowest:.3f}"
    settings["no_reward_model"] = reason  # so that it is not fitted again, and the judge can say why there is none
    print(wrap(f"no reward model: {reason}"))
