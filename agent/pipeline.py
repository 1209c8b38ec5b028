"""The conversation: audio in, events out, four tasks joined by bounded channels.

::

    source ─► listen ─► encode ─► think ─► speak ─► events
              (VAD)    (units)    (LM)   (vocoder)

``listen`` runs on the event loop (a VAD frame costs microseconds); the other three await work in a
thread of their own, so the loop only moves bytes. Every item carries its turn. Letting go of a turn
raises one integer, and whatever of it is still on its way is dropped where it is met.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.channels import Channel, Policy, Turns
from agent.config import Config
from agent.events import Event, Heard, ReplyAudio, ReplyText, TurnEnded, TurnStarted
from agent.models import Models
from agent.reply import Dialogue, HeardText, SaidText, SaidUnit, Steps
from agent.telemetry import ArrivalClock, TurnTrace
from agent.workers import Worker
from stages import SAMPLE_RATE
from stages.encoder import Revision
from stages.units import Unit
from stages.vad import SpeechAudio, SpeechEnded, SpeechStarted, VadEvent
from stages.vocoder import VocoderError
from stages.vocoder_stream import AudioChunk

_NEVER_PAST = 2**62  # the turn under which ends of turns travel: they arrive in any case
_SILENCE_LEVEL = 10 ** (-50 / 20)  # RMS of full scale under which a reply's sound counts as silence


@dataclass(frozen=True)
class _Sound:
    """From ``listen`` to ``encode``: what the VAD says of one turn."""

    trace: TurnTrace
    event: SpeechStarted | SpeechAudio | SpeechEnded


@dataclass(frozen=True)
class _Request:
    """From ``encode`` to ``think``: more of the request's units; with ``last``, the exact ones."""

    trace: TurnTrace
    revision: Revision
    last: bool


@dataclass(frozen=True)
class _Reply:
    """From ``think`` to ``speak``: the next unit; None at the end of the reply."""

    trace: TurnTrace
    unit: Unit | None


class Pipeline:
    """One session: its channels, threads and conversation state.

    Use it as an async context manager; leaving it ends the threads. ``clock`` gives seconds of a
    monotonic clock and is replaced in tests.
    """

    def __init__(
        self, models: Models, config: Config, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._config = config
        self._clock = clock
        self._turns = Turns()
        self._enough: dict[int, int] = {}  # turns whose reply is long enough: units of it spoken
        self._over: dict[int, asyncio.Event] = {}  # set once a turn's reply has been spoken
        self._traces: dict[int, TurnTrace] = {}
        self._arrivals = ArrivalClock()
        self._vad = models.vad()
        self._encoder = models.encoder()
        self._vocoder = models.vocoder()
        self._dialogue: Dialogue = models.dialogue()
        self._workers = {name: Worker(name) for name in ("encoder", "lm", "vocoder")}
        turns, sizes = self._turns, config.channels
        self._heard: Channel[_Sound] = Channel("speech", sizes.speech, Policy.BLOCK, turns)
        self._requests: Channel[_Request] = Channel("units", sizes.units, Policy.BLOCK, turns)
        self._replies: Channel[_Reply] = Channel("reply", sizes.reply, Policy.BLOCK, turns)
        self._events: Channel[Event] = Channel("events", sizes.events, Policy.BLOCK, turns)
        self._channels: tuple[Channel[Any], ...] = (
            self._heard, self._requests, self._replies, self._events,
        )  # fmt: skip

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            await worker.close()

    async def interrupt(self) -> None:
        """Let go of the turns begun so far: their replies stop, and nothing more of them is heard.

        Each still gets its :class:`TurnEnded`.
        """
        if self._traces:
            self._turns.cancel(max(self._traces))
        for channel in self._channels:
            await channel.wake()

    async def converse(self, source: AsyncIterable[np.ndarray]) -> AsyncGenerator[Event, None]:
        """Listen to ``source`` and answer every utterance in it.

        Args:
            source: float32 mono chunks at 16 kHz, of any size.

        Yields:
            the session's events, in order; after the source has ended and the last reply is done,
            the generator ends.

        Raises:
            whatever a stage or the source raised; everything is stopped by then.
        """
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("listen", self._listen(source)),
                ("encode", self._encode()),
                ("think", self._think()),
                ("speak", self._speak()),
            )
        ]
        watcher = asyncio.create_task(self._watch(tasks), name="watch")
        try:
            async for event in self._events:
                yield event
            await watcher
        finally:
            for task in (*tasks, watcher):
                task.cancel()
            await asyncio.gather(*tasks, watcher, return_exceptions=True)

    # The four tasks.

    async def _listen(self, source: AsyncIterable[np.ndarray]) -> None:
        trace, position = None, 0
        async for chunk in source:
            position += len(chunk)
            self._arrivals.arrived(position, self._clock())
            for event in self._vad.push(chunk):
                trace = await self._pass_on(event, trace)
        for event in self._vad.flush():
            trace = await self._pass_on(event, trace)
        await self._heard.close()

    async def _pass_on(self, event: VadEvent, trace: TurnTrace | None) -> TurnTrace | None:
        """Send a VAD event on as part of its turn; returns the trace of the turn."""
        if isinstance(event, SpeechStarted):
            turn = self._turns.begin()
            trace = self._traces[turn] = TurnTrace(turn, speech=(event.sample, event.sample))
            await self._events.put(TurnStarted(turn, event.sample), turn)
        assert trace is not None, "the VAD begins every utterance with SpeechStarted"
        if isinstance(event, SpeechEnded):
            trace.speech = (trace.speech[0], event.end_of_speech)
            trace.mark("end_of_speech", self._arrivals.when(event.end_of_speech))
            trace.mark("endpoint", self._clock())
            await self._heard.put(_Sound(trace, event), _NEVER_PAST)
        elif isinstance(event, SpeechStarted | SpeechAudio):
            await self._heard.put(_Sound(trace, event), trace.turn)
        return trace

    async def _encode(self) -> None:
        worker, encoder = self._workers["encoder"], self._encoder
        async for sound in self._heard:
            trace, event = sound.trace, sound.event
            before = worker.busy
            if isinstance(event, SpeechStarted):
                encoder.reset()
            elif isinstance(event, SpeechAudio):
                for revision in await worker.run(encoder.push, event.samples):
                    await self._requests.put(_Request(trace, revision, False), trace.turn)
            else:
                revision = await worker.run(self._exact, trace.turn)
                trace.mark("encoder_done", self._clock())
                await self._requests.put(_Request(trace, revision, True), _NEVER_PAST)
            trace.work["encode"] = trace.work.get("encode", 0.0) + worker.busy - before
        await self._requests.close()

    def _exact(self, turn: int) -> Revision:
        """The last revision of an utterance; nothing for one that has been let go of."""
        return Revision(0) if self._turns.stale(turn) else self._encoder.flush()[0]

    async def _think(self) -> None:
        worker, dialogue, turn = self._workers["lm"], self._dialogue, 0
        async for request in self._requests:
            trace, before = request.trace, worker.busy
            if self._turns.stale(trace.turn):
                if request.last:
                    await worker.run(dialogue.abandon)
                    await self._finish(trace, "interrupted")
                continue
            if trace.turn != turn:
                turn = trace.turn
                await worker.run(dialogue.begin)
            await worker.run(dialogue.hear, request.revision.keep, request.revision.frames)
            trace.work["prefill"] = trace.work.get("prefill", 0.0) + worker.busy - before
            if request.last:
                trace.mark("prefill_done", self._clock())
                await self._answer(trace)
        await self._replies.close()

    async def _answer(self, trace: TurnTrace) -> None:
        """Decode the reply to one request and pass it on as it comes."""
        worker, turn = self._workers["lm"], trace.turn
        before, ended = worker.busy, "complete"
        over = self._over[turn] = asyncio.Event()
        steps = self._dialogue.reply()
        more = True
        while more:
            if self._turns.stale(turn) or turn in self._enough:
                ended = "interrupted" if self._turns.stale(turn) else "long enough"
                await worker.run(steps.close)
                break
            more, piece = await worker.run(_step, steps)
            trace.mark("first_token", self._clock())
            if isinstance(piece, HeardText):
                trace.heard = piece.text
                await self._events.put(Heard(turn, piece.text), turn)
            elif isinstance(piece, SaidText):
                trace.said += piece.text
                await self._events.put(ReplyText(turn, piece.text), turn)
            elif isinstance(piece, SaidUnit):
                trace.mark("first_unit", self._clock())
                await self._replies.put(_Reply(trace, piece.unit), turn)
        trace.decode_seconds = trace.work["decode"] = worker.busy - before
        trace.counts.update(self._dialogue.counts)
        await self._finish(trace, ended)
        # How far the model was ahead of the vocoder when the limit came is chance: what it
        # remembers of the reply must not be.
        if not self._turns.stale(turn):
            await over.wait()
        if (spoken := self._enough.pop(turn, None)) is not None:
            await worker.run(self._dialogue.cut, spoken)
        del self._over[turn]

    async def _finish(self, trace: TurnTrace, ended: str) -> None:
        """Nothing more comes of this turn; said even of one that is past."""
        trace.ended = trace.ended or ended
        await self._replies.put(_Reply(trace, None), _NEVER_PAST)

    async def _speak(self) -> None:
        worker, turn, quiet = self._workers["vocoder"], 0, 0
        async for reply in self._replies:
            trace, before = reply.trace, worker.busy
            if trace.turn != turn:
                turn, quiet = trace.turn, 0
                self._vocoder.reset()
            try:
                for chunk in await worker.run(self._vocode, reply):
                    quiet = await self._play(trace, chunk, quiet)
            except VocoderError as error:  # one reply that cannot be spoken ends no session
                trace.ended = f"cannot be spoken: {error}"
                self._enough[turn] = 0
            trace.work["vocode"] = trace.work.get("vocode", 0.0) + worker.busy - before
            if reply.unit is None:
                await self._end(trace)
        await self._events.close()

    def _vocode(self, reply: _Reply) -> Iterable[AudioChunk]:
        turn = reply.trace.turn
        if self._turns.stale(turn) or turn in self._enough:
            return ()
        if reply.unit is None:
            return self._vocoder.flush()
        return self._vocoder.push(reply.unit)

    async def _play(self, trace: TurnTrace, chunk: AudioChunk, quiet: int) -> int:
        """Hand out a chunk of the reply; returns how many samples of silence end it so far."""
        limit = int(self._config.reply.max_seconds * SAMPLE_RATE)
        samples = chunk.samples[: max(0, limit - chunk.first_sample)]
        if not len(samples):
            return quiet
        trace.mark("first_sample", self._clock())
        trace.reply_samples = chunk.first_sample + len(samples)
        sound = ReplyAudio(trace.turn, samples, chunk.first_sample, chunk.units)
        await self._events.put(sound, trace.turn)
        trace.marks["last_sample"] = self._clock()
        loud = float(np.sqrt(np.mean(np.square(samples)))) > _SILENCE_LEVEL
        quiet = 0 if loud else quiet + len(samples)
        patience = self._config.reply.trailing_silence_s * SAMPLE_RATE
        if trace.reply_samples >= limit or quiet >= patience:
            trace.ended = "long enough"
            begun = (span.token + 1 for span in chunk.units if span.start < limit)
            self._enough[trace.turn] = max(begun, default=0)
        return quiet

    async def _end(self, trace: TurnTrace) -> None:
        trace.channels = {channel.name: channel.counters.as_dict() for channel in self._channels}
        for turn in [t for t in self._traces if t <= trace.turn]:
            del self._traces[turn]
        if trace.turn in self._over:
            self._over[trace.turn].set()
        else:
            self._enough.pop(trace.turn, None)
        await self._events.put(TurnEnded(trace.turn, trace), _NEVER_PAST)

    async def _watch(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """When a task fails the events end, so that whoever reads them learns of it."""
        try:
            await asyncio.gather(*tasks)
        finally:
            await self._events.close()


def _step(steps: Steps) -> tuple[bool, object]:
    """One step of a reply, in the model's thread: (whether there was one, what it says)."""
    try:
        return True, next(steps)
    except StopIteration:
        return False, None
