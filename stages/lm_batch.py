"""Several streams on one set of weights: each waits for its own token, all are run together.

A step reads all weights once, for one stream or for sixty. So the streams' tokens are collected and
run in one step: as soon as every stream that has lately been decoding wants one, or after a short
wait. Each stream is a :class:`stages.lm.LanguageModel` like any other, to be used from one thread;
streams join and leave between steps, and what a stream gets does not depend on its company.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_cuda import static_network
from stages.lm_runner import PREFILL_ROWS, Runner
from stages.lm_sampling import Sampling
from stages.lm_static import LAST_CHOSEN, Row, StaticNetwork

WAIT_S = 0.005
"""How long a step waits for one more of the streams that have been decoding, in seconds."""


class StreamsTakenError(RuntimeError):
    """A stream more was asked for than the model was loaded for."""


class _Request:
    """A token to be run, and the one chosen after it."""

    def __init__(self, row: Row, mask: Tensor | None) -> None:
        self.row, self.mask = row, mask
        self.done = threading.Event()
        self.token = -1
        self.error: BaseException | None = None


class SharedDecoder:
    """Slots for streams, and a thread that takes the steps of all of them.

    :meth:`stream` gives a stream's engine; closing that gives the slot back. Safe for several
    threads. Used as a context manager, or ended with :meth:`close`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        capacity: int,
        streams: int,
        wait_s: float = WAIT_S,
        network: StaticNetwork | None = None,
    ) -> None:
        """
        Args:
            capacity: tokens of each stream's cache.
            streams: how many there can be at a time.
        """
        batches = [*[n for n in (2**i for i in range(16)) if n < streams], streams]
        rows = max(streams, PREFILL_ROWS[-1])
        network = network or static_network(config, weights, capacity, streams, rows)
        self._runner = Runner(network, batches)
        self._device = threading.Lock()  # held while anything is sent to the device
        self._news = threading.Condition()  # guards all below
        self._free = list(range(streams))
        self._streams = streams
        self._wait_s = wait_s
        self._waiting: dict[int, _Request] = {}  # by slot
        self._decoding: set[int] = set()  # slots that will want another token
        self._closed = False
        self.steps: dict[int, int] = {}
        """How many steps were taken with how many streams."""
        self._thread = threading.Thread(target=self._serve, name="lm-steps", daemon=True)
        self._thread.start()

    def stream(self) -> StreamEngine:
        """An engine with an empty cache. Raises :class:`StreamsTakenError` if none is free."""
        with self._news:
            if self._closed:
                raise StreamsTakenError("the shared decoder is closed: load the model again")
            if not self._free:
                raise StreamsTakenError(
                    f"all {self._streams} streams are in use: close one, or load the model for more"
                )
            return StreamEngine(self, self._free.pop(0))

    def close(self) -> None:
        """End the thread; whoever waits for a token is told so."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    def __enter__(self) -> SharedDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # For the streams.

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> None:
        with self._device:
            self._runner.prefill(slot, ids, start)

    def logits(self, slot: int) -> Tensor:
        with self._device:
            return self._runner.logits(slot)

    def choose(self, row: Row, mask: Tensor | None) -> int:
        """A token from the logits that the row's slot holds."""
        with self._device:
            self._runner.allow(row.slot, mask)
            self._runner.choose([row])
            return self._runner.collect(1)[0]

    def step(self, row: Row, mask: Tensor | None) -> int:
        """Run a token together with those of other streams; the one chosen after it."""
        request = _Request(row, mask)
        with self._news:
            if self._closed:
                raise RuntimeError("the shared decoder is closed: load the model again")
            self._waiting[row.slot] = request
            self._decoding.add(row.slot)
            self._news.notify_all()
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.token

    def pause(self, slot: int) -> None:
        """The others need not wait for this stream until it wants a token again."""
        with self._news:
            if slot in self._decoding:
                self._decoding.remove(slot)
                self._news.notify_all()

    def release(self, slot: int) -> None:
        """The slot is free."""
        self.pause(slot)
        with self._news:
            self._free.append(slot)

    # The thread.

    def _serve(self) -> None:
        while True:
            requests = self._gather()
            if not requests:
                return
            try:
                self._step(requests)
            except BaseException as error:
                for request in requests:
                    request.error = error
            for request in requests:
                request.done.set()

    def _gather(self) -> list[_Request]:
        """The requests of the next step; none at the end."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closed)
            here, until = 0, 0.0
            while self._decoding - self._waiting.keys() and not self._closed:
                if len(self._waiting) > here:  # many threads take a while to come, one by one
                    here, until = len(self._waiting), time.monotonic() + self._wait_s
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._news.wait(left)
            if self._closed:
                for request in self._waiting.values():
                    request.error = RuntimeError("the shared decoder was closed")
                    request.done.set()
                return []
            requests = [self._waiting[slot] for slot in sorted(self._waiting)]
            self._decoding = set(self._waiting)  # who did not come is not waited for again
            self._waiting.clear()
            self.steps[len(requests)] = self.steps.get(len(requests), 0) + 1
            return requests

    def _step(self, requests: Sequence[_Request]) -> None:
        with self._device:
            able = []
            for request in requests:
                try:
                    self._runner.allow(request.row.slot, request.mask)
                    able.append(request)
                except ValueError as error:  # a mask that allows nothing is its owner's alone
                    request.error = error
            if not able:
                return
            self._runner.step([request.row for request in able])
            tokens = self._runner.collect(len(able))
        for request, token in zip(able, tokens, strict=True):
            request.token = token


class StreamEngine:
    """An :class:`stages.lm.Engine` over one slot of a :class:`SharedDecoder`."""

    def __init__(self, shared: SharedDecoder, slot: int) -> None:
        self._shared, self._slot = shared, slot
        self._release = weakref.finalize(self, shared.release, slot)  # once, closed or dropped
        self.held = -1

    def feed(self, ids: Sequence[int], start: int) -> None:
        """Run ``ids`` after the first ``start`` tokens. Does not wait for the device."""
        self._shared.pause(self._slot)
        self._shared.prefill(self._slot, ids, start)
        self.held = start + len(ids)

    def logits(self) -> Tensor:
        """The logits held, float32 ``[vocab_size]`` on the device."""
        if self.held < 0:
            raise RuntimeError("no logits are held: feed the last token first")
        return self._shared.logits(self._slot)

    def decode(
        self, ids: Sequence[int], start: int, sampling: Sampling, mask: Tensor | None
    ) -> int:
        """:meth:`feed` ``ids``, if there are any; the token chosen from the logits held. A single
        one runs together with other streams' tokens."""
        if len(ids) == 1:
            row = Row(ids[0], self._slot, start, sampling, sampling.draw(start + 1))
            token = self._shared.step(row, mask)
            self.held = start + 1
            return token
        if ids:
            self.feed(ids, start)
        draw = sampling.draw(self.held)
        row = Row(LAST_CHOSEN, self._slot, self.held - 1, sampling, draw)
        return self._shared.choose(row, mask)

    def forget(self) -> None:
        """Hold no logits any more."""
        self.held = -1

    def another(self) -> StreamEngine:
        """The engine of another stream. Raises :class:`StreamsTakenError` if none is free."""
        return self._shared.stream()

    def close(self) -> None:
        """Give the slot back."""
        self._release()
