"""Speakers for evaluation only: a voice that was never trained on, and a person."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track

from recipes.corpus import Job, record
from recipes.domain import Domain
from recipes.scoring import spoken

HUMAN = Path("/usr/share/asterisk/sounds/en")
HUMAN_TEXT = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


def joe_requests(world: Domain, work: Path, limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """Heldout requests in the voice joe, which is for evaluation only; [] where it is missing."""
    folder = work / "evaluation"
    requests = [r for r in world.requests if r.split == "heldout"]
    chosen = random.Random(seed).sample(requests, min(limit, len(requests)))
    rows = []
    try:
        for number, request in enumerate(track(chosen, "joe speaks")):
            job = Job(
                f"joe{number:04d}", request.text, "request", request.intent, "joe", 0, "heldout"
            )
            rows.append(record(job, folder, seed))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        typer.echo(f"left out: {error}", err=True)
        return []
    return rows


def human_prompts(known: set[str], limit: int | None) -> list[tuple[str, np.ndarray]]:
    """Telephone prompts spoken by a woman, of words that nano has met; [] where there are none.

    They come with Debian's asterisk-core-sounds-en-g722 (CC-BY-SA 3.0) and are no part of nano.
    """
    if not (HUMAN.is_dir() and HUMAN_TEXT.is_file()):
        return []
    from faster_whisper import decode_audio

    found = []
    lines = gzip.decompress(HUMAN_TEXT.read_bytes()).decode("utf-8", "replace").splitlines()
    for line in lines:
        name, _, text = line.partition(":")
        words = spoken(text).split()
        path = HUMAN / f"{name.strip()}.g722"
        plain = "[" not in text and 1 <= len(words) <= 12 and known.issuperset(words)
        if plain and path.is_file():
            found.append((text.strip(), path))
    random.Random(0).shuffle(found)
    return [(text, decode_audio(str(path), sampling_rate=16_000)) for text, path in found[:limit]]
