"""
Creates a data folder, data/<model>, for spo.py:

    python prepare_data.py toy                               # the toy world: no download, about a minute
    python prepare_data.py stories15M                        # a published checkpoint and its tokenizer
    python prepare_data.py stories15M --source pairs.jsonl   # and your preferences; or --source made, or released
    python prepare_data.py mine --init model.pt --tokenizer t.model    # any checkpoint of llama2.c, .pt or .bin
    python prepare_data.py tokenizer                         # the toy world's tokenizer.model

Settings you do not give keep their earlier values, which are in the folder's settings.json. A run that was interrupted
continues when it is started again. Files that this program has not written are never replaced.
"""
import array
import collections
import hashlib
import io
import math
import os
import random
import re
import shutil

import numpy as np
import torch

from extras import toyworld
from extras.data_folder import open_folder
from extras.download import download_verified, full_url
from extras.judge import check_num_ref
from extras.llm_judge import ask_test_question
from extras.make_pairs import make_pairs
from extras.preferences import encode_rows, read_preferences
from extras.reward_model import fit_reward_model, heldout_accuracy
from model import (BOS, ModelArgs, Parser, Transformer, UserError, atomic_write, file_hash, load, load_tokenizer,
                   run_main, save, wrap)
from spo import (BATCH, PROMPT_LENGTH, Responses, batch_indices, dataset_logp, micro_batches, model_defaults,
                 no_prompts, rng, sample, seq_logp)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS, RANKED, REF, HELDOUT, MADE, LABELS = range(100, 106)  # purposes of spo.rng: what is drawn
TOY_FILES, CHECKPOINT_FILES = ("stories.npy", "heldout.npy", "sft.pt"), ("sft.pt", "tokenizer.model")
PAIR_FILES = ("pairs.npy", "heldout_pairs.npy")
RESPONSE_FILES = (*PAIR_FILES, "ranked.npy", "heldout_ranked.npy", "best.npy", "heldout_best.npy", "ref.npy")
SOURCE_FILES = (*RESPONSE_FILES, *(name.replace(".npy", PROMPT_LENGTH) for name in RESPONSE_FILES), "made.npy",
                "made.jsonl", "reward.pt")


def pad(tokens, lengths, width):
    """The responses in tokens, one after another, lengths (N, n) -> (N, n, width): BOS, response, BOS to the end."""
    rows = np.full((*lengths.shape, width), BOS, np.uint16)
    rows[:, :, 1:][np.arange(width - 1) < lengths[:, :, None]] = tokens
    return rows


def sample_rows(folder, prompts, n, purpose):
    """n samples of the folder's sft.pt for each prompt (rows, P), padded with -1 -> tokens (rows, n, T)."""
    model = load(f"{folder.path}/sft.pt", DEVICE)
    prompts = prompts.repeat_interleave(n, 0)
    y = sample(model, prompts, folder.settings["max_new_tokens"], rng(folder.settings["seed"], purpose))
    return y.cpu().view(-1, n, y.shape[1])


# ---------------------------------------------------------------------------------------------------
# The toy world

def train_tokenizer(path):
    """The toy world's BPE, learned from its stories; without byte fallback, most words are one token."""
    import sentencepiece
    if os.path.exists(path):
        raise UserError(f"{path} exists: move it away, or name another file with --tokenizer.")
    generator, learned = random.Random(0), io.BytesIO()
    stories = (toyworld.write_story(generator) for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=stories, model_writer=learned, model_type="bpe", vocab_size=toyworld.MODEL_ARGS["vocab_size"],
        character_coverage=1.0, normalization_rule_name="identity", minloglevel=2)
    with atomic_write(path) as f:
        f.write(learned.getvalue())


def pretrain(stories, heldout, steps, seed):
    """Trains the toy model by maximum likelihood on stories (N, 1, T) -> Transformer."""
    stories, heldout = Responses(stories), Responses(heldout)
    batch_size, micro_batch_size, max_lr, warmup = 32, 16, 5e-3, 50
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**toyworld.MODEL_ARGS)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=max_lr, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        decay = math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = max_lr * min(1.0, (step + 1) / warmup) * (1 + decay) / 2
        optimizer.zero_grad()
        total = 0.0
        batch = batch_indices(len(stories), batch_size, seed, BATCH, step)
        for _, y, mask in micro_batches(stories, batch, micro_batch_size, DEVICE):
            loss = -seq_logp(model, y, mask).sum() / batch_size
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}, loss {total:.2f}", flush=True)
    logp = dataset_logp(model, heldout, torch.arange(len(heldout)).split(batch_size), micro_batch_size)
    print(f"held out: {-logp.mean():.2f} nats per story; the grammar's: {toyworld.entropy():.2f}", flush=True)
    return model


def sample_ranking(y, r, generator):
    """Each row of y (N, n, T) in a random order, best first, by Eq. 3 with rewards r (N, n); for n = 2 by Eq. 2."""
    gumbel = -torch.rand(r.shape, generator=generator).log().neg().log()
    order = (r + gumbel).argsort(1, descending=True)                                # (N, n)
    return y.gather(1, order[:, :, None].expand_as(y))


def opening_sentences(stories, tokenizer):
    """The first sentence of each story as a prompt -> tokens (N, P), BOS first, padded with -1."""
    sentences = [story.partition(". ")[0] + "." for story in stories]
    prompts = [torch.tensor([BOS, *tokens]) for tokens in tokenizer.encode(sentences)]
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)


def prepare_toy(folder, tokenizer):
    """Stories of the grammar and the model trained on them; with source toy, samples ranked by the expert's reward."""
    settings = folder.settings
    seed = settings["seed"]
    for name, n, story_seed in (("stories.npy", settings["num_stories"], 2 * seed),
                                ("heldout.npy", 1000, 2 * seed + 1)):
        if not folder.has(name):
            generator = random.Random(story_seed)
            stories = tokenizer.encode([toyworld.write_story(generator) for _ in range(n)])
            lengths = np.array([[len(story)] for story in stories])
            folder.save_tokens(name, pad(np.concatenate(stories), lengths, 2 + lengths.max()))
    if not folder.has("sft.pt"):
        with folder.new_file("sft.pt") as path:
            stories, heldout = np.load(f"{folder.path}/stories.npy"), np.load(f"{folder.path}/heldout.npy")
            save(pretrain(stories, heldout, settings["sft_steps"], seed), path)
    if settings["source"] != "toy":
        return
    num_pairs = settings["num_pairs"]
    for name, rows, n, purpose in (("ranked", num_pairs // 2, 4, RANKED), ("pairs", num_pairs, 2, PAIRS),
                                   ("heldout_pairs", max(1, num_pairs // 8), 2, HELDOUT)):
        if not folder.has(f"{name}.npy"):
            prompts = no_prompts(rows)
            if settings["prompted"]:
                stories = np.load(f"{folder.path}/{'heldout' if purpose == HELDOUT else 'stories'}.npy")
                prompts = opening_sentences(tokenizer.decode(stories[:, 0].tolist()), tokenizer)
                prompts = prompts[torch.arange(rows) % len(prompts)]
                folder.save_tokens(f"{name}{PROMPT_LENGTH}", (prompts >= 0).sum(1))
            y = sample_rows(folder, prompts, n, purpose)
            taste = toyworld.TASTES[settings["model"]]
            r = [toyworld.reward(text, taste) for text in tokenizer.decode(y.flatten(0, 1).tolist())]
            ranked = sample_ranking(y, torch.tensor(r).view(rows, n), rng(seed, LABELS, purpose))
            folder.save_tokens(f"{name}.npy", ranked)
    for suffix in (PROMPT_LENGTH, ".npy"):
        if folder.has(f"ranked{suffix}") and not folder.has(f"best{suffix}"):
            folder.save_tokens(f"best{suffix}", np.load(f"{folder.path}/ranked{suffix}"))


# ---------------------------------------------------------------------------------------------------
# Checkpoints: published ones, and the user's

TINYLLAMAS = "karpathy/tinyllamas/resolve"
LLAMA2_TOKENIZER = ("LLAMA2C_ENDPOINT", "karpathy/llama2.c/350e04fe35433e6d2941dce5a1f53308f87058eb/tokenizer.model",
                    499_723, "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347")
# Checkpoint, then its tokenizer: endpoint, path, bytes (None: not known), sha256. The paper's revision has no .pt.
PUBLISHED = {
    "stories260K": (("HF_ENDPOINT", f"{TINYLLAMAS}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/stories260K.pt",
                     None, "eec953f9d0f139e894ef8996302680e64b24813c7a98425424f5c85f7cf4abb1"),
                    ("HF_ENDPOINT", f"{TINYLLAMAS}/cbffbc90324256436c13dc6b4592c82c1e716354/stories260K/tok512.model",
                     None, "dfff07d929db979913f166ec94a6f5ecad4c70cfed8eb5c9cbe7e464455e46f5")),
    "stories15M": (("HF_ENDPOINT", f"{TINYLLAMAS}/32cc2486abd3c2100a6fcf0ef68a7ee3842407b7/stories15M.pt",
                    60_789_090, "3da00c0fef684f3f83b457736837c46ab55e92a26662b61d6104de2d271c708d"), LLAMA2_TOKENIZER),
    "stories42M": (("HF_ENDPOINT", f"{TINYLLAMAS}/58e1696980dcbdf80b2dfe876819104a174f5e78/stories42M.pt",
                    166_787_298, "fbe124df8794c2e033432c22b59cff64485455b4644046c52a456d0bbd8859fe"), LLAMA2_TOKENIZER),
    "stories110M": (("HF_ENDPOINT", f"{TINYLLAMAS}/302d182797471b93cb4d6af3608e501efeeda0c2/stories110M.pt",
                     438_163_693, "cdef30b5108d1b5d1c232fcf7e2ea433cc6cdc473aa876af9d8d6ce83bf4b5e0"),
                    LLAMA2_TOKENIZER),
}


def download_checkpoint(folder):
    """A published model as sft.pt, and its tokenizer."""
    for name, (endpoint, path, size, sha256) in zip(CHECKPOINT_FILES, PUBLISHED[folder.settings["model"]]):
        if not folder.has(name):
            with folder.new_file(name) as new_path:
                download_verified(full_url(endpoint, path), size, sha256, new_path)


def check_checkpoint(folder, init, tokenizer_path):
    """Refuses a checkpoint or a tokenizer that cannot be used, or that the folder was not made from."""
    if folder.files and "init" not in folder.inputs:
        folder.refuse("was made without --init")
    sft = load(init)
    check_length(folder.settings, sft.args.max_seq_len)
    tokenizer = load_tokenizer(tokenizer_path, sft.args.vocab_size)
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 1 << 16:
        raise UserError(f"{tokenizer_path} has {tokenizer.vocab_size()} tokens and BOS {tokenizer.bos_id()}: this "
                        f"program needs BOS {BOS}, as llama2.c has it, and at most {1 << 16} tokens.")
    folder.check_input("init", file_hash(init))
    folder.check_input("tokenizer", file_hash(tokenizer_path))


def copy_checkpoint(folder, init, tokenizer_path):
    """The user's checkpoint as sft.pt, converted if it is a .bin, and its tokenizer."""
    if not folder.has("sft.pt"):
        with folder.new_file("sft.pt") as path:
            if init.endswith(".bin"):
                save(load(init), path)
            else:
                shutil.copyfile(init, path)
    if not folder.has("tokenizer.model"):
        with folder.new_file("tokenizer.model") as path:
            shutil.copyfile(tokenizer_path, path)


# ---------------------------------------------------------------------------------------------------
# Preferences that are not the toy world's: from files, from the paper's release, or made by a judge

def is_held_out(prompt, responses):
    """
    One row in twenty, by a hash of its prompt's tokens, so that a prompt is on one side; without one, of its
    responses' in any order.
    """
    texts = [prompt] if prompt else responses
    texts = sorted(array.array("H", [BOS, *tokens]).tobytes().rstrip(b"\0\1") for tokens in texts)
    return hashlib.sha256(b"".join(texts)).digest()[0] < 256 // 20


def shared_length(prompt, responses):
    """How many tokens prompt and all responses have in common at their beginning."""
    length = 0
    for tokens in zip(prompt, *responses):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def hold_out_some(held_out, prompt_ids):
    """held_out (N,); where all rows are or none is, those of the last prompt alone. Each side has at least one row."""
    if held_out.all() or not held_out.any():
        held_out = prompt_ids == prompt_ids[-1]
    if held_out.all():
        held_out = np.arange(len(held_out)) == len(held_out) - 1
    return held_out


TOO_LONG = ("prompt too long", "too long", "identical only because of the cut")


def why_left_out(prompt_length, responses, limit, drop_long, seen):
    """
    Why a row is not used, "" if it is. prompt_length: the tokens that its responses share, BOS included; limit: the
    length that responses are cut to; seen: digests of earlier rows, to which this one's are added.
    """
    cut = [tokens[:limit] for tokens in responses]
    if prompt_length > limit:
        return "prompt too long"
    if drop_long and any(len(tokens) >= limit for tokens in responses):
        return "too long"
    if any(tokens in responses[:i] for i, tokens in enumerate(responses)):
        return "identical"
    if any(tokens in cut[:i] for i, tokens in enumerate(cut)):
        return "identical only because of the cut"
    whole, after = (hashlib.sha256(repr((prompt_length, texts)).encode()).digest() for texts in (responses, cut))
    if whole in seen:
        return "duplicated"
    if after in seen:
        return "identical only because of the cut"
    seen.update((whole, after))
    return ""


def save_preferences(folder, name, rows, unk_id):
    """
    rows: (prompt, n responses), lists of tokens, best first, each response with the prompt before it -> <name>.npy and
    heldout_<name>.npy, and where there are prompts <name>_prompt_length.npy (N,), their tokens with BOS. Responses are
    cut at max_new_tokens, or with drop_long their rows left out; so are the rows of why_left_out.
    """
    limit, drop_long = folder.settings["max_new_tokens"], folder.settings.get("drop_long")
    counts, left_out, seen = collections.Counter(), collections.Counter(), set()
    tokens, lengths, prompt_lengths, prompt_ids = (array.array(code) for code in "HHHq")  # of the rows that are kept
    held_out = []
    for prompt, responses in rows:
        counts["rows"] += 1
        counts["tokens"] += sum(map(len, responses))
        counts["unknown"] += sum(response.count(unk_id) for response in responses)
        counts["long"] += sum(len(response) >= limit for response in responses)
        prompt_length = 1 + shared_length(prompt, responses)
        reason = why_left_out(prompt_length, responses, limit, drop_long, seen)
        if reason:
            left_out[reason] += 1
            continue
        responses = [response[:limit] for response in responses]
        for response in responses:
            tokens.extend(response)
            lengths.append(len(response))
        prompt_ids.append(hash(tuple(prompt)) if prompt else len(prompt_ids))
        prompt_lengths.append(prompt_length)
        held_out.append(is_held_out(prompt, responses))
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    verb = "over" if drop_long else "cut at"
    print(f"{name}: {counts['rows']} rows, {counts['long']} responses {verb} {limit} tokens")
    print(wrap(f"  left out: {reasons}", indent="    "))
    unknown = counts["unknown"] / max(1, counts["tokens"])
    print(f"  unknown characters: {unknown:.2%} of the tokens", flush=True)
    if unknown > 0.01:
        print("  The tokenizer lacks these characters: the model reads all of them as <unk>.")
    if len(held_out) < 2:
        remedy = "give more preferences, or with --source made more --num_pairs"
        if len(held_out) + sum(left_out[reason] for reason in TOO_LONG) > 1:
            remedy = f"give --max_new_tokens above {limit}, or with --drop_long more rows that fit"
        raise UserError(f"only {len(held_out)} of {counts['rows']} rows are left for {folder.path}/{name}.npy, left "
                        f"out: {reasons}: {remedy}, in another --data.")
    held_out = hold_out_some(np.array(held_out), np.array(prompt_ids))
    lengths = np.array(lengths).reshape(len(held_out), -1)                          # (N, n)
    width = 1 + min(limit, lengths.max() + 1)  # with the BOS at its beginning, and one at its end unless it was cut
    tokens, prompt_lengths = pad(tokens, lengths, width), np.array(prompt_lengths)
    print(f"  {(~held_out).sum()} rows to train on, {held_out.sum()} held out")
    for file, part in ((name, ~held_out), (f"heldout_{name}", held_out)):
        if prompt_lengths.max() > 1:
            folder.save_tokens(f"{file}{PROMPT_LENGTH}", prompt_lengths[part])
        folder.save_tokens(f"{file}.npy", tokens[part])  # after it: where it exists, both are complete


def save_reward_model(folder):
    """
    A reward model fitted to pairs.npy as reward.pt, if it is better than chance. One half of the held-out pairs says
    which step of the fit to take, the other half, whose accuracy is therefore unbiased, how good it is.
    """
    settings = folder.settings
    pairs, heldout_pairs = (np.load(f"{folder.path}/{name}") for name in PAIR_FILES)
    selection, test = heldout_pairs[::2], heldout_pairs[1::2]
    reason = f"only {len(heldout_pairs)} held-out pairs, and a test takes 10"
    if len(test) >= 5:
        micro_batch_size = model_defaults(settings["model"])["micro_batch_size"]
        model = fit_reward_model(f"{folder.path}/sft.pt", pairs, selection, settings["reward_steps"], micro_batch_size,
                                 settings["seed"], DEVICE)
        accuracy = heldout_accuracy(model, test, micro_batch_size, DEVICE)
        lowest = 0.5 + len(test) ** -0.5  # above chance by two standard errors of a fair coin
        if accuracy > lowest:
            with folder.new_file("reward.pt") as path:
                return save(model, path)
        reason = f"accuracy {accuracy:.3f} on {len(test)} held-out pairs is not above {lowest:.3f}"
    settings["no_reward_model"] = reason  # so that it is not fitted again, and the judge can say why there is none
    print(wrap(f"no reward model: {reason}"))


# ---------------------------------------------------------------------------------------------------
# Command line

KNOWN = (*toyworld.TASTES, *PUBLISHED)
LOWEST = dict(seed=0, num_stories=32, sft_steps=1, num_pairs=2, num_ref=2, max_new_tokens=1, reward_steps=0)
MOST = 10_000_000  # of what is counted: settings that end in a full memory would be kept in settings.json


def get_args(argv=None):
    """The command line; a flag that is not given is None."""
    p = Parser(description="Create a data folder for spo.py. Settings you do not give keep their earlier values, and "
               "an interrupted run continues when it is started again.")
    p.add_argument("model", help=f"{', '.join(KNOWN)}, tokenizer, or with --init any name")
    p.add_argument("--data", help="the folder (default: data/<model>)")
    p.add_argument("--init", help="a checkpoint of your own in llama2.c's format, .pt or version-0 .bin")
    p.add_argument("--tokenizer", help="that of --init, or the toy world's (default: tokenizer.model)")
    p.add_argument("--source", help="of preferences: made, released, or a file or folder of them (docs/data.md) "
                   "(default: toy, the toy world's own; for a published model none)")
    p.add_argument("--judge", choices=(*toyworld.TASTES, "readability", "llm"),
                   help="of made pairs (default: <model>, or llm); readability needs no endpoint")
    p.add_argument("--seed", type=int, help="of stories, training and samples (default: 0)")
    p.add_argument("--num_stories", type=int, help="stories of the grammar to train on (default: 20000)")
    p.add_argument("--sft_steps", type=int, help="steps of that training (default: 1000)")
    p.add_argument("--prompted", action="store_true", default=None,
                   help="toy: both responses of a row continue the first sentence of a story")
    p.add_argument("--num_pairs", type=int, help="pairs to sample; half as many rows of four (default: 4000)")
    p.add_argument("--num_ref", type=int, help="samples of the reference model in ref.npy (default: 2000; with "
                   "--judge readability 12000)")
    p.add_argument("--max_new_tokens", type=int, help="longest response and sample in tokens, with its prompt and end "
                   "(default: as in training)")
    p.add_argument("--drop_long", action="store_true", default=None, help="of files: leave out rows with a longer "
                   "response, instead of cutting it")
    p.add_argument("--reward_steps", type=int, help="steps of fitting reward.pt; 0: none (default: 1000; for "
                   "toy and --judge readability none)")
    args = p.parse_args(argv)
    for name, lowest in LOWEST.items():
        value = getattr(args, name)
        highest = 2 ** 63 - 1 if name == "seed" else MOST
        if value is not None and not lowest <= value <= highest:
            raise UserError(f"--{name} is {value}, but must be from {lowest} to {highest}.")
    if not re.fullmatch(r"\w[\w.-]*", args.model, re.ASCII):
        raise UserError(f"{args.model} is not a name: give one of letters, digits, _, - and .")
    if args.init is not None and (args.model in toyworld.TASTES or args.tokenizer is None):
        raise UserError("--init needs --tokenizer, that of the checkpoint, and a name that is not the toy world's.")
    return args


def get_settings(args, folder):
    """Fills in folder.settings: the flags given, else the folder's earlier values, else these defaults."""
    toy = args.model in toyworld.TASTES
    if args.model not in KNOWN and args.init is None and "init" not in folder.inputs:
        raise UserError(f"{args.model} is none of {', '.join(KNOWN)}: for a checkpoint of your own give --init and "
                        "--tokenizer.")
    source = args.source or folder.settings.get("source") or ("toy" if toy else None)
    defaults = dict(model=args.model, source=source)
    if toy:
        defaults.update(num_stories=20_000, sft_steps=1000)
    if source == "toy":
        defaults.update(prompted=False)
    if source is not None:
        defaults.update(seed=0, num_ref=2000, reward_steps=None if toy else 1000,
                        max_new_tokens=model_defaults(args.model)["max_new_tokens"])
    if source not in (None, "toy", "made"):
        defaults.update(drop_long=False)
    if source in ("toy", "made"):
        defaults.update(num_pairs=4000)
    if source == "made":
        defaults.update(judge=args.model if toy else "llm")
        if "readability" in (args.judge, folder.settings.get("judge")):
            defaults.update(num_ref=12_000, reward_steps=None)  # evaluations ask it too, not a reward model
    elsewhere = ("data", "init", "tokenizer") if toy or args.init else ("data",)  # not settings of the folder
    given = {name: value for name, value in vars(args).items() if value is not None and name not in elsewhere}
    for name in given:
        if name not in defaults:
            raise UserError(f"--{name} is not read by {args.model} with source {source}: leave it out.")
    folder.merge_settings(given, defaults)


def check_length(settings, max_seq_len):
    if settings.get("max_new_tokens", 0) > max_seq_len:
        raise UserError(f"--max_new_tokens is {settings['max_new_tokens']}, but the model reads {max_seq_len}.")


def prepare(folder, init, tokenizer_path):
    """Makes the files that folder lacks. init: the user's checkpoint, or None."""
    settings, source, model = folder.settings, folder.settings["source"], folder.settings["model"]
    # First all that can be wrong with what the user gave, before any work
    toy, published = model in toyworld.TASTES, {}
    names = TOY_FILES if toy else CHECKPOINT_FILES
    if init is not None:
        check_checkpoint(folder, init, tokenizer_path)
    elif not toy and "init" not in folder.inputs:
        published = {name: sha256 for name, (*_, sha256) in zip(names, PUBLISHED[model])}
    if toy:
        tokenizer = load_tokenizer(tokenizer_path, toyworld.MODEL_ARGS["vocab_size"])
        folder.check_input("tokenizer", file_hash(tokenizer_path))
        folder.check_input("extras/toyworld.py", file_hash(toyworld.__file__))
        check_length(settings, toyworld.MODEL_ARGS["max_seq_len"])
    folder.check_files(names + (SOURCE_FILES if source else ()), published)
    make_pairs_now = source == "made" and not folder.has("made.jsonl", *PAIR_FILES)
    if make_pairs_now and settings["judge"] == "llm":
        ask_test_question(2 * settings["num_pairs"])
    if make_pairs_now and settings["judge"] == "readability":
        check_num_ref(settings["num_ref"], f"{folder.path}/ref.npy")
    if "init" in folder.inputs and init is None and not folder.has(*names):
        raise UserError(f"{folder.path} lacks {' or '.join(names)}: give --init and --tokenizer again.")
    preferences = read_preferences(folder)

    if not toy:
        if init is not None:
            copy_checkpoint(folder, init, tokenizer_path)
        elif published:
            download_checkpoint(folder)
        sft = load(f"{folder.path}/sft.pt")
        check_length(settings, sft.args.max_seq_len)
        tokenizer = load_tokenizer(f"{folder.path}/tokenizer.model", sft.args.vocab_size)
    for name, rows in preferences.items():
        save_preferences(folder, name, encode_rows(tokenizer, rows), tokenizer.unk_id())
    if toy:
        if preferences:
            print(wrap("evaluations are still judged by the toy world's expert; a reward model of your preferences "
                       "judges with --reward_steps 1000 here and --judge reward in training"))
        prepare_toy(folder, tokenizer)
    if source is not None and not folder.has("ref.npy"):
        prompts = no_prompts(settings["num_ref"])
        if folder.has(f"pairs{PROMPT_LENGTH}"):
            pairs = Responses(*(np.load(f"{folder.path}/pairs{suffix}") for suffix in (".npy", PROMPT_LENGTH)))
            prompts = pairs.prompts(torch.arange(len(prompts)) % len(pairs))
            folder.save_tokens(f"ref{PROMPT_LENGTH}", (prompts >= 0).sum(1))
        folder.save_tokens("ref.npy", sample_rows(folder, prompts, 1, REF))
    if make_pairs_now:
        if not folder.has("made.npy"):
            folder.save_tokens("made.npy", sample_rows(folder, no_prompts(settings["num_pairs"]), 2, MADE))
        made = [([], responses) for responses in make_pairs(folder, tokenizer)]  # samples begin without a prompt
        save_preferences(folder, "pairs", made, tokenizer.unk_id())
    if settings.get("reward_steps") and not folder.has("reward.pt") and "no_reward_model" not in settings:
        save_reward_model(folder)
    folder.save()


def main(argv=None):
    args = get_args(argv)
    if args.model == "tokenizer":
        if any(value is not None for name, value in vars(args).items() if name not in ("model", "tokenizer")):
            raise UserError("the tokenizer has no other setting than --tokenizer, the file to create.")
        return train_tokenizer(args.tokenizer or "tokenizer.model")
    with open_folder(args.data or f"data/{args.model}") as folder:
        get_settings(args, folder)
        prepare(folder, args.init, args.tokenizer or "tokenizer.model")
    print(f"{folder.path} is ready")


if __name__ == "__main__":
    run_main(main)
