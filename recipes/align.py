"""From phoneme durations to phones and words with times.

The synthesisers know when each phoneme sounds; nothing is estimated here. One phone alphabet is
used for all of them, the symbols of hibari-tts (IPA-like, without stress); "sil" is silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Segment = tuple[str, float, float]  # name, start and end in seconds

STRESS = frozenset("ˈˌː")
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
    phonemes: str, frames: Sequence[int], hop: float, words: Sequence[str], start: float = 0.0
) -> tuple[list[Segment], list[Segment] | None, float]:
    """Phones and words of one sentence.

    ``frames`` holds one duration per character of ``phonemes`` and one for each pad before and
    after, in frames of ``hop`` seconds. Stress marks count to the phone after them, spaces to the
    one before, punctuation and pads are silence. ``words`` are the sentence's words in writing; the
    result's words are None when their number differs from the groups of phonemes. Also returns the
    end in seconds. Raises ValueError when the numbers of phonemes and durations do not fit.
    """
    if len(frames) != len(phonemes) + 2:
        raise ValueError(f"{len(frames)} durations for {len(phonemes)} phonemes and two pads")
    phones: list[Segment] = []
    groups: list[tuple[float, float]] = []
    now = start
    pending = 0.0  # length of stress marks waiting for their vowel
    fresh = True
    for symbol, count in zip(f"\0{phonemes}\0", frames, strict=True):
        length = count * hop
        if symbol in STRESS:
            pending += length
        elif symbol == " " and phones:
            phones[-1] = (phones[-1][0], phones[-1][1], now + length)
        elif symbol in PUNCTUATION or symbol in "\0 ":
            _append(phones, "sil", now, now + length)
        else:
            phones.append((symbol, now - pending, now + length))
            groups = _extend(groups, fresh, now - pending, now + length)
            pending = 0.0
        if symbol not in STRESS:
            fresh = symbol in PUNCTUATION or symbol in "\0 "
        now += length
    named = None
    if len(groups) == len(words):
        named = [
            (word, round(a, 4), round(b, 4)) for word, (a, b) in zip(words, groups, strict=True)
        ]
    return [(p, round(a, 4), round(b, 4)) for p, a, b in phones], named, now


def _append(phones: list[Segment], name: str, start: float, end: float) -> None:
    if phones and phones[-1][0] == name:
        phones[-1] = (name, phones[-1][1], end)
    elif end > start:
        phones.append((name, start, end))


def _extend(
    groups: list[tuple[float, float]], fresh: bool, start: float, end: float
) -> list[tuple[float, float]]:
    if fresh:
        return [*groups, (start, end)]
    return [*groups[:-1], (groups[-1][0], end)]


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
        phones.append((CMU[name], round(start, 4), round(float(end), 4)))
        start = float(end)
    return phones


def shift(segments: Iterable[Segment] | None, seconds: float) -> list[Segment] | None:
    """The same segments later by ``seconds``."""
    if segments is None:
        return None
    return [(name, round(a + seconds, 4), round(b + seconds, 4)) for name, a, b in segments]
