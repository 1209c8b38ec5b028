"""Everything that nano can talk about: requests, follow-ups, and what they make a robot do.

The domain has two layers. ``domain.txt`` and ``domain_more.txt`` are what the first nano was made
and measured with; they are left as they are, so that figures stay comparable. ``domain_talk.txt``,
``domain_facts.txt``, ``domain_robot.txt`` and ``domain_again.txt`` add intents, many more phrasings
of all of them, actions, and turns that need the turn before. Their format stands at the top of
``domain_talk.txt``. ``python -m recipes.dialogues`` counts what there is.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.config import config_folder
from recipes import domain
from recipes.grammar import (
    Table,
    addressed,
    bare,
    common_words,
    contracted,
    expand_choices,
    later_tables,
    number_words,
    parse_grammar,
    parse_more,
    sentence,
    split_phrasings,
    transcript,
)

FOLDER = Path(__file__).parent
FILES = tuple(FOLDER / f"domain_{name}.txt" for name in ("talk", "facts", "robot", "again"))
ACTIONS = config_folder() / "nano-actions.json"
MOST = 200
CONTRACTED = 0.2  # share of requests with "what's" for "what is", where they have it
TRIES = 8  # fillings drawn for a phrasing until one has an answer
LONGEST_REPLY = 12  # words
Slots = dict[str, str]
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeio]|umbrella)")
_SLOT = re.compile(r"\{(\w+)((?:\.\w+)*)(#?)\}")
ADDRESSED = 0.35  # share of requests with a courtesy or a name


@dataclass(frozen=True)
class Topic:
    """One intent with all its phrasings, as the files give them.

    ``first`` are the held-out phrasings of ``domain.txt``, ``heldout`` those added later. ``after``
    names, for each turn before this one, the intents that it may be (``*``: any).
    """

    name: str
    style: int = 0
    polite: bool = False
    important: bool = False
    same: str = ""
    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()
    action: str = ""
    after: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Turn:
    """What was said before, and answered. ``action`` is what the reply made the robot do."""

    request: str
    reply: str
    style: int = 0
    action: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def plan(self) -> str:
        """The reply as it is planned: its action, a blank, its words."""
        return f"{action_text(self.action)} {self.reply}".strip()


@dataclass(frozen=True)
class Example:
    """One request with the turns before it, every right reply, and what it makes the robot do.

    ``split`` is ``train`` or ``heldout``; ``added`` is False for the held-out requests with which
    the first nano was measured.
    """

    intent: str
    text: str
    slots: tuple[tuple[str, str], ...]
    replies: tuple[str, ...]
    style: int
    split: str
    added: bool = True
    before: tuple[Turn, ...] = ()
    action: dict[str, Any] | None = field(default=None, hash=False)

    @cached_property
    def transcript(self) -> str:
        return transcript(self.text)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole dialogue, with the first of the right replies."""
        return (*self.before, Turn(self.text, self.replies[0], self.style, self.action))


def action_text(action: Mapping[str, Any] | None) -> str:
    """An action as it stands before the words of a reply: JSON without blanks; "" for none."""
    return "" if action is None else json.dumps(action, separators=(",", ":"))


def read_plan(text: str) -> tuple[dict[str, Any] | None, str]:
    """Action and words of a planned reply; no action where it does not begin with one."""
    try:
        action, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None, text
    return (action, text[end:].strip()) if isinstance(action, dict) else (None, text)


@cache
def action_schema() -> dict[str, Any]:
    """The JSON schema of every action of the domain."""
    schema: dict[str, Any] = json.loads(ACTIONS.read_text(encoding="utf-8"))
    return schema


@dataclass
class Dialogues:
    """All examples, those for training first."""

    examples: list[Example]
    topics: dict[str, Topic]

    def split(self, name: str) -> list[Example]:
        """The examples of ``train`` or ``heldout``."""
        return [e for e in self.examples if e.split == name]

    @cached_property
    def domain(self) -> domain.Domain:
        """The same as requests without a past: what recipes take that know of no dialogues."""
        styles = {reply: e.style for e in self.examples for reply in e.replies}
        return domain.Domain([_request(e) for e in self.examples if not e.before], styles)

    def is_right(self, example: Example, heard: str) -> bool:
        """Whether a reply, perhaps misheard a little, answers ``example``: see ``Domain``."""
        judge = domain.Domain([_request(example)], self.domain.styles)
        return judge.is_right(example.intent, dict(example.slots), heard)


def _request(e: Example) -> domain.Request:
    return domain.Request(e.intent, e.text, e.slots, e.replies, e.style, e.split)


# --------------------------------------------------------------------------------- reading files


class _Reader:
    """Reads the later files on top of the first ones. Raises ValueError naming file and line."""

    def __init__(self, tables: dict[str, Table], topics: Iterable[Topic]) -> None:
        self.tables = tables
        self.topics = {topic.name: topic for topic in topics}
        self._lists: dict[str, Topic] = {}
        self._now: Topic | None = None
        self._columns: list[str] | None = None

    def read(self, path: Path) -> None:
        for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = raw.strip()
            try:
                self._line(line)
            except (ValueError, KeyError, IndexError) as error:
                raise ValueError(f"{path.name} line {number}: {line!r}: {error}") from error
        self._close()

    def _line(self, line: str) -> None:
        if not line:
            self._columns = None
        elif line.startswith("#"):
            pass
        elif line.startswith("@"):
            self._close()
            name, _, head = line[1:].partition(":")
            self._columns = [c.strip() for c in head.split(",") if c.strip()]
            self._rows = self.tables.setdefault(name.strip(), {})
        elif self._columns is not None:
            value, _, rest = line.partition(":")
            cells = [cell.strip().replace("\\,", ",") for cell in re.split(r"(?<!\\),", rest)]
            row = zip(self._columns, cells, strict=True) if self._columns else ()
            self._rows.setdefault(value.strip(), {}).update(row)
        elif line.startswith("=="):
            self._close()
            self._now = self._open(line[2:].split())
        else:
            self._now = self._add(self._now, line[0], line[1:].strip())

    def _open(self, words: list[str]) -> Topic:
        name, options = words[0], dict(word.partition("=")[::2] for word in words[1:])
        unknown = options.keys() - {"style", "polite", "important", "same"}
        if unknown:
            raise ValueError(f"unknown option {min(unknown)!r}: style, polite, important or same")
        topic = self.topics.get(name, Topic(name))
        return replace(
            topic,
            style=int(options.get("style", topic.style)),
            polite=topic.polite or "polite" in options,
            important=topic.important or "important" in options,
            same=options.get("same", topic.same),
        )

    def _add(self, topic: Topic | None, sign: str, text: str) -> Topic:
        if topic is None:
            raise ValueError("no == intent before it")
        parts = tuple(part for p in text.split(";") if (part := p.strip()))
        if sign == ">":
            return replace(topic, train=(*topic.train, *parts))
        if sign == "?":
            return replace(topic, heldout=(*topic.heldout, *parts))
        if sign == "<":
            return replace(topic, replies=(*topic.replies, text))
        if sign == "!":
            return replace(topic, action=text)
        if sign == "^":
            after = tuple(name.strip() for name in text.split(","))
            return replace(topic, after=(*topic.after, after))
        if sign == "*":
            name, _, it = text.partition(" ")
            return self._from_list(topic, name, it.strip())
        raise ValueError("a line begins with ==, >, ?, <, !, ^, *, @ or #")

    def _from_list(self, topic: Topic, name: str, it: str) -> Topic:
        phrases = self._lists[name]
        train, heldout = (
            tuple(p.replace("{it}", it) for p in part) for part in (phrases.train, phrases.heldout)
        )
        return replace(topic, train=(*topic.train, *train), heldout=(*topic.heldout, *heldout))

    def _close(self) -> None:
        """Keep the intent, or list of phrasings, that was being read."""
        if self._now is not None:
            kind = self._lists if self._now.name.startswith("*") else self.topics
            kind[self._now.name.removeprefix("*")] = self._now
            self._now = None


def _first_topics() -> tuple[dict[str, Table], list[Topic]]:
    """The intents of the first layer, divided as the first nano's corpus was (seed 0)."""
    tables, intents = parse_grammar(domain.GRAMMAR.read_text(encoding="utf-8"))
    more = parse_more(domain.MORE.read_text(encoding="utf-8"))
    vocabulary = common_words(intents)
    topics = []
    for intent in intents:
        train, held = split_phrasings(intent, vocabulary, random.Random(f"0 {intent.name}"))
        topics.append(
            Topic(
                intent.name, intent.style, intent.polite,
                train=(*train, *more.get(intent.name, ())),
                first=tuple(held), replies=intent.replies,
            )
        )  # fmt: skip
    return tables, topics


def read_topics(files: Sequence[Path] = FILES) -> tuple[dict[str, Table], dict[str, Topic]]:
    """The slot tables and the intents of both layers.

    Raises:
        ValueError: a line is not understood; it names file and line.
    """
    tables, topics = _first_topics()
    reader = _Reader(tables | later_tables(), topics)
    for path in files:
        reader.read(path)
    return reader.tables, reader.topics


# --------------------------------------------------------------------------------- filling slots


@cache
def _numbers() -> dict[str, int]:
    return {number_words(n): n for n in range(1001)}


def slot_names(patterns: Iterable[str]) -> list[str]:
    """The slots in patterns, in order of appearance: a table's name, perhaps with a digit."""
    return list(dict.fromkeys(m[1] for p in patterns for m in _SLOT.finditer(p)))


def table_of(slot: str) -> str:
    """The table that a slot takes its values from: ``day2`` is a second value of ``day``."""
    return slot.rstrip("0123456789")


def put(pattern: str, slots: Mapping[str, str], tables: Mapping[str, Table]) -> str:
    """Fill a pattern: ``{day}``, ``{day.next}``, ``{day.next.next}``; ``{steps#}`` in digits.

    Raises KeyError when a value has no such column.
    """

    def value(match: re.Match[str]) -> str:
        name, columns, digits = match.groups()
        found = slots[name]
        for column in columns.split(".")[1:]:
            found = tables[table_of(name)][found][column]
        return str(_numbers()[found]) if digits else found

    return _SLOT.sub(value, pattern)


def say(pattern: str, slots: Mapping[str, str], tables: Mapping[str, Table]) -> str:
    """A filled pattern as a sentence, with "an apple" for "a apple"."""
    return sentence(_A_BEFORE_VOWEL.sub(r"\1n ", put(pattern, slots, tables)))


# -------------------------------------------------------------------------------------- drawing


class _Drawer:
    """Draws examples, of each intent with a generator of its own."""

    def __init__(
        self, tables: Mapping[str, Table], topics: Mapping[str, Topic], seed: int, most: int
    ) -> None:
        self._tables, self._topics, self._seed, self._most = tables, topics, seed, most
        self._drawn: dict[str, list[Example]] = {}
        self._owners = self._claims("train")
        self._heldout_owners = self._claims("heldout")
        self._reserved = set(self._heldout_sentences())
        self._decks: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._slots = {
            name: slot_names((*t.train, *t.heldout, *t.replies, t.action))
            for name, t in topics.items()
        }

    def _claims(self, split: str) -> dict[str, str]:
        """The intent that a phrasing belongs to: of several, the one that comes last."""
        return {
            _key(reading): topic.name
            for topic in self._topics.values()
            if not topic.after
            for pattern in getattr(topic, split)
            for reading in expand_choices(pattern)
        }

    def _heldout_sentences(self) -> Iterator[str]:
        """All that held-out phrasings can say, bare; slots are put in last, which is fast."""
        for topic in self._topics.values():
            for pattern in (*topic.first, *topic.heldout):
                slots = list(dict.fromkeys(m[0] for m in _SLOT.finditer(pattern)))
                names = slot_names(slots)
                marks = [f"zz{chr(97 + i)}" for i in range(len(slots))]
                fillings = [
                    [
                        transcript(put(s, dict(zip(names, values, strict=True)), self._tables))
                        for s in slots
                    ]
                    for values in itertools.product(*(self._tables[table_of(n)] for n in names))
                ]
                for reading in expand_choices(pattern):
                    for slot, mark in zip(slots, marks, strict=True):
                        reading = reading.replace(slot, mark)
                    reading = bare(transcript(reading))
                    for filled in fillings:
                        yield _replaced(reading, marks, filled)

    def first_heldout(self) -> Iterator[Example]:
        """The held-out requests of the first layer."""
        requests = (r for r in domain.build(0).requests if r.split == "heldout")
        yield from filter(None, map(self.answered, requests))

    def answered(self, request: domain.Request) -> Example | None:
        """A request of the first layer; what a later intent says of it is added.

        None where it was in training and a held-out phrasing can say it now.
        """
        heldout = request.split == "heldout"
        said = bare(request.transcript)
        if not heldout and said in self._reserved:
            return None
        claims = self._owners if not heldout else self._heldout_owners
        owner = self._topics[claims.get(said, request.intent)]
        slots = dict(request.slots)
        later = tuple(say(reply, slots, self._tables) for reply in owner.replies)
        return Example(
            request.intent, request.text, request.slots,
            tuple(dict.fromkeys((*later, *request.replies))), owner.style, request.split,
            added=False, action=self._action(owner, slots, ()),
        )  # fmt: skip

    def train(self, name: str) -> list[Example]:
        """Training examples of an intent; drawn once."""
        if name not in self._drawn:
            topic = self._topics[name]
            readings = [
                reading
                for pattern in topic.train
                for reading in expand_choices(pattern)
                if topic.after or self._owners[_key(reading)] == name
            ]
            most = self._most * (2 if topic.important else 1)
            found = self._draw(topic, readings, max(most, len(readings)), "train")
            kept = [e for e in found if bare(e.transcript) not in self._reserved]
            self._drawn[name] = kept
        return self._drawn[name]

    def heldout(self, name: str) -> list[Example]:
        """A request of every reading held out by the later files; two where it has slots."""
        topic = self._topics[name]
        readings = [r for pattern in topic.heldout for r in expand_choices(pattern)]
        times = 2 if "{" in "".join(readings) else 1
        return self._draw(topic, readings, times * len(readings), "heldout")

    def _draw(self, topic: Topic, readings: list[str], count: int, split: str) -> list[Example]:
        """As many different examples as come up in ``count`` draws."""
        rng = random.Random(f"{self._seed} {topic.name} {split}")
        found: dict[tuple[Any, ...], Example] = {}
        for reading in _rounds(readings, count, rng):
            tries = (self._example(topic, reading, split, rng) for _ in range(TRIES))
            if made := next(filter(None, tries), None):
                found.setdefault((made.before, made.transcript), made)
        return list(found.values())

    def _example(
        self, topic: Topic, reading: str, split: str, rng: random.Random
    ) -> Example | None:
        """One example; None where the slots drawn have no answer, or too long a one."""
        before, known = self._earlier(topic, rng)
        slots: Slots = {}
        for name in self._slots[topic.name]:
            slots[name] = known.get(name) or self._value(name, known | slots, topic, rng)
        try:
            text = put(reading, slots, self._tables)
            replies = tuple(say(reply, slots, self._tables) for reply in topic.replies)
            action = self._action(topic, slots, before)
        except KeyError:  # the last row of a table has no next one
            return None
        if any(len(transcript(reply).split()) > LONGEST_REPLY for reply in replies):
            return None
        if rng.random() < ADDRESSED:
            forms = addressed(text, topic.polite) or [text]
            text = rng.choice(forms[:2] if before else forms)
        if rng.random() < CONTRACTED:
            text = contracted(text)
        return Example(
            topic.name, say(text, {}, {}), tuple(sorted(slots.items())), replies, topic.style,
            split, before=before, action=action,
        )  # fmt: skip

    def _earlier(self, topic: Topic, rng: random.Random) -> tuple[tuple[Turn, ...], Slots]:
        """Turns before this one, and the slots that they fill."""
        before: tuple[Turn, ...] = ()
        slots: Slots = {}
        for names in topic.after:
            if names == ("*",):
                names = tuple(n for n, t in self._topics.items() if not t.after and t.train)
            example = rng.choice(self.train(rng.choice(names)))
            reply = rng.choice(example.replies)
            before += (*example.before, Turn(example.text, reply, example.style, example.action))
            slots |= dict(example.slots) | {"reply": reply, "request": example.transcript}
        return before, slots

    def _value(self, name: str, slots: Slots, topic: Topic, rng: random.Random) -> str:
        """A value for a slot, unlike those that other slots have from the same table.

        They share the column that the topic names. Free values come from a deck, equally often.
        """
        table = self._tables[table_of(name)]
        others = [v for n, v in slots.items() if table_of(n) == table_of(name)]
        if not others:
            deck = self._decks[topic.name, name]
            if not deck:
                deck += rng.sample(list(table), len(table))
            return deck.pop()
        of, _, column = topic.same.partition(".")
        fitting = [value for value in table if value not in others]
        if of == table_of(name):
            wanted = table[others[0]][column]
            fitting = [value for value in fitting if table[value][column] == wanted]
        return rng.choice(fitting)

    def _action(
        self, topic: Topic, slots: Slots, before: tuple[Turn, ...]
    ) -> dict[str, Any] | None:
        if topic.action == "same":
            return before[-1].action
        if not topic.action:
            return None
        action: dict[str, Any] = json.loads(put(topic.action, slots, self._tables))
        return action


def _replaced(text: str, old: Sequence[str], new: Sequence[str]) -> str:
    for before, after in zip(old, new, strict=True):
        text = text.replace(before, after)
    return text


def _key(reading: str) -> str:
    return reading if "{" in reading else bare(transcript(reading))


def _rounds(items: Sequence[str], count: int, rng: random.Random) -> Iterator[str]:
    """``count`` items: all of them in some order, and again."""
    while count > 0 and items:
        order = rng.sample(items, len(items))[:count]
        yield from order
        count -= len(order)


def load(seed: int = 0, most: int = MOST, files: Sequence[Path] = FILES) -> Dialogues:
    """Draw examples of the whole domain; the same arguments give the same.

    No sentence that a held-out phrasing can say is in training. Of one sentence that two intents
    answer, the one that comes later in the files keeps it.

    Args:
        most: training requests of one intent at the most, unless it has more phrasings; twice as
            many of one that is marked important.

    Raises:
        ValueError: a file is not understood; it names file and line.
    """
    tables, topics = read_topics(files)
    drawer = _Drawer(tables, topics, seed, most)
    train: dict[tuple[Any, ...], Example] = {}
    heldout = {(e.before, e.transcript): e for e in drawer.first_heldout()}
    for name in reversed(topics):
        for example in drawer.train(name):
            train.setdefault((example.before, example.transcript), example)
        for example in drawer.heldout(name):
            heldout.setdefault((example.before, example.transcript), example)
    return Dialogues([*train.values(), *heldout.values()], topics)


def answered(
    requests: Iterable[domain.Request], seed: int = 0, files: Sequence[Path] = FILES
) -> list[Example]:
    """Requests of the first layer as the whole domain answers them, with what they make it do.

    Those of training that a held-out phrasing can say now are left out.
    """
    drawer = _Drawer(*read_topics(files), seed, MOST)
    return list(filter(None, map(drawer.answered, requests)))


# --------------------------------------------------------------------------------------- report


def overlap(heldout: Iterable[str], train: Iterable[str], size: int = 3) -> float:
    """The share of the word ``size``-grams of held-out transcripts that training has too."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = ["<", *bare(text).split(), ">"]
        return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]

    known = {gram for text in train for gram in grams(text)}
    asked = [gram for text in heldout for gram in grams(text)]
    return sum(gram in known for gram in asked) / max(1, len(asked))


def table(world: Dialogues) -> Iterator[str]:
    """Counts by intent, as lines: phrasings, examples, and how alike the two splits are."""
    by_intent: dict[str, dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for example in world.examples:
        by_intent[example.intent][example.split].append(example)
    yield f"{'intent':<20}{'train':>12}{'held out':>12}{'first':>6}{'overlap':>8}  does"
    for name, topic in world.topics.items():
        drawn = by_intent[name]
        heldout, train = ([e.transcript for e in drawn[s]] for s in ("heldout", "train"))
        alike = overlap(heldout, train)
        does = json.loads(re.sub(_SLOT, "0", topic.action))["action"] if "{" in topic.action else ""
        yield (
            f"{name + ('*' if topic.important else ''):<20}"
            f"{len(topic.train):>5} {len(drawn['train']):>6}"
            f"{len(topic.heldout):>5} {len(drawn['heldout']):>6}{len(topic.first):>6}"
            f"{alike:>8.0%}  {does or topic.action}"
        )
    yield from _totals(world)


def words(world: Dialogues) -> Counter[str]:
    """Every word of requests and replies, with how many examples have it."""
    return Counter(
        word
        for e in world.examples
        for word in {w for text in (e.text, *e.replies) for w in transcript(text).split()}
    )


def _totals(world: Dialogues) -> Iterator[str]:
    train, heldout = world.split("train"), world.split("heldout")
    replies = {reply for e in world.examples for reply in e.replies}
    yield "phrasings and examples; first: phrasings held out of the first nano; *: important"
    yield (
        f"{len(world.topics)} intents, {sum(bool(t.after) for t in world.topics.values())} of them "
        f"follow-ups; {len(train)} training and {len(heldout)} held-out examples "
        f"({sum(not e.added for e in heldout)} of the first nano's), {len(replies)} replies, "
        f"{len(words(world))} words"
    )
    yield f"training examples with an action: {sum(e.action is not None for e in train)}"


def main(
    seed: Annotated[int, typer.Option(help="Another seed draws other examples.")] = 0,
    most: Annotated[int, typer.Option(help="Training examples of one intent at the most.")] = MOST,
) -> None:
    """Count phrasings and examples of every intent."""
    for line in table(load(seed, most)):
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
