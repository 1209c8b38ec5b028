"""How a turn is written into the token stream, and how the reply is read out of it.

The stream begins as every prompt does; turns follow each other in one cache::

    [Speech]{request units}[Text]{transcript}{separator}{reply}[Speech]{reply units}</s>

That is ``text-then-speech``, for models trained on it: the words are planned, then spoken. A model
that only continues gets ``speech`` (units right after the request's) or ``any`` (it chooses).

A request that is typed stands where its transcript would: ``[Text]{request}{separator}{reply}...``;
words that are only to be said where the reply would: ``[Text]{words}[Speech]...``.

A planned reply may begin with an action, one JSON object: ``{"action":"stop"} I stand still.`` It
is held to a schema while it is decoded, comes before the first word, and is not spoken.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.config import ReplyConfig
from agent.errors import UserError
from stages.constrained import JsonGrammar, JsonText
from stages.lm import LanguageModel, Sampling
from stages.prompt import Modality
from stages.text import Decoded, IncrementalDecoder, Tokenizer
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
class Action:
    """What the reply does besides speaking, as the schema of ``reply.actions`` describes it."""

    value: dict[str, Any]


@dataclass(frozen=True)
class SaidUnit:
    """The next unit of the reply."""

    unit: Unit


@dataclass(frozen=True)
class Memory:
    """What is remembered of a conversation between two turns.

    Attributes:
        turn: number of the latest turn.
        turns: the token ids of each turn, text and units alike; the oldest first.
    """

    turn: int = 0
    turns: Sequence[Sequence[int]] = ()

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises :class:`ValueError` if a token cannot stand in a conversation."""
        for turn in self.turns:
            for at, i in enumerate(turn):
                last = at == len(turn) - 1
                known = 0 <= i < tokenizer.size
                if not known or (tokenizer.is_special(i) and not (i == tokenizer.eos and last)):
                    raise ValueError(f"token {i} cannot stand in a conversation")


Piece = HeardText | Action | SaidText | SaidUnit
Steps = Generator[Piece | None, None, None]
"""A reply being decoded: about one token a step, None where a step says nothing."""


@dataclass
class _Turn:
    """Where the parts of the latest turn stand in the cache."""

    start: int
    units: int  # the request's units begin
    request_end: int
    words_begin: int | None = None  # the reply's text begins, its transcript included
    words: list[int] = field(default_factory=list)  # characters said up to each token of it
    typed: bool = False  # the request is text, with all that stands before the reply
    given: str = ""  # the words of the reply, where they are not for the model to choose
    said: list[int] = field(default_factory=list)  # each unit of the reply


class Dialogue:
    """Writes requests into the language model's cache and decodes replies, turn by turn.

    A turn is ``begin``, ``hear`` as often as there is news, ``reply`` as often as the speaker seems
    to have finished, and ``end`` with what was heard of the last reply; or ``abandon``. A reply
    followed by more of the request was in vain: it is gone from the cache.

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
        examples: str = "",
        actions: JsonGrammar | None = None,
    ) -> None:
        """
        Args:
            unspeakable: ids of units that are never to be sampled.
            examples: a prompt that precedes the conversation and is never forgotten.
            actions: of what may begin a planned reply.
        """
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
        self._actions = actions
        self._kinds = frozenset(tokenizer.kinds)
        # What sentencepiece puts before a prompt: the beginning of the sequence, a word boundary.
        begin = tokenizer.encode(Modality.SPEECH.tag)[:-1]
        self._prefix = [*begin, *tokenizer.encode(examples)[len(begin) :]] if examples else begin
        self._opening = self._tagged(config.user_tag, tokenizer.speech_tag)
        self._starts: list[int] = []  # where each turn begins in the cache
        self._turn: _Turn | None = None
        self._clear_counts()

    @property
    def prefix(self) -> tuple[int, ...]:
        """What every context begins with: the examples, after what begins any sequence."""
        return tuple(self._prefix)

    def begin(self) -> None:
        """Open a turn in which the user speaks; one that was never ended is forgotten."""
        self._open(self._opening)

    def read(self, request: str) -> None:
        """Open a turn whose request is typed: the model takes it for the transcript.

        Raises:
            CacheFullError: there is no room for it. See :meth:`typed_tokens`.
        """
        self._open(self._typed(request)).typed = True

    def say(self, words: str) -> None:
        """Open a turn without a request, in which ``words`` are said.

        Raises:
            ValueError: there are none.
        """
        if not words:
            raise ValueError("nothing to say")
        self._open([]).given = words

    def typed_tokens(self, request: str) -> int:
        """How many tokens a typed request has."""
        return len(self._typed(request))

    def _typed(self, request: str) -> list[int]:
        config = self._config
        planned = config.mode == "text-then-speech"
        end = config.separator.rstrip() if planned else config.agent_tag
        last = [self._tokenizer.speech_tag] if config.mode == "speech" else []
        return [*self._tagged(config.user_tag + request + end, 0)[:-1], *last]

    def _open(self, opening: Sequence[int]) -> _Turn:
        self.abandon()
        self._clear_counts()
        if not self._lm.length:
            self._lm.append(self._prefix)
        start = self._lm.length
        self._starts.append(start)
        if opening and opening[0] == self._tokenizer.text_tag and self._in_text():
            opening = opening[1:]  # a tag stands where the modality changes
        self._lm.append(opening)
        self._turn = _Turn(start, self._lm.length, self._lm.length)
        return self._turn

    def hear(self, keep: int, frames: Sequence[UnitFrame]) -> None:
        """Of the request's units told so far keep the first ``keep``, then append ``frames``.

        Units that only repeat what is in the cache already cost nothing. Those for which the cache
        has no room are left out.
        """
        turn, lm = self._opened(), self._lm
        known = [frame for frame in frames if frame.kind in self._kinds]
        new = self._tokenizer.unit_ids(known)
        at = turn.units + keep
        old = lm.ids[at : turn.request_end]
        same = next(
            (n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        self._forget_reply()
        self._counts["rewound_tokens"] += turn.request_end - (at + same)
        lm.rewind(at + same)
        fitting = new[same : lm.capacity - at]
        lm.append(fitting)
        turn.request_end = lm.length
        self._counts["prefilled_tokens"] += len(fitting)

    def reply(self) -> Steps:
        """Decode a reply to what has been heard so far; an earlier one is forgotten."""
        self._forget_reply()
        turn = self._opened()
        if turn.given:
            yield from self._recite(turn.given)
            yield from self._speak(Modality.SPEECH)
        elif self._config.mode == "text-then-speech":
            yield from self._plan()
            yield from self._speak(Modality.SPEECH)
        else:
            if not turn.typed:
                self._invite()
            yield from self._speak(Modality.parse(self._config.mode))

    def end(self, units: int | None = None, characters: int = 0) -> None:
        """The turn is over: of the reply, remember what was heard.

        Args:
            units: how many of the reply's units were heard; ``None`` if all were.
            characters: how much of the reply's text that was, where it was planned as text.
        """
        turn, lm = self._turn, self._lm
        if turn is None:
            return
        if lm.length == turn.request_end:  # not a token of a reply
            self.abandon()
            return
        if units is not None:
            self._cut(turn, units, characters)
        self._close()
        self._turn = None
        self._slide()

    def abandon(self) -> None:
        """Forget the open turn, as if nothing had been said."""
        if self._turn is not None:
            self._lm.rewind(self._starts.pop())
        self._turn = None

    def configure(
        self, config: ReplyConfig, text_sampling: Sampling, speech_sampling: Sampling
    ) -> None:
        """Go on with other settings. The tags of the turns must stay as they are."""
        self._config = config
        self._text_sampling, self._speech_sampling = text_sampling, speech_sampling

    @property
    def memory(self) -> list[list[int]]:
        """The tokens of each turn that is remembered; without the open one."""
        ids = self._lm.ids
        end = self._turn.start if self._turn is not None else len(ids)
        starts = [start for start in self._starts if start < end]
        return [list(ids[a:b]) for a, b in itertools.pairwise([*starts, end])]

    def restore(self, turns: Sequence[Sequence[int]]) -> None:
        """Begin with what :attr:`memory` was; of more than there is room for, with the latest."""
        lm, prefix = self._lm, self._prefix
        lm.rewind(0)
        lm.append(prefix)
        room = self._limit - len(prefix)
        kept: list[Sequence[int]] = []
        for turn in reversed(turns):
            room -= len(turn)
            if room < 0:
                break
            kept.insert(0, turn)
        self._starts = [
            len(prefix) + n for n in itertools.accumulate(map(len, kept[:-1]), initial=0)
        ][: len(kept)]
        lm.append([i for turn in kept for i in turn])

    @property
    def _limit(self) -> int:
        """Tokens of the context between two turns."""
        return min(self._config.context_tokens, self._lm.capacity - self._config.reserve_tokens)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of the turn in progress, by what was done with them."""
        return dict(self._counts)

    def _opened(self) -> _Turn:
        if self._turn is None:
            raise RuntimeError("no turn is open: begin one")
        return self._turn

    def _forget_reply(self) -> None:
        """Back to the end of the request."""
        turn = self._opened()
        self._counts["wasted_tokens"] += len(turn.words) + len(turn.said)
        self._lm.rewind(turn.request_end)
        turn.words_begin = None
        turn.words.clear()
        turn.said.clear()

    def _tagged(self, tag: str, last: int) -> list[int]:
        """``tag`` as text, if there is one, before the tag ``last``."""
        before = self._tokenizer.encode(Modality.TEXT.tag + tag, bos=False)[1:] if tag else []
        return [*before, last]

    def _invite(self) -> None:
        """What stands between the request and a reply that is not planned as text."""
        if self._config.agent_tag:
            speech = self._config.mode == "speech"
            tagged = self._tagged(self._config.agent_tag, self._tokenizer.speech_tag)
            self._lm.append(tagged if speech else tagged[:-1])

    def _recite(self, words: str) -> Steps:
        """Words that were given, as if they had been planned."""
        lm, tokenizer, turn = self._lm, self._tokenizer, self._opened()
        tag, *ids = self._tagged(words, tokenizer.speech_tag)
        lm.append([] if self._in_text() else [tag])
        turn.words_begin = lm.length
        lm.append(ids)
        decoder = IncrementalDecoder(tokenizer)
        lengths = (sum(len(t) for t in decoder.push(i) if isinstance(t, str)) for i in ids[:-1])
        turn.words = list(itertools.accumulate(lengths))
        yield SaidText(words)

    def _plan(self) -> Steps:
        """Text up to the tag that begins speech."""
        lm, tokenizer, turn = self._lm, self._tokenizer, self._opened()
        if not turn.typed:
            lm.append(self._tagged(self._config.agent_tag, 0)[:-1] or [tokenizer.text_tag])
        turn.words_begin = lm.length
        decoder = IncrementalDecoder(tokenizer)
        splitter = _Splitter("" if turn.typed else self._config.separator)
        characters, acted = 0, False
        limit = min(lm.length + self._config.max_text_tokens, lm.capacity - 2)
        while lm.length < limit:
            i = lm.decode(self._text_sampling, self._masks[Modality.TEXT])
            if i in (tokenizer.speech_tag, tokenizer.eos):
                lm.rewind(lm.length - 1)
                break
            pieces = list(_pieces(decoder.push(i), splitter))
            if self._actions and not (acted or characters) and _opens_action(pieces):
                lm.rewind(lm.length - 1)
                yield from (piece for piece in pieces if isinstance(piece, HeardText))
                acted = yield from self._act(self._actions.begin(), limit)
                if not acted:
                    break
                decoder = IncrementalDecoder(tokenizer)
                continue
            self._counts["text_tokens"] += 1
            for piece in pieces:
                if isinstance(piece, SaidText):
                    if (acted or turn.typed) and not characters:  # a blank before the words
                        piece = SaidText(piece.text.lstrip())
                    characters += len(piece.text)
                yield piece
            turn.words.append(characters)
            yield None
        yield from splitter.flush()
        lm.append([tokenizer.speech_tag])

    def _act(self, action: JsonText, limit: int) -> Generator[Piece | None, None, bool]:
        """Decode an action; one for which there is no room is forgotten, and the answer False."""
        lm, turn, start = self._lm, self._opened(), self._lm.length
        while not action.complete:
            forced = action.forced()
            if lm.length + len(forced) >= limit:
                lm.rewind(start)
                return False
            lm.append(forced)
            if not action.complete:
                action.push(lm.decode(self._text_sampling, action.mask()))
            yield None
        self._counts["text_tokens"] += lm.length - start
        turn.words += [0] * (lm.length - start)  # no words: whatever is heard, it was done
        yield Action(action.value)
        return True

    def _speak(self, modality: Modality) -> Steps:
        """Units, and text where ``modality`` allows it, to the end of the sequence or a limit."""
        lm, turn = self._lm, self._opened()
        decoder = IncrementalDecoder(self._tokenizer)
        units: list[Unit] = []
        text = _Watched(self._config.stop_text)
        text_left = self._config.max_text_tokens
        while lm.length < lm.capacity and not loops(units):
            i = lm.decode(self._speech_sampling, self._masks[modality])
            if i == self._tokenizer.eos:
                return
            for said in decoder.push(i):
                if isinstance(said, Unit):
                    self._counts["speech_tokens"] += 1
                    units.append(said)
                    turn.said.append(lm.length - 1)
                    yield SaidUnit(said)
                elif isinstance(said, str):
                    self._counts["text_tokens"] += 1
                    text_left -= 1
                    stopped_at = text.push(said, lm.length - 1)
                    if stopped_at is not None:
                        lm.rewind(stopped_at)
                        return
                    yield SaidText(said)
            if text_left <= 0:
                return

    def _close(self) -> None:
        """Mark the end of the turn; where turns are told apart by tags, the next tag does."""
        lm, eos = self._lm, self._tokenizer.eos
        ended = lm.ids[-1] == eos
        if self._config.user_tag and ended:
            lm.rewind(lm.length - 1)
        elif not (self._config.user_tag or ended) and lm.length < lm.capacity:
            lm.append([eos])

    def _in_text(self) -> bool:
        """Whether the last token is a piece of text."""
        last, tokenizer = self._lm.ids[-1], self._tokenizer
        if self._lm.length <= 2 or tokenizer.is_special(last):
            return False
        return tokenizer.id_to_unit(last) is None and tokenizer.id_to_tag(last) is None

    def _cut(self, turn: _Turn, units: int, characters: int) -> None:
        """Take from the cache what of the reply was not heard: sounds, and words of the plan."""
        lm = self._lm
        if turn.words_begin is None:
            if units < len(turn.said):
                lm.rewind(turn.said[units])
            return
        words = bisect.bisect_right(turn.words, characters)
        spoken = [lm.ids[at] for at in turn.said[:units]]
        if words < len(turn.words) or not turn.said:
            lm.rewind(turn.words_begin + words)
            lm.append([self._tokenizer.speech_tag, *spoken])
        elif units < len(turn.said):
            lm.rewind(turn.said[units])

    def _slide(self) -> None:
        """Keep the latest turns that fit when the context has grown over its limit."""
        limit = self._limit
        if self._lm.length <= limit:
            return
        ids = self._lm.ids
        # Half, so that this is not needed again at the very next turn.
        room = (limit - len(self._prefix)) // 2
        kept = [start for start in self._starts if len(ids) - start <= room]
        first = kept[0] if kept else len(ids)
        latest = list(ids[first:])
        self._lm.rewind(len(self._prefix))
        self._lm.append(latest)
        self._starts = [start - first + len(self._prefix) for start in kept]

    def _clear_counts(self) -> None:
        self._counts = dict.fromkeys(
            ("prefilled_tokens", "rewound_tokens", "text_tokens", "speech_tokens", "wasted_tokens"),
            0,
        )


def _opens_action(pieces: Iterable[Piece]) -> bool:
    return any(isinstance(p, SaidText) and p.text.lstrip().startswith("{") for p in pieces)


def _pieces(decoded: Iterable[Decoded], splitter: _Splitter) -> Iterator[Piece]:
    for said in decoded:
        if isinstance(said, str):
            yield from splitter.push(said)


class _Watched:
    """Text as it grows, watched for a stop text that may come in pieces."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._pieces: list[tuple[str, int]] = []

    def push(self, text: str, position: int) -> int | None:
        """Where the stop text begins in the cache, once it is complete."""
        if not self._stop:
            return None
        self._pieces.append((text, position))
        whole = "".join(piece for piece, _ in self._pieces)
        at = whole.find(self._stop)
        if at < 0:
            self._pieces = self._pieces[-len(self._stop) :]
            return None
        for piece, start in self._pieces:
            at -= len(piece)
            if at < 0:
                return start
        return position


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


def loops(units: Sequence[Unit]) -> bool:
    """Whether the last units are one short stretch, over and over."""
    if len(units) < _LOOPED_UNITS:
        return False
    tail = units[-_LOOPED_UNITS:]
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_PERIOD + 1))


def plain(text: str) -> str:
    """``text`` on one line, without what could be read as a tag, a unit or a separator.

    Raises:
        UserError: nothing is left of it.
    """
    words = " ".join(text.translate(_BRACKETS).split())
    if not words:
        raise UserError("the text is empty: give it some words")
    return words


_BRACKETS = str.maketrans("[]|", "() ")
