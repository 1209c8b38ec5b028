"""A worker: order, errors, cancellation, the end of its thread."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from agent.workers import Worker


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test that is a coroutine."""
    return functools.wraps(test)(lambda: asyncio.run(test()))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "spirit-test" in thread.name}


def fail(error: Exception) -> None:
    raise error


@in_a_loop
async def test_work_is_done_in_order_in_one_thread_of_its_own() -> None:
    worker, done = Worker("test"), list[int]()

    def work(n: int) -> str:
        done.append(n)
        return threading.current_thread().name

    names = await asyncio.gather(*(worker.run(work, n) for n in range(20)))
    assert done == list(range(20)) and set(names) == {"spirit-test"}
    await worker.close()
    assert not threads()


@in_a_loop
async def test_an_error_comes_back_and_ends_nothing() -> None:
    worker = Worker("test")
    with pytest.raises(ValueError, match="no"):
        await worker.run(fail, ValueError("no"))
    with pytest.raises(RuntimeError, match="StopIteration"):  # which no future can hold
        await worker.run(fail, StopIteration())
    assert await worker.run(len, "abc") == 3
    assert worker.busy > 0
    await worker.close()


async def busy(worker: Worker) -> tuple[asyncio.Task[bool], Callable[[], None]]:
    """A call in progress, and what ends it."""
    begun, end = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return end.wait(60)

    task = asyncio.create_task(worker.run(work))
    await asyncio.to_thread(begun.wait)
    return task, end.set


@in_a_loop
async def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    worker, done = Worker("test"), list[int]()
    first, end = await busy(worker)
    second = asyncio.create_task(worker.run(done.append, 2))
    third = asyncio.create_task(worker.run(done.append, 3))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    end()
    assert await first
    await third
    assert done == [3]
    await worker.close()


@in_a_loop
async def test_closing_waits_for_the_call_in_progress_and_drops_the_rest() -> None:
    worker, done = Worker("test"), list[int]()
    first, end = await busy(worker)
    queued = asyncio.create_task(worker.run(done.append, 1))
    await asyncio.sleep(0)
    closing = asyncio.create_task(worker.close())
    await asyncio.sleep(0)
    end()
    await closing
    assert await first and not done and not threads()
    with pytest.raises(asyncio.CancelledError):
        await queued
    with pytest.raises(RuntimeError, match="test worker is closed"):
        await worker.run(len, "")


@in_a_loop
async def test_a_worker_that_never_worked_has_no_thread() -> None:
    worker = Worker("test")
    assert not threads()
    await worker.close()
