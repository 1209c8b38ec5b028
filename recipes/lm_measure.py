"""What the language model has learnt: does it hear held-out requests, and answer them rightly?

Both are judged as text, decoded greedily; how it sounds is for ``recipes evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes import domain
from recipes.lm_corpus import REPLY_VOICE, Corpus, Recording, Vocabulary
from stages.lm import LanguageModel, Sampling

MEASURED = 40  # held-out requests
LONGEST_ANSWER = 70  # tokens of text


def heldout_requests(corpus: Corpus, count: int = MEASURED) -> list[Recording]:
    """A fixed choice of held-out requests in every voice but that of the replies."""
    others = [r for r in corpus.requests if r.voice != REPLY_VOICE]
    order = np.random.default_rng(1).permutation(len(others))
    return [others[i] for i in order[:count]]


def listen(lm: LanguageModel, vocabulary: Vocabulary, recording: Recording) -> tuple[str, str]:
    """What the model hears and what it wants to answer, both greedily, as text."""
    lm.reset()
    lm.append([vocabulary.bos, vocabulary.boundary, vocabulary.speech_tag])
    lm.append([*recording.ids.tolist(), vocabulary.text_tag])
    ids: list[int] = []
    while len(ids) < LONGEST_ANSWER:
        ids.append(lm.decode(Sampling(greedy=True)))
        if ids[-1] in (vocabulary.speech_tag, vocabulary.eos):
            break
    heard, _, answer = vocabulary.processor.DecodeIds(ids[:-1]).partition("|")
    return heard.strip(), answer.strip()


def measure(
    folder: Path, vocabulary: Vocabulary, requests: Sequence[Recording], world: domain.Domain
) -> dict[str, Any]:
    """Transcription word error rate and rate of right replies (as text) on ``requests``."""
    import jiwer

    lm = LanguageModel.load(folder)
    results = [listen(lm, vocabulary, r) for r in requests]
    right = 0
    for recording, (_, answer) in zip(requests, results, strict=True):
        wanted = world.by_transcript[recording.transcript]
        right += world.is_right(wanted.intent, dict(wanted.slots), answer)
    heard = [h or "-" for h, _ in results]
    return {
        "wer": round(float(jiwer.wer([r.transcript for r in requests], heard)), 4),
        "right": round(right / len(requests), 4),
        "examples": [
            f"{r.transcript} -> {h} | {a}"
            for r, (h, a) in zip(requests[:6], results[:6], strict=True)
        ],
    }
