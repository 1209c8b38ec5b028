"""The stages between a request and its reply: three tasks joined by bounded channels.

::

    orders ─► encode ─► think ─► speak ─► ready
             (units)    (LM)   (vocoder)

Each awaits work in a thread of its own, so that the event loop only moves bytes. Every item of a
reply carries the stamp of its attempt. Letting go of it raises one integer, and whatever of it is
still on its way is dropped where it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from agent.attempt import Attempt, News, Opened, Order, Over, Ready, Said, Sound, Wanted, Written
from agent.channels import Channel, Policy, Turns
from agent.config import Config
from agent.events import (
    ActionChosen,
    Event,
    Heard,
    ReplyAudio,
    ReplyText,
    RequestUnits,
    TurnEnded,
)
from agent.models import Models
from agent.reply import Action, Dialogue, HeardText, SaidText, SaidUnit, Steps
from agent.telemetry import TurnTrace
from agent.workers import Worker
from stages import SAMPLE_RATE
from stages.vocoder import VocoderError
from stages.vocoder_stream import AudioChunk

NEVER_PAST = 2**62
"""The stamp of what arrives in any case."""


class Pipeline:
    """The models at work for one session.

    Attributes:
        stamps: which attempts are alive; shared by all channels.
        orders: what is to be done, in order. Closing it ends the pipeline, when all is done.
        ready: what became of it: the parts of replies, wanted or not.
        watched: also tell the request's units, as they come.
        memory: the tokens of each past turn; what is there at first is remembered.
        events: told what concerns whole turns, beside what :attr:`ready` carries.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        clock: Callable[[], float],
        worker: Callable[[str], Worker],
        working: Callable[[float], None],
    ) -> None:
        """``working`` is told the time whenever the language model has done something."""
        self._config = self._wanted = self._spoken = config
        self._models = models
        self._clock = clock
        self._working = working
        self._encoder = models.encoder()
        self._vocoder = models.vocoder()
        self._dialogue: Dialogue = models.dialogue()
        self._workers = {name: worker(name) for name in ("encoder", "lm", "vocoder")}
        self.watched = False
        self.memory: Sequence[Sequence[int]] = ()
        self.stamps = stamps = Turns()
        sizes = config.channels
        self.orders: Channel[Order] = Channel("speech", sizes.speech)
        self._requests: Channel[Order] = Channel("units", sizes.units)
        self._replies: Channel[Said] = Channel("reply", sizes.reply, Policy.BLOCK, stamps)
        self.ready: Channel[Ready] = Channel("ready", sizes.events, Policy.BLOCK, stamps)
        self.events: Channel[Event] = Channel("events", sizes.events, Policy.BLOCK, stamps)
        self._channels: tuple[Channel[Any], ...] = (
            self.orders, self._requests, self._replies, self.ready, self.events,
        )  # fmt: skip

    def tasks(self) -> dict[str, Coroutine[Any, Any, None]]:
        """The work of the stages, by name."""
        return {"encode": self._encode(), "think": self._think(), "speak": self._speak()}

    def configure(self, config: Config) -> None:
        """Other settings, from the next turn on; ``models.config`` has them already."""
        self._wanted = config

    def tokens(self, request: str) -> int:
        """How many tokens a typed request takes."""
        return self._dialogue.typed_tokens(request)

    def cancel(self, attempt: Attempt) -> None:
        """Let go of an attempt and all before it."""
        self.stamps.cancel(attempt.stamp)
        attempt.decided.set()
        for channel in self._channels:  # whoever waits with something stale may drop it
            channel.wake()

    async def close(self) -> None:
        """Wait for the calls in progress and end the threads."""
        for worker in self._workers.values():
            await worker.close()

    async def _encode(self) -> None:
        worker, encoder = self._workers["encoder"], self._encoder
        async for order in self.orders:
            if isinstance(order, Sound):
                await self._tell_units(order.trace, worker, encoder.push, order.samples)
                continue
            if isinstance(order, Opened):
                encoder.reset()
            elif isinstance(order, Wanted):
                if self.stamps.stale(order.attempt.stamp):
                    continue
                if not order.typed:
                    await self._tell_units(order.attempt.trace, worker, encoder.settle)
                order.attempt.mark("encoder_done", self._clock())
            await self._requests.put(order)
        self._requests.close()

    async def _tell_units(
        self, trace: TurnTrace, worker: Worker, work: Callable[..., Iterable[Any]], *args: Any
    ) -> None:
        before = worker.busy
        for revision in await worker.run(work, *args):
            await self._requests.put(News(trace, revision))
        trace.spend("encode", worker.busy - before)

    async def _think(self) -> None:
        worker, dialogue = self._workers["lm"], self._dialogue
        if self.memory:
            await worker.run(dialogue.restore, self.memory)
        async for order in self._requests:
            if isinstance(order, Opened | Written) and self._config is not self._wanted:
                self._config = config = self._wanted
                text, speech = config.sampling.text, config.sampling.speech
                dialogue.configure(config.reply, text.sampling(), speech.sampling())
            if isinstance(order, Opened):
                await worker.run(dialogue.begin)
            elif isinstance(order, Written):
                await worker.run(dialogue.say if order.say else dialogue.read, order.text)
            elif isinstance(order, News):
                await self._prefill(order)
            elif isinstance(order, Wanted):
                order.attempt.mark("prefill_done", self._clock())
                if not self.stamps.stale(order.attempt.stamp):
                    await self._reply(order.attempt)
            elif isinstance(order, Over):
                await self._conclude(order)
        self._replies.close()

    async def _prefill(self, news: News) -> None:
        worker, revision, trace = self._workers["lm"], news.revision, news.trace
        before = worker.busy
        await worker.run(self._dialogue.hear, revision.keep, revision.frames)
        trace.spend("prefill", worker.busy - before)
        if self.watched:
            units = tuple(f"[{frame.kind}{frame.index}]" for frame in revision.frames)
            self.events.offer(RequestUnits(trace.turn, revision.keep, units))

    async def _reply(self, attempt: Attempt) -> None:
        """Decode one reply and pass it on as it comes."""
        worker, trace = self._workers["lm"], attempt.trace
        before = worker.busy
        steps = self._dialogue.reply()
        more = True
        while more and attempt.enough is None and not self.stamps.stale(attempt.stamp):
            more, piece = await worker.run(_step, steps)
            attempt.mark("first_token", self._clock())
            self._working(self._clock())
            if isinstance(piece, HeardText):
                trace.heard = piece.text
                await self._make_ready(attempt, Heard(trace.turn, piece.text))
            elif isinstance(piece, Action):
                attempt.action = piece.value
                await self._make_ready(attempt, ActionChosen(trace.turn, piece.value))
            elif isinstance(piece, SaidText):
                attempt.words.plan(piece.text)
                await self._make_ready(attempt, ReplyText(trace.turn, piece.text))
            elif isinstance(piece, SaidUnit):
                attempt.mark("first_unit", self._clock())
                await self._replies.put(Said(attempt, piece.unit), attempt.stamp)
        await worker.run(steps.close)
        attempt.decode_seconds = worker.busy - before
        trace.spend("decode", attempt.decode_seconds)
        await self._replies.put(Said(attempt, None), attempt.stamp)

    async def _conclude(self, over: Over) -> None:
        worker, dialogue, trace = self._workers["lm"], self._dialogue, over.trace
        trace.counts.update(dialogue.counts)
        if over.forget:
            await worker.run(dialogue.abandon)
        else:
            await worker.run(dialogue.end, over.units, over.characters)
        self.memory = await worker.run(lambda: dialogue.memory)
        trace.channels = {channel.name: channel.counters.as_dict() for channel in self._channels}
        await self.events.put(TurnEnded(trace.turn, trace), NEVER_PAST)

    async def _speak(self) -> None:
        worker, current = self._workers["vocoder"], None
        async for said in self._replies:
            attempt, before = said.attempt, worker.busy
            if attempt is not current:
                current = attempt
                if self._spoken is not self._config:
                    self._spoken, self._vocoder = self._config, self._models.vocoder()
                self._vocoder.reset()
            try:
                for chunk in await worker.run(self._vocode, said):
                    await self._pass_on(attempt, chunk)
            except VocoderError as error:  # one reply that cannot be spoken ends no session
                attempt.ended = f"cannot be spoken: {error}"
                attempt.enough = 0
            attempt.trace.spend("vocode", worker.busy - before)
            if said.unit is None:
                await self._make_ready(attempt, None)
        self.ready.close()

    def _vocode(self, said: Said) -> Iterable[AudioChunk]:
        if said.attempt.enough is not None or self.stamps.stale(said.attempt.stamp):
            return ()
        return self._vocoder.flush() if said.unit is None else self._vocoder.push(said.unit)

    async def _pass_on(self, attempt: Attempt, chunk: AudioChunk) -> None:
        if attempt.enough is not None:
            return
        limits = self._config.reply
        longest = int(limits.max_seconds * SAMPLE_RATE)
        patience = int(limits.trailing_silence_s * SAMPLE_RATE)
        sounding = attempt.from_first_sound(chunk, patience) if limits.skip_silence else chunk
        wanted = sounding and attempt.limit(sounding, longest, patience)
        if wanted is not None:
            attempt.words.sound(wanted.end)
            sound = ReplyAudio(
                attempt.trace.turn, wanted.samples, wanted.first_sample, wanted.units
            )
            await self._make_ready(attempt, sound)

    async def _make_ready(self, attempt: Attempt, event: Event | None) -> None:
        await self.ready.put(Ready(attempt, event), attempt.stamp)


def _step(steps: Steps) -> tuple[bool, object]:
    """One step of a reply, in the model's thread: (whether there was one, what it says)."""
    try:
        return True, next(steps)
    except StopIteration:
        return False, None
