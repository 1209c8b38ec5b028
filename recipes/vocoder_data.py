"""What the vocoder learns from: recordings of one voice with the unit frames they were heard as.

Unit frame ``i`` covers samples ``[640 i, 640 (i + 1))``. Pitch and style are attached to units as
they are when the model speaks: every unit of the token stream takes the latest pitch and style
token before it and keeps them while it lasts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

HOP = 640
MEL_HOP = 128
RATES = {"hu": 24.99, "pi": 12.5, "st": 1.0}  # token times of the interleaved stream


@dataclass(frozen=True)
class Recording:
    """One utterance: int16 wave [640 T] and its unit frames [T] (int64); ``style`` 0..99."""

    id: str
    text: str
    role: str
    wave: np.ndarray
    code: np.ndarray
    pitch: np.ndarray
    style: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Frames at which a unit begins, repeats dropped."""
        return run_starts(self.code)


def run_starts(code: np.ndarray) -> np.ndarray:
    """Indices at which a run of equal values begins, int64."""
    if not len(code):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.r_[True, code[1:] != code[:-1]])


def attach(code: np.ndarray, tokens: np.ndarray, kind: str) -> np.ndarray:
    """The pitch or style that each unit frame carries after the round trip through the stream.

    Args:
        code: phonetic units [T] at 25 Hz, repeats included.
        tokens: pitch (12.5 Hz) or style (1 Hz) tokens.
        kind: ``"pi"`` or ``"st"``.

    Returns:
        int64 [T]: the token current where the frame's run of equal units begins.
    """
    starts = run_starts(code)
    index = np.floor(starts / RATES["hu"] * RATES[kind] + 1e-9).astype(np.int64)
    current = np.asarray(tokens, dtype=np.int64)[np.minimum(index, len(tokens) - 1)]
    return np.repeat(current, np.diff(np.r_[starts, len(code)]))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete objects of a JSON-lines file; a last line still being written is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def load_recordings(
    work: Path, voice: str, split: str, limit: int | None = None
) -> list[Recording]:
    """Recordings of ``voice`` that have units and pitch, in the manifest's order.

    Where no style tokens were written, the style the recording was made in stands for them.

    Raises:
        FileNotFoundError: there are none; the message says which recipe to run.
    """
    rows = [
        row
        for row in read_lines(work / "corpus" / "manifest.jsonl")
        if row["voice"] == voice and row["split"] == split
    ]
    wanted = {row["id"] for row in rows}
    streams: dict[str, dict[str, list[int]]] = {}
    for key, name in (("hu", "units"), ("pi", "pitch"), ("st", "style")):
        lines = read_lines(work / "units" / f"{name}.jsonl")
        streams[key] = {o["id"]: o[key] for o in lines if o["id"] in wanted and o.get(key)}
    found = []
    for row in rows:
        if row["id"] in streams["hu"] and row["id"] in streams["pi"]:
            style = streams["st"].get(row["id"]) or [int(row["style"])]
            hu, pi = streams["hu"][row["id"]], streams["pi"][row["id"]]
            found.append(_recording(work / "corpus" / row["wav"], row, hu, pi, style))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise FileNotFoundError(
            f"{work}: no {split} recording of voice {voice!r} with units and pitch; run "
            "'python -m recipes corpus', 'units' and 'tokenizers' first"
        )
    return found


def load_waves(work: Path, voice: str, split: str, limit: int | None = None) -> list[Recording]:
    """Recordings of ``voice`` without their units (all 0), for what is learnt from sound alone."""
    rows = [
        row
        for row in read_lines(work / "corpus" / "manifest.jsonl")
        if row["voice"] == voice and row["split"] == split
    ][:limit]
    if not rows:
        raise FileNotFoundError(
            f"{work}: no {split} recording of voice {voice!r}; run 'python -m recipes corpus' first"
        )
    return [
        _recording(work / "corpus" / row["wav"], row, [0] * (row["samples"] // HOP), [0], [0])
        for row in rows
    ]


def _recording(
    path: Path, row: dict[str, Any], hu: list[int], pi: list[int], st: list[int]
) -> Recording:
    wave, _ = soundfile.read(path, dtype="int16")
    code = np.asarray(hu, dtype=np.int64)[: len(wave) // HOP]
    return Recording(
        id=row["id"],
        text=row["transcript"],
        role=row["role"],
        wave=wave[: len(code) * HOP],
        code=code,
        pitch=attach(code, np.asarray(pi), "pi"),
        style=attach(code, np.asarray(st), "st"),
    )


class Crops:
    """Random crops of unit frames over all recordings laid end to end; none spans two of them."""

    def __init__(self, recordings: list[Recording], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.code = np.concatenate([r.code for r in recordings])
        self.pitch = np.concatenate([r.pitch for r in recordings])
        self.style = np.concatenate([r.style for r in recordings])
        self.wave = np.concatenate([r.wave for r in recordings])
        lengths = np.array([len(r.code) for r in recordings])
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths

    @property
    def seconds(self) -> float:
        return len(self.wave) / 16000

    def positions(self, count: int, frames: int) -> np.ndarray:
        """Start frames [count] of crops of ``frames`` that lie within one recording."""
        room = np.maximum(self.ends - self.starts - frames + 1, 0)
        if not room.sum():
            raise ValueError(f"no recording is as long as a crop of {frames} frames")
        offset = np.cumsum(room)
        pick = self.random.integers(0, offset[-1], count)
        which = np.searchsorted(offset, pick, side="right")
        return self.starts[which] + pick - (offset[which] - room[which])

    def units(self, at: np.ndarray, frames: int, context: int) -> tuple[np.ndarray, ...]:
        """Code, pitch, style [N, context + frames + context] and a mask of frames that exist.

        Context beyond its recording's edge is masked out.
        """
        which = np.searchsorted(self.ends, at, side="right")
        index = at[:, None] + np.arange(-context, frames + context)
        inside = (index >= self.starts[which, None]) & (index < self.ends[which, None])
        index = np.clip(index, 0, len(self.code) - 1)
        return self.code[index], self.pitch[index], self.style[index], inside

    def waves(self, at: np.ndarray, frames: int) -> np.ndarray:
        """The samples of the crops, float32 [N, frames * 640] in [-1, 1]."""
        index = at[:, None] * HOP + np.arange(frames * HOP)
        return self.wave[index].astype(np.float32) / 32768
