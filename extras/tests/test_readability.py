"""
The judge without an endpoint: hand-counted texts, and damaged stories, which must lose. As a program it prints the
table of docs/data.md (2 minutes on one core):

    python -m extras.tests.test_readability data/stories260K
"""
import collections
import json
import random
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch

import prepare_data
import spo
from extras import judge, readability
from extras.readability import Readability, grade_level, split_text
from extras.tests.conftest import TOKENIZER
from extras.tests.test_data import write_stories
from extras.token_files import pad
from model import UserError, generate, load, load_tokenizer


def join(sentences):
    return " ".join(" ".join(words) + "." for words in sentences)


def keep(text, rng):
    return text


def shuffle_sentences(text, rng):
    return join([rng.sample(words, len(words)) for words in split_text(text)[0]])


def shuffle_text(text, rng):
    sentences, _ = split_text(text)
    words = [word for sentence in sentences for word in sentence]
    rng.shuffle(words)
    return join([[words.pop() for _ in sentence] for sentence in sentences])


def replace_words(text, rng, share, words):
    return " ".join(re.sub(r"[\w'-]+", rng.choice(words), piece, count=1) if rng.random() < share else piece
                    for piece in text.split())


def say_twice(text, rng):
    sentences, _ = split_text(text)
    return join(2 * sentences[:len(sentences) // 2])


def cut(text, rng):
    return text[:len(text) // 2]


def win_rate(readability, texts, ref_texts):
    """The share of pairs in which the text has the higher score, ties as halves."""
    scores = [[readability.score(text) for text in part] for part in (texts, ref_texts)]
    return np.mean([(a > b) + (a == b) / 2 for a in scores[0] for b in scores[1]])


def test_the_grade_of_texts_counted_by_hand():
    """Also the formula's usual example: 639 letters, 119 words and 5 sentences are grade 14.5."""
    sentences, rest = split_text('The old man had a dog. "He ran \u2013 home!" \n Then it was d')
    assert sentences == [["the", "old", "man", "had", "a", "dog"], ["he", "ran", "home"]]
    assert rest == ["then", "it", "was"]
    assert grade_level(sentences) == pytest.approx(0.0588 * 2500 / 9 - 0.296 * 200 / 9 - 15.8)
    words = 44 * ["sixsix"] + 75 * ["fives"]
    assert grade_level([words[i::5] for i in range(5)]) == pytest.approx(14.5, abs=0.05)
    assert grade_level([words[i::10] for i in range(10)]) < 14
    assert grade_level([]) == 0


def test_shares_counted_by_hand():
    texts = ["The children carried lanterns through the forest.", "The soldiers carried children beyond the mountain."]
    known = Readability([*texts, texts[0], texts[1], "Mispelt."])

    def shares(text):
        measured = known.measure(text)
        return [measured[name] for name in ("unknown_words", "unseen_pairs", "unseen_trigrams", "repeated_trigrams")]

    assert shares(texts[0]) == shares(texts[1][:-12]) == [0, 0, 0, 0]   # "... beyond the mou"
    assert shares("The children carried children beyond the forest.") == pytest.approx([0, 0, 2 / 7, 0])
    assert shares("The children carried mispelt through the forest.") == pytest.approx([1 / 7, 2 / 8, 3 / 7, 0])
    assert shares("The lanterns carried children beyond the forest.") == pytest.approx([0, 2 / 8, 4 / 7, 0])
    assert shares(f"{texts[0]} {texts[0]}") == pytest.approx([0, 0, 1 / 15, 7 / 15])
    assert shares("") == shares("cut") == [0, 0, 0, 0] and known.score("") == known.score("cut") == 0


def test_the_score_is_the_formula_and_every_damage_costs_points():
    known, rng, seen = Readability(write_stories(2000, seed=0)), random.Random(1), set()
    words = sorted(known.words)
    damages = (keep, cut, say_twice, shuffle_sentences, shuffle_text,
               partial(replace_words, share=0.3, words=words), partial(replace_words, share=0.1, words=["xyzzy"]))
    means = []
    for damage in damages:
        scores = []
        for story in write_stories(100, seed=2):
            text = damage(story, rng)
            m = known.measure(text)
            parts = (min(m["grade"], 7) / 0.7, 17 * max(0, m["unseen_pairs"] - 0.1),
                     15 * max(0, m["unseen_trigrams"] - 0.55), 10 * m["unknown_words"], 20 * m["repeated_trigrams"])
            length = min(1, sum(map(len, split_text(text)[0])) / 30)
            assert m["score"] == pytest.approx(length * max(0, parts[0] - sum(parts[1:])), abs=0.051)
            assert 0 <= m["score"] <= 10 and m["score"] == known.score(text)
            seen |= {i for i, part in enumerate(parts) if part > 0.1 and m["score"] > 0}
            scores.append(m["score"])
        means.append(np.mean(scores))
    assert seen == {0, 1, 2, 3, 4}  # each of the formula's parts was not zero in some text
    intact, *damaged = means
    assert all(mean < intact - 0.2 for mean in damaged), means
    long = Readability(["Extraordinarily knowledgeable grandparents " * 20 + "."])
    assert long.score(" ".join(sorted(known.words, key=len)[-40:]) + ".") == 0


def test_broken_stories_lose_and_harder_ones_win():
    known, rng, ref_texts = Readability(write_stories(2000, seed=0)), random.Random(1), write_stories(300, seed=1)
    texts = sorted(write_stories(300, seed=2), key=lambda text: grade_level(split_text(text)[0]))
    assert 0.45 < win_rate(known, texts, ref_texts) < 0.55
    assert win_rate(known, texts[:60], ref_texts) < 0.35 and win_rate(known, texts[-60:], ref_texts) > 0.65
    for damage in (shuffle_sentences, shuffle_text, say_twice):
        assert win_rate(known, [damage(text, rng) for text in texts[-60:]], ref_texts) < 0.3, damage


def to_tokens(tokenizer, stories, n=1):
    """The stories as rows of n -> (N, n, 101)."""
    tokens = [story[:99] for story in tokenizer.encode(stories)]
    lengths = np.array([len(story) for story in tokens]).reshape(-1, n)
    return torch.from_numpy(pad(np.concatenate(tokens), lengths, 101).astype(int))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(judge, "NUM_REF", 20)
    monkeypatch.setattr(judge, "MIN_DICTIONARY", 30)


def test_an_evaluation_compares_with_samples_that_are_not_in_the_dictionary(world, tmp_path, few):
    tokenizer = load_tokenizer(TOKENIZER, 640)
    ref_texts, texts = write_stories(50, seed=0), write_stories(30, seed=1)
    y_ref, y = (to_tokens(tokenizer, part)[:, 0] for part in (ref_texts, texts))
    np.save(tmp_path / "ref.npy", y_ref[:, None].numpy().astype(np.uint16))
    flags = ["--data", str(tmp_path), "--init", f"{world}/sft.pt", "--judge", "readability"]
    result = judge.make_judge(spo.get_args(flags), tokenizer, y_ref[:20])(y)
    known, other = Readability(ref_texts[20:]), Readability(ref_texts)
    for name in ("unknown_words", "unseen_trigrams"):
        assert result[name] == pytest.approx(np.mean([known.measure(text)[name] for text in texts]))
        assert result[name] > np.mean([other.measure(text)[name] for text in texts])
    assert result["win_rate"] == pytest.approx(win_rate(known, texts, ref_texts[:20]), abs=1e-6)
    assert result["reward"] == pytest.approx(np.mean([known.score(text) for text in texts]), abs=1e-6)
    assert result["judge"] == "readability"
    np.save(tmp_path / "ref.npy", y_ref[:49, None].numpy().astype(np.uint16))
    with pytest.raises(UserError, match="49 samples in .*ref.npy are too few .*--num_ref 12000"):
        judge.make_judge(spo.get_args(flags), tokenizer, y_ref[:20])


def test_made_pairs_prefer_the_story_that_is_not_shuffled(published, few, monkeypatch):
    """The whole protocol without an endpoint; the samples are stories, every second one of the pairs' shuffled."""
    data, run = published
    tokenizer, asked = load_tokenizer(TOKENIZER, 640), {}

    def sample_rows(folder, prompts, n, purpose):
        asked[purpose] = len(prompts)
        rows = min(len(prompts), 500)  # of those of ref.npy, to save time
        stories = write_stories(rows * n, seed=purpose)
        if purpose == prepare_data.MADE:
            stories[1::2] = [shuffle_text(story, random.Random(0)) for story in stories[1::2]]
        return to_tokens(tokenizer, stories, n)

    monkeypatch.setattr(prepare_data, "sample_rows", sample_rows)
    flags = ["--source", "made", "--judge", "readability", "--num_pairs", "100"]
    with pytest.raises(UserError, match="49 samples in .*ref.npy are too few"):
        run(*flags, "--num_ref", "49")
    assert not asked
    run(*flags)
    run()
    settings = json.loads((data / "settings.json").read_text())["settings"]
    assert settings["reward_steps"] is None and "no_reward_model" not in settings and not (data / "reward.pt").exists()
    assert asked == {prepare_data.REF: 12_000, prepare_data.MADE: 100}
    records = [json.loads(line) for line in (data / "made.jsonl").read_text().splitlines()]
    assert len(records) > 50 and {record["better"] for record in records} == {0}
    for record in records:
        (a, b, first), (c, d, second) = record["verdicts"]
        assert (a, b) == (d, c) and 3 <= a - b <= 10 and (first, second) == (1, 2) and record["judge"] == "readability"


# Harder than the samples of stories260K, in the manner of old children's books; the second and third with rarer words
HARDER = [
    """Long ago, in a little house at the edge of the forest, there lived an old woman who had a gray cat and
a garden full of flowers. Every morning she carried water from the river, and every evening she sat by the
window and watched the birds fly home to their nests. One winter the snow was so deep that nobody could reach
the house, and the old woman was afraid that she would have nothing to eat. But the cat, who was very clever,
went out into the cold and came back with a small silver key in her mouth. The old woman wondered what the key
could open, so she looked in every corner until she found a wooden box under the stairs. Inside the box there
was enough bread for the whole winter, and she thanked the cat and never again complained about the snow.""",
    """When the children came down to the harbour the next morning, the boat had already gone, and there was
nothing to see but a long white line upon the water. Peter, who was the eldest, said that they must be
sensible about it; but Anna sat upon an overturned basket and cried until her handkerchief was quite wet. "It
is of no use to cry," said the old sailor kindly, "for the tide that carries a boat away will very often carry
it back again." So they waited all the afternoon among the ropes and the barrels, and ate their bread and
cheese, and listened to stories about islands where the parrots talk in seven languages. Just as the sun was
setting, a brown sail appeared behind the lighthouse, and Anna forgot at once that she had ever been unhappy.""",
    """There was once a rabbit who was not at all satisfied with his ears. They were much too long, he
thought, and whenever he hid in the grass they stood up above it so that everybody could see exactly where he
was. One day he asked the wise owl whether ears could be made shorter, and the owl, who was sleepy and wanted
to be left alone, told him that he only had to keep them in the cold stream from morning until night. The poor
rabbit sat by the stream for the whole day, and because his ears were under the water he did not hear the fox
who came creeping through the trees. It was lucky for him that a small frog jumped upon his nose and shouted
as loudly as it could. After that the rabbit was proud of his ears, and he carried them as high as he possibly
could.""",
    """Tom and his sister had a secret place behind the barn where nobody ever looked for them. It was nothing
but a hole under an old apple tree, but they had covered it with branches and put a blanket on the ground, and
when it rained they could sit there and hear the drops fall on the leaves. One afternoon they found that
somebody had been there before them, because the blanket was folded and a red apple was lying in the middle of
it. They were a little frightened at first, but then Tom said that a thief would have taken the blanket and
would not have left an apple. So they wrote a letter to say thank you, and in the morning the letter was gone
and there were two apples in its place."""]


def write_chains(n, ngrams, rng):
    """n texts in which every n-gram is one of ngrams: each next word is the longest of three that may follow."""
    following = collections.defaultdict(list)
    for *start, word in sorted(ngrams):
        following[tuple(start)].append(word)
    starts = [start for start in following if start[0] == "."]
    texts = []
    for _ in range(n):
        tokens = list(rng.choice(starts))
        order = len(tokens)
        while len(tokens) < 120 and tuple(tokens[-order:]) in following:
            tokens.append(max(rng.choices(following[tuple(tokens[-order:])], k=3), key=len))
        texts.append(" ".join(tokens[1:]).replace(" .", "."))
    return texts


def print_table(data):
    """How the judge sees samples of data/sft.pt, damaged in several ways, against those in ref.npy."""
    model = load(f"{data}/sft.pt")
    tokenizer = load_tokenizer(f"{data}/tokenizer.model", model.args.vocab_size)
    known = judge.load_readability(f"{data}/ref.npy", model.args, tokenizer)
    ref_texts = tokenizer.decode(np.load(f"{data}/ref.npy")[:judge.NUM_REF, 0].tolist())
    rng, words = random.Random(0), sorted(known.words)

    def sample(temperature, length):
        generator, sampler = spo.rng(0, "readability", temperature, length), partial(generate, temperature=temperature)
        return spo.sample(model, spo.no_prompts(512), length, generator, sampler)

    y = sample(1.0, 400)
    texts = tokenizer.decode(y[:, :256].tolist())
    by_grade = sorted(texts, key=lambda text: grade_level(split_text(text)[0]))
    rows = {"fresh samples, 255 tokens": texts, "128 tokens": tokenizer.decode(y[:, :129].tolist()),
            "400 tokens": tokenizer.decode(y.tolist()), "first half of the text": [cut(text, rng) for text in texts]}
    rows["tenth of the highest grade"], rows["tenth of the lowest"] = by_grade[-51:], by_grade[:51]
    for i, text in enumerate(HARDER):
        rows[f"text {i + 1} written by hand"] = 2 * [text]  # a standard error needs two
    for temperature in (0.7, 1.3, 1.5):
        rows[f"temperature {temperature}"] = tokenizer.decode(sample(temperature, 255).tolist())
    rows["shuffled within sentences"] = [shuffle_sentences(text, rng) for text in texts]
    rows["shuffled within the text"] = [shuffle_text(text, rng) for text in texts]
    rows["first half of sentences, twice"] = [say_twice(text, rng) for text in texts]
    for share in (0.1, 0.3, 1.0):
        rows[f"{share:.0%} random dictionary words"] = [replace_words(text, rng, share, words) for text in texts]
    long = sorted(words, key=len)[-300:]
    rows["long dictionary words only"] = [replace_words(text, rng, 1.0, long) for text in texts]
    rows['"and" for the end of sentences'] = [re.sub(r'[.!?]+["\']?(?= )', " and", text) for text in texts]
    rows["chains of pairs, long words"] = write_chains(200, known.pairs, rng)
    rows["chains of trigrams, long words"] = write_chains(200, known.trigrams, rng)
    names = ("score", "grade", "unknown_words", "unseen_pairs", "unseen_trigrams", "repeated_trigrams")
    print("win rate", *names, sep=" | ")
    for label, texts in rows.items():
        measured = [[known.measure(text)[name] for name in names] for text in texts]
        means = " | ".join(f"{x:.2f}" for x in np.mean(measured, 0))
        print(f"| {label} | {win_rate(known, texts, ref_texts):.2f} | {means} |", flush=True)
    scores = [known.score(text) for text in ref_texts]
    kept = np.mean([abs(a - b) >= 3 for a, b in zip(scores[::2], scores[1::2])])
    print(f"standard deviation of the score {np.std(scores):.2f}; E.1's filter keeps {kept:.3f} of pairs")


if __name__ == "__main__":
    print_table(sys.argv[1])
