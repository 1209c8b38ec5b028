"""Encoders and vocoder at full size on a GPU: ``python -m bench.gpu_stages``.

HuBERT (25 Hz, layer 11), wav2vec2 and the Expressive HiFi-GAN in their official shapes with random
weights, and ``nano``'s own, all through ``stages``, on recorded speech. Each runs in float32, with
TF32, and in float16 where a GPU has them, kernel by kernel and as CUDA graphs; each result is
compared with the CPU's in float32: how many units are the same, or how far below the wave the error
is. Only what keeps every unit may be used.
"""

from __future__ import annotations

import contextlib
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from transformers import HubertConfig, Wav2Vec2Config

from bench.gpu import begin, find_device, finish, milliseconds
from stages.checkpoint import CheckpointError, find_layout
from stages.cuda_graphs import GraphedNetwork
from stages.fcpe import load_fcpe
from stages.hifigan import UnitHiFiGAN, VocoderConfig
from stages.hubert import Hubert
from stages.phonetic import PhoneticEncoder, PhoneticNetwork, Quantizer
from stages.style import StyleEncoder, StyleNetwork, normalise
from stages.vocoder import Vocoder

SPEECH = Path("examples/question.wav")
NANO = Path("checkpoints/nano")
SECONDS = (1.0, 4.0, 12.0)
FRAMES = (4, 16, 50, 150)


@dataclass(frozen=True)
class Stage:
    """A network, what it is given, and what counts as its answer.

    Attributes:
        inputs: by the size they are listed under.
        answer: of the outputs, as arrays: units, or a wave.
    """

    name: str
    network: torch.nn.Module
    inputs: dict[str, list[np.ndarray]]
    answer: Callable[[Any], np.ndarray]


def hubert(layers: int) -> PhoneticNetwork:
    """The 25 Hz HuBERT: base size, strides that multiply to 640."""
    kernels, strides = [10, 3, 3, 3, 3, 2, 2, 2], [5, 2, 2, 2, 2, 2, 2, 2]
    config = HubertConfig(
        conv_dim=[512] * 8,
        conv_kernel=kernels,
        conv_stride=strides,
        num_hidden_layers=layers,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        layerdrop=0.0,
    )
    return PhoneticNetwork(Hubert(config, True, (0, 0), 1), Quantizer(768, 768, 501))


def hifigan(channels: int) -> UnitHiFiGAN:
    """The Expressive unit HiFi-GAN; the official one has 512 channels."""
    config = VocoderConfig(
        resblock="1",
        rates=(5, 4, 4, 4, 2),
        kernels=(11, 8, 8, 8, 4),
        initial_channels=channels,
        resblock_kernels=(3, 7, 11),
        dilations=((1, 3, 5),) * 3,
        units=501,
        dim=128,
        hop=640,
        speakers=4,
        styles=0,
        pitches=64,
        style_tokens=100,
        pitch_repeat=2,
        style_repeat=25,
        duration_hidden=128,
        duration_kernel=3,
        sample_rate=16000,
        default_speaker=2,
        default_style=0,
    )
    return UnitHiFiGAN(config)


def stages(tiny: bool) -> Iterator[Stage]:
    """All of them, in float32 on the CPU."""
    torch.manual_seed(0)
    speech = _speech()
    seconds, frames = (SECONDS[:1], FRAMES[:1]) if tiny else (SECONDS, FRAMES)
    speech = np.tile(speech, 1 + int(16000 * seconds[-1]) // len(speech))
    waves = {f"{s:g} s": [speech[None, : int(16000 * s)]] for s in seconds}
    normal = {name: [normalise(given[0][0])[None]] for name, given in waves.items()}
    layers = 2 if tiny else 11
    layout = find_layout(NANO)
    yield Stage("HuBERT", hubert(layers), waves, lambda out: out[1].argmax(-1))
    nano = PhoneticEncoder.load(layout).network
    yield Stage("nano's phonetic encoder", nano, waves, lambda out: out[1].argmax(-1))
    config = Wav2Vec2Config(
        num_hidden_layers=12 if not tiny else 2,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        layerdrop=0.0,
    )
    config.num_labels = 100
    yield Stage("wav2vec2 style", StyleNetwork(config), normal, lambda out: out[0].argmax(-1))
    style = StyleEncoder.load(layout).network
    yield Stage("nano's style encoder", style, normal, lambda out: out[0].argmax(-1))
    yield from _pitch(waves)
    random = np.random.default_rng(0)
    streams = {
        f"{n} frames": [
            *(random.integers(0, size, (1, n)) for size in (501, 64, 100)),
            np.array([2]),
        ]
        for n in frames
    }
    vocoder = hifigan(64 if tiny else 512)
    yield Stage("HiFi-GAN", vocoder, streams, lambda out: out[0][0, 0])
    small = Vocoder.load(layout).model
    known = small.config
    held = {
        name: [
            *(
                a % size
                for a, size in zip(
                    arrays, (known.units, known.pitches, known.style_tokens), strict=False
                )
            ),
            np.array([0]),
        ]
        for name, arrays in streams.items()
    }
    yield Stage("nano's vocoder", small, held, lambda out: out[0][0, 0])


def _speech() -> np.ndarray:
    """A recording, float32 at 16 kHz. It is plain PCM, and soundfile is not everywhere."""
    with wave.open(str(SPEECH)) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (16000, 2, 1)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples.astype(np.float32) / 32768


def _pitch(waves: dict[str, list[np.ndarray]]) -> Iterator[Stage]:
    """FCPE, whose weights come with a package that may be missing."""
    try:
        mel, fcpe = load_fcpe()
    except CheckpointError as error:
        print(f"FCPE is left out: {error}")
        return
    with torch.inference_mode():
        mels = {k: [mel(torch.from_numpy(w[0][0]))[None].numpy()] for k, w in waves.items()}
    # Where the network hears a pitch at all, to a tenth of a Hz.
    yield Stage("FCPE", fcpe, mels, lambda out: np.round(np.where(out[0] > 0.05, out[1], 0), 1))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may round their factors to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def agreement(got: np.ndarray, expected: np.ndarray) -> float:
    """The share of units that are the same; of a wave, the decibels by which the error is below
    it."""
    if expected.ndim > 1:
        return float((got == expected).mean())
    error = float(np.square(got - expected).sum())
    return float(10 * np.log10(np.square(expected).sum() / max(error, 1e-20)))


def measure(stage: Stage, device: torch.device) -> list[dict[str, Any]]:
    """Each size in each type: milliseconds with and without a graph, and the agreement."""
    cpu = {size: stage.answer(_outputs(stage.network, a)) for size, a in stage.inputs.items()}
    network = stage.network.to(device).eval().requires_grad_(False)
    rows = []
    for kind, allowed, dtype in (
        ("float32", False, None),
        ("TF32", True, None),
        ("float16", True, torch.float16),
    ):
        if device.type == "cpu" and kind != "float32":
            continue
        with tf32(allowed):
            graph = GraphedNetwork(network, device, dtype=dtype)
            eager = GraphedNetwork(network, device, shapes=0, dtype=dtype)
            for size, arrays in stage.inputs.items():
                row: dict[str, Any] = {"stage": stage.name, "size": size, "type": kind}
                for way, call in (("eager", eager), ("graph", graph)):
                    row |= _measured(way, call, arrays, stage, cpu[size], device)
                rows.append(row)
    return rows


def _measured(
    way: str,
    call: GraphedNetwork,
    arrays: list[np.ndarray],
    stage: Stage,
    expected: np.ndarray,
    device: torch.device,
) -> dict[str, Any]:
    """The result first, then the time. What cannot run here must not end the others' turns."""
    try:
        agrees = round(agreement(stage.answer(call(*arrays)), expected), 4)
        return {f"{way}, ms": _time(call, arrays, device), f"{way} agrees": agrees}
    except RuntimeError as error:
        print(f"{stage.name}, {way}: {error}")
        return {f"{way}, ms": "failed", f"{way} agrees": "–"}


def _outputs(network: torch.nn.Module, arrays: list[np.ndarray]) -> list[np.ndarray]:
    network.eval().requires_grad_(False)
    return list(GraphedNetwork(network, "cpu")(*arrays))


def _time(call: GraphedNetwork, arrays: list[np.ndarray], device: torch.device) -> float:
    """With the way of the arrays to the device and back."""
    return round(milliseconds(lambda: call(*arrays), device, repeats=10), 3)


def main(
    tiny: Annotated[bool, typer.Option(help="Small networks, on a CPU too.")] = False,
) -> None:
    """Check, measure, keep the report."""
    device = find_device(tiny)
    report = begin("gpu_stages", device, tiny)
    rows, sizes = [], {}
    for stage in stages(tiny):
        sizes[stage.name] = sum(p.numel() for p in stage.network.parameters())
        rows += measure(stage, device)
    report |= {"parameters": sizes, "rows": rows}
    table = Table(*rows[0], title="agrees: share of units equal to the CPU's; waves: dB")
    for row in rows:
        table.add_row(*map(str, row.values()))
    finish("gpu_stages", report, [table])


if __name__ == "__main__":
    typer.run(main)
