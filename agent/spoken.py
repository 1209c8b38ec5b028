"""Which words of a planned reply have been spoken at a heard position.

The units of a reply are dated exactly (:class:`stages.vocoder_stream.UnitSpan`); its words are not:
the model plans them as text and speaks them without saying where each begins. They are placed in
proportion to their length in letters, which is within a word or so of the truth.
"""

from __future__ import annotations

import re

from stages import SAMPLE_RATE

_LETTERS_PER_SECOND = 14.0  # of read English, about 170 words a minute of five letters and a space
_WORD = re.compile(r"\s*\S+\s*")


class SpokenWords:
    """The text of one reply, told as it is planned, against its sound, told as it is made."""

    def __init__(self) -> None:
        self.text = ""
        self._samples = 0
        self._whole = False

    def plan(self, text: str) -> None:
        """More of the reply's text."""
        self.text += text

    def sound(self, end: int, whole: bool = False) -> None:
        """The reply's sound reaches to sample ``end`` by now; with ``whole`` that is all of it."""
        self._samples = max(self._samples, end)
        self._whole = self._whole or whole

    def characters(self, heard: int) -> int:
        """How many characters have been spoken after ``heard`` samples; whole words only.

        A word counts when more than half of its time has passed.
        """
        length = self._length()
        if not length or heard <= 0:
            return 0
        passed = min(1.0, heard / length) * len(self.text.rstrip())
        end = 0
        for word in _WORD.finditer(self.text):
            if (word.start() + len(word.group().rstrip()) / 2) >= passed:
                break
            end = word.end()
        return end

    def _length(self) -> int:
        """Samples of the whole reply, estimated while it is being made."""
        if self._whole:
            return self._samples
        read = round(len(self.text) / _LETTERS_PER_SECOND * SAMPLE_RATE)
        return max(self._samples, read)
