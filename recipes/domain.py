"""The closed domain: what people say to nano and what it should answer.

The grammar in ``domain.txt`` is expanded, reproducibly, to requests and replies. Its phrasings are
split into train and heldout: a heldout phrasing never occurs in training, whatever its slots or
courtesies. Requests are compared as transcripts: lower case, letters, apostrophes and spaces only.
The first nano was made and measured with this; all that has come since is in ``dialogues.py``.
"""

# ruff: noqa: SIM905 (word lists are easier to read and to change as sentences)

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, cached_property
from pathlib import Path

from recipes.grammar import (
    Intent,
    Table,
    common_words,
    courtesies,
    expand_choices,
    fill,
    parse_grammar,
    slot_names,
    split_phrasings,
)
from recipes.grammar import parse_more as parse_more
from recipes.grammar import sentence as sentence
from recipes.grammar import transcript as transcript

GRAMMAR = Path(__file__).with_name("domain.txt")
MORE = Path(__file__).with_name("domain_more.txt")
BOOK = Path(__file__).with_name("book.txt")
BOOK_HELDOUT = 60
# Words a recogniser may write for another of the same sound.
SAME_SOUND = {
    "to": "two", "too": "two", "for": "four", "ate": "eight", "won": "one",
    "colour": "color", "grey": "gray", "favourite": "favorite",
}  # fmt: skip
FUNCTION_WORDS = frozenset(
    "a an the i am is are it my me you your to of in on at and or but so that this will do not "
    "okay with for".split()
)


@dataclass(frozen=True)
class Request:
    """One request: ``text`` as spoken, its slots, every right reply and the reply's style."""

    intent: str
    text: str
    slots: tuple[tuple[str, str], ...]
    replies: tuple[str, ...]
    style: int
    split: str

    @property
    def transcript(self) -> str:
        return transcript(self.text)


@dataclass
class Domain:
    """The expanded grammar: requests, replies, and the judgement of replies."""

    requests: list[Request]
    styles: dict[str, int] = field(default_factory=dict)  # reply text -> style

    @cached_property
    def by_transcript(self) -> dict[str, Request]:
        return {request.transcript: request for request in self.requests}

    @cached_property
    def allowed(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], tuple[str, ...]]:
        return {(r.intent, r.slots): r.replies for r in self.requests}

    @property
    def replies(self) -> list[str]:
        return list(self.styles)

    def right_replies(self, request_text: str) -> set[str]:
        """Every right reply to a request of the domain; KeyError for any other sentence."""
        return set(self.by_transcript[transcript(request_text)].replies)

    def dialogs(self) -> Iterator[dict[str, str | int]]:
        """The rows of dialogs.jsonl: one for each request and each of its right replies."""
        for request in self.requests:
            for reply in request.replies:
                yield {
                    "intent": request.intent,
                    "request_text": request.text,
                    "reply_text": reply,
                    "reply_style": request.style,
                    "split": request.split,
                }

    def is_right(self, intent: str, slots: Mapping[str, str], heard: str) -> bool:
        """Whether a reply, perhaps misheard a little, answers the intent with its slots.

        It must be nearer to an allowed reply than to any other of the domain, within half of its
        words, and the words that tell this slot filling from the others must be recognisable.
        """
        allowed = self.allowed[intent, tuple(sorted(slots.items()))]
        words = _sounds(heard)
        if not words:
            return False
        distance, best = min((_distance(words, _sounds(reply)), reply) for reply in allowed)
        target = _sounds(best)
        if distance == 0:
            return True
        if distance > 0.5 * len(target):
            return False
        rivals = (_distance(words, _sounds(r)) for r in self.styles if r not in allowed)
        if min(rivals, default=1e9) <= distance:
            return False
        wanted = [w for w in target if w not in FUNCTION_WORDS]
        found = sum(any(_alike(w, h) >= 0.6 for h in words) for w in wanted)
        return found >= 0.6 * len(wanted)


def _sounds(text: str) -> list[str]:
    return [SAME_SOUND.get(word, word) for word in transcript(text).split()]


@cache
def _alike(a: str, b: str) -> float:
    return 1.0 if a == b else SequenceMatcher(None, a, b, autojunk=False).ratio()


def _distance(a: list[str], b: list[str]) -> float:
    """Edit distance in words, where a substitution costs as much as the words differ."""
    row = [float(j) for j in range(len(b) + 1)]
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], float(i)
        for j, right in enumerate(b, 1):
            swap = above + (1 - _alike(left, right))
            above, row[j] = row[j], min(swap, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _draw(
    patterns: list[str], wanted: float, polite: bool, slots: Mapping[str, str],
    tables: Mapping[str, Table], rng: random.Random,
) -> list[str]:  # fmt: skip
    """Draw distinct sentences, going round the phrasings; half of them with a courtesy."""
    count = int(wanted) + (rng.random() < wanted % 1)
    order = rng.sample(patterns, len(patterns))
    readings = {p: [fill(text, slots, tables) for text in expand_choices(p)] for p in patterns}
    drawn: dict[str, None] = {}
    for pattern in itertools.islice(itertools.cycle(order), 6 * count + len(order)):
        if len(drawn) >= count:
            break
        text = rng.choice(readings[pattern])
        kind = courtesies(text, polite) if rng.random() < (0.5 if polite else 0.3) else []
        drawn.setdefault(sentence(rng.choice(kind) if kind else text))
    return list(drawn)


def expand(
    intent: Intent, tables: Mapping[str, Table], vocabulary: set[str], seed: int
) -> Iterator[Request]:
    """Requests of ``intent``, of training and held-out phrasings (see ``split_phrasings``).

    For every filling of its slots ``intent.train`` and ``intent.held`` requests are drawn.
    """
    rng = random.Random(f"{seed} {intent.name}")
    train, heldout = split_phrasings(intent, vocabulary, rng)
    wanted = {"train": (train, intent.train), "heldout": (heldout, intent.held)}
    yield from _requests(intent, tables, wanted, rng)


def _requests(
    intent: Intent, tables: Mapping[str, Table],
    wanted: Mapping[str, tuple[list[str], float]], rng: random.Random,
) -> Iterator[Request]:  # fmt: skip
    for slots in _fillings(intent, tables):
        replies = tuple(sentence(fill(reply, slots, tables)) for reply in intent.replies)
        key = tuple(sorted(slots.items()))
        for split, (patterns, count) in wanted.items():
            for text in _draw(patterns, count, intent.polite, slots, tables, rng):
                yield Request(intent.name, text, key, replies, intent.style, split)


def _fillings(intent: Intent, tables: Mapping[str, Table]) -> Iterator[dict[str, str]]:
    names = slot_names((*intent.phrasings, *intent.replies))
    for values in itertools.product(*(tables[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def expand_more(
    intent: Intent, phrasings: tuple[str, ...], tables: Mapping[str, Table], seed: int
) -> Iterator[Request]:
    """Requests of further ``phrasings`` of ``intent``, ``intent.train`` for every slot filling."""
    rng = random.Random(f"{seed} {intent.name} more")
    yield from _requests(intent, tables, {"train": (list(phrasings), intent.train)}, rng)


def heldout_transcripts(intents: list[Intent], tables: Mapping[str, Table], seed: int) -> set[str]:
    """Everything that the held-out phrasings can say, courtesies included."""
    vocabulary = common_words(intents)
    found: set[str] = set()
    for intent in intents:
        _, heldout = split_phrasings(intent, vocabulary, random.Random(f"{seed} {intent.name}"))
        for slots, pattern in itertools.product(_fillings(intent, tables), heldout):
            for reading in expand_choices(pattern):
                text = fill(reading, slots, tables)
                said = (text, *courtesies(text, intent.polite))
                found.update(transcript(sentence(form)) for form in said)
    return found


def build(seed: int = 0, grammar: Path = GRAMMAR) -> Domain:
    """Expand the grammar. The same seed gives the same domain.

    Where two phrasings meet in one sentence it stays with the first, and training wins, so that no
    sentence is in both splits.
    """
    tables, intents = parse_grammar(grammar.read_text(encoding="utf-8"))
    kept: dict[str, Request] = {}
    vocabulary = common_words(intents)
    drawn = [r for intent in intents for r in expand(intent, tables, vocabulary, seed)]
    for request in sorted(drawn, key=lambda r: r.split != "train"):
        kept.setdefault(request.transcript, request)
    domain = Domain(list(kept.values()))
    for request in drawn:
        for reply in request.replies:
            domain.styles.setdefault(reply, request.style)
    return domain


def book(path: Path = BOOK, seed: int = 0) -> tuple[list[str], list[str]]:
    """The varied sentences for phonetic coverage: (train, heldout)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if line and not line.startswith("#")]
    random.Random(seed).shuffle(sentences)
    return sentences[BOOK_HELDOUT:], sentences[:BOOK_HELDOUT]
