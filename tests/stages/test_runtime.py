"""Graphs on ONNX Runtime, bound and unbound: the same answers, each the caller's own."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stages import runtime
from stages.checkpoint import CheckpointError
from stages.runtime import OnnxGraph, providers


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.GELU(), nn.Conv1d(4, 3, 1)).eval()
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    torch.onnx.export(
        network,
        (torch.randn(1, 2, 20),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        dynamic_shapes=({2: torch.export.Dim("n", min=2, max=1000)},),
    )
    return path


def waves(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((1, 2, n)).astype(np.float32) for n in lengths]


def test_bound_or_not_the_answers_are_the_same(path: Path) -> None:
    plain, bound = OnnxGraph(path, "cpu", 1), OnnxGraph(path, "cpu", 1, bind=True)
    for wave in waves(10, 30, 10, 7, 30, 10):
        np.testing.assert_array_equal(bound(wave)[0], plain(wave)[0])


def test_what_was_given_and_what_came_back_stay_as_they_are(path: Path) -> None:
    bound = OnnxGraph(path, "cpu", 1, bind=True)
    first, second = waves(10, 10)
    kept = first.copy()
    (answer,) = bound(first)
    before = answer.copy()
    bound(second)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(answer, before)


class Skip(nn.Module):
    def forward(self, wave: torch.Tensor, count: int) -> torch.Tensor:
        return 2 * wave[:, :, count:]


def test_a_number_decides_the_shape_of_an_output(tmp_path: Path) -> None:
    torch.onnx.export(
        Skip(),
        (torch.randn(1, 2, 20), 3),
        tmp_path / "skip.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({2: torch.export.Dim("n", min=8, max=99)}, torch.export.Dim.DYNAMIC),
    )
    bound = OnnxGraph(tmp_path / "skip.onnx", "cpu", 1, bind=True)
    (wave,) = waves(20)
    for count in (3, 5, 3, 0):
        np.testing.assert_array_equal(bound(wave, np.array(count))[0], 2 * wave[:, :, count:])


def test_an_array_need_not_be_contiguous(path: Path) -> None:
    (wave,) = waves(20)
    strided = np.asfortranarray(wave)
    bound = OnnxGraph(path, "cpu", 1, bind=True)
    expected = OnnxGraph(path, "cpu", 1)(wave)[0]
    for _ in range(2):
        np.testing.assert_array_equal(bound(strided)[0], expected)


def test_few_shapes_stay_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_BOUND_SHAPES", 2)
    made: list[int] = []
    make = runtime._Bound.make

    def counted(*arguments: object) -> object:
        made.append(1)
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime._Bound, "make", counted)
    bound = OnnxGraph(path, "cpu", 1, bind=True)
    for wave in waves(10, 20, 10, 30, 10, 20):  # 20 gives way to 30, and is bound anew
        bound(wave)
    assert len(made) == 4


def test_threads_share_a_bound_graph(path: Path) -> None:
    plain, bound = OnnxGraph(path, "cpu", 1), OnnxGraph(path, "cpu", 1, bind=True)
    wrong: list[int] = []

    def call(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            wave = random.standard_normal((1, 2, 25)).astype(np.float32)
            if not np.array_equal(bound(wave)[0], plain(wave)[0]):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_providers_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: cuda)
    assert providers("auto") == providers("cuda") == cuda
    assert providers("cpu") == cuda[1:]
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: cuda[1:])
    assert providers("auto") == cuda[1:]
    with pytest.raises(ValueError, match=r"\[gpu\] extra"):
        providers("cuda")


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"broken\.onnx: not a usable ONNX graph"):
        OnnxGraph(path, "cpu")


def test_half_precision_is_near_and_kept_beside_the_graph(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).eval()
    given = torch.randn(1, 20, 64)
    file = tmp_path / "linear.onnx"
    torch.onnx.export(
        network, (given,), file, dynamo=True, verbose=False, external_data=False, optimize=False
    )
    full = OnnxGraph(file, "cpu", 1)
    half = full.half()
    assert half.path.parent == tmp_path and half.path != file
    (expected,), (found,) = full(given.numpy()), half(given.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-3)
    before = half.path.stat().st_mtime_ns
    assert full.half().path.stat().st_mtime_ns == before
