"""A corpus of a few sentences with its units, as the recipes leave them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

REQUESTS = {
    "Hello, nano.": ["Hi there!", "Hello!"],
    "What time is it?": ["It is noon."],
    "Please go left.": ["I go to the left."],
}
GO_LEFT = {"action": "turn", "direction": "left"}
ACTIONS = {"Please go left.": GO_LEFT}
AFTER = "And nano?"  # means nothing alone
HELDOUT = "Could you turn left?"
BOOK = "The quick brown fox is not lazy."


def manifest_rows() -> list[dict[str, Any]]:
    rows = []

    def add(text: str, role: str, voice: str, split: str = "train", style: int = 0) -> None:
        words = text.split()
        end = 0.3 + 0.4 * len(words)
        rows.append(
            {
                "id": f"{role}{len(rows)}",
                "text": text,
                "transcript": "".join(c for c in text.lower() if c.isalpha() or c in "' "),
                "role": role,
                "intent": None,
                "voice": voice,
                "style": style,
                "split": split,
                "wav": "",
                "samples": int(16000 * (end + 0.3)),
                "words": [[w, 0.3 + 0.4 * i, 0.7 + 0.4 * i] for i, w in enumerate(words)],
                "phones": [["sil", 0.0, 0.3]]
                + [[w[0], 0.3 + 0.4 * i, 0.7 + 0.4 * i] for i, w in enumerate(words)],
            }
        )

    for request, replies in REQUESTS.items():
        add(request, "request", "slt")
        add(request, "request", "heart_low")
        for reply in replies:
            add(reply, "reply", "heart")
            add(reply, "reply", "heart", style=1)
            add(reply, "reply", "rms")
    add(AFTER, "request", "rms")
    add(HELDOUT, "request", "slt", "heldout")
    add(BOOK, "book", "heart")
    add(BOOK, "book", "awb")
    return rows


def units_of(row: dict[str, Any]) -> dict[str, Any]:
    """Units as ears would give them: three for each phone, in its time; a wandering pitch."""
    rng = np.random.default_rng(zlib.crc32(row["id"].encode()))
    frames = row["samples"] // 640
    units = np.full(frames, 0)
    for phone, start, end in row["phones"]:
        at = np.arange(round(start * 25), min(round(end * 25), frames))
        units[at] = zlib.crc32(phone.encode()) % 60 * 3 + 3 * (at - at[0]) // len(at)
    units = np.where(rng.random(frames) < 0.1, rng.integers(0, 180, frames), units)
    pitch = 32 + np.cumsum(rng.integers(-2, 3, frames // 2))
    return {
        "id": row["id"],
        "hu": units.tolist(),
        "pi": np.clip(pitch, 0, 63).tolist(),
        "st": [row["style"]] * -(-frames // 25),
    }


def write_corpus(path: Path) -> Path:
    """Write it into the folder ``path``, and return that."""
    rows = manifest_rows()
    dialogs = [
        {
            "intent": "x", "request_text": q, "reply_text": a, "reply_style": 1, "split": "train",
            "action": ACTIONS.get(q), "before": [],
        }
        for q, answers in REQUESTS.items()
        for a in answers
    ]  # fmt: skip
    dialogs.append({**dialogs[-1], "request_text": HELDOUT, "split": "heldout"})
    past = {"request": "Hello, nano.", "reply": "Hello!", "style": 0, "action": None}
    dialogs.append({**dialogs[0], "request_text": AFTER, "before": [past]})
    (path / "units").mkdir()
    (path / "corpus").mkdir()
    units = [units_of(row) for row in rows]
    for name, content in {
        "corpus/manifest": rows,
        "corpus/dialogs": dialogs,
        "units/units": [{"id": u["id"], "hu": u["hu"]} for u in units],
        "units/pitch": [{"id": u["id"], "pi": u["pi"]} for u in units],
        "units/style": [{"id": u["id"], "st": u["st"]} for u in units],
    }.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
