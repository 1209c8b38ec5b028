"""Has a language model learnt anything? Its loss on held-out turns against guessing.

Guessing knows of which kind the next token is (transcript, words of a reply, its units) and how
often each token is of that kind in training, and nothing of what came before. What is left of the
loss under that is what the model has learnt. A run of seconds can be told by it from one that
failed, where no reply is right yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from recipes.lm_data import KINDS, REPLY_TEXT, REPLY_UNITS, TRANSCRIPT, Streams

JUDGED = (TRANSCRIPT, REPLY_TEXT, REPLY_UNITS)
MIX = {"chat": 0.4, "asr": 0.3, "dialog_text": 0.2, "speech": 0.1}  # of the held-out turns
TRAINED, JUDGED_BY = range(64), range(6)  # batches: of training to count in, held out to judge by
ROWS, LENGTH = 4, 512

Turns = tuple[np.ndarray, np.ndarray]
Losses = Callable[[np.ndarray], np.ndarray]
"""Ids ``[rows, length + 1]`` to the losses of all but the first, ``[rows, length]``, in nats."""


class Gain(NamedTuple):
    """Mean losses over held-out tokens, in nats, of the model and of guessing."""

    loss: float
    chance: float

    @property
    def gain(self) -> float:
        return self.chance - self.loss


def turns(streams: Streams, steps: Iterable[int]) -> Turns:
    """Ids and kinds of some batches, both ``[rows, length + 1]``."""
    batches = [streams.batch(step, ROWS, LENGTH) for step in steps]
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


def compare(losses: Losses, trained: Turns, heldout: Turns, pieces: int) -> dict[str, Gain]:
    """The model against guessing, on every kind of token and on ``all`` of them.

    Args:
        trained: where guessing counts; ``heldout``: where both are judged.
        pieces: of the vocabulary.
    """
    ids, kinds = heldout
    rows = [ids[first : first + ROWS] for first in range(0, len(ids), ROWS)]
    model = np.concatenate([losses(some) for some in rows])
    wanted, kinds = ids[:, 1:], kinds[:, 1:]
    found = {}
    for kind in JUDGED:
        at = kinds == kind
        if at.any():
            guess = _unigram(trained[0][trained[1] == kind], pieces)
            found[KINDS[kind]] = np.stack([model[at], guess[wanted[at]]])
    found["all"] = np.concatenate(list(found.values()), axis=1)
    return {name: Gain(*map(float, both.mean(axis=1))) for name, both in found.items()}


def _unigram(ids: np.ndarray, pieces: int) -> np.ndarray:
    """Loss of every id, in nats; one is added to every count, as any may come."""
    counts = np.bincount(ids, minlength=pieces) + 1.0
    return np.asarray(-np.log(counts / counts.sum()))
