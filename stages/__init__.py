"""The streaming computations of a Spirit LM agent. No asyncio, no I/O but loading weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

SAMPLE_RATE = 16_000
"""Hz. The sample clock of everything that flows between stages."""

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)


class Stage(Protocol[In, Out]):
    """A computation with state, driven from outside.

    Pushing the input in any chunking and flushing gives what handing it over whole would give.
    """

    def push(self, item: In) -> Iterable[Out]:
        """Take ``item``; return what can be said now."""
        ...

    def flush(self) -> Iterable[Out]:
        """The input has ended: return the rest."""
        ...

    def reset(self) -> None:
        """A new utterance; weights are kept."""
        ...
