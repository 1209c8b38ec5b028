"""The grammar of the domain: slot tables, intents, phrasings, and how they become sentences.

A plain text file (``domain.txt``) is parsed to tables and intents; patterns with choices and slots
are expanded; courtesies ("hey nano", "please") are put around them where their form allows it.
"""

# ruff: noqa: SIM905 (word lists are easier to read and to change as sentences)

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

HELDOUT_SHARE = 0.2

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
QUESTION = frozenset(
    "what how who where when which why do does did is are was can could will would may should "
    "has have if".split()
)
# First words after which neither "please" nor "can you" can stand.
STATEMENT = frozenset(
    "i my the this that these today you your one two three four five six seven eight nine ten it "
    "its not louder faster quieter quietly sorry pardon we there everything life volume speed no "
    "another stop halt twice help testing test".split()
)
PROPER = frozenset(
    "Nano Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April "
    "May June July August September October November December English German French Spanish "
    "France England Germany Italy Spain Japan Russia Egypt Greece China Canada Austria Portugal "
    "Sweden Paris London Berlin Rome Madrid Tokyo Moscow Cairo Athens Beijing Ottawa Vienna Lisbon "
    "Stockholm Christmas Easter Anna Ben Carla David Emma Frank George Helen Jack Julia Kevin "
    "Laura Maria Oscar Peter Robert Sarah Susan Thomas Victor".split()
)
IMPERATIVE = frozenset(
    "add ask be begin bring calculate carry change charge check clean close come count dance do "
    "double drive drop explain fetch find follow get give go grab guess hand head help hold keep "
    "lay leave lift light list listen look lower make mix move name nod open pass pick place play "
    "press pull push put raise read repeat roll rotate run say search set shake shine show sing "
    "sit speak spell spin stand start stay stop switch take talk tell throw turn wait walk wash "
    "watch wave whisper".split()
)
# How people say what is written out in the grammar, where another word follows.
CONTRACTIONS = {
    "i am": "i'm", "i will": "i'll", "it is": "it's", "that is": "that's", "what is": "what's",
    "where is": "where's", "who is": "who's", "how is": "how's", "there is": "there's",
    "you are": "you're", "we are": "we're", "let us": "let's", "do not": "don't",
    "does not": "doesn't", "did not": "didn't", "is not": "isn't", "cannot": "can't",
    "will not": "won't",
}  # fmt: skip
_LONG = re.compile(rf"\b({'|'.join(CONTRACTIONS)})(?= [a-z])", re.IGNORECASE)
_SHORT = re.compile(rf"\b({'|'.join(CONTRACTIONS.values())})\b")
_WRITTEN_OUT = {short: long for long, short in CONTRACTIONS.items()}
_BEFORE = re.compile(r"^(hey nano|nano|okay|excuse me|please|(can|could|would|will) you) (?=\w)")
_AFTER = re.compile(r" (nano|now please|please)$")
CAPITALS = {word.lower(): word for word in PROPER} | {"i": "I"}


def number_words(number: int) -> str:
    """A number from 0 to 999,999 in words, without hyphens: 121 -> "one hundred twenty one"."""
    if not 0 <= number <= 999_999:
        raise ValueError(f"{number} is outside 0..999999: say it in other words")
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f" {ONES[rest]}" if rest else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    return f"{number_words(head)} {name}" + (f" {number_words(rest)}" if rest else "")


_PLAIN = re.compile(r"[A-Za-z',.!? ]*")  # nothing to be put in words


@lru_cache(maxsize=1 << 16)
def transcript(text: str) -> str:
    """Normalise a sentence: lower case, numbers as words, only letters, apostrophes and spaces."""
    if not _PLAIN.fullmatch(text):
        text = text.replace("’", "'").replace("%", " percent ")
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
        text = re.sub(r"(\d+)\s*\+\s*(?=\d)", r"\1 plus ", text)
        text = re.sub(r"(\d+)\s*[-−]\s*(?=\d)", r"\1 minus ", text)
        text = text.replace("=", " is ")
        text = re.sub(r"\d{1,6}", lambda m: f" {number_words(int(m[0]))} ", text)
    text = re.sub(r"[^a-z' ]+", " ", text.lower())
    return " ".join(word for raw in text.split() if (word := raw.strip("'")))


@dataclass(frozen=True)
class Intent:
    """One thing people want. ``train`` and ``held`` are requests drawn per slot filling."""

    name: str
    style: int = 0
    polite: bool = False
    train: float = 16
    held: float = 3
    phrasings: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()


Table = dict[str, dict[str, str]]


def _computed_tables() -> dict[str, Table]:
    """The slot tables of numbers, which nobody wants to type."""
    words = [number_words(n) for n in range(31)]
    plus = {
        f"{words[a]} plus {words[b]}": {"a": words[a], "b": words[b], "answer": words[a + b]}
        for a in range(1, 11)
        for b in range(1, 11)
    }
    minus = {
        f"{words[a]} minus {words[b]}": {"a": words[a], "b": words[b], "answer": words[a - b]}
        for a in range(2, 11)
        for b in range(1, a)
    }
    number = {words[n]: {"next": words[n + 1], "previous": words[n - 1]} for n in range(1, 21)}
    count = {words[n]: {"list": ", ".join(words[1 : n + 1])} for n in range(3, 11)}
    double = {words[n]: {"answer": words[2 * n]} for n in range(1, 13)}
    return {"plus": plus, "minus": minus, "number": number, "count": count, "double": double}


def later_tables() -> dict[str, Table]:
    """Computed slot tables of the later files: more sums, comparisons, the clock, mixed colors."""
    words = [number_words(n) for n in range(101)]
    return {
        "plus": _sums((a, b) for a in range(1, 11) for b in range(1, 11)),
        "sum": _sums((a, b) for a in range(11, 21) for b in range(1, 11)),
        "diff": {
            f"{words[a]} minus {words[b]}": {"a": words[a], "b": words[b], "answer": words[a - b]}
            for a in range(11, 21)
            for b in range(1, 11)
        },
        "times": {
            f"{words[a]} times {words[b]}": {"a": words[a], "b": words[b], "answer": words[a * b]}
            for a in range(3, 11)
            for b in range(3, 11)
        },
        "divide": {
            f"{words[a * b]} divided by {words[b]}": {
                "a": words[a * b], "b": words[b], "answer": words[a],
            }
            for a in range(2, 11)
            for b in range(2, 6)
        },
        "half": {words[2 * n]: {"answer": words[n]} for n in range(1, 13)},
        "parity": {words[n]: {"kind": ("even", "odd")[n % 2]} for n in range(1, 21)},
        "pair": _pairs(words[1:21]),
        "sizes": _pairs("bee mouse cat goat horse elephant whale".split()),
        "later": _clock(words),
        "mix": _mixed_colors(),
    }  # fmt: skip


def _sums(pairs: Iterable[tuple[int, int]]) -> Table:
    """Sums with the number after the answer as ``more``."""
    words = [number_words(n) for n in range(101)]
    return {
        f"{words[a]} plus {words[b]}": {
            "a": words[a], "b": words[b], "answer": words[a + b], "more": words[a + b + 1],
        }
        for a, b in pairs
    }  # fmt: skip


def _pairs(names: list[str]) -> Table:
    """Two of ``names``, which grow, in either order: ``more`` is the later one."""
    return {
        f"{names[a]} {names[b]}": {
            "a": names[a], "b": names[b], "more": names[max(a, b)], "less": names[min(a, b)],
        }
        for a in range(len(names))
        for b in range(len(names))
        if a != b
    }  # fmt: skip


def _clock(words: list[str]) -> Table:
    """Full hours and what the clock says one to five hours later."""
    return {
        f"{words[now]} {words[more]}": {
            "now": words[now],
            "more": f"{words[more]} hour{'s' if more > 1 else ''}",
            "then": words[(now + more - 1) % 12 + 1],
        }
        for now in range(1, 13)
        for more in range(1, 6)
    }


def _mixed_colors() -> Table:
    made = {
        ("blue", "yellow"): "green",
        ("red", "yellow"): "orange",
        ("red", "blue"): "purple",
        ("red", "white"): "pink",
        ("black", "white"): "gray",
    }
    return {
        f"{a} and {b}": {"color": color}
        for pair, color in made.items()
        for a, b in (pair, pair[::-1])
    }


def parse_grammar(text: str) -> tuple[dict[str, Table], list[Intent]]:
    """Read the grammar. Raises ValueError naming the line when it is not understood."""
    tables = _computed_tables()
    intents: list[Intent] = []
    columns: list[str] = []
    rows: Table | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("#") or not line:
            rows = rows if line else None
        elif line.startswith("@"):
            name, _, head = line[1:].partition(":")
            columns = [c.strip() for c in head.split(",") if c.strip()]
            rows = tables.setdefault(name, {})
        elif rows is not None:
            value, _, rest = line.partition(":")
            cells = [c.strip() for c in rest.split(",", len(columns) - 1)] if columns else []
            rows[value] = dict(zip(columns, cells, strict=False))
        elif line.startswith("=="):
            intents.append(_parse_intent(line[2:].split()))
        elif line[0] in "<>" and intents:
            key = "phrasings" if line[0] == ">" else "replies"
            old = intents[-1]
            added = {key: (*getattr(old, key), line[1:].strip())}
            intents[-1] = Intent(**{**old.__dict__, **added})
        else:
            raise ValueError(f"grammar line {number}: {line!r} is neither table, intent, > nor <")
    return tables, intents


def parse_more(text: str) -> dict[str, tuple[str, ...]]:
    """Read further phrasings by intent: after ``== intent``, lines ``> phrasing ; phrasing``.

    Raises ValueError naming the line when it is not understood.
    """
    found: dict[str, tuple[str, ...]] = {}
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("=="):
            name = line[2:].strip()
        elif line.startswith(">") and name:
            found[name] = (*found.get(name, ()), *(p.strip() for p in line[1:].split(";")))
        elif line.strip() and not line.startswith("#"):
            raise ValueError(f"phrasings line {number}: {line!r} is neither == intent nor >")
    return found


def _parse_intent(words: list[str]) -> Intent:
    options = dict(word.partition("=")[::2] for word in words[1:])
    unknown = options.keys() - {"style", "polite", "train", "held"}
    if unknown:
        raise ValueError(f"intent {words[0]}: unknown option {sorted(unknown)[0]!r}")
    return Intent(
        name=words[0],
        style=int(options.get("style", 0)),
        polite="polite" in options,
        train=float(options.get("train", 16)),
        held=float(options.get("held", 3)),
    )


def expand_choices(pattern: str) -> list[str]:
    """Every reading of ``(a|b|)`` choices (not nested), with single spaces."""
    parts = re.split(r"\(([^()]*)\)", pattern)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    readings = (" ".join("".join(chosen).split()) for chosen in itertools.product(*options))
    return list(dict.fromkeys(reading.replace(" ?", "?") for reading in readings))


def slot_names(patterns: Iterable[str]) -> list[str]:
    """The tables named in patterns, in order of appearance."""
    found = (m[1] for p in patterns for m in re.finditer(r"\{(\w+)(?:\.\w+)?\}", p))
    return list(dict.fromkeys(found))


def fill(pattern: str, slots: Mapping[str, str], tables: Mapping[str, Table]) -> str:
    """Put slot values and their columns into a pattern and mend "a apple" to "an apple"."""

    def value(match: re.Match[str]) -> str:
        table, column = match[1], match[2]
        return tables[table][slots[table]][column] if column else slots[table]

    text = re.sub(r"\{(\w+)(?:\.(\w+))?\}", value, pattern)
    return re.sub(r"\b([Aa]) (?=[aeio]|umbrella)", r"\1n ", text)


@cache
def _capital(word: str) -> str:
    return re.sub(r"^[a-z]+", lambda m: CAPITALS.get(m[0], m[0]), word)


@cache
def sentence(text: str) -> str:
    """Capital letters and a full stop where speech is written down."""
    text = " ".join(map(_capital, text.split()))
    text = re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
    # "may", the verb, is far commoner in requests than the month in mid-sentence
    text = re.sub(r"\bMay (?=I\b|we\b)", "may ", text)
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def courtesies(text: str, polite: bool) -> list[str]:
    """The same request with a courtesy: "please", "hey nano", "can you", as its form allows."""
    plain = text.rstrip("?")
    words = plain.lower().split()
    if {"please", "nano", "pardon"} & set(words) or words[0] in {"come", "no", "oh"}:
        return []
    forms = [f"nano, {text}", f"hey nano, {text}"]
    if not polite or words[0] in STATEMENT:
        return forms
    if words[0] in QUESTION:
        return [*forms, f"okay, {text}", f"excuse me, {text}", f"{plain} nano?"]
    forms += [f"please {plain}", f"{plain} please"]
    if words[0] not in {"let", "show"}:
        forms += [f"can you {plain}?", f"could you {plain}?", f"could you please {plain}?"]
    return forms


def bare(text: str) -> str:
    """A transcript without what any request may get: courtesies, contractions, "an" for "a"."""
    text = _SHORT.sub(lambda m: _WRITTEN_OUT[m[1]], text).replace(" an ", " a ")
    while (less := _BEFORE.sub("", _AFTER.sub("", text))) != text:
        text = less
    return text


def contracted(text: str) -> str:
    """A sentence as people say it: "what's your name?"."""

    def short(match: re.Match[str]) -> str:
        found = CONTRACTIONS[match[1].lower()]
        return found.capitalize() if match[1][0].isupper() else found

    return _LONG.sub(short, text)


def addressed(text: str, polite: bool) -> list[str]:
    """The same request with a name or a courtesy, as its first word allows.

    Unlike :func:`courtesies` it takes only known verbs for commands, whatever a phrasing begins
    with; that one stays as it is because recordings were drawn with it.
    """
    plain, words = text.rstrip("?"), transcript(text).split()
    if {"please", "nano", "robot", "pardon"} & set(words):
        return []
    forms = [f"nano, {text}", f"hey nano, {text}"]
    if words[0] in QUESTION:
        forms += [f"okay, {text}", f"excuse me, {text}", f"{plain} nano?"]
    elif polite and words[0] in IMPERATIVE:
        forms += [f"please {plain}", f"{plain} please", f"{plain} now please"]
        forms += [f"can you {plain}?", f"could you {plain}?", f"could you please {plain}?"]
    return forms


def _words(pattern: str) -> set[str]:
    return set(re.findall(r"(?<![\w{.])[a-z']+", pattern.lower()))


def common_words(intents: Iterable[Intent], least: int = 4) -> set[str]:
    """The words that occur in at least ``least`` phrasings of the grammar."""
    counts = Counter(word for i in intents for p in i.phrasings for word in _words(p))
    return {word for word, count in counts.items() if count >= least}


def split_phrasings(
    intent: Intent, vocabulary: set[str], rng: random.Random
) -> tuple[list[str], list[str]]:
    """Train and heldout phrasings; the first is the plainest and always for training.

    Heldout ones are drawn, as far as they go, from those whose words are in ``vocabulary``.
    """
    count = max(1, round(HELDOUT_SHARE * len(intent.phrasings)))
    # Strange words are for the ears' tests: ask here whether a new phrasing of known words is met.
    known = [p for p in intent.phrasings[1:] if _words(p) <= vocabulary]
    strange = [p for p in intent.phrasings[1:] if p not in known]
    held = set((rng.sample(known, len(known)) + rng.sample(strange, len(strange)))[:count])
    train = [p for p in intent.phrasings if p not in held]
    return train, [p for p in intent.phrasings if p in held]
