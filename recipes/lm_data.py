"""The token streams that nano learns from, drawn afresh at every training step.

A sequence starts with ``<s>`` and, in sentencepiece, the word-boundary piece, and goes on with
turns, each one drawn from a mix of kinds, until it is full. Every token carries the kind of thing
it is, from which its weight in the loss and the losses in the log follow.

    dialog       [Speech]{request}[Text]{transcript} | {plan}[Speech]{reply spoken}</s>
    interrupted  a dialog whose reply was broken off, its words and sounds as far as they were heard
    dialog_text  the same without the spoken reply: more requests in the same time
    typed        [Text]{transcript} | {plan}[Speech]{reply spoken}</s>
    asr          [Speech]{anything}[Text]{transcript} |
    phrase       the same of one to four words: these teach where to look
    collage      the same of phrases of several recordings: what was said before tells nothing
    tts          [Text]{sentence}[Speech]{spoken in the reply voice}</s>
    composed     dialog_text of any request of the domain, its speech composed of recorded words
    chat         [Text]{transcript} | {plan} of any request of the domain
    followup     turns of all these forms, of which the last means nothing without those before
    interleaved  [Text]{words}[Speech]{the next words}[Text]... switching at random word boundaries
    speech       [Speech]{a reply or sentence in the reply voice}</s>

A plan is the words of the reply, before them its action where it has one, as JSON without blanks.
"""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recipes import domain
from recipes.dialogues import Example, Turn, action_text
from recipes.lm_corpus import REPLY_VOICE, Answer, Corpus, Recording, Vocabulary
from recipes.lm_hints import COLUMNS, UNKNOWN, Hinter, delayed
from recipes.lm_voices import PhoneBank
from recipes.lm_words import Span, WordBank
from recipes.text_tokenizer import SEPARATOR
from stages import SAMPLE_RATE

KINDS = ("masked", "request_units", "transcript", "reply_text", "reply_units", "other")
MASKED, REQUEST_UNITS, TRANSCRIPT, REPLY_TEXT, REPLY_UNITS, OTHER = range(len(KINDS))
WEIGHTS = (0.0, 0.05, 2.0, 1.5, 1.0, 0.5)

STYLES = 5  # in use: neutral, lively, monotone, whispered, fast
WRONG_STYLE = 0.2  # of the disturbed recordings

# Found by trial: with recorded requests alone the model learnt them by heart and heard them instead
# of new ones (words wrong: 9 % of train, 51 % of held-out requests after 4 M tokens).
DEFAULT_MIX = {
    "composed": 0.20,
    "collage": 0.10,
    "chat": 0.25,
    "followup": 0.06,
    "dialog": 0.15,
    "asr": 0.07,
    "interrupted": 0.03,
    "dialog_text": 0.05,
    "tts": 0.05,
    "typed": 0.02,
    "interleaved": 0.01,
    "phrase": 0.005,
    "speech": 0.005,
}
LIVE = 0.5  # of the follow-ups: every turn spoken, as in a conversation
ANSWERED_ALOUD = 0.3  # of these, the last reply spoken as well
SPOKEN_TURNS = 0.4  # of the requests of the others
RECORDED_TURNS = 0.5  # of the spoken requests that were recorded; the rest is composed


class Part(NamedTuple):
    """A piece of a sequence: ids, the kind that they all are, and hints where there are any."""

    ids: np.ndarray
    kind: int
    hints: np.ndarray | None = None


class Speech(NamedTuple):
    """Unit tokens of a stream and what is said at each (see lm_hints.py)."""

    ids: np.ndarray
    hints: np.ndarray


class Streams:
    """Draws training batches from a corpus.

    Args:
        mix: kind of turn -> share of turns.
        noise: the largest rate at which phonetic units of the user's speech are replaced; each
            recording draws its own rate, so that unknown voices are no surprise.
        revoiced: share of the user's speech in which phones are exchanged (see lm_voices.py).
        examples: requests besides the recorded, with their answers and the turns before them; by
            default what was recorded. Every intent is drawn as the root of its examples' number.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        mix: Mapping[str, float] | None = None,
        noise: float = 0.15,
        seed: int = 0,
        revoiced: float = 0.6,
        examples: Sequence[Example] = (),
    ) -> None:
        mix = dict(DEFAULT_MIX if mix is None else mix)
        unknown = set(mix) - set(DEFAULT_MIX)
        if unknown:
            raise ValueError(f"mix: unknown {min(unknown)!r}; known are {', '.join(DEFAULT_MIX)}")
        self.corpus, self.vocabulary, self.noise, self.seed = corpus, vocabulary, noise, seed
        self.revoiced = revoiced
        self._names = list(mix)
        self._shares = np.array([mix[n] for n in self._names]) / sum(mix.values())
        self._spoken = [
            r
            for r in (*corpus.sentences, *(r for rs in corpus.replies.values() for r in rs))
            if r.voice == REPLY_VOICE
        ]
        self._any = corpus.recordings
        self._bank = PhoneBank(self._any, vocabulary)
        names = sorted({name for r in self._any for name, _, _ in r.phones})
        self.phones = {name: i for i, name in enumerate(names)}
        self._hinter = Hinter(vocabulary, self.phones)
        self._with_words = [r for r in self._any if r.words]
        self._words = WordBank(self._with_words, self._between)
        examples = examples or self._recorded_examples()
        asked = [e for e in examples if not e.before]
        self._asked = _ByIntent(asked)
        self._speakable = _ByIntent(e for e in asked if self._words.knows(e.transcript))
        self._later = _ByIntent(e for e in examples if e.before)
        self._recorded: dict[str, list[Recording]] = defaultdict(list)
        for recording in (*corpus.requests, *corpus.later):
            self._recorded[recording.transcript].append(recording)
        self._by_voice: dict[str, list[Recording]] = defaultdict(list)
        for recording in self._with_words:
            self._by_voice[recording.voice].append(recording)

    def _recorded_examples(self) -> list[Example]:
        found = {}
        for text in {r.text: None for r in self.corpus.requests}:
            answers = self.corpus.answers[text]
            words = tuple(answer.words for answer in answers)
            _, style, action = answers[0]
            found[text] = Example(
                "", text, (), words, style, "train", action=json.loads(action or "null")
            )
        return list(found.values())

    def batch(self, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and kinds, both ``[rows, length + 1]``, and hints ``[rows, length + 1, 4]``.

        The same step gives the same batch.
        """
        rng = np.random.default_rng([self.seed, step])
        drawn = [self.sequence(rng, length + 1) for _ in range(rows)]
        ids, kinds, hints = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        return ids, kinds, hints

    def sequence(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One sequence of exactly ``length`` tokens; the last turn is cut off."""
        v = self.vocabulary
        parts = [Part(_ids(*v.prefix), MASKED)]
        size = len(v.prefix)
        while size < length:
            name = self._names[rng.choice(len(self._names), p=self._shares)]
            turn = getattr(self, f"_{name}")(rng)
            more = sum(len(part.ids) for part in turn)
            if name == "followup" and size + more > length and len(parts) > 1:
                continue  # its end is what matters, and would be cut off
            parts += turn
            size += more
        ids = np.concatenate([part.ids for part in parts])[:length]
        kinds = np.concatenate([np.full(len(part.ids), part.kind) for part in parts])[:length]
        nothing = [np.full((len(part.ids), COLUMNS), UNKNOWN) for part in parts]
        hints = [n if p.hints is None else p.hints for p, n in zip(parts, nothing, strict=True)]
        return ids, kinds, np.concatenate(hints)[:length]

    # ------------------------------------------------------------------------ kinds of turn

    def _dialog(self, rng: np.random.Generator) -> list[Part]:
        request = _pick(rng, self.corpus.requests)
        return [*self._heard(rng, request), *self._answer(rng, request, spoken=True)]

    def _interrupted(self, rng: np.random.Generator) -> list[Part]:
        """What the agent makes of a reply that was interrupted: no end of it is to be learnt."""
        request, v = _pick(rng, self.corpus.requests), self.vocabulary
        answer = _pick(rng, self.corpus.answers[request.text])
        spoken = [
            r
            for r in self.corpus.replies.get(answer.words, ())
            if r.voice == REPLY_VOICE and r.words
        ]
        if not spoken:
            return self._dialog_text(rng)
        recording = _pick(rng, spoken)
        words, count = answer.words.split(), len(recording.words)
        heard = int(rng.integers(count + 1))
        _, last = self._between(recording, 0, heard)
        last = int(np.clip(last + rng.integers(-3, 4), 0, len(recording.ids)))
        kept = answer._replace(words=" ".join(words[: round(heard / count * len(words))])).plan
        plan = (
            self._text_turn(request.transcript, kept)
            if kept
            else self._written(v.text(request.transcript))
        )
        sound = delayed(self._hinter(recording))[:last]
        return [
            *self._heard(rng, request), *plan, Part(_ids(v.speech_tag), MASKED),
            Part(recording.ids[:last], REPLY_UNITS, sound), self._masked_end,
        ]  # fmt: skip

    def _dialog_text(self, rng: np.random.Generator) -> list[Part]:
        request = _pick(rng, self.corpus.requests)
        return [*self._heard(rng, request), *self._answer(rng, request, spoken=False)]

    def _typed(self, rng: np.random.Generator) -> list[Part]:
        request, v = _pick(rng, self.corpus.requests), self.vocabulary
        heard, *answer = self._answer(rng, request, spoken=True)
        return [Part(_ids(v.text_tag), MASKED), Part(heard.ids, OTHER), *answer]

    def _composed(self, rng: np.random.Generator) -> list[Part]:
        example = self._speakable.pick(rng)
        answer = self._text_turn(example.transcript, _answer(rng, example).plan)
        return [*self._composed_speech(rng, example.transcript), *answer, self._masked_end]

    def _composed_speech(self, rng: np.random.Generator, transcript: str) -> list[Part]:
        spans = self._words.speak(rng, transcript, lambda r: self._said_by_anybody(rng, r)[0])
        return self._listened(rng, self._joined(spans))

    def _chat(self, rng: np.random.Generator) -> list[Part]:
        example = self._asked.pick(rng)
        return self._written_turn(example.transcript, _answer(rng, example))

    def _written_turn(self, transcript: str, answer: Answer) -> list[Part]:
        """A request that was typed and its answer, not spoken."""
        heard, planned = self._text_turn(transcript, answer.plan)
        tag = _ids(self.vocabulary.text_tag)
        return [Part(tag, MASKED), Part(heard.ids, MASKED), planned, self._masked_end]

    def _followup(self, rng: np.random.Generator) -> list[Part]:
        if not self._later:
            return self._chat(rng)
        example = self._later.pick(rng)
        words, style, _ = _answer(rng, example)
        turns = (*example.before, Turn(example.text, words, style, example.action))
        live = rng.random() < LIVE
        last_aloud = rng.random() < ANSWERED_ALOUD
        parts: list[Part] = []
        for turn in turns:
            spoken = live or rng.random() < SPOKEN_TURNS
            aloud = live and (turn is not turns[-1] or last_aloud)
            parts += self._past_turn(rng, turn, spoken, aloud)
        return parts

    def _past_turn(
        self, rng: np.random.Generator, turn: Turn, spoken: bool, aloud: bool
    ) -> list[Part]:
        """One turn of a dialogue; ``spoken``: the request, ``aloud``: the reply."""
        said = domain.transcript(turn.request)
        answer = Answer(turn.reply, turn.style, action_text(turn.action))
        recordings, known = self._recorded.get(said), self._words.knows(said)
        if not spoken or not (recordings or known):
            return self._written_turn(said, answer)
        if recordings and (not known or rng.random() < RECORDED_TURNS):
            heard = self._heard(rng, _pick(rng, recordings))
        else:
            heard = self._composed_speech(rng, said)
        return [*heard, *self._reply(rng, said, answer, aloud)]

    def _text_turn(self, transcript: str, plan: str) -> list[Part]:
        both = self.vocabulary.text(transcript + SEPARATOR + plan)
        heard = len(self.vocabulary.text(transcript + SEPARATOR.rstrip()))
        return [Part(both[:heard], TRANSCRIPT), Part(both[heard:], REPLY_TEXT)]

    def _asr(self, rng: np.random.Generator) -> list[Part]:
        recording = _pick(rng, self._any)
        written = self.vocabulary.text(recording.transcript)
        return [*self._heard(rng, recording), *self._written(written), self._masked_end]

    def _phrase(self, rng: np.random.Generator) -> list[Part]:
        return self._phrases(rng, 1, longest=4)

    def _collage(self, rng: np.random.Generator) -> list[Part]:
        return self._phrases(rng, int(rng.integers(2, 5)), longest=3)

    def _phrases(self, rng: np.random.Generator, count: int, longest: int) -> list[Part]:
        """Speech of ``count`` phrases out of recordings of one voice, and their transcript."""
        v = self.vocabulary
        recordings = self._by_voice[_pick(rng, list(self._by_voice))]
        spans: list[Span] = []
        text: list[str] = []
        for _ in range(count):
            recording, _ = self._said_by_anybody(rng, _pick(rng, recordings))
            words = recording.words or []
            size = min(len(words), int(rng.integers(1, longest + 1)))
            a = int(rng.integers(len(words) - size + 1))
            first, last = self._between(recording, a, a + size)
            spans.append((recording, first, last))
            text += [w for w, _, _ in words[a : a + size]]
        written = v.text(" ".join(text).lower())
        heard = self._listened(rng, self._joined(spans))
        return [*heard, *self._written(written), self._masked_end]

    def _tts(self, rng: np.random.Generator) -> list[Part]:
        recording, v = _pick(rng, self._spoken), self.vocabulary
        text = v.text(recording.text)
        return [Part(_ids(v.text_tag), MASKED), Part(text, OTHER), *self._speak(recording)]

    def _speech(self, rng: np.random.Generator) -> list[Part]:
        tag, *rest = self._speak(_pick(rng, self._spoken))
        return [Part(tag.ids, MASKED), *rest]

    def _interleaved(self, rng: np.random.Generator) -> list[Part]:
        recording, v = _pick(rng, self._with_words), self.vocabulary
        words = recording.words or []
        cuts = _spans(rng, len(words))
        speaking = rng.random() < 0.2
        parts: list[Part] = []
        for a, b in pairwise(cuts):
            if speaking:
                first, last = self._between(recording, a, b)
                parts += [Part(_ids(v.speech_tag), OTHER), Part(recording.ids[first:last], OTHER)]
            else:
                text = " ".join(w for w, _, _ in words[a:b]).lower()
                parts += [Part(_ids(v.text_tag), OTHER), Part(v.text(text), OTHER)]
            speaking = not speaking
        return [Part(parts[0].ids, MASKED), *parts[1:], self._masked_end]

    # -------------------------------------------------------------------------------- pieces

    @property
    def _separator(self) -> np.ndarray:
        return self.vocabulary.text(SEPARATOR.rstrip())

    @property
    def _masked_end(self) -> Part:
        """An end that is never to be predicted: only there because the stream goes on."""
        return Part(_ids(self.vocabulary.eos), MASKED)

    def _heard(self, rng: np.random.Generator, recording: Recording) -> list[Part]:
        """The user's speech, and the tag after it."""
        recording, kind = self._said_by_anybody(rng, recording)
        return self._listened(rng, Speech(recording.ids, self._hinter(recording)), kind)

    def _listened(self, rng: np.random.Generator, speech: Speech, kind: int = MASKED) -> list[Part]:
        """The same for units from anywhere; half of them are disturbed."""
        v = self.vocabulary
        if self.noise > 0 and rng.random() < 0.5:
            speech, kind = self._disturb(rng, speech), MASKED
        return [
            Part(_ids(v.speech_tag), MASKED),
            Part(speech.ids, kind, delayed(speech.hints)),
            Part(_ids(v.text_tag), OTHER),
        ]

    def _joined(self, spans: list[Span]) -> Speech:
        """Runs of tokens out of recordings as one stream."""
        recording, first, _ = spans[0]
        if first > 0:  # speech always begins with its style
            spans = [(recording, 0, 1), *spans]
        ids = [recording.ids[a:b] for recording, a, b in spans]
        hints = [self._hinter(recording)[a:b] for recording, a, b in spans]
        return Speech(np.concatenate(ids), np.concatenate(hints))

    def _said_by_anybody(
        self, rng: np.random.Generator, recording: Recording
    ) -> tuple[Recording, int]:
        """The recording, or the same words in a voice that never was, and the kind of its units."""
        if rng.random() < self.revoiced:
            return self._bank.revoice(rng, recording), MASKED
        return recording, REQUEST_UNITS

    def _disturb(self, rng: np.random.Generator, speech: Speech) -> Speech:
        """Replace and drop phonetic units at a rate drawn for this recording; mistake its style."""
        ids, hints = speech
        rate = rng.uniform(0, self.noise)
        phonetic = np.isin(ids, self.vocabulary.phonetic)
        chance = rng.random(len(ids))
        other = _pick(rng, self._any).ids
        other = other[np.isin(other, self.vocabulary.phonetic)]
        substitutes = rng.choice(other, len(ids)) if len(other) else ids
        ids = np.where(phonetic & (chance < rate), substitutes, ids)
        if rng.random() < WRONG_STYLE:
            styles = np.isin(ids, self.vocabulary.style)
            ids = np.where(styles, self.vocabulary.style[rng.integers(STYLES)], ids)
        kept = ~(phonetic & (chance > 1 - rate / 3))
        return Speech(ids[kept], hints[kept])

    def _written(self, text: np.ndarray) -> list[Part]:
        return [Part(text, TRANSCRIPT), Part(self._separator, TRANSCRIPT)]

    def _answer(self, rng: np.random.Generator, request: Recording, spoken: bool) -> list[Part]:
        """Transcript, separator, plan, and the reply spoken in its style."""
        answer = _pick(rng, self.corpus.answers[request.text])
        return self._reply(rng, request.transcript, answer, spoken)

    def _reply(
        self, rng: np.random.Generator, transcript: str, answer: Answer, spoken: bool
    ) -> list[Part]:
        parts = self._text_turn(transcript, answer.plan)
        recordings = [
            r for r in self.corpus.replies.get(answer.words, ()) if r.voice == REPLY_VOICE
        ]
        fitting = [r for r in recordings if r.style == answer.style] or recordings
        if not spoken or not fitting:
            return [*parts, self._masked_end]
        tag, *speech = self._speak(_pick(rng, fitting))
        return [*parts, Part(tag.ids, REPLY_TEXT), *speech]

    def _speak(self, recording: Recording) -> list[Part]:
        v = self.vocabulary
        return [
            Part(_ids(v.speech_tag), OTHER),
            Part(recording.ids, REPLY_UNITS, delayed(self._hinter(recording))),
            Part(_ids(v.eos), REPLY_UNITS),
        ]

    @staticmethod
    def _between(recording: Recording, a: int, b: int) -> tuple[int, int]:
        """Range of the tokens of words ``a..b``; silence goes with the word before it."""
        words, starts = recording.words or [], recording.starts.tolist()

        def at(word: int) -> int:
            if word <= 0:
                return 0
            if word >= len(words):
                return len(starts)
            return bisect.bisect_left(starts, round(words[word][1] * SAMPLE_RATE))

        return at(a), at(b)


def _ids(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _answer(rng: np.random.Generator, example: Example) -> Answer:
    """One of the right answers."""
    return Answer(_pick(rng, example.replies), example.style, action_text(example.action))


class _ByIntent:
    """Draws examples so that intents with many do not drown the others."""

    def __init__(self, examples: Iterable[Example]) -> None:
        groups: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            groups[example.intent].append(example)
        self._groups = list(groups.values())
        roots = np.sqrt([len(group) for group in self._groups])
        self._shares = roots / max(1.0, roots.sum())

    def __bool__(self) -> bool:
        return bool(self._groups)

    def pick(self, rng: np.random.Generator) -> Example:
        group = self._groups[rng.choice(len(self._groups), p=self._shares)]
        return group[rng.integers(len(group))]


def _spans(rng: np.random.Generator, words: int) -> list[int]:
    """Word boundaries at which the modality switches; about every third, both ends included."""
    inner = [i for i in range(1, words) if rng.random() < 1 / 3]
    return [0, *inner, words]
