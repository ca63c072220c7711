"""The toy world's grammar and expert, against an enumeration and a story scored by hand."""
import itertools
import math
import re

import pytest

from extras import toyworld
from extras.tests.test_data import write_stories


def sentences_of(template, agreed):
    """(sentence, probability) of each way to fill in a template."""
    slots = [name for name in re.findall(r"{(\w+)}", template) if name not in agreed]
    choices = []
    for slot in slots:
        plain, rich = toyworld.SLOTS[slot]
        choices.append([(word, 0.8 / len(plain)) for word in plain] + [(word, 0.2 / len(rich)) for word in rich])
    for choice in itertools.product(*choices):
        words = iter([word for word, _ in choice])
        sentence = re.sub(r"{(\w+)}", lambda match: agreed.get(match[1]) or next(words), template)
        yield sentence, math.prod(p for _, p in choice)


def test_entropy_is_exact():
    """Stage by stage over every sentence of one hero and thing: all differ, and their entropies add up to entropy()."""
    agreed = {**toyworld.agreement("Mia"), "thing": "telescope"}
    things = dict(sentences_of("{thing}", {}))
    total = math.log(10) - sum(p * math.log(p) for p in things.values())
    seen = set()
    for _, chance, templates in toyworld.STAGES:
        stage = [(s, p * chance / len(templates)) for template in templates for s, p in sentences_of(template, agreed)]
        sentences = {sentence for sentence, _ in stage}
        assert len(sentences) == len(stage) and not sentences & seen
        seen |= sentences
        total -= sum(p * math.log(p) for _, p in stage)
        if chance < 1:
            total -= (1 - chance) * math.log(1 - chance)
    assert total == pytest.approx(toyworld.entropy(), rel=1e-9) and f"{total:.2f}" == "37.36"


STORY = ("Once there was a brave girl named Mia. She wanted a red telescope. But the telescope fell and broke. "
         '"Who can help me?" whispered Mia. A kind librarian came and pulled hard. But it was really a elephant! '
         "At last the telescope was back and Mia was delighted. They all had soup.")


@pytest.mark.parametrize("old, new, points", [
    ("Mia. She", "Rose. She", 0), ("They all had soup.", "", -2), ("fell and broke", "flew", -2),
    ("a red", "a enormous", 1), ("soup", "soup. They all had soup", -2), ("A kind librarian", "A kind mom", -1),
    ("soup", "chocolate", 1), ("soup", "soup. A whispered", -3), ('"Who can help me?" whispered Mia. ', "", -2),
])
def test_the_score_of_a_changed_story(old, new, points):
    # telescope, whispered, librarian, elephant, delighted; dialogue; twist
    assert toyworld.score(STORY) == 2 + 5 + 1 + 1 and toyworld.reward(STORY) == 4.5 and old in STORY
    assert toyworld.score(STORY.replace(old, new)) == 9 + points


def test_the_grammar_knows_its_own_stories():
    assert all(map(toyworld.in_grammar, [STORY, *write_stories(300)]))
    assert [toyworld.score(story) for story in write_stories(3)] == [3.0, 3.0, 4.0]
    changes = [("and Mia was", "and Rose was"), ("She wanted", "He wanted"), ("the telescope was", "the kite was")]
    for old, new in changes:
        assert old in STORY and not toyworld.in_grammar(STORY.replace(old, new))
    for story in write_stories(60):
        sentences = [sentence for sentence, _, _ in toyworld.parse(story)]
        for broken in (sentences[::-1], sentences[:1] + sentences, sentences[:-1]):
            assert not toyworld.in_grammar(" ".join(broken))


def test_more_than_eight_long_words_are_too_many_for_one_taste():
    purple = STORY
    for old, new in (("brave", "imaginative"), ("a red", "a magnificent"), ("hard", "patiently"), ("soup", "pancakes")):
        purple = purple.replace(old, new)
    assert toyworld.score(purple) == 2 + 6 - 0.5 + 2 and toyworld.score(purple, "naive") == 10
