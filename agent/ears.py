"""What listens: voice activity, a hangover that follows the speaker, and a judge of sentences."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import numpy as np

from agent.config import Config
from agent.endpointing import Endpointing
from agent.models import Models
from agent.telemetry import ArrivalClock
from agent.workers import Worker
from stages import SAMPLE_RATE
from stages.vad import SilenceStarted, SpeechEnded, SpeechResumed, SpeechStarted, VadEvent

_JUDGED = 8 * SAMPLE_RATE  # the end of the request, which the judge looks at


class Ears:
    """The voice activity detector of a session, and how long it waits in a silence.

    Attributes:
        speech: where the latest utterance began, and where it last seemed to end; samples.
        position: samples that have arrived.
    """

    def __init__(
        self, models: Models, config: Config, clock: Callable[[], float],
        worker: Callable[[str], Worker],
    ) -> None:  # fmt: skip
        self._clock = clock
        self._vad = models.vad()
        self._endpointing = Endpointing(config.turns, config.vad.hangover_ms)
        self._arrivals = ArrivalClock()
        self._judge = models.turn_end()
        self._thread = worker("turn-end") if self._judge is not None else None
        self._recent: deque[np.ndarray] = deque()  # the end of the request
        self._judging: asyncio.Task[None] | None = None
        self.speech = (0, 0)
        self.position = 0

    @property
    def in_utterance(self) -> bool:
        """Whether somebody is speaking, as far as one knows."""
        return self._vad.in_utterance

    def arrived(self, position: int) -> None:
        """Audio up to ``position`` is here now."""
        self.position = position
        self._arrivals.arrived(position, self._clock())

    def when(self, sample: int) -> float:
        """When ``sample`` arrived, by the clock."""
        return self._arrivals.when(sample)

    def push(self, piece: np.ndarray) -> list[VadEvent]:
        """A stretch of audio, best no longer than a VAD frame; what it means."""
        return self._vad.push(piece)

    def flush(self) -> list[VadEvent]:
        """The audio has ended."""
        return self._vad.flush()

    def drop(self) -> None:
        """Nothing more comes of the utterance, nor of what is kept of it."""
        self._vad.drop()
        self._recent.clear()

    def see(self, event: VadEvent) -> None:
        """Take note of where speech begins and ends, before it is acted on."""
        if isinstance(event, SpeechStarted):
            self.speech = (event.sample, event.sample)
        elif isinstance(event, SilenceStarted):
            self.speech = (self.speech[0], event.sample)
        elif isinstance(event, SpeechEnded):
            self.speech = (self.speech[0], event.end_of_speech)

    def begin(self) -> None:
        """A request begins."""
        self._recent.clear()

    def remember(self, samples: np.ndarray) -> None:
        """More of a request, for the judge."""
        if self._judge is None:
            return
        self._recent.append(samples)
        while sum(map(len, self._recent)) - len(self._recent[0]) > _JUDGED:
            self._recent.popleft()

    def pace(self, event: VadEvent) -> None:
        """Learn from a pause of a request how long to wait in the next, and in this one."""
        if isinstance(event, SilenceStarted):
            self._endpointing.silence()
            self._ask()
        elif isinstance(event, SpeechResumed):
            self._endpointing.resumed(event.sample - self.speech[1])
        elif isinstance(event, SpeechEnded):
            self._endpointing.ended()
        self._vad.hangover = self._endpointing.hangover

    def overran(self, gap: int) -> None:
        """The speaker went on ``gap`` samples after they seemed to have finished."""
        self._endpointing.overrun(gap)
        self._vad.hangover = self._endpointing.hangover

    async def close(self) -> None:
        """End the judge's thread."""
        if self._judging is not None:
            self._judging.cancel()
            await asyncio.gather(self._judging, return_exceptions=True)
        if self._thread is not None:
            await self._thread.close()

    def _ask(self) -> None:
        """Have it judged, beside everything else, whether the sentence sounded finished."""
        idle = self._judging is None or self._judging.done()
        if self._judge is not None and self._recent and idle:
            heard = np.concatenate(self._recent)[-_JUDGED:]
            self._judging = asyncio.create_task(
                self._hear_verdict(heard, self.speech), name="judge"
            )

    async def _hear_verdict(self, heard: np.ndarray, speech: tuple[int, int]) -> None:
        assert self._judge is not None and self._thread is not None
        finished = await self._thread.run(self._judge.probability, heard)
        if self.speech == speech and self._vad.in_utterance:
            self._endpointing.judged(finished)
            self._vad.hangover = self._endpointing.hangover
