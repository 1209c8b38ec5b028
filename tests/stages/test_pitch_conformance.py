"""F0, pitch codes and their reconstruction against the numbers of the reference."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stages.checkpoint import find_layout
from stages.pitch import PitchEncoder, UnvoicedError
from stages.resample import resample, to_mono

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)
CLIPS = sorted(path.stem.removeprefix("clip_") for path in KIT.glob("expected/clip_*.npz"))


@functools.cache
def encoder(folder: Path) -> PitchEncoder:
    return PitchEncoder.load(find_layout(folder / "checkpoints", version="expressive"))


@pytest.mark.parametrize("clip", CLIPS or [""])
def test_pitch_conformance(kit: Path, clip: str) -> None:
    expected = np.load(kit / "expected" / f"clip_{clip}.npz")
    samples, rate = soundfile.read(kit / "audio" / f"{clip}.wav", dtype="float32")
    wave = resample(to_mono(samples), rate)
    pitch = encoder(kit)

    def close(name: str, found: np.ndarray, tolerance: float) -> None:
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=tolerance, err_msg=name)

    mel = pitch.mel(torch.from_numpy(wave))
    close("fcpe_mel", mel.numpy(), 2e-3)
    raw, peak = pitch.raw_f0(wave)
    close("fcpe_peak", peak, 1e-4)
    close("fcpe_f0", raw, 0.05)
    if "fully_unvoiced" in expected:
        with pytest.raises(UnvoicedError, match="no voiced frame"):
            pitch.units(wave)
        return
    f0, vuv = pitch.f0(wave)
    close("f0", f0, 0.05)
    np.testing.assert_array_equal(vuv, expected["vuv"])
    x = pitch.remove_mean(f0, vuv)
    close("pitch_input", x, 0.05)
    with torch.inference_mode():
        close("pitch_latent", pitch.vqvae.encoder(torch.from_numpy(x)[None])[0].T.numpy(), 2e-2)
        codes = torch.from_numpy(expected["pitch"])[None]
        decoded = pitch.vqvae.decode(codes)[0].numpy()
    np.testing.assert_array_equal(pitch.units(wave), expected["pitch"])
    rebuilt = expected["pitch_reconstruction"]  # F0 and voicing, or F0 alone
    close("pitch_reconstruction", decoded if rebuilt.ndim == 2 else decoded[0], 2e-2)
