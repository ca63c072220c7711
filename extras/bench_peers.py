"""
Other programs beside ours: make bench ARGS="--peers --run_c llama2.c/run.c"

TRL's DPOTrainer, transformers' generate, llama.cpp's batched decoding and llama2.c's run.c get our weights, our shapes
and our number of threads, in float32. Each must compute what our model does, or the benchmark stops. Needs
requirements-bench.txt; a peer that is not installed is named.
"""
import contextlib
import copy
import ctypes
import importlib.util
import io
import logging
import shutil
import subprocess
import tempfile
import time

import numpy as np
import torch

import spo
from model import BOS, UserError, export, wrap


def must_match(name, theirs, ours):
    """Stops unless a peer's numbers are ours within 1e-3."""
    difference = (theirs - ours).abs().max().item()
    if not difference <= 1e-3:
        raise UserError(f"{name} does not compute what our model does: its numbers differ by {difference:.2g}, so "
                        "its speed is not comparable; install the versions of extras/requirements-bench.txt.")


def has_packages(peer, *packages):
    """Whether these are installed; prints a line if not."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(wrap(f"{peer}: not measured, without {' and '.join(missing)}; python -m pip install -r "
                   "extras/requirements-bench.txt"))
    return not missing


# ---------------------------------------------------------------------------------------------------
# Training

@torch.no_grad()
def mean_dpo_loss(args, policy, ref, data):
    """The loss of TRL's defaults, beta 0.1, on data (pairs, 2, T), by our functions."""
    losses = []
    for _, y, mask in spo.micro_batches(spo.Responses(data), torch.arange(args.pairs), args.micro_batch_size, "cpu"):
        logp, ref_logp = (spo.seq_logp(model, y, mask).view(-1, 2).T for model in (policy, ref))
        losses.append(spo.dpo_loss(*logp, *ref_logp, 0.1))
    return torch.cat(losses).mean()


def train_with_trl(args, policy, ref, data, precompute, folder):
    """
    args.reps steps of TRL's DPOTrainer after one to warm up, all pairs in each -> seconds per step, and the first
    step's loss. A step is forward and backward of its micro-batches, clipping and AdamW; the data are there already.
    """
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from extras.hf_export import to_hf
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # holds token ids already

    pairs = [dict(prompt_ids=[BOS], chosen_ids=w[1:], rejected_ids=l[1:]) for w, l in data.tolist()]
    pairs_per_pass = min(args.pairs, max(1, args.micro_batch_size // 2))
    settings = trl.DPOConfig(
        folder, precompute_ref_log_probs=precompute, per_device_train_batch_size=pairs_per_pass,
        gradient_accumulation_steps=args.pairs // pairs_per_pass, max_steps=args.reps + 1, learning_rate=1e-5,
        gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, log_level="error")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")),
                                        pad_token="<unk>", eos_token="<unk>")
    trainer = Trainer(to_hf(policy), to_hf(ref), settings, train_dataset=Dataset.from_list(pairs),
                      processing_class=tokenizer, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return times[1:], torch.tensor(trainer.state.log_history[0]["loss"])


def bench_training(args, table, policy, ref, data, folder):
    """TRL's steps -> the names of their rows."""
    loss = mean_dpo_loss(args, policy, ref, data)
    names = {"TRL DPO, reference in every step": False, "TRL DPO, reference precomputed": True}
    for name, precompute in names.items():
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars, and warnings of what TRL calls itself
            times, trl_loss = train_with_trl(args, policy, ref, data, precompute, folder)
        must_match("TRL's DPOTrainer", trl_loss, loss)
        table.add_row(name, times, 2 * args.pairs * (args.length - 1), args.length, 3)
    return list(names)


# ---------------------------------------------------------------------------------------------------
# Sampling. Each function opens a peer for n sequences -> logits, of tokens (n, T), and sample, n samples of full length

def open_transformers(args, model, n, folder):
    from transformers import GenerationConfig
    from extras.hf_export import to_hf
    hf, prompt = to_hf(model), torch.full((n, 1), BOS)
    hf.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.length - 1, pad_token_id=0)

    def logits(tokens):
        return hf(tokens).logits

    def sample():
        assert hf.generate(prompt).shape == (n, args.length)

    return logits, sample


def write_gguf(model, path):
    """llama.cpp's file: float32, no tokenizer, the output layer tied."""
    import gguf
    args, writer = model.args, gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(model.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads or args.n_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.dim // args.n_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)  # it knows llama2.c's names
    for name, weight in model.named_parameters():
        writer.add_tensor(names.get_name(name, [".weight"]), weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_llama_cpp(args, model, n, folder):
    import llama_cpp
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    path, V = f"{folder}/model.gguf", model.args.vocab_size
    write_gguf(model, path)
    llama_cpp.llama_backend_init()
    llama = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = n * args.length, n
    settings.n_threads = settings.n_threads_batch = args.threads
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32  # the cache; float16 by default
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # on a CPU it is not exact to 1e-3
    context = llama_cpp.llama_init_from_model(llama, settings)
    assert llama and context, f"llama.cpp does not open {path}"
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(1.0))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(0))
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, 1
    batch_tokens, batch_pos = (np.ctypeslib.as_array(x, (n,)) for x in (batch.token, batch.pos))

    def read(tokens, pos):
        """The next token of each sequence (n,)."""
        if pos == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch_tokens[:], batch_pos[:] = tokens, pos
        assert llama_cpp.llama_decode(context, batch) == 0

    def logits(tokens):
        result = torch.empty(*tokens.shape, V)
        for pos in range(tokens.shape[1]):
            read(tokens[:, pos], pos)
            for i in range(n):
                row = llama_cpp.llama_get_logits_ith(context, i)
                result[i, pos] = torch.from_numpy(np.ctypeslib.as_array(row, (V,)))
        return result

    def sample():
        tokens = BOS
        for pos in range(args.length - 1):
            read(tokens, pos)
            tokens = [llama_cpp.llama_sampler_sample(chain, context, i) for i in range(n)]

    return logits, sample


def open_run_c(args, model, n, folder):
    """run.c as a library, for one sequence: timed by the same clock as the others, not by its own of milliseconds."""
    V = model.args.vocab_size
    openmp = ["-fopenmp"] if args.threads > 1 else []
    flags = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-DTESTING", *openmp]
    # two steps: linking with -ffast-math would have the whole process round denormal numbers to 0
    for command in (["cc", *flags, "-c", args.run_c, "-o", f"{folder}/run.o"],
                    ["cc", "-shared", *openmp, f"{folder}/run.o", "-lm", "-o", f"{folder}/run.so"]):
        if subprocess.run(command).returncode != 0:
            raise UserError(f"{args.run_c} does not compile, as cc says above: give llama2.c's run.c with --run_c.")
    library = ctypes.CDLL(f"{folder}/run.so")
    if openmp:
        library.omp_set_num_threads(args.threads)
    library.forward.restype = ctypes.POINTER(ctypes.c_float)
    export(model, f"{folder}/model.bin")
    transformer, sampler = ctypes.create_string_buffer(4096), ctypes.create_string_buffer(4096)  # for its structs
    library.build_transformer(transformer, f"{folder}/model.bin".encode())
    library.build_sampler(sampler, V, ctypes.c_float(1), ctypes.c_float(0), ctypes.c_ulonglong(1))

    def logits(tokens):
        result = torch.empty(*tokens.shape, V)
        for pos in range(tokens.shape[1]):
            row = library.forward(transformer, int(tokens[0, pos]), pos)
            result[0, pos] = torch.from_numpy(np.ctypeslib.as_array(row, (V,)))
        return result

    def sample():
        token = BOS
        for pos in range(args.length - 1):
            token = library.sample(sampler, library.forward(transformer, token, pos))

    return logits, sample


# ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def bench_peers(args, table, policy, ref, data):
    """All peers' rows, on our weights and on data (pairs, 2, T), then the ratios of our speed to theirs."""
    policy = copy.deepcopy(policy)
    policy.output.bias = None  # no peer ends at BOS
    new, compared, samplers = args.length - 1, {}, []  # compared: our row -> the peers'
    with tempfile.TemporaryDirectory() as folder:
        if has_packages("TRL", "trl", "transformers", "datasets"):
            with torch.enable_grad():
                names = bench_training(args, table, policy, ref, data, folder)
            compared["preference step"] = ["straightforward DPO step", *names]
        if has_packages("transformers", "transformers"):
            samplers += [("transformers", open_transformers, 1), ("transformers", open_transformers, 32)]
        if has_packages("llama.cpp", "llama_cpp", "gguf"):
            samplers += [("llama.cpp", open_llama_cpp, 1), ("llama.cpp", open_llama_cpp, 32)]
        if args.run_c and shutil.which("cc"):
            samplers += [("run.c", open_run_c, 1)]
        else:
            print(f"run.c: not measured, without {'a C compiler, cc' if args.run_c else 'llama2.c: --run_c PATH'}")
        for peer, open_peer, n in samplers:
            logits, sample = open_peer(args, policy, n, folder)
            tokens = torch.randint(2, policy.args.vocab_size, (n, min(16, new)), generator=spo.rng(0))
            must_match(peer, logits(tokens), policy(tokens))
            name = f"{peer}, batch {n}, {new} tokens"
            table.row(name, sample, n * new, new // 2, 1)
            compared.setdefault(f"sampling, batch {n}, {new} tokens", []).append(name)
    print_ratios(table, compared)


def print_ratios(table, compared):
    """Under each row of ours the peers' tokens/s and ratios, which are kept as ours_over_peer."""
    ratios = table.results["ours_over_peer"] = {}
    print(f"{'':36}{'tokens/s':>9}{'ours/peer':>11}")
    for ours, peers in compared.items():
        speed = table.results[ours]["tokens_per_s"]
        print(f"{ours:36}{speed:>9,.0f}")
        for peer in peers:
            peer_speed = table.results[peer]["tokens_per_s"]
            ratios[peer] = speed / peer_speed
            print(f"  {peer:34}{peer_speed:>9,.0f}{ratios[peer]:>11.2f}")
