"""The shipped model for measuring: one request at a time, through the stages of the agent."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.graphs import graphs
from recipes import dialogues
from recipes.domain import transcript
from recipes.text_tokenizer import SEPARATOR
from stages.checkpoint import find_layout
from stages.encoder import SpeechTokenizer
from stages.lm import LanguageModel, Sampling
from stages.prompt import Modality
from stages.text import Tokenizer
from stages.units import units_to_string
from stages.vocoder import Vocoder, VocoderError

LONGEST_TEXT = 110  # tokens
LONGEST_REPLY = 500  # tokens, about 15 s


@dataclass
class Turn:
    """One answer: what nano heard, says and does, and how long each part took, in seconds."""

    heard: str
    reply: str
    action: dict[str, Any] | None = None
    units: str = ""
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Nano:
    """The shipped model, through the same stages and graphs that the agent runs."""

    def __init__(self, checkpoint: Path, sampling: Sampling, threads: int = 1) -> None:
        layout = find_layout(checkpoint)
        made = graphs(layout, device="cpu", threads=threads)
        self.ears = SpeechTokenizer.load(layout, graphs=made)
        self.text = Tokenizer.load(layout)
        self.lm = LanguageModel.load(layout)
        self.voice = Vocoder.load(layout, "cpu", made["vocoder"], made["durations"])
        self.sampling = sampling
        self._text = self.text.mask(Modality.TEXT, also=[self.text.speech_tag])
        self._speech = self.text.mask(Modality.SPEECH)

    def encode(self, wave: np.ndarray) -> str:
        """A recording as the token string that the language model reads; whispers too."""
        return units_to_string(self.ears.encode(wave, allow_unvoiced=True))

    def listen(self, wave: np.ndarray, before: Sequence[dialogues.Turn] = ()) -> Turn:
        """Encode a request, transcribe it and plan the reply as text (both greedily).

        Args:
            before: the conversation up to the request, as if it had been typed.
        """
        began = time.perf_counter()
        prompt = f"[Speech]{self.encode(wave)}[Text]"
        encoded = time.perf_counter()
        self._begin(before, prompt)
        filled = time.perf_counter()
        text, tokens = self._plan()
        heard, _, plan = text.partition(SEPARATOR.strip())
        action, reply = dialogues.read_plan(plan.strip())
        now = time.perf_counter()
        seconds = {"encode": encoded - began, "prefill": filled - encoded, "text": now - filled}
        return Turn(heard.strip(), reply, action, tokens=tokens, seconds=seconds)

    def read(self, text: str, before: Sequence[dialogues.Turn] = ()) -> Turn:
        """Plan the reply to a typed request, greedily."""
        began = time.perf_counter()
        self._begin(before, f"[Text]{text}{SEPARATOR.rstrip()}")
        filled = time.perf_counter()
        plan, tokens = self._plan()
        action, reply = dialogues.read_plan(plan.strip())
        seconds = {"prefill": filled - began, "text": time.perf_counter() - filled}
        return Turn(text, reply, action, tokens=tokens, seconds=seconds)

    def _begin(self, before: Sequence[dialogues.Turn], prompt: str) -> None:
        prefix = self.text.encode("[Speech]")[:-1]
        self.lm.reset()
        self.lm.append(prefix)
        for turn in before:
            past = f"[Text]{transcript(turn.request)}{SEPARATOR}{turn.plan}"
            self.lm.append([*self.text.encode(past)[len(prefix) :], self.text.eos])
        self.lm.append(self.text.encode(prompt)[len(prefix) :])

    def _plan(self) -> tuple[str, int]:
        """Text up to the tag that begins speech, and of how many tokens."""
        ids: list[int] = []
        while len(ids) < LONGEST_TEXT:
            ids.append(self.lm.decode(Sampling(greedy=True), self._text))
            if ids[-1] in (self.text.speech_tag, self.text.eos):
                break
        else:
            self.lm.append([self.text.speech_tag])
        return self.text.decode(ids[:-1]), len(ids)

    def answer(self, turn: Turn) -> np.ndarray:
        """Speak the reply of a turn that :meth:`listen` has just made; empty if nothing comes."""
        self.phrase(turn)
        began = time.perf_counter()
        try:
            wave = self.voice.decode(turn.units)
        except VocoderError:
            wave = np.zeros(0, np.float32)
        turn.seconds["vocoder"] = time.perf_counter() - began
        return wave

    def phrase(self, turn: Turn) -> None:
        """The units of that reply, without their sound."""
        began = time.perf_counter()
        ids: list[int] = []
        while len(ids) < LONGEST_REPLY:
            ids.append(self.lm.decode(self.sampling, self._speech))
            if ids[-1] == self.text.eos:
                break
        turn.units = self.text.decode([i for i in ids if i != self.text.eos])
        turn.tokens += len(ids)
        turn.seconds["units"] = time.perf_counter() - began


def fingerprint(checkpoint: Path, sampling: Sampling) -> str:
    """A short name for exactly these weights and this sampling."""
    digest = hashlib.sha256(repr(sampling).encode())
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            digest.update(path.relative_to(checkpoint).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
