"""
A judge of stories without an LLM, for Appendix E.1's question, which of two suits older readers: a published grade
formula, less points for what the reference model would not write, and for repetition. The standard library alone.

    Readability(texts).measure("Once upon a time ...")     # texts: 10,000 samples of the reference model

docs/data.md has how its constants were chosen, and what it cannot see.
"""
import collections
import re

END_OF_SENTENCE = re.compile(r"[.!?]+[\"'”’)]*(?:\s+|$)")
PUNCTUATION = ".,;:!?\"'“”‘’()-–—…"  # around words

# Fixed on samples of the reference and on damaged ones, before any training result was looked at
MAX_GRADE = 7         # earns 10 points, as every higher grade does
POINTS_PAIR = 17      # that a share of 1 costs: of pairs of neighbors that the reference model never wrote,
USUAL_PAIR = 0.1      # beyond this share, which is free: fresh samples of stories260K have 0.09;
POINTS_TRIGRAM = 15   # of such trigrams,
USUAL_TRIGRAM = 0.55  # beyond this share: three standard deviations above that of fresh samples, 0.30;
POINTS_UNKNOWN = 10   # of unknown words;
POINTS_REPEATED = 20  # of repeated trigrams
MIN_WORDS = 30        # in finished sentences; the score of a shorter text is lowered in proportion


def split_words(text):
    """The words of a text, in lower case and without the punctuation around them."""
    words = [piece.strip(PUNCTUATION) for piece in text.lower().split()]
    return [word for word in words if word]


def split_text(text):
    """
    The finished sentences of a text as lists of words, and the words of the unfinished one at its end, but for the
    last word: at the length limit, both may have been cut.
    """
    *finished, rest = END_OF_SENTENCE.split(text)
    sentences = [words for words in map(split_words, finished) if words]
    return sentences, split_words(rest)[:-1]


def grade_level(sentences):
    """
    The US school grade by Coleman and Liau, A computer readability formula designed for machine scoring, Journal of
    Applied Psychology 60(2), 1975. However long a sentence is, it adds at most 3 grades to sentences of 10 words.
    """
    words = [word for sentence in sentences for word in sentence]
    if not words:
        return 0.0
    letters = sum(char.isalnum() for word in words for char in word)
    return 0.0588 * 100 * letters / len(words) - 0.296 * 100 * len(sentences) / len(words) - 15.8


def find_ngrams(sentences, rest, n):
    """All runs of n words of a text, with "." as a word at its start and after each finished sentence."""
    tokens = ["."]
    for sentence in sentences:
        tokens += [*sentence, "."]
    tokens += rest
    return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]


def share_outside(items, known):
    """The share of items that are not in known; 0 where there are no items."""
    return sum(item not in known for item in items) / max(1, len(items))


class Readability:
    """The judge whose reference model wrote texts. words: those written at least twice (once: mostly misspelled)."""

    def __init__(self, texts):
        counts = collections.Counter()
        self.pairs, self.trigrams = set(), set()
        for text in texts:
            sentences, rest = split_text(text)
            counts.update(word for words in (*sentences, rest) for word in words)
            self.pairs.update(find_ngrams(sentences, rest, 2))
            self.trigrams.update(find_ngrams(sentences, rest, 3))
        self.words = {word for word, count in counts.items() if count >= 2}

    def measure(self, text):
        """
        The score of a text, from 0 to 10, and what it is made of -> dict: grade; the shares of its words, pairs of
        neighbors and trigrams that the reference model did not write, unknown_words, unseen_pairs, unseen_trigrams;
        and repeated_trigrams, the share of trigrams that the text already had.
        """
        sentences, rest = split_text(text)
        words = [word for words in (*sentences, rest) for word in words]
        trigrams = find_ngrams(sentences, rest, 3)
        grade = grade_level(sentences)
        unknown = share_outside(words, self.words)
        unseen_pairs = share_outside(find_ngrams(sentences, rest, 2), self.pairs)
        unseen_trigrams = share_outside(trigrams, self.trigrams)
        repeated = (len(trigrams) - len(set(trigrams))) / max(1, len(trigrams))
        points = 10 * min(grade, MAX_GRADE) / MAX_GRADE
        points -= POINTS_PAIR * max(0.0, unseen_pairs - USUAL_PAIR)
        points -= POINTS_TRIGRAM * max(0.0, unseen_trigrams - USUAL_TRIGRAM)
        points -= POINTS_UNKNOWN * unknown + POINTS_REPEATED * repeated
        finished = sum(map(len, sentences))
        score = max(0.0, points) * min(1.0, finished / MIN_WORDS)
        return dict(score=round(score, 1), grade=grade, unknown_words=unknown, unseen_pairs=unseen_pairs,
                    unseen_trigrams=unseen_trigrams, repeated_trigrams=repeated)

    def score(self, text):
        return self.measure(text)["score"]
