"""What is being said at every token: dense supervision for the language model, in training only.

The transcript after a request is a few tokens that tell about a hundred units at once. But the
alignments are known: which phone each unit belongs to, and where each word ends. Small heads on the
hidden states are asked for these while the units go by (a middle layer), and for the word that a
reply is about to speak (a late layer), which teaches it to keep its place in its own text. Writing
down what was heard then comes to copying words in their order. The heads are no part of the model.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import domain
from recipes.lm_corpus import Recording, Vocabulary
from stages import SAMPLE_RATE

PHONE, FIRST, SECOND, NOW = range(4)  # columns
COLUMNS = 4
NOTHING = 0  # no word ends here, or none is spoken; also: the word has no second piece
UNKNOWN = -1  # not to be predicted
LATER = {PHONE: 1, FIRST: 3, SECOND: 3}  # tokens after which it is asked: sounds need their context
NOTHING_WEIGHT = 0.1  # of the tokens where no word ends, of which there are many
HALF_FRAME = SAMPLE_RATE // 50


class Hinter:
    """Hints of recordings: int64 ``[tokens, 4]``, see the columns' names.

    PHONE is the number of the phone of a phonetic unit; FIRST and SECOND the first two pieces of
    the word whose last phonetic unit this is; NOW the first piece of the word being spoken.
    """

    def __init__(self, vocabulary: Vocabulary, phones: Mapping[str, int]) -> None:
        self.vocabulary, self.phones = vocabulary, phones
        self._phonetic = np.zeros(len(vocabulary), dtype=bool)
        self._phonetic[vocabulary.phonetic] = True
        self._pieces = lru_cache(maxsize=None)(self._pieces_of)

    def __call__(self, recording: Recording) -> np.ndarray:
        hints = np.full((len(recording.ids), COLUMNS), UNKNOWN, dtype=np.int64)
        at = np.flatnonzero(self._phonetic[recording.ids])
        middles = recording.starts[at] + HALF_FRAME
        if recording.phones:
            starts = [start for _, start, _ in recording.phones]
            names = np.array([self.phones[name] for name, _, _ in recording.phones])
            frames = recording.starts[at] * 25 // SAMPLE_RATE
            hints[at, PHONE] = names[np.maximum(np.searchsorted(starts, frames, "right") - 1, 0)]
        if recording.words:
            hints[:, NOW] = hints[at, FIRST] = NOTHING
            for word, start, end in recording.words:
                first, second = self._pieces(word)
                a = bisect.bisect_left(middles, start * SAMPLE_RATE)
                b = max(bisect.bisect_left(middles, end * SAMPLE_RATE), a + 1)
                if a < len(at):
                    b = min(b, len(at))
                    hints[at[b - 1], FIRST], hints[at[b - 1], SECOND] = first, second
                    hints[at[a] : at[b - 1] + 1, NOW] = first
        return hints

    def _pieces_of(self, word: str) -> tuple[int, int]:
        """First two pieces of a word in the middle of a transcript."""
        before = self.vocabulary.text("a")
        pieces = self.vocabulary.text(f"a {domain.transcript(word)}")[len(before) :].tolist()
        return (*pieces, NOTHING, NOTHING)[:2]


def delayed(hints: np.ndarray) -> np.ndarray:
    """Hints of one stream of units as they are asked for: what has ended, a little later.

    What would come after the stream is asked for at its last token.
    """
    moved = hints.copy()
    for column, later in LATER.items():
        moved[later:, column] = hints[:-later, column]
        moved[:later, column] = UNKNOWN
    ends = np.flatnonzero(hints[:, FIRST] > NOTHING)
    if len(ends) and ends[-1] + LATER[FIRST] >= len(hints):
        moved[-1, FIRST : SECOND + 1] = hints[ends[-1], FIRST : SECOND + 1]
    moved[:-1, NOW], moved[-1, NOW] = hints[1:, NOW], UNKNOWN  # the word of the token to come
    return moved


class Heads(nn.Module):
    """The heads, on a middle layer (phones, words heard) and a late one (the word to speak)."""

    def __init__(self, hidden: int, phones: int) -> None:
        super().__init__()
        self.phone = nn.Linear(hidden, phones)
        self.maps = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(3))

    def forward(
        self, middle: Tensor, late: Tensor, embedding: Tensor, hints: Tensor, replies: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the losses, and each by name.

        Args:
            middle, late: hidden states ``[B, T, hidden]``.
            embedding: of the text pieces ``[pieces, hidden]``; words are predicted through it.
            hints: ``[B, T, 4]``.
            replies: bool ``[B, T]``, where nano itself speaks.
        """
        middle, late = _normal(middle), _normal(late)
        phones, ends, seconds = (hints[..., c] > UNKNOWN for c in (PHONE, FIRST, SECOND))
        speaking = replies & (hints[..., NOW] > UNKNOWN)
        first, second, now = self.maps
        losses = {
            "phone": _loss(self.phone(middle[phones]), hints[..., PHONE][phones], 1.0),
            "word": _loss(
                F.linear(first(middle[ends]), embedding), hints[..., FIRST][ends], NOTHING_WEIGHT
            ),
            "piece": _loss(
                F.linear(second(middle[seconds]), embedding), hints[..., SECOND][seconds], 1.0
            ),
            "saying": _loss(
                F.linear(now(late[speaking]), embedding), hints[..., NOW][speaking], 1.0
            ),
        }
        total = torch.stack([WEIGHTS[k] * loss for k, loss in losses.items()]).sum()
        return total, {k: float(loss.detach()) for k, loss in losses.items()}


WEIGHTS = {"phone": 0.4, "word": 1.0, "piece": 0.3, "saying": 0.3}


def _normal(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5).to(x.dtype)


def _loss(logits: Tensor, wanted: Tensor, nothing: float) -> Tensor:
    """Mean cross-entropy in which "nothing" weighs ``nothing``; 0 when nothing is asked."""
    if len(wanted) == 0:
        return logits.sum() * 0.0
    weight = torch.where(wanted == NOTHING, nothing, 1.0)
    losses = F.cross_entropy(logits.float(), wanted, reduction="none")
    return (losses * weight).sum() / weight.sum()
