"""The agent inside a Python program.

With asyncio, speech in and events out::

    import asyncio, soundfile
    from agent.embedding import SpeechAgent


    async def main():
        question, _ = soundfile.read("examples/question.wav", dtype="float32")
        async with SpeechAgent.from_config("nano") as agent:
            async for event in agent.converse(question):  # or any float32 chunks at 16 kHz
                print(type(event).__name__, getattr(event, "text", ""))


    asyncio.run(main())

Without asyncio, with a request that is typed::

    from agent.embedding import SpeechAgent
    from agent.events import ReplyText

    with SpeechAgent.blocking("nano") as agent:
        for event in agent.ask("what is two plus three"):
            if isinstance(event, ReplyText):
                print(event.text, end="")
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agent.config import Config, changed, load_config
from agent.errors import UserError
from agent.events import Event, TurnEnded
from agent.models import Models
from agent.playback import Playback
from agent.reply import Memory
from agent.session import Session
from stages import SAMPLE_RATE
from stages.vocoder import VocoderError

T = TypeVar("T")
Source = AsyncIterable[np.ndarray] | np.ndarray


class AudioPush:
    """A source filled from outside: ``push`` from anywhere, iterate in the conversation.

    Holds at most ``seconds`` of sound; then the oldest is dropped, and counted in samples.

    Attributes:
        dropped: samples so far.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self._room = int(seconds * SAMPLE_RATE)
        self._held = 0
        self._chunks: deque[np.ndarray] = deque()
        self._lock = threading.Lock()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._closed = False
        self.dropped = 0

    def push(self, samples: np.ndarray) -> None:
        """Add float32 mono at 16 kHz, ``[n]``; from any thread. Never waits.

        Raises:
            ValueError: another shape or type, or the source was closed.
        """
        wave = np.asarray(samples)
        if wave.ndim != 1 or wave.dtype != np.float32:
            raise ValueError(f"samples {wave.dtype} {list(wave.shape)}: expected float32 [n]")
        with self._lock:
            if self._closed:
                raise ValueError("this source was closed: nothing more can be pushed")
            self._chunks.append(wave.copy())
            self._held += len(wave)
            while self._held > self._room:
                gone = len(self._chunks.popleft())
                self._held -= gone
                self.dropped += gone
        self._wake()

    def close(self) -> None:
        """Nothing more comes: the conversation ends after its last reply."""
        with self._lock:
            self._closed = True
        self._wake()

    def _wake(self) -> None:
        waiting = self._waiting
        if waiting is not None and not waiting[0].is_closed():
            waiting[0].call_soon_threadsafe(waiting[1].set)

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        changed = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), changed
        while True:
            changed.clear()
            with self._lock:
                chunk = self._chunks.popleft() if self._chunks else None
                self._held -= 0 if chunk is None else len(chunk)
                closed = self._closed
            if chunk is not None:
                yield chunk
            elif closed:
                return
            else:
                await changed.wait()


class SpeechAgent:
    """Models and what can be done with them: conversations, typed requests, words to be said.

    Use it as an async context manager. One conversation and one typed request go on at a time;
    give further agents the same ``models``, and they share the weights.

    Typed requests belong to the conversation that is going on. Without one they make a conversation
    of their own, which remembers them until :meth:`converse` or :meth:`reset`.
    """

    def __init__(self, config: Config, models: Models | None = None) -> None:
        """``models`` saves loading them again; otherwise entering the context loads them."""
        self._config = config
        self._models = None if models is None else models.beside()
        self._writing = asyncio.Lock()
        self._session: Session | None = None
        self._silent: _Silent | None = None
        self._memory: Memory | None = None  # what the next conversation begins with
        self._readers: set[asyncio.Queue[Event | BaseException]] = set()
        self._pushed = AudioPush()

    @classmethod
    def from_config(cls, config: str | Path = "nano", *overrides: str) -> SpeechAgent:
        """An agent by the name of its configuration, or a YAML file.

        Args:
            overrides: ``"section.key=value"``, as after ``--set``.

        Raises:
            UserError: no such configuration, or a value in it is impossible. Entering the context
                raises CheckpointError where the models are not as they should be.
        """
        return cls(load_config(config, overrides))

    @classmethod
    def blocking(cls, config: str | Path = "nano", *overrides: str) -> BlockingAgent:
        """The same for programs without asyncio."""
        return BlockingAgent(load_config(config, overrides))

    async def __aenter__(self) -> SpeechAgent:
        if self._models is None:
            self._models = await asyncio.to_thread(Models.load, self._config)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.reset()

    @property
    def models(self) -> Models:
        """What was loaded."""
        if self._models is None:
            raise RuntimeError("nothing is loaded yet: use `async with agent:`")
        return self._models

    def push(self, samples: np.ndarray) -> None:
        """More of what a conversation without a source hears: see :meth:`AudioPush.push`."""
        self._pushed.push(samples)

    def finish(self) -> None:
        """What was pushed is all: the conversation ends after its last reply."""
        self._pushed.close()

    async def converse(
        self, source: Source | None = None, playback: Playback | None = None
    ) -> AsyncGenerator[Event, None]:
        """Answer every utterance of ``source``; see :meth:`agent.session.Session.converse`.

        Args:
            source: float32 mono at 16 kHz: one array, or chunks; what is pushed if there is none.
            playback: where replies are played, live. Without one they come as events only.
        """
        if self._session is not None:
            raise RuntimeError("a conversation is going on: end it first")
        await self.reset()
        if source is None:
            source = self._pushed
        if isinstance(source, np.ndarray):
            source = _whole(source)
        try:
            memory, self._memory = self._memory, None
            async with Session(self.models, self._config, memory=memory) as self._session:
                events = self._session.converse(source, playback)
                async with aclosing(events):
                    async for event in events:
                        self._tell(event)
                        yield event
        finally:
            self._session = None
            self._tell(UserError("the conversation is over"))
            if source is self._pushed:
                self._pushed = AudioPush()

    def set(self, settings: Mapping[str, Any]) -> None:
        """Change settings, from the next turn on: keys of :data:`agent.config.SETTABLE`.

        Raises:
            UserError: a key that cannot be set, or a value that cannot be.
        """
        config = changed(self._config, settings)
        models = copy.copy(self.models)
        models.config = config
        try:
            models.vocoder()
        except VocoderError as error:
            raise UserError(f"set: {error}") from None
        self._config = self.models.config = config
        silent = None if self._silent is None else self._silent.session
        for session in (self._session, silent):
            if session is not None:
                session.configure(config)

    @property
    def memory(self) -> Memory:
        """What the conversation that is going on remembers; exact when a turn has ended."""
        return Memory() if self._session is None else self._session.memory

    def restore(self, memory: Memory) -> None:
        """Let the next conversation go on from there: a :attr:`memory` of the same model.

        Raises:
            ValueError: a token in it cannot stand in a conversation.
        """
        memory.check(self.models.tokenizer)
        self._memory = memory

    async def interrupt(self, reason: str = "interrupted") -> None:
        """Stop the reply of the conversation that is going on, if there is one."""
        silent = self._silent.session if self._silent is not None else None
        if (session := self._session or silent) is not None:
            await session.interrupt(reason)

    async def ask(self, text: str) -> AsyncGenerator[Event, None]:
        """Answer a typed request: the events of its turn, to its :class:`TurnEnded`.

        Who stops reading interrupts the reply.

        Raises:
            UserError: the text is empty, or too long for the model; or the conversation that the
                request belongs to has ended.
        """
        async with aclosing(self._write(text, say=False)) as events:
            async for event in events:
                yield event

    async def say(self, text: str) -> AsyncGenerator[Event, None]:
        """Speak ``text`` as it is; otherwise as :meth:`ask`."""
        async with aclosing(self._write(text, say=True)) as events:
            async for event in events:
                yield event

    async def submit(self, text: str, say: bool = False) -> int:
        """As :meth:`ask` or :meth:`say`, for those who read the events of :meth:`converse`: waits
        until the turn has begun and gives its number."""
        session = self._session
        if session is None:
            raise UserError("no conversation is going on: begin one")
        return await (session.say(text) if say else session.ask(text))

    async def reset(self) -> None:
        """Forget what was typed without a conversation."""
        silent, self._silent = self._silent, None
        if silent is not None:
            await silent.close()

    def _tell(self, event: Event | BaseException) -> None:
        for reader in self._readers:
            reader.put_nowait(event)  # no more than one reply can wait in it

    async def _write(self, text: str, say: bool) -> AsyncGenerator[Event, None]:
        async with self._writing:
            session = self._session
            if session is None:
                self._silent = self._silent or _Silent(self.models, self._config, self._tell)
                session = self._silent.session
            reader: asyncio.Queue[Event | BaseException] = asyncio.Queue()
            self._readers.add(reader)
            over = True
            try:
                turn = await (session.say(text) if say else session.ask(text))
                over = False
                while not over:
                    event = await reader.get()
                    if isinstance(event, BaseException):
                        over = True
                        raise event
                    if getattr(event, "turn", None) == turn:
                        over = isinstance(event, TurnEnded)
                        yield event
            finally:
                self._readers.discard(reader)
                if not over:
                    await session.interrupt("nobody reads the reply")


class _Silent:
    """A conversation in which nobody speaks: only typed requests make it go on."""

    def __init__(
        self, models: Models, config: Config, tell: Callable[[Event | BaseException], None]
    ) -> None:
        self.session = Session(models, config)
        self._tell = tell
        self._source = AudioPush()
        self._reading = asyncio.create_task(self._read(), name="typed")

    async def _read(self) -> None:
        try:
            async for event in self.session.converse(self._source):
                self._tell(event)
        except Exception as error:
            self._tell(error)

    async def close(self) -> None:
        """End it; a reply that is being made is let go of."""
        if not self._reading.done():  # as it is after a failure, of which the reader was told
            await self.session.interrupt()
        self._source.close()
        await self._reading
        await self.session.__aexit__()


class BlockingAgent:
    """A :class:`SpeechAgent` whose event loop runs in a thread; everything here waits for it.

    Use it as a context manager; the methods give ordinary iterators.
    """

    def __init__(self, config: Config, models: Models | None = None) -> None:
        self._config, self._models = config, models
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="spirit-loop")

    def __enter__(self) -> BlockingAgent:
        self._thread.start()
        try:
            self._agent: SpeechAgent = self._wait(self._open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._wait(self._agent.__aexit__(None, None, None))
        finally:
            self._stop()

    def push(self, samples: np.ndarray) -> None:
        """As :meth:`SpeechAgent.push`; from any thread."""
        self._agent.push(samples)

    def finish(self) -> None:
        """As :meth:`SpeechAgent.finish`; from any thread."""
        self._agent.finish()

    def converse(
        self, source: Source | None = None, playback: Playback | None = None
    ) -> Iterator[Event]:
        """As :meth:`SpeechAgent.converse`."""
        return self._drain(self._agent.converse(source, playback))

    def ask(self, text: str) -> Iterator[Event]:
        """As :meth:`SpeechAgent.ask`."""
        return self._drain(self._agent.ask(text))

    def say(self, text: str) -> Iterator[Event]:
        """As :meth:`SpeechAgent.say`."""
        return self._drain(self._agent.say(text))

    def interrupt(self, reason: str = "interrupted") -> None:
        """As :meth:`SpeechAgent.interrupt`; from any thread."""
        self._wait(self._agent.interrupt(reason))

    async def _open(self) -> SpeechAgent:
        return await SpeechAgent(self._config, self._models).__aenter__()

    def _drain(self, events: AsyncGenerator[Event, None]) -> Iterator[Event]:
        try:
            while (event := self._wait(_next(events))) is not None:
                yield event
        finally:
            self._wait(events.aclose())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _whole(wave: np.ndarray) -> AsyncIterator[np.ndarray]:
    yield wave
