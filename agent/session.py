"""A conversation: what is heard, what is decided, what is played and told.

::

    source ─► listen ─► pipeline ─► deliver ─► playback, events
            (VAD, turns)           (once wanted)

Who speaks when is decided by :class:`agent.conversation.TurnTaking`; a session is its hands.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Sequence

import numpy as np

from agent.attempt import Attempt, Opened, Order, Over, Sound, Wanted, Written
from agent.config import Config
from agent.conversation import (
    Action,
    Answer,
    Begin,
    BeginTyped,
    Close,
    Discard,
    DropOverlap,
    Duck,
    Forget,
    Prepare,
    State,
    Stop,
    TurnTaking,
)
from agent.ears import Ears
from agent.errors import UserError
from agent.events import (
    Event,
    Heard,
    Interrupted,
    Level,
    ReplyAudio,
    Spoken,
    StateChanged,
    TurnStarted,
)
from agent.models import Models
from agent.pipeline import NEVER_PAST, Pipeline
from agent.playback import Immediate, Playback
from agent.reply import Memory, plain
from agent.telemetry import TurnTrace
from agent.workers import Worker
from stages import SAMPLE_RATE
from stages.vad import SilenceStarted, SpeechAudio, SpeechResumed, SpeechStarted, VadEvent

_PULSE = 0.02  # seconds between looks at the playhead and at the watchdog's clock
_LEVEL_EVERY = SAMPLE_RATE // 20


class Session:
    """One conversation: its state, its pipeline and what it still has to say.

    Use it as an async context manager; leaving it ends the threads. ``clock`` gives seconds of a
    monotonic clock and ``worker`` makes a thread by name; both are replaced in tests.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        clock: Callable[[], float] = time.perf_counter,
        worker: Callable[[str], Worker] = Worker,
        memory: Memory | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        shortest = config.vad.min_speech_ms * SAMPLE_RATE // 1000
        self._taking = TurnTaking(config.turns, shortest, self._moved)
        self._ears = Ears(models, config, clock, worker)
        self._pipeline = Pipeline(models, config, clock, worker, self._taking.working)
        if memory is not None:
            self._taking.turn, self._pipeline.memory = memory.turn, memory.turns
        self._traces: dict[int, TurnTrace] = {}
        self._attempt: Attempt | None = None
        self._outbox: deque[Order | Event] = deque()
        self._posting = asyncio.Lock()
        self._quiet, self._engaged = asyncio.Event(), asyncio.Event()
        self._quiet.set()
        self._typed: tuple[str, bool] | None = None  # what a typed turn is about to begin with
        self._writing = asyncio.Lock()
        self._listening = asyncio.Event()  # nobody is speaking, no turn is open
        self._over = False
        self._kept: list[SpeechAudio] = []  # speech over a reply, until it is known what it means
        self._told = 0  # characters of the reply told as spoken
        self._playback: Playback = Immediate()
        self._live = False

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._ears.close()
        await self._pipeline.close()

    @property
    def state(self) -> State:
        """What the conversation is doing."""
        return self._taking.state

    def configure(self, config: Config) -> None:
        """Other settings of replies, from the next turn on (:func:`agent.config.changed`)."""
        self._config = config
        self._pipeline.configure(config)

    @property
    def memory(self) -> Memory:
        """What is remembered; exact whenever a :class:`TurnEnded` is told."""
        return Memory(self._taking.turn, self._pipeline.memory)

    async def interrupt(self, reason: str = "interrupted") -> None:
        """Let go of the turn in progress: its reply stops, and nothing more of it is heard.

        It still gets its :class:`TurnEnded`.
        """
        await self._do(self._taking.interrupt(reason, self._clock()))

    async def ask(self, text: str) -> int:
        """Give a request as text; it is answered when nobody speaks. The turn's number.

        Its events come with all others from :meth:`converse`, which must be going on.

        Raises:
            UserError: the text is empty, or too long to be answered.
        """
        return await self._write(text, say=False)

    async def say(self, text: str) -> int:
        """Have ``text`` spoken as it is; as :meth:`ask`."""
        return await self._write(text, say=True)

    async def _write(self, text: str, say: bool) -> int:
        words = plain(text)
        most = self._config.reply.reserve_tokens // 2
        if (tokens := self._pipeline.tokens(words)) > most:
            raise UserError(
                f"the text has {tokens} tokens, of at most {most} (half of "
                "reply.reserve_tokens): shorten it"
            )
        async with self._writing:
            while True:
                await self._listening.wait()
                if self._over:
                    raise UserError("the conversation is over: begin another one")
                self._typed = (words, say)
                if actions := self._taking.typed(self._clock()):
                    turn = self._taking.turn
                    await self._do(actions)
                    return turn
                await asyncio.sleep(_PULSE)

    async def device_lost(self, direction: str) -> None:
        """The microphone (``"input"``) or the loudspeaker (``"output"``) went away."""
        now = self._clock()
        if direction == "input":
            self._ears.drop()
            await self._do(self._taking.microphone_lost(now))
        else:
            await self._do(self._taking.loudspeaker_lost(now))

    async def converse(
        self, source: AsyncIterable[np.ndarray], playback: Playback | None = None
    ) -> AsyncGenerator[Event, None]:
        """Listen to ``source`` and answer every utterance in it.

        Args:
            source: float32 mono chunks at 16 kHz, of any size.
            playback: where replies are played, live: speech over a reply interrupts it. Without
                one, replies come as events only, and the source waits while one is made.

        Yields:
            the session's events, in order; after the source has ended and the last reply is done,
            the generator ends.

        Raises:
            whatever a stage or the source raised; everything is stopped by then.
        """
        self._live = self._pipeline.watched = playback is not None
        self._listening.set()
        self._playback = playback or Immediate()
        work = {
            "listen": self._listen(source),
            **self._pipeline.tasks(),
            "deliver": self._deliver(),
        }
        tasks = [asyncio.create_task(todo, name=name) for name, todo in work.items()]
        pulse = asyncio.create_task(self._pulse(), name="pulse")
        watcher = asyncio.create_task(self._watch(tasks, pulse), name="watch")
        try:
            async for event in self._pipeline.events:
                yield event
            await watcher
        finally:
            for task in (*tasks, pulse, watcher):
                task.cancel()
            await asyncio.gather(*tasks, pulse, watcher, return_exceptions=True)
            self._end_typing()
            self._playback.stop()

    def _end_typing(self) -> None:
        self._over = True
        self._listening.set()

    # Listening.

    async def _listen(self, source: AsyncIterable[np.ndarray]) -> None:
        position = 0
        frame = self._config.vad.frame_ms * SAMPLE_RATE // 1000
        if self._live:
            self._outbox.append(StateChanged(State.LISTENING.value, "ready", position))
        async for chunk in source:
            self._ears.arrived(position + len(chunk))
            for piece in _pieces(chunk, frame):
                position += len(piece)
                await self._hear(piece, position)
                if not self._live:
                    await self._quiet.wait()
        for event in self._ears.flush():
            await self._follow(event, position)
        await self._quiet.wait()
        self._end_typing()
        await self.interrupt("the source ended")
        async with self._posting:  # the last word may still be on its way
            self._pipeline.orders.close()

    async def _hear(self, piece: np.ndarray, position: int) -> None:
        """Judge one VAD frame or less, and do what follows from it."""
        deaf = self._live and self._config.turns.half_duplex and self.state is State.ANSWERING
        for event in self._ears.push(np.zeros_like(piece) if deaf else piece):
            await self._follow(event, position)
        actions = self._taking.audio(position, self._clock())
        if actions or self._outbox:
            await self._do(actions)
        if self._live and position % _LEVEL_EVERY < len(piece):
            level = 10 * math.log10(float(np.mean(np.square(piece))) + 1e-12)
            self._pipeline.events.offer(Level(level, self._ears.in_utterance))

    async def _follow(self, event: VadEvent, position: int) -> None:
        """Do what follows from what the VAD says."""
        taking, now = self._taking, self._clock()
        of_request = not taking.overlapping
        if isinstance(event, SpeechAudio):
            self._keep(event)
            return
        if isinstance(event, SpeechResumed) and of_request:
            self._ears.pace(event)
        paused = self._ears.speech[1]
        self._ears.see(event)
        if isinstance(event, SpeechStarted):
            answering = self.state is State.ANSWERING
            await self._do(taking.started(position, now))
            if answering and self.state is State.HEARING:
                onset = event.sample + self._config.vad.pre_roll_ms * SAMPLE_RATE // 1000
                self._ears.overran(max(0, onset - paused))
        elif isinstance(event, SilenceStarted):
            await self._do(taking.silence(now))
        elif isinstance(event, SpeechResumed):
            await self._do(taking.resumed(position, now))
        else:
            await self._do(taking.ended(now))
        if of_request and not isinstance(event, SpeechResumed):
            self._ears.pace(event)

    def _keep(self, audio: SpeechAudio) -> None:
        """Pass a request's audio on, or keep it back while its meaning is not known."""
        if self._taking.overlapping:
            self._kept.append(audio)
        elif self.state in (State.HEARING, State.MAYBE_FINISHED):
            self._pass_on(audio.samples)

    def _pass_on(self, samples: np.ndarray) -> None:
        self._ears.remember(samples)
        self._outbox.append(Sound(self._traces[self._taking.turn], samples))

    # Doing what the turn-taking says.

    async def _do(self, actions: Iterable[Action]) -> None:
        """Take the actions: at once what must not wait, then, in order, what may."""
        for action in actions:
            self._act(action)
        async with self._posting:
            while self._outbox:
                message = self._outbox.popleft()
                if isinstance(message, Order):
                    await self._pipeline.orders.put(message)
                else:
                    await self._pipeline.events.put(message, NEVER_PAST)

    def _act(self, action: Action) -> None:
        if isinstance(action, Begin):
            self._begin(action)
        elif isinstance(action, BeginTyped):
            self._begin_typed(action)
        elif isinstance(action, Prepare):
            self._prepare(self._traces[action.turn])
        elif isinstance(action, Answer):
            self._answer(self._traces[action.turn])
        elif isinstance(action, Discard):
            self._discard()
        elif isinstance(action, Duck):
            self._playback.duck(action.on)
        elif isinstance(action, DropOverlap):
            self._kept.clear()
        else:
            self._end(action)

    def _begin(self, action: Begin) -> None:
        start = self._kept[0].first_sample if self._kept else self._ears.speech[0]
        trace = self._traces[action.turn] = TurnTrace(action.turn, speech=(start, start))
        self._ears.begin()
        self._outbox += (TurnStarted(action.turn, start), Opened(trace))
        for audio in self._kept:
            self._pass_on(audio.samples)
        self._kept.clear()

    def _begin_typed(self, action: BeginTyped) -> None:
        assert self._typed is not None
        text, say = self._typed
        here = self._ears.position
        trace = TurnTrace(action.turn, speech=(here, here), typed=True)
        self._traces[action.turn] = trace
        self._outbox += (TurnStarted(action.turn, here), Written(trace, text, say))
        if not say:
            trace.heard = text
            self._outbox.append(Heard(action.turn, text))

    def _prepare(self, trace: TurnTrace) -> None:
        self._attempt = Attempt(self._pipeline.stamps.begin(), trace)
        trace.count("speculations", int(self.state is State.MAYBE_FINISHED))
        self._outbox.append(Wanted(self._attempt, trace.typed))

    def _answer(self, trace: TurnTrace) -> None:
        assert self._attempt is not None
        hit = trace.counts["speculations"] > trace.counts.get("refuted", 0)
        trace.count("speculation_hits", int(hit))
        if not trace.typed:
            end = self._ears.speech[1]
            trace.speech = (trace.speech[0], end)
            trace.marks["end_of_speech"] = self._ears.when(end)
        trace.marks["endpoint"] = self._clock()
        trace.marks.setdefault("end_of_speech", trace.marks["endpoint"])
        self._told = 0
        self._playback.begin()
        self._attempt.decided.set()

    def _discard(self) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        if attempt.decided.is_set():
            self._playback.stop()  # nothing of it has left the loudspeaker yet
        attempt.trace.count("refuted")
        self._pipeline.cancel(attempt)

    def _end(self, action: Close | Stop | Forget) -> None:
        """A turn is over, in one of three ways."""
        trace, attempt = self._traces.pop(action.turn), self._attempt
        if isinstance(action, Close):
            assert attempt is not None
            trace.ended = attempt.ended or "complete"
            self._tell_spoken(attempt, attempt.samples, attempt.enough is None)
            over = Over(trace, attempt.enough, attempt.words.characters(attempt.samples))
        elif isinstance(action, Stop):
            trace.ended = action.reason
            over = self._stop(trace, action.reason)
        else:
            trace.ended = action.reason
            over = Over(trace, forget=True)
        if attempt is not None:
            attempt.fill(trace)
        self._attempt = None
        self._outbox.append(over)

    def _stop(self, trace: TurnTrace, reason: str) -> Over:
        """Fall silent now, and reckon what was heard."""
        attempt, heard = self._attempt, self._playback.stop()
        self._playback.duck(False)
        assert attempt is not None
        self._pipeline.cancel(attempt)
        self._tell_spoken(attempt, heard)
        self._outbox.append(Interrupted(trace.turn, heard, reason))
        return Over(trace, attempt.heard_units(heard), attempt.words.characters(heard))

    def _moved(self, state: State, reason: str, sample: int) -> None:
        (self._quiet.clear if state is State.ANSWERING else self._quiet.set)()
        (self._engaged.clear if state is State.LISTENING else self._engaged.set)()
        (self._listening.set if state is State.LISTENING else self._listening.clear)()
        if self._live:
            self._outbox.append(StateChanged(state.value, reason, sample))

    # What comes of it.

    async def _deliver(self) -> None:
        """Tell and play what was made ready, as soon as it is known to be wanted."""
        async for ready in self._pipeline.ready:
            attempt, event = ready.attempt, ready.event
            await attempt.decided.wait()
            if self._pipeline.stamps.stale(attempt.stamp):
                continue
            if isinstance(event, ReplyAudio):
                self._playback.play(event.samples)
                attempt.handed_over(event, self._clock())
            if event is None:
                attempt.words.sound(attempt.samples, whole=attempt.enough is None)
                self._playback.finish()
                attempt.finished = True
            else:
                await self._pipeline.events.put(event, attempt.stamp)
            await self._look_at_playhead()
        self._pipeline.events.close()

    async def _pulse(self) -> None:
        """While a turn is open, watch the playhead, and whether anything moves at all."""
        while True:
            await self._engaged.wait()
            await self._look_at_playhead()
            await self._do(self._taking.tick(self._clock()))
            await asyncio.sleep(_PULSE)

    async def _look_at_playhead(self) -> None:
        attempt = self._attempt
        if attempt is None or self.state is not State.ANSWERING:
            return
        heard = self._playback.heard
        if heard and self._live:
            attempt.mark("first_heard", self._clock())
        self._tell_spoken(attempt, heard)
        done = attempt.finished and self._playback.done
        await self._do(self._taking.played(heard, done, self._clock()))

    def _tell_spoken(self, attempt: Attempt, heard: int, all_of_it: bool = False) -> None:
        """Tell which words have left the loudspeaker."""
        if not self._live:
            return
        text = attempt.words.text
        said = len(text) if all_of_it else attempt.words.characters(heard)
        if said > self._told:
            self._outbox.append(Spoken(attempt.trace.turn, text[self._told : said], heard))
            self._told = said

    async def _watch(self, tasks: Sequence[asyncio.Task[None]], pulse: asyncio.Task[None]) -> None:
        """When a task fails the events end, so that whoever reads them learns of it."""
        todo = {*tasks, pulse}
        try:
            while todo > {pulse}:
                done, todo = await asyncio.wait(todo, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            self._pipeline.events.close()


def _pieces(chunk: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(chunk), size):
        yield chunk[start : start + size]
