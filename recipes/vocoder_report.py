"""How well the vocoder speaks: words recognised, and speed, on held-out recordings' own units."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from recipes.scoring import Quality, Recognizer, word_errors
from recipes.vocoder_data import Recording, load_recordings
from stages.vocoder import Frames, Vocoder

GROUPS = {"domain": ("request", "reply"), "book": ("book",)}


def measure(
    folder: Path, work: Path, voice: str, count: int = 30, keep: Path | None = None
) -> dict[str, Any]:
    """Word error rate by kind of sentence, with true and predicted durations, and the speed.

    Args:
        folder: a vocoder in the official layout.
        count: held-out recordings of each kind.
        keep: where to write the first three waves of each kind.

    Returns:
        ``{"domain": {"wer", "n", "quality", ...}, "domain_predicted": ..., "book": ..., "rtf"}``;
        ``quality`` is the mean DNSMOS of the speech and, beside it, of the recordings; ``rtf`` is
        seconds of computing per second of speech on one thread.
    """
    torch.set_num_threads(1)
    vocoder, judge, quality = Vocoder.load(folder), Recognizer(), Quality()
    recordings = load_recordings(work, voice, "heldout")
    result: dict[str, Any] = {}
    spent, spoken = 0.0, 0.0
    for name, roles in GROUPS.items():
        chosen = [r for r in recordings if r.role in roles]
        chosen = chosen[:: max(1, len(chosen) // count)][:count]
        for way in ("", "_predicted"):
            heard, scores = [], []
            for number, recording in enumerate(chosen):
                begun = time.perf_counter()
                wave = _speak(vocoder, recording, predicted=bool(way))
                spent += time.perf_counter() - begun
                spoken += len(wave) / 16000
                heard.append(judge.hear(wave))
                scores.append(quality.score(wave)["overall"])
                if keep is not None and number < 3:
                    keep.mkdir(parents=True, exist_ok=True)
                    soundfile.write(keep / f"{name}{way}_{number}.wav", wave, 16000)
            result[name + way] = word_errors([r.text for r in chosen], heard)
            real = [quality.score(r.wave / np.float32(32768))["overall"] for r in chosen]
            result[name + way] |= {
                "quality": round(float(np.mean(scores)), 2),
                "quality_of_recordings": round(float(np.mean(real)), 2),
            }
    result["rtf"] = round(spent / max(spoken, 1e-9), 4)
    return result


def _speak(vocoder: Vocoder, recording: Recording, predicted: bool) -> np.ndarray:
    if predicted:
        at = recording.starts
        code, pitch, style = (s[at] for s in (recording.code, recording.pitch, recording.style))
        return vocoder.speak(code, pitch, style, dedup=False)
    speaker, style_id = vocoder.voice()
    frames = Frames(recording.code, recording.pitch, recording.style)
    return vocoder.generate(frames, speaker, style_id)


def write_report(result: dict[str, Any], work: Path) -> Path:
    """Write ``{work}/reports/vocoder.json``."""
    path = work / "reports" / "vocoder.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
