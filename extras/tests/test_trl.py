"""extras/spo_trl.py and extras/hf_export.py; needs extras/requirements-trl.txt."""
import itertools
import json
import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks: nothing is downloaded, and TRL reports nothing
import numpy as np
import pytest
import torch

pytest.importorskip("trl")
import peft
import torch.multiprocessing as mp
from accelerate import DistributedType, PartialState
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig

import spo
from extras import hf_export, toyworld
from extras.spo_trl import FIXED, SPOConfig, SPOTrainer, main
from extras.tests.conftest import TOKENIZER
from model import BOS, ModelArgs, Transformer, UserError, generate, load, load_tokenizer

SMALL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=640, multiple_of=4, max_seq_len=64)
PROMPTS = [[BOS], [BOS, 5, 6], [BOS, 7, 8, 9, 10], [BOS, 11]]


def small_model(seed, **changes):
    torch.manual_seed(seed)
    return Transformer(ModelArgs(**SMALL | changes))


def small_tokenizer():
    return hf_export.to_hf_tokenizer(load_tokenizer(TOKENIZER, 640), 64)


def small_data():
    """8 pairs with prompts and responses of different lengths; every other response has no end."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        w, l = (torch.randint(3, 640, (n,), generator=g).tolist() for n in (4 + i, 12 - i))
        rows.append(dict(prompt_ids=PROMPTS[i % 4], chosen_ids=w + [BOS] * (i % 2), rejected_ids=l + [BOS]))
    return Dataset.from_list(rows)


class Gradients(TrainerCallback):
    """The gradients of the first step, as the optimizer sees them."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            self.sharded = all(isinstance(grad, DTensor) for grad in grads.values())
            self.of = {name: grad.full_tensor() if self.sharded else grad.clone() for name, grad in grads.items()}


def small_trainer(out, model, ref, data=None, trainer=SPOTrainer, peft_config=None, callbacks=None, fsdp=False,
                  **settings):
    settings = dict(max_steps=1, per_device_train_batch_size=8, num_rollouts=8, max_new_tokens=16, alpha=0.1,
                    beta_kl=0.5, max_grad_norm=0.0, bf16=False, gradient_checkpointing=False, use_cpu=True, seed=1,
                    save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential") | settings
    args = SPOConfig(str(out), **settings)
    if fsdp:  # on a CPU accelerate takes DDP, whatever it is asked for
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return trainer(model, ref, args, train_dataset=data or small_data(),
                   processing_class=small_tokenizer(), peft_config=peft_config, callbacks=callbacks)


# ---------------------------------------------------------------------------------------------------
# Loss and gradient, against spo.py on the same model, tokens and rollouts

def run_step(out, lora, steps, checkpointing, alpha=0.1, fsdp=False):
    """One optimizer step of the trainer -> its loss, gradients and rollouts."""
    gradients = Gradients()
    policy, ref = hf_export.to_hf(small_model(1)), hf_export.to_hf(small_model(2))
    config = None
    if lora:  # random instead of zero, so that the policy is not the reference
        torch.manual_seed(3)
        ref, config = None, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = small_trainer(out, policy, ref, peft_config=config, callbacks=[gradients], alpha=alpha,
                            gradient_accumulation_steps=steps, per_device_train_batch_size=8 // steps // world,
                            gradient_checkpointing=checkpointing, fsdp=fsdp)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    return dict(loss=loss, gradients=gradients.of, sharded=gradients.sharded, rollouts=trainer._rollouts,
                weights=weights)


CASES = list(itertools.product((False, True), (1, 2), (False, True)))  # LoRA, accumulation, checkpointing


def run_rank(rank, out, fsdp):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(29517 + fsdp), ACCELERATE_USE_CPU="1")
    torch.set_num_threads(1)
    if fsdp:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true",
                          FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    torch.save([run_step(out, *case, fsdp=fsdp) for case in CASES], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def two_processes(request, tmp_path_factory):
    out = str(tmp_path_factory.mktemp(request.param))
    mp.spawn(run_rank, (out, request.param == "FSDP2"), nprocs=2)
    results = [torch.load(f"{out}/{rank}.pt", weights_only=False) for rank in range(2)]
    assert all(result["sharded"] == (request.param == "FSDP2") for rank in results for result in rank)
    return results


def expected(result, rollouts, lora, alpha=0.1):
    """Loss and gradients by spo.py, with LoRA merged into the weights and its gradients by the chain rule."""
    policy, ref = small_model(1), small_model(2)
    names, loras = hf_export.hf_names(2), {}
    if lora:
        ref = small_model(1)
        for ours, theirs in names.items():
            key = f"base_model.model.{theirs.removesuffix('.weight')}.lora_%s.default.weight"
            if key % "A" in result["weights"]:
                A, B = (result["weights"][key % x] for x in "AB")
                loras[ours] = key, A, B
                change = 4 * B @ A  # lora_alpha / r
                w = policy.get_parameter(ours)
                w.data += hf_export.join_pairs(change, 8) if "wq" in ours else change
        assert len(loras) == 4
    data = small_data()
    logp = []
    for name in ("chosen_ids", "rejected_ids"):
        rows = [(row["prompt_ids"], row[name]) for row in data]
        logp.append(torch.cat([spo.seq_logp(policy, torch.tensor([x + y]), torch.tensor([[0] * len(x) + [1] * len(y)]))
                               for x, y in rows]))
    loss = spo.spo_loss(*logp, alpha).mean()
    kl = [spo.token_kl(policy(y[None, :-1]), ref(y[None, :-1]), mask[None, 1:]) for y, mask in rollouts]
    loss = loss + 0.5 * torch.cat(kl).mean()
    loss.backward()
    gradients = {}
    for ours, theirs in names.items():
        grad = policy.get_parameter(ours).grad
        if ours.endswith(("wq.weight", "wk.weight")):
            grad = hf_export.split_pairs(grad, 8)
        if not lora and ours != "output.weight":
            gradients[theirs] = grad
        if ours in loras:
            key, A, B = loras[ours]
            gradients |= {key % "A": 4 * B.T @ grad, key % "B": 4 * grad @ A.T}
    return loss.item(), gradients


def rollout_rows(*results):
    """Each rollout without its padding: (tokens, mask); what is checked: a prompt of the data, and its mask."""
    rows = []
    for result in results:
        for attention, tokens, mask in zip(*result["rollouts"]):
            tokens, mask, P = tokens[attention == 1], mask[attention == 1], int(mask.argmax())
            assert tokens[:P].tolist() in PROMPTS and attention.tolist() == sorted(attention.tolist(), reverse=True)
            assert torch.equal(mask, spo.response_mask(tokens[None], P)[0]) and mask.sum() <= 16
            rows.append((tokens, mask))
    assert len(rows) == 8 and len({tuple(y.tolist()) for y, _ in rows}) == 8
    return rows


def check(results, lora, alpha=0.1):
    loss, gradients = expected(results[0], rollout_rows(*results), lora, alpha)
    assert gradients.keys() == results[0]["gradients"].keys()
    size = max(g.abs().max() for g in gradients.values())
    for result in results:
        assert sum(r["loss"] for r in results) / len(results) == pytest.approx(loss, rel=1e-5)
        for name, g in gradients.items():
            torch.testing.assert_close(result["gradients"][name], g, rtol=0, atol=2e-6 * size.item(), msg=name)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case, tmp_path):
    result = run_step(tmp_path, *case)
    check([result], case[0])
    if case == CASES[0]:
        again = run_step(tmp_path, *case, alpha=0.0)  # Eq. 10
        check([again], False, alpha=0.0)
        with pytest.raises(AssertionError):
            check([again], False, alpha=0.1)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes(case, two_processes):
    check([rank[case] for rank in two_processes], CASES[case][0])


# ---------------------------------------------------------------------------------------------------
# Rollouts

def rollouts_of_first_step(out, own_config=None, **settings):
    policy = hf_export.to_hf(small_model(1))
    policy.generation_config = own_config or policy.generation_config
    trainer = small_trainer(out, policy, hf_export.to_hf(small_model(2)), **settings)
    trainer.train()
    assert own_config is None or policy.generation_config is own_config
    return trainer._rollouts


def test_rollouts_are_not_the_generation_configs(tmp_path):
    plain = rollouts_of_first_step(tmp_path)
    own = GenerationConfig(do_sample=True, temperature=0.01, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=2.0,
                           suppress_tokens=[3, 4], no_repeat_ngram_size=2, min_new_tokens=16, eos_token_id=BOS)
    assert all(map(torch.equal, plain, rollouts_of_first_step(tmp_path, own)))
    assert not torch.equal(plain[1], rollouts_of_first_step(tmp_path, seed=2)[1])
    own.eos_token_id = list(range(3, 320))  # its ends are ends
    attention, tokens, mask = rollouts_of_first_step(tmp_path, own)
    last = torch.stack([y[m == 1][-1] for y, m in zip(tokens, mask)])
    assert mask.sum(1).float().mean() < 8 and (last[mask.sum(1) < 16] < 320).all()
    assert not ((tokens < 320) & (tokens > 2) & (mask == 1))[:, :-1][mask[:, 1:] == 1].any()


def test_rollouts_are_made_every_k_steps_and_anew_when_resumed(tmp_path, caplog):
    steps = []

    class Trainer(SPOTrainer):
        def _sample_rollouts(self, model):
            steps.append(self.state.global_step)
            return super()._sample_rollouts(model)

    def make(max_steps):
        model, ref = (hf_export.to_hf(small_model(seed)) for seed in (1, 2))
        return small_trainer(tmp_path, model, ref, trainer=Trainer, max_steps=max_steps, rollout_every=2, save_steps=3,
                             save_strategy="steps", per_device_train_batch_size=4, gradient_accumulation_steps=2,
                             logging_steps=1)
    make(3).train()
    assert steps == [0, 2] and "Resumed" not in caplog.text
    trainer = make(5)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert steps == [0, 2, 3, 4] and "Resumed at step 3 with new rollouts" in caplog.text
    names = {"kl", "completions/mean_length", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    last = trainer.state.log_history[-2]
    assert names <= last.keys()
    pairs = trainer.evaluate(small_data())  # hardly another model: the preference loss alone
    margin = pairs["eval_logps/chosen"] - pairs["eval_logps/rejected"]
    assert "eval_kl" not in pairs and pairs["eval_rewards/margins"] == pytest.approx(0.1 * margin, abs=1e-4)
    assert pairs["eval_loss"] == pytest.approx(last["loss"] - 0.5 * last["kl"], abs=1e-3) and last["kl"] > 0.1


# ---------------------------------------------------------------------------------------------------
# What is refused, and what is said

@pytest.mark.parametrize("settings, words", [
    *((dict([item]), f"{item[0]} is") for item in dict(
        beta=0.2, loss_type=["ipo"], loss_weights=[2.0], ld_alpha=0.5, f_divergence_type="forward_kl",
        label_smoothing=0.1, use_weighting=True, precompute_ref_log_probs=True, sync_ref_model=True,
        use_liger_kernel=True, disable_dropout=False, alpha=-1.0, beta_kl=float("inf"), num_rollouts=0,
        rollout_every=0, max_new_tokens=0
    ).items()),
    (dict(num_rollouts=6, gradient_accumulation_steps=4), "multiple of processes times accumulation, 4"),
    (dict(max_new_tokens=60), "are 65 tokens, but the model has 64"),
])
def test_settings_that_are_refused(settings, words, tmp_path):
    assert {name: getattr(DPOConfig(str(tmp_path), bf16=False), name) for name in FIXED} == FIXED
    with pytest.raises(UserError, match=words):
        small_trainer(tmp_path, hf_export.to_hf(small_model(1)), hf_export.to_hf(small_model(2)), **settings)


def test_data_that_is_refused_or_cut(tmp_path, caplog):
    model, ref = hf_export.to_hf(small_model(1)), hf_export.to_hf(small_model(2))
    with pytest.raises(UserError, match="not streamed"):
        small_trainer(tmp_path, model, ref, data=small_data().to_iterable_dataset())
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in small_data()]
    small_trainer(tmp_path, model, ref, max_length=max(lengths))
    assert "are cut" not in caplog.text
    small_trainer(tmp_path, model, ref, max_length=max(lengths) - 1)
    assert f"{lengths.count(max(lengths))} of 8 pairs are cut at max_length" in caplog.text


# ---------------------------------------------------------------------------------------------------
# extras/hf_export.py

@pytest.mark.parametrize("changes, tied", [(dict(), True), (dict(n_kv_heads=None, dim=48, max_seq_len=32), True),
                                           (dict(n_heads=8, n_kv_heads=1, n_layers=3, norm_eps=1e-6), False)])
def test_an_exported_model_is_the_same(changes, tied, tmp_path, monkeypatch):
    model, folder = small_model(5, **changes).eval(), f"{tmp_path}/hf"
    if not tied:
        model.output.weight = torch.nn.Parameter(torch.randn(640, 32) / 6)
    hf_export.to_hf(model).save_pretrained(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(2, 640, (3, 32), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert (hf(tokens).logits - logits).abs().max() < 1e-5 and hf.config.tie_word_embeddings == tied
    greedy = generate(model, tokens[:, :4], 20, temperature=0)
    theirs = hf.generate(tokens[:, :4], max_new_tokens=20, do_sample=False, pad_token_id=BOS)
    assert torch.equal(theirs, greedy[:, :theirs.shape[1]])
    if tied:
        back = hf_export.from_hf(folder)
        weights = model.state_dict()
        assert all(torch.equal(w, weights[name]) for name, w in back.state_dict().items())
        assert torch.equal(back(tokens), logits)
    else:
        with pytest.raises(UserError, match="an output layer of its own"):
            hf_export.from_hf(folder)
    monkeypatch.setattr(hf_export, "split_pairs", lambda w, head_dim: w)  # RoPE's two layouts are not the same
    assert (hf_export.to_hf(model)(tokens).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [
    dict(hidden_act="gelu"), dict(attention_bias=True), dict(mlp_bias=True), dict(head_dim=16), dict(bos_token_id=3),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), dict(model_type="mistral"),
    dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    dict(max_position_embeddings=1 << 22),
])
def test_a_llama_that_ours_cannot_express_is_refused(changes, tmp_path):
    hf_export.to_hf(small_model(5)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"{tmp_path} h"):
        hf_export.from_hf(str(tmp_path))


def test_the_tokenizer_is_the_same(tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    hf, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(TOKENIZER, 640)
    g = random.Random(0)
    texts = ["", "  a  b ", "a\nb", "a\n b", "Once \u65e5\u672c x", *(toyworld.write_story(g) for _ in range(50))]
    texts += ["".join(g.choice("abcd  .'\n\u00e9") for _ in range(30)) for _ in range(100)]
    for text in texts:
        assert hf(text)["input_ids"] == [BOS] + ours.encode(text)
    assert hf.decode(ours.encode(texts[5])) == texts[5]
    assert hf("Tom.<s>")["input_ids"][-1] == hf.eos_token_id == BOS and hf.pad_token_id == 0


# ---------------------------------------------------------------------------------------------------
# The programs

def test_from_a_checkpoint_to_an_aligned_one(world, tmp_path, monkeypatch):
    folder, out = f"{tmp_path}/hf", f"{tmp_path}/out"
    export = [f"{world}/sft.pt", folder, "--tokenizer", TOKENIZER, "--pairs", f"{world}/pairs.npy"]
    hf_export.main(export)
    with pytest.raises(UserError, match="exists: name another"):
        hf_export.main(export)
    rows = [json.loads(line) for line in open(f"{folder}/pairs.jsonl")]
    tokens = np.load(f"{world}/pairs.npy")
    assert len(rows) == len(tokens)
    for row, pair in zip(rows, tokens.tolist()):
        for name, y in zip(("chosen", "rejected"), pair):
            ids = row["prompt_ids"] + row[f"{name}_ids"]
            assert ids == y[:len(ids)] and set(y[len(ids):]) <= {BOS}

    # texts with prompts, as a user has them: tokenized by the exported tokenizer
    g, ours = random.Random(1), load_tokenizer(TOKENIZER, 640)
    with open(f"{tmp_path}/texts.jsonl", "w") as f:
        for _ in range(16):
            (x, _, w), (_, _, l) = (toyworld.write_story(g).partition(". ") for _ in range(2))
            f.write(json.dumps(dict(prompt=f"{x}.", chosen=f" {w}", rejected=f" {l}")) + "\n")
    row = json.loads(open(f"{tmp_path}/texts.jsonl").readline())
    trained, train = [], SPOTrainer.train

    def keep_and_train(self, **kwargs):
        trained.append(self)
        return train(self, **kwargs)

    monkeypatch.setattr(SPOTrainer, "train", keep_and_train)
    flags = ("--max_steps 2 --per_device_train_batch_size 4 --num_rollouts 4 --rollout_every 1 --max_new_tokens 20 "
             "--learning_rate 1e-3 --use_cpu --bf16 True --save_strategy no --disable_tqdm True").split()
    for data, lora in ((f"{folder}/pairs.jsonl", []), (f"{tmp_path}/texts.jsonl", ["--use_peft", "--lora_r", "2"])):
        monkeypatch.setattr(sys, "argv", ["spo_trl", "--model_name_or_path", folder, "--dataset_name", data,
                                          "--output_dir", out + "-lora" * bool(lora), *flags, *lora])
        main()
    first = trained[1].train_dataset[0]
    assert first["prompt_ids"] + first["chosen_ids"] == [BOS] + ours.encode(row["prompt"] + row["chosen"]) + [BOS]
    assert first["prompt_ids"] == [BOS] + ours.encode(row["prompt"])
    assert trained[0].state.log_history[0]["kl"] > 0 and os.path.exists(f"{out}-lora/adapter_model.safetensors")

    hf_export.main([out, f"{tmp_path}/aligned.pt"])
    before, after = load(f"{world}/sft.pt"), load(f"{tmp_path}/aligned.pt")
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(0 < (w - after.get_parameter(name)).abs().max() < 0.01 for name, w in before.named_parameters())
