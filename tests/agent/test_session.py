"""The conversation's logic, with scripted stages: order, backpressure, cancelling, clean ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from agent.config import Config
from agent.events import ActionChosen, Event, Heard, ReplyAudio, ReplyText, TurnEnded, TurnStarted
from agent.reply import Action, HeardText, Piece, SaidText, SaidUnit, Steps
from agent.session import Session
from stages import SAMPLE_RATE
from stages.encoder import Revision
from stages.units import Unit, UnitFrame
from stages.vad import SpeechAudio, SpeechEnded, SpeechStarted, VadEvent
from stages.vocoder import VocoderError
from stages.vocoder_stream import AudioChunk, UnitSpan

CHUNK = 320


class ScriptedVad:
    """Loud chunks are speech; the first quiet one after them is the endpoint."""

    def __init__(self) -> None:
        self.position, self.speaking, self.hangover = 0, False, 0

    @property
    def in_utterance(self) -> bool:
        return self.speaking

    def push(self, wave: np.ndarray) -> list[VadEvent]:
        start, self.position = self.position, self.position + len(wave)
        events: list[VadEvent] = []
        if wave.max() > 0:
            if not self.speaking:
                events.append(SpeechStarted(start))
            self.speaking = True
            events.append(SpeechAudio(wave, start))
        elif self.speaking:
            self.speaking = False
            events.append(SpeechEnded(end_of_speech=start, endpoint=self.position))
        return events

    def flush(self) -> list[VadEvent]:
        return [SpeechEnded(self.position, self.position)] if self.speaking else []


class ScriptedEncoder:
    """One unit for each chunk, its number taken from the loudness."""

    def __init__(self) -> None:
        self.frames: list[UnitFrame] = []

    def reset(self) -> None:
        self.frames = []

    def push(self, wave: np.ndarray) -> list[Revision]:
        self.frames.append(UnitFrame("Hu", round(float(wave.max()) * 100), 0, final=False))
        return [Revision(len(self.frames) - 1, self.frames[-1:])]

    def settle(self) -> list[Revision]:
        return []


class ScriptedDialogue:
    """Says the units it heard, ``times`` over, and writes down what was asked of it."""

    def __init__(self, times: int = 1, each: Callable[[], None] = lambda: None) -> None:
        self.times, self.each = times, each
        self.heard: list[int] = []
        self.log: list[str] = []
        self.counts = {"prefilled_tokens": 0}
        self.memory: list[list[int]] = []

    def begin(self) -> None:
        self.log.append("begin")
        self.heard = []

    def hear(self, keep: int, frames: Sequence[UnitFrame]) -> None:
        self.heard = [*self.heard[:keep], *(f.index for f in frames)]

    def abandon(self) -> None:
        self.log.append("abandon")

    def end(self, units: int | None, characters: int) -> None:
        self.log.append("end" if units is None else f"end at {units}")

    def reply(self) -> Steps:
        try:
            yield HeardText(" ".join(map(str, self.heard)))
            yield SaidText("I heard ")
            yield None
            yield from self.units()
        finally:
            self.log.append("close")

    def units(self) -> Iterator[Piece]:
        for index in self.heard * self.times:
            self.each()
            yield SaidUnit(Unit("Hu", index))


class ScriptedVocoder:
    """A frame of 640 equal samples for each unit."""

    def __init__(self) -> None:
        self.samples = 0

    def reset(self) -> None:
        self.samples = 0

    def push(self, unit: Unit) -> list[AudioChunk]:
        if unit.index == 66:
            raise VocoderError("unit 66 has no sound")
        at = self.samples // 640
        span = UnitSpan(at, at, self.samples, self.samples + 640)
        wave = np.full(640, unit.index / 100, np.float32)
        chunk = AudioChunk(wave, self.samples, (span,))
        self.samples += 640
        return [chunk]

    def flush(self) -> list[AudioChunk]:
        return []


class ScriptedModels:
    """Stands where :class:`agent.models.Models` does."""

    def __init__(self, dialogue: ScriptedDialogue) -> None:
        self._dialogue = dialogue

    def vad(self) -> ScriptedVad:
        return ScriptedVad()

    def encoder(self) -> ScriptedEncoder:
        return ScriptedEncoder()

    def turn_end(self) -> None:
        return None

    def vocoder(self) -> ScriptedVocoder:
        return ScriptedVocoder()

    def dialogue(self) -> ScriptedDialogue:
        return self._dialogue


def speech(*units: int) -> list[np.ndarray]:
    """An utterance: a chunk for each unit, then the silence that ends it."""
    loud = [np.full(CHUNK, unit / 100, np.float32) for unit in units]
    return [*loud, np.zeros(CHUNK, np.float32)]


async def stream(chunks: Sequence[np.ndarray]) -> AsyncIterator[np.ndarray]:
    for chunk in chunks:
        yield chunk


def session(dialogue: ScriptedDialogue, **settings: Any) -> Session:
    config = Config.model_validate(settings)
    return Session(ScriptedModels(dialogue), config)  # type: ignore[arg-type]


def converse(dialogue: ScriptedDialogue, *chunks: np.ndarray, **settings: Any) -> list[Event]:
    async def run() -> list[Event]:
        async with session(dialogue, **settings) as talk:
            return [event async for event in talk.converse(stream(chunks))]

    return asyncio.run(run())


def of(kind: type, events: Sequence[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before, "a thread was left behind"


def test_an_utterance_is_heard_answered_and_traced() -> None:
    events = converse(ScriptedDialogue(), *speech(11, 12))
    assert isinstance(events[0], TurnStarted) and isinstance(events[-1], TurnEnded)
    assert of(Heard, events)[0].text == "11 12"
    assert of(ReplyText, events)[0].text == "I heard "
    audio = of(ReplyAudio, events)
    assert [round(float(a.samples[0]) * 100) for a in audio] == [11, 12]
    assert [a.first_sample for a in audio] == [0, 640]
    trace = events[-1].trace
    assert list(trace.milliseconds) == [
        "end_of_speech", "endpoint", "encoder_done", "prefill_done", "first_token", "first_unit",
        "first_sample", "last_sample",
    ]  # fmt: skip
    times = list(trace.milliseconds.values())
    assert times == sorted(times)
    assert trace.reply_samples == 1280
    assert trace.ended == "complete"


def test_an_action_is_told_before_the_words_and_stands_in_the_trace() -> None:
    class Acting(ScriptedDialogue):
        def reply(self) -> Steps:
            yield Action({"units": list(self.heard)})
            yield from super().reply()

    first, second = speech(11), speech(12)
    events = converse(Acting(), *first, *second)
    assert [e.action for e in of(ActionChosen, events)] == [{"units": [11]}, {"units": [12]}]
    kinds = [type(event) for event in events]
    assert kinds.index(ActionChosen) < kinds.index(ReplyText)
    assert [e.trace.action for e in of(TurnEnded, events)] == [{"units": [11]}, {"units": [12]}]


def test_every_utterance_of_a_recording_gets_its_own_turn_in_order() -> None:
    chunks = [chunk for n in range(1, 21) for chunk in speech(n)]
    events = converse(ScriptedDialogue(), *chunks)
    assert [event.turn for event in of(TurnEnded, events)] == list(range(1, 21))
    assert [event.text for event in of(Heard, events)] == [str(n) for n in range(1, 21)]


def test_silence_is_no_turn() -> None:
    assert converse(ScriptedDialogue(), *[np.zeros(CHUNK, np.float32)] * 50) == []


def test_speech_that_runs_into_the_end_of_the_recording_is_answered() -> None:
    events = converse(ScriptedDialogue(), *speech(5, 6)[:-1])
    assert of(Heard, events)[0].text == "5 6"


def test_a_slow_reader_holds_everything_back_and_nothing_grows() -> None:
    async def run() -> TurnEnded:
        sizes = {"speech": 4, "units": 4, "reply": 4, "events": 4}
        async with session(ScriptedDialogue(times=200), channels=sizes) as talk:
            ended = None
            async for event in talk.converse(stream(speech(*range(1, 60)))):
                await asyncio.sleep(0)
                ended = event
            assert isinstance(ended, TurnEnded)
            return ended

    trace = asyncio.run(run()).trace
    for counters in trace.channels.values():
        assert counters["high_water"] <= 4
        assert counters["dropped"] == 0


def test_an_interrupted_reply_stops_at_once_and_its_turn_still_ends() -> None:
    dialogue = ScriptedDialogue(times=100_000)

    async def run() -> tuple[list[Event], list[Event]]:
        before: list[Event] = []
        after: list[Event] = []
        async with session(dialogue, reply={"max_seconds": 600}) as talk:
            async for event in talk.converse(stream(speech(7))):
                (after if talk_over else before).append(event)
                if len(of(ReplyAudio, before)) == 3 and not talk_over:
                    talk_over.append(True)
                    await talk.interrupt()
        return before, after

    talk_over: list[bool] = []
    _, after = asyncio.run(run())
    assert not of(ReplyAudio, after), "nothing of a past turn is played"
    assert [event.trace.ended for event in of(TurnEnded, after)] == ["interrupted"]
    assert dialogue.log == ["begin", "close", "end at 3"]


def test_the_turn_after_an_interruption_is_answered() -> None:
    dialogue = ScriptedDialogue(times=3000)

    async def run() -> list[Event]:
        go_on = asyncio.Event()

        async def source() -> AsyncIterator[np.ndarray]:
            for chunk in speech(7):
                yield chunk
            await go_on.wait()
            dialogue.times = 1
            for chunk in speech(8):
                yield chunk

        events: list[Event] = []
        async with session(dialogue, reply={"max_seconds": 600}) as talk:
            async for event in talk.converse(source()):
                events.append(event)
                if isinstance(event, ReplyAudio) and not go_on.is_set():
                    await talk.interrupt()
                    go_on.set()
        return events

    events = asyncio.run(run())
    ends = {event.turn: event.trace.ended for event in of(TurnEnded, events)}
    assert ends == {1: "interrupted", 2: "complete"}
    assert of(Heard, events)[-1].text == "8"


def test_a_reply_is_cut_at_its_limit() -> None:
    dialogue = ScriptedDialogue(times=10_000)
    events = converse(dialogue, *speech(9), reply={"max_seconds": 0.5})
    samples = sum(len(event.samples) for event in of(ReplyAudio, events))
    assert samples == SAMPLE_RATE // 2
    assert of(TurnEnded, events)[0].trace.ended == "long enough"
    assert dialogue.log == ["begin", "close", "end at 13"], "it remembers what was spoken"


def test_the_next_turn_begins_when_the_reply_before_has_been_spoken() -> None:
    dialogue = ScriptedDialogue(times=40)
    converse(dialogue, *speech(9), *speech(8), reply={"max_seconds": 0.5})
    assert dialogue.log == ["begin", "close", "end at 13"] * 2


def test_a_reply_that_falls_silent_is_over() -> None:
    class Fading(ScriptedDialogue):
        def units(self) -> Iterator[Piece]:
            yield SaidUnit(Unit("Hu", 50))
            while True:
                yield SaidUnit(Unit("Hu", 0))

    limits = {"trailing_silence_s": 1.0, "max_seconds": 60}
    events = converse(Fading(), *speech(9), reply=limits)
    seconds = sum(len(event.samples) for event in of(ReplyAudio, events)) / SAMPLE_RATE
    assert 1.0 < seconds < 2.0


def test_a_reply_begins_at_its_first_sound_and_remembers_the_silence_before() -> None:
    class Hesitant(ScriptedDialogue):
        def units(self) -> Iterator[Piece]:
            yield from (SaidUnit(Unit("Hu", index)) for index in (0, 0, 50, 51))

    def heard(skip: bool) -> list[ReplyAudio]:
        return of(ReplyAudio, converse(Hesitant(), *speech(9), reply={"skip_silence": skip}))

    assert [a.first_sample for a in heard(False)] == [0, 640, 1280, 1920]
    audio = heard(True)
    assert [(a.first_sample, len(a.samples)) for a in audio] == [(0, 640), (640, 640)]
    spans = [(s.token, s.start, s.end) for a in audio for s in a.units]
    assert spans == [(0, 0, 0), (1, 0, 0), (2, 0, 640), (3, 640, 1280)]


def test_a_reply_without_a_sound_is_over_soon() -> None:
    class Mute(ScriptedDialogue):
        def units(self) -> Iterator[Piece]:
            while True:
                yield SaidUnit(Unit("Hu", 0))

    events = converse(Mute(), *speech(9), reply={"trailing_silence_s": 0.5})
    assert not of(ReplyAudio, events)
    assert of(TurnEnded, events)[0].trace.ended == "long enough"


def test_units_without_a_sound_end_the_reply_and_not_the_session() -> None:
    events = converse(ScriptedDialogue(), *speech(66), *speech(9))
    first, second = of(TurnEnded, events)
    assert "unit 66 has no sound" in first.trace.ended
    assert second.trace.ended == "complete"


@pytest.mark.parametrize("where", ["source", "model"])
def test_a_failure_reaches_the_caller_and_stops_everything(where: str) -> None:
    def fail() -> None:
        raise RuntimeError("the roof fell in")

    async def broken() -> AsyncIterator[np.ndarray]:
        for chunk in speech(1):
            yield chunk
        if where == "source":
            fail()

    async def run() -> None:
        dialogue = ScriptedDialogue(each=fail if where == "model" else lambda: None)
        async with session(dialogue) as talk:
            async for _ in talk.converse(broken()):
                pass

    with pytest.raises(RuntimeError, match="the roof fell in"):
        asyncio.run(run())


def test_a_caller_who_stops_listening_leaves_no_task_behind() -> None:
    async def run() -> set[str]:
        async with session(ScriptedDialogue(times=100_000)) as talk:
            events = talk.converse(stream(speech(1, 2)))
            async for event in events:
                if isinstance(event, ReplyAudio):
                    break
            await events.aclose()
            return {t.get_name() for t in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]

    assert asyncio.run(run()) == set()


def test_the_event_loop_is_never_held_by_model_work() -> None:
    """While the model computes for a second in all, the loop goes on ticking."""
    ticks = 0

    async def run() -> None:
        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        dialogue = ScriptedDialogue(times=10, each=lambda: time.sleep(0.1))
        async with session(dialogue) as talk:
            async for _ in talk.converse(stream(speech(1))):
                pass
        ticking.cancel()

    asyncio.run(run())
    assert ticks > 10, "one tick for each piece of model work would mean the loop waits for it"
