"""Small talk that the base of ``smol`` writes itself, questions and answers alike.

Learning to hear and to answer in the domain, it would forget what else can be talked about. So it
is shown, among the rest, what it would have said: its own text keeps it what it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.dialogues import Example
from recipes.text_tokenizer import read_jsonl
from stages.lm import LanguageModel, Sampling
from stages.prompt import Modality
from stages.text import Tokenizer

SYSTEM = "You are a friendly companion who loves to chat. Reply with one short sentence."
OPENINGS = (
    "Do you like", "Do you think", "Do you know why", "Do you ever", "Have you ever",
    "Can you tell me about", "What do you think about", "What is the best", "What makes",
    "What is it like to", "Why do people", "Why is", "Why are", "How do", "How does", "How can I",
    "Where do", "Who invented", "What should I", "Would you rather", "When is the best time to",
    "Is it true that",
)  # fmt: skip
QUESTION_TOKENS, ANSWER_TOKENS = 16, 40
SHORTEST, LONGEST = 3, 22  # words of an answer
_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_PLAIN = re.compile(r"[A-Za-z0-9 ,.'!?-]+")


class Talker:
    """The base, which converses with itself."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.lm = LanguageModel.load(folder, device or "cpu")
        self.tokenizer = Tokenizer.load(folder)
        self._mask = self.tokenizer.mask(Modality.TEXT)
        self._system = self._message("system", SYSTEM)
        self.lm.append(self._system)

    def talk(self, number: int) -> tuple[str, str] | None:
        """The question and the answer of that number; None where nothing came of it."""
        opening = OPENINGS[number % len(OPENINGS)]
        began = self._header("user") + self._text(opening)
        rest = self._written(began, QUESTION_TOKENS, 0.8, number)
        question, mark, _ = rest.partition("?")
        question = f"{opening}{question}{mark}"
        asked = self._message("user", question) + self._header("assistant")
        answer = self._written(asked, ANSWER_TOKENS, 0.3, number)
        first = _SENTENCE.match(answer.strip())
        if not mark or first is None or not _PLAIN.fullmatch(question + first[0]):
            return None
        if not SHORTEST <= len(first[0].split()) <= LONGEST:
            return None
        return question, first[0].strip()

    def _written(self, prompt: list[int], count: int, temperature: float, seed: int) -> str:
        sampling = Sampling(temperature, top_p=0.9, seed=seed)
        self.lm.rewind(len(self._system))
        self.lm.append(prompt)
        ids: list[int] = []
        while len(ids) < count and self.tokenizer.eos not in ids:
            ids.append(self.lm.decode(sampling, self._mask))
        return self.tokenizer.decode(ids)

    def _message(self, role: str, text: str) -> list[int]:
        return [*self._header(role), *self._text(text), self.tokenizer.eos, *self._text("\n")]

    def _header(self, role: str) -> list[int]:
        return [self.tokenizer.bos, *self._text(f"{role}\n")]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)


def write_talk(path: Path, folder: Path, count: int, device: torch.device | None = None) -> None:
    """Try ``count`` times and write what came of it to ``path``, as JSON lines; goes on where an
    earlier run stopped.

    Args:
        folder: of the base (:func:`recipes.smol_model.write_untrained`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    done = max((row["number"] for row in read_jsonl(path)), default=-1)
    if done + 1 >= count:
        return
    talker = Talker(folder, device)
    with path.open("a", encoding="utf-8") as lines:
        for number in range(done + 1, count):
            found = talker.talk(number)
            row = {"number": number, "talk": found}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()


def examples(path: Path) -> Iterator[Example]:
    """What :func:`write_talk` wrote, as requests of the domain; each opening counts as an intent,
    so that they are drawn about as often as one of its own."""
    for row in read_jsonl(path):
        if row["talk"] is not None:
            question, answer = row["talk"]
            intent = f"small talk {row['number'] % len(OPENINGS)}"
            yield Example(intent, question, (), (answer,), 0, "train")
