"""Dedicated threads for model work, so that the event loop only moves bytes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Call:
    """What is to be run, and who waits for it, in which loop."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class Worker:
    """One thread that runs one stage's work, in the order in which it was asked for.

    A task that is cancelled while it waits for its work does not stop the thread: the call runs to
    its end and its result is dropped. Stages therefore do little per call; and since a reply takes
    hundreds of calls, there and back costs half of what it does through a ThreadPoolExecutor.

    Attributes:
        busy: seconds of work done so far, for the real-time factor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = 0.0
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``work`` in the thread; exceptions come back to the caller.

        Raises:
            RuntimeError: the worker was closed.
        """
        if self._closed:
            raise RuntimeError(f"the {self.name} worker is closed")
        if self._thread is None:
            # Of a program that ends without closing it, it must not keep the process.
            self._thread = threading.Thread(
                target=self._serve, name=f"spirit-{self.name}", daemon=True
            )
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._calls.put(_Call(functools.partial(work, *args, **kwargs), future, loop))
        return await future

    async def close(self) -> None:
        """Wait for the call in progress, drop those queued, end the thread."""
        self._closed = True
        self._calls.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._closed:
                _answer(call, call.future.cancel)
            elif not call.future.cancelled():
                self._run(call)
            del call  # or it would live until the next

    def _run(self, call: _Call) -> None:
        started = time.perf_counter()
        try:
            result = call.work()
        except StopIteration:  # no future can hold it
            error = RuntimeError("the work raised StopIteration")
            answer = functools.partial(_fail, call.future, error)
        except BaseException as error:  # it is the caller's, whatever it is
            answer = functools.partial(_fail, call.future, error)
        else:
            answer = functools.partial(_succeed, call.future, result)
        finally:
            self.busy += time.perf_counter() - started
        _answer(call, answer)


def _answer(call: _Call, answer: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        call.loop.call_soon_threadsafe(answer)


def _succeed(future: asyncio.Future[R], result: R) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
