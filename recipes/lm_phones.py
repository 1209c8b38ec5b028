"""Stand-in units from aligned phones, so that the language model can learn before its ears exist.

The slow part of learning to transcribe is to find out *where to look*; what the units are called
hardly matters. So the model is first trained on units that a table makes of the corpus's phones,
with about the ambiguity of real ones: three per phone, some that depend on the voice, some wrong.
When the real units are there, each takes over the embeddings of the stand-ins it coincides with.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FRAME_SECONDS = 0.04
STAND_INS = 200
BY_VOICE, WRONG = 0.15, 0.07  # shares of frames


def phone_units(row: Mapping[str, Any]) -> dict[str, Any]:
    """Units in the form of ``units.jsonl`` (with ``pi`` and ``st``) for a row of the manifest.

    Phonetic units at 25 Hz come from the phones, style units from the style's label; pitch units
    wander. The same row gives the same units.
    """
    rng = np.random.default_rng(zlib.crc32(row["id"].encode()))
    frames = row["samples"] // 640
    centres = (np.arange(frames) + 0.5) * FRAME_SECONDS
    units = np.full(frames, _code("silence"))
    for phone, start, end in row["phones"]:
        for i in np.flatnonzero((centres >= start) & (centres < end)):
            third = int(3 * (centres[i] - start) / (end - start))
            voice = row["voice"] if rng.random() < BY_VOICE else ""
            units[i] = _code(f"{phone} {third} {voice}")
    wrong = rng.random(frames) < WRONG
    units = np.where(wrong, rng.integers(0, STAND_INS, frames), units)
    steps = rng.integers(-2, 3, frames // 2) * (rng.random(frames // 2) < 0.7)
    pitch = np.clip(rng.integers(16, 48) + np.cumsum(steps), 0, 63)
    return {
        "id": row["id"],
        "hu": units.tolist(),
        "pi": pitch.tolist(),
        "st": [row["style"]] * -(-frames // 25),
    }


def _code(name: str) -> int:
    return zlib.crc32(name.encode()) % STAND_INS


def transfer(
    embedding: Tensor,
    phonetic: np.ndarray,
    stand_ins: Mapping[str, Iterable[int]],
    units: Mapping[str, Iterable[int]],
) -> None:
    """Let every real unit take over the mean embedding of the stand-ins it coincides with.

    Args:
        embedding: ``[vocabulary, hidden]``, changed in place.
        phonetic: row of each phonetic unit.
        stand_ins, units: recording id -> units at 25 Hz, not deduplicated.
    """
    together = np.zeros((len(phonetic), len(phonetic)))
    for name, real in units.items():
        if name in stand_ins:
            pairs = list(zip(real, stand_ins[name], strict=False))
            np.add.at(together, tuple(np.array(pairs, dtype=np.int64).reshape(-1, 2).T), 1)
    seen = together.sum(1) > 0
    shares = torch.from_numpy(together[seen] / together[seen].sum(1, keepdims=True)).float()
    with torch.no_grad():
        old = embedding[phonetic]
        new = shares @ old
        # An average is shorter than its parts; keep the length that the network is used to.
        new *= old[:STAND_INS].norm(dim=1).mean() / new.norm(dim=1, keepdim=True).clamp(min=1e-6)
        embedding[phonetic[seen]] = new
