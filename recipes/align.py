"""From phoneme durations to phones and words with times.

The synthesisers know how long each phoneme sounds. One phone alphabet is used for all of them, the
symbols of hibari-tts (IPA-like, without stress); "sil" is silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Segment = tuple[str, float, float]  # name, start and end in seconds

MARKS = frozenset("ˈˌː ")  # no sounds of their own
PUNCTUATION = frozenset(';:,.!?—…"()“”')

# CMU phones of flite -> hibari's symbols. Diphthongs are capitals there: A of "day", I of "my",
# O of "go", W of "now", Y of "boy".
CMU = {
    "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "W", "ax": "ə", "ay": "I", "b": "b",
    "ch": "ʧ", "d": "d", "dh": "ð", "eh": "ɛ", "er": "ɜ", "ey": "A", "f": "f", "g": "ɡ",
    "hh": "h", "ih": "ɪ", "iy": "i", "jh": "ʤ", "k": "k", "l": "l", "m": "m", "n": "n",
    "ng": "ŋ", "ow": "O", "oy": "Y", "p": "p", "r": "ɹ", "s": "s", "sh": "ʃ", "t": "t",
    "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z", "zh": "ʒ",
    "pau": "sil",
}  # fmt: skip


def align(
    phonemes: str, frames: Sequence[int], hop: float, words: Sequence[str], lead: float = 0.0
) -> tuple[list[Segment], list[Segment] | None]:
    """Phones and words of one sentence, in seconds from its start.

    ``frames`` holds one duration per character of ``phonemes`` and one for each pad before and
    after, in frames of ``hop`` seconds; the sound comes ``lead`` seconds before its label. Stress
    marks and spaces are shared by the phones around them; punctuation and pads are silence.
    ``words`` are the sentence's words in writing; the result's words are None when their number
    differs from the groups of phonemes. Raises ValueError when the numbers of phonemes and
    durations do not fit.
    """
    if len(frames) != len(phonemes) + 2:
        raise ValueError(f"{len(frames)} durations for {len(phonemes)} phonemes and two pads")
    phones: list[Segment] = []
    groups: list[tuple[float, float]] = []
    now, fresh = -lead, True
    symbols = f"\0{phonemes}\0"
    for symbol, count in zip(symbols, _shared(symbols, frames), strict=True):
        start, now = max(now, 0.0), now + count * hop
        if symbol in MARKS:
            fresh = fresh or symbol == " "
        elif symbol in PUNCTUATION or symbol == "\0":
            fresh = True
            _append(phones, "sil", start, now)
        else:
            phones.append((symbol, start, now))
            groups = [*groups, (start, now)] if fresh else [*groups[:-1], (groups[-1][0], now)]
            fresh = False
    end = sum(frames) * hop
    _append(phones, "sil", now, end)
    named = None
    if len(groups) == len(words):
        named = [(word, *times) for word, times in zip(words, groups, strict=True)]
    return phones, named


def _shared(symbols: str, frames: Sequence[int]) -> list[float]:
    """Durations with those of stress marks and spaces given to the symbols around, half each."""
    lengths = [float(count) for count in frames]
    for place, symbol in enumerate(symbols):
        if symbol in MARKS:
            before = next(i for i in range(place - 1, -1, -1) if symbols[i] not in MARKS)
            after = next(i for i in range(place + 1, len(symbols)) if symbols[i] not in MARKS)
            lengths[before] += frames[place] / 2
            lengths[after] += frames[place] / 2
            lengths[place] = 0.0
    return lengths


def _append(phones: list[Segment], name: str, start: float, end: float) -> None:
    if phones and phones[-1][0] == name:
        phones[-1] = (name, phones[-1][1], end)
    elif end > start:
        phones.append((name, start, end))


def flite_segments(printed: str) -> list[Segment]:
    """Phones from the output of ``flite -psdur``: "phone:end" with the end in seconds.

    Raises ValueError at a phone outside the CMU alphabet.
    """
    phones: list[Segment] = []
    start = 0.0
    for field in printed.split():
        name, _, end = field.partition(":")
        if name not in CMU or not end:
            raise ValueError(f"flite printed an unknown phone {field!r} in {printed[:80]!r}")
        phones.append((CMU[name], start, float(end)))
        start = float(end)
    return phones


def shift(
    segments: Iterable[Segment] | None, seconds: float, end: float = math.inf
) -> list[Segment] | None:
    """The same segments later by ``seconds``, to 0.1 ms, none of them after ``end``."""
    if segments is None:
        return None
    moved = ((name, a + seconds, min(b + seconds, end)) for name, a, b in segments)
    return [(name, round(a, 4), round(b, 4)) for name, a, b in moved if b > a]


VOWELS = frozenset("ɑæʌɔWəIɛɜAɪiOYʊu")
SKIPPED, ALIKE, OTHER = 0.7, 0.4, 1.0  # costs of matching two pronunciations


def match_words(
    phones: Sequence[Segment], words: Sequence[str], pronounced: Sequence[str]
) -> list[Segment] | None:
    """Times of ``words`` in ``phones`` of a synthesiser that does not tell where its words are.

    ``pronounced`` holds the phonemes of each word as another one would say them; the two
    pronunciations are matched at the least cost. None when a word has no sound of its own.
    """
    said = [segment for segment in phones if segment[0] != "sil"]
    expected = [(p, i) for i, word in enumerate(pronounced) for p in word if p not in MARKS]
    spans: list[tuple[float, float] | None] = [None] * len(words)
    for at, wanted in _matched([name for name, _, _ in said], [p for p, _ in expected]):
        _, start, end = said[at]
        before = spans[expected[wanted][1]]
        spans[expected[wanted][1]] = (before[0] if before else start, end)
    found = [(word, *span) for word, span in zip(words, spans, strict=True) if span]
    return found if len(found) == len(words) else None


def _matched(said: Sequence[str], expected: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices of the cheapest alignment (Needleman and Wunsch, 1970), in order."""
    rows, columns = len(said) + 1, len(expected) + 1
    cost = [[SKIPPED * (i + j) for j in range(columns)] for i in range(rows)]

    def swap(i: int, j: int) -> float:
        a, b = said[i - 1], expected[j - 1]
        price = 0.0 if a == b else ALIKE if (a in VOWELS) == (b in VOWELS) else OTHER
        return cost[i - 1][j - 1] + price

    for i in range(1, rows):
        for j in range(1, columns):
            cost[i][j] = min(swap(i, j), cost[i - 1][j] + SKIPPED, cost[i][j - 1] + SKIPPED)
    pairs: list[tuple[int, int]] = []
    i, j = rows - 1, columns - 1
    while i and j:
        if cost[i][j] == swap(i, j):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif cost[i][j] == cost[i - 1][j] + SKIPPED:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]
