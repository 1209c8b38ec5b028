"""Requests that are typed, and words that are to be spoken as they are.

A typed request stands where a transcript would, ``[Text]{request}{separator}``, and the model goes
on with the reply and its speech. What is only to be said is a prompt of its own,
``[Text]{words}[Speech]``. Both use a stream beside the spoken conversation: neither remembers the
other yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from agent.attempt import Attempt
from agent.errors import UserError
from agent.events import Event, ReplyAudio, ReplyText, TurnEnded
from agent.models import Models
from agent.reply import loops
from agent.telemetry import TurnTrace
from stages import SAMPLE_RATE
from stages.lm import LanguageModel
from stages.prompt import SPEECH_TAG, TEXT_TAG, Modality
from stages.text import IncrementalDecoder
from stages.units import Unit
from stages.vocoder_stream import AudioChunk


def beside(models: Models) -> Models:
    """The same weights with a stream of tokens of its own, for one more conversation."""
    view = copy.copy(models)
    lm = models.lm
    view.lm = LanguageModel(lm.config, lm._weights, lm.capacity)
    return view


class TypedReplies:
    """Answers typed requests and speaks given words, one after another.

    The iterators do model work, about one token a step (``None`` where a step says nothing): drive
    them from a thread of their own, one at a time.
    """

    def __init__(self, models: Models) -> None:
        view = beside(models)
        self._prefix = view.dialogue().prefix  # bos, a word boundary, and the examples
        self._lm = view.lm
        self._config = models.config
        self._tokenizer = tokenizer = models.tokenizer
        self._vocoder = models.vocoder()
        self._text_mask = tokenizer.mask(Modality.TEXT, also=[tokenizer.speech_tag])
        self._speech_mask = tokenizer.mask(Modality.SPEECH)
        self._speech_mask[models._unspeakable()] = False
        sampling = models.config.sampling
        self._text, self._speech = sampling.text.sampling(), sampling.speech.sampling()

    def ask(self, text: str, turn: int = -1) -> Iterator[Event | None]:
        """Answer a typed request: :class:`ReplyText`, :class:`ReplyAudio`, :class:`TurnEnded`.

        Raises:
            UserError: the text is empty, or too long for the model.
        """
        reply = self._config.reply
        attempt = Attempt(0, TurnTrace(turn, heard=_plain(text)))
        if reply.mode != "text-then-speech":
            self._begin(reply.user_tag + attempt.trace.heard + reply.agent_tag, SPEECH_TAG)
        else:
            self._begin(attempt.trace.heard + reply.separator.rstrip(), "")
            yield from self._plan(attempt)
        yield from self._sound(attempt)

    def say(self, text: str, turn: int = -1) -> Iterator[Event | None]:
        """Speak ``text``: the same events, the text as it was given.

        Raises:
            UserError: the text is empty, or too long for the model.
        """
        attempt = Attempt(0, TurnTrace(turn))
        words = _plain(text)
        self._begin(words, SPEECH_TAG)
        attempt.words.plan(words)
        yield ReplyText(turn, words)
        yield from self._sound(attempt)

    def _begin(self, text: str, tag: str) -> None:
        ids = self._tokenizer.encode(TEXT_TAG + text + tag)
        room = self._lm.capacity - len(self._prefix) - len(ids)
        if room < self._lm.capacity // 4:
            raise UserError(
                f"the text has {len(ids)} tokens, which leaves no room for a reply: shorten it"
            )
        self._lm.reset()
        begin = len(self._tokenizer.encode(SPEECH_TAG)) - 1
        self._lm.append([*self._prefix, *ids[begin:]] if len(self._prefix) > begin else ids)

    def _plan(self, attempt: Attempt) -> Iterator[Event | None]:
        lm, tokenizer = self._lm, self._tokenizer
        decoder = IncrementalDecoder(tokenizer)
        for _ in range(min(self._config.reply.max_text_tokens, lm.capacity - lm.length - 2)):
            i = lm.decode(self._text, self._text_mask)
            if i in (tokenizer.speech_tag, tokenizer.eos):
                lm.rewind(lm.length - 1)
                break
            for said in decoder.push(i):
                if isinstance(said, str):
                    said = said if attempt.words.text else said.lstrip()
                    attempt.words.plan(said)
                    yield ReplyText(attempt.trace.turn, said)
            yield None
        lm.append([tokenizer.speech_tag])

    def _sound(self, attempt: Attempt) -> Iterator[Event | None]:
        lm, tokenizer, vocoder = self._lm, self._tokenizer, self._vocoder
        decoder = IncrementalDecoder(tokenizer)
        units: list[Unit] = []
        vocoder.reset()
        attempt.ended = "complete"
        while lm.length < lm.capacity and attempt.enough is None and not loops(units):
            i = lm.decode(self._speech, self._speech_mask)
            if i == tokenizer.eos:
                break
            for said in decoder.push(i):
                if isinstance(said, Unit):
                    units.append(said)
                    yield from self._told(attempt, vocoder.push(said))
            yield None
        if attempt.enough is None and units:
            yield from self._told(attempt, vocoder.flush())
        trace = attempt.trace
        attempt.fill(trace)
        trace.ended = attempt.ended
        yield TurnEnded(trace.turn, trace)

    def _told(self, attempt: Attempt, chunks: Iterable[AudioChunk]) -> Iterator[Event]:
        limits = self._config.reply
        longest, patience = limits.max_seconds, limits.trailing_silence_s
        for chunk in chunks:
            if attempt.enough is not None:
                return
            wanted = attempt.limit(chunk, int(longest * SAMPLE_RATE), int(patience * SAMPLE_RATE))
            if wanted is not None:
                attempt.samples = wanted.end
                turn = attempt.trace.turn
                yield ReplyAudio(turn, wanted.samples, wanted.first_sample, wanted.units)


def _plain(text: str) -> str:
    """``text`` on one line, without what could be read as a tag or a unit."""
    words = " ".join(text.translate(_BRACKETS).split())
    if not words:
        raise UserError("the text is empty: give it some words")
    return words


_BRACKETS = str.maketrans("[]|", "() ")
