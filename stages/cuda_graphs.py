"""PyTorch networks as CUDA graphs, in the form in which stages take exported ones.

The networks of the encoders and the vocoder are many small kernels, and a stream calls them with a
few lengths over and over. :class:`GraphedNetwork` captures one graph for each of the first lengths
that come and replays it; it is a :data:`stages.runtime.Graph`, to be given to a stage as ``graph``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Network = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | int]
    outputs: tuple[Tensor, ...]


class GraphedNetwork:
    """Calls a network with arrays; on CUDA as a graph for each of the first shapes it meets.

    Safe for several threads: they take turns.
    """

    def __init__(
        self,
        network: Network,
        device: str | torch.device,
        shapes: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            network: tensors to a tensor or several; its weights lie on ``device``.
            shapes: how many graphs there may be; what comes in other shapes runs without.
            dtype: run under autocast to this type.
        """
        self._network, self._device = network, torch.device(device)
        self._most, self._dtype = shapes, dtype
        self._captured: dict[tuple[int | tuple[int, ...], ...], _Captured] = {}
        self._turn = threading.Lock()
        self._cuda = self._device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def shapes(self) -> int:
        """How many graphs have been captured."""
        return len(self._captured)

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        """One array per output of the network. An array without axes is handed over as a number:
        it may decide about shapes, so that each value has a graph of its own."""
        with self._turn, torch.inference_mode(), self._on_stream():
            given = [_tensor(array) for array in arrays]
            outputs = self._replay(given) if self._cuda else self._run(given)
            return [out.float().cpu().numpy() if out.is_floating_point() else out.cpu().numpy()
                    for out in outputs]  # fmt: skip

    def _replay(self, given: list[Tensor | int]) -> tuple[Tensor, ...]:
        key = tuple(x if isinstance(x, int) else tuple(x.shape) for x in given)
        if key not in self._captured:
            inputs = [x if isinstance(x, int) else x.to(self._device) for x in given]
            if len(self._captured) >= self._most:
                return self._run(inputs)
            self._captured[key] = self._capture(inputs)
        captured = self._captured[key]
        for to, x in zip(captured.inputs, given, strict=True):
            if isinstance(to, Tensor) and isinstance(x, Tensor):
                to.copy_(x)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, inputs: list[Tensor | int]) -> _Captured:
        self._run(inputs)  # so that libraries have chosen their algorithms
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._run(inputs)
        return _Captured(graph, inputs, outputs)

    def _run(self, inputs: list[Tensor | int]) -> tuple[Tensor, ...]:
        kind = self._device.type
        with torch.autocast(kind, self._dtype, enabled=self._dtype is not None):
            out = self._network(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext()


def _tensor(array: np.ndarray) -> Tensor | int:
    return torch.from_numpy(np.ascontiguousarray(array)) if array.ndim else int(array)
