"""What generate returns, llama2.c's two file formats against another reader of them, and files damaged in any way."""
import math
import os
import pickle
import runpy
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import spo
from extras.tests.conftest import ROOT
from model import (BOS, ModelArgs, UserError, atomic_write, export, generate, load, load_checkpoint, load_tokenizer,
                   sample_token, save)
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


def test_rows_are_independent_leave_when_finished_and_can_be_trained_on():
    policy, sizes, prompt = tiny(6, 3).double(), [], torch.tensor([[BOS, 4]] + 20 * [[BOS, 2], [BOS, 3]])
    with torch.no_grad():  # samples end early, and what was read before matters, or another row's cache would do
        policy.tok_embeddings.weight.div_(10)
        for layer in policy.layers:
            layer.attention.wo.weight.mul_(10)
    hook = policy.norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    y = generate(policy, prompt, 20, generator=spo.rng(0))
    hook.remove()
    assert sizes[0] == 41 and sizes[-1] <= 10 and sizes == sorted(sizes, reverse=True)
    assert torch.equal(y, slow_generate(policy, prompt, torch.rand(41, 20, generator=spo.rng(0))))
    assert torch.equal(y[:9], generate(policy, prompt[:9], 20, generator=spo.rng(0)))
    assert len(y[1::2].unique(dim=0)) > 10  # the same prompt, other draws
    spo.seq_logp(policy, y, spo.response_mask(y)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters())


def test_what_generate_refuses():
    diverged, ids = tiny(6), "prompt must be token ids"
    torch.nn.init.constant_(diverged.norm.weight, 3e38)
    for temperature in (1.0, 0):
        with pytest.raises(UserError, match="the model has diverged.*lower --lr"):
            generate(diverged, torch.full((4, 1), BOS), 9, temperature)
        with pytest.raises(UserError, match="the model has diverged"):  # in one row
            sample_token(torch.tensor([[0, 1.0], [0, math.nan]]), torch.zeros(2, 1), temperature, None)
    for prompt, settings, words in (("Once", {}, ids), (torch.tensor([BOS, 5]), {}, ids), (torch.ones(1, 2), {}, ids),
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
    save(loaded, tmp_path / "b.pt", step=3)
    saved = load_checkpoint(tmp_path / "b.pt")
    assert saved["step"] == 3 and saved["model_args"] == args | {"hidden_dim": None} and loaded.hidden_dim == 44
    assert saved["model"].keys() >= {"tok_embeddings.weight", "output.weight", "layers.1.attention_norm.weight",
                                     "layers.1.attention.wk.weight", "layers.1.feed_forward.w3.weight", "norm.weight"}
    save(tiny(30).half(), tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt")["model_args"]["n_kv_heads"] == 4  # a number: llama2.c divides by it
    half, rounded = load(tmp_path / "c.pt").state_dict(), tiny(30).half().float().state_dict()
    assert all(w.dtype == torch.float32 and torch.equal(w, rounded[name]) for name, w in half.items())


def numpy_logits(path, tokens, half_split=False):
    """Logits (T, V) as run.c computes them from a .bin, in float64; RoPE is its formula, not what the file holds."""
    raw = open(path, "rb").read()
    dim, hidden, L, n_heads, n_kv_heads, vocab_size, max_seq_len = struct.unpack("<7i", raw[:28])
    head_dim, T, data = dim // n_heads, len(tokens), np.frombuffer(raw, "<f4", offset=28).astype(float)
    kv_dim, rope = n_kv_heads * head_dim, (max_seq_len, head_dim // 2)
    shapes = [(vocab_size, dim), (L, dim), (L, dim, dim), (L, kv_dim, dim), (L, kv_dim, dim), (L, dim, dim), (L, dim),
              (L, hidden, dim), (L, dim, hidden), (L, hidden, dim), (dim,), rope, rope]
    *ends, size = np.cumsum([math.prod(shape) for shape in shapes])
    assert len(data) == size
    embedding, norm_1, wq, wk, wv, wo, norm_2, w1, w2, w3, norm, cos, sin = [
        x.reshape(shape) for x, shape in zip(np.split(data, ends), shapes)]
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
        p = np.exp(scores + future)
        y = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v.repeat(group, 1))
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
    assert np.allclose(numpy_logits(path, TOKENS[0]), double, atol=1e-4)
    assert not np.allclose(numpy_logits(path, TOKENS[0], half_split=True), double, atol=0.1)
    with pytest.raises(UserError, match="norm_eps"):  # which a .bin has no place for
        export(tiny(30, norm_eps=0.01), path)


PUBLISHED = list(Path(ROOT).parent.glob("*/real/stories260K.bin"))


@pytest.mark.skipif(not PUBLISHED, reason="needs the published stories260K.bin in a folder real/ beside the repository")
def test_the_published_model_samples_what_numpy_reads():
    y = generate(load(PUBLISHED[0]), torch.tensor([[BOS]]), 20, temperature=0)[0]
    assert y[1:].tolist() == numpy_logits(PUBLISHED[0], y[:-1]).argmax(-1).tolist() and len(y.unique()) > 10


class Trap:
    """Unpickled, it creates a file."""

    def __reduce__(self):
        return open, ("trapped", "w")


READERS = {"sft.pt": load, "m.bin": load, "tokenizer.model": partial(load_tokenizer, vocab_size=640),
           "pairs.npy": partial(spo.load_responses, model_args=ModelArgs(**MODEL_ARGS), min_rows=8, num_responses=2)}


def refusal(name, content=None):
    """Reads a file, of this content if one is given -> the sentence that refuses it, or ""."""
    if content is not None:
        Path(name).write_bytes(content)
    try:
        READERS[name](name)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 300, error
        return str(error)
    return ""


def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y, rng, args = np.full((300, 2, 65), BOS, np.uint16), np.random.default_rng(0), MODEL_ARGS
    np.save("pairs.npy", y)
    save(tiny(30, n_kv_heads=2), "sft.pt")
    export(tiny(30, n_kv_heads=2), "m.bin")
    Path("tokenizer.model").write_bytes(Path(ROOT, "tokenizer.model").read_bytes())
    good, weights = {name: Path(name).read_bytes() for name in READERS}, load_checkpoint("sft.pt")["model"]
    for name, whole in good.items():
        assert refusal(name) == ""
        for damaged in (b"", whole[:100], whole[:-100], whole[1:], whole[::-1], bytes(4096), pickle.dumps(Trap())):
            assert refusal(name, damaged), (name, damaged[:99])
        fuzz = set()
        for _ in range(60):
            at, (old, new) = rng.integers(min(len(whole), 10 ** rng.integers(2, 7))), rng.integers(20, size=2)
            damaged = whole[:at] + rng.bytes(new) + whole[at + rng.choice((old, new)):]
            fuzz.add(refusal(name, damaged) == "")
        assert fuzz == {True, False}, name
    checkpoints = [Trap(), [weights], {"model": weights}, {"model": 7, "model_args": args}, {"model": weights, "model_args": 7}]
    for change in (dict(dim=10 ** 9), dict(dim="16"), dict(n_layers=10 ** 9), dict(n_layers=-1), dict(n_heads=0),
                   dict(n_heads=7), dict(n_heads=16), dict(n_kv_heads=3), dict(vocab_size=10 ** 12), dict(norm_eps="x"),
                   dict(multiple_of=10 ** 9), dict(max_seq_len=10 ** 12), dict(max_seq_len=0), dict(rope_theta=5e5)):
        checkpoints.append({"model": weights, "model_args": args | change})
    for change in ({"norm.weight": weights["norm.weight"][1:]}, {"norm.weight": weights["norm.weight"] / 0}, {"norm.weight": None}, {"x": TOKENS},
                   {"output.weight": torch.ones(30, 16)}, {name: w * math.nan for name, w in weights.items()}):
        checkpoints.append({"model": weights | change, "model_args": args})
    texts = []
    for checkpoint in checkpoints:
        torch.save(checkpoint, "sft.pt")
        texts.append(refusal("sft.pt"))
    for rows in (y.astype(int), y[:, 0], y + 30, y - 1, y[:7], y[:, :1], y[:, :, :1], y.repeat(2, 2), np.array([[["a"]]])):
        np.save("pairs.npy", rows)
        texts.append(refusal("pairs.npy"))
    texts.append(refusal("pairs.npy", good["pairs.npy"][:8] + b"\xff\xff" + good["pairs.npy"][10:]))  # 65535 of header
    for sizes in ([16, 44, 2, 4, 2, -30, 64], [10 ** 9] * 7, [1, 1, 2000, 1, 1, 1, 1], [16, 44, 2, 3, 2, 30, 64]):
        texts.append(refusal("m.bin", struct.pack("<7i", *sizes) + good["m.bin"][28:]))
    assert all(texts) and sorted(os.listdir()) == sorted(READERS), texts
    for words in ("rope_theta", "not tied", "negative vocab_size"):
        assert any(words in text for text in texts), words
    pickle.loads(pickle.dumps(Trap()))
    assert os.path.exists("trapped")  # it works on who unpickles


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    path, calls, fsync, replace = tmp_path / "a", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    path.write_bytes(b"old")
    with atomic_write(path) as f:
        f.write(b"newer")
        assert path.read_bytes() == b"old"
    assert calls == [5, "replace"] and path.read_bytes() == b"newer"
    for error, expected in ((OSError(28, "No space"), UserError), (RuntimeError(), UserError), (ValueError(), ValueError),
                            (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected), atomic_write(path) as f:
            f.write(b"half")
            raise error
        assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["a"]


def test_the_program_prints_samples_or_one_sentence(tmp_path, monkeypatch, capsys):
    def program(flags, checkpoint="a.pt"):
        argv = ["model.py", f"{tmp_path}/{checkpoint}", "--tokenizer", f"{ROOT}/tokenizer.model", *flags.split()]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(f"{ROOT}/model.py", run_name="__main__")
            raise SystemExit(0)
        return ended.value.code, *capsys.readouterr()

    policy, tokenizer = tiny(640), load_tokenizer(f"{ROOT}/tokenizer.model", 640)
    save(policy, tmp_path / "a.pt")
    save(tiny(30), tmp_path / "b.pt")
    prompt = torch.tensor([[BOS, *tokenizer.encode("Tom")]] * 3)
    y = generate(policy, prompt, 20, 0.8, 50, torch.Generator().manual_seed(1))
    flags = "--prompt Tom -n 3 --max_new_tokens 20 --temperature 0.8 --top_k 50 --seed "
    assert program(flags + "1") == (0, "\n\n".join(tokenizer.decode(y.tolist())) + "\n", "") == program(flags + "1")
    assert program(flags + "1")[1].startswith("Tom") and program(flags + "2") != program(flags + "1")
    y = generate(policy, prompt[:1, :1], 64, generator=torch.Generator().manual_seed(0))
    assert program("")[1] == tokenizer.decode(y.tolist())[0] + "\n"  # as many as the context holds
    for flags, checkpoint, words in (
            ("--prompt " + "Tom" * 65, "a.pt", "the prompt has"), ("--max_new_tokens 65", "a.pt", "--max_new_tokens to 64"),
            ("-n 0", "a.pt", "-n"), ("--top_k 0", "a.pt", "--top_k"), ("--max_new_tokens 0", "a.pt", "at least 1"), ("", "b.pt", "640 tokens, but the checkpoint 30"),
            ("--temperature nan", "a.pt", "--temperature"), ("--temp 1", "a.pt", "--temp"), ("", "c.pt", "c.pt does not exist"), ("", "c.bin", "c.bin")):
        status, out, error = program(flags, checkpoint)
        assert (status, out) == (2, "") and words in error.splitlines()[-1] and error.count("error: ") == 1, error
