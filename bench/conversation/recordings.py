"""The requests that are spoken to what is measured: recordings of which the true end is known.

They lie in ``examples/requests/``: FLAC files at 16 kHz and ``requests.json``, which says of each
who speaks, which words, and at which samples the speech begins and ends. So a benchmark needs no
synthesiser. ``python -m bench.conversation.recordings`` makes them anew (the extra [train]).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from agent.audio_files import read_chunks
from agent.errors import UserError
from stages import SAMPLE_RATE

INDEX = "requests.json"
LEVEL = 0.06  # RMS of the speech, about -24 dBFS
MARGIN = SAMPLE_RATE // 5  # quiet kept before and after the speech
TEXTS = (
    ("Tell me eight minus one.", "heart"),
    ("Nano, what season is it in October?", "heart_low"),
    ("Hey Nano, how many languages do you speak?", "heart_high"),
    ("Can you say butterfly?", "heart_man"),
    ("What do cows eat?", "heart_child"),
    ("Come to the garage.", "heart_deep"),
    ("Turn down the volume please.", "heart_mid"),
    ("Do you know the capital of Sweden Nano?", "heart_brisk"),
    ("Today is Wednesday what is tomorrow?", "heart"),
    ("Are there more robots like you?", "heart_man"),
    ("Could you please turn the office light off?", "heart_low"),
    ("How much is two times twelve?", "heart_high"),
)


@dataclass(frozen=True, eq=False)
class Request:
    """A recorded request: float32 ``[n]`` at 16 kHz.

    Attributes:
        begin, end: samples at which the speech begins and has ended.
    """

    name: str
    text: str
    voice: str
    wave: np.ndarray
    begin: int
    end: int


def folder() -> Path:
    """Where the recordings that come with the program are."""
    bench = Path(__file__).parents[1]
    places = (bench.parent / "examples" / "requests", bench / "_data" / "requests")
    return next((place for place in places if (place / INDEX).is_file()), places[0])


def load(place: Path | None = None) -> list[Request]:
    """The requests of a folder, by default of the program's own.

    Raises:
        UserError: the index or a recording is missing, damaged, or at odds with the other.
    """
    place = place or folder()
    index = place / INDEX
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))["requests"]
        found = [_read(place, row) for row in rows]
    except OSError as error:
        raise UserError(
            f"{index}: cannot be read ({error.strerror}); give --requests DIR"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index}: not an index of requests ({error!r}); expected a list 'requests' of "
            "objects with file, text, voice, begin and end"
        ) from None
    if not found:
        raise UserError(f"{index}: names no requests; list at least one")
    return found


def _read(place: Path, row: dict[str, Any]) -> Request:
    path = place / str(row["file"])
    wave = np.concatenate(list(read_chunks(path, max_seconds=60)))
    begin, end = int(row["begin"]), int(row["end"])
    if not 0 <= begin < end <= len(wave):
        raise UserError(
            f"{path}: speech from {begin} to {end} of {len(wave)} samples is impossible; mend "
            f"'begin' and 'end' in {INDEX}"
        )
    return Request(path.stem, str(row["text"]), str(row["voice"]), wave, begin, end)


def speech_bounds(wave: np.ndarray) -> tuple[int, int]:
    """The first and one past the last 10 ms that are within 40 dB of the loudest ones, samples."""
    step = SAMPLE_RATE // 100
    power = np.square(wave[: len(wave) // step * step].reshape(-1, step)).mean(1)
    loud = np.flatnonzero(power > power.max() * 1e-4)
    return int(loud[0]) * step, (int(loud[-1]) + 1) * step


def make(place: Path) -> None:
    """Synthesise :data:`TEXTS` into ``place``."""
    from recipes.voices import speak

    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (text, voice) in enumerate(TEXTS):
        wave = speak(text, voice, seed=number).wave
        begin, end = speech_bounds(wave)
        speech = wave[begin:end]
        scale = LEVEL / float(np.sqrt(np.mean(np.square(speech))))
        wave = np.pad(speech * scale, MARGIN).astype(np.float32)
        name = f"{number:02d}.flac"
        soundfile.write(place / name, np.clip(wave, -1, 1), SAMPLE_RATE, subtype="PCM_16")
        row = {"file": name, "text": text, "voice": voice, "begin": MARGIN}
        rows.append({**row, "end": len(wave) - MARGIN})
    about = "synthetic voices of hibari-tts 0.2.1 (Apache-2.0), warped as in recipes/voices.py"
    document = {"about": about, "rate": SAMPLE_RATE, "requests": rows}
    (place / INDEX).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(folder())
