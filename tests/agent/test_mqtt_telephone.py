"""``mqtt-client`` and a served nano: a telephone. The reply is understood by a recognizer that has
nothing to do with nano."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mosquitto import running
from pulse import VirtualCard

from recipes.scoring import Recognizer, spoken
from stages import SAMPLE_RATE

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = REPOSITORY / "examples" / "question.wav"
PATIENCE = 180.0  # seconds after which a test gives up; nothing here is judged by time

pytestmark = [pytest.mark.slow, pytest.mark.realtime, pytest.mark.timeout(600)]


def agent(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agent", *words],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def until(process: subprocess.Popen[str], beginning: str) -> str:
    """Wait for a line that begins so."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no {beginning!r} in:\n{''.join(said)}")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a broker at which nano is served."""
    with running(tmp_path_factory.mktemp("broker")) as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        service = agent("serve", "--mqtt", url, "--set", "sampling.speech.seed=0")
        try:
            until(service, "serving")
            yield url
        finally:
            service.kill()
            service.communicate()


def test_a_call_from_file_to_file(address: str, tmp_path: Path) -> None:
    out = tmp_path / "reply.wav"
    call = agent("mqtt-client", address, "-d", "file", "-i", str(QUESTION), "-o", str(out))
    said, _ = call.communicate(timeout=PATIENCE)
    assert call.returncode == 0, said
    wave, rate = soundfile.read(out, dtype="float32")
    assert rate == SAMPLE_RATE
    assert "twelve months" in spoken(Recognizer().hear(wave))


def test_a_call_through_a_microphone_and_a_loudspeaker(address: str, pulse: VirtualCard) -> None:
    question, rate = soundfile.read(QUESTION, dtype="float32")
    call = agent("mqtt-client", address, "-d", "card", "--plain")
    sound = bytearray()
    try:
        until(call, "state: listening")
        with pulse.listening(SAMPLE_RATE) as recorder:
            assert recorder.stdout is not None
            stream = recorder.stdout

            def record() -> None:
                while block := stream.read(1600):
                    sound.extend(block)

            recording = threading.Thread(target=record)
            recording.start()
            pulse.say(question, rate).join(PATIENCE)
            assert "twelve months" in until(call, "says:")  # told when all of it was played
        recording.join(PATIENCE)
        call.send_signal(signal.SIGTERM)
        call.communicate(timeout=PATIENCE)
        assert call.returncode == 0
    finally:
        call.kill()
        call.communicate()
    heard = np.frombuffer(bytes(sound[: len(sound) // 4 * 4]), "<f4")
    assert "twelve months" in spoken(Recognizer().hear(heard))
