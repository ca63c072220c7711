"""The toy world's grammar and expert, against an enumeration and a story scored by hand."""
import math
import re

import pytest

from extras import toyworld
from extras.tests.test_data import write_stories


def fill_in(template, words):
    """(sentence, probability) of each way to fill in a template. words: slot -> {word: probability}."""
    slot = re.search(r"{(\w+)}", template)
    if slot is None:
        return [(template, 1.0)]
    sentences = []
    for word, p in words[slot[1]].items():
        rest = fill_in(template.replace(slot[0], word, 1), words)
        sentences += [(sentence, p * q) for sentence, q in rest]
    return sentences


def nats(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def test_entropy_is_exact():
    """Stage by stage over every sentence of one hero and thing: all differ, and their entropies add up to entropy()."""
    words = {}
    for slot, (plain, rich) in toyworld.SLOTS.items():
        words[slot] = dict.fromkeys(plain, 0.8 / len(plain)) | dict.fromkeys(rich, 0.2 / len(rich))
    total = math.log(10) + nats(words["thing"].values())
    words["thing"] = {"telescope": 1.0}
    for name, word in toyworld.agreement("Mia").items():
        words[name] = {word: 1.0}
    sentences = []
    for _, chance, templates in toyworld.STAGES:
        total += nats([1 - chance])
        for template in templates:
            for sentence, p in fill_in(template, words):
                sentences.append(sentence)
                total += nats([p * chance / len(templates)])
    assert len(set(sentences)) == len(sentences)
    assert total == pytest.approx(toyworld.entropy(), rel=1e-9) and f"{total:.2f}" == "37.36"


STORY = ("Once there was a brave girl named Mia. She wanted a red telescope. But the telescope fell and broke. "
         '"Who can help me?" whispered Mia. A kind librarian came and pulled hard. But it was really an elephant! '
         "At last the telescope was back and Mia was delighted. They all had soup.")


@pytest.mark.parametrize("old, new, points", [
    ("Mia. She", "Rose. She", 0),
    ("fell and broke", "flew", -2),
    ("a red", "an enormous", 1),
    ("a red", "a enormous", -1),
    ("a red", "an red", -2),
    ("soup", "soup. They all had soup", -2),
    ("A kind librarian", "A kind mom", -1),
    ("soup", "soup. A whispered", -3),
    ('"Who can help me?" whispered Mia. ', "", -2),
])
def test_the_score_of_a_changed_story(old, new, points):
    # telescope, whispered, librarian, elephant, delighted; dialogue; twist
    assert toyworld.score(STORY) == 2 + 5 + 1 + 1 and toyworld.reward(STORY) == 4.5
    assert toyworld.score(STORY.replace(old, new)) == 9 + points


def test_the_grammar_knows_its_own_stories():
    assert all(map(toyworld.in_grammar, [STORY, *write_stories(300)]))
    sentences = [sentence for sentence, _, _ in toyworld.parse(STORY)]
    broken = [" ".join(order) for order in (sentences[::-1], sentences[:1] + sentences, sentences[:-1])]
    for old, new in (("and Mia", "and Rose"), ("She", "He"), ("the telescope was", "the kite was")):
        broken.append(STORY.replace(old, new))
    assert not any(map(toyworld.in_grammar, broken))


def test_more_than_eight_long_words_are_too_many_for_one_taste():
    purple = STORY
    changes = (("a brave", "an imaginative"), ("a red", "a magnificent"), ("hard", "patiently"), ("soup", "pancakes"))
    for old, new in changes:
        purple = purple.replace(old, new)
    assert toyworld.score(purple) == 2 + 6 - 0.5 + 2 and toyworld.score(purple, "naive") == 10
