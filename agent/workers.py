"""Dedicated threads for model work, so that the event loop only moves bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """One thread that runs one stage's work, in the order in which it was asked for.

    A task that is cancelled while it waits for its work does not stop the thread: the call runs to
    its end and its result is dropped. Stages therefore do little per call.

    Attributes:
        busy: seconds of work done so far, for the real-time factor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = 0.0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"spirit-{name}")

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``work`` in the thread; exceptions come back to the caller."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: self._timed(lambda: work(*args, **kwargs))
        )

    async def close(self) -> None:
        """Wait for the call in progress, drop those queued, end the thread."""
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._executor.shutdown(wait=True, cancel_futures=True)
        )

    def _timed(self, work: Callable[[], R]) -> R:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.busy += time.perf_counter() - started
