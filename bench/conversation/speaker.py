"""Who speaks to the agent in a benchmark: one request after the other, at the pace of the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agent.playback import Playback
from agent.session import Session
from bench.conversation.sound import CHUNK, NOISE, Pace
from stages import SAMPLE_RATE

_AFTER = 5 * SAMPLE_RATE // 2  # samples in which a request that was noticed has become a turn
_OVER = 3 * SAMPLE_RATE // 5  # samples of a reply that are heard before it is interrupted


class Saying(Protocol):
    """A request: float32 at 16 kHz, and one past the last sample of its speech."""

    @property
    def wave(self) -> np.ndarray: ...

    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Said:
    """What was said when.

    Attributes:
        start, end: of the recording's first sample and of the speech's end, session clock.
        end_time: the end in seconds of the performance counter.
        over: it was said over a reply, to interrupt it.
    """

    start: int
    end: int
    end_time: float
    over: bool


class Speaker:
    """Says the requests, each when the reply to the one before was heard, or over that reply.

    Args:
        requests: each with whether it is to interrupt the reply before it.
        listen: seconds of a reply after which it has been heard enough and is stopped.
        between: awaited before each request that does not interrupt; no audio comes meanwhile.
        noise: RMS of the noise between the requests and under them.

    Attributes:
        said: the requests so far.
    """

    def __init__(
        self,
        requests: Iterable[tuple[Saying, bool]],
        listen: float = float("inf"),
        between: Callable[[], Awaitable[None]] | None = None,
        noise: float = NOISE,
        seed: int = 0,
    ) -> None:
        self._requests = iter(requests)
        self._listen = listen
        self._between = between
        self._noise = np.random.default_rng(seed).normal(0, noise, SAMPLE_RATE).astype(np.float32)
        self._ended = asyncio.Event()
        self._pace = Pace()
        self.said: list[Said] = []

    def over(self) -> None:
        """A turn has ended."""
        self._ended.set()

    async def speak(self, playback: Playback, session: Session) -> AsyncIterator[np.ndarray]:
        """All requests, in real time."""
        self._pace.resume()
        following = next(self._requests, None)
        over = False
        while following is not None:
            request = following[0]
            if self._between is not None and not over:
                await self._between()
                self._pace.resume()
            start = self._pace.position
            end = start + request.end
            self.said.append(Said(start, end, self._pace.when(end), over))
            self._ended.clear()
            for at in range(0, request.end, CHUNK):
                yield await self._sound(request.wave[at : at + CHUNK])
            self._ended.clear()
            rest, over = request.wave[-(-request.end // CHUNK) * CHUNK :], False
            following = next(self._requests, None)
            async for chunk in self._hear(rest, playback, session):
                yield chunk
                if following and following[1] and _heard(playback, session) > _OVER:
                    over = True
                    break

    async def _hear(
        self, rest: np.ndarray, playback: Playback, session: Session
    ) -> AsyncIterator[np.ndarray]:
        """Be silent until the reply was heard; ``rest`` of the recording first."""
        spent = 0
        while (spent < _AFTER and not self._ended.is_set()) or session.state.value != "listening":
            chunk = rest[spent : spent + CHUNK]
            yield await self._sound(np.pad(chunk, (0, CHUNK - len(chunk))))
            spent += CHUNK
            if _heard(playback, session) > self._listen * SAMPLE_RATE:
                await session.interrupt("heard enough")

    async def _sound(self, chunk: np.ndarray) -> np.ndarray:
        at = self._pace.position % (len(self._noise) - CHUNK)
        return await self._pace(chunk + self._noise[at : at + len(chunk)])


def _heard(playback: Playback, session: Session) -> int:
    """Samples heard of the reply that is being played."""
    return playback.heard if session.state.value == "answering" else 0
