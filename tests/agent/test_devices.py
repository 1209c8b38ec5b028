"""Devices are found by number or name, and what is missing is named with its mend."""

from __future__ import annotations

import builtins
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
import typer
from pulse import VirtualCard
from typer.testing import CliRunner

from agent.devices import devices, find_device, levels, list_devices, play_tone, portaudio
from agent.errors import UserError

app = typer.Typer()
app.command()(devices)


def test_the_devices_are_listed_with_the_defaults_marked(pulse: VirtualCard) -> None:
    shown = CliRunner().invoke(app, ["--plain"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "test_mic" in shown.output and "test_speaker" in shown.output
    assert "*" in shown.output


def test_a_device_is_found_by_number_name_or_part_of_it(pulse: VirtualCard) -> None:
    known = next(device for device in list_devices() if device.name == "test_mic")
    for wanted in (known.number, str(known.number), "test_mic", "EST_MI"):
        assert find_device("input", wanted) == known
    assert find_device("input", None).default_input


def test_a_misspelt_device_gets_the_nearest_ones(pulse: VirtualCard) -> None:
    with pytest.raises(UserError, match=r"sound.input: no microphone 'tset_mic'.*test_mic"):
        find_device("input", "tset_mic")
    with pytest.raises(UserError, match=r"no loudspeaker 99; known: .*test_speaker"):
        find_device("output", 99)


def test_the_test_tone_is_heard(pulse: VirtualCard) -> None:
    with pulse.listening(16_000) as recorder:
        assert recorder.stdout is not None
        recorder.stdout.read(64)  # it listens
        play_tone(find_device("output", None), 0.5)
        heard = np.frombuffer(recorder.stdout.read(4 * 12_000), np.float32)
    loud = heard[np.abs(heard) > 1e-3]
    assert len(loud) > 4_000
    assert np.abs(heard).max() == pytest.approx(0.1, abs=0.02)


def test_the_meter_shows_the_level_of_what_is_said(pulse: VirtualCard) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    speaking = pulse.say(tone, 16_000)
    loudest = max(islice(levels(find_device("input", None)), 20))
    speaking.join()
    assert loudest == pytest.approx(-9.0, abs=1)  # 0.5 at its peak


def test_a_missing_library_is_mended_on_each_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "sounddevice":
            raise OSError("PortAudio library not found")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        portaudio()
    for mend in ("apt install libportaudio2", "brew install portaudio", "Windows"):
        assert mend in str(caught.value)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match=r"pip install 'spiritlm-agent\[mic\]'"):
        portaudio()
