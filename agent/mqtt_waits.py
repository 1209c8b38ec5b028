"""Waiting for so long at most, and ending tasks, without losing a cancellation.

Before Python 3.12 ``asyncio.wait_for`` swallows a cancellation that comes together with what was
waited for: the task goes on, and who waits for its end waits for ever. aiomqtt uses it everywhere,
and may also answer a cancellation with an error of its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

_PATIENCE = 0.5  # s before a task is cancelled once more


async def within(seconds: float, event: asyncio.Event) -> bool:
    """Wait for ``event``, but no longer than so; whether it is set."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()


async def stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks until all of them have ended; what they raise is dropped."""
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_PATIENCE)
    await asyncio.gather(*tasks, return_exceptions=True)
