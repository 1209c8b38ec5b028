"""How long was worked: what budgets and learning-rate schedules go by."""

from __future__ import annotations

import os
import time


class Stopwatch:
    """Seconds of work: those of the clock, or of the processor where that is fewer.

    While a process is stopped, or its machine asleep, the clock goes on and nothing is learnt: such
    time must not use up a budget. Several threads use more of the processor than the clock shows,
    so that theirs is the clock's. Children count once they have ended.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), _processor()

    def lap(self) -> float:
        """Seconds worked since the last lap, or since the beginning."""
        wall, cpu = time.monotonic(), _processor()
        worked = max(0.0, min(wall - self._wall, cpu - self._cpu))
        self._wall, self._cpu = wall, cpu
        return worked


def _processor() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
