"""The command line: what it refuses, and what it does with small random models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer
from typer.testing import CliRunner, Result

from agent.cli import app
from agent.commands import mendable
from stages import SAMPLE_RATE

Run = Callable[..., Result]

SPEAK = {"reply.max_seconds": 1.0, "reply.max_text_tokens": 8}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: object) -> str:
    """What is said of something that the user can mend: one line, exit code 2."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    said = result.stderr.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert "Traceback" not in result.output
    return said[-1]


@pytest.fixture
def kit_model(kit: Path) -> list[str]:
    """Options for the kit's Expressive model; PyTorch runs all of it, so nothing is exported."""
    return options(kit / "checkpoints", "expressive")


def options(root: Path, version: str, **settings: object) -> list[str]:
    found = sorted((root / "spiritlm_model").glob(f"*{version}*"))
    if not found:
        pytest.skip(f"this kit has no {version} language model")
    values = {
        "model.root": root, "model.lm": found[0].name, "model.runtime": "torch", **SPEAK, **settings
    }  # fmt: skip
    return [o for key, value in values.items() for o in ("--set", f"{key}={value}")]


@pytest.fixture
def question(kit: Path) -> Path:
    return kit / "audio" / "espeak.wav"


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    def write(
        samples: np.ndarray, rate: int = SAMPLE_RATE, name: str = "in.wav", subtype: str = "FLOAT"
    ) -> Path:
        soundfile.write(tmp_path / name, samples, rate, subtype)
        return tmp_path / name

    return write


# What is wrong with the input is said before any model is loaded.


def test_help_teaches_and_lists_every_command() -> None:
    said = command("--help").output
    for name in ("run", "encode", "decode", "generate", "export", "info"):
        assert name in said
        assert command(name, "--help").exit_code == 0
    assert "question.wav" in said


def test_an_unknown_command_or_option_is_a_usage_error() -> None:
    assert command("rnu").exit_code == 2
    assert command("run", "a.wav", "--paec", "fast").exit_code == 2
    assert command("run", "a.wav", "--pace", "slow").exit_code == 2


@pytest.mark.parametrize("name", ["run", "encode"])
def test_a_recording_that_cannot_be_used_is_refused(
    name: str, tmp_path: Path, wav: Callable[..., Path]
) -> None:
    text = tmp_path / "notes.wav"
    text.write_text("this is not audio")
    (tmp_path / "nothing.wav").touch()
    assert "no such file" in refusal(name, tmp_path / "none.wav")
    assert "is not audio" in refusal(name, text)
    assert "is empty" in refusal(name, tmp_path / "nothing.wav")
    assert "is a directory" in refusal(name, tmp_path)
    assert "no audio at all" in refusal(name, wav(np.zeros(0, np.float32)))
    long = wav(np.zeros(SAMPLE_RATE * 5, np.float32))
    assert "audio.max_seconds" in refusal(name, long, "--set", "audio.max_seconds=4")


def test_nan_samples_are_refused(
    wav: Callable[..., Path], tmp_path: Path, kit_model: list[str]
) -> None:
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 8000).astype(np.float32)
    wave[3000] = np.nan
    assert "sample 3000" in refusal("encode", wav(wave))
    out = tmp_path / "out.wav"
    assert "sample 3000" in refusal("run", wav(wave), out, "--pace", "fast", *kit_model)


def test_a_reply_that_cannot_be_written_is_refused(wav: Callable[..., Path]) -> None:
    source = wav(np.zeros(1600, np.float32))
    assert ".flac" in refusal("run", source, "reply.mp3")
    assert "no such folder" in refusal("run", source, source.parent / "none" / "reply.wav")
    assert "the recording itself" in refusal("run", source, source)
    out = source.parent / "out.wav"
    assert "no such folder" in refusal("run", source, out, "--trace", "none/trace.json")
    assert ".png" in refusal("run", source, out, "--plot", source.parent / "a.jpeg")
    assert not out.exists()


def test_a_configuration_that_cannot_be_is_refused(
    wav: Callable[..., Path], tmp_path: Path
) -> None:
    source = wav(np.zeros(1600, np.float32))
    assert "did you mean 'vad.hangover_ms'" in refusal("run", source, "--set", "vad.hangoverms=3")
    assert "expected" in refusal("run", source, "--set", "vad.hangover_ms=soon")
    assert "nano" in refusal("run", source, "--config", "nanoo")
    mine = tmp_path / "mine.yaml"
    mine.write_text("vad:\n  hangover: 3\n")
    said = refusal("run", source, "--config", mine)
    assert "mine.yaml" in said and "vad.hangover_ms" in said


def test_units_and_prompts_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    assert "neither tokens" in refusal("decode", "hello")
    assert "no token" in refusal("decode", "[hello]")
    assert "expected text:" in refusal("generate", "hello")
    assert "no such file" in refusal("generate", f"wav:{tmp_path / 'none.wav'}")
    assert "no token" in refusal("generate", "units:[x]")


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = command("run", tmp_path / "none.wav", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_ctrl_c_ends_as_in_a_shell() -> None:
    @mendable
    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        stopped()
    assert ended.value.exit_code == 130


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_user() -> None:
    @mendable
    def faulty() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        faulty()


# Checkpoints.


@pytest.fixture
def broken(kit: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Options for a copy of the kit's model with one file changed."""

    def make(file: str, change: Callable[[Path], None]) -> list[str]:
        root = tmp_path / "checkpoints"
        shutil.copytree(kit / "checkpoints", root, copy_function=os.link, dirs_exist_ok=True)
        path = next(root.glob(file))
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        change(path)
        return options(root, "expressive")

    return make


VOCODER = "speech_tokenizer/hifigan_spiritlm_expressive*/generator.pt"


def test_a_checkpoint_with_a_missing_key_is_refused(broken: Callable[..., list[str]]) -> None:
    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        del state["generator"]["dict.weight"]
        torch.save(state, path)

    said = refusal("decode", "[Pi1][St1][Hu5]", *broken(VOCODER, change))
    assert "generator.pt" in said and "dict.weight" in said


def test_a_checkpoint_with_a_wrong_shape_is_refused(broken: Callable[..., list[str]]) -> None:
    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        state["generator"]["dict.weight"] = torch.zeros(3, 2)
        torch.save(state, path)

    said = refusal("decode", "[Pi1][St1][Hu5]", *broken(VOCODER, change))
    assert "generator.pt" in said and "dict.weight" in said and "[3, 2]" in said


def test_a_truncated_checkpoint_is_refused(broken: Callable[..., list[str]]) -> None:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:1000])

    assert "generator.pt" in refusal("decode", "[Pi1][Hu5]", *broken(VOCODER, change))


def test_a_missing_checkpoint_file_is_refused(broken: Callable[..., list[str]]) -> None:
    assert "generator.pt" in refusal("decode", "[Pi1][Hu5]", *broken(VOCODER, Path.unlink))


class _Trap:
    """Unpickled naively, this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    broken: Callable[..., list[str]], tmp_path: Path, question: Path
) -> None:
    sprung = tmp_path / "sprung"

    def change(path: Path) -> None:
        torch.save({"generator": _Trap(sprung)}, path)

    model = broken(VOCODER, change)
    assert "generator.pt" in refusal("decode", "[Pi1][Hu5]", *model)
    assert "generator.pt" in refusal("run", question, tmp_path / "out.wav", *model)
    assert not sprung.exists()


# What it does.


def test_a_recording_is_answered(kit_model: list[str], question: Path, tmp_path: Path) -> None:
    out, trace, plot = (tmp_path / name for name in ("reply.flac", "trace.json", "trace.png"))
    pictures = ["--plot", plot] if _has_matplotlib() else []
    result = command(
        "run", question, out, "--pace", "fast", "--trace", trace, *pictures, "--plain", *kit_model
    )
    assert result.exit_code == 0, result.output
    turns = json.loads(trace.read_text())["turns"]
    assert turns and all(turn["ended"] for turn in turns)
    wave, rate = soundfile.read(out)
    assert rate == SAMPLE_RATE
    spoken = sum(turn["reply_seconds"] for turn in turns)
    assert len(wave) / rate == pytest.approx(spoken + 0.5 * (len(turns) - 1), abs=0.01)
    assert result.stdout.count("trace: turn=") == len(turns)
    assert str(out) in result.stdout
    assert not pictures or plot.stat().st_size > 1000


def test_silence_ends_politely(
    kit_model: list[str], wav: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "reply.wav"
    hum = 0.001 * np.sin(np.arange(2 * SAMPLE_RATE) * 2 * np.pi * 50 / SAMPLE_RATE)
    for wave in (np.zeros(2 * SAMPLE_RATE, np.float32), hum.astype(np.float32)):
        result = command("run", wav(wave), out, "--pace", "fast", *kit_model)
        assert result.exit_code == 0
        assert "no speech found" in result.stdout
        assert not out.exists()


def test_eight_channels_at_96_khz_are_answered(
    kit_model: list[str], question: Path, wav: Callable[..., Path], tmp_path: Path
) -> None:
    mono, rate = soundfile.read(question, dtype="float32")
    wide = np.repeat(mono[: 3 * rate], 96_000 // rate)[:, None] * np.ones((1, 8), np.float32)
    out = tmp_path / "reply.wav"
    result = command("run", wav(wide, 96_000), out, "--pace", "fast", *kit_model)
    assert result.exit_code == 0, result.output
    assert soundfile.info(out).frames


def test_units_go_out_and_come_back(kit_model: list[str], kit: Path, tmp_path: Path) -> None:
    recording = kit / "audio" / "one_second.wav"
    units = command("encode", recording, *kit_model).stdout.strip()
    assert units.startswith("[St") and units.endswith("]")
    streams = json.loads(command("encode", recording, "--json", *kit_model).stdout)
    assert set(streams) == {"hubert", "pitch", "style"}
    file, out = tmp_path / "units.txt", tmp_path / "out.wav"
    file.write_text(units)
    waves = []
    for given in (units, str(file)):
        result = command("decode", given, out, *kit_model)
        assert result.exit_code == 0, result.output
        waves.append(soundfile.read(out)[0])
    assert len(waves[0]) and np.array_equal(*waves)
    assert "speaker" in refusal("decode", units, out, "--speaker", 99, *kit_model)


def test_too_little_to_encode_is_refused(kit_model: list[str], wav: Callable[..., Path]) -> None:
    assert "80 ms" in refusal("encode", wav(np.zeros(800, np.float32)), *kit_model)
    silence = wav(np.zeros(SAMPLE_RATE, np.float32))
    assert "--allow-unvoiced" in refusal("encode", silence, *kit_model)
    assert command("encode", silence, "--allow-unvoiced", *kit_model).exit_code == 0


def test_a_prompt_is_continued(kit_model: list[str], kit: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.wav"
    prompt = ["text:what is this", f"wav:{kit / 'audio' / 'one_second.wav'}", "units:[Hu3][Hu4]"]
    limits = ["--max-tokens", 12, "--greedy", "--out", out]
    said = command("generate", *prompt, "--output", "text", *limits, *kit_model)
    assert said.exit_code == 0, said.output
    assert said.stdout and not out.exists()
    spoken = command("generate", *prompt, "--output", "speech", *limits, *kit_model)
    assert spoken.exit_code == 0, spoken.output
    assert "[Hu" in spoken.stdout and soundfile.info(out).frames
    assert "top_p" in refusal("generate", *prompt, "--top-p", 7, *kit_model)


def test_info_says_what_is_here_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, kit: Path
) -> None:
    monkeypatch.setenv("SPIRITLM_CHECKPOINTS_DIR", str(kit / "checkpoints"))
    found = json.loads(command("info", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert {m["version"] for m in found["models"]} >= {"expressive"}
    official = [m for m in found["models"] if m["name"] != "nano"]
    assert official and not any(m["missing"] for m in official)
    assert "torch" in command("info").stdout


def test_info_lists_every_key_with_its_meaning() -> None:
    said = command("info", "--keys", "--set", "vad.hangover_ms=432").stdout
    assert "vad.hangover_ms" in said and "432" in said
    values = json.loads(command("info", "--keys", "--json").stdout)
    assert values["vad.hangover_ms"] == 600


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
