"""Prompts that mix text and speech, and the reading of mixed output.

A prompt is ``[Speech][Hu99][Hu49]...[Text]some words[Speech]``: a tag wherever the modality
changes, and one at the end when the wanted output differs from the last input. The functions here
work on strings and follow the reference to the letter, malformed tokens included (DESIGN.md
section 6 and the README of the conformance kit).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
