"""Exported graphs on ONNX Runtime.

A stage that has a graph takes it as an optional argument of its ``load`` and calls it in place of
its torch network; both compute the same function (``onnx/export.py`` checks it). Which provider
runs a graph is decided here, once.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from stages.checkpoint import CheckpointError

Graph = Callable[..., Sequence[np.ndarray]]
"""An exported graph as a stage sees it: one array per input, in order, to one per output."""

# No usage events leave the machine (the library still makes its own folder in the user's cache).
onnxruntime.disable_telemetry_events()

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_CUDA_OPTIONS = {
    # The default rounds products to 10 bits, which moves units.
    "use_tf32": "0",
    # The default times every algorithm anew for each length of input, and lengths change.
    "cudnn_conv_algo_search": "HEURISTIC",
}
_BOUND_SHAPES = 16  # of inputs, for each thread; windows and chunks come in few lengths


def providers(device: str = "auto") -> list[str]:
    """Execution providers for ``device``: ``"cpu"``, ``"cuda"``, or ``"auto"`` (CUDA if present).

    Raises:
        ValueError: ``"cuda"`` was asked for and this onnxruntime cannot run on it.
    """
    available = onnxruntime.get_available_providers()
    if device == "cpu" or (device == "auto" and _CUDA not in available):
        return [_CPU]
    if _CUDA not in available:
        raise ValueError(
            "ONNX Runtime has no CUDA provider here. Install the [gpu] extra in place of "
            "onnxruntime, or set model.device to cpu"
        )
    return [_CUDA, _CPU]


class OnnxGraph:
    """One exported graph, called with arrays in the order of its inputs.

    Safe to call from several threads: ONNX Runtime sessions are, and what is bound belongs to one.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        threads: int = 0,
        bind: bool | None = None,
    ) -> None:
        """Open the graph at ``path``.

        Args:
            device: see :func:`providers`.
            threads: intra-op threads on the CPU; 0 leaves the choice to ONNX Runtime.
            bind: keep the inputs and outputs of each length where the provider has them, so that
                a call allocates nothing there. By default on CUDA only: on a CPU it gains nothing.

        Raises:
            CheckpointError: the file is missing or no valid graph.
        """
        self.path, self.device, self.threads = Path(path), device, threads
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Worker threads that spin between calls would take the cores from the language model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        chosen = providers(device)
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), options, providers=[(p, _options(p)) for p in chosen]
            )
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: not a usable ONNX graph ({error}). Delete it; it is made again on "
                "the next start"
            ) from error
        on_cuda = _CUDA in self._session.get_providers()
        self._device = "cuda" if on_cuda else "cpu"
        self._bind = on_cuda if bind is None else bind
        self._threads = threading.local()
        self.inputs: list[str] = [node.name for node in self._session.get_inputs()]
        self.outputs: list[str] = [node.name for node in self._session.get_outputs()]

    def half(self) -> OnnxGraph:
        """The same graph with its matrix products in 16 bits, kept beside it; what goes in and
        comes out stays as it is.

        Convolutions stay in 32 bits: a front end that sees the wave agrees with nothing in 16.
        """
        path = self.path.with_suffix(".half.onnx")
        if not path.is_file():
            draft = path.with_suffix(f".{os.getpid()}.tmp")
            halve(self.path, draft)
            draft.replace(path)
        return OnnxGraph(path, self.device, self.threads)

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        """Run the graph. ``arrays``: one per input, in order. Returns one array per output."""
        if not self._bind:
            return self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        return self._bound(arrays).fetch()

    def _bound(self, arrays: Sequence[np.ndarray]) -> _Bound:
        """What holds the results of this call."""
        # A number may decide the shape of an output; it stays on the host, where shapes are made.
        key = tuple((a.shape, a.dtype.str) if a.ndim else int(a) for a in arrays)
        if not hasattr(self._threads, "bound"):
            self._threads.bound = OrderedDict()
        known: OrderedDict[Any, _Bound] = self._threads.bound
        if key in known:
            known.move_to_end(key)
            known[key].run(self._session, arrays)
        else:
            known[key] = _Bound.make(self._session, self.inputs, self.outputs, arrays, self._device)
            if len(known) > _BOUND_SHAPES:
                known.popitem(last=False)
        return known[key]


def halve(path: Path, out: Path) -> None:
    """Write the graph at ``path`` to ``out`` with its products with weight matrices in 16 bits."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    weights = {w.name: w for w in graph.initializer if len(w.dims) == 2}
    nodes: list[Any] = []
    for number, node in enumerate(graph.node):
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        given, weight, result = node.input[0], node.input[1], node.output[0]
        half = numpy_helper.to_array(weights[weight]).astype(np.float16)
        names = [f"{name}.{number}.half" for name in (given, weight, result)]
        graph.initializer.append(numpy_helper.from_array(half, names[1]))
        nodes += [
            helper.make_node("Cast", [given], [names[0]], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", names[:2], [names[2]], name=node.name),
            helper.make_node("Cast", [names[2]], [result], to=TensorProto.FLOAT),
        ]
    read = {name for node in nodes for name in node.input}
    kept = [w for w in graph.initializer if w.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.save(model, str(out))


@dataclass
class _Bound:
    """Inputs and outputs of one shape, in the provider's memory."""

    binding: Any
    inputs: list[Any]
    outputs: list[Any]

    @classmethod
    def make(
        cls, session: Any, inputs: Sequence[str], outputs: Sequence[str],
        arrays: Sequence[np.ndarray], device: str,
    ) -> _Bound:  # fmt: skip
        """Bind and compute, which gives the outputs their size."""
        binding, values = session.io_binding(), []
        for name, array in zip(inputs, arrays, strict=True):
            # A copy: on a CPU the value would be the caller's array, which is written to later.
            own = np.array(array, order="C")
            place = device if own.ndim else "cpu"
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(own, place, 0))
            binding.bind_ortvalue_input(name, values[-1])
        for name in outputs:
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        made = binding.get_outputs()
        for name, value in zip(outputs, made, strict=True):
            binding.bind_ortvalue_output(name, value)
        return cls(binding, values, made)

    def run(self, session: Any, arrays: Sequence[np.ndarray]) -> None:
        """Compute the outputs anew."""
        for value, array in zip(self.inputs, arrays, strict=True):
            value.update_inplace(np.ascontiguousarray(array))
        session.run_with_iobinding(self.binding)

    def fetch(self) -> list[np.ndarray]:
        """The outputs, which are the caller's."""
        return [np.array(value.numpy()) for value in self.outputs]


def _options(provider: str) -> dict[str, str]:
    return _CUDA_OPTIONS if provider == _CUDA else {}
