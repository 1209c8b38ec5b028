"""What the language model has learnt: does it hear held-out requests, and answer them rightly?

Both are judged as text, decoded greedily; how it sounds is for ``recipes evaluate``. An answer is
right when its words and its action are. The requests with which the first nano was measured and
those of the wider domain are told apart, and so are spoken and typed ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.dialogues import Dialogues, Example, read_plan
from recipes.domain import transcript
from recipes.lm_corpus import REPLY_VOICE, Corpus, Recording, Vocabulary
from recipes.text_tokenizer import SEPARATOR
from stages.lm import LanguageModel, Sampling

MEASURED = 40  # held-out requests of each kind
LONGEST_ANSWER = 110  # tokens of text
SHOWN = 3  # examples of each kind in the log


@dataclass(frozen=True)
class Question:
    """A held-out request; typed where there is no recording."""

    example: Example
    recording: Recording | None = None


def heldout_questions(
    corpus: Corpus, world: Dialogues, count: int = MEASURED
) -> dict[str, list[Question]]:
    """A fixed choice of ``count`` held-out requests of each kind.

    ``first`` and ``added`` are spoken, in every voice but that of the replies; ``typed_first`` and
    ``typed_added`` are typed. Those added have follow-ups among them.
    """
    heldout = world.split("heldout")
    by_transcript = {example.transcript: example for example in reversed(heldout)}
    spoken = [
        Question(by_transcript[r.transcript], r)
        for r in (*corpus.requests, *corpus.later)
        if r.voice != REPLY_VOICE and r.transcript in by_transcript
    ]
    typed = [Question(example) for example in heldout]
    return {
        name: _chosen([q for q in questions if q.example.added == added], count)
        for name, questions, added in (
            ("first", spoken, False),
            ("added", spoken, True),
            ("typed_first", typed, False),
            ("typed_added", typed, True),
        )
    }


def _chosen(questions: Sequence[Question], count: int) -> list[Question]:
    order = np.random.default_rng(1).permutation(len(questions))
    return [questions[i] for i in order[:count]]


def ask(lm: LanguageModel, vocabulary: Vocabulary, question: Question) -> tuple[str, str]:
    """What the model hears and what it plans to answer, both greedily, as text.

    Turns before the request stand before it as if they had been typed.
    """
    v, recording = vocabulary, question.recording
    lm.reset()
    lm.append(v.prefix)
    for turn in question.example.before:
        past = transcript(turn.request) + SEPARATOR + turn.plan
        lm.append([v.text_tag, *v.text(past), v.eos])
    if recording is None:
        said = question.example.transcript
        lm.append([v.text_tag, *v.text(said + SEPARATOR.rstrip())])
    else:
        lm.append([v.speech_tag, *recording.ids.tolist(), v.text_tag])
    ids: list[int] = []
    while len(ids) < LONGEST_ANSWER:
        ids.append(lm.decode(Sampling(greedy=True)))
        if ids[-1] in (v.speech_tag, v.eos):
            break
    written = v.processor.decode(ids[:-1])
    if recording is None:
        return said, written.strip()
    heard, _, plan = written.partition(SEPARATOR.strip())
    return heard.strip(), plan.strip()


@dataclass(frozen=True)
class _Result:
    question: Question
    heard: str
    plan: str
    words_right: bool
    action_right: bool


def measure(
    folder: Path,
    vocabulary: Vocabulary,
    questions: Mapping[str, Sequence[Question]],
    world: Dialogues,
) -> dict[str, Any]:
    """Of each kind of ``questions``: how many, share of right answers (``right``), of right
    actions among the answers that have one (``action``), of those spoken the word error rate of
    what was heard (``wer``); and a few ``examples`` of all."""
    lm = LanguageModel.load(folder)
    row: dict[str, Any] = {}
    examples: list[str] = []
    for name, some in questions.items():
        results = [_judged(question, *ask(lm, vocabulary, question), world) for question in some]
        if results:
            row[name] = _scores(results)
            examples += [f"{name}: {r.heard} | {r.plan}" for r in results[:SHOWN]]
    return row | {"examples": examples}


def _judged(question: Question, heard: str, plan: str, world: Dialogues) -> _Result:
    action, words = read_plan(plan)
    wanted = question.example
    return _Result(question, heard, plan, world.is_right(wanted, words), action == wanted.action)


def _scores(results: Sequence[_Result]) -> dict[str, Any]:
    import jiwer

    acting = [r.action_right for r in results if r.question.example.action is not None]
    spoken = [r for r in results if r.question.recording is not None]
    scores: dict[str, Any] = {
        "n": len(results),
        "right": round(float(np.mean([r.words_right and r.action_right for r in results])), 4),
    }
    if acting:
        scores["action"] = round(float(np.mean(acting)), 4)
    if spoken:
        said = [r.question.example.transcript for r in spoken]
        scores["wer"] = round(float(jiwer.wer(said, [r.heard or "-" for r in spoken])), 4)
    return scores
