"""Exported graphs on ONNX Runtime.

A stage that has a graph takes it as an optional argument of its ``load`` and calls it in place of
its torch network; both compute the same function (``onnx/export.py`` checks it). Which provider
runs a graph is decided here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from stages.checkpoint import CheckpointError

Graph = Callable[..., Sequence[np.ndarray]]
"""An exported graph as a stage sees it: one array per input, in order, to one per output."""

# No usage events leave the machine (the library still makes its own folder in the user's cache).
onnxruntime.disable_telemetry_events()

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


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

    Safe to call from several threads: ONNX Runtime sessions are.
    """

    def __init__(self, path: str | Path, device: str = "auto", threads: int = 0) -> None:
        """Open the graph at ``path``.

        Args:
            device: see :func:`providers`.
            threads: intra-op threads on the CPU; 0 leaves the choice to ONNX Runtime.

        Raises:
            CheckpointError: the file is missing or no valid graph.
        """
        self.path = Path(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Worker threads that spin between calls would take the cores from the language model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), options, providers=providers(device)
            )
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: not a usable ONNX graph ({error}). Delete it; it is made again on "
                "the next start"
            ) from error
        self.inputs: list[str] = [node.name for node in self._session.get_inputs()]
        self.outputs: list[str] = [node.name for node in self._session.get_outputs()]

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        """Run the graph. ``arrays``: one per input, in order. Returns one array per output."""
        return self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))
