"""The vocoder against the numbers of the reference, Base and Expressive."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.checkpoint import find_layout
from stages.vocoder import Vocoder, VocoderError

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)


def _cases() -> list[dict[str, Any]]:
    path = KIT / "expected" / "vocoder.json"
    return json.loads(path.read_text()) if path.is_file() else []


@functools.cache
def load(version: str) -> Vocoder:
    return Vocoder.load(find_layout(KIT / "checkpoints", version=version))


@functools.cache
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(KIT / "expected" / "vocoder.npz"))


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split()]


def speak(case: dict[str, Any]) -> np.ndarray:
    vocoder = load(case["model"])
    if case["call"] == "decode":
        return vocoder.decode(
            case["input"],
            case["speaker_id"],
            dur_pred=case["dur_pred"],
            fallback_style=case.get("random_style"),
        )
    optional = {k: numbers(case[k]) for k in ("pitch", "style") if k in case}
    return vocoder.speak(
        numbers(case["code"]),
        optional.get("pitch"),
        optional.get("style"),
        speaker=case.get("speaker_id"),
        style_id=case.get("style_id"),
        dur_pred=case.get("dur_pred", True),
        dedup=not case.get("not_dedup_code", False),
    )


def spoken_units(case: dict[str, Any]) -> list[int]:
    """The units whose durations the case lists."""
    if case["call"] == "vocoder":
        code = [u for u in numbers(case["code"]) if u >= 0]
        if case.get("not_dedup_code"):
            return code
        return [u for i, u in enumerate(code) if i == 0 or u != code[i - 1]]
    if isinstance(case["input"], dict):
        return numbers(case["input"]["hubert"])
    return [int(t[3:-1]) for t in case["input"].replace("[", " [").split() if t[:3] == "[Hu"]


if not _cases():
    if os.environ.get("SPIRIT_CONFORMANCE_REQUIRED") == "1":
        raise FileNotFoundError(f"no conformance kit in {KIT}")
    pytest.skip(
        f"no conformance kit in {KIT} (set SPIRIT_CONFORMANCE_DIR)", allow_module_level=True
    )


@pytest.mark.parametrize("case", _cases(), ids=lambda c: c["name"])
def test_conformance_vocoder(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(VocoderError, match=r"\S+ \S+ \S+"):
            speak(case)
        return
    wave = speak(case)
    assert wave.dtype == np.float32
    assert wave.shape == (case["samples"],)
    np.testing.assert_allclose(wave, expected()[case["name"]], rtol=0, atol=1e-4)
    if "durations" in case:
        vocoder, units = load(case["model"]), spoken_units(case)
        assert vocoder.durations(units).tolist() == case["durations"]
        logs = expected()[f"{case['name']}.log_durations"]
        np.testing.assert_allclose(
            vocoder.log_durations(np.array(units)), logs.reshape(-1), rtol=0, atol=1e-4
        )
