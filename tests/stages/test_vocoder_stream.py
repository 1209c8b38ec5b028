"""The streaming vocoder equals the offline one at every sample, however the units come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.checkpoint import find_layout
from stages.hifigan import UnitHiFiGAN, VocoderConfig, reach, receptive_field
from stages.units import Unit
from stages.vocoder import Frames, Vocoder, VocoderError
from stages.vocoder_stream import AudioChunk, StreamingVocoder

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)
HOP = 60
TINY: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 3, 4],
    "upsample_kernel_sizes": [11, 5, 8],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 2], [1, 3]],
    "num_embeddings": 30,
    "embedding_dim": 4,
    "model_in_dim": 16,
    "code_hop_size": HOP,
    "sampling_rate": 16000,
    "dur_predictor_params": {
        "encoder_embed_dim": 4,
        "var_pred_hidden_dim": 6,
        "var_pred_kernel_size": 3,
    },
    "multispkr": "from_input_file",
    "num_speakers": 4,
    "num_f0_tokens": 8,
    "f0_hop_size": 2 * HOP,
    "num_style_tokens": 5,
    "style_hop_size": 25 * HOP,
}
BASE = {
    **{k: v for k, v in TINY.items() if "f0" not in k and "style" not in k},
    "model_in_dim": 12,
    "multistyle": "from_input_file",
    "num_styles": 26,
}


@cache
def tiny(kind: str = "expressive", **changes: Any) -> Vocoder:
    torch.manual_seed(3)
    raw = {**(BASE if kind == "base" else TINY), **{k: list(v) for k, v in changes.items()}}
    model = UnitHiFiGAN(VocoderConfig.parse(raw, "test"))
    with torch.no_grad():
        for parameter in model.parameters():  # loud enough for 1e-4 to mean something
            parameter.mul_(1.5)
        model.dur_predictor.proj.bias.fill_(1.1)
    return Vocoder(model)


@cache
def kit(version: str) -> Vocoder:
    if not KIT.is_dir():
        pytest.skip(f"no conformance kit in {KIT} (set SPIRIT_CONFORMANCE_DIR)")
    return Vocoder.load(find_layout(KIT / "checkpoints", version=version))


def stream_of_units(vocoder: Vocoder, count: int, seed: int) -> list[Unit]:
    """Units with pitch and style among them; sometimes they come late, or several in a row."""
    random = np.random.default_rng(seed)
    config = vocoder.config
    stream: list[Unit] = [] if seed % 3 == 0 else [Unit("St", 1), Unit("Pi", 2)]
    for _ in range(count):
        stream.append(Unit("Hu", int(random.integers(config.units))))
        if random.random() < 0.3:
            stream.append(Unit("Pi", int(random.integers(config.pitches or 64))))
        if random.random() < 0.1:
            stream.append(Unit("St", int(random.integers(config.style_tokens or 100))))
    return [*stream, Unit("Pi", 0), Unit("St", 0)]


def pieces(stream: list[Unit], random: np.random.Generator) -> Iterator[list[Unit]]:
    at = 0
    while at < len(stream):
        size = int(random.integers(1, 9))
        yield stream[at : at + size]
        at += size


def speak(streaming: StreamingVocoder, stream: list[Unit], seed: int = 0) -> list[AudioChunk]:
    random = np.random.default_rng(seed)
    chunks = []
    for piece in pieces(stream, random):
        chunks += streaming.push_all(piece)
    return chunks + streaming.flush()


def joined(chunks: list[AudioChunk]) -> np.ndarray:
    assert all(a.end == b.first_sample for a, b in pairwise(chunks))
    return np.concatenate([c.samples for c in chunks])


def offline(vocoder: Vocoder, stream: list[Unit], **options: Any) -> np.ndarray:
    return vocoder.decode("".join(map(str, stream)), **options)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", ["expressive", "base"])
def test_streaming_equals_offline(kind: str, seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    vocoder = tiny(kind)
    stream = stream_of_units(vocoder, int(random.integers(1, 60)), seed)
    first = int(random.integers(1, 12))
    streaming = StreamingVocoder(
        vocoder,
        speaker=seed % 4,
        first_chunk_frames=first,
        max_chunk_frames=first + int(random.integers(0, 40)),
    )
    chunks = speak(streaming, stream, seed)
    expected = offline(vocoder, stream, speaker=seed % 4)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(joined(chunks), expected, rtol=0, atol=1e-4)
    streaming.reset()
    np.testing.assert_array_equal(joined(speak(streaming, stream, seed)), joined(chunks))


@pytest.mark.parametrize("version", ["base", "expressive"])
@pytest.mark.parametrize("seed", range(3))
def test_conformance_checkpoints_stream_exactly(version: str, seed: int) -> None:
    vocoder = kit(version)
    stream = stream_of_units(vocoder, 25, seed)
    streaming = StreamingVocoder(vocoder, speaker=seed, first_chunk_frames=4 + seed)
    chunks = speak(streaming, stream, seed)
    assert len(chunks) > 2
    np.testing.assert_allclose(
        joined(chunks), offline(vocoder, stream, speaker=seed), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("version", ["base", "expressive"])
def test_conformance_cases_streamed(version: str) -> None:
    vocoder = kit(version)
    waves = np.load(KIT / "expected" / "vocoder.npz")
    cases = json.loads((KIT / "expected" / "vocoder.json").read_text())
    for case in cases:
        fits = case["model"] == version and isinstance(case.get("input"), str)
        if not fits or "error" in case or not case["dur_pred"]:
            continue
        streaming = StreamingVocoder(
            vocoder,
            speaker=case["speaker_id"],
            fallback_style=case.get("random_style"),
            first_chunk_frames=2,
        )
        tokens = [t[:-1] for t in case["input"].split("[")[1:]]
        chunks = speak(streaming, [Unit(t[:2], int(t[2:])) for t in tokens])
        np.testing.assert_allclose(joined(chunks), waves[case["name"]], rtol=0, atol=1e-4)


def test_one_frame_a_unit_without_duration_prediction() -> None:
    vocoder = tiny()
    stream = stream_of_units(vocoder, 70, 1)
    chunks = speak(StreamingVocoder(vocoder, dur_pred=False), stream)
    hu = [u.index for u in stream if u.kind == "Hu"]
    spans = [s for c in chunks for s in c.units]
    assert joined(chunks).size == HOP * len(hu)
    assert [s.end - s.start for s in spans] == [HOP] * len(hu)


@pytest.mark.parametrize("kind", ["expressive", "base"])
def test_the_ledger_covers_every_sample_once_and_names_the_token(kind: str) -> None:
    vocoder = tiny(kind)
    stream = stream_of_units(vocoder, 40, 2)
    chunks = speak(StreamingVocoder(vocoder, first_chunk_frames=3), stream)
    for chunk in chunks:
        assert chunk.units[0].start == chunk.first_sample
        assert chunk.units[-1].end == chunk.end
        assert all(a.end == b.start for a, b in pairwise(chunk.units))
    spans = [s for c in chunks for s in c.units]
    hu = [u.index for u in stream if u.kind == "Hu"]
    held = np.zeros(len(hu), dtype=np.int64)
    for span in spans:
        held[span.unit] += span.end - span.start
        assert stream[span.token] == Unit("Hu", hu[span.unit])
    assert (held == HOP * vocoder.durations(hu)).all()


def test_chunks_start_small_and_double() -> None:
    vocoder = tiny()
    stream = stream_of_units(vocoder, 150, 1)
    streaming = StreamingVocoder(vocoder, first_chunk_frames=3, max_chunk_frames=20)
    chunks = [c for unit in stream for c in streaming.push(unit)]
    assert [len(c.samples) // HOP for c in chunks[:5]] == [3, 6, 12, 20, 20]


def test_a_shorter_look_ahead_speaks_earlier_and_differs_only_near_chunk_ends() -> None:
    vocoder = tiny()
    stream = stream_of_units(vocoder, 80, 1)

    def units_before_sound(lookahead: int | None) -> tuple[int, np.ndarray]:
        streaming = StreamingVocoder(vocoder, dur_pred=False, lookahead_frames=lookahead)
        chunks: list[AudioChunk] = []
        needed = 0
        for unit in stream:
            needed += unit.kind == "Hu" and not chunks
            chunks += streaming.push(unit)
        return needed, joined(chunks + streaming.flush())

    late, exact = units_before_sound(None)
    early, _ = units_before_sound(1)
    assert late - early == receptive_field(vocoder.config)[1] - 1
    errors = [np.abs(units_before_sound(n)[1] - exact).mean() for n in (1, 4, 8, 99)]
    assert errors[0] > errors[1] > 1e-5
    assert max(errors[2:]) < 1e-6, "the receptive field ends 8 frames ahead"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resblock": "2"},
        {"upsample_kernel_sizes": [5, 3, 4]},
        {"upsample_kernel_sizes": [12, 11, 16]},
        {"resblock_kernel_sizes": [7, 3]},
    ],
    ids=str,
)
def test_receptive_field_is_exact(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = VocoderConfig.parse({**TINY, **changes}, "test")
    model = UnitHiFiGAN(config).double()
    left, right = receptive_field(config)
    middle = left + right
    x = torch.randn(1, config.channels_in, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    wave = model.generate(x)[0, 0, middle * HOP : (middle + 1) * HOP]
    wave.square().sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert (middle - int(touched[0]), int(touched[-1]) - middle) == (left, right)


@pytest.mark.parametrize("context", [(0, 0), (0, 8), (8, 8), (8, 0), (3, 5), (20, 30)], ids=str)
@pytest.mark.parametrize("kernels", [(11, 5, 8), (12, 6, 9)], ids=("even", "odd"))
def test_context_is_heard_and_not_spoken(
    kernels: tuple[int, ...], context: tuple[int, int]
) -> None:
    vocoder, (left, right) = tiny(upsample_kernel_sizes=kernels), context
    random = np.random.default_rng(0)
    frames = Frames(*(random.integers(0, size, left + 6 + right) for size in (30, 8, 5)))
    whole = vocoder.generate(frames, 0, 0)
    expected = whole[left * HOP : (left + 6) * HOP if right else None]
    found = vocoder.generate(frames, 0, 0, left, right)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_what_later_layers_do_not_look_at_is_not_computed() -> None:
    vocoder = tiny()
    left, right = receptive_field(vocoder.config)
    frames = Frames(*(np.zeros(left + 4 + right, np.int64) for _ in range(3)))
    lengths: list[int] = []
    layers = [*vocoder.model.ups, vocoder.model.conv_post]
    hooks = [
        m.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[2])) for m in layers
    ]
    vocoder.generate(frames, 0, 0, left, right)
    for hook in hooks:
        hook.remove()
    for length, rate, (before, after) in zip(
        lengths, (1, 5, 15), reach(vocoder.config)[:-1], strict=False
    ):
        assert length == 4 * rate + before + after
    assert lengths[-1] < 4 * HOP + 60, "not the whole halo of 16 frames"


def test_odd_kernels_leave_a_tail_that_streams_too() -> None:
    vocoder = tiny(upsample_kernel_sizes=(12, 6, 9))
    stream = stream_of_units(vocoder, 30, 1)
    expected = offline(vocoder, stream)
    assert expected.size % HOP
    chunks = speak(StreamingVocoder(vocoder), stream)
    np.testing.assert_allclose(joined(chunks), expected, rtol=0, atol=1e-4)
    assert chunks[-1].units[-1].end == expected.size


def test_waiting_for_pitch_can_be_spared() -> None:
    vocoder = tiny()
    stream = [Unit("Hu", i % 30) for i in range(60)]
    streaming = StreamingVocoder(vocoder, initial_pitch=3, initial_style=1)
    assert speak(streaming, stream)[0].first_sample == 0
    np.testing.assert_allclose(
        joined(speak(StreamingVocoder(vocoder, initial_pitch=3, initial_style=1), stream)),
        offline(vocoder, [Unit("St", 1), Unit("Pi", 3), *stream]),
        rtol=0,
        atol=1e-4,
    )


def test_what_cannot_be_spoken_is_refused_by_name() -> None:
    vocoder = tiny()
    with pytest.raises(VocoderError, match="speaker 4: this vocoder has speakers 0 to 3"):
        StreamingVocoder(vocoder, speaker=4)
    with pytest.raises(VocoderError, match="unit 30: this vocoder's table has 0 to 29"):
        StreamingVocoder(vocoder).push(Unit("Hu", 30))
    with pytest.raises(VocoderError, match="unit kind 'Xx'"):
        StreamingVocoder(vocoder).push(Unit("Xx", 3))
    streaming = StreamingVocoder(vocoder)
    assert not streaming.push(Unit("Hu", 3))
    with pytest.raises(VocoderError, match="no pitch token"):
        streaming.flush()
    with pytest.raises(ValueError, match="first_chunk_frames 0"):
        StreamingVocoder(vocoder, first_chunk_frames=0)
    assert StreamingVocoder(vocoder).flush() == []
