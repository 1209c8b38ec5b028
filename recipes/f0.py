"""F0 of the whole corpus, computed once and kept: {work}/f0/{voice}/{id}.npy, float32 [2, T].

Row 0 is F0 in Hz at 200 Hz, interpolated through unvoiced frames, row 1 voicing; both are zero
for a recording without any voiced frame (a whisper).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.progress import track

from recipes.manifest import read_manifest
from stages import SAMPLE_RATE
from stages.fcpe import load_fcpe
from stages.pitch import PitchEncoder

REPLY_VOICE = "heart"  # the vocoder learns from this one; its F0 is wanted first

Row = dict[str, Any]


def rows(work: Path) -> list[Row]:
    """The manifest, the reply voice's recordings first."""
    return sorted(read_manifest(work / "corpus"), key=lambda row: row["voice"] != REPLY_VOICE)


def read_wave(work: Path, row: Row) -> np.ndarray:
    """A recording as float32 ``[n]`` at 16 kHz."""
    wave, rate = soundfile.read(work / "corpus" / row["wav"], dtype="float32")
    if rate != SAMPLE_RATE or wave.ndim != 1:
        raise ValueError(f"{row['wav']}: expected mono at {SAMPLE_RATE} Hz; make the corpus again")
    return np.asarray(wave)


def f0_path(work: Path, row: Row) -> Path:
    return work / "f0" / row["voice"] / f"{row['id']}.npy"


def load_f0(work: Path, row: Row) -> np.ndarray:
    """``[2, T]``: F0 in Hz and voicing, at 200 Hz."""
    return np.asarray(np.load(f0_path(work, row)))


def extract(work: Path, todo: Sequence[Row], processes: int = 2) -> None:
    """Compute and store the F0 of each row that has none yet; may be interrupted at any time."""
    missing = [row for row in todo if not f0_path(work, row).is_file()]
    if not missing:
        return
    for voice in {row["voice"] for row in missing}:
        (work / "f0" / voice).mkdir(parents=True, exist_ok=True)
    jobs = [(work, row) for row in missing]
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_start) as pool:
        results = pool.imap_unordered(_extract_one, jobs, chunksize=4)
        for _ in track(results, description="F0", total=len(jobs)):
            pass


_encoder: PitchEncoder | None = None


def _start() -> None:
    """One thread and one FCPE for each process. The VQ-VAE is not there yet, and not needed."""
    global _encoder
    torch.set_num_threads(1)
    mel, fcpe = load_fcpe()
    _encoder = PitchEncoder(mel, fcpe, vqvae=None)


def _extract_one(job: tuple[Path, Row]) -> None:
    work, row = job
    assert _encoder is not None
    f0, vuv = _encoder.f0(read_wave(work, row), allow_unvoiced=True)
    path = f0_path(work, row)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, np.stack([f0, vuv]))
    partial.replace(path)
