"""Style codes and what leads to them against the numbers of the reference."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stages.checkpoint import find_layout
from stages.resample import resample, to_mono
from stages.style import StyleEncoder, normalise

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)
CLIPS = sorted(path.stem.removeprefix("clip_") for path in KIT.glob("expected/clip_*.npz"))


@functools.cache
def encoder(folder: Path) -> StyleEncoder:
    return StyleEncoder.load(find_layout(folder / "checkpoints", version="expressive"))


@pytest.mark.parametrize("clip", CLIPS or [""])
def test_style_conformance(kit: Path, clip: str) -> None:
    expected = np.load(kit / "expected" / f"clip_{clip}.npz")
    samples, rate = soundfile.read(kit / "audio" / f"{clip}.wav", dtype="float32")
    wave = resample(to_mono(samples), rate)
    style = encoder(kit)
    with torch.inference_mode():
        hidden = style.network.hidden(torch.from_numpy(normalise(wave))[None])
        pooled = style.network.pool(hidden)
    found = {"style_pooled": (pooled[0], 1e-4), "style_logits": (style.logits(wave), 1e-3)}
    if "w2v2_hidden" in expected:
        found["w2v2_hidden"] = (hidden[0], 1e-4)
    for name, (value, tolerance) in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_array_equal(style.units(wave), expected["style"])
