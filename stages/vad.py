"""Where speech begins and ends in a stream of audio.

Every frame gets a vote: WebRTC's detector says voiced, and its level is over an energy floor. A
window of votes decides, with two thresholds so that it does not flutter; what it decides is dated
back to the frames that caused it. All positions are on the sample clock (samples at 16 kHz since
:meth:`VoiceActivityDetector.reset`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from stages import SAMPLE_RATE

Wave: TypeAlias = NDArray[np.float32]

_SAMPLES_PER_MS = SAMPLE_RATE // 1000
_FRAME_LENGTHS_MS = (10, 20, 30)


@dataclass(frozen=True)
class VadSettings:
    """How :class:`VoiceActivityDetector` decides.

    Attributes:
        aggressiveness: of WebRTC's detector, 0 (calls most things speech) to 3 (fewest).
        frame_ms: length of one vote, 10, 20 or 30 ms.
        window_ms: how many of the last milliseconds are looked at together.
        on_share: speech begins when at least this share of the window is voiced.
        off_share: silence begins when less than this share of the window is voiced.
        pre_roll_ms: audio kept from before the first voiced frame, lest a consonant be lost.
        min_speech_ms: voiced audio needed for an utterance; a shorter burst is none.
        hangover_ms: silence after which the utterance is over.
        trailing_ms: how much of that silence still goes out as audio; at most ``hangover_ms``.
        max_utterance_ms: an utterance is closed at this length, speech or not.
        energy_floor_dbfs: frames below this level (RMS without DC, a full-scale square wave being
            0 dBFS) are never voiced.
    """

    aggressiveness: int = 2
    frame_ms: int = 20
    window_ms: int = 160
    on_share: float = 0.6
    off_share: float = 0.3
    pre_roll_ms: int = 300
    min_speech_ms: int = 160
    hangover_ms: int = 600
    trailing_ms: int = 200
    max_utterance_ms: int = 30_000
    energy_floor_dbfs: float = -55.0

    def __post_init__(self) -> None:
        if self.frame_ms not in _FRAME_LENGTHS_MS:
            raise ValueError(f"frame_ms is {self.frame_ms}, expected 10, 20 or 30")
        if not 0 <= self.aggressiveness <= 3:
            raise ValueError(f"aggressiveness is {self.aggressiveness}, expected 0 to 3")
        if not 0 < self.off_share <= self.on_share <= 1:
            raise ValueError(
                f"off_share is {self.off_share} and on_share {self.on_share}, "
                "expected 0 < off_share <= on_share <= 1"
            )
        if self.window_ms < self.frame_ms:
            raise ValueError(f"window_ms is {self.window_ms}, expected at least one frame")
        if not 0 <= self.trailing_ms <= self.hangover_ms:
            raise ValueError(f"trailing_ms is {self.trailing_ms}, expected 0 to hangover_ms")
        if min(self.pre_roll_ms, self.min_speech_ms) < 0:
            raise ValueError("pre_roll_ms and min_speech_ms are expected to be 0 or more")
        if self.max_utterance_ms < self.pre_roll_ms + self.min_speech_ms + self.window_ms:
            raise ValueError(
                f"max_utterance_ms is {self.max_utterance_ms}, expected at least pre_roll_ms + "
                "min_speech_ms + window_ms"
            )


@dataclass(frozen=True)
class SpeechStarted:
    """An utterance begins at ``sample``, pre-roll included; its audio follows."""

    sample: int


@dataclass(frozen=True, eq=False)
class SpeechAudio:
    """``samples`` of the utterance (float32), the first of them at ``first_sample``; gapless."""

    samples: Wave
    first_sample: int


@dataclass(frozen=True)
class SilenceStarted:
    """Speech seems to have ended at ``sample``; the hangover is running.

    It comes when all the audio has gone out that the utterance would have if it were over: what
    is made of it now is what would be made of it at the endpoint.
    """

    sample: int


@dataclass(frozen=True)
class SpeechResumed:
    """It had not: speech goes on at ``sample``. What was withheld since follows as audio."""

    sample: int


@dataclass(frozen=True)
class SpeechEnded:
    """The utterance is over.

    Attributes:
        end_of_speech: one past its last voiced sample.
        endpoint: the sample at which that was decided: the hangover had passed, the utterance
            had reached its greatest length, or the input had ended.
    """

    end_of_speech: int
    endpoint: int


VadEvent: TypeAlias = SpeechStarted | SpeechAudio | SilenceStarted | SpeechResumed | SpeechEnded


class _State(Enum):
    IDLE = "no speech"
    CANDIDATE = "perhaps speech, not long enough yet"
    SPEECH = "speech"
    FADING = "silence, but its first part is still audio of the utterance"
    SILENCE = "hangover"


class VoiceActivityDetector:
    """Cuts a stream into utterances. A :class:`stages.Stage` from waves to :data:`VadEvent`.

    The audio of an utterance is ``[start, min(end_of_speech + trailing, endpoint))``, without gap
    or overlap, and goes out as early as that allows. Events come frame by frame, so that they are
    the same for every chunking of the input.
    """

    _state: _State
    _votes: deque[bool]
    _voiced: int
    _onset: int
    _start: int
    _speech_end: int

    def __init__(self, settings: VadSettings | None = None) -> None:
        self.settings = settings or VadSettings()
        s = self.settings
        self._frame = s.frame_ms * _SAMPLES_PER_MS
        self._window = max(1, round(s.window_ms / s.frame_ms))
        self._pre_roll = s.pre_roll_ms * _SAMPLES_PER_MS
        self._min_speech = s.min_speech_ms * _SAMPLES_PER_MS
        self._hangover = 0
        self.hangover = s.hangover_ms * _SAMPLES_PER_MS
        self._trailing = s.trailing_ms * _SAMPLES_PER_MS
        self._max_utterance = s.max_utterance_ms * _SAMPLES_PER_MS
        self._floor = 10 ** (s.energy_floor_dbfs / 20)
        self.reset()

    @property
    def in_utterance(self) -> bool:
        """Whether an utterance is open."""
        return self._state in (_State.SPEECH, _State.FADING, _State.SILENCE)

    @property
    def hangover(self) -> int:
        """Samples of silence that end an utterance; may be changed at any time.

        It is never less than what of the silence is audio (``trailing_ms``).
        """
        return self._hangover

    @hangover.setter
    def hangover(self, samples: int) -> None:
        self._hangover = max(samples, self.settings.trailing_ms * _SAMPLES_PER_MS)

    def drop(self) -> None:
        """Forget an open utterance, of which nothing more comes; the sample clock goes on."""
        self._emitted = self._now
        self._listen_again()

    def reset(self) -> None:
        """Forget everything; the sample clock starts again at 0."""
        self._webrtc = webrtcvad.Vad(self.settings.aggressiveness)
        self._pending = np.zeros(0, np.float32)
        self._history = np.zeros(0, np.float32)
        self._now = 0  # samples judged so far: the end of the history
        self._emitted = 0  # audio before this sample has gone out or never will
        self._listen_again()

    def push(self, item: Wave) -> list[VadEvent]:
        """Take a wave of any length; return the events decided by its complete frames."""
        self._pending = np.concatenate((self._pending, np.asarray(item, np.float32)))
        events: list[VadEvent] = []
        whole = len(self._pending) // self._frame * self._frame
        for begin in range(0, whole, self._frame):
            events.extend(self._take(self._pending[begin : begin + self._frame]))
        self._pending = self._pending[whole:].copy()
        return events

    def flush(self) -> list[VadEvent]:
        """The input has ended: close an open utterance. :meth:`reset` before going on."""
        self._append(self._pending)
        self._pending = self._pending[:0]
        return list(self._end()) if self.in_utterance else []

    def _take(self, frame: Wave) -> Iterator[VadEvent]:
        voiced = self._is_voiced(frame)
        self._append(frame)
        self._votes.append(voiced)
        share = sum(self._votes) / self._window
        if self._state is _State.IDLE and share >= self.settings.on_share:
            self._onset = self._first_vote()
            self._state = _State.CANDIDATE
        if self._state is _State.CANDIDATE:
            yield from self._weigh_candidate(voiced, share)
        elif self._state is _State.SPEECH:
            yield from self._follow_speech(voiced, share)
        elif self.in_utterance:
            yield from self._wait(share)
        if self.in_utterance and self._now - self._start >= self._max_utterance:
            yield from self._end()
        self._forget()

    def _weigh_candidate(self, voiced: bool, share: float) -> Iterator[VadEvent]:
        self._voiced = self._voiced + voiced * self._frame if self._voiced else self._voted()
        if share < self.settings.off_share:
            self._listen_again()
        elif self._voiced >= self._min_speech:
            self._state = _State.SPEECH
            self._start = max(self._onset - self._pre_roll, self._emitted)
            self._emitted = self._start
            self._speech_end = self._last_vote()
            yield SpeechStarted(self._start)
            yield from self._emit()

    def _follow_speech(self, voiced: bool, share: float) -> Iterator[VadEvent]:
        if voiced:
            self._speech_end = self._now
        yield from self._emit()
        if share < self.settings.off_share:
            self._state = _State.FADING
            yield from self._fade()

    def _wait(self, share: float) -> Iterator[VadEvent]:
        if share >= self.settings.on_share:
            withheld, self._state = self._state is _State.SILENCE, _State.SPEECH
            resumed = max(self._first_vote(), self._speech_end)
            self._speech_end = self._last_vote()
            if withheld:
                yield SpeechResumed(resumed)
        yield from self._emit()
        yield from self._fade()
        if self._state is _State.SILENCE and self._now - self._speech_end >= self._hangover:
            yield from self._end()

    def _fade(self) -> Iterator[VadEvent]:
        if self._state is _State.FADING and self._now - self._speech_end >= self._trailing:
            self._state = _State.SILENCE
            yield SilenceStarted(self._speech_end)

    def _end(self) -> Iterator[VadEvent]:
        yield from self._emit()
        yield SpeechEnded(self._speech_end, self._now)
        self._listen_again()

    def _emit(self) -> Iterator[VadEvent]:
        """Let go of audio up to now, but not of silence past ``trailing_ms``."""
        until = min(self._now, self._speech_end + self._trailing)
        if until > self._emitted:
            oldest = self._now - len(self._history)
            samples = self._history[self._emitted - oldest : until - oldest].copy()
            yield SpeechAudio(samples, self._emitted)
            self._emitted = until

    def _listen_again(self) -> None:
        self._state = _State.IDLE
        self._votes = deque([False] * self._window, maxlen=self._window)
        self._voiced = 0  # voiced samples of the candidate
        self._onset = 0
        self._start = 0
        self._speech_end = 0

    def _append(self, samples: Wave) -> None:
        self._history = np.concatenate((self._history, samples))
        self._now += len(samples)

    def _forget(self) -> None:
        """Drop history that no decision to come can ask for."""
        if self.in_utterance:
            needed = self._emitted
        elif self._state is _State.CANDIDATE:
            needed = self._onset - self._pre_roll
        else:
            needed = self._now - self._window * self._frame - self._pre_roll
        surplus = len(self._history) - (self._now - needed)
        if surplus > 0:
            self._history = self._history[surplus:]

    def _is_voiced(self, frame: Wave) -> bool:
        # WebRTC's detector sees every frame, loud or not: its noise estimate lives from them.
        pcm = np.clip(np.rint(frame * 32768.0), -32768, 32767).astype("<i2")
        speech = self._webrtc.is_speech(pcm.tobytes(), SAMPLE_RATE)
        return bool(speech) and float(np.std(frame, dtype=np.float64)) >= self._floor

    def _voted(self) -> int:
        return sum(self._votes) * self._frame

    def _first_vote(self) -> int:
        """Where the first voiced frame of the window begins."""
        return self._now - (self._window - list(self._votes).index(True)) * self._frame

    def _last_vote(self) -> int:
        """Where the last voiced frame of the window ends."""
        return self._now - list(reversed(self._votes)).index(True) * self._frame
