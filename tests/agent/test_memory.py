"""After an interruption the model remembers what was heard, to the token, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from virtual_time import VirtualLoudspeaker, VirtualWorker, run

from agent.config import Config
from agent.conversation import State
from agent.events import Event, Interrupted, ReplyAudio, Spoken, TurnEnded
from agent.models import Models
from agent.session import Session
from stages import SAMPLE_RATE
from stages.lm import LanguageModel
from stages.text import IncrementalDecoder

CHUNK = 320


class Conversation:
    """A question, and as soon as ``heard`` samples of the answer were heard, the question again."""

    def __init__(self, models: Models, question: np.ndarray, heard: int | None) -> None:
        self.events: list[Event] = []
        self.ids: list[tuple[int, ...]] = []  # the cache at the end of each turn
        self.decoded: list[dict[int, int]] = []  # tokens decoded up to then, by position
        run(self._talk(models, question, heard))

    async def _talk(self, models: Models, question: np.ndarray, heard: int | None) -> None:
        loudspeaker = VirtualLoudspeaker()
        clock = asyncio.get_running_loop().time

        async def paced(wave: np.ndarray) -> AsyncIterator[np.ndarray]:
            for start in range(0, len(wave), CHUNK):
                await asyncio.sleep(CHUNK / SAMPLE_RATE)
                yield wave[start : start + CHUNK]

        async def user() -> AsyncIterator[np.ndarray]:
            silence = np.zeros(CHUNK, np.float32)
            async for chunk in paced(question):
                yield chunk
            while session.state is not State.ANSWERING:
                async for chunk in paced(silence):
                    yield chunk
            if heard is None:
                return
            while loudspeaker.heard < heard:
                async for chunk in paced(silence):
                    yield chunk
            async for chunk in paced(question):
                yield chunk

        decoded: dict[int, int] = {}
        decode = models.lm.decode

        def noting(*arguments: Any) -> int:
            token = decode(*arguments)
            decoded[models.lm.length - 1] = token
            return token

        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(models.lm, "decode", noting)
        async with Session(
            models,
            models.config,
            clock,
            lambda name: VirtualWorker(lambda: 0.0),  # type: ignore[arg-type, return-value]
        ) as session:
            async for event in session.converse(user(), loudspeaker):
                self.events.append(event)
                if isinstance(event, TurnEnded):
                    self.ids.append(models.lm.ids)
                    self.decoded.append(dict(decoded))
        monkeypatch.undo()

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module", params=["text-then-speech", "speech"])
def models(request: pytest.FixtureRequest, kit: Path) -> Models:
    root = kit / "checkpoints"
    found = sorted((root / "spiritlm_model").glob("*expressive*"))
    if not found:
        pytest.skip("this kit has no expressive language model")
    sampling = {"seed": 3}
    return Models.load(
        Config.model_validate(
            {
                "model": {"root": str(root), "lm": found[0].name, "runtime": "torch"},
                "sampling": {"text": sampling, "speech": sampling},
                "reply": {
                    "mode": request.param,
                    "max_seconds": 2.0,
                    "max_text_tokens": 12,
                    "separator": "",
                },
                "turns": {"adapt": False},
            }
        )
    )


@pytest.fixture(scope="module")
def question(kit: Path) -> np.ndarray:
    wave, rate = soundfile.read(kit / "audio" / "mls.wav", dtype="float32")
    assert rate == SAMPLE_RATE
    return np.asarray(wave[: 3 * SAMPLE_RATE // 2])


@pytest.mark.parametrize("heard", [800, 16_000])
def test_the_cache_holds_the_prompt_and_what_was_heard(
    models: Models, question: np.ndarray, heard: int
) -> None:
    talk = Conversation(models, question, heard)
    (interruption,) = talk.of(Interrupted)
    assert isinstance(interruption, Interrupted) and interruption.reason == "barge-in"
    assert heard <= interruption.heard
    t, cache, decoded = models.tokenizer, list(talk.ids[0]), talk.decoded[0]
    # The reply as the model made it: everything decoded, and the tag where its text was cut short.
    begin = min(decoded)
    reply = [decoded.get(at, t.speech_tag) for at in range(begin, max(decoded) + 1)]
    planned = models.config.reply.mode == "text-then-speech"
    words = reply.index(t.speech_tag) if planned else 0
    spoken = "".join(e.text for e in talk.of(Spoken) if isinstance(e, Spoken) and e.turn == 1)
    decoder, length, kept = IncrementalDecoder(t), 0, 0
    for token in reply[:words]:
        length += sum(len(piece) for piece in decoder.push(token) if isinstance(piece, str))
        kept += length <= len(spoken)
    spans = (s for e in talk.of(ReplyAudio) if isinstance(e, ReplyAudio) and e.turn == 1
             for s in e.units)  # fmt: skip
    units = max(span.token + 1 for span in spans if span.start < interruption.heard)
    tag = [t.speech_tag] if planned else []
    sounds = reply[words + len(tag) :][:units]
    assert len(sounds) == units
    remembered = [*reply[:kept], *tag, *sounds, t.eos]
    # The interruption's own turn may have begun by then.
    assert cache[begin:] in (remembered, [*remembered, t.speech_tag])


def test_logits_are_those_of_a_fresh_prefill(models: Models, question: np.ndarray) -> None:
    talk = Conversation(models, question, 9_600)
    assert len(talk.ids) == 2, "the interruption is a request of its own, and is answered"
    fresh = LanguageModel.load(models.layout)
    fresh.append(models.lm.ids)
    np.testing.assert_allclose(models.lm.logits, fresh.logits, atol=1e-4)
    first, second = talk.ids
    assert second[: len(first)] == first, "the next turn goes on from exactly that context"
