"""The researcher API: arguments, errors, laziness, chance."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from stages.checkpoint import CheckpointError
from stages.lm import Sampling
from stages.models import CHECKPOINTS_VARIABLE
from stages.parts import read_audio
from stages.prompt import Modality, read_continuation
from stages.spiritlm import Speech, SpiritLM, Text, find_model
from stages.units import Units, string_to_units


@cache
def load(root: Path, version: str) -> SpiritLM:
    return SpiritLM.load(root / "checkpoints", version=version, device="cpu")


@pytest.fixture
def base(kit: Path) -> SpiritLM:
    return load(kit, "base")


@pytest.fixture
def expressive(kit: Path) -> SpiritLM:
    return load(kit, "expressive")


def test_generating_text_loads_neither_ears_nor_voice(kit: Path) -> None:
    model = SpiritLM.load(kit / "checkpoints", version="base", device="cpu")
    model.generate([Text("a")], "text", max_new_tokens=2)
    assert set(vars(model)) & {"lm", "text_tokenizer", "vocoder", "speech_tokenizer"} == {
        "lm",
        "text_tokenizer",
    }


@pytest.mark.parametrize(
    ("part", "prompt"),
    [
        ("words", "[Text]words"),
        (Text("words"), "[Text]words"),
        (("text", "words"), "[Text]words"),
        (("TEXT", Text("words")), "[Text]words"),
        (Speech(tokens="[Hu3]"), "[Speech][Hu3]"),
        (Units([3, 3, 4]), "[Speech][Hu3][Hu4]"),
        (Speech(tokens=Units([3, 4], [1, 2], [5])), "[Speech][Hu3][Hu4]"),
        (("speech", Units([3])), "[Speech][Hu3]"),
    ],
)
def test_parts_come_in_many_forms(base: SpiritLM, part: Any, prompt: str) -> None:
    assert base.prompt([part]) == prompt


@pytest.mark.parametrize("part", [Speech(), ("speech", 3), 3, ("audio", "x")])
def test_what_is_no_part(base: SpiritLM, part: Any) -> None:
    with pytest.raises(ValueError, match=r"part|Speech\(\)|modality"):
        base.prompt([part])


def test_pitch_and_style_are_in_the_prompt_of_an_expressive_model(expressive: SpiritLM) -> None:
    assert expressive.prompt([Units([3, 4], [1], [5])]) == "[Speech][St5][Pi1][Hu3][Hu4]"


def test_a_seed_repeats_a_generation(expressive: SpiritLM) -> None:
    def once(seed: int) -> tuple[str, np.ndarray]:
        (speech,) = expressive.generate(["hello"], "speech", max_new_tokens=12, seed=seed)
        assert isinstance(speech, Speech)
        return str(speech.tokens), speech.wave

    first, again = once(1), once(1)
    assert first[0] == again[0]
    assert any(once(seed)[0] != first[0] for seed in range(2, 6))
    np.testing.assert_array_equal(first[1], again[1])


def test_sampling_what_is_kept_in_the_cache_does_not_matter(base: SpiritLM) -> None:
    long = ["one two three", Units([5, 6, 7])]
    fresh = base.generate(long, "text", max_new_tokens=8, seed=3)
    base.generate(long[:1], "text", max_new_tokens=8, seed=4)
    assert base.generate(long, "text", max_new_tokens=8, seed=3) == fresh


def test_output_can_be_given_back(expressive: SpiritLM) -> None:
    outputs = expressive.generate(["hello"], "speech", max_new_tokens=20, seed=1)
    prompt = expressive.prompt(["hello", *outputs, "and"], "text")
    assert prompt == f"[Text]hello[Speech]{outputs[0].tokens}[Text]and"  # type: ignore[union-attr]


def test_generation_ends_at_a_stop_string(base: SpiritLM) -> None:
    for seed in range(20):
        (whole,) = base.generate(["hello"], "text", max_new_tokens=20, seed=seed)
        assert isinstance(whole, Text)
        if len(whole.text) > 40:
            break
    length = base.lm.length
    stop = whole.text[7:10]
    (cut,) = base.generate(["hello"], "text", max_new_tokens=20, seed=seed, stop=stop)
    assert cut == Text(whole.text[: whole.text.index(stop)].strip())
    assert base.lm.length < length


def test_a_tag_to_stop_at_is_not_banned(base: SpiritLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = base.text_tokenizer.speech_tag
    decode = base.lm.decode

    def eager(sampling: Sampling, mask: torch.Tensor) -> int:
        """Takes the tag wherever it may."""
        only = torch.arange(len(mask)) == tag
        return decode(sampling, mask & only if mask[tag] else mask)

    monkeypatch.setattr(base.lm, "decode", eager)
    assert base.generate(["hi"], "text", max_new_tokens=9, stop="[Speech]") == [Text("")]
    assert base.lm.ids[-1] == tag
    base.generate(["hi"], "text", max_new_tokens=9)
    assert tag not in base.lm.ids


def test_a_prompt_that_is_too_long_is_refused(base: SpiritLM) -> None:
    with pytest.raises(ValueError, match="room for"):
        base.generate("[Speech]" + "[Hu1]" * base.lm.capacity, "text")


def test_no_new_tokens(base: SpiritLM) -> None:
    assert base.generate(["a"], "any", max_new_tokens=0) == []
    assert base.generate(["a"], "text", max_new_tokens=0) == [Text("")]
    (speech,) = base.generate(["a"], "speech", max_new_tokens=0)
    assert isinstance(speech, Speech) and len(speech.wave) == 0 and speech.tokens == ""


# What the reference fails at.


def test_text_after_a_unit_is_ignored_in_speech(base: SpiritLM) -> None:
    clean = base.read("[Text]a[Speech]", "[Hu1][Hu2]", "speech", speaker=1)[0]
    mixed = base.read("[Text]a[Speech]", "[Hu1] b[Hu2] c [x]", "speech", speaker=1)[0]
    assert isinstance(clean, Speech) and isinstance(mixed, Speech)
    assert mixed.tokens == clean.tokens == "[Hu1][Hu2]"
    np.testing.assert_array_equal(clean.wave, mixed.wave)


def test_units_that_cannot_be_spoken_are_left_out(base: SpiritLM) -> None:
    beyond = base.vocoder.config.units
    (speech,) = base.read("", f"[Hu1][Hu{beyond}][Hu2]", "speech")
    (clean,) = base.read("", "[Hu1][Hu2]", "speech")
    assert isinstance(speech, Speech) and isinstance(clean, Speech)
    np.testing.assert_array_equal(speech.wave, clean.wave)


def test_speech_without_pitch_takes_the_pitch_before_it(expressive: SpiritLM) -> None:
    prompt = "[Text]a[Speech][St3][Pi7][Hu9][Text]b"
    (ours,) = expressive.read(prompt, "[Hu1][Hu2]", "any")
    (given,) = expressive.read(prompt, "[St3][Pi7][Hu1][Hu2]", "any")
    assert isinstance(ours, Speech) and isinstance(given, Speech)
    np.testing.assert_array_equal(ours.wave, given.wave)
    (alone,) = expressive.read("[Text]a", "[Hu1][Hu2]", "any", seed=1)
    assert isinstance(alone, Speech) and len(alone.wave)


def test_brackets_that_are_no_units_stay_text(base: SpiritLM) -> None:
    assert base.read("[Text]a", "[Stuff] is", "any") == [Text("[Stuff]"), Text(" is")]


@pytest.mark.parametrize(("units", "kept"), [(23, False), (24, True)])
def test_speech_that_goes_on_is_cut_by_its_share(units: int, kept: bool) -> None:
    prompt, new = "[Text]a[Speech][Hu1][Hu2]", "[Hu3]" * units
    runs = read_continuation(prompt, new, "any")
    assert [r.content[r.prompt :] for r in runs] == [new] * kept
    assert [r.cut for r in runs] == [(2, units + 3)] * kept
    assert all(r.modality is Modality.SPEECH for r in runs)


def test_short_speech_can_be_kept(base: SpiritLM) -> None:
    assert base.read("[Text]a", " b[Hu1][Hu2]", "any") == [Text("b")]
    text, speech = base.read("[Text]a", " b[Hu1][Hu2]", "any", shortest_speech=0)
    assert text == Text("b") and isinstance(speech, Speech) and speech.tokens == "[Hu1][Hu2]"


# Finding models and reading audio.


def test_unknown_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECKPOINTS_VARIABLE, raising=False)
    with pytest.raises(CheckpointError, match=r"'spirit-lm-base-7b'.*is not set"):
        find_model("spirit-lm-base-7b")
    monkeypatch.setenv(CHECKPOINTS_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match=f"'nowhere'.*{tmp_path}"):
        find_model("nowhere")
    with pytest.raises(CheckpointError, match="neither a directory"):
        find_model(tmp_path)


def test_audio_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"text\.wav: not an audio file"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "two.flac", np.zeros((10, 2)), 8000)
    samples, rate = read_audio(tmp_path / "two.flac")
    assert samples.shape == (10, 2) and rate == 8000


def test_samples_that_are_no_numbers_are_refused(base: SpiritLM) -> None:
    wave = np.zeros(16000, np.float32)
    wave[5] = np.nan
    with pytest.raises(ValueError, match="sample 5 of the audio is nan"):
        base.encode(wave)


def test_whole_numbers_are_no_samples(base: SpiritLM) -> None:
    with pytest.raises(ValueError, match="int16: divide by 32768"):
        base.encode(np.zeros(16000, np.int16))


def test_a_file_has_no_samples_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="not given as samples"):
        _ = Speech("a.wav").wave


def test_decode_speaks_strings_and_units_alike(expressive: SpiritLM) -> None:
    string = "[St71][Pi3][Hu1][Hu2][Pi4][Hu3]"
    wave = expressive.decode(string, speaker=1)
    np.testing.assert_array_equal(wave, expressive.decode(string_to_units(string), speaker=1))
    drawn = "[Pi3][Hu1][Hu2]"
    np.testing.assert_array_equal(
        expressive.decode(drawn, seed=5), expressive.decode(drawn, seed=5)
    )
