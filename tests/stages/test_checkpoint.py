"""Checkpoints are untrusted: what is wrong with one is said by file and key, and nothing runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.checkpoint import (
    CheckpointError,
    find_layout,
    load_json,
    load_state,
    load_weights,
    load_yaml,
    require,
)


def make_root(path: Path, *models: str, vocoder: str = "") -> Path:
    (path / "speech_tokenizer" / vocoder).mkdir(parents=True)
    for name in models:
        (path / "spiritlm_model" / name).mkdir(parents=True)
    return path


class TestLayout:
    def test_the_only_model_of_a_root_is_found(self, tmp_path: Path) -> None:
        layout = find_layout(make_root(tmp_path, "spirit-lm-base-7b"))
        assert layout.lm.name == "spirit-lm-base-7b"
        assert layout.version == "base"
        assert layout.vocoder.name == "hifigan_spiritlm_base"

    def test_the_version_chooses_among_several(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "spirit-lm-base-7b", "spirit-lm-expressive-7b")
        assert find_layout(root, version="expressive").lm.name == "spirit-lm-expressive-7b"
        with pytest.raises(CheckpointError, match=r"found spirit-lm-base-7b, spirit-lm-expr"):
            find_layout(root)

    def test_a_model_of_another_name_is_what_its_vocoder_is(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "mine", vocoder="hifigan_spiritlm_expressive_w2v2")
        assert find_layout(root).expressive

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="speech_tokenizer: no such directory"):
            find_layout(tmp_path)
        root = make_root(tmp_path / "root", "one")
        with pytest.raises(CheckpointError, match=r"spiritlm_model/two.*Present: one"):
            find_layout(root, "two")


class TestFiles:
    def test_tensors_come_back_from_both_formats(self, tmp_path: Path) -> None:
        state = {"weight": torch.arange(6.0).reshape(2, 3)}
        torch.save(state, tmp_path / "a.pt")
        torch.save(state, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
        save_file(state, tmp_path / "c.safetensors")
        for name in ("a.pt", "b.bin", "c.safetensors"):
            assert torch.equal(load_state(tmp_path / name)["weight"], state["weight"])

    def test_a_pickle_that_would_run_code_is_refused_and_does_not(self, tmp_path: Path) -> None:
        mark = tmp_path / "ran"

        class Harmful:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(mark),)

        torch.save({"weight": Harmful()}, tmp_path / "zip.pt")
        (tmp_path / "raw.pt").write_bytes(pickle.dumps({"weight": Harmful()}))
        for name in ("zip.pt", "raw.pt"):
            with pytest.raises(CheckpointError, match=rf"{name}: .*run code"):
                load_state(tmp_path / name)
        assert not mark.exists()

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_truncated_empty_and_missing_files_are_named(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=f"{name}: no such file"):
            load_state(path)
        path.touch()
        with pytest.raises(CheckpointError, match=f"{name}: the file is empty"):
            load_state(path)
        state = {"weight": torch.randn(64, 64)}
        (save_file if name.endswith("safetensors") else torch.save)(state, path)
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(CheckpointError, match=f"{name}: .*(truncated|no checkpoint)"):
            load_state(path)

    def test_configuration_files_must_be_mappings(self, tmp_path: Path) -> None:
        for name, text in (
            ("a.json", "[1, 2]"),
            ("b.json", "{"),
            ("a.yaml", "- 1"),
            ("b.yaml", "{"),
        ):
            (tmp_path / name).write_text(text)
            read = load_json if name.endswith("json") else load_yaml
            with pytest.raises(CheckpointError, match=name):
                read(tmp_path / name)


class TestKeys:
    def test_nested_values_are_reached_and_checked(self) -> None:
        config = {"outer": {"count": 3, "name": "x", "flag": True}}
        assert require(config, "outer.count", "f", int) == 3
        assert require(config, "outer.count", "f", float) == 3.0
        with pytest.raises(CheckpointError, match=r"f: key 'outer.other' is missing"):
            require(config, "outer.other", "f")
        with pytest.raises(CheckpointError, match=r"key 'outer.name' is a str, expected int"):
            require(config, "outer.name", "f", int)
        with pytest.raises(CheckpointError, match="expected int"):
            require(config, "outer.flag", "f", int)


class TestWeights:
    def test_they_are_cast_and_copied(self) -> None:
        linear = nn.Linear(2, 2)
        state = {"weight": torch.eye(2, dtype=torch.float16), "bias": torch.zeros(2), "old": None}
        load_weights(linear, state, "w.pt", ignore=["old"])
        assert linear.weight.dtype == torch.float32
        assert torch.equal(linear.weight, torch.eye(2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bias": None}, "key 'bias' is a NoneType, expected a tensor"),
            ({"bias": torch.zeros(3)}, r"key 'bias' has shape \[3\], expected \[2\]"),
            ({"more": torch.zeros(1)}, "key 'more' not known to Linear"),
        ],
    )
    def test_what_does_not_fit_is_named_by_file_and_key(
        self, change: dict[str, object], message: str
    ) -> None:
        state = {"weight": torch.eye(2), "bias": torch.zeros(2), **change}
        with pytest.raises(CheckpointError, match=rf"w\.pt: {message}"):
            load_weights(nn.Linear(2, 2), state, "w.pt")

    def test_a_missing_key_is_named_and_nothing_is_loaded(self) -> None:
        linear = nn.Linear(2, 2)
        before = linear.weight.clone()
        with pytest.raises(CheckpointError, match=r"w\.pt: key 'bias' missing"):
            load_weights(linear, {"weight": torch.eye(2)}, "w.pt")
        assert torch.equal(linear.weight, before)
