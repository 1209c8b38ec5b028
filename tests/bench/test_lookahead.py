"""What the look-ahead bench counts is what the vocoder does."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.lookahead import chunks, decibels, official, schedules, work
from stages.hifigan import UnitHiFiGAN, VocoderConfig, receptive_field
from stages.units import Unit
from stages.vocoder import Vocoder
from stages.vocoder_stream import StreamingVocoder

SMALL = VocoderConfig.parse(
    {
        "resblock": "1", "upsample_rates": [5, 4], "upsample_kernel_sizes": [11, 8],
        "upsample_initial_channel": 8, "resblock_kernel_sizes": [3, 5],
        "resblock_dilation_sizes": [[1, 2], [1, 3]], "num_embeddings": 30, "embedding_dim": 4,
        "model_in_dim": 8, "code_hop_size": 20, "sampling_rate": 16000,
        "multispkr": "from_input_file", "num_speakers": 4,
        "dur_predictor_params": {
            "encoder_embed_dim": 4, "var_pred_hidden_dim": 6, "var_pred_kernel_size": 3,
        },
    },
    "test",
)  # fmt: skip


def test_error_in_decibels() -> None:
    wave = np.ones(10, np.float32)
    assert decibels(0.9 * wave, wave) == pytest.approx(-20, abs=0.01)
    assert decibels(wave, wave) == -math.inf


@pytest.mark.parametrize("frames", [1, 5, 40, 75])
def test_chunks_are_those_of_the_stream(frames: int) -> None:
    stream = StreamingVocoder(
        Vocoder(UnitHiFiGAN(SMALL)), dur_pred=False, first_chunk_frames=2, max_chunk_frames=16
    )
    made = [c for i in range(frames) for c in stream.push(Unit("Hu", i % 30))] + stream.flush()
    expected = [(c.first_sample // 20, c.end // 20) for c in made]
    assert list(chunks(2, 16, frames)) == expected
    assert all(a[1] == b[0] for a, b in pairwise(expected))


@pytest.mark.parametrize("context", [(0, 0), (0, 9), (9, 9)], ids=str)
def test_work_is_what_the_network_multiplies(context: tuple[int, int]) -> None:
    model, (left, right) = UnitHiFiGAN(SMALL).eval(), context
    counted: list[int] = []

    def count(layer: torch.nn.Module, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
        transposed = isinstance(layer, torch.nn.ConvTranspose1d)
        length = (given[0] if transposed else made).shape[2]
        counted.append(length * layer.weight.numel())  # type: ignore[operator, union-attr]

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            layer.register_forward_hook(count)  # type: ignore[arg-type]
    with torch.inference_mode():
        model.generate(torch.zeros(1, SMALL.channels_in, 4 + left + right), left, right)
    assert work(SMALL, 4, left, right, trimmed=True) == sum(counted)
    assert work(SMALL, 4, left, right, trimmed=False) >= sum(counted)


def test_trimmed_halos_are_the_smaller_ones() -> None:
    assert receptive_field(official()) == (20, 20)
    for row in schedules({"official": official()}):
        assert 0 < row["redundant_trimmed"] < row["redundant_whole"] < 1
