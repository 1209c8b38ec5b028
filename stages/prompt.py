"""Prompts that mix text and speech, and the reading of mixed output.

A prompt is ``[Speech][Hu99][Hu49]...[Text]some words[Speech]``: a tag wherever the modality
changes, and one at the end when the wanted output differs from the last input. The functions here
work on strings and follow the reference to the letter, malformed tokens included (DESIGN.md
section 6 and the README of the conformance kit).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

TEXT_TAG, SPEECH_TAG = "[Text]", "[Speech]"

# "]" must come no later than the eleventh character, so that at most seven stand in between.
_STARTS_WITH_SPEECH = re.compile(r"\[(?:Hu|Pi|St)[^\]]{1,7}\]")
_ENDS_WITH_SPEECH = re.compile(r"\[(?:Hu|Pi|St)[^\[\]]{1,7}\]\Z")
_SPEECH_RUN = re.compile(r"(?:\[(?:Hu|Pi|St)[0-9]+\])+")
_SPLIT = re.compile(r"(?P<tag>\[Text\]|\[Speech\])|(?P<speech>\[(?:Hu|Pi|St)[^\]]*(?:\]|\Z))")


class Modality(Enum):
    """What a piece of input is, or what the output may be; ``ANY`` is for output only."""

    TEXT = "text"
    SPEECH = "speech"
    ANY = "any"

    @property
    def tag(self) -> str:
        """``[Text]`` or ``[Speech]``; empty for ``ANY``."""
        return {Modality.TEXT: TEXT_TAG, Modality.SPEECH: SPEECH_TAG}.get(self, "")

    @classmethod
    def parse(cls, name: str | Modality, *, of_input: bool = False) -> Modality:
        """By name, in any case; the reference's ``ARBITRARY`` is ``ANY``.

        Raises:
            ValueError: no such modality, or ``ANY`` where ``of_input`` asks for text or speech.
        """
        known = {"text": cls.TEXT, "speech": cls.SPEECH}
        if not of_input:
            known |= {"any": cls.ANY, "arbitrary": cls.ANY}
        key = name.value if isinstance(name, Modality) else name
        found = known.get(key.lower()) if isinstance(key, str) else None
        if found is None:
            expected = ", ".join(repr(k) for k in known if k != "arbitrary")
            raise ValueError(f"modality {key!r}: expected one of {expected}")
        return found


def build_prompt(
    parts: Iterable[tuple[str | Modality, str]], output: str | Modality = Modality.ANY
) -> str:
    """The prompt for ``parts``, each a modality and its text or token string.

    Parts of one modality that follow each other are put together without anything between.

    >>> build_prompt([("text", "two plus two is"), ("speech", "[Hu7][Hu9]")], "text")
    '[Text]two plus two is[Speech][Hu7][Hu9][Text]'

    Raises:
        ValueError: a modality is unknown.
    """
    last: Modality | None = None
    prompt = []
    for name, content in parts:
        modality = Modality.parse(name, of_input=True)
        if modality is not last:
            prompt.append(modality.tag)
        prompt.append(content)
        last = modality
    wanted = Modality.parse(output)
    if wanted is not last:
        prompt.append(wanted.tag)
    return "".join(prompt)


def does_start_with_speech_token(string: str | None) -> bool:
    """Whether ``string`` begins with something like ``[Hu12]``. No digit is asked for."""
    return string is not None and _STARTS_WITH_SPEECH.match(string) is not None


def does_end_with_speech_token(string: str | None) -> bool:
    """Whether ``string`` ends with something like ``[Hu12]``. No digit is asked for."""
    return string is not None and _ENDS_WITH_SPEECH.search(string) is not None


def find_prompt_last_speech_start_position(prompt: str) -> int | None:
    """Where the last run of speech tokens starts, wherever it ends; None if there is none."""
    runs = list(_SPEECH_RUN.finditer(prompt))
    return runs[-1].start() if runs else None


def parse_speech_and_text(content: str) -> list[tuple[Modality, str]]:
    """Split mixed output into runs of speech tokens and of text, tags removed.

    A speech token is "[" with Hu, Pi or St up to the next "]" or the end. Neighbours of one
    modality are joined, also across a tag. Text is not stripped.
    """
    runs: list[tuple[Modality, str]] = []

    def add(modality: Modality, piece: str) -> None:
        if piece and runs and runs[-1][0] is modality:
            runs[-1] = (modality, runs[-1][1] + piece)
        elif piece:
            runs.append((modality, piece))

    position = 0
    for match in _SPLIT.finditer(content):
        add(Modality.TEXT, content[position : match.start()])
        if match["speech"]:
            add(Modality.SPEECH, match["speech"])
        position = match.end()
    add(Modality.TEXT, content[position:])
    return runs


SHORTEST_SPEECH = 25
"""A speech run after the first piece of mixed output, or one that goes on from the prompt, is
left out where the number of its new units plus one is below this: about a second."""


@dataclass(frozen=True)
class Run:
    """One piece of a continuation.

    Attributes:
        modality: text or speech.
        content: the text, or the token string to speak.
        prompt: how many characters at the start of ``content`` were in the prompt already: they
            are spoken for the context and cut off afterwards.
        cut: the part of the spoken samples to cut off, as numerator and denominator.
    """

    modality: Modality
    content: str
    prompt: int = 0
    cut: tuple[int, int] = (0, 1)


def read_continuation(
    prompt: str, continuation: str, output: str | Modality, shortest: int = SHORTEST_SPEECH
) -> list[Run]:
    """What was generated after ``prompt``, in pieces of text and speech.

    One stripped piece for text and speech. For any output, the runs of both (see
    :func:`parse_speech_and_text`), stripped at the ends; but if the prompt ends and the
    continuation starts with a speech token, the prompt's last run of speech is spoken again in
    front, and cut off the wave by its share of the units. Short runs of speech are dropped, except
    for one that comes first and does not go on from the prompt.

    Args:
        shortest: units, plus one, that a run of speech needs; 0 keeps all.
    """
    modality = Modality.parse(output)
    if modality is not Modality.ANY:
        return [Run(modality, continuation.strip())]
    start = None
    if does_end_with_speech_token(prompt) and does_start_with_speech_token(continuation):
        start = find_prompt_last_speech_start_position(prompt)
    known = "" if start is None else prompt[start:]
    content = continuation.strip() if start is None else known + continuation
    runs: list[Run] = []
    for position, (kind, piece) in enumerate(parse_speech_and_text(content)):
        units = _count_units(piece)
        if kind is Modality.TEXT:
            runs.append(Run(kind, piece))
        elif position == 0 and known:
            before = _count_units(known)
            if units + 1 - before >= shortest:
                # One unit too many below the line: a quirk of the reference.
                runs.append(Run(kind, piece, len(known), (before, units + 1)))
        elif position == 0 or units + 1 >= shortest:
            runs.append(Run(kind, piece))
    return runs


def _count_units(tokens: str) -> int:
    return tokens.count("[Hu")
