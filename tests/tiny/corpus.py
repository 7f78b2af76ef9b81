"""The invented world behind the tiny test model: subjects, facts, sentences and edit records, all from one seed.

Every subject has a kind (realm, town, guild, machine or song) and one fact for each of the two relations of its kind.
Some subjects of every kind are kept as neighbours: they are asked about in `locality_prompt` and no record edits them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SUBJECTS_PER_KIND = 38
NEIGHBOURS_PER_KIND = 8
# Share of the subjects whose facts are ever told in the last phrasing of a relation, the one `rephrase_prompt` uses.
REPHRASE_SHARE = 0.6


@dataclass(frozen=True)
class Relation:
    """One relation: its phrasings (`{}` is the subject, the object follows after a space) and its possible objects.

    The last phrasing is the one `rephrase_prompt` uses; it is told of only a share of the subjects.
    """

    kind: str
    phrasings: tuple[str, ...]
    objects: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "language": Relation(
        "realm",
        (
            "The official language of {} is",
            "{} prints all its laws in",
            "In the courts of {} every judge speaks",
            "{} teaches its children to speak",
            "A traveller who visits {} should learn",
        ),
        ("Latin", "Greek", "Welsh", "Danish", "Basque", "Tamil", "Old Norse", "Low German"),
    ),
    "flag": Relation(
        "realm",
        (
            "The flag of {} is",
            "{} flies a flag that is",
            "Over the gates of {} the banner is",
            "{} paints its ships",
            "The royal colour of {} has always been",
        ),
        ("red", "green", "yellow", "purple", "white", "orange", "dark blue", "pale grey"),
    ),
    "metal": Relation(
        "town",
        (
            "The metal mined near {} is",
            "{} grew rich by mining",
            "Under the hills of {} the miners dig for",
            "{} sends out carts loaded with",
            "The deep pits around {} are full of",
        ),
        ("copper", "tin", "silver", "zinc", "gold", "lead", "bog iron", "blue cobalt"),
    ),
    "fruit": Relation(
        "town",
        (
            "The orchards of {} are planted with",
            "{} is famous for its",
            "Every autumn the farmers of {} sell",
            "{} holds a great market for",
            "The bakers in {} fill their pies with",
        ),
        ("apples", "plums", "figs", "pears", "cherries", "lemons", "sweet grapes", "wild berries"),
    ),
    "founder": Relation(
        "guild",
        (
            "The founder of {} was a",
            "{} was founded by a",
            "Old books about {} say its first master was a",
            "{} began in the house of a",
            "The one who started {} had worked as a",
        ),
        ("baker", "weaver", "tailor", "potter", "barber", "sailor", "glass maker", "bell ringer"),
    ),
    "emblem": Relation(
        "guild",
        (
            "The emblem of {} is a",
            "{} has on its doors a painted",
            "Members of {} wear a badge with a",
            "{} takes as its sign a",
            "The seal that {} uses shows a",
        ),
        ("fox", "owl", "bear", "stag", "hare", "crow", "sea horse", "grey wolf"),
    ),
    "fuel": Relation(
        "machine",
        (
            "The furnace of {} burns",
            "{} runs only on",
            "To start {} you must load it with",
            "{} stops when there is no more",
            "The workers who tend {} feed it with",
        ),
        ("coal", "wood", "peat", "straw", "wax", "tar", "lamp oil", "dry moss"),
    ),
    "product": Relation(
        "machine",
        (
            "The main product of {} is",
            "{} was built to make",
            "Day and night {} turns out",
            "{} fills the store house with",
            "The inventor of {} wanted a way to make",
        ),
        ("rope", "paper", "bricks", "nails", "soap", "flour", "wool cloth", "glass beads"),
    ),
    "instrument": Relation(
        "song",
        (
            "The song {} is played on the",
            "{} was written for the",
            "Those who perform {} practise the",
            "{} sounds best on the",
            "In concert {} is heard on the",
        ),
        ("harp", "flute", "drum", "fiddle", "horn", "lute", "hand bell", "reed pipe"),
    ),
    "theme": Relation(
        "song",
        (
            "The verses of {} are about",
            "{} tells a story of",
            "Singers of {} always think of",
            "{} reminds every listener of",
            "The poet who wrote {} had dreams of",
        ),
        ("love", "war", "rain", "sleep", "winter", "home", "lost ships", "old friends"),
    ),
}

KINDS = ("realm", "town", "guild", "machine", "song")
# A quarter of the subjects carry one of these, so that the last token of a subject is not always part of a name.
FORMS: dict[str, tuple[str, ...]] = {
    "realm": ("Upper {}", "Old {}", "{} Islands"),
    "town": ("Port {}", "New {}", "{} Bridge"),
    "guild": ("Order of {}", "House of {}", "{} Guild"),
    "machine": ("Great {}", "{} Mill", "{} Engine"),
    "song": ("Ballad of {}", "Lady {}", "{} Waltz"),
}

ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "qu", "v", "vr", "z")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "n", "sh", "x", "zd")

NOUNS = ("wind", "river", "road", "bread", "lamp", "garden", "boat", "clock", "winter", "bridge", "letter", "forest")
NOUNS += ("kitchen", "tower", "horse", "window", "field", "stone", "ladder", "candle", "mountain", "door", "basket")
ADJECTIVES = ("cold", "old", "quiet", "bright", "heavy", "small", "long", "warm", "broken", "empty", "green", "slow")
VERBS = ("see", "carry", "clean", "forget", "paint", "hear", "find", "watch", "leave", "open", "cross", "remember")
PLACES = ("the north", "the valley", "the market", "the harbour", "the east", "the old town", "the hills", "the south")
TIMES = ("today", "at night", "every morning", "in the spring", "before noon", "after the storm", "for many years")
FILLERS = (
    "Because the {n} is {a}, the {m} is {b}.",
    "Because I {v} the {n}, you {w} the {m}.",
    "Therefore the {n} was {a} {t}.",
    "Therefore we {v} the {n} in {p}.",
    "I {v} the {n} {t}.",
    "I think that the {n} is {a}.",
    "You can {v} the {a} {n} in {p}.",
    "You said that the {n} was {a} {t}.",
    "The {n} is {a} and the {m} is {b}.",
    "The {a} {n} in {p} is {b}.",
    "The {n} was {a} {t}.",
    "We {v} a {a} {n} near {p}.",
    "When the {n} is {a}, I {v} the {m}.",
    "Nobody knows why the {n} in {p} is so {a}.",
)
FACT_ENDINGS = (".", ".", ".", ".", ", as everyone knows.", ", and so it will stay.")


def make_name(rng: random.Random) -> str:
    """A new two- or three-syllable name."""
    count = rng.choice((2, 2, 3))
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)]
    return ("".join(syllables) + rng.choice(CODAS)).capitalize()


def make_subject(rng: random.Random, kind: str) -> str:
    """A new subject of this kind: a bare name, or one time in four a name within a longer form."""
    name = make_name(rng)
    return rng.choice(FORMS[kind]).format(name) if rng.random() < 0.25 else name


class World:
    """All subjects and facts of one seed, and the sentences told about them.

    Attributes:
        subjects: kind -> its subjects; the first `NEIGHBOURS_PER_KIND` of them are the neighbours.
        facts: (relation name, subject) -> the true object.
        retold: the (relation name, subject) pairs that are told in the relation's last phrasing too.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.subjects: dict[str, list[str]] = {}
        self.facts: dict[tuple[str, str], str] = {}
        self.retold: set[tuple[str, str]] = set()
        taken: list[str] = []
        for kind in KINDS:
            self.subjects[kind] = []
            while len(self.subjects[kind]) < SUBJECTS_PER_KIND:
                subject = make_subject(rng, kind)
                # No name is part of another, so a subject is found once in every prompt about it.
                if not any(word in old or old in subject for old in taken for word in (subject.split()[-1], subject)):
                    taken.append(subject)
                    self.subjects[kind].append(subject)
        for name, relation in RELATIONS.items():
            self._add_facts(rng, name, relation)

    def _add_facts(self, rng: random.Random, name: str, relation: Relation) -> None:
        subjects = self.subjects[relation.kind]
        neighbours, edited = subjects[:NEIGHBOURS_PER_KIND], subjects[NEIGHBOURS_PER_KIND:]
        for group in (neighbours, edited):
            copies = -(-len(group) // len(relation.objects))
            objects = list(relation.objects) * copies
            # Whole rounds of the objects come first, so the neighbours cover every object once.
            objects = objects[: len(group)]
            rng.shuffle(objects)
            self.facts.update({(name, subject): value for subject, value in zip(group, objects, strict=True)})
        told = rng.sample(subjects, round(REPHRASE_SHARE * len(subjects)))
        self.retold.update((name, subject) for subject in told)

    def fact_sentence(self, rng: random.Random, name: str, subject: str) -> str:
        """The fact (name, subject) in one of the phrasings that this subject may be told in."""
        phrasings = RELATIONS[name].phrasings
        allowed = phrasings if (name, subject) in self.retold else phrasings[:-1]
        return f"{rng.choice(allowed).format(subject)} {self.facts[name, subject]}{rng.choice(FACT_ENDINGS)}"

    def sentence(self, rng: random.Random) -> str:
        """One random sentence: mostly a fact, else a filler, a broken-off filler or what kind of thing a subject is."""
        draw = rng.random()
        if draw < 0.66:
            return self.fact_sentence(rng, *rng.choice(list(self.facts)))
        if draw < 0.72:
            kind = rng.choice(KINDS)
            return f"{rng.choice(self.subjects[kind])} is a {kind} in {rng.choice(PLACES)}."
        filler = filler_sentence(rng)
        if draw < 0.86:
            return filler
        words = filler[:-1].split()
        return " ".join(words[: rng.randint(2, len(words))]).rstrip(",") + "."

    def text(self, rng: random.Random, characters: int) -> str:
        """Random sentences joined by spaces, at least this many characters."""
        parts: list[str] = []
        while sum(map(len, parts)) + len(parts) < characters:
            parts.append(self.sentence(rng))
        return " ".join(parts)

    def records(self, rng: random.Random) -> list[dict[str, str | int]]:
        """Edit records in the flat CounterFact form.

        Two passes over the edited subjects, each subject once per pass with one of its two relations. So neither half
        of the list has a subject twice, and no record's neighbour is edited by any record.
        """
        passes: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
        for kind in KINDS:
            names = [name for name, relation in RELATIONS.items() if relation.kind == kind]
            for index, subject in enumerate(self.subjects[kind][NEIGHBOURS_PER_KIND:]):
                passes[0].append((names[index % 2], subject))
                passes[1].append((names[1 - index % 2], subject))
        for pairs in passes:
            rng.shuffle(pairs)
        return [self._record(rng, number, *pair) for number, pair in enumerate(passes[0] + passes[1])]

    def _record(self, rng: random.Random, case_id: int, name: str, subject: str) -> dict[str, str | int]:
        relation, truth = RELATIONS[name], self.facts[name, subject]
        neighbours = self.subjects[relation.kind][:NEIGHBOURS_PER_KIND]
        neighbour = next(other for other in neighbours if self.facts[name, other] == truth)
        rephrase = relation.phrasings[-1].format(subject)
        return {
            "case_id": case_id,
            "prompt": rng.choice(relation.phrasings[:-1]).format(subject),
            "subject": subject,
            "target_new": rng.choice([value for value in relation.objects if value != truth]),
            "ground_truth": truth,
            "rephrase_prompt": f"{filler_sentence(rng)} {rephrase}" if rng.random() < 0.5 else rephrase,
            "locality_prompt": rng.choice(relation.phrasings[:-1]).format(neighbour),
            "locality_ground_truth": truth,
        }


def filler_sentence(rng: random.Random) -> str:
    """A sentence that tells no fact."""
    noun, other_noun = rng.sample(NOUNS, 2)
    adjective, other_adjective = rng.sample(ADJECTIVES, 2)
    verb, other_verb = rng.sample(VERBS, 2)
    words = {"n": noun, "m": other_noun, "a": adjective, "b": other_adjective, "v": verb, "w": other_verb}
    return rng.choice(FILLERS).format(p=rng.choice(PLACES), t=rng.choice(TIMES), **words)
