"""More requests than were recorded: every sentence of the grammar, composed of spoken words.

The recordings say a few thousand requests; a model of words learns those by heart and then hears
them everywhere. The grammar knows many more (the *training* phrasings with other slot values and
courtesies; held-out phrasings stay out), and the recordings have their words, whose units are put
together in one voice as far as it goes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from recipes import domain
from recipes.lm_corpus import Recording

Between = Callable[[Recording, int, int], tuple[int, int]]
Occurrence = tuple[Recording, int]  # and the number of the word
Span = tuple[Recording, int, int]  # and its first and last but one token

READINGS = 60.0  # requests drawn for each filling of an intent's slots
MOST_OF_ONE_INTENT = 300


@cache
def more_requests(
    seed: int = 0, grammar: Path = domain.GRAMMAR, more: Path | None = domain.MORE
) -> dict[str, domain.Request]:
    """Requests of the training phrasings and of those in ``more``, by transcript.

    The same seed splits the phrasings as the corpus does; nothing of its held-out part is here.
    """
    tables, intents = domain.parse_grammar(grammar.read_text(encoding="utf-8"))
    vocabulary = domain.common_words(intents)
    further = domain.parse_more(more.read_text(encoding="utf-8")) if more else {}
    heldout = {r.transcript for r in domain.build(seed, grammar).requests if r.split == "heldout"}
    heldout |= domain.heldout_transcripts(intents, tables, seed)
    found: dict[str, domain.Request] = {}
    for intent in intents:
        wanted = replace(intent, train=max(intent.train, READINGS), held=0)
        for drawn in (
            domain.expand(wanted, tables, vocabulary, seed),
            domain.expand_more(wanted, further.get(intent.name, ()), tables, seed),
        ):
            kept = [r for r in drawn if r.split == "train" and r.transcript not in heldout]
            random.Random(f"{seed} {intent.name}").shuffle(kept)
            # Intents with many slot fillings must not drown the others.
            for request in kept[:MOST_OF_ONE_INTENT]:
                found.setdefault(request.transcript, request)
    return found


class WordBank:
    """Occurrences of every word, by voice."""

    def __init__(self, recordings: Iterable[Recording], between: Between) -> None:
        self._between = between
        self._words: dict[str, dict[str, list[Occurrence]]] = defaultdict(dict)
        for recording in recordings:
            for i, (word, _, _) in enumerate(recording.words or ()):
                voices = self._words[domain.transcript(word)]
                voices.setdefault(recording.voice, []).append((recording, i))
        self.voices = sorted({v for voices in self._words.values() for v in voices})

    def knows(self, transcript: str) -> bool:
        """Whether every word of ``transcript`` was recorded."""
        return all(word in self._words for word in transcript.split())

    def speak(
        self, rng: np.random.Generator, transcript: str, change: Callable[[Recording], Recording]
    ) -> list[Span]:
        """``transcript`` in one voice, as far as that voice has the words.

        Neighbours in one recording stay together, with their natural joint; ``change`` is applied
        to the recordings that words are taken from.
        """
        words = transcript.split()
        voice = self.voices[rng.integers(len(self.voices))]
        spans: list[Span] = []
        i = 0
        while i < len(words):
            voices = self._words[words[i]]
            found = voices.get(voice) or [o for several in voices.values() for o in several]
            recording, at = found[rng.integers(len(found))]
            spoken = [domain.transcript(w) for w, _, _ in recording.words or ()]
            size = 1
            while words[i : i + size + 1] == spoken[at : at + size + 1] and i + size < len(words):
                size += 1
            changed = change(recording)
            first, last = self._between(changed, at, at + size)
            spans.append((changed, first, last))
            i += size
        return spans
