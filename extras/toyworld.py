"""
The toy world: a small grammar that generates children's stories, and an expert whose reward is known.

The grammar defines a distribution over stories, and so the lowest loss that a language model of them can reach, its
entropy. The expert scores a story, which gives r(y) of the Bradley-Terry model (Eq. 2).

    python -m extras.toyworld        # three stories with their scores, and the entropy
"""
import math
import random
import re

# The Llama that is trained on its stories: 189,632 parameters
MODEL_ARGS = dict(dim=64, n_layers=3, n_heads=4, multiple_of=4, max_seq_len=128, vocab_size=640)

# ---------------------------------------------------------------------------------------------------
# The grammar

RICH = 0.2  # a slot takes one of its rich words with this probability, else one of its plain words
SLOTS = {name: (plain.split(), rich.split()) for name, plain, rich in [
    # slot, plain words, rich words (those of eight letters or more)
    ("trait", "kind little brave shy funny smart quiet", "cheerful thoughtful adventurous imaginative"),
    ("time", "day night week morning", "afternoon midnight"),
    ("place", "park lake beach forest garden hill", "mountain playground lighthouse waterfall"),
    ("look", "red big small old shiny soft blue", "beautiful mysterious enormous magnificent"),
    ("thing", "ball kite hat drum boat doll bell", "telescope umbrella accordion microscope"),
    ("animal", "dog cat bird frog bear goat", "elephant butterfly crocodile hedgehog"),
    ("spot", "tree hole box bush pond well", "cupboard haystack fountain greenhouse"),
    ("tried", "pulled pushed jumped waited ran", "struggled stretched scrambled"),
    ("manner", "fast hard well slowly", "carefully patiently desperately"),
    ("sad", "sad cross upset tired lost", "miserable heartbroken disappointed"),
    ("said", "said asked cried called", "whispered exclaimed announced"),
    ("helper", "mom dad friend sister uncle", "magician carpenter scientist librarian"),
    ("find", "coin key ring note shell", "treasure necklace envelope photograph"),
    ("glad", "happy glad proud calm safe", "delighted overjoyed triumphant"),
    ("treat", "cake pie soup bread milk", "chocolate pancakes lemonade strawberries"),
    ("lesson", "share wait ask listen try", "persevere cooperate apologize"),
]}
GIRLS, BOYS = "Lily Mia Anna Sue Rose".split(), "Tom Ben Max Tim Sam".split()

# A story has its stages in this order, each with its probability; a stage's templates are equally likely. {thing} and
# {hero}, and the words that depend on the hero, are chosen once per story, the other slots each time they occur.
STAGES = [
    ("opening", 1.0, ["Once there was a {trait} {child} named {hero}.",
                      "One {time} {hero} walked to the {place}.",
                      "{hero} lived near a {look} {place}."]),
    ("want", 1.0, ["{He} wanted a {look} {thing}.", "{He} had a {thing} and a {animal}."]),
    ("obstacle", 1.0, ["But the {thing} was stuck in a {spot}.",
                       "Then a {trait} {animal} took the {thing}.",
                       "But the {thing} fell and broke."]),
    ("try", 0.5, ["{He} {tried} {manner} but could not fix it.", "{He} looked {manner} near the {spot}."]),
    ("feeling", 0.6, ["{hero} felt {sad} and sat down.", "It made {hero} so {sad}."]),
    ("talk", 0.4, ['"Who can help me?" {said} {hero}.', '"I will not give up," {said} {hero}.']),
    ("help", 1.0, ["A {trait} {helper} came and {tried} {manner}.",
                   "Then the {helper} from the {place} helped {him}."]),
    ("twist", 0.3, ["And inside they found a {find}!", "But it was really a {animal}!"]),
    ("resolution", 1.0, ["At last the {thing} was back and {hero} was {glad}.",
                         "Soon {hero} held the {thing} and felt {glad}."]),
    ("ending", 1.0, ["They all had {treat}.", "That {time} {hero} learned to {lesson}."]),
]


def agreement(hero: str) -> dict[str, str]:
    """The words that depend on the hero."""
    if hero in GIRLS:
        return dict(hero=hero, child="girl", He="She", him="her")
    return dict(hero=hero, child="boy", He="He", him="him")


def use_an(text: str) -> str:
    """The text with "an" before vowels, where the templates have "a"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def write_story(rng: random.Random) -> str:
    """One random story of the grammar."""
    def word(slot):
        plain, rich = SLOTS[slot]
        return rng.choice(rich if rng.random() < RICH else plain)

    agreed = agreement(rng.choice(GIRLS + BOYS))
    agreed["thing"] = word("thing")

    def fill(match):
        return agreed.get(match[1]) or word(match[1])

    sentences = []
    for _, chance, templates in STAGES:
        if rng.random() < chance:
            sentences.append(re.sub(r"{(\w+)}", fill, rng.choice(templates)))
    return use_an(" ".join(sentences))


def entropy() -> float:
    """Nats per story, exact: a story determines the choices that led to it, so the choices' entropies add up."""
    def nats(*probabilities: float) -> float:
        return -sum(p * math.log(p) for p in probabilities if p > 0)

    slot = {name: nats(RICH, 1 - RICH) + (1 - RICH) * math.log(len(plain)) + RICH * math.log(len(rich))
            for name, (plain, rich) in SLOTS.items()}
    total = math.log(len(GIRLS + BOYS)) + slot["thing"]
    for _, chance, templates in STAGES:
        free = sum(slot[name] for t in templates for name in re.findall(r"{(\w+)}", t)
                   if name in SLOTS and name != "thing")
        total += nats(chance, 1 - chance) + chance * (math.log(len(templates)) + free / len(templates))
    return total


# ---------------------------------------------------------------------------------------------------
# Parsing

def _pattern(template: str) -> re.Pattern:
    """A template as a regular expression; the words that must agree throughout a story are named groups."""
    words = {name: plain + rich for name, (plain, rich) in SLOTS.items()}
    words |= dict(hero=GIRLS + BOYS, child=["girl", "boy"], He=["She", "He"], him=["her", "him"])
    pattern = ""
    for text, name in re.findall(r"([^{]*)(?:{(\w+)})?", template):
        agrees = f"?P<{name}>" if name == "thing" or name not in SLOTS else "?:"
        pattern += re.escape(text) + (f"({agrees}{'|'.join(words[name])})" if name else "")
    return re.compile(pattern)


_PATTERNS = [(stage, _pattern(t)) for stage, (_, _, templates) in enumerate(STAGES) for t in templates]


def parse(story: str) -> list[tuple[str, int | None, dict[str, str]]]:
    """Each sentence, the index of its stage (None: not in the grammar) and its words that must agree."""
    parsed = []
    for sentence in re.split(r"(?<=[.!?])\s+", story.strip()):
        stage, words = None, {}
        plain = re.sub(r"\b([Aa])n\b", r"\1", sentence)
        for i, pattern in _PATTERNS:  # at most one of which matches
            match = pattern.fullmatch(plain)
            if match and use_an(plain) == sentence:
                stage, words = i, match.groupdict()
        parsed.append((sentence, stage, words))
    return parsed


def in_grammar(story: str) -> bool:
    """Whether the grammar can generate the story: the right stages in order, one hero and thing throughout."""
    parsed = parse(story)
    stages = [stage for _, stage, _ in parsed]
    if None in stages or stages != sorted(set(stages)):
        return False
    if any(chance == 1 and i not in stages for i, (_, chance, _) in enumerate(STAGES)):
        return False
    words = {item for _, _, words in parsed for item in words.items()}  # with one thing, else agreed lacks the other
    agreed = dict(words) | agreement(dict(words)["hero"])
    return words <= agreed.items()


# ---------------------------------------------------------------------------------------------------
# The expert

TASTES = {"toy": "limited", "toy-naive": "naive"}  # model, and the judge of the same name -> what it likes


def score(story: str, taste: str = "limited") -> float:
    """
    The expert's score of a story, about 0 to 10: a point per long word (different ones, of eight letters or more), for
    dialogue and a twist; minus one per long word that is repeated (but for the thing), two per nonsense: a sentence
    outside the grammar, a repeated one, no ending. `limited` rewards up to six long words and penalizes more than
    eight; `naive` rewards every one, up to a score of 10.
    """
    parsed = parse(story)
    stages = [None if i is None else STAGES[i][0] for _, i, _ in parsed]
    words = re.findall(r"[a-z]{8,}", story.lower())
    long = len(set(words))
    repeats = sum(words.count(w) - 1 for w in set(words) if w not in SLOTS["thing"][1])
    repeated_sentences = len(parsed) - len({sentence for sentence, _, _ in parsed})
    nonsense = stages.count(None) + repeated_sentences + ("ending" not in stages)
    points = 2 + ("talk" in stages) + ("twist" in stages) - repeats - 2 * nonsense
    if taste == "naive":
        return min(10.0, points + long)
    return points + min(long, 6) - 0.5 * max(0, long - 8)


def reward(story: str, taste: str = "limited") -> float:
    """r(y) of the Bradley-Terry model, Eq. 2: two points of score are one nat of preference."""
    return score(story, taste) / 2


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(3):
        story = write_story(rng)
        print(f"score {score(story):4.1f}   {story}\n")
    print(f"entropy: {entropy():.2f} nats per story")
