"""Units, strings and prompts against the reference (conformance kit, pure functions)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stages.prompt import (
    Modality,
    build_prompt,
    does_end_with_speech_token,
    does_start_with_speech_token,
    find_prompt_last_speech_start_position,
    parse_speech_and_text,
)
from stages.units import (
    HUBERT,
    PITCH,
    RATES,
    STYLE,
    Interleaver,
    Units,
    reference_units,
    string_to_units,
    units_to_string,
)

WELL_FORMED = re.compile(r"(\[((Hu|Pi|St)(0|[1-9][0-9]*)|Text|Speech)\])*")
NAMES = {"hubert": HUBERT, "pitch": PITCH, "style": STYLE}
Read = Callable[..., Any]


class Fixed(random.Random):
    """Draws a given style."""

    def __init__(self, style: int) -> None:
        super().__init__()
        self.style = style

    def choice(self, seq: Sequence[Any]) -> Any:
        assert self.style in seq
        return self.style


def keys(arguments: dict[str, Any]) -> dict[str, str]:
    """Takes the reference's names for the streams out of its arguments."""
    return {name: arguments.pop(f"{name}_key", name) for name in NAMES}


def test_conformance_units_to_string(expected: Read) -> None:
    for case in expected("strings").get("units_to_string", []):
        arguments = dict(case["args"])
        renamed = {name: case["units"].get(key) for name, key in keys(arguments).items()}
        units = Units.from_strings({n: s for n, s in renamed.items() if s is not None})
        dedup = {k for n, k in NAMES.items() if arguments.pop(f"{n}_dedup", n != "style")}
        rates = {k: arguments.pop(f"{n}_rate", RATES[k]) for n, k in NAMES.items()}
        wanted = {name: arguments.pop(name, False) for name in ("has_pitch", "has_style")}
        assert not arguments
        if "error" in case:
            with pytest.raises(ValueError, match="stream"):
                units_to_string(units, rates=rates, dedup=dedup, **wanted)
        else:
            assert units_to_string(units, rates=rates, dedup=dedup, **wanted) == case["string"]


def test_conformance_string_to_units(expected: Read) -> None:
    for case in expected("strings").get("string_to_units", []):
        arguments = dict(case["args"])
        renamed = keys(arguments)
        string = case["string"]
        results = {0: case["units"]} if "units" in case else case["random_style"]
        for style, result in results.items():
            if "error" in result:
                assert string_to_units(string, **arguments).hubert == []
                continue
            got = reference_units(string, rng=Fixed(int(style)), **arguments)
            assert {renamed[n]: s for n, s in got.items()} == result, string
            # What we use ourselves says the same, wherever the reference reads whole numbers.
            ours = string_to_units(string, rng=Fixed(int(style)), **arguments).to_strings()
            if WELL_FORMED.fullmatch(string):
                assert ours == got, string


def test_conformance_encoded_strings(expected: Read) -> None:
    cases: list[tuple[dict[str, str], str]] = []
    for clip in expected("encode").values():
        cases += [(c["units"], c["string"]) for c in clip.values() if "string" in c]
    published = expected("published_real_weights", {})
    for clip in [*expected("long", {"cases": {}})["cases"].values(), published]:
        for name, string in clip.items():
            if name.endswith("_string"):
                version = name.removesuffix("_string")
                cases.append((clip.get(version) or clip[f"{version}_units"], string))
    assert cases
    for strings, string in cases:
        units = Units.from_strings(strings)
        assert units_to_string(units) == string
        interleaver = Interleaver(units.streams())
        assert "".join(map(str, interleaver.push(units) + interleaver.flush())) == string


@pytest.mark.parametrize(
    "function",
    [
        does_start_with_speech_token,
        does_end_with_speech_token,
        find_prompt_last_speech_start_position,
    ],
    ids=lambda f: f.__name__,
)
def test_conformance_predicates(expected: Read, function: Callable[[Any], Any]) -> None:
    for string, result in expected("strings").get(function.__name__, []):
        assert function(string) == result, string


def test_conformance_parse_speech_and_text(expected: Read) -> None:
    letters = {Modality.TEXT: "t", Modality.SPEECH: "s"}
    for case in expected("strings").get("parse_speech_and_text", []):
        got = [[piece, letters[m]] for m, piece in parse_speech_and_text(case["content"])]
        assert got == case["splits"], case["content"]


def test_conformance_build_prompt(expected: Read) -> None:
    for case in expected("strings").get("build_prompt", []):
        assert build_prompt(case["inputs"], case["output_modality"]) == case["prompt"]


@pytest.mark.parametrize(
    ("section", "of_input"),
    [("output_modality_from_string", False), ("content_type_from_tuple", True)],
)
def test_conformance_modality_names(expected: Read, section: str, of_input: bool) -> None:
    names = {Modality.TEXT: "TEXT", Modality.SPEECH: "SPEECH", Modality.ANY: "ARBITRARY"}
    for name, result in expected("strings").get(section, []):
        if isinstance(result, dict):
            with pytest.raises(ValueError, match="modality"):
                Modality.parse(name, of_input=of_input)
        else:
            assert names[Modality.parse(name, of_input=of_input)] == result
