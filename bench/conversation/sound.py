"""Sound that comes and goes: audio handed out at the pace of the clock, and when one was heard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stages import SAMPLE_RATE

CHUNK = 320  # 20 ms
SILENT = 10 ** (-45 / 20)
"""A peak below this (of full scale) is silence."""
_PAUSE = 0.3  # seconds of silence inside one stretch of sound
NOISE = 0.0016  # RMS of what lies under everything that is said, about -56 dBFS


class Pace:
    """Hands out audio as a microphone does: each chunk when its last sample was spoken.

    Attributes:
        position: samples handed out.
    """

    def __init__(self) -> None:
        self.position = 0
        self._start = time.perf_counter()

    def resume(self) -> None:
        """Go on from here after a break, in which no audio came."""
        self._start = time.perf_counter() - self.position / SAMPLE_RATE

    def when(self, sample: int) -> float:
        """The time at which ``sample`` was or is due, s of the performance counter.

        Only for what was handed out since the last break.
        """
        return self._start + sample / SAMPLE_RATE

    async def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """``chunk``, once it is due."""
        self.position += len(chunk)
        await asyncio.sleep(max(0.0, self.when(self.position) - time.perf_counter()))
        return chunk


@dataclass
class Stretch:
    """Sound from ``begin`` to ``end``, seconds."""

    begin: float
    end: float


class Listener:
    """Notes when there is sound in a stream of blocks.

    Attributes:
        stretches: of sound so far, in order; pauses of less than 0.3 s are part of one.
    """

    def __init__(self, rate: int = SAMPLE_RATE, silent: float = SILENT) -> None:
        """``silent``: peak below which a sample counts as silence."""
        self._rate = rate
        self._silent = silent
        self.stretches: list[Stretch] = []

    def block(self, samples: np.ndarray, time: float) -> None:
        """``samples`` (float, full scale 1), the first of which is heard at ``time``, s."""
        loud = np.flatnonzero(np.abs(samples) >= self._silent)
        if not len(loud):
            return
        begin, end = time + loud[0] / self._rate, time + (loud[-1] + 1) / self._rate
        if self.stretches and begin - self.stretches[-1].end < _PAUSE:
            self.stretches[-1].end = end
        else:
            self.stretches.append(Stretch(begin, end))

    def first_after(self, time: float, before: float = float("inf")) -> float | None:
        """When the first sound began that begins between the two times."""
        begins = (s.begin for s in self.stretches if time <= s.begin < before)
        return next(begins, None)

    def silent_after(self, time: float) -> float:
        """When the sound that was there at ``time`` ended; ``time`` itself if there was none."""
        ends = (s.end for s in self.stretches if s.begin <= time < s.end)
        return next(ends, time)


class Trace(Protocol):
    """What of a turn's trace is looked at here."""

    @property
    def speech(self) -> tuple[int, int]: ...


def matched(
    begins: Sequence[int], ends: Sequence[int], turns: Sequence[Trace]
) -> list[tuple[int, int | None]]:
    """For each request: turns that ended inside it, and the index of the turn that is its own.

    Args:
        begins, ends: of the speech of each request, on the session's clock.
        turns: in order, with where the session took speech to have ended.
    """
    about = SAMPLE_RATE // 4  # the VAD and the synthesiser differ on where speech ends
    found: list[tuple[int, int | None]] = []
    for begin, end in zip(begins, ends, strict=True):
        mine = [n for n, t in enumerate(turns) if begin < t.speech[1] <= end + about]
        own = [n for n in mine if turns[n].speech[1] > end - about]
        found.append((len(mine) - len(own), own[-1] if own else None))
    return found
