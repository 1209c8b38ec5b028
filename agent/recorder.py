"""What is kept of a session: its sound, its words, the trace of each turn.

::

    DIR/2026-11-21_09-07-14/
        about.json        what was said with: models, machine, settings
        transcript.md     who said what when; written word by word
        turns.jsonl       the trace of each turn, one JSON object a line
        recording.flac    16 kHz stereo: left the microphone, right the loudspeaker
        recording.au      the same while the session goes on

A FLAC file that nobody closed cannot be trusted, so the sound is first kept as an AU file of 16-bit
samples: its header says "until the end of the file", so it is a whole and playable recording after
every write, however it ends. Closing the session turns it into FLAC, and so does the next session
in the same folder, for one that was killed. Nothing is synced: what the program wrote survives its
own death, not that of the machine.
"""

from __future__ import annotations

import contextlib
import json
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from agent.errors import UserError
from agent.events import (
    ActionChosen,
    DeviceChanged,
    Event,
    Heard,
    Level,
    ReplyAudio,
    ReplyText,
    RequestUnits,
    Spoken,
    StateChanged,
    TurnEnded,
    TurnStarted,
)
from agent.show import printable
from agent.telemetry import TurnTrace
from stages import SAMPLE_RATE

AUDIO, JOURNAL, TRANSCRIPT, TURNS = "recording.flac", "recording.au", "transcript.md", "turns.jsonl"

_WRITE_EVERY = SAMPLE_RATE // 4  # samples gathered before they are written
_QUEUE = 64  # writes that may wait for the disk: some 15 s of sound
_FRAME = 4  # bytes: two channels of 16 bits
# ".snd", offset of the data, unknown length, 16-bit linear PCM, rate, channels; all big-endian.
_AU_HEADER = struct.pack(">4s5I", b".snd", 24, 0xFFFFFFFF, 3, SAMPLE_RATE, 2)


class Recorder:
    """Keeps one session in a folder of its own under ``folder``; ``with Recorder(...) as r``.

    All writing happens in a thread of its own behind a bounded queue. When the disk cannot keep up,
    the newest sound is dropped and becomes silence, so that all else stays where it was; when it
    cannot be written at all, the recording ends and the session does not.

    Args:
        folder: created if it is missing.
        about: what ``about.json`` is to say.
        tell: called with a sentence for the user, once for each thing that went wrong; only from
            within the constructor, :meth:`audio`, a call with an event, or :meth:`close`.

    Attributes:
        folder: the session's own.
        dropped: samples that became silence because the disk was too slow.

    Raises:
        UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.dropped = 0
        started = datetime.now()
        folder = folder.expanduser()
        try:
            recover(folder, tell)
            self.folder = _new_folder(folder, started)
            self._files = _Files(self.folder)
            head = {"started": started.isoformat(timespec="seconds"), **about}
            text = json.dumps(head, indent=2, ensure_ascii=False, default=str) + "\n"
            (self.folder / "about.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{folder}: a session cannot be kept there ({error.strerror}); give --save a "
                "folder that can be written"
            ) from None
        self._samples = self._missing = 0
        self._blocks: list[np.ndarray] = []
        self._words = _Words()
        self._complaints: set[str] = set()
        self._todo: queue.Queue[_Write | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name="spirit-save", daemon=True)
        self._closed = False
        self._thread.start()
        self._put(_Write("transcript", f"# Conversation of {started:%Y-%m-%d %H:%M}\n".encode()))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def audio(self, raw: np.ndarray, played: np.ndarray) -> None:
        """Keep what the microphone heard and what the loudspeaker played at the same time.

        Args:
            raw, played: float32 mono at 16 kHz, equally long; beyond [-1, 1] they are clipped.
        """
        if raw.shape != played.shape or raw.ndim != 1:
            raise ValueError(f"blocks of {raw.shape} and {played.shape}, expected two equal [n]")
        if self._closed:
            return
        stereo = np.nan_to_num(np.stack((raw, played), axis=1))
        self._blocks.append((np.clip(stereo, -1.0, 1.0) * 32767).astype(">i2"))
        self._samples += len(raw)
        if sum(map(len, self._blocks)) >= _WRITE_EVERY:
            self._pass_on()

    def __call__(self, event: Event) -> None:
        """Keep what ``event`` tells: words for the transcript, the trace of a turn."""
        if self._closed:
            return
        text = self._words.add(event, self._samples)
        if text:
            self._put(_Write("transcript", text.encode()))
        if isinstance(event, TurnEnded):
            line = {**event.trace.as_dict(), "speech_samples": list(event.trace.speech)}
            text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
            self._put(_Write("turns", text.encode()))

    def close(self) -> None:
        """Write what is left and turn the recording into FLAC. More than once does no harm."""
        if self._closed:
            return
        self._pass_on()
        self._closed = True
        self._todo.put(None)
        self._thread.join()
        if self.dropped:
            seconds = self.dropped / SAMPLE_RATE
            self._tell(f"{self.folder}: {seconds:.1f} s of the recording are missing, silent there")
        self._report()

    def _pass_on(self) -> None:
        sound = b"".join(block.tobytes() for block in self._blocks)
        samples = len(sound) // _FRAME
        self._blocks.clear()
        if not sound:
            self._report()
        elif self._put(_Write("audio", sound, self._missing)):
            self._missing = 0
        else:
            self._missing += samples
            self.dropped += samples

    def _put(self, write: _Write) -> bool:
        self._report()
        try:
            self._todo.put_nowait(write)
        except queue.Full:
            self._complain(f"{self.folder}: the disk is too slow, the recording gets gaps")
            return False
        return True

    def _report(self) -> None:
        """Tell what went wrong in the thread since."""
        if self._files.failure:
            self._complain(self._files.failure)

    def _complain(self, sentence: str) -> None:
        if sentence not in self._complaints:
            self._complaints.add(sentence)
            self._tell(sentence)

    def _work(self) -> None:
        while (write := self._todo.get()) is not None:
            self._files.write(write)
            self._todo.task_done()
        self._files.close()


def recover(folder: Path, tell: Callable[[str], None]) -> list[Path]:
    """Finish the recordings under ``folder`` whose sessions were killed.

    Those of sessions that are still going on are left alone. ``tell`` is told of each recording,
    finished or not.

    Returns:
        the recordings that were finished.
    """
    done = []
    for journal in sorted(folder.glob(f"*/{JOURNAL}")):
        try:
            with journal.open("rb") as file:
                if not _lock(file):
                    continue
                recording = _finish(journal)
        except (OSError, soundfile.LibsndfileError) as error:
            tell(f"{journal}: stays as it is, playable, but not turned into FLAC ({error})")
            continue
        if recording:
            tell(f"{recording}: finished; its session had ended without doing so")
            done.append(recording)
    return done


@dataclass(frozen=True)
class _Write:
    """Bytes for one of the files; before sound, as many samples of silence as were dropped."""

    kind: str
    data: bytes
    silence: int = 0


class _Files:
    """The files of a session; used by one thread.

    Attributes:
        failure: why writing has ended, a sentence for the user; empty while all is well.
    """

    def __init__(self, folder: Path) -> None:
        self.failure = ""
        self._journal = folder / JOURNAL
        paths = {"audio": self._journal, "transcript": folder / TRANSCRIPT, "turns": folder / TURNS}
        # Unbuffered: what is only in our memory dies with us.
        self._files = {kind: path.open("xb", buffering=0) for kind, path in paths.items()}
        _lock(self._files["audio"])
        _write_all(self._files["audio"], _AU_HEADER)

    def write(self, write: _Write) -> None:
        """Append, unless an earlier write failed."""
        if self.failure:
            return
        try:
            # The files of a folder that was deleted can be written for ever, for nobody.
            if not self._journal.exists():
                raise FileNotFoundError(None, "it is gone")
            silence = bytes(write.silence * _FRAME)
            _write_all(self._files[write.kind], silence + write.data)
        except OSError as error:
            self._fail("cannot be written", error)

    def close(self) -> None:
        """Turn the journal into FLAC; where that fails, it stays."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # it was flushed: nothing of ours can fail here
                file.close()
        if not self._journal.exists():
            return
        try:
            _finish(self._journal)
        except (OSError, soundfile.LibsndfileError) as error:
            if not self.failure:
                self._fail(f"stays as {JOURNAL}, since {AUDIO} cannot be written", error)

    def _fail(self, what: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        self.failure = (
            f"{self._journal.parent}: {what} ({reason}); the conversation goes on, and nothing "
            "more of it is kept"
        )


@dataclass
class _Turn:
    """What is known of one turn: its words, and whether the transcript has them already."""

    started: int = 0
    heard: str = ""
    does: str = ""
    planned: str = ""
    spoken: str = ""
    opened: bool = False
    interrupted: str = ""

    def open(self, position: int) -> str:
        """The request's line and the beginning of the reply's, once."""
        if self.opened:
            return ""
        self.opened = True
        heard = _escaped(self.heard).strip() or "(no words)"
        does = f"\n\n**{_time(position)} does** {_escaped(self.does)}" if self.does else ""
        return f"\n**{_time(self.started)} heard** {heard}{does}\n\n**{_time(position)} says** "


class _Words:
    """The transcript in Markdown, made of events; times are places in the recording."""

    def __init__(self) -> None:
        # More than one where the speech that interrupts is told before the end of what it broke.
        self._turns: dict[int, _Turn] = {}

    def add(self, event: Event, position: int) -> str:
        """What ``event`` adds to the transcript, when ``position`` samples were recorded."""
        if isinstance(event, DeviceChanged):
            return f"\n*{_time(position)} {_escaped(event.message)}*\n"
        if isinstance(event, TurnEnded):
            return self._end(event.trace, position)
        if isinstance(event, StateChanged | Level | ReplyAudio):
            return ""
        turn = self._turns.setdefault(event.turn, _Turn())
        if isinstance(event, TurnStarted):
            turn.started = event.sample
        elif isinstance(event, RequestUnits):
            turn.heard = turn.planned = turn.does = ""  # they went on: the reply was taken back
        elif isinstance(event, Heard):
            turn.heard, turn.planned = event.text, ""
        elif isinstance(event, ActionChosen):
            turn.does = event.text
        elif isinstance(event, ReplyText):
            turn.planned += event.text
        elif isinstance(event, Spoken):
            fresh = event.text if turn.spoken else event.text.lstrip()
            turn.spoken += event.text
            return turn.open(position) + _escaped(fresh)
        else:
            turn.interrupted = f"interrupted after {event.heard / SAMPLE_RATE:.1f} s"
        return ""

    def _end(self, trace: TurnTrace, position: int) -> str:
        turn = self._turns.pop(trace.turn, _Turn(trace.speech[0]))
        turn.heard = turn.heard or trace.heard
        opened, text = turn.opened, turn.open(position)
        if turn.interrupted:
            unheard = _escaped(turn.planned[len(turn.spoken) :]).strip()
            return text + (f" ~~{unheard}~~" if unheard else "") + f" *({turn.interrupted})*\n"
        if not opened:
            without = "(speech without words)" if trace.reply_samples else "(nothing)"
            text += _escaped(trace.said).strip() or without
        if trace.ended not in ("complete", "long enough", ""):
            text += f" *({_escaped(trace.ended)})*"
        return text + "\n"


def _new_folder(folder: Path, started: datetime) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in _suffixes():
        path = folder / f"{started:%Y-%m-%d_%H-%M-%S}{suffix}"
        try:
            path.mkdir(mode=0o700)  # what people say is nobody else's business
        except FileExistsError:
            continue
        return path
    raise AssertionError("never runs out of suffixes")


def _suffixes() -> Iterator[str]:
    yield ""
    number = 2
    while True:
        yield f"-{number}"
        number += 1


def _finish(journal: Path) -> Path | None:
    """Turn a journal into FLAC and remove it; nothing if it holds no sound."""
    recording = journal.with_name(AUDIO)
    part = journal.with_name(AUDIO + ".part")
    if journal.stat().st_size < len(_AU_HEADER) + _FRAME:
        journal.unlink()
        return None
    try:
        with (
            soundfile.SoundFile(journal) as source,
            soundfile.SoundFile(part, "w", SAMPLE_RATE, 2, "PCM_16", format="FLAC") as sink,
        ):
            for block in source.blocks(SAMPLE_RATE, dtype="int16"):
                sink.write(block)
            length = source.frames
        if soundfile.info(part).frames != length:  # a full disk, seen only on closing
            raise OSError(None, "not all of it was written")
        part.replace(recording)
    finally:
        part.unlink(missing_ok=True)
    journal.unlink()
    return recording


def _lock(file: BinaryIO | Any) -> bool:
    """Claim a journal; false if a session that is alive has it. It ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows: a file that is open cannot be removed, which will do
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_all(file: Any, data: bytes) -> None:
    """An unbuffered file may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _time(samples: int) -> str:
    minutes, seconds = divmod(samples // SAMPLE_RATE, 60)
    return f"{minutes}:{seconds:02}"


def _escaped(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join("\\" + c if c in "\\`*_~<[#" else c for c in printable(text))
