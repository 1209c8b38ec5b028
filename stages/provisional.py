"""What the units probably are, while the utterance still goes on.

A :class:`Listener` hears one piece of at most 100 s and names units in chunks, each computed from a
bounded stretch of sound, so that the cost of a second of speech does not grow with the utterance.
Only the phonetic units of a network with a window are exact; pitch is measured against the mean so
far, and style is judged from the last few seconds.
"""

from __future__ import annotations

import numpy as np

from stages import SAMPLE_RATE
from stages.phonetic import PhoneticEncoder, Window
from stages.pitch import PitchEncoder
from stages.style import StyleEncoder
from stages.units import Units

LISTENING = Window(chunk=12, left=60, right=8)
"""How a network made for whole utterances is listened with meanwhile, in unit frames of 40 ms.

From ``python -m bench.agreement`` (nano's network, which was not made for whole utterances, against
listening to them): 83 % of frames agree, half the left context costs six points, half the
look-ahead five; twice the chunk gains four and makes a frame wait half a second longer.
"""

PITCH = Window(chunk=12, left=12, right=4)
"""The same for pitch, in pitch units of 80 ms.

The best of those measured, and poor: 48 % agree, for the mean F0 so far is not that of the whole.
Were that known, 94 % would.
"""

STYLE_PAST = 3
"""Seconds of sound that a style is judged from: 91 % agree, no more with five, 82 % with two."""


class Sound:
    """Samples that grow at the end; slices are views."""

    def __init__(self) -> None:
        self._samples = np.empty(4 * SAMPLE_RATE, np.float32)
        self.length = 0

    def append(self, wave: np.ndarray) -> None:
        end = self.length + len(wave)
        if end > len(self._samples):
            larger = np.empty(max(end, 2 * len(self._samples)), np.float32)
            larger[: self.length] = self._samples[: self.length]
            self._samples = larger
        self._samples[self.length : end] = wave
        self.length = end

    def between(self, start: int, stop: int) -> np.ndarray:
        """Samples ``[start, stop)``, as far as there are any."""
        return self._samples[start : min(stop, self.length)]

    def all(self) -> np.ndarray:
        return self.between(0, self.length)


class PitchListener:
    """Names the pitch units of a growing piece of sound, against the mean F0 so far.

    ``mean``: in Hz, to measure against instead.
    """

    def __init__(
        self, pitch: PitchEncoder, window: Window = PITCH, mean: float | None = None
    ) -> None:
        self._pitch, self._window, self._mean = pitch, window, mean
        self._named = 0
        self._sum, self._count = 0.0, 0  # of F0 over the voiced frames so far

    def listen(self, sound: Sound) -> list[int]:
        """The units that are new."""
        pitch, hop = self._pitch, self._pitch.code_hop
        total = sound.length // hop
        new: list[int] = []
        for first, end in self._window.spans(self._named, self._window.ready(total)):
            low, high = self._window.seen(first, total)
            f0, vuv = pitch.f0(sound.between(low * hop, high * hop), allow_unvoiced=True)
            frames = slice((first - low) * hop // pitch.hop, (end - low) * hop // pitch.hop)
            voiced = vuv[frames] > 0
            self._sum += float(f0[frames][voiced].sum())
            self._count += int(voiced.sum())
            mean = self._sum / self._count if self._count else None
            codes = pitch.codes_of(pitch.remove_mean(f0, vuv, self._mean or mean))
            new += codes[first - low : end - low].tolist()
        self._named += len(new)
        return new


def style_of(style: StyleEncoder, sound: Sound, second: int, past: int = STYLE_PAST) -> int:
    """The style of a complete ``second``, from that many seconds of ``past``, itself included."""
    end = (second + 1) * SAMPLE_RATE
    return int(style.units(sound.between(max(0, end - past * SAMPLE_RATE), end))[-1])


class Listener:
    """Names the units of a growing piece of sound.

    Attributes:
        sound: what has been heard.
        codes: phonetic codes so far, blanks included; exact if the network has a window.
        units: everything named so far.
    """

    def __init__(
        self, phonetic: PhoneticEncoder, pitch: PitchEncoder | None, style: StyleEncoder | None
    ) -> None:
        self._phonetic, self._style = phonetic, style
        self._pitch = PitchListener(pitch) if pitch is not None else None
        self._window = phonetic.window or LISTENING
        self.sound = Sound()
        self.codes = np.zeros(0, np.int64)
        self.units = Units([], [], []) if pitch is not None else Units([])

    @property
    def phonetic_final(self) -> bool:
        """Whether the phonetic units named are what the finished utterance will have.

        A blank at the very beginning takes the last unit of the utterance, which is not known yet.
        """
        return self._phonetic.window is not None and not self._leading_blanks()

    def listen(self, exact_only: bool = False) -> Units:
        """Name what can be named now; returns the units that are new.

        ``exact_only``: do only the work that the exact units will profit from.
        """
        new = Units([], [], []) if self._pitch is not None else Units([])
        if not exact_only or self._phonetic.window is not None:
            self._hear()
        if exact_only:
            return new
        new.hubert = self._without_blanks()
        if self._pitch is not None:
            new.pitch = self._pitch.listen(self.sound)
        if self._style is not None:
            seconds = range(len(self.units.style or ()), self.sound.length // SAMPLE_RATE)
            new.style = [style_of(self._style, self.sound, second) for second in seconds]
        self.units += new
        return new

    def _hear(self) -> None:
        """Add the phonetic codes of the chunks that are complete."""
        hop, start = self._phonetic.hop, len(self.codes)
        total = self._phonetic.frames(self.sound.length)
        ready = self._window.ready(total)
        if ready <= start:
            return
        origin = max(0, start - self._window.left)
        if self._phonetic.window is not None:
            wave = self.sound.between(origin * hop, self.sound.length)
            codes = self._phonetic.window_codes(wave, start, ready, origin=origin, total=total)
            self.codes = np.concatenate([self.codes, codes])
            return
        for first, end in self._window.spans(start, ready):
            low, high = self._window.seen(first, total)
            codes = self._phonetic.raw_codes(self.sound.between(low * hop, (high + 1) * hop))
            self.codes = np.concatenate([self.codes, codes[first - low : end - low]])

    def _leading_blanks(self) -> bool:
        return len(self.codes) > 0 and int(self.codes[0]) == self._phonetic.blank

    def _without_blanks(self) -> list[int]:
        """The phonetic units not named yet: a blank repeats what is before it.

        Blanks at the beginning wait for the first unit and take that one.
        """
        named = self.units.hubert
        new = self.codes[len(named) :]
        known = new[new != self._phonetic.blank]
        if not named and not len(known):
            return []
        last = named[-1] if named else int(known[0])
        out = []
        for code in new.tolist():
            last = last if code == self._phonetic.blank else code
            out.append(last)
        return out
