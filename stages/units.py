"""The unit format: streams of units, their interleaving in time, and strings of tokens.

A unit is one discrete speech token: phonetic ``Hu``, pitch ``Pi`` or style ``St``. Each kind is a
stream at its own rate; :func:`interleave` merges the streams into the one order in which the
language model reads them, :class:`Interleaver` does the same while the streams still grow, and
:func:`string_to_units` goes back. Everything here is a pure function of its input.

Source of the rules: DESIGN.md section 6 and the README of the conformance kit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from stages import SAMPLE_RATE

STYLE, PITCH, HUBERT = "St", "Pi", "Hu"
KINDS = (STYLE, PITCH, HUBERT)
"""In the order in which units of the same instant stand in the stream."""

RATES: Mapping[str, float] = {STYLE: 1.0, PITCH: 12.5, HUBERT: 24.99}
"""Units per second, for ordering. 24.99 and not 25: units drift late against pitch and style."""

HOPS: Mapping[str, int] = {STYLE: SAMPLE_RATE, PITCH: 1280, HUBERT: 640}
"""Samples from one unit of a stream to the next."""

DEDUP = frozenset({PITCH, HUBERT})
"""Kinds of which consecutive repeats are dropped."""

RANDOM_STYLES = (71, 68, 98)
"""Where there is pitch but no style, one of these is drawn."""

_TOKEN = re.compile(r"\[(Hu|Pi|St)([0-9]+)\]")
T = TypeVar("T")


@dataclass
class Units:
    """The unit streams of one utterance, each at its own rate.

    Attributes:
        hubert: phonetic units, 25 Hz, repeats included.
        pitch: pitch units, 12.5 Hz, or one per phonetic unit once read back from a string; None
            where there are none (Base).
        style: style units, 1 Hz, or one per phonetic unit; None where there are none.
    """

    hubert: list[int]
    pitch: list[int] | None = None
    style: list[int] | None = None

    def streams(self) -> dict[str, list[int]]:
        """The streams that are there, by kind."""
        named = {STYLE: self.style, PITCH: self.pitch, HUBERT: self.hubert}
        return {kind: stream for kind, stream in named.items() if stream is not None}

    def __add__(self, other: Units) -> Units:
        """Both in time order; a stream that is missing on both sides stays missing."""

        def join(a: list[int] | None, b: list[int] | None) -> list[int] | None:
            return None if a is None and b is None else (a or []) + (b or [])

        return Units(
            self.hubert + other.hubert,
            join(self.pitch, other.pitch),
            join(self.style, other.style),
        )

    def to_strings(self) -> dict[str, str]:
        """``{"hubert": "1 2 3", ...}``: the form in which the reference returns units."""
        names = {HUBERT: "hubert", PITCH: "pitch", STYLE: "style"}
        streams = self.streams()
        return {n: " ".join(map(str, streams[k])) for k, n in names.items() if k in streams}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> Units:
        """The reverse of :meth:`to_strings`. Raises :class:`ValueError` on what is no number."""

        def numbers(name: str) -> list[int] | None:
            return [int(n) for n in strings[name].split()] if name in strings else None

        return cls(numbers("hubert") or [], numbers("pitch"), numbers("style"))


class Unit(NamedTuple):
    """One unit: ``kind`` is "Hu", "Pi" or "St"."""

    kind: str
    index: int  # type: ignore[assignment]  # tuple.index is of no use here

    def __str__(self) -> str:
        return f"[{self.kind}{self.index}]"


@dataclass(frozen=True)
class UnitFrame:
    """A unit with its place on the sample clock.

    Attributes:
        kind: "Hu", "Pi" or "St".
        index: which unit of its kind.
        sample: the sample (16 kHz) at which the unit starts.
        final: neither the unit nor its place among the others will change.
    """

    kind: str
    index: int
    sample: int
    final: bool = True

    @property
    def unit(self) -> Unit:
        return Unit(self.kind, self.index)

    def __str__(self) -> str:
        return f"[{self.kind}{self.index}]"


class Interleaver:
    """Interleaves unit streams while they grow.

    Every :meth:`push` returns the frames whose place has become certain: no frame that sorts
    before them can still come. Those of all pushes and of :meth:`flush`, put together, are exactly
    what :func:`interleave` gives for the whole, in any chunking. A style unit stands at the start
    of the second it describes, so until it is pushed nothing of that second is certain: use
    :meth:`tail` for what would stand there.
    """

    def __init__(
        self,
        kinds: Iterable[str] = KINDS,
        *,
        rates: Mapping[str, float] = RATES,
        dedup: Iterable[str] = DEDUP,
    ) -> None:
        """``kinds``: the streams that will come; an unpushed stream holds all others back."""
        wanted = set(kinds)
        if not wanted <= set(KINDS):
            raise ValueError(f"kinds {sorted(wanted)}: expected some of {', '.join(KINDS)}")
        self._kinds = [kind for kind in KINDS if kind in wanted]
        self._rates = rates
        self._dedup = frozenset(dedup)
        self.reset()

    def reset(self) -> None:
        """A new utterance."""
        self._seen = dict.fromkeys(self._kinds, 0)
        self._last: dict[str, int | None] = dict.fromkeys(self._kinds)
        self._held: dict[str, list[tuple[float, UnitFrame]]] = {k: [] for k in self._kinds}

    def push(self, units: Units) -> list[UnitFrame]:
        """Append ``units`` to the streams; the frames that are certain now.

        Streams that this object was not told of are ignored.
        """
        for kind, stream in units.streams().items():
            if kind in self._seen:
                self._held[kind] += self._frames(kind, stream)
                self._seen[kind] += len(stream)
                self._last[kind] = stream[-1] if stream else self._last[kind]
        # A stream can still bring a frame at the place after its last unit, and none before.
        horizon = min(self._key(kind, self._seen[kind]) for kind in self._kinds)
        ready: list[tuple[float, int, UnitFrame]] = []
        for order, kind in enumerate(self._kinds):
            held = self._held[kind]
            count = sum((time, KINDS.index(kind)) < horizon for time, _ in held)
            ready += [(time, order, frame) for time, frame in held[:count]]
            del held[:count]
        return [frame for _, _, frame in sorted(ready, key=lambda r: r[:2])]

    def flush(self) -> list[UnitFrame]:
        """The streams have ended: the frames left. Starts anew."""
        rest = self._sorted({kind: [] for kind in self._kinds}, final=True)
        self.reset()
        return rest

    def tail(self, guess: Units | None = None) -> list[UnitFrame]:
        """The frames that would still come if the streams went on with ``guess`` and ended.

        Nothing is remembered; the frames are marked as not final.
        """
        streams = guess.streams() if guess is not None else {}
        return self._sorted({kind: streams.get(kind, []) for kind in self._kinds}, final=False)

    def _key(self, kind: str, index: int) -> tuple[float, int]:
        return index / self._rates[kind], KINDS.index(kind)

    def _frames(
        self, kind: str, stream: Sequence[int], final: bool = True
    ) -> list[tuple[float, UnitFrame]]:
        """The frames of the next units of a stream, without repeats, each with its time."""
        frames = []
        last = self._last[kind]
        for position, index in enumerate(stream, start=self._seen[kind]):
            if not (kind in self._dedup and index == last):
                frame = UnitFrame(kind, index, position * HOPS[kind], final)
                frames.append((position / self._rates[kind], frame))
            last = index
        return frames

    def _sorted(self, streams: Mapping[str, Sequence[int]], final: bool) -> list[UnitFrame]:
        rest: list[tuple[float, UnitFrame]] = []
        for kind in self._kinds:
            held = self._held[kind]
            if not final:
                held = [(t, UnitFrame(f.kind, f.index, f.sample, False)) for t, f in held]
            rest += held + self._frames(kind, streams[kind], final)
        return [frame for _, frame in sorted(rest, key=lambda r: r[0])]


def interleave(
    units: Units,
    *,
    has_pitch: bool | None = None,
    has_style: bool | None = None,
    rates: Mapping[str, float] = RATES,
    dedup: Iterable[str] = DEDUP,
) -> list[UnitFrame]:
    """All units in the order of the token stream.

    Unit ``i`` of a stream stands at ``i / rate`` seconds; ties in the order St, Pi, Hu; repeats of
    the kinds in ``dedup`` are dropped, the first one kept. Inputs cut into pieces of 100 s count
    on through the pieces, as in the reference.

    Args:
        has_pitch, has_style: whether to put these streams in; by default if they are there.

    Raises:
        ValueError: a stream is asked for that ``units`` does not have.
    """
    kinds = [HUBERT]
    for kind, stream, wanted in (
        (PITCH, units.pitch, has_pitch),
        (STYLE, units.style, has_style),
    ):
        if wanted and stream is None:
            raise ValueError(
                f"the units have no {kind} stream: encode with an Expressive tokenizer, or leave "
                "it out of the string"
            )
        if stream is not None and wanted is not False:
            kinds.append(kind)
    interleaver = Interleaver(kinds, rates=rates, dedup=dedup)
    return interleaver.push(units) + interleaver.flush()


def units_to_string(
    units: Units,
    *,
    has_pitch: bool | None = None,
    has_style: bool | None = None,
    rates: Mapping[str, float] = RATES,
    dedup: Iterable[str] = DEDUP,
) -> str:
    """``[St71][Pi39][Hu99][Hu49]...``: the units as the language model reads them.

    Arguments and errors as for :func:`interleave`.
    """
    frames = interleave(units, has_pitch=has_pitch, has_style=has_style, rates=rates, dedup=dedup)
    return "".join(map(str, frames))


def speech_tokens(string: str) -> str:
    """The complete tokens like ``[Hu12]`` in ``string``, without anything in between."""
    return "".join(match[0] for match in _TOKEN.finditer(string))


def string_to_units(
    string: str,
    *,
    duplicate_hubert_for_multiple_pitch: bool = False,
    rng: random.Random | None = None,
) -> Units:
    """Read units back from a string: each Hu takes the latest Pi and St before it.

    Units before the first Pi or St take that first one. Whatever is no complete ``[Hu12]`` token
    is skipped: tags, text, a token cut off in the middle. (The reference takes text that follows
    a token for a part of its number: see :func:`reference_units`.)

    Args:
        duplicate_hubert_for_multiple_pitch: of several pitches in a row, each after the first
            repeats the unit before it, instead of only the last one counting.
        rng: draws the style where there is pitch but no style; without it the style stays None.

    Returns:
        streams of equal length; ``pitch`` or ``style`` is None if no such token occurs.
    """
    tokens = [(kind, int(number)) for kind, number in _TOKEN.findall(string)]
    units = _assign(tokens, duplicate_hubert_for_multiple_pitch)
    if rng is not None and units[PITCH] is not None and units[STYLE] is None:
        units[STYLE] = [rng.choice(RANDOM_STYLES)] * len(units[HUBERT] or ())
    return Units(units[HUBERT] or [], units[PITCH], units[STYLE])


def reference_units(
    string: str,
    *,
    duplicate_hubert_for_multiple_pitch: bool = False,
    rng: random.Random | None = None,
) -> dict[str, str]:
    """What the reference reads from ``string``, to the letter: ``{"hubert": "12]ab 13", ...}``.

    For comparisons only; it is :func:`string_to_units` for every well-formed string. A fragment
    after a "[" counts if it starts with Hu, Pi or St and a digit, and its number is everything up
    to its last character, "]" or not.
    """
    tokens = [
        (part[:2], part[2:-1])
        for part in string.split("[")
        if part[:2] in KINDS and part[2:3].isdigit()
    ]
    units = _assign(tokens, duplicate_hubert_for_multiple_pitch)
    if units[PITCH] is not None and units[STYLE] is None:
        style = str((rng or random.Random()).choice(RANDOM_STYLES))
        units[STYLE] = [style] * len(units[HUBERT] or ())
    names = {"hubert": HUBERT, "pitch": PITCH, "style": STYLE}
    return {n: " ".join(units[k] or ()) for n, k in names.items() if units[k] is not None}


def _assign(tokens: Iterable[tuple[str, T]], duplicate: bool) -> dict[str, list[T] | None]:
    """Streams of equal length by kind; None for pitch or style that do not occur."""
    now: dict[str, T] = {}
    first: dict[str, T] = {}
    rows: list[dict[str, T]] = []
    pitches = 0  # since the last Hu
    for kind, index in tokens:
        now[kind] = index
        first.setdefault(kind, index)
        pitches = pitches + 1 if kind == PITCH else 0 if kind == HUBERT else pitches
        if kind == HUBERT or (kind == PITCH and duplicate and pitches > 1):
            rows.append(dict(now))
    if HUBERT not in first:
        rows = []
    streams: dict[str, list[T] | None] = {HUBERT: [row.get(HUBERT, first[HUBERT]) for row in rows]}
    for kind in (PITCH, STYLE):
        streams[kind] = [row.get(kind, first[kind]) for row in rows] if kind in first else None
    return streams
