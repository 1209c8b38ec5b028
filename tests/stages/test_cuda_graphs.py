"""A network behind arrays: what a stage calls in place of an exported graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stages.checkpoint import find_layout
from stages.cuda_graphs import GraphedNetwork
from stages.vocoder import Vocoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NANO = Path(__file__).parents[2] / "checkpoints" / "nano"


class Twice(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x.cumsum(-1), count + 1


def test_each_shape_gives_its_own_numbers_whatever_came_before() -> None:
    network = GraphedNetwork(Twice(), DEVICE, shapes=2)
    for length in (3, 5, 3, 7, 5):
        x = np.random.default_rng(length).normal(size=(1, length)).astype(np.float32)
        doubled, count = network(x, np.array([length]))
        np.testing.assert_allclose(doubled, 2 * x.cumsum(-1), rtol=1e-5, atol=1e-6)
        assert count.tolist() == [length + 1] and count.dtype == np.int64
    assert network.shapes == (2 if DEVICE.type == "cuda" else 0)


def test_an_answer_is_not_changed_by_the_next_one() -> None:
    network = GraphedNetwork(Twice(), DEVICE)
    first, _ = network(np.ones((1, 4), np.float32), np.array([0]))
    before = first.copy()
    network(np.zeros((1, 4), np.float32), np.array([0]))
    np.testing.assert_array_equal(first, before)


class Tail(nn.Module):
    def forward(self, x: Tensor, count: int) -> Tensor:
        return x[:, x.shape[1] - count :]


def test_a_number_decides_about_shapes() -> None:
    network, x = GraphedNetwork(Tail(), DEVICE), np.arange(6, dtype=np.float32)[None]
    for count in (2, 4, 2):
        assert network(x, np.array(count))[0].tolist() == [x[0, -count:].tolist()]


def test_threads_take_turns() -> None:
    network = GraphedNetwork(Twice(), DEVICE)

    def call(i: int) -> float:
        return float(network(np.full((1, 2), i, np.float32), np.array([i]))[0][0, 1])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, range(40))) == [4.0 * i for i in range(40)]


def test_a_vocoder_speaks_through_it_as_without() -> None:
    plain = Vocoder.load(find_layout(NANO), device=DEVICE)
    graph = GraphedNetwork(plain.model, DEVICE)
    graphed = Vocoder(plain.model, device=DEVICE, graph=graph)
    text = "[St0][Pi3][Hu5][Hu9][Pi7][Hu11]"
    np.testing.assert_allclose(graphed.decode(text), plain.decode(text), rtol=0, atol=1e-4)
