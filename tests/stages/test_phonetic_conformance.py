"""Phonetic units against the numbers of the reference."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stages.checkpoint import CheckpointError, Layout, find_layout, load_state
from stages.hubert import build_hubert
from stages.phonetic import PhoneticEncoder, fill_blanks

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)
pytestmark = pytest.mark.skipif(
    not KIT.is_dir(), reason=f"no conformance kit in {KIT}; set SPIRIT_CONFORMANCE_DIR"
)


def layout() -> Layout:
    return find_layout(KIT / "checkpoints", version="base")


@functools.cache
def encoder() -> PhoneticEncoder:
    return PhoneticEncoder.load(layout())


def clips() -> list[str]:
    """Clips that need no resampling and are long enough to have units."""
    names = []
    for path in sorted((KIT / "audio").glob("*.wav")):
        expected = KIT / "expected" / f"clip_{path.stem}.npz"
        if soundfile.info(path).samplerate == 16_000 and expected.is_file():
            names.append(path.stem)
    return names


def wave_of(name: str) -> np.ndarray:
    wave, _ = soundfile.read(KIT / "audio" / f"{name}.wav", dtype="float32", always_2d=True)
    return wave.mean(1)


def blank_cases() -> tuple[int, list[dict[str, Any]]]:
    content = json.loads((KIT / "expected" / "blank_rule.json").read_text())
    return content["blank"], [v for k, v in content.items() if k != "blank"]


@pytest.mark.parametrize("name", clips())
def test_conformance_clip(name: str) -> None:
    expected = np.load(KIT / "expected" / f"clip_{name}.npz")
    wave = wave_of(name)
    assert encoder().frames(len(wave)) == len(expected["units"])
    np.testing.assert_allclose(
        encoder().features(wave), expected["hubert_features"], rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(
        encoder().logits(wave), expected["quantizer_logits"], rtol=0, atol=1e-3
    )
    np.testing.assert_array_equal(encoder().raw_codes(wave), expected["raw_codes"])
    np.testing.assert_array_equal(encoder().units(wave), expected["units"])
    key = "hubert_features_if_input_normalized"
    if key in expected:
        normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)
        np.testing.assert_allclose(encoder().features(normal), expected[key], rtol=0, atol=1e-4)


def test_conformance_blank_rule() -> None:
    blank, groups = blank_cases()
    seen = 0
    for group in groups:
        for case in group if isinstance(group, list) else [group]:
            if "raw" not in case:
                continue
            units = fill_blanks(np.array(case["raw"]), blank)
            assert units.tolist() == case["units"]
            seen += 1
    assert seen > 10


def test_conformance_normalize_true_is_refused() -> None:
    checkpoint = load_state(layout().hubert)
    task = {**checkpoint["task_cfg"], "normalize": True}
    with pytest.raises(CheckpointError, match="normalize"):
        build_hubert({**checkpoint, "task_cfg": task}, layout().hubert)
