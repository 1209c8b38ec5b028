"""What is kept of a session, whatever becomes of the session and of the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agent.errors import UserError
from agent.events import Heard, Interrupted, ReplyText, Spoken, TurnEnded, TurnStarted
from agent.recorder import AUDIO, JOURNAL, TRANSCRIPT, TURNS, Recorder, recover
from agent.telemetry import TurnTrace
from stages import SAMPLE_RATE

BLOCK = 160

CHILD = """
import sys
from pathlib import Path
import numpy as np
from agent.events import Spoken
from agent.recorder import Recorder

recorder = Recorder(Path(sys.argv[1]), {}, print)
recorder(Spoken(1, "these words", 10))
ramp = np.arange(160, dtype=np.float32) / 1000
for block in range(100000):
    recorder.audio(ramp, -ramp)
    if block >= 300:
        # Says how far it is, and goes on only when it has been read.
        print(160 * (block + 1), flush=True)
        sys.stdin.readline()
"""


def session(folder: Path, tell: list[str]) -> Recorder:
    return Recorder(folder, {"config": "nano"}, tell.append)


def sound(recorder: Recorder, blocks: int) -> None:
    for _ in range(blocks):
        recorder.audio(np.full(BLOCK, 0.5, np.float32), np.full(BLOCK, -0.25, np.float32))


def test_a_session_leaves_sound_words_and_traces(tmp_path: Path) -> None:
    tell: list[str] = []
    with session(tmp_path / "kept", tell) as recorder:
        recorder(TurnStarted(1, 8000))
        sound(recorder, 250)
        recorder(Heard(1, "who are *you*"))
        recorder(ReplyText(1, " My name is Nano."))
        recorder(Spoken(1, " My name ", 8000))
        recorder(Spoken(1, "is Nano.", 16000))
        recorder(TurnEnded(1, TurnTrace(1, speech=(8000, 24000), ended="complete")))
    assert tell == []
    stereo, rate = soundfile.read(recorder.folder / AUDIO)
    assert rate == SAMPLE_RATE and stereo.shape == (250 * BLOCK, 2)
    np.testing.assert_allclose(stereo[[0, -1]], [[0.5, -0.25]] * 2, atol=1e-4)
    assert sorted(p.name for p in recorder.folder.iterdir()) == sorted(
        ["about.json", AUDIO, TRANSCRIPT, TURNS]
    )
    words = (recorder.folder / TRANSCRIPT).read_text()
    assert "**0:00 heard** who are \\*you\\*\n" in words
    assert "**0:02 says** My name is Nano.\n" in words
    (line,) = (recorder.folder / TURNS).read_text().splitlines()
    assert json.loads(line)["speech_samples"] == [8000, 24000]
    assert json.loads((recorder.folder / "about.json").read_text())["config"] == "nano"


def test_words_that_nobody_heard_are_struck_through(tmp_path: Path) -> None:
    with session(tmp_path, []) as recorder:
        recorder(Heard(1, "tell me a story"))
        recorder(ReplyText(1, "Once upon a time."))
        recorder(Spoken(1, "Once upon ", 9000))
        recorder(Interrupted(1, 9600, "barge-in"))
        recorder(TurnStarted(2, 32000))  # told before the end of the turn it broke
        recorder(TurnEnded(1, TurnTrace(1, ended="barge-in")))
        recorder(Heard(2, "stop"))
        recorder(TurnEnded(2, TurnTrace(2, ended="complete")))
    words = (recorder.folder / TRANSCRIPT).read_text()
    assert "says** Once upon  ~~a time.~~ *(interrupted after 0.6 s)*\n" in words
    assert "**0:02 heard** stop\n" in words


def test_a_killed_session_loses_less_than_a_second_and_the_next_one_finishes_it(
    tmp_path: Path,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin and child.stdout
    told = 0
    for _ in range(100):
        told = int(child.stdout.readline())
        child.stdin.write("\n")
        child.stdin.flush()
    assert recover(tmp_path, print) == []  # it is still alive
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    (journal,) = tmp_path.glob(f"*/{JOURNAL}")
    stereo, rate = soundfile.read(journal)
    assert rate == SAMPLE_RATE and told - len(stereo) <= SAMPLE_RATE
    np.testing.assert_allclose(stereo[:, 0], -stereo[:, 1], atol=1e-4)
    assert "these words" in journal.with_name(TRANSCRIPT).read_text()

    tell: list[str] = []
    session(tmp_path, tell).close()
    recording = journal.with_name(AUDIO)
    assert soundfile.info(recording).frames == len(stereo) and not journal.exists()
    assert tell == [f"{recording}: finished; its session had ended without doing so"]


def test_a_frame_cut_in_half_costs_that_frame(tmp_path: Path) -> None:
    tmp_path.joinpath("s").mkdir()
    journal = tmp_path / "s" / JOURNAL
    soundfile.write(journal, np.zeros((100, 2)), SAMPLE_RATE, "PCM_16", format="AU")
    journal.write_bytes(journal.read_bytes()[:-1])
    (recording,) = recover(tmp_path, print)
    assert soundfile.info(recording).frames == 99


def test_two_sessions_at_once_have_a_folder_each(tmp_path: Path) -> None:
    with session(tmp_path, []) as one, session(tmp_path, []) as two:
        sound(one, 30)
        sound(two, 60)
    assert one.folder != two.folder
    assert [soundfile.info(s.folder / AUDIO).frames for s in (one, two)] == [4800, 9600]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be kept there .*--save"):
        session(tmp_path / "file", [])


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps folders with open files")
def test_a_folder_that_vanishes_is_told_once_and_the_session_goes_on(tmp_path: Path) -> None:
    tell: list[str] = []
    recorder = session(tmp_path / "kept", tell)
    shutil.rmtree(tmp_path / "kept")
    sound(recorder, 500)
    recorder(Heard(1, "hello"))
    recorder.close()
    recorder.close()
    sound(recorder, 1)
    assert len(tell) == 1 and "it is gone" in tell[0] and "the conversation goes on" in tell[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell: list[str] = []
    recorder = session(tmp_path, tell)
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        monkeypatch.setitem(recorder._files._files, "turns", full)
        sound(recorder, 100)
        recorder(TurnEnded(1, TurnTrace(1)))
        recorder(TurnEnded(2, TurnTrace(2)))
        recorder.close()
    assert len(tell) == 1 and "No space left" in tell[0]
    assert soundfile.info(recorder.folder / AUDIO).frames == 100 * BLOCK


def test_sound_that_the_disk_was_too_slow_for_becomes_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    tell: list[str] = []
    recorder = session(tmp_path, tell)
    gate, write = threading.Event(), recorder._files.write

    def stuck(item: object) -> None:
        gate.wait()
        write(item)  # type: ignore[arg-type]

    monkeypatch.setattr(recorder._files, "write", stuck)
    sound(recorder, 25 * 80)  # 80 writes; 64 wait and one or two are with the thread
    assert recorder.dropped and len(tell) == 1 and "too slow" in tell[0]
    gate.set()
    recorder._todo.join()
    sound(recorder, 25)
    recorder.close()
    stereo, _ = soundfile.read(recorder.folder / AUDIO)
    assert len(stereo) == 25 * 81 * BLOCK
    assert np.count_nonzero(stereo[:, 0] == 0) == recorder.dropped
    assert len(tell) == 2 and "silent there" in tell[1]


def test_unequal_blocks_are_refused(tmp_path: Path) -> None:
    with session(tmp_path, []) as recorder, pytest.raises(ValueError, match="equal"):
        recorder.audio(np.zeros(160, np.float32), np.zeros(80, np.float32))
