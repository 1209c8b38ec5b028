"""An event loop whose clock jumps to what happens next: minutes of talk in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agent.playback import Clocked

R = TypeVar("R")


class _Jumping(selectors.DefaultSelector):
    """Never waits; where the loop would, its clock is set forward instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits and nothing will ever happen")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its :meth:`time` starts at 0 and is only as long as somebody sleeps."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(main: Coroutine[Any, Any, R]) -> R:
    """What :func:`asyncio.run` does, in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


class VirtualWorker:
    """Stands where :class:`agent.workers.Worker` does: the work takes ``delay()`` seconds."""

    def __init__(self, delay: Callable[[], float]) -> None:
        self.busy = 0.0
        self._delay = delay
        self._turn = asyncio.Lock()

    async def run(self, work: Callable[..., R], *args: Any) -> R:
        async with self._turn:
            seconds = self._delay()
            if seconds:
                await asyncio.sleep(seconds)
            self.busy += seconds
            return work(*args)

    async def close(self) -> None:
        """There is no thread."""


class VirtualLoudspeaker(Clocked):
    """A playback by the loop's clock that can get stuck, and that plays one reply at a time."""

    def __init__(self, latency: float = 0.0) -> None:
        self._frozen: int | None = None
        super().__init__(lambda: asyncio.get_running_loop().time(), latency)

    def freeze(self) -> None:
        """The playhead stands still from now on."""
        self._frozen = self.heard

    def begin(self) -> None:
        assert self.done, "two replies at once"
        super().begin()

    @property
    def heard(self) -> int:
        return super().heard if self._frozen is None else self._frozen

    def _silence(self) -> None:
        super()._silence()
        self._frozen = None if self._frozen is None else 0
