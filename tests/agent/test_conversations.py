"""Ten thousand random conversations in virtual time: nothing wedges, overlaps or is misremembered.

The session, the turn-taking and the dialogue are the real ones; the models, the loudspeaker and the
user are played. People pause, cough, interrupt and talk on; devices vanish; stages are slow.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_time import VirtualLoudspeaker, VirtualWorker, run

from agent.config import Config
from agent.conversation import State
from agent.events import Event, Interrupted, StateChanged, TurnEnded, TurnStarted
from agent.reply import Dialogue
from agent.session import Session
from stages import SAMPLE_RATE
from stages.checkpoint import find_layout
from stages.encoder import Revision
from stages.lm import Sampling
from stages.text import Tokenizer
from stages.units import Unit, UnitFrame
from stages.vad import VadEvent, VoiceActivityDetector
from stages.vocoder_stream import AudioChunk, UnitSpan

CONVERSATIONS, AT_ONCE = 10_000, 500
FRAME, CHUNK = 480, 1440  # 30 ms, the longest that the detector knows, and three of them
UNIT = 640
STALL = 5.0


class PlayedModel:
    """A language model that says a few words and some units, all of them named after the turn."""

    capacity = 1200

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer, self._rng = tokenizer, rng
        self.ids: list[int] = []
        self.turn = 0
        self._left = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        assert len(self.ids) + len(ids) <= self.capacity
        self.ids += ids
        self._left = 0

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]
        self._left = 0

    def decode(self, sampling: Sampling, mask: Any) -> int:
        t = self._tokenizer
        words = bool(mask[t.speech_tag])
        self._left = (self._left or self._rng.choice([2, 6, 40])) - 1
        if not self._left:
            token = t.speech_tag if words else t.eos
        else:
            token = WORDS[self._left % len(WORDS)] if words else t.unit_id("Hu", self.turn % 400)
        self.ids.append(token)
        return token


WORDS: list[int] = []


class PlayedVad(VoiceActivityDetector):
    """The real detector, told what is voiced."""

    def _is_voiced(self, frame: np.ndarray) -> bool:
        return bool(frame[0])

    def push(self, item: np.ndarray) -> list[VadEvent]:
        idle = self._state.name == "IDLE" and not len(self._pending)
        if idle and len(item) == self._frame and not (item[0] or any(self._votes)):
            self._now += len(item)  # silence in silence changes nothing else
            self._history = np.zeros(self._pre_roll + self._window * self._frame, np.float32)
            return []
        return super().push(item)


class PlayedEncoder:
    """A unit for each piece of sound; told exactly, the last one is another."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.told: list[UnitFrame] = []

    def reset(self) -> None:
        self.told = []

    def push(self, wave: np.ndarray) -> list[Revision]:
        return self._tell(len(self.told), self._rng.randrange(400))

    def settle(self) -> list[Revision]:
        return self._tell(max(0, len(self.told) - 1), self._rng.randrange(400))

    def _tell(self, keep: int, index: int) -> list[Revision]:
        frame = UnitFrame("Hu", index, 0, final=False)
        self.told = [*self.told[:keep], frame]
        return [Revision(keep, [frame])]


class PlayedVocoder:
    """640 equal samples for each unit."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def push(self, unit: Unit) -> list[AudioChunk]:
        start = self.count * UNIT
        span = UnitSpan(self.count, self.count, start, start + UNIT)
        self.count += 1
        return [AudioChunk(np.full(UNIT, unit.index + 1, np.float32), start, (span,))]

    def flush(self) -> list[AudioChunk]:
        return []


class Loudspeaker(VirtualLoudspeaker):
    """Checks what it is given to play."""

    session: Session

    def play(self, samples: np.ndarray) -> None:
        assert self.session.state is State.ANSWERING
        turn = self.session._taking.turn
        assert float(samples[0]) == turn % 400 + 1, "a past turn is played"
        super().play(samples)


class Played:
    """Stands where :class:`agent.models.Models` does, and keeps the ledger of what was heard."""

    def __init__(self, tokenizer: Tokenizer, config: Config, rng: random.Random) -> None:
        self.rng, self.tokenizer, self.config = rng, tokenizer, config
        self.lm = PlayedModel(tokenizer, rng)
        self.the_encoder = PlayedEncoder(rng)
        self.ledger: list[list[int]] = []
        models = self

        class Remembering(Dialogue):
            """Writes down what it ought to remember, from what it is told alone."""

            def begin(self) -> None:
                super().begin()
                models.lm.turn += 1
                models.request: list[int] = []
                models.typed: list[int] | None = None

            def read(self, request: str) -> None:
                super().read(request)
                models.lm.turn += 1
                models.typed = tokenizer.encode(f"[Text]{request}", bos=False)[1:]

            def say(self, words: str) -> None:
                super().say(words)
                models.lm.turn += 1
                models.typed = [tokenizer.text_tag]

            def hear(self, keep: int, frames: Sequence[UnitFrame]) -> None:
                super().hear(keep, frames)
                heard = tokenizer.unit_ids(frames)
                models.request = [*models.request[:keep], *heard]

            def end(self, units: int | None = None, characters: int = 0) -> None:
                before, turn = list(models.lm.ids), self._turn
                assert turn is not None
                models.remember(before[turn.request_end :], units, characters)
                super().end(units, characters)
                models.check(self.prefix)

            def abandon(self) -> None:
                super().abandon()
                models.check(self.prefix)

        self.make = Remembering

    def remember(self, reply: list[int], units: int | None, characters: int) -> None:
        """What the reply in the cache is to become when so much of it was heard."""
        t = self.tokenizer
        if not reply:
            return
        speech = reply.index(t.speech_tag) if t.speech_tag in reply else len(reply)
        typed = self.typed is not None and reply[0] != t.text_tag
        words = reply[0 if typed else 1 : speech]
        said = [i for i in reply[speech + 1 :] if i != t.eos]
        if units is not None:
            lengths = np.cumsum([len(piece) for piece in t.pieces(words)])
            if typed and words and t.pieces(words)[0].startswith("\u2581"):
                lengths -= 1  # the blank between a typed request and the reply is not spoken
            words, said = words[: int((lengths <= characters).sum())], said[:units]
        request = [t.speech_tag, *self.request, t.text_tag]
        opening = request if self.typed is None else self.typed
        self.ledger.append([*opening, *words, t.speech_tag, *said, t.eos])

    def check(self, prefix: Sequence[int]) -> None:
        """The cache holds the latest turns of the ledger, whole, and nothing else."""
        ids, at = self.lm.ids, len(prefix)
        if not ids:
            return
        assert ids[:at] == list(prefix)
        rest = ids[at:]
        for turn in reversed(self.ledger):
            if not rest:
                break
            assert rest[-len(turn) :] == turn, (rest[-len(turn) :], turn)
            del rest[-len(turn) :]
        assert not rest

    def vad(self) -> PlayedVad:
        return PlayedVad(self.config.vad.settings())

    def encoder(self) -> PlayedEncoder:
        return self.the_encoder

    def vocoder(self) -> PlayedVocoder:
        return PlayedVocoder()

    def turn_end(self) -> None:
        return None

    def dialogue(self) -> Dialogue:
        return self.make(self.lm, self.tokenizer, self.config.reply, Sampling(), Sampling())  # type: ignore[arg-type]


def script(rng: random.Random) -> list[tuple[str, float]]:
    """What one user does: (speech, silence, typing or trouble, seconds)."""
    acts: list[tuple[str, float]] = [("silence", rng.uniform(0.1, 0.6))]
    for _ in range(rng.randint(1, 2)):
        for _ in range(rng.randint(1, 2)):
            acts.append(("speech", rng.uniform(0.2, 1.0)))
            acts.append(("silence", rng.uniform(0.1, 0.9)))
        event = rng.random()
        if event < 0.25:
            acts.append(("speech", rng.uniform(0.03, 0.25)))  # a cough
        elif event < 0.55:
            acts.append(("speech", rng.uniform(0.4, 0.8)))  # barges in, or goes on
        elif event < 0.6:
            acts.append((rng.choice(["input", "output", "interrupt", "deaf"]), 0.0))
        if rng.random() < 0.15:
            acts.append((rng.choice(["ask", "say"]), 0.0))
        acts.append(("silence", rng.uniform(0.3, 1.2)))
    return acts


async def conversation(tokenizer: Tokenizer, seed: int) -> list[Event]:
    """Play one conversation; returns what was told."""
    rng = random.Random(seed)
    sizes = rng.choice([2, 16])
    config = Config.model_validate(
        {
            "vad": {"frame_ms": 30, "hangover_ms": 300, "trailing_ms": rng.choice([30, 150])},
            "reply": {"separator": "", "context_tokens": 160},
            "turns": {
                "speculate": rng.random() < 0.8, "half_duplex": rng.random() < 0.1,
                "stall_seconds": STALL, "barge_in_ms": 300,
            },
            "channels": dict.fromkeys(("speech", "units", "reply", "events"), sizes),
        }
    )  # fmt: skip
    models = Played(tokenizer, config, rng)
    pace = rng.choice([0.0, 0.0, 0.003])
    slow = 0.003 if rng.random() < 0.1 else 0.0  # share of calls that take longer than a stall

    def delay() -> float:
        return STALL * 1.2 if rng.random() < slow else pace

    speaker = Loudspeaker(rng.uniform(0.0, 0.1))
    clock = asyncio.get_running_loop().time
    events: list[Event] = []
    typing: list[asyncio.Future[int]] = []
    async with Session(models, config, clock, lambda name: VirtualWorker(delay)) as session:  # type: ignore[arg-type, return-value]
        speaker.session = session

        async def user() -> AsyncIterator[np.ndarray]:
            for act, seconds in script(rng):
                if act == "interrupt":
                    await session.interrupt()
                elif act in ("ask", "say"):
                    work = session.ask("one two") if act == "ask" else session.say("three four")
                    typing.append(asyncio.ensure_future(work))
                elif act == "deaf":
                    speaker.freeze()
                elif act in ("input", "output"):
                    await session.device_lost(act)
                for _ in range(int(seconds * SAMPLE_RATE) // CHUNK):
                    await asyncio.sleep(CHUNK / SAMPLE_RATE)
                    yield np.full(CHUNK, float(act == "speech"), np.float32)

        async for event in session.converse(user(), speaker):
            events.append(event)
    for outcome in await asyncio.gather(*typing, return_exceptions=True):
        if isinstance(outcome, BaseException):
            assert "the conversation is over" in str(outcome)
        else:
            assert outcome in {event.turn for event in events if isinstance(event, TurnEnded)}
    return events


@pytest.fixture(scope="module")
def tokenizer(kit: Path) -> Tokenizer:
    made = Tokenizer.load(find_layout(kit / "checkpoints", version="expressive"))
    WORDS[:] = made.encode("[Text]one two three four", bos=False)[2:]
    return made


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, CONVERSATIONS, AT_ONCE))
def test_no_conversation_wedges_overlaps_or_is_misremembered(
    tokenizer: Tokenizer, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.session._PULSE", 0.06)  # a third of the events
    seen = {"turns": 0, "interrupted": 0, "complete": 0, "refuted": 0, "stalled": 0}
    for seed in range(first, first + AT_ONCE):
        events = run(conversation(tokenizer, seed))
        started = [e.turn for e in events if isinstance(e, TurnStarted)]
        ended = [e.turn for e in events if isinstance(e, TurnEnded)]
        assert started == sorted(set(started)) and ended == started, f"seed {seed}"
        states = [e.state for e in events if isinstance(e, StateChanged)]
        assert states[-1:] in ([], ["listening"]), f"seed {seed}"
        traces = [e.trace for e in events if isinstance(e, TurnEnded)]
        seen["turns"] += len(started)
        seen["interrupted"] += sum(isinstance(e, Interrupted) for e in events)
        seen["complete"] += sum(t.ended == "complete" for t in traces)
        seen["refuted"] += sum(t.counts.get("refuted", 0) for t in traces)
        seen["stalled"] += sum("nothing moved" in t.ended for t in traces)
    assert all(seen.values()), f"the conversations were too tame: {seen}"
