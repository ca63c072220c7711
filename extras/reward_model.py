"""
Section 2's reward model: the Llama with one output, read at the end of a response, fitted to pairs by maximum
likelihood under Bradley-Terry (Eq. 2). prepare_data.py saves it as reward.pt, which the judge "reward" reads.
"""
import torch
import torch.nn as nn

from model import UserError, build_model, load, load_checkpoint, upcast
from spo import BATCH, Responses, batch_indices, micro_batches, spo_loss


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


def fit_reward_model(init, pairs, heldout_pairs, steps, lr, micro_batch_size, seed=0, device="cpu"):
    """
    Fits a reward model, starting from the checkpoint init, to pairs (N, 2, T), the better response first -> the model.
    The learning rate is constant after a warm-up of steps // 10. Prints the accuracy on heldout_pairs (M, 2, T).
    """
    model = make_reward_head(load(init, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    batch_size = min(32, len(pairs))
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.zero_grad()
        total = 0.0
        batch = batch_indices(len(pairs), batch_size, seed, BATCH, step)
        for _, y, mask in micro_batches(Responses(pairs), batch, micro_batch_size, device):
            r = reward_at_end(model, y, mask)                           # (b * 2,)
            r_w, r_l = r.view(-1, 2).unbind(1)
            loss = spo_loss(r_w, r_l, 1.0).sum() / batch_size                       # -log sigmoid(r_w - r_l)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}, loss {total:.3f}", flush=True)
    r_w, r_l = dataset_rewards(model, heldout_pairs, micro_batch_size, device).unbind(1)
    accuracy = (r_w > r_l).float().mean().item()
    print(f"accuracy on {len(r_w)} held-out pairs: {accuracy:.3f}", flush=True)
    return model
