"""Pieces of a prompt and of what is generated: text and speech."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from stages import SAMPLE_RATE
from stages.units import Units


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True, eq=False)
class Speech:
    """A piece of speech: as audio, as units, or as both.

    Attributes:
        audio: a file, or samples ``[n]`` or ``[n, channels]`` in [-1, 1].
        rate: Hz, of samples; 16000 by default. A file has its own.
        tokens: the units; by default they are encoded from the audio. A string is taken as it is.
    """

    audio: str | Path | np.ndarray | None = None
    rate: int = SAMPLE_RATE
    tokens: str | Units | None = None

    @property
    def wave(self) -> np.ndarray:
        """The samples. Raises :class:`ValueError` where there are none."""
        if not isinstance(self.audio, np.ndarray):
            raise ValueError("this speech is not given as samples: read the file, or decode it")
        return self.audio


Part = str | Path | np.ndarray | Units | Text | Speech | tuple[str, Any]
"""Text: a ``str`` or :class:`Text`. Speech: a path, samples at 16 kHz, units or :class:`Speech`.
Or a pair of "text" or "speech" and one of these (a ``str`` of speech is a file)."""


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples float32 ``[n, channels]`` and rate (Hz) of a WAV, FLAC, OGG... file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not audio that libsndfile reads.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path}: not an audio file that libsndfile reads ({error})") from error
