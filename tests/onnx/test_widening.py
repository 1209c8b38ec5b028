"""Convolutions made two-dimensional compute what they computed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import onnx
from agent.graphs import exporter
from stages.runtime import OnnxGraph


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 3, "padding": 4, "bias": False},
        {"groups": 4, "padding": 2},
    ],
    ids=str,
)
def test_a_widened_convolution_is_the_same_function(tmp_path: Path, options: dict) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 8, 3, **options), nn.GELU(), nn.Conv1d(8, 2, 1)).eval()
    wave = torch.randn(1, 4, 50)
    path = tmp_path / "graph.onnx"
    torch.onnx.export(network, (wave,), path, dynamo=True, verbose=False, external_data=False)
    size = path.stat().st_size
    assert exporter().widen_convolutions(path) == 2
    weights = {w.name: list(w.dims) for w in onnx.load(path).graph.initializer}
    assert sorted(len(dims) for dims in weights.values()).count(4) == 2
    assert path.stat().st_size < size + 2000, "the weights are there once"
    (out,) = OnnxGraph(path, "cpu", 1)(wave.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(out, network(wave).numpy(), atol=1e-5)
    assert exporter().widen_convolutions(path) == 0
