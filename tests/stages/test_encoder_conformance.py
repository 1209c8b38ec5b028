"""The whole speech tokenizer against the reference: units and strings, every clip, long input."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stages.checkpoint import find_layout
from stages.encoder import SpeechTokenizer
from stages.pitch import UnvoicedError
from stages.units import units_to_string

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)


def cases(name: str) -> list[Any]:
    """(clip or length, version with or without channel) of ``expected/NAME.json``."""
    path = KIT / "expected" / f"{name}.json"
    if not path.is_file():
        return [("", "")]  # one test is left, which asks for the kit and so skips or fails
    content = json.loads(path.read_text(encoding="utf-8"))
    content = content.get("cases", content)
    runs = [(clip, run) for clip, runs in content.items() for run in runs]
    return [(clip, run) for clip, run in runs if not run.endswith("_string")]


@functools.cache
def tokenizer(folder: Path, version: str) -> SpeechTokenizer:
    return SpeechTokenizer.load(find_layout(folder / "checkpoints", version=version))


def read(path: Path) -> tuple[np.ndarray, int]:
    samples, rate = soundfile.read(path, dtype="float32")
    return samples, rate


@pytest.mark.parametrize(("clip", "run"), cases("encode"))
def test_encode_conformance(kit: Path, expected: Any, clip: str, run: str) -> None:
    answer = expected("encode")[clip][run]
    version, _, channel = run.partition("_channel_")
    samples, rate = read(kit / "audio" / f"{clip}.wav")
    encoder = tokenizer(kit, version)
    chosen = int(channel) if channel else None
    if "error" in answer:
        with pytest.raises(UnvoicedError):
            encoder.encode(samples, rate, chosen)
        flat = encoder.encode(samples, rate, chosen, allow_unvoiced=True)
        assert flat.hubert and flat.pitch and flat.style
        return
    units = encoder.encode(samples, rate, chosen)
    assert units.to_strings() == answer["units"]
    if "string" in answer:
        assert units_to_string(units) == answer["string"]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "version"), cases("long"))
def test_long_input_conformance(kit: Path, expected: Any, length: str, version: str) -> None:
    answers = expected("long")["cases"][length]
    clip, _ = read(kit / "audio" / "mls.wav")
    units = tokenizer(kit, version).encode(np.resize(clip, int(length)))
    assert units.to_strings() == answers[version]
    string = answers.get(f"{version}_string")
    assert string is None or units_to_string(units) == string
