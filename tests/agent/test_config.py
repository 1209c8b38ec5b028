"""Configuration: the shipped files, overrides, and what is said when something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agent.config import Config, VadConfig, config_names, describe, keys, load_config
from agent.errors import UserError
from stages.checkpoint import CheckpointError
from stages.lm import Sampling
from stages.vad import VadSettings


def refusal(source: str | Path = "nano", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_shipped_configuration_is_valid() -> None:
    assert set(config_names()) >= {"nano", "base-7b", "expressive-7b"}
    for name in config_names():
        load_config(name)


def test_every_key_is_described() -> None:
    assert all(describe(key) for key in keys())
    assert all("ms" in describe(k) for k in keys() if k.endswith("_ms"))


def test_an_empty_file_and_an_empty_section_mean_the_defaults(write) -> None:
    assert load_config(write("")) == Config()
    assert load_config(write("vad:\n  # hangover_ms: 3\n")) == Config()


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load_config(
        "nano",
        ["vad.hangover_ms=400", "vad.hangover_ms=450", "model.root=null", 'reply.separator=" / "'],
    )
    assert config.vad.hangover_ms == 450
    assert config.model.root is None
    assert config.reply.separator == " / "


def test_overrides_that_are_only_valid_together_are_valid() -> None:
    config = load_config("nano", ["vad.trailing_ms=900", "vad.hangover_ms=1000"])
    assert config.vad.trailing_ms == 900


def test_the_vad_section_mirrors_the_detector_s_settings() -> None:
    assert VadConfig().settings() == VadSettings()
    assert set(VadConfig.model_fields) == {f.name for f in dataclasses.fields(VadSettings)}


def test_sampling_reaches_the_language_model() -> None:
    config = load_config("nano", ["sampling.speech.temperature=0.5", "sampling.speech.seed=7"])
    expected = Sampling(0.5, config.sampling.speech.top_p, seed=7)
    assert config.sampling.speech.sampling() == expected


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("vad.hangver_ms", "vad.hangover_ms"),
        ("hangover_ms", "vad.hangover_ms"),
        ("vadd.hangover_ms", "vad.hangover_ms"),
        ("sampling.text.temprature", "sampling.text.temperature"),
        ("voocder", "vocoder"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, nearest: str) -> None:
    message = refusal("nano", f"{key}=1")
    assert message == f"--set {key}=1: unknown key {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_in_a_file_names_the_file(write) -> None:
    path = write("vad:\n  hangover: 300\n")
    message = refusal(path)
    assert message.startswith(f"{path}: unknown key 'vad.hangover'")
    assert "'vad.hangover_ms'" in message


def test_an_unknown_section_in_a_file_is_answered_with_the_key_that_was_meant(write) -> None:
    path = write("vadd:\n  hangover_ms: 300\n")
    expected = "unknown key 'vadd.hangover_ms'; did you mean 'vad.hangover_ms'?"
    assert refusal(path) == f"{path}: {expected}"


def test_a_key_like_no_other_gets_the_list() -> None:
    assert "known are model, vad" in refusal("nano", "qqq=1")
    assert "known are channels.speech" in refusal("nano", "channels.qqqqqqqqqqqq=1")


def test_a_bad_value_names_source_key_value_and_what_is_expected(write) -> None:
    path = write("vad:\n  hangover_ms: soon\n")
    message = refusal(path)
    for part in (str(path), "vad.hangover_ms", "'soon'", "integer", "silence that ends"):
        assert part in message
    message = refusal("nano", "sampling.text.top_p=1.5")
    assert message.startswith("--set sampling.text.top_p=1.5: sampling.text.top_p is 1.5, expected")


def test_a_bad_choice_lists_the_choices() -> None:
    message = refusal("nano", "reply.mode=song")
    assert "'text-then-speech', 'speech' or 'any'" in message


def test_values_that_contradict_each_other_name_both(write) -> None:
    message = refusal(write("vad: {trailing_ms: 900, hangover_ms: 600}"))
    assert "trailing_ms is 900, expected 0 to hangover_ms" in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "true or false", "[1]"])
def test_nonsense_numbers_are_refused(value: str) -> None:
    assert "reply.max_seconds" in refusal("nano", f"reply.max_seconds={value}")


@pytest.mark.parametrize("override", ["vad.hangover_ms", "=3", "vad.hangover_ms=[1"])
def test_a_malformed_override_is_shown(override: str) -> None:
    assert refusal("nano", override).startswith(f"--set {override}: ")


def test_a_section_given_a_value_is_refused() -> None:
    assert "expected a section" in refusal("nano", "vad=3")


def test_an_unknown_name_lists_the_known_ones() -> None:
    message = refusal("namo")
    assert "base-7b" in message
    assert message.endswith("did you mean 'nano'?")


def test_files_that_cannot_be_read_are_named(tmp_path: Path, write) -> None:
    assert "no such configuration file" in refusal(tmp_path / "none.yaml")
    assert "line 2" in refusal(write("vad:\n  : [\n"))
    assert "expected sections" in refusal(write("- 1\n- 2\n"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(binary)


def test_yaml_cannot_build_python_objects(write) -> None:
    message = refusal(write("vad: !!python/object/apply:os.system ['true']\n"))
    assert "not valid YAML" in message


def test_actions_are_described_in_place_or_in_a_file_beside_the_configuration(
    tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"type": "object", "required": ["action"]}
    written = write("reply: {actions: things.json}\n")
    assert "things.json" in refusal(written)
    (written.parent / "things.json").write_text(json.dumps(schema))
    assert load_config(written).reply.actions == schema
    monkeypatch.chdir(written.parent)  # on the command line, a name is one from here
    assert load_config("nano", ["reply.actions=things.json"]).reply.actions == schema
    (written.parent / "things.json").write_text("{")
    assert "not a JSON file" in refusal(written)
    assert load_config(write("reply: {actions: {type: object}}\n")).reply.actions == {
        "type": "object"
    }


def test_a_bare_off_is_off_although_yaml_takes_it_for_false() -> None:
    assert load_config("nano", ["sound.echo=off"]).sound.echo == "off"
    assert load_config("nano", ["sound.echo=on"]).sound.echo == "on"


def test_weights_of_eight_bits_want_a_gpu() -> None:
    from agent.models import Models

    config = load_config("nano", ["model.eight_bits=int8", "model.device=cpu"])
    with pytest.raises(UserError, match=r"model\.eight_bits .* for a GPU"):
        Models.load(config)


def test_an_official_model_without_its_folder_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPIRITLM_CHECKPOINTS_DIR", raising=False)
    with pytest.raises(CheckpointError, match="SPIRITLM_CHECKPOINTS_DIR"):
        load_config("base-7b").model.layout()


def test_official_models_are_found_in_the_environment_s_folder(
    kit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRITLM_CHECKPOINTS_DIR", str(kit / "checkpoints"))
    for name in ("base-7b", "expressive-7b"):
        layout = load_config(name).model.layout()
        assert layout.version == name.split("-")[0]
    root = load_config("base-7b", [f"model.root={kit / 'checkpoints'}"]).model.layout()
    assert root.version == "base"
