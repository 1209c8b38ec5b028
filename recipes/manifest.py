"""The corpus as a list of recordings, for the steps that need nothing else of how it was made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PROCESSES = os.cpu_count() or 1  # what has many recordings to do uses all cores


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The rows of {folder}/manifest.jsonl; a last line cut off by an interrupted run is left out,
    and where there is no file there are none."""
    path = folder / "manifest.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def recordings(work: Path) -> list[dict[str, Any]]:
    """The corpus's recordings. Raises FileNotFoundError naming the step that makes it."""
    rows = read_manifest(work / "corpus")
    if not rows:
        path = work / "corpus" / "manifest.jsonl"
        raise FileNotFoundError(f"{path} is missing: run `python -m recipes corpus` first")
    return rows


def corpus_seed(work: Path) -> int:
    """The seed that the corpus under ``work`` was made with; 0 where that is not known."""
    path = work / "reports" / "corpus.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["seed"]) if path.is_file() else 0
