"""The researcher API against the reference, end to end (conformance kit, ``lm_*``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lm import Sampling
from stages.spiritlm import Speech, SpiritLM, Text, find_model
from stages.units import string_to_units

Case = tuple[str, dict[str, Any]]
TOLERANCE = 1e-4
LIBRARY_MAX_LENGTH = 20  # prompt and continuation, where a run gives no max_new_tokens
STYLE_SEEDS = range(30)  # enough to draw each of the styles that the reference may draw


@cache
def load(root: Path, version: str) -> SpiritLM:
    return SpiritLM.load(root / "checkpoints", version=version, device="cpu")


def version_of(request: pytest.FixtureRequest) -> str:
    cases = [n for n in ("lm_run", "lm_inputs", "lm_decode") if n in request.fixturenames]
    return request.getfixturevalue(cases[0])[0]


@pytest.fixture
def model(kit: Path, request: pytest.FixtureRequest) -> SpiritLM:
    return load(kit, version_of(request))


@pytest.fixture
def waves(kit: Path, request: pytest.FixtureRequest) -> Any:
    return np.load(kit / "expected" / f"lm_{version_of(request)}.npz")


def matches(got: list[Text | Speech], expected: list[Any], waves: Any) -> bool:
    """Texts and lengths are equal, which is asserted; whether the waves are, too."""
    assert len(got) == len(expected)
    close = True
    for ours, (kind, theirs) in zip(got, expected, strict=True):
        if kind == "TEXT":
            assert isinstance(ours, Text) and ours.text == theirs
            continue
        assert isinstance(ours, Speech) and len(ours.wave) == theirs["samples"]
        name = theirs["npz"]
        if name in waves:
            parts = [(ours.wave, waves[name])]
        else:
            head, tail = waves[f"{name}.head"], waves[f"{name}.tail"]
            parts = [(ours.wave[: len(head)], head), (ours.wave[-len(tail) :], tail)]
        close &= all(np.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in parts)
    return close


def check(generate: Callable[[int], list[Text | Speech]], expected: list[Any], waves: Any) -> None:
    """Compare; where the reference drew a style, one of the styles must give its wave."""
    got = generate(0)
    if matches(got, expected, waves):
        return
    pieces = [string_to_units(str(g.tokens)) for g in got if isinstance(g, Speech)]
    assert any(p.pitch is not None and p.style is None for p in pieces), "the waves differ"
    assert any(matches(generate(seed), expected, waves) for seed in STYLE_SEEDS)


def check_better(got: list[Text | Speech]) -> None:
    """Where the reference fails there is nothing to match: whole samples and clean tokens."""
    for piece in got:
        if isinstance(piece, Speech):
            units = string_to_units(str(piece.tokens))
            assert np.isfinite(piece.wave).all()
            assert units.hubert or not len(piece.wave)
        else:
            assert isinstance(piece, Text)


def test_conformance_continuations(lm_run: Case, model: SpiritLM, waves: Any) -> None:
    run = lm_run[1]
    ids = run["input_ids"]
    assert model.text_tokenizer.encode(run["prompt"]) == ids
    limit = run["max_new_tokens"] or LIBRARY_MAX_LENGTH - len(ids)
    force = run.get("force_tokens_to_output_modality", True)
    output = run["output_modality"]
    new = model.continue_ids(ids, output if force else "any", limit, Sampling(greedy=True))
    assert new == run["generated_ids"]
    assert model.text_tokenizer.decode(ids + new) == run["decoded"]
    assert (new[-1] == model.text_tokenizer.eos) == run["ended_by_eos"]

    def generate(seed: int) -> list[Text | Speech]:
        return model.generate(
            run["prompt"],
            output,
            max_new_tokens=limit,
            greedy=True,
            force=force,
            seed=seed,
            speaker=run.get("speaker_id", 2),
        )

    if "error" in run:
        check_better(generate(0))
    else:
        check(generate, run["outputs"], waves)


def test_conformance_prompts(lm_inputs: Case, model: SpiritLM, kit: Path) -> None:
    """From the clips themselves."""
    run = lm_inputs[1]
    parts: list[Any] = []
    for kind, content in run["inputs"]:
        parts.append(content if kind == "TEXT" else kit / "audio" / f"{content}.wav")
    assert model.prompt(parts, run["output_modality"]) == run["prompt"]


def test_conformance_reading_of_continuations(lm_decode: Case, model: SpiritLM, waves: Any) -> None:
    case = lm_decode[1]
    prompt, generated = case["prompt"], case["generated"]
    assert generated.startswith(prompt)

    def read(seed: int) -> list[Text | Speech]:
        return model.read(
            prompt,
            generated[len(prompt) :],
            case["output_modality"],
            speaker=case["speaker_id"],
            seed=seed,
        )

    if "error" in case:
        check_better(read(0))
    else:
        check(read, case["outputs"], waves)


def test_conformance_encode(kit: Path, expected: Callable[[str], Any]) -> None:
    """Every clip, from the file: channels and rates included."""
    for clip, versions in expected("encode").items():
        for name, case in versions.items():
            version, _, channel = name.partition("_channel_")
            model = load(kit, version)
            path = kit / "audio" / f"{clip}.wav"
            chosen = int(channel) if channel else None
            if "error" in case:
                with pytest.raises(ValueError, match="voiced"):
                    model.encode(path, channel=chosen)
            else:
                units = model.encode(path, channel=chosen)
                assert units.to_strings() == case.get("units", case)
                if "string" in case:
                    assert model.units_string(units) == case["string"]


@pytest.mark.parametrize("version", ["base", "expressive"])
def test_conformance_models_are_found(
    kit: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = kit / "checkpoints"
    by_version = find_model(root, version)
    assert by_version.version == version
    monkeypatch.setenv("SPIRITLM_CHECKPOINTS_DIR", str(root))
    assert find_model(by_version.lm.name) == by_version
    assert find_model(by_version.lm) == by_version
