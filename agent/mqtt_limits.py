"""How much a device may send."""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """Lets through ``rate`` a second, and twice as much at once.

    Args:
        clock: gives seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate, clock
        self._left, self._at = 2 * rate, clock()

    def take(self, amount: float) -> bool:
        """Whether ``amount`` more may pass now."""
        now = self._clock()
        self._left = min(2 * self._rate, self._left + self._rate * (now - self._at))
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True
