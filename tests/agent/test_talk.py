"""A person, a microphone, a loudspeaker and nano: the whole program on a virtual sound card."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from pulse import VirtualCard

from recipes.scoring import Recognizer
from stages import SAMPLE_RATE

pytestmark = [pytest.mark.slow, pytest.mark.realtime, pytest.mark.timeout(900)]

QUESTION = Path(__file__).parents[2] / "examples" / "question.wav"
LONGEST = 60.0  # seconds for anything to happen on a busy machine
TURNS = 50


class Talk:
    """A running ``python -m agent talk --plain``, its lines and what leaves the loudspeaker."""

    def __init__(self, card: VirtualCard, folder: Path, *settings: str) -> None:
        self.card = card
        self.folder = folder
        options = [option for setting in settings for option in ("--set", setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent", "talk", "--plain", "--save", str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        )
        self.lines: list[str] = []
        self.wave = bytearray()
        self._changed = threading.Condition()
        question, rate = soundfile.read(QUESTION, dtype="float32")
        self._question = question if question.ndim == 1 else question.mean(1)
        self._rate = rate
        self._listening = card.listening(SAMPLE_RATE)
        self._loudspeaker = self._listening.__enter__()
        for work in (self._read_lines, self._read_sound):
            threading.Thread(target=work, daemon=True).start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()

    def _read_sound(self) -> None:
        assert self._loudspeaker.stdout is not None
        while block := self._loudspeaker.stdout.read(1600):
            self.wave += block

    def mark(self) -> int:
        """What was told so far; see :meth:`until`."""
        return len(self.lines)

    def until(self, pattern: str, since: int = 0) -> str:
        """Wait for a line that ``pattern`` is found in, among those after ``since``."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines[since:] if re.search(pattern, line)]
            return bool(found) or self.process.poll() is not None

        with self._changed:
            self._changed.wait_for(there, LONGEST)
        assert found, f"no {pattern!r} within {LONGEST} s in:\n" + "\n".join(self.lines)
        return found[0]

    def ask(self, seconds: float = LONGEST) -> threading.Thread:
        """Say the question, or its beginning, into the microphone."""
        return self.card.say(self._question[: int(seconds * self._rate)], self._rate)

    def heard(self, start: float = 0.0) -> np.ndarray:
        """What left the loudspeaker after ``start`` seconds: float32 ``[n]`` at 16 kHz."""
        whole = np.frombuffer(bytes(self.wave[: len(self.wave) // 4 * 4]), "<f4")
        return whole[int(start * SAMPLE_RATE) :]

    def seconds(self) -> float:
        """How much of the loudspeaker has been heard so far."""
        return len(self.wave) / 4 / SAMPLE_RATE

    def rss(self) -> int:
        """Bytes of memory in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def turns(self) -> list[dict]:
        """The traces kept so far."""
        (kept,) = self.folder.glob("*/turns.jsonl")
        return [json.loads(line) for line in kept.read_text().splitlines()]

    def end(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it as a user would."""
        self.process.send_signal(how)
        try:
            self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # makes it say where it is
            self.process.wait(LONGEST)
            pytest.fail("it did not end:\n" + "\n".join(self.lines[-200:]))
        self._listening.__exit__(None, None, None)


Start = Callable[..., Talk]


@pytest.fixture
def start(pulse: VirtualCard, tmp_path: Path) -> Iterator[Start]:
    running: list[Talk] = []

    def begin(*settings: str) -> Talk:
        running.append(Talk(pulse, tmp_path / "kept", *settings))
        running[-1].until("state: listening.*ready")
        return running[-1]

    yield begin
    for talk in running:
        if talk.process.poll() is None:
            talk.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer()


def test_a_question_into_the_microphone_is_answered_from_the_loudspeaker(
    start: Start, recognizer: Recognizer, tmp_path: Path
) -> None:
    talk = start()
    begun = talk.seconds()
    talk.ask()
    talk.until("state: listening.*the reply was heard")
    time.sleep(0.3)  # the rest of it is still in parec's buffer
    assert "12 months" in numbered(recognizer.hear(talk.heard(begun)))
    talk.end()
    assert talk.process.returncode == 0
    (kept,) = talk.folder.glob("*/recording.flac")
    both, rate = soundfile.read(kept)
    assert rate == SAMPLE_RATE and both.shape[1] == 2
    assert "months" in recognizer.hear(both[:, 0].astype(np.float32)), "left: the microphone"
    assert "12 months" in numbered(recognizer.hear(both[:, 1].astype(np.float32))), "right: nano"


def test_speech_over_the_reply_stops_it_and_is_answered(
    start: Start, recognizer: Recognizer
) -> None:
    talk = start()
    talk.ask()
    talk.until("state: answering")
    since = talk.mark()
    talk.ask()
    talk.until("interrupted", since)
    silent_from = talk.seconds()
    talk.until("state: answering", since)
    pause = talk.heard(silent_from + 0.1)
    assert float(np.abs(pause[: SAMPLE_RATE // 2]).max()) < 1e-3, "it fell silent"
    begun = talk.seconds()
    talk.until("state: listening.*the reply was heard", since)
    time.sleep(0.3)
    assert recognizer.hear(talk.heard(begun - 0.5)), "the interruption gets its own answer"
    talk.until("trace: turn=2")
    first, second = talk.turns()
    assert first["ended"] == "barge-in" and second["ended"] == "complete"
    assert first["reply_seconds"] > 0


def test_a_microphone_pulled_out_and_put_back_goes_on(
    start: Start, recognizer: Recognizer, pulse: VirtualCard
) -> None:
    talk = start()
    pulse.unplug("mic")
    talk.until("device: ")
    since = talk.mark()
    pulse.plug("mic")
    talk.until("device: .*back", since)
    begun = talk.seconds()
    talk.ask()
    talk.until("state: listening.*the reply was heard", since)
    time.sleep(0.3)
    assert "12 months" in numbered(recognizer.hear(talk.heard(begun)))


def test_fifty_turns_in_a_row_drop_nothing_and_grow_nowhere(start: Start) -> None:
    talk = start("reply.max_seconds=0.6", "turns.min_hangover_ms=300")
    memory = []
    for _ in range(TURNS):
        since = talk.mark()
        talk.ask(1.0)  # half the question is speech as well
        talk.until("trace: turn=", since)
        memory.append(talk.rss())
    talk.end(signal.SIGTERM)
    turns = talk.turns()
    assert len(turns) == TURNS
    for turn in turns:
        assert turn["ended"] in ("long enough", "complete")
        assert all(channel["dropped"] == 0 for channel in turn["channels"].values())
    assert memory[-1] - memory[TURNS // 5] < 20 * 2**20
    (kept,) = talk.folder.glob("*/recording.flac")
    assert soundfile.info(kept).duration > TURNS


def numbered(text: str) -> str:
    return text.lower().replace("twelve", "12")
