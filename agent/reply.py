"""How a turn is written into the token stream, and how the reply is read out of it.

The stream begins as every prompt does; turns follow each other in one cache::

    [Speech]{request units}[Text]{transcript}{separator}{reply}[Speech]{reply units}</s>

That is ``text-then-speech``, for models trained on it: the words are planned, then spoken. A model
that only continues gets ``speech`` (units right after the request's) or ``any`` (it chooses).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from agent.config import ReplyConfig
from stages.lm import LanguageModel, Sampling
from stages.prompt import Modality
from stages.text import IncrementalDecoder, Tokenizer
from stages.units import Unit, UnitFrame

_LONGEST_PERIOD = 16  # units; a loop that a unit language model falls into is short
_LOOPED_UNITS = 48  # about two seconds of the same thing over and over


@dataclass(frozen=True)
class HeardText:
    """The whole transcript of the request."""

    text: str


@dataclass(frozen=True)
class SaidText:
    """More words of the reply."""

    text: str


@dataclass(frozen=True)
class SaidUnit:
    """The next unit of the reply."""

    unit: Unit


Piece = HeardText | SaidText | SaidUnit
Steps = Generator[Piece | None, None, None]
"""A reply being decoded: about one token a step, None where a step says nothing."""


class Dialogue:
    """Writes requests into the language model's cache and decodes replies, turn by turn.

    All methods do model work: call them from the language model's own thread.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: Tokenizer,
        config: ReplyConfig,
        text_sampling: Sampling,
        speech_sampling: Sampling,
        unspeakable: Iterable[int] = (),
    ) -> None:
        """``unspeakable``: ids of units that are never to be sampled."""
        self._lm = lm
        self._tokenizer = tokenizer
        self._config = config
        self._text_sampling = text_sampling
        self._speech_sampling = speech_sampling
        self._masks = {
            Modality.TEXT: tokenizer.mask(Modality.TEXT, also=[tokenizer.speech_tag]),
            Modality.SPEECH: tokenizer.mask(Modality.SPEECH),
            Modality.ANY: tokenizer.mask(Modality.ANY),
        }
        banned = list(unspeakable)
        for mask in self._masks.values():
            mask[banned] = False
        self._kinds = frozenset(tokenizer.kinds)
        # What sentencepiece puts before a prompt: the beginning of the sequence, a word boundary.
        self._prefix = tokenizer.encode(Modality.SPEECH.tag)[:-1]
        self._starts: list[int] = []  # where each turn begins in the cache
        self._units_from = 0  # where the request's units begin
        self._open = False  # a turn has begun and not been closed
        self._said: list[int] = []  # where each unit of the reply stands in the cache
        self._clear_counts()

    def begin(self) -> None:
        """Open a turn in which the user speaks; one that was never answered is forgotten."""
        self.abandon()
        self._clear_counts()
        self._slide()
        if not self._lm.length:
            self._lm.append(self._prefix)
        self._open = True
        self._starts.append(self._lm.length)
        self._lm.append([self._tokenizer.speech_tag])
        self._units_from = self._lm.length

    def hear(self, keep: int, frames: Sequence[UnitFrame]) -> None:
        """Of the request's units told so far keep the first ``keep``, then append ``frames``.

        Units that only repeat what is in the cache already cost nothing.
        """
        known = [frame for frame in frames if frame.kind in self._kinds]
        new = self._tokenizer.unit_ids(known)
        at = self._units_from + keep
        old = self._lm.ids[at:]
        same = next(
            (n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        self._rewound += self._lm.length - (at + same)
        self._lm.rewind(at + same)
        self._lm.append(new[same:])
        self._prefilled += len(new) - same

    def reply(self) -> Steps:
        """Decode the reply. When it ends the turn is closed in the cache, also if it ends early."""
        self._said = []
        try:
            if self._config.mode == "text-then-speech":
                yield from self._plan()
                yield from self._speak(Modality.SPEECH)
            else:
                yield from self._speak(Modality.parse(self._config.mode))
        finally:
            self._close()

    def cut(self, units: int) -> None:
        """Of the reply that has just ended remember only the first ``units`` units."""
        if units < len(self._said):
            self._lm.rewind(self._said[units])
            self._close()

    def abandon(self) -> None:
        """Forget the open turn, as if nothing had been said."""
        if self._open:
            self._lm.rewind(self._starts.pop())
        self._open = False

    def _plan(self) -> Steps:
        """Text up to the tag that begins speech."""
        lm, tokenizer = self._lm, self._tokenizer
        lm.append([tokenizer.text_tag])
        decoder = IncrementalDecoder(tokenizer)
        splitter = _Splitter(self._config.separator)
        for _ in range(self._config.max_text_tokens):
            i = lm.decode(self._text_sampling, self._masks[Modality.TEXT])
            if i in (tokenizer.speech_tag, tokenizer.eos):
                lm.rewind(lm.length - 1)
                break
            self._text_tokens += 1
            for said in decoder.push(i):
                if isinstance(said, str):
                    yield from splitter.push(said)
            yield None
        yield from splitter.flush()
        lm.append([tokenizer.speech_tag])

    def _speak(self, modality: Modality) -> Steps:
        """Units, and text where ``modality`` allows it, to the end of the sequence or a limit."""
        lm = self._lm
        decoder = IncrementalDecoder(self._tokenizer)
        units: list[Unit] = []
        text_left = self._config.max_text_tokens
        while lm.length < lm.capacity and not _loops(units):
            i = lm.decode(self._speech_sampling, self._masks[modality])
            if i == self._tokenizer.eos:
                return
            for said in decoder.push(i):
                if isinstance(said, Unit):
                    self._speech_tokens += 1
                    units.append(said)
                    self._said.append(lm.length - 1)
                    yield SaidUnit(said)
                elif isinstance(said, str):
                    self._text_tokens += 1
                    text_left -= 1
                    yield SaidText(said)
            if text_left <= 0:
                return

    def _close(self) -> None:
        """End the turn with the end-of-sequence token, however it came to an end."""
        lm, self._open = self._lm, False
        if lm.ids[-1] != self._tokenizer.eos and lm.length < lm.capacity:
            lm.append([self._tokenizer.eos])

    def _slide(self) -> None:
        """Keep the latest turns that fit when the context has grown over its limit."""
        limit = min(self._config.context_tokens, self._lm.capacity - self._config.reserve_tokens)
        if self._lm.length <= limit:
            return
        ids = self._lm.ids
        # Half, so that this is not needed again at the very next turn.
        kept = [start for start in self._starts if len(ids) - start <= limit // 2]
        first = kept[0] if kept else len(ids)
        self._lm.reset()
        self._lm.append([*self._prefix, *ids[first:]])
        self._starts = [start - first + len(self._prefix) for start in kept]

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of the turn in progress, by what was done with them."""
        return {
            "prefilled_tokens": self._prefilled,
            "rewound_tokens": self._rewound,
            "text_tokens": self._text_tokens,
            "speech_tokens": self._speech_tokens,
        }

    def _clear_counts(self) -> None:
        self._prefilled = self._rewound = self._text_tokens = self._speech_tokens = 0


class _Splitter:
    """Parts a growing text at the separator: what was heard, then the reply."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._open = bool(separator)  # the separator may still come
        self._text = ""

    def push(self, text: str) -> Iterator[Piece]:
        if not self._open:
            yield SaidText(text)
            return
        self._text += text
        heard, found, reply = self._text.partition(self._separator)
        if found:
            self._open = False
            yield HeardText(heard.strip())
            if reply:
                yield SaidText(reply)

    def flush(self) -> Iterator[Piece]:
        """No separator came: the model answered without a transcript."""
        if self._open and self._text:
            yield SaidText(self._text)


def _loops(units: Sequence[Unit]) -> bool:
    """Whether the last units are one short stretch, over and over."""
    if len(units) < _LOOPED_UNITS:
        return False
    tail = units[-_LOOPED_UNITS:]
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_PERIOD + 1))
