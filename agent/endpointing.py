"""How long a silence has to last until the user's turn is over.

The hangover follows the speaker, and what the detector of :mod:`stages.turn_end` says shortens or
lengthens it for one silence. All lengths are samples at 16 kHz; there is no clock here.

*The speaker.* A turn is cut when its longest pause outlasts the hangover, so that is what is
remembered of each turn: 0 for most turns of somebody who does not pause. The hangover wanted is the
second longest of the last turns (one odd turn does not move it) and a margin. It is approached
slowly from above, a share of the way with each turn. Where a pause came within the margin of the
hangover, or outlasted it, the hangover grows at once, by no more than half, so that one telephone
call in mid-sentence does not make every later answer late.

*The verdict.* ``min_hangover_ms`` for what surely sounded finished, ``max_hangover_ms`` for what
sounded unfinished, and what the speaker needs in between.

The numbers were chosen by replaying the pauses that the VAD found in recordings of
``python -m bench.endpointing``: 640 turns of speakers who pause much and of ones who hardly do
(seeds 11 and 12), for the thresholds of the verdict 240 others (seed 0); ``bench/results`` shows
yet other turns. Twelve turns, a tenth and 200 ms (half of which is what the VAD takes to notice
speech again) cut 4.1 % of the turns and waited 0.77 s on average; a fixed 700 ms cut 16.2 %, a
fixed second 4.8 %. Eight turns and a fifth: 6.4 % and 0.72 s; 300 ms: 2.8 % and 0.85 s. Trusting
the verdict from 0.9 on cut 12.5 % instead of 10.4 % and saved 24 ms; 0.1 or 0.5 in place of 0.3
changed less than a point.
"""

from __future__ import annotations

from collections import deque

from agent.schema import TurnsConfig
from stages import SAMPLE_RATE

MARGIN_MS = 200  # the hangover is to be longer than the usual longest pause by this
REMEMBERED_TURNS = 12
GROWTH = 1.5  # at most, for one pause
DECAY = 0.1  # of what the hangover is too long by, with each turn
FINISHED = 0.95  # a verdict of at least this ends the turn early
UNFINISHED = 0.3  # one of at most this lets it wait


class Endpointing:
    """The hangover of one speaker, over the turns of a conversation.

    It is plain bookkeeping. Call :meth:`silence` when one begins in the user's turn; then, as they
    come, :meth:`judged`, and :meth:`resumed` or :meth:`ended`; :meth:`overrun` where the end turns
    out not to have been one.
    """

    def __init__(self, turns: TurnsConfig, hangover_ms: int) -> None:
        """Start from ``hangover_ms`` with a speaker of whom nothing is known."""
        self._adapt = turns.adapt
        self._min = _samples(turns.min_hangover_ms)
        self._max = _samples(turns.max_hangover_ms)
        start = _samples(hangover_ms)
        self._settled = self._bounded(start) if turns.adapt else start
        self._longest: deque[int] = deque(maxlen=REMEMBERED_TURNS)  # pause of each past turn
        self._pause = 0  # the longest of the present turn
        self._over = False
        self._verdict: float | None = None
        self._silent = False

    @property
    def hangover(self) -> int:
        """Samples of silence after which the present silence ends the turn."""
        if self._verdict is None or UNFINISHED < self._verdict < FINISHED:
            return self._settled
        if self._verdict >= FINISHED:
            return min(self._settled, self._min)
        return max(self._settled, self._max)

    def silence(self) -> None:
        """A silence begins in the user's turn."""
        if self._over:
            self._close()
        self._silent, self._verdict = True, None

    def judged(self, finished: float) -> None:
        """The sentence is finished with this probability, said of the present silence.

        A verdict that comes when the silence is over changes nothing.

        Raises:
            ValueError: ``finished`` is no probability.
        """
        if not 0 <= finished <= 1:
            raise ValueError(f"finished is {finished}, expected a probability, 0 to 1")
        if self._silent:
            self._verdict = finished

    def resumed(self, silence: int) -> None:
        """The user went on after ``silence`` samples, within the turn."""
        self._went_on(silence)

    def overrun(self, silence: int) -> None:
        """The user went on, ``silence`` samples after the last word, but the turn had been ended.

        Comes instead of :meth:`ended` or after it; the turn then was not over.
        """
        self._over = False
        self._went_on(silence)

    def ended(self) -> None:
        """The turn is over. It counts when the next one has a silence: it may yet go on."""
        self._silent, self._verdict = False, None
        self._over = True

    def _went_on(self, silence: int) -> None:
        self._silent, self._verdict = False, None
        self._pause = max(self._pause, silence)
        if self._adapt:
            needed = min(silence + _samples(MARGIN_MS), round(self._settled * GROWTH))
            self._settled = self._bounded(max(self._settled, needed))

    def _close(self) -> None:
        self._longest.append(self._pause)
        self._pause, self._over = 0, False
        if self._adapt:
            wanted = self._bounded(self._usual() + _samples(MARGIN_MS))
            self._settled -= round(max(0, self._settled - wanted) * DECAY)

    def _usual(self) -> int:
        """The second longest pause of the turns remembered."""
        return sorted(self._longest)[-2] if len(self._longest) > 1 else self._settled

    def _bounded(self, samples: int) -> int:
        return min(max(samples, self._min), self._max)


def _samples(ms: int) -> int:
    return ms * SAMPLE_RATE // 1000
