"""
SPO for any causal language model of transformers: TRL's DPOTrainer with Eq. 6 as its loss, so that accelerate carries
it past one GPU (DDP, FSDP2, DeepSpeed) and PEFT brings LoRA. Needs requirements-trl.txt. The flags are those of TRL:

    accelerate launch -m extras.spo_trl --model_name_or_path MODEL --dataset_name PAIRS.jsonl --output_dir out/spo
"""
import os
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset, load_dataset
from transformers import GenerationConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import flush_left, use_adapter

from model import UserError, run_main
from spo import PROMPT, ROLLOUT, kl_per_token, rng, spo_loss, sum_over_tokens

logger = get_logger(__name__)
# Settings of DPOConfig that SPO does not read, or that take away what it needs, with the defaults that they must keep
FIXED = dict(beta=0.1, loss_type=["sigmoid"], loss_weights=None, ld_alpha=None, f_divergence_type="reverse_kl",
             label_smoothing=0.0, use_weighting=False, precompute_ref_log_probs=False, sync_ref_model=False,
             use_liger_kernel=False, disable_dropout=True)


@dataclass
class SPOConfig(trl.DPOConfig):
    alpha: float = field(default=0.01, metadata={"help": "Softness of Eq. 9, on sums of log pi; 0: Eq. 10."})
    beta_kl: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference (Eq. 6)."})
    num_rollouts: int = field(default=32, metadata={"help": "Samples per rollout, R, over all processes."})
    rollout_every: int = field(default=8, metadata={"help": "Optimizer steps between rollouts, Appendix D's k."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest rollout in tokens, without its prompt."})

    def __post_init__(self):
        super().__post_init__()
        for name, default in FIXED.items():
            if getattr(self, name) != default:
                raise UserError(f"{name} is {getattr(self, name)}, but SPO works with {default} only: leave it out.")
        for name, low in dict(alpha=0, beta_kl=0, num_rollouts=1, rollout_every=1, max_new_tokens=1).items():
            if not low <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: it must be a finite number, {low} or more.")


class SPOTrainer(trl.DPOTrainer):
    """
    Used as DPOTrainer is. The reference is ref_model, else the model before training; with PEFT the model without its
    new adapter, or with the one it had. Rows with prompt_ids, chosen_ids and rejected_ids are not tokenized. Logged
    rewards are alpha log pi. Evaluations have the preference loss alone.
    """
    _name, _tag_names, _paper = "SPO", ["trl", "spo"], {"title": "Soft Preference Optimization", "id": "2405.00747"}
    _rollouts, _parts, _step = None, None, None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise UserError("SPO has no auxiliary loss for a mixture of experts: set router_aux_loss_coef to 0.")
        R, shares = self.args.num_rollouts, self.accelerator.num_processes * self.args.gradient_accumulation_steps
        if R % shares:
            raise UserError(f"num_rollouts is {R}: it must be a multiple of processes times accumulation, {shares}.")
        longest = max(map(len, self.train_dataset["prompt_ids"])) + self.args.max_new_tokens
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or longest
        if longest > limit:
            raise UserError(f"the longest prompt and max_new_tokens are {longest} tokens, but the model has {limit}.")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not isinstance(dataset, Dataset) or self._is_vision_dataset or self._tokenizer.eos_token is None:
            raise UserError("SPO needs text, not streamed, and a tokenizer with an eos_token, which ends rollouts.")
        given, limit = len(dataset), args.max_length or float("inf")
        if "prompt_ids" not in dataset.column_names:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        fitting = sum(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit
                      for row in dataset)
        if fitting < given:
            logger.warning(f"{given - fitting} of {given} pairs are cut at max_length {limit}, or left out by it.")
        return dataset

    def _compute_loss(self, model, inputs, return_outputs):
        mode, alpha = "train" if self.model.training else "eval", self.args.alpha
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**tokens, labels=labels, use_cache=False, fused_lm_head=True)
        logp_w, logp_l = outputs.log_probs.sum(1).chunk(2)                          # (B,), (B,)
        loss = spo_loss(logp_w, logp_l, alpha).mean()                               # Eq. 9
        metrics = {"logps/chosen": logp_w, "logps/rejected": logp_l,
                   "rewards/margins": alpha * (logp_w - logp_l), "rewards/accuracies": (logp_w > logp_l).float()}
        if mode == "train" and self.args.beta_kl > 0:
            kl, lengths = self._rollout_kl(model)
            loss = loss + self.args.beta_kl * kl.mean()                             # Eq. 6
            metrics |= {"kl": kl, "completions/mean_length": lengths.float()}
        for name, x in metrics.items():
            self._metrics[mode][name].append(self.accelerator.gather(x.detach().mean()).mean().item())
        return (loss, model(**tokens)) if return_outputs else loss

    def _rollout_kl(self, model):
        """Appendix D: spo.token_kl of this micro-batch's part of this process's rollouts, and their lengths (r,)."""
        args, step = self.args, self.state.global_step
        if step != self._step:  # the first micro-batch of an optimizer step
            if self._rollouts is None or step % args.rollout_every == 0:
                self._rollouts = self._sample_rollouts(model)
            self._parts = zip(*(x.chunk(args.gradient_accumulation_steps) for x in self._rollouts))
            self._step = step
        attention, tokens, mask = next(self._parts)                                 # (r, T)
        logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits  # (r, T, V)
        ref, adapter = self.ref_model, nullcontext()
        if ref is None:
            ref, adapter = model, use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None)
        with torch.no_grad(), adapter, disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            ref_logits = ref(input_ids=tokens, attention_mask=attention, use_cache=False).logits
        kl = sum_over_tokens(kl_per_token, logits.shape[-1], mask[:, 1:].bool(), logits[:, :-1], ref_logits[:, :-1])
        return kl, mask.sum(1)

    @torch.no_grad()
    def _sample_rollouts(self, model):
        """This process's share of R samples of pi_theta(. | x), x from the data -> attention, tokens, mask (r, T)."""
        args, step, rank = self.args, self.state.global_step, self.accelerator.process_index
        if step % args.rollout_every:
            logger.warning(f"Resumed at step {step} with new rollouts, not the interrupted run's.")
        rows = torch.randint(len(self.train_dataset), (args.num_rollouts,), generator=rng(args.seed, PROMPT, step))
        prompts = self.train_dataset[rows[rank::self.accelerator.num_processes].tolist()]["prompt_ids"]
        inputs = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(args.device)
        prompt_mask = inputs["attention_mask"]
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own, base.generation_config = base.generation_config, GenerationConfig()  # generate would take its top_p etc.
        ends = [self._tokenizer.eos_token_id, *torch.as_tensor(own.eos_token_id or []).view(-1).tolist()]
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []), unwrap_model_for_generation(
                model, self.accelerator, gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs) as policy:
            torch.manual_seed(rng(args.seed, ROLLOUT, step, rank).initial_seed())  # Trainer seeds all processes alike
            tokens = policy.generate(  # under FSDP all processes take as many steps: each gathers the weights
                **inputs, do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens, eos_token_id=ends,
                pad_token_id=self._tokenizer.pad_token_id, synced_gpus=self.is_fsdp_enabled or None)
        base.generation_config = own
        is_end = torch.isin(tokens[:, prompt_mask.shape[1]:], torch.tensor(ends, device=tokens.device)).long()
        mask = (is_end.cumsum(1) - is_end == 0).long()  # up to the first end, which counts
        attention, mask = torch.cat((prompt_mask, mask), 1), torch.cat((0 * prompt_mask, mask), 1)
        return flush_left(attention, tokens, mask)  # positions count from a prompt's first token


def main():
    script, args, model = trl.TrlParser((trl.ScriptArguments, SPOConfig, trl.ModelConfig)).parse_args_and_config()
    data = dict(path=script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    if os.path.isfile(script.dataset_name):
        data |= dict(path="json", data_files=script.dataset_name)
    data = load_dataset(**data)
    args.model_init_kwargs = dict(revision=model.model_revision, attn_implementation=model.attn_implementation,
                                  dtype=model.dtype) | (args.model_init_kwargs or {})
    trainer = SPOTrainer(model.model_name_or_path, args=args, train_dataset=data[script.dataset_train_split],
                         eval_dataset=None if args.eval_strategy == "no" else data[script.dataset_test_split],
                         peft_config=trl.get_peft_config(model),
                         quantization_config=trl.get_quantization_config(model))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    run_main(main)
