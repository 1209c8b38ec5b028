"""One reply in the making, and the messages about it that travel from stage to stage.

A turn may take several attempts: each silence in which the speaker may have finished begins one,
and whatever the speaker then adds throws it away. Nothing of an attempt is told or played before it
is answered with.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agent.events import Event, ReplyAudio
from agent.spoken import SpokenWords
from agent.telemetry import TurnTrace
from stages import SAMPLE_RATE
from stages.encoder import Revision
from stages.units import Unit
from stages.vocoder_stream import AudioChunk, UnitSpan

_FIRST_SOUND = 10 ** (-40 / 20)  # peak of full scale under which nobody hears a reply begin
_LEAD = SAMPLE_RATE // 25  # samples kept before the first sound: consonants rise slowly
_SILENCE_LEVEL = 10 ** (-50 / 20)  # RMS of full scale under which a reply's sound counts as silence


@dataclass(eq=False)
class Attempt:
    """The state of one reply.

    Attributes:
        stamp: what its items carry; cancelling the attempt makes them stale.
        decided: set when it is known whether the reply is wanted; a stale one is not.
        marks: when what happened, for the trace if this reply is the one.
        enough: units after which the reply is long enough; ``None`` if it ends by itself.
        ended: why the reply ended.
        action: what it does besides speaking.
        samples: handed to the playback so far.
        finished: all of it has been handed over.
        spans: the ledger: which unit was handed to the playback for which samples.
        words: its text against its sound.
    """

    stamp: int
    trace: TurnTrace
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    marks: dict[str, float] = field(default_factory=dict)
    enough: int | None = None
    ended: str = ""
    samples: int = 0
    finished: bool = False
    decode_seconds: float = 0.0
    action: dict[str, Any] | None = None
    spans: list[UnitSpan] = field(default_factory=list)
    words: SpokenWords = field(default_factory=SpokenWords)
    _quiet: int = 0
    _skipped: int = 0  # samples of silence before the first sound
    _before: tuple[UnitSpan, ...] = ()  # what was spoken in them
    _sounds: bool = False

    def mark(self, name: str, time: float) -> None:
        """Note the first time that ``name`` happens."""
        self.marks.setdefault(name, time)

    def from_first_sound(self, chunk: AudioChunk, patience: int) -> AudioChunk | None:
        """``chunk`` without the silence that the reply begins with; ``None`` if that is all.

        The units of that silence are kept in the ledger, as heard with the first sound. More than
        ``patience`` samples of it set :attr:`enough`.
        """
        start = 0
        if not self._sounds:
            loud = np.flatnonzero(np.abs(chunk.samples) > _FIRST_SOUND)
            self._sounds = bool(len(loud))
            start = max(0, int(loud[0]) - _LEAD) if self._sounds else len(chunk.samples)
        self._skipped += start
        if not self._sounds:
            self._before += chunk.units
            if self._skipped >= patience:
                self.ended, self.enough = "long enough", 0
            return None
        units = tuple(self._moved(span) for span in (*self._before, *chunk.units))
        self._before = ()
        first = chunk.first_sample + start - self._skipped
        return AudioChunk(chunk.samples[start:], first, units)

    def _moved(self, span: UnitSpan) -> UnitSpan:
        start, end = (max(0, at - self._skipped) for at in (span.start, span.end))
        return replace(span, start=start, end=end)

    def limit(self, chunk: AudioChunk, longest: int, patience: int) -> AudioChunk | None:
        """What of ``chunk`` may be played; sets :attr:`enough` where the reply has to end.

        Args:
            longest: samples of a reply at most.
            patience: samples of silence after which it is over.
        """
        samples = chunk.samples[: max(0, longest - chunk.first_sample)]
        if not len(samples):
            return None
        end = chunk.first_sample + len(samples)
        loud = float(np.sqrt(np.mean(np.square(samples)))) > _SILENCE_LEVEL
        self._quiet = 0 if loud else self._quiet + len(samples)
        if end >= longest or self._quiet >= patience:
            self.ended = "long enough"
            begun = (span.token + 1 for span in chunk.units if span.start < longest)
            self.enough = max(begun, default=0)
        return AudioChunk(samples, chunk.first_sample, chunk.units)

    def handed_over(self, sound: ReplyAudio, time: float) -> None:
        """Note that the playback has got more of the reply."""
        self.mark("first_sample", time)
        self.marks["last_sample"] = time
        self.samples = sound.first_sample + len(sound.samples)
        self.spans += sound.units

    def heard_units(self, heard: int) -> int:
        """Units of the reply of which something was heard after ``heard`` samples."""
        return max((span.token + 1 for span in self.spans if span.start < heard), default=0)

    def fill(self, trace: TurnTrace) -> None:
        """Write what became of the reply into its turn's trace."""
        trace.marks.update(self.marks)
        trace.said = self.words.text
        trace.action = self.action
        trace.reply_samples = self.samples
        trace.decode_seconds = self.decode_seconds


# From ``listen`` to ``encode``, and on to ``think``.


@dataclass(frozen=True)
class Opened:
    """A turn begins."""

    trace: TurnTrace


@dataclass(frozen=True)
class Written:
    """A turn begins whose request is ``text``; or, with ``say``, whose reply it is."""

    trace: TurnTrace
    text: str
    say: bool = False


@dataclass(frozen=True, eq=False)
class Sound:
    """More of the request: float32 ``[n]`` at 16 kHz."""

    trace: TurnTrace
    samples: np.ndarray


@dataclass(frozen=True)
class News:
    """More of the request's units."""

    trace: TurnTrace
    revision: Revision


@dataclass(frozen=True)
class Wanted:
    """Encode what was heard exactly, then reply to it. Nothing was heard if it was ``typed``."""

    attempt: Attempt
    typed: bool = False


@dataclass(frozen=True)
class Over:
    """A turn is over.

    Attributes:
        units: heard of the reply; ``None`` for all.
        characters: heard of the reply's text.
        forget: the turn is to leave no memory.
    """

    trace: TurnTrace
    units: int | None = None
    characters: int = 0
    forget: bool = False


Order = Opened | Written | Sound | News | Wanted | Over


# From ``think`` to ``speak``, and on to ``deliver``.


@dataclass(frozen=True)
class Said:
    """The next unit of a reply; ``None`` at its end."""

    attempt: Attempt
    unit: Unit | None


@dataclass(frozen=True)
class Ready:
    """What is to be told or played once the reply is wanted; ``None`` at its end."""

    attempt: Attempt
    event: Event | None
