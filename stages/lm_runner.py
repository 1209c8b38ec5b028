"""Runs of a :class:`stages.lm_static.StaticNetwork`: as CUDA graphs on a GPU, as they are on a CPU.

The one place that talks to the device: it sends the few numbers that a run needs, replays the graph
made for its shape, and brings the chosen tokens back. Not safe for several threads at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.lm_sampling import checked
from stages.lm_static import WIDTH, Row, StaticNetwork, table

PREFILL_ROWS = (8, 32, 128, 256)
"""Tokens of one prefill: the smallest that fits is padded, more are fed in several."""

_STAGES = 8  # control tables under way to the device before the host waits for the oldest


class Runner:
    """Prefills and steps of several streams, a slot each.

    A step is launched and collected: between the two the host is free.
    """

    def __init__(self, network: StaticNetwork, batches: Sequence[int]) -> None:
        """
        Args:
            batches: the numbers of rows for which a step is prepared, ascending.
        """
        self.network = network
        self._batches = tuple(batches)
        self._spans, self._step_spans = network.spans(), network.step_spans()
        self._graphs: dict[tuple[str, int, int], torch.cuda.CUDAGraph] = {}
        self._masks = [_Mask(None)] * network.slots
        self._cuda = network.device.type == "cuda"
        rows = len(network.controls)
        self._stages = [self._host(rows, WIDTH, torch.int32) for _ in range(_STAGES)]
        self._stage = 0
        self._ids = self._host(rows, 1, torch.int64)[:, 0]
        if self._cuda:
            self._stream = torch.cuda.Stream(network.device)
            self._stream.wait_stream(torch.cuda.current_stream(network.device))
            self._sent = [torch.cuda.Event() for _ in range(_STAGES)]
            self._ready = torch.cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()
        self.prepare()

    def prepare(self) -> None:
        """Capture every graph, so that none is captured when somebody waits."""
        if not self._cuda:
            return
        for span in self._spans:
            for rows in PREFILL_ROWS:
                self._graph("prefill", rows, span)
        for rows in self._batches:
            self._graph("choose", rows, 0)
            for span in self._step_spans:
                self._graph("step", rows, span)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], start: int) -> None:
        """Feed ``ids`` to ``slot`` after its first ``start`` tokens. Does not wait for the
        device."""
        at = 0
        while at < len(ids):
            part = ids[at : at + PREFILL_ROWS[-1]]
            size = next(n for n in PREFILL_ROWS if n >= len(part))
            rows = [Row(i, slot, start + at + j) for j, i in enumerate(part)]
            with self.on_stream():
                self._send([self.network.padding()] * (size - len(part)) + rows)
                self._run("prefill", size, self._span(self._spans, rows))
            at += len(part)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """Feed one token of each of several slots and choose the next ones."""
        self._launch("step", rows, self._span(self._step_spans, rows))

    @torch.inference_mode()
    def choose(self, rows: Sequence[Row]) -> None:
        """Choose again, or otherwise, from the logits of the rows' slots."""
        self._launch("choose", rows, 0)

    def collect(self, count: int) -> list[int]:
        """The tokens that the latest :meth:`step` or :meth:`choose` chose for its first ``count``
        rows. Waits for them, and for nothing that was launched later."""
        if self._cuda:
            self._ready.synchronize()
        return self._ids[:count].tolist()

    @torch.inference_mode()
    def logits(self, slot: int) -> Tensor:
        """The logits of ``slot``, float32 ``[vocabulary]``: a copy."""
        with self.on_stream():
            copy = self.network.logits[slot].clone()
        if self._cuda:
            self._stream.synchronize()
        return copy

    @torch.inference_mode()
    def allow(self, slot: int, mask: Tensor | None) -> bool:
        """From the next run on choose only what ``mask`` allows; whether that is something new.

        Raises:
            ValueError: it allows nothing.
        """
        if self._masks[slot].is_for(mask):
            return False
        if mask is not None:
            checked(mask.cpu().numpy())  # before that stream is left on which it was written
        with self.on_stream():
            if mask is None:
                self.network.banned[slot].fill_(False)
            else:
                self.network.banned[slot].copy_(~mask)
        self._masks[slot] = _Mask(mask)
        return True

    def _launch(self, kind: str, rows: Sequence[Row], span: int) -> None:
        size = next(n for n in self._batches if n >= len(rows))
        with self.on_stream():
            self._send([*rows, *[self.network.padding()] * (size - len(rows))])
            self._run(kind, size, span)
            self._ids[:size].copy_(self.network.picked[:size], non_blocking=True)
            if self._cuda:
                self._ready.record(self._stream)

    def _send(self, rows: Sequence[Row]) -> None:
        """Write the network's controls. The host's tables take turns: one that is still on its way
        must not be overwritten."""
        self._stage = (self._stage + 1) % _STAGES
        host = self._stages[self._stage][: len(rows)]
        if self._cuda:
            self._sent[self._stage].synchronize()
        host.copy_(table(rows))
        self.network.controls[: len(rows)].copy_(host, non_blocking=True)
        if self._cuda:
            self._sent[self._stage].record(self._stream)

    def _run(self, kind: str, rows: int, span: int) -> None:
        if self._cuda:
            self._graph(kind, rows, span).replay()
        else:
            self._call(kind, rows, span)()

    def _call(self, kind: str, rows: int, span: int) -> Callable[[], None]:
        if kind == "choose":
            return lambda: self.network.choose(rows)
        run = self.network.step if kind == "step" else self.network.prefill
        return lambda: run(rows, span)

    def _graph(self, kind: str, rows: int, span: int) -> torch.cuda.CUDAGraph:
        key = (kind, rows, span)
        if key not in self._graphs:
            self._graphs[key] = self._captured(self._call(kind, rows, span), rows)
        return self._graphs[key]

    def _captured(self, run: Callable[[], None], rows: int) -> torch.cuda.CUDAGraph:
        """``run`` once as it is, on padding, so that libraries and kernels are ready; then into a
        graph."""
        with torch.inference_mode(), self.on_stream():
            self._send([self.network.padding()] * rows)
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may go on using the device.
        with (
            torch.inference_mode(),
            torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ),
        ):
            run()
        return graph

    def _span(self, spans: Sequence[int], rows: Sequence[Row]) -> int:
        needed = max(row.position for row in rows) + 1
        return next(span for span in spans if span >= needed)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """What is done inside comes after what was launched here, and before what will be."""
        return torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext()

    def _host(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device reads and writes by itself."""
        return torch.zeros(rows, width, dtype=dtype, pin_memory=self._cuda)


class _Mask:
    """What a slot was last told to allow."""

    def __init__(self, mask: Tensor | None) -> None:
        self._given, self._values, self._version = mask, None, -1
        if mask is not None and mask.device.type == "cpu":
            self._values = mask.clone()
        elif mask is not None and not mask.is_inference():
            self._version = mask._version

    def is_for(self, mask: Tensor | None) -> bool:
        """Whether ``mask`` says the same. One that lies on a device is not read: it is taken for
        the same if it is the same tensor, not written to since."""
        if mask is None or self._given is None:
            return mask is self._given
        if mask.device.type == "cpu":
            return self._values is not None and torch.equal(mask, self._values)
        return mask is self._given and not mask.is_inference() and mask._version == self._version
