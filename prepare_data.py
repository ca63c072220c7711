"""
Creates a data folder, data/<model>, for spo.py:

    python prepare_data.py toy                               # the toy world: no download, about a minute
    python prepare_data.py stories15M                        # a published checkpoint and its tokenizer
    python prepare_data.py stories15M --source pairs.jsonl   # and your preferences; or --source made, or released
    python prepare_data.py mine --init model.pt --tokenizer t.model    # any checkpoint of llama2.c, .pt or .bin
    python prepare_data.py tokenizer                         # the toy world's tokenizer.model

Settings you do not give keep their earlier values, which are in the folder's settings.json. A run that was interrupted
continues when it is started again. Files that this program has not written are never replaced. All of it happens in
prepare, near the end: what can be wrong, the toy world or a checkpoint, preferences, samples, a reward model.
"""
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
from extras.download import PUBLISHED, download_verified, full_url
from extras.judge import check_num_ref
from extras.llm_judge import ask_test_question
from extras.make_pairs import make_pairs
from extras.preferences import read_preferences
from extras.reward_model import save_reward_model
from extras.token_files import PAIR_FILES, encode_rows, pad, save_preferences
from model import (BOS, ModelArgs, Parser, Transformer, UserError, atomic_write, file_hash, limit_threads, load,
                   load_tokenizer, run_main, save, wrap)
from spo import (BATCH, PROMPT_LENGTH, Responses, batch_indices, check_length, dataset_logp, micro_batches,
                 model_defaults, no_prompts, rng, sample, seq_logp)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS, RANKED, REF, HELDOUT, MADE, LABELS, NOISE = range(100, 107)  # purposes of spo.rng: what is drawn
TOY_FILES, CHECKPOINT_FILES = ("stories.npy", "heldout.npy", "sft.pt"), ("sft.pt", "tokenizer.model")
RESPONSE_FILES = (*PAIR_FILES, "ranked.npy", "heldout_ranked.npy", "best.npy", "heldout_best.npy", "ref.npy")
SOURCE_FILES = (*RESPONSE_FILES, *(name.replace(".npy", PROMPT_LENGTH) for name in RESPONSE_FILES), "made.npy",
                "made.jsonl", "reward.pt")


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


def pretrain(stories, heldout, steps, seed, dim):
    """Trains a toy model of width dim by maximum likelihood on stories (N, 1, T) -> Transformer."""
    stories, heldout = Responses(stories), Responses(heldout)
    batch_size, micro_batch_size, max_lr, warmup = 32, 16, 5e-3 * 64 / dim, 50
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**toyworld.MODEL_ARGS | {"dim": dim})).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=max_lr, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        decay = math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = max_lr * min(1.0, (step + 1) / warmup) * (1 + decay) / 2
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


def save_labeled_samples(folder, tokenizer, name, rows, n, purpose):
    """
    rows of n samples, ranked by the expert's reward; with the setting prompted they continue sentences. Each training
    pair is flipped with probability label_noise, by numbers of its own: more noise flips the same pairs and others.
    """
    settings, prompts = folder.settings, no_prompts(rows)
    if settings["prompted"]:
        stories = np.load(f"{folder.path}/{'heldout' if purpose == HELDOUT else 'stories'}.npy")
        prompts = opening_sentences(tokenizer.decode(stories[:, 0].tolist()), tokenizer)
        prompts = prompts[torch.arange(rows) % len(prompts)]
        folder.save_tokens(f"{name}{PROMPT_LENGTH}", (prompts >= 0).sum(1))
    y = sample_rows(folder, prompts, n, purpose)
    taste = toyworld.TASTES[settings["model"]]
    r = [toyworld.reward(text, taste) for text in tokenizer.decode(y.flatten(0, 1).tolist())]
    ranked = sample_ranking(y, torch.tensor(r).view(rows, n), rng(settings["seed"], LABELS, purpose))
    if purpose == PAIRS:
        flipped = torch.rand(rows, generator=rng(settings["seed"], NOISE)) < settings["label_noise"]
        ranked[flipped] = ranked[flipped].flip(1)
    folder.save_tokens(f"{name}.npy", ranked)


def prepare_toy(folder, tokenizer):
    """Stories of the grammar and the model trained on them; with source toy, ranked samples of that model."""
    settings, seed = folder.settings, folder.settings["seed"]
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
            save(pretrain(stories, heldout, settings["sft_steps"], seed, settings["dim"]), path)
    if settings["source"] != "toy":
        return
    num_pairs = settings["num_pairs"]
    for name, rows, n, purpose in (("ranked", num_pairs // 2, 4, RANKED), ("pairs", num_pairs, 2, PAIRS),
                                   ("heldout_pairs", max(1, num_pairs // 8), 2, HELDOUT)):
        if not folder.has(f"{name}.npy"):
            save_labeled_samples(folder, tokenizer, name, rows, n, purpose)
    for suffix in (PROMPT_LENGTH, ".npy"):
        if folder.has(f"ranked{suffix}") and not folder.has(f"best{suffix}"):
            folder.save_tokens(f"best{suffix}", np.load(f"{folder.path}/ranked{suffix}"))


# ---------------------------------------------------------------------------------------------------
# Checkpoints, published ones and the user's, and samples of them

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
    check_length(folder.settings.get("max_new_tokens", 0), sft.args.max_seq_len)
    tokenizer = load_tokenizer(tokenizer_path, sft.args.vocab_size)
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 1 << 16:
        raise UserError(f"{tokenizer_path} has {tokenizer.vocab_size()} tokens and BOS {tokenizer.bos_id()}: this "
                        f"program needs BOS {BOS}, as llama2.c has it, and at most {1 << 16} tokens.")
    folder.check_input("init", file_hash(init))
    folder.check_input("tokenizer", file_hash(tokenizer_path))


def prepare_checkpoint(folder, init, tokenizer_path):
    """sft.pt and tokenizer.model: published ones, or the user's, a .bin converted -> the tokenizer."""
    if "init" not in folder.inputs:
        download_checkpoint(folder)
    for name, source in (("sft.pt", init), ("tokenizer.model", tokenizer_path)):
        if not folder.has(name):
            with folder.new_file(name) as path:
                if name == "sft.pt" and init.endswith(".bin"):
                    save(load(init), path)
                else:
                    shutil.copyfile(source, path)
    sft = load(f"{folder.path}/sft.pt")
    check_length(folder.settings.get("max_new_tokens", 0), sft.args.max_seq_len)
    return load_tokenizer(f"{folder.path}/tokenizer.model", sft.args.vocab_size)


def save_reference_samples(folder):
    """ref.npy, which continue the prompts of pairs.npy if it has any."""
    prompts = no_prompts(folder.settings["num_ref"])
    if folder.has(f"pairs{PROMPT_LENGTH}"):
        pairs = Responses(*(np.load(f"{folder.path}/pairs{suffix}") for suffix in (".npy", PROMPT_LENGTH)))
        prompts = pairs.prompts(torch.arange(len(prompts)) % len(pairs))
        folder.save_tokens(f"ref{PROMPT_LENGTH}", (prompts >= 0).sum(1))
    folder.save_tokens("ref.npy", sample_rows(folder, prompts, 1, REF))


def lacks_made_pairs(folder):
    return folder.settings["source"] == "made" and not folder.has("made.jsonl", *PAIR_FILES)


def save_made_pairs(folder, tokenizer):
    if not folder.has("made.npy"):
        folder.save_tokens("made.npy", sample_rows(folder, no_prompts(folder.settings["num_pairs"]), 2, MADE))
    made = [([], responses) for responses in make_pairs(folder, tokenizer)]  # samples begin without a prompt
    save_preferences(folder, "pairs", made, tokenizer.unk_id())


# ---------------------------------------------------------------------------------------------------
# Command line

KNOWN = (*toyworld.TASTES, *PUBLISHED)
LOWEST = dict(seed=0, num_stories=32, sft_steps=1, num_pairs=2, num_ref=2, max_new_tokens=1, reward_steps=0, dim=8,
              label_noise=0)
HIGHEST = dict(seed=2 ** 63 - 1, dim=1024, label_noise=0.5)
MOST = 10_000_000  # of what is counted: settings that end in a full memory would be kept in settings.json


def get_args(argv=None):
    """The command line; a flag that is not given is None."""
    p = Parser(description="Create a data folder for spo.py, or continue one; settings not given keep their values.")
    p.add_argument("model", help=f"{', '.join(KNOWN)}, tokenizer, or with --init any name")
    p.add_argument("--data", help="the folder (default: data/<model>)")
    p.add_argument("--init", help="a checkpoint of your own in llama2.c's format, .pt or version-0 .bin")
    p.add_argument("--tokenizer", help="that of --init, or the toy world's (default: tokenizer.model)")
    p.add_argument("--source", help="of preferences: made, released, a file or folder (default: toy's, or none)")
    p.add_argument("--judge", choices=(*toyworld.TASTES, "readability", "llm"),
                   help="of made pairs (default: <model>, or llm); readability needs no endpoint")
    p.add_argument("--seed", type=int, help="of stories, training and samples (default: 0)")
    p.add_argument("--num_stories", type=int, help="stories of the grammar to train on (default: 20000)")
    p.add_argument("--sft_steps", type=int, help="steps of that training (default: 1000)")
    p.add_argument("--dim", type=int, help="width of the toy model, a multiple of 8 (default: 64)")
    p.add_argument("--label_noise", type=float, help="toy: share of the labels in pairs.npy to flip, at most 0.5; "
                   "held-out pairs, rankings and best of n are never flipped (default: 0)")
    p.add_argument("--prompted", action="store_true", default=None, help="toy: responses continue a story's opening")
    p.add_argument("--num_pairs", type=int, help="pairs to sample; half as many rows of four (default: 4000)")
    p.add_argument("--num_ref", type=int, help="samples in ref.npy (default: 2000; --judge readability: 12000)")
    p.add_argument("--max_new_tokens", type=int, help="longest response and sample (default: as in training)")
    p.add_argument("--drop_long", action="store_true", default=None, help="leave out rows that would be cut")
    p.add_argument("--reward_steps", type=int, help="steps of fitting reward.pt (default: 1000; toy, readability: 0)")
    return check_args(p.parse_args(argv))


def check_args(args):
    """Refuses values that cannot be used -> args."""
    for name, lowest in LOWEST.items():
        value = getattr(args, name)
        highest = HIGHEST.get(name, MOST)
        if value is not None and not lowest <= value <= highest:
            raise UserError(f"--{name} is {value}, but must be from {lowest} to {highest}.")
    if args.dim is not None and args.dim % 8:
        raise UserError(f"--dim is {args.dim}, but must be a multiple of 8: four heads, each of an even width.")
    if not re.fullmatch(r"\w[\w.-]*", args.model, re.ASCII):
        raise UserError(f"{args.model} is not a name: give one of letters, digits, _, - and .")
    if args.init is not None and (args.model in toyworld.TASTES or args.tokenizer is None):
        raise UserError("--init needs --tokenizer, that of the checkpoint, and a name that is not the toy world's.")
    return args


def default_settings(model, source, judge):
    """The defaults of the settings that model and source read. judge: that of made pairs, if given."""
    toy = model in toyworld.TASTES
    defaults = dict(model=model, source=source)
    if toy:
        defaults.update(num_stories=20_000, sft_steps=1000, dim=toyworld.MODEL_ARGS["dim"])
    if source == "toy":
        defaults.update(prompted=False, label_noise=0.0)
    if source is not None:
        defaults.update(seed=0, num_ref=2000, reward_steps=None if toy else 1000,
                        max_new_tokens=model_defaults(model)["max_new_tokens"])
    if source in ("toy", "made"):
        defaults.update(num_pairs=4000)
    elif source is not None:
        defaults.update(drop_long=False)
    if source == "made":
        defaults.update(judge=model if toy else "llm")
        if judge == "readability":
            defaults.update(num_ref=12_000, reward_steps=None)  # evaluations ask it too, not a reward model
    return defaults


def set_settings(folder, args):
    """Sets folder.settings: the flags given, else the folder's earlier values, else the defaults."""
    toy = args.model in toyworld.TASTES
    if args.model not in KNOWN and args.init is None and "init" not in folder.inputs:
        raise UserError(f"{args.model} is none of {', '.join(KNOWN)}: for a checkpoint of your own give --init and "
                        "--tokenizer.")
    source = args.source or folder.settings.get("source") or ("toy" if toy else None)
    defaults = default_settings(args.model, source, args.judge or folder.settings.get("judge"))
    elsewhere = ("data", "init", "tokenizer") if toy or args.init else ("data",)  # not settings of the folder
    given = {name: value for name, value in vars(args).items() if value is not None and name not in elsewhere}
    for name in given:
        if name not in defaults:
            raise UserError(f"--{name} is not read by {args.model} with source {source}: leave it out.")
    if folder.settings:  # a folder of an earlier version, without these settings, was made with their defaults
        for name in {"dim", "label_noise"} & defaults.keys():
            folder.settings.setdefault(name, defaults[name])
    folder.merge_settings(given, defaults)


def check_inputs(folder, init, tokenizer_path):
    """Refuses what is wrong with what the user gave, or with the folder's files, before any work."""
    settings, names, published = folder.settings, CHECKPOINT_FILES, {}
    if settings["model"] in toyworld.TASTES:
        names = TOY_FILES
        load_tokenizer(tokenizer_path, toyworld.MODEL_ARGS["vocab_size"])
        folder.check_input("tokenizer", file_hash(tokenizer_path))
        folder.check_input("extras/toyworld.py", file_hash(toyworld.__file__))
        check_length(settings.get("max_new_tokens", 0), toyworld.MODEL_ARGS["max_seq_len"])
        if settings.get("prompted") and settings["max_new_tokens"] < 20:
            raise UserError(f"--max_new_tokens is {settings['max_new_tokens']}, but must be at least 20 with "
                            "--prompted, whose opening sentences count too.")
    elif init is not None:
        check_checkpoint(folder, init, tokenizer_path)
    elif "init" not in folder.inputs:
        published = {name: sha256 for name, (*_, sha256) in zip(names, PUBLISHED[settings["model"]])}
    folder.check_files(names + (SOURCE_FILES if settings["source"] else ()), published)
    if "init" in folder.inputs and init is None and not folder.has(*names):
        raise UserError(f"{folder.path} lacks {' or '.join(names)}: give --init and --tokenizer again.")
    if lacks_made_pairs(folder) and settings["judge"] == "llm":
        ask_test_question(2 * settings["num_pairs"])
    if lacks_made_pairs(folder) and settings["judge"] == "readability":
        check_num_ref(settings["num_ref"], f"{folder.path}/ref.npy")


def prepare(folder, init, tokenizer_path):
    """Makes the files that folder lacks. init: the user's checkpoint, or None."""
    settings, toy = folder.settings, folder.settings["model"] in toyworld.TASTES
    check_inputs(folder, init, tokenizer_path)
    preferences = read_preferences(folder)  # refuses malformed ones, before any work too
    if toy:
        tokenizer = load_tokenizer(tokenizer_path, toyworld.MODEL_ARGS["vocab_size"])
    else:
        tokenizer = prepare_checkpoint(folder, init, tokenizer_path)
    for name, rows in preferences.items():
        save_preferences(folder, name, encode_rows(tokenizer, rows), tokenizer.unk_id())
    if toy and preferences:
        print(wrap("evaluations are still judged by the toy world's expert; a reward model of your preferences "
                   "judges with --reward_steps 1000 here and --judge reward in training"))
    if toy:
        prepare_toy(folder, tokenizer)
    if settings["source"] is not None and not folder.has("ref.npy"):
        save_reference_samples(folder)
    if lacks_made_pairs(folder):
        save_made_pairs(folder, tokenizer)
    if settings.get("reward_steps") and not folder.has("reward.pt") and "no_reward_model" not in settings:
        save_reward_model(folder, DEVICE)
    folder.save()


def main(argv=None):
    args = get_args(argv)
    if args.model == "tokenizer":
        if any(value is not None for name, value in vars(args).items() if name not in ("model", "tokenizer")):
            raise UserError("the tokenizer has no other setting than --tokenizer, the file to create.")
        return train_tokenizer(args.tokenizer or "tokenizer.model")
    with open_folder(args.data or f"data/{args.model}") as folder:
        set_settings(folder, args)
        if folder.settings["model"] in toyworld.TASTES:
            limit_threads(f"{folder.path}/sft.pt")
        prepare(folder, args.init, args.tokenizer or "tokenizer.model")
    print(f"{folder.path} is ready")


if __name__ == "__main__":
    run_main(main)
