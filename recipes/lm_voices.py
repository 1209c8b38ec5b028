"""More speakers than were recorded: phones exchanged between recordings, in units.

The aligned phones say which phonetic units belong to which phone. Replacing those of one phone by
those of another occurrence, said by anybody anywhere, gives new speech that says the same:
the language model learns what the units of a phone have in common, not how a few voices say a few
sentences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from recipes.lm_corpus import Recording, Vocabulary, tokens

MOST = 1.0  # highest share of the phones of a recording that are exchanged


class PhoneBank:
    """Occurrences of every phone as runs of phonetic units (25 Hz)."""

    def __init__(self, recordings: Iterable[Recording], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._runs: dict[str, list[np.ndarray]] = defaultdict(list)
        for recording in recordings:
            for phone, start, stop in recording.phones:
                if stop > start:
                    self._runs[phone].append(recording.frames[start:stop])

    def revoice(self, rng: np.random.Generator, recording: Recording) -> Recording:
        """``recording`` with a random share of its phones said by others; times stay."""
        share = rng.uniform(0, MOST)
        frames = recording.frames.copy()
        for phone, start, stop in recording.phones:
            if stop <= start or rng.random() >= share:
                continue
            runs = self._runs.get(phone)
            if runs:
                run = runs[rng.integers(len(runs))]
                stretched = (np.arange(stop - start) + 0.5) * len(run) / (stop - start)
                frames[start:stop] = run[stretched.astype(int)]
        ids, starts = tokens(frames.tolist(), recording.pitch, recording.styles, self.vocabulary)
        return replace(recording, frames=frames, ids=ids, starts=starts)
