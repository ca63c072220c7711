"""What generate returns, llama2.c's file formats against another reader of them, and files damaged in any way."""
import math
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spo
from extras.tests.conftest import ROOT, TOKENIZER
from model import (BOS, ModelArgs, UserError, atomic_write, export, generate, limit_threads, load, load_checkpoint,
                   load_tokenizer, sample_token, save, wrap)
from test_spo import slow_generate, tiny

TOKENS = torch.randint(0, 30, (3, 20), generator=spo.rng(0))
MODEL_ARGS = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=30, multiple_of=4, max_seq_len=64)


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_generate_asserted_whole(temperature):
    sizes = []

    def count(tokens, cache):  # a model that is sure of the token after the previous one, and of BOS after 7
        sizes.append(len(tokens))
        return 100 * torch.eye(9)[torch.where(tokens == 7, BOS, tokens + 1)]

    y = generate(count, torch.tensor([[3, 4], [3, 6], [3, 2]]), 5, temperature)
    assert y.tolist() == [[3, 4, 5, 6, 7, 1, 1], [3, 6, 7, 1, 1, 1, 1], [3, 2, 3, 4, 5, 6, 7]]
    assert sizes == [3, 3, 2, 2, 1]  # finished rows leave


def test_rows_are_independent_and_can_be_trained_on():
    policy = tiny(6, 3, scale=4).double()  # samples end early
    prompt = torch.tensor([[BOS, 4]] + 20 * [[BOS, 2], [BOS, 3]])
    for layer in policy.layers:
        layer.attention.wo.weight.data.mul_(10)  # what was read before matters, or another row's cache would do
    y = generate(policy, prompt, 20, generator=spo.rng(0))
    assert torch.equal(y, slow_generate(policy, prompt, torch.rand(41, 21, generator=spo.rng(0))))
    assert len(y[1::2].unique(dim=0)) > 10 and 0 < (y[:, -1] == BOS).sum() < 41  # the same prompt, other draws
    spo.seq_logp(policy, y, spo.response_mask(y)).sum().backward()


def test_what_generate_refuses():
    for temperature, bad in ((1.0, math.nan), (0, math.nan), (1.0, math.inf)):
        with pytest.raises(UserError, match="the model has diverged.*lower learning rate"):  # if only in one row
            generate(lambda tokens, cache: torch.tensor([[[0, 1.0]], [[0, bad]]]), TOKENS[:2], 9, temperature)
    for prompt, settings, words in (("Once", {}, "ids"), (TOKENS[0], {}, "ids"), (TOKENS / 2, {}, "ids"),
                                    (TOKENS, {"top_k": 0}, "top_k is 0"), (TOKENS, {"temperature": -1}, "is -1")):
        with pytest.raises(AssertionError, match=words):
            generate(tiny(30), prompt, 5, **settings)


def test_the_smallest_and_the_largest_uniform_number_have_tokens():
    logits, largest = 3 * torch.randn(2000, 300, generator=spo.rng(0)), torch.full((2000, 1), 1 - 2.0 ** -24)
    total = logits.softmax(-1).cumsum(-1)[:, -1:]
    assert (total < largest).any() and (total > 1).any()  # in float32 only near 1
    last = sample_token(logits, largest, 1.0, None)[:, None]
    assert last.max() < 300 and logits.double().softmax(-1).cumsum(-1).gather(1, last).min() > 1 - 1e-5
    likely = logits.topk(5).indices
    assert torch.equal(sample_token(logits, largest, 1.0, 5), likely.amax(1))
    assert torch.equal(sample_token(logits, 0 * largest, 1.0, 5), likely.amin(1))


def test_a_checkpoint_of_llama2c_loads_and_saves(tmp_path):
    policy, args = tiny(30, n_kv_heads=2, norm_eps=0.01), MODEL_ARGS | dict(norm_eps=0.01, dropout=0.1)
    weights = {f"_orig_mod.{name}": w for name, w in policy.state_dict().items()}
    torch.save({"model": weights, "model_args": args, "config": {"device": "cuda"}, "iter_num": 7}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert torch.equal(loaded(TOKENS), policy(TOKENS)) and loaded.output.weight is loaded.tok_embeddings.weight
    assert {m.eps for m in loaded.modules() if isinstance(m, torch.nn.RMSNorm)} == {0.01}
    save(loaded, tmp_path / "b.pt", step=3)
    saved = load_checkpoint(tmp_path / "b.pt")
    assert saved["step"] == 3 and saved["model_args"] == args | {"hidden_dim": None} and loaded.hidden_dim == 44
    names = "output layers.1.attention_norm layers.1.ffn_norm layers.1.attention.wk layers.1.feed_forward.w3"
    assert saved["model"].keys() >= {f"{name}.weight" for name in names.split()}
    save(tiny(30).half(), tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt")["model_args"]["n_kv_heads"] == 4  # a number: llama2.c divides by it
    half, rounded = load(tmp_path / "c.pt").state_dict(), tiny(30).half().float().state_dict()
    assert all(w.dtype == torch.float32 and torch.equal(w, rounded[name]) for name, w in half.items())


def numpy_logits(path, tokens, half_split=False):
    """Logits (T, V) as run.c computes them from a .bin, in float64; RoPE is its formula, not what the file holds."""
    dim, hidden, L, n_heads, n_kv_heads, vocab_size, max_seq_len = np.fromfile(path, "<i4", 7).tolist()
    head_dim, T, data = dim // n_heads, len(tokens), np.fromfile(path, "<f4", offset=28).astype(float)
    kv_dim, rope = n_kv_heads * head_dim, (max_seq_len, head_dim // 2)
    shapes = [(vocab_size, dim), (L, dim), (L, dim, dim), (L, kv_dim, dim), (L, kv_dim, dim), (L, dim, dim), (L, dim),
              (L, hidden, dim), (L, dim, hidden), (L, hidden, dim), (dim,), rope, rope]
    arrays = np.split(data, np.cumsum([math.prod(shape) for shape in shapes[:-1]]))
    embedding, norm_1, wq, wk, wv, wo, norm_2, w1, w2, w3, norm, cos, sin = map(np.reshape, arrays, shapes)
    angles = np.outer(np.arange(max_seq_len), 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim))
    assert np.allclose(cos, np.cos(angles), atol=1e-4) and np.allclose(sin, np.sin(angles), atol=1e-4)
    pairs = np.arange(head_dim).reshape(2, -1).T if half_split else np.arange(head_dim).reshape(-1, 2)

    def rms_norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    x, future, group = embedding[tokens], np.triu(np.full((T, T), -np.inf), 1), n_heads // n_kv_heads
    for i in range(L):
        q, k, v = ((rms_norm(x, norm_1[i]) @ w[i].T).reshape(T, -1, head_dim) for w in (wq, wk, wv))
        q, k = (y[..., pairs] @ [1, 1j] * np.exp(1j * angles[:T, None]) for y in (q, k))  # (T, H, head_dim / 2)
        scores = np.einsum("thd,shd->hts", q, k.conj().repeat(group, 1)).real / math.sqrt(head_dim)
        p = np.exp(scores + future) / np.exp(scores + future).sum(-1, keepdims=True)
        y = np.einsum("hts,shd->thd", p, v.repeat(group, 1))
        x = x + y.reshape(T, dim) @ wo[i].T
        h = rms_norm(x, norm_2[i])
        gate = h @ w1[i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[i].T)) @ w2[i].T
    return rms_norm(x, norm) @ embedding.T


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_a_bin_is_what_run_c_reads_and_comes_back_bit_for_bit(tmp_path, n_kv_heads):
    path, policy = tmp_path / "m.bin", tiny(30, n_kv_heads=n_kv_heads)
    for norm in (policy.norm, policy.layers[0].attention_norm, policy.layers[1].ffn_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    export(policy, path)
    assert path.read_bytes()[:28] == struct.pack("<7i", 16, 44, 2, 4, n_kv_heads or 4, 30, 64)
    back, logits = load(path), policy(TOKENS)
    assert torch.equal(back(TOKENS), logits) and back.output.weight is back.tok_embeddings.weight
    assert all(torch.equal(w, policy.state_dict()[name]) for name, w in back.state_dict().items())
    half, double = back.to(torch.bfloat16)(TOKENS)[0], policy.double()(TOKENS)[0].detach()
    assert half.dtype == torch.bfloat16 and torch.cosine_similarity(half.double(), double, -1).min() > 0.999
    assert torch.allclose(double, logits[0].double(), atol=1e-4)
    assert np.allclose(numpy_logits(path, TOKENS[0]), double, atol=1e-5)
    assert not np.allclose(numpy_logits(path, TOKENS[0], half_split=True), double, atol=0.1)
    with pytest.raises(UserError, match="norm_eps"):  # which a .bin has no place for
        export(tiny(30, norm_eps=0.01), path)


PUBLISHED = list(Path(ROOT).parent.glob("*/real/stories260K.bin"))


@pytest.mark.skipif(not PUBLISHED, reason="no published stories260K.bin in a folder real/ beside the repository")
def test_the_published_model_samples_what_numpy_reads_and_exports_the_same_file(tmp_path):
    export(load(PUBLISHED[0]), tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == PUBLISHED[0].read_bytes()  # RoPE's table too, to the last bit
    y = generate(load(PUBLISHED[0]), torch.tensor([[BOS]]), 20, temperature=0)[0]
    assert y[1:].tolist() == numpy_logits(PUBLISHED[0], y[:-1]).argmax(-1).tolist() and len(y.unique()) > 10


READERS = {"sft.pt": load, "m.bin": load, "tokenizer.model": partial(load_tokenizer, vocab_size=640),
           "pairs.npy": partial(spo.load_responses, model_args=ModelArgs(**MODEL_ARGS), min_rows=8, num_responses=2)}


def refusal(name, content):
    """Reads a file of this content -> the sentence that refuses it, or ""."""
    Path(name).write_bytes(content)
    try:
        READERS[name](name)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 300, error
        return str(error)
    return ""


def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path, monkeypatch):
    class Trap:  # unpickled, it creates a folder
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    monkeypatch.chdir(tmp_path)
    y, rng, args, texts = np.full((300, 2, 65), BOS, np.uint16), np.random.default_rng(0), MODEL_ARGS, []
    np.save("pairs.npy", y)
    save(tiny(30, n_kv_heads=2), "sft.pt")
    export(tiny(30, n_kv_heads=2), "m.bin")
    Path("tokenizer.model").write_bytes(Path(TOKENIZER).read_bytes())
    good, weights = {name: Path(name).read_bytes() for name in READERS}, load_checkpoint("sft.pt")["model"]
    for name, whole in good.items():
        for damaged in (b"", whole[:100], whole[:-100], whole[1:], whole[::-1], bytes(4096), pickle.dumps(Trap())):
            texts.append(refusal(name, damaged))
        fuzz = set()
        for i in range(60):
            at, (old, new) = rng.integers(min(len(whole), 10 ** rng.integers(2, 7))), rng.integers(20, size=2)
            other = rng.bytes(new) if i % 2 else bytes(new)
            fuzz.add(refusal(name, whole[:at] + other + whole[at + rng.choice((old, new)):]) == "")
        assert fuzz == {True, False}, name
    Path("sft.pt").write_bytes(good["sft.pt"])
    with zipfile.ZipFile("sft.pt") as stored, zipfile.ZipFile("z", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    texts.append(refusal("sft.pt", Path("z").read_bytes()))
    os.remove("z")
    checkpoints = [Trap(), [weights], {"model": weights}, {"model": 7, "model_args": args}]
    for change in (dict(n_kv_heads=3), dict(n_heads=6, n_kv_heads=6)):  # of 4 heads; 6 heads of 2 are not 16
        checkpoints.append({"model": tiny(30, n_kv_heads=3).state_dict(), "model_args": args | change})
    for change in (dict(n_layers=10 ** 9), dict(vocab_size=10 ** 12), dict(max_seq_len=10 ** 12), dict(max_seq_len=0),
                   dict(n_heads=0), dict(n_heads=16, n_kv_heads=8), dict(norm_eps="x"), dict(rope_theta=5e5)):
        checkpoints.append({"model": weights, "model_args": args | change})
    for change in ({"norm.weight": torch.ones(15)}, {"norm.weight": torch.ones(16) / 0}, {"norm.weight": None},
                   {"output.weight": torch.ones(30, 16)}, {name: w * math.nan for name, w in weights.items()}):
        checkpoints.append({"model": weights | change, "model_args": args})
    repeated = {"tok_embeddings.weight": torch.zeros(1).expand(10 ** 6, 16), "output.weight": torch.zeros(1)}
    checkpoints.append({"model": weights | repeated, "model_args": args | {"vocab_size": 10 ** 6}})
    for checkpoint in checkpoints:
        torch.save(checkpoint, "sft.pt")
        texts.append(refusal("sft.pt", Path("sft.pt").read_bytes()))
    for rows in (y.astype(int), y[:, 0], y.cumsum(2, dtype=y.dtype), y - 1, y[:7], y[:, :1], y[..., :1],
                 y.repeat(2, 2)):
        np.save("pairs.npy", rows)
        texts.append(refusal("pairs.npy", Path("pairs.npy").read_bytes()))
    texts.append(refusal("pairs.npy", good["pairs.npy"][:8] + b"\xff\xff" + good["pairs.npy"][10:]))  # a long header
    for sizes in ([16, 44, 2, 4, 2, -30, 64], [10 ** 9] * 7, [16, 44, 2, 3, 2, 30, 64]):
        texts.append(refusal("m.bin", struct.pack("<7i", *sizes) + good["m.bin"][28:]))
    assert all(texts) and sum("not finite" in text for text in texts) == 2 and sorted(os.listdir()) == sorted(READERS)
    assert all(any(words in text for text in texts) for words in ("rope_theta", "not tied", "negative vocab_size",
                                                              "is compressed", "repeat a few bytes"))
    assert pickle.loads(pickle.dumps(Trap())) is None and os.path.exists("trapped")  # it works on who unpickles


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    path, calls, fsync, replace = tmp_path / "a", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with atomic_write(path) as f:
        f.write(b"newer")
    assert calls == [5, "replace"] and path.read_bytes() == b"newer"
    for error in (OSError(28, "No space"), RuntimeError(), ValueError(), KeyboardInterrupt()):
        with pytest.raises((UserError, ValueError, KeyboardInterrupt)), atomic_write(path) as f:
            f.write(b"half")
            raise error
        assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["a"]


def test_progress_is_shown_where_it_takes_long(monkeypatch, capsys):
    def tokens():
        y = spo.sample(tiny(20), spo.no_prompts(600), 4, spo.rng(0))                # 256 at a time
        spo.dataset_logp(tiny(20), spo.Responses(y[:9, None].numpy()), torch.arange(9).split(3), 8)
        return capsys.readouterr().out.splitlines()

    assert tokens() == []
    ticks = iter(range(0, 10 ** 9, 6000))  # seconds
    monkeypatch.setattr("model.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert tokens() == ["sampled 256 of 600, 2:14:22 left", "sampled 512 of 600, 0:34:22 left",
                        "log pi of row 3 of 9, 3:20:00 left", "log pi of row 6 of 9, 1:40:00 left"]


def test_the_program_prints_samples_or_one_sentence(tmp_path, monkeypatch, capsys):
    def program(flags):
        monkeypatch.setattr("sys.argv", ["model.py", "--tokenizer", TOKENIZER, *flags.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(f"{ROOT}/model.py", run_name="__main__")
            raise SystemExit(0)
        return ended.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    save(tiny(640), "a.pt")
    save(tiny(30), "b.pt")
    tokenizer = load_tokenizer(TOKENIZER, 640)
    prompt = torch.tensor([[BOS, *tokenizer.encode("Tom")]] * 3)
    y = generate(tiny(640), prompt, 20, 0.8, 50, torch.Generator().manual_seed(1))
    flags = "a.pt --prompt Tom -n 3 --max_new_tokens 20 --temperature 0.8 --top_k 50 --seed "
    texts = map(wrap, tokenizer.decode(y.tolist()))
    assert program(flags + "1") == (0, "\n\n".join(texts) + "\n", "") == program(flags + "1")
    assert program(flags + "1")[1].startswith("Tom") and program(flags + "1") != program(flags + "2")
    for flags, words in (("a.pt --prompt " + 65 * "Tom", "tokens"), ("a.pt --max_new_tokens 65", "from 1 to 64"),
                         ("a.pt --max_new_tokens 0", "1 to 64"), ("a.pt -n 0", "-n"), ("a.pt --top_k 0", "top_k"),
                         ("a.pt --temperature nan", "--temperature"), ("a.pt --temperature 1e-40", "--temperature"),
                         ("a.pt --seed " + 20 * "9", "--seed"), ("a.pt --temp 1", "--temp"),
                         ("b.pt", "640 tokens, but the checkpoint 30"), ("c.bin", "c.bin")):
        status, out, error = program(flags)
        assert (status, out) == (2, "") and words in error.splitlines()[-1] and error.count("error: ") == 1, error


def test_small_models_take_one_thread(monkeypatch, tmp_path):
    threads, (small, large) = [], (tmp_path / "small.pt", tmp_path / "large.pt")
    for path, size in ((small, 1000), (large, 5 << 20)):
        with open(path, "wb") as f:
            f.truncate(size)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit_threads(large)
    assert threads == []
    limit_threads(small)
    limit_threads(tmp_path / "none.pt")
    assert threads == [1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads(small)
    assert threads == [1, 1]


FAULTS = """
import resource, sys, torch, model
if sys.argv[1] == "keep":
    model.keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(20):
    torch.ones(1 << 24)  # 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_kept():
    page_faults = [int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True).stdout)
                   for how in ("", "keep")]
    assert page_faults[1] < page_faults[0] / 2, page_faults  # of a few tensors, not of twenty
