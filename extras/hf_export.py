"""
A checkpoint of llama2.c's format as a Hugging Face folder that transformers loads, and back:

    python -m extras.hf_export data/toy/sft.pt out/hf --tokenizer tokenizer.model --pairs data/toy/pairs.npy
    python -m extras.hf_export out/hf model.pt

Needs requirements-trl.txt. --pairs adds pairs.jsonl, with the texts and token ids of a token file, for spo_trl.py. The
tokenizer's end of sequence is <s>, which delimits samples here. Its padding is <unk>, not <s>: transformers does not
train the embedding of the padding token.
"""
import json
import os
import shutil

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from model import BOS, MAX_POSITIONS, ModelArgs, Parser, Transformer, UserError, atomic_write, load, load_tokenizer
from model import run_main, save
from spo import load_responses, response_mask

NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
               "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
               "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
               "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def hf_names(n_layers):
    """Our parameter names -> those of transformers' Llama."""
    names = {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}"
             for i in range(n_layers) for ours, theirs in LAYER_NAMES.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in (NAMES | names).items()}


def split_pairs(w, head_dim):
    """
    The rows of wq or wk in the order of transformers, whose RoPE rotates entry i of a head with i + head_dim / 2, not
    with its neighbor: first the even rows of each head, then the odd ones.
    """
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def join_pairs(w, head_dim):
    """The inverse of split_pairs."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(model):
    """A Transformer, its output layer tied or not -> LlamaForCausalLM with the same logits."""
    args, weights = model.args, model.state_dict()
    tied = torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=model.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, rms_norm_eps=args.norm_eps, tie_word_embeddings=tied,
        bos_token_id=BOS, eos_token_id=BOS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    hf = LlamaForCausalLM(config)
    renamed = {}
    for ours, theirs in hf_names(args.n_layers).items():
        rotated = ours.endswith(("wq.weight", "wk.weight"))
        renamed[theirs] = split_pairs(weights[ours], args.dim // args.n_heads) if rotated else weights[ours]
    hf.load_state_dict(renamed)
    hf.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=BOS)
    return hf.eval()


def from_hf(folder):
    """The Transformer in a Hugging Face folder of a Llama; what ours cannot express is refused."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:80]
        raise UserError(f"{folder} cannot be read as a Hugging Face folder ({reason}).") from None
    if config.model_type != "llama":
        raise UserError(f"{folder} holds a {config.model_type} model, not a Llama.")
    head_dim = config.hidden_size // config.num_attention_heads
    required = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, head_dim=head_dim, bos_token_id=BOS)
    found = {name: getattr(config, name) for name in required} | config.rope_parameters
    for name, x in (required | {"rope_type": "default", "rope_theta": 10000.0}).items():
        if found[name] != x:
            raise UserError(f"{folder} has {name} {found[name]}, but our Llama only {x}.")
    if config.max_position_embeddings * config.hidden_size > MAX_POSITIONS:
        raise UserError(f"{folder} has {config.max_position_embeddings} positions, too many for our Llama.")
    weights = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).state_dict()
    if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        raise UserError(f"{folder} has an output layer of its own, but that of our Llama is tied to the embedding.")
    model = Transformer(ModelArgs(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads, vocab_size=config.vocab_size, hidden_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps, max_seq_len=config.max_position_embeddings))
    renamed = {}
    for ours, theirs in hf_names(config.num_hidden_layers).items():
        rotated = ours.endswith(("wq.weight", "wk.weight"))
        renamed[ours] = join_pairs(weights[theirs], head_dim) if rotated else weights[theirs]
    model.load_state_dict(renamed)
    return model


def to_hf_tokenizer(tokenizer, max_length):
    """A sentencepiece BPE without normalization, as llama2.c's are -> a tokenizer of transformers, which adds BOS."""
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    is_text = [not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_byte(i)) for i in ids.values()]
    scores = {piece: tokenizer.get_score(i) for piece, i in ids.items() if is_text[i]}
    unk, bos = pieces[tokenizer.unk_id()], pieces[BOS]
    byte_fallback = any(tokenizer.is_byte(i) for i in ids.values())
    bpe = models.BPE(ids, generate_merges(ids, scores), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
    hf = Tokenizer(bpe)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if tokenizer.encode("a  a") == tokenizer.encode("a a"):  # sentencepiece removed extra spaces in its training too
        steps = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " "), *steps]
    hf.normalizer = normalizers.Sequence(steps)
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1, 0)])
    hf.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    hf.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=hf, bos_token=bos, eos_token=bos, unk_token=unk, pad_token=unk,
                                   padding_side="left", model_max_length=max_length, clean_up_tokenization_spaces=False)


def write_pairs(path, pairs, tokenizer):
    """JSON Lines: prompt, chosen and rejected as texts and as the token ids that they were, in a token file's order."""
    with atomic_write(path) as f:
        for tokens, P in zip(torch.from_numpy(pairs.tokens.astype("int64")), pairs.prompt_length.tolist()):
            mask = response_mask(tokens, P).bool()                                  # (2, T)
            prompt_ids, ids = tokens[0, :P].tolist(), [y[m].tolist() for y, m in zip(tokens, mask)]
            prompt, texts = tokenizer.decode(prompt_ids), [tokenizer.decode(prompt_ids + y) for y in ids]
            row = dict(prompt=prompt, chosen=texts[0][len(prompt):], rejected=texts[1][len(prompt):],
                       prompt_ids=prompt_ids, chosen_ids=ids[0], rejected_ids=ids[1])
            f.write((json.dumps(row) + "\n").encode())


def main(argv=None):
    p = Parser(description="Convert a checkpoint to a Hugging Face folder, or such a folder to a checkpoint.")
    p.add_argument("source", help="a .pt or .bin file, or a folder")
    p.add_argument("target", help="what is created: a folder, or a .pt file")
    p.add_argument("--tokenizer", help="the checkpoint's own sentencepiece model (default: none is written)")
    p.add_argument("--pairs", help="a token file of the checkpoint's data folder; needs --tokenizer")
    args = p.parse_args(argv)
    if os.path.exists(args.target):
        raise UserError(f"{args.target} exists: name another target.")
    if os.path.isdir(args.source):
        if args.tokenizer or args.pairs:
            raise UserError(f"{args.source} is a folder: --tokenizer and --pairs are not read.")
        return save(from_hf(args.source), args.target)
    if args.pairs and not args.tokenizer:
        raise UserError("--pairs needs --tokenizer.")
    model = load(args.source)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, model.args.vocab_size)
        hf_tokenizer = to_hf_tokenizer(tokenizer, model.args.max_seq_len)
    pairs = load_responses(args.pairs, model.args, num_responses=2) if args.pairs else None
    to_hf(model).save_pretrained(args.target)
    if args.tokenizer:
        hf_tokenizer.save_pretrained(args.target)
        shutil.copy(args.tokenizer, f"{args.target}/tokenizer.model")
    if args.pairs:
        write_pairs(f"{args.target}/pairs.jsonl", pairs, tokenizer)
    print(f"{args.target} is ready")


if __name__ == "__main__":
    run_main(main)
