"""Speech that no model here was trained on: held-out sentences, unheard voices, a person."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.domain import book, build
from recipes.strangers import HUMAN
from recipes.voices import speak
from stages import SAMPLE_RATE

LEVEL = 0.07  # RMS, that of the corpus


@dataclass(frozen=True, eq=False)
class Utterance:
    """A recording: float32 ``[n]`` at 16 kHz, who speaks, and the words where they are known."""

    wave: np.ndarray
    speaker: str
    text: str = ""

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE


def sentences(count: int, seed: int = 0) -> list[str]:
    """Held-out requests of the domain and held-out sentences of the book, by turns."""
    rng = random.Random(seed)
    asked = [request.text for request in build().requests if request.split == "heldout"]
    told = list(book()[1])
    rng.shuffle(asked)
    rng.shuffle(told)
    return [text for pair in zip(asked, told, strict=False) for text in pair][:count]


def spoken(texts: Sequence[str], voices: Sequence[str], seed: int = 0) -> list[Utterance]:
    """Each text in the next of ``voices``, all as loud as each other.

    Raises:
        ModuleNotFoundError, FileNotFoundError: a voice is not installed.
    """
    out = []
    for number, text in enumerate(texts):
        voice = voices[number % len(voices)]
        wave = speak(text, voice, seed=seed + number).wave
        out.append(Utterance(_levelled(wave), voice, text))
    return out


def person(count: int, shortest: float, longest: float, seed: int = 0) -> list[Utterance]:
    """Telephone prompts spoken by a woman, between ``shortest`` and ``longest`` seconds.

    They come with Debian's asterisk-core-sounds-en-g722 (CC-BY-SA 3.0); none where it is missing.
    """
    if not HUMAN.is_dir():
        return []
    from faster_whisper import decode_audio

    paths = sorted(HUMAN.glob("*.g722"))
    random.Random(seed).shuffle(paths)
    found: list[Utterance] = []
    for path in paths:
        wave = decode_audio(str(path), sampling_rate=SAMPLE_RATE)
        if shortest <= len(wave) / SAMPLE_RATE <= longest:
            found.append(Utterance(_levelled(np.asarray(wave, np.float32)), "person"))
        if len(found) == count:
            break
    return found


def _levelled(wave: np.ndarray) -> np.ndarray:
    rms = float(np.sqrt(np.mean(np.square(wave)))) + 1e-9
    return (wave * (LEVEL / rms)).astype(np.float32)
