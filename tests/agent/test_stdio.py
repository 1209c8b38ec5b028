"""The whole program between two pipes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from agent.cli import app
from agent.stdio import from_pcm, to_pcm
from stages import SAMPLE_RATE

QUESTION = Path(__file__).parents[2] / "examples" / "question.wav"
COMMAND = (sys.executable, "-m", "agent", "talk", "--stdio")


def test_sound_survives_the_pipe_and_is_clipped() -> None:
    wave = np.array([0.0, 0.25, -0.5, 1.5, -2.0], np.float32)

    there = from_pcm(to_pcm(wave))

    np.testing.assert_allclose(there, [0, 0.25, -0.5, 1, -1], atol=1e-4)
    assert from_pcm(b"\x00\x40\x01") == pytest.approx([0.5])  # half a sample at the end


@pytest.mark.parametrize("option", [("--save", "here"), ("--input", "mic")])
def test_devices_and_files_are_refused_with_pipes(option: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["talk", "--stdio", *option])

    assert done.exit_code == 2
    assert "--stdio uses no device" in done.output


@pytest.mark.slow
@pytest.mark.realtime
def test_a_question_goes_in_and_the_answer_comes_out_alone() -> None:
    question, rate = soundfile.read(QUESTION, dtype="float32")
    assert rate == SAMPLE_RATE
    pcm = to_pcm(np.pad(question, (0, 2 * SAMPLE_RATE)))
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as talk:
        assert talk.stdin is not None and talk.stdout is not None and talk.stderr is not None
        first = talk.stdout.read(320)  # it is ready
        begun = time.monotonic()
        for at in range(0, len(pcm), 640):
            talk.stdin.write(pcm[at : at + 640])
            talk.stdin.flush()
            time.sleep(max(0.0, begun + at / 2 / SAMPLE_RATE - time.monotonic()))
        talk.stdin.close()
        sound = from_pcm(first + talk.stdout.read())
        told = talk.stderr.read().decode()
        talk.wait(60)

    assert talk.returncode == 0, told
    assert np.sum(np.abs(sound) > 0.02) > SAMPLE_RATE // 4  # a quarter of a second of loud sound
    assert "state: answering" in told


@pytest.mark.slow
@pytest.mark.realtime
def test_it_ends_when_nobody_listens_any_more() -> None:
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as talk:
        assert talk.stdout is not None and talk.stderr is not None
        talk.stdout.read(320)
        talk.stdout.close()

        assert talk.wait(60) == 141, talk.stderr.read().decode()
