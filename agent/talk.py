"""``python -m agent talk``: a conversation through the microphone and the loudspeaker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console

from agent.commands import ConfigName, Debug, Overrides, Plain, mendable, stderr
from agent.config import Config, load_config
from agent.errors import UserError

if TYPE_CHECKING:
    from agent.events import DeviceChanged
    from agent.models import Models
    from agent.recorder import Recorder
    from agent.session import Session
    from agent.soundcard import SoundCard
    from agent.view import LiveView


@mendable
def talk(
    config: ConfigName = "nano",
    overrides: Overrides = None,
    microphone: Annotated[
        str | None, typer.Option("--input", "-i", metavar="NAME|NUMBER", help="Microphone.")
    ] = None,
    loudspeaker: Annotated[
        str | None, typer.Option("--output", "-o", metavar="NAME|NUMBER", help="Loudspeaker.")
    ] = None,
    half_duplex: Annotated[
        bool, typer.Option(help="Hear nothing while a reply plays: for loudspeakers without [aec].")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the recording, the transcript and the times here."),
    ] = None,
    stdio: Annotated[
        bool,
        typer.Option("--stdio", help="Raw sound through pipes instead of devices: 16-bit mono at "
                                     "16 kHz on standard input and output, at the clock's pace."),
    ] = False,
    plain: Plain = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Talk with it. Speak, listen, interrupt; Ctrl-C ends the conversation.

    Headphones are best: then nothing of its voice reaches the microphone. With a loudspeaker,
    install the echo canceller (pip install 'spiritlm-agent\\[aec]') or use --half-duplex.

    Examples: talk · talk --save talks · talk --input USB --set vad.hangover_ms=400 ·
    arecord -f S16_LE -r 16000 -t raw | talk --stdio | aplay -f S16_LE -r 16000 -t raw
    """
    more = [f"sound.input={microphone}"] if microphone is not None else []
    more += [f"sound.output={loudspeaker}"] if loudspeaker is not None else []
    more += ["turns.half_duplex=true"] if half_duplex else []
    if stdio and (more or save is not None):
        raise UserError("--stdio uses no device and keeps nothing: leave out the other options")
    settings = load_config(config, [*(overrides or ()), *more])
    if debug:
        logging.basicConfig(level=logging.DEBUG, filename="talk.log")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):  # one ends it like this
        if stdio:
            _pipe(settings, config)
            return
        _talk(settings, config, save, plain)


def _pipe(settings: Config, name: str) -> None:
    from agent.models import Models
    from agent.show import loading
    from agent.stdio import converse
    from agent.view import LiveView

    console = stderr()
    with loading(console, f"loading {name}", plain=True) as progress:
        models = Models.load(settings, progress)
    view = LiveView(console, plain=True)
    with (
        open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as source,
        open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as sink,
    ):
        asyncio.run(converse(models, source, sink, view))


def _talk(settings: Config, name: str, save: Path | None, plain: bool) -> None:
    from agent.inventory import about
    from agent.models import Models
    from agent.recorder import Recorder
    from agent.show import loading
    from agent.soundcard import SoundCard
    from agent.view import LiveView

    told: asyncio.Queue[DeviceChanged] = asyncio.Queue(maxsize=64)
    card = SoundCard(settings.sound, told.put_nowait)
    view = LiveView(Console(), plain)
    with contextlib.ExitStack() as stack:
        recorder = None
        if save is not None:  # what is wrong with the folder is better known before models load
            head = about(name, settings.model.layout())
            recorder = Recorder(save, head, view.tell)
            stack.callback(recorder.close)
        with loading(stderr(), f"loading {name}", plain) as progress:
            models = Models.load(settings, progress)
        stack.enter_context(view)
        if recorder is not None:
            stack.enter_context(recorder)  # closed while the view can still tell
        try:
            asyncio.run(_converse(models, card, told, view, recorder))
        finally:
            if card.stuck:  # the sound system would be waited for at the end of the program as well
                stack.close()
                sys.stdout.flush()
                os._exit(0)


async def _converse(
    models: Models, card: SoundCard, told: asyncio.Queue[DeviceChanged], view: LiveView,
    recorder: Recorder | None,
) -> None:  # fmt: skip
    from agent.session import Session

    async def source() -> AsyncIterator[np.ndarray]:
        async for block in card.blocks():
            if recorder is not None:
                recorder.audio(block.raw, block.played)
            yield block.samples

    with contextlib.suppress(NotImplementedError):  # Windows
        stop = asyncio.current_task()
        assert stop is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.cancel)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(card)
        session = await stack.enter_async_context(Session(models, models.config))
        watcher = asyncio.create_task(_watch_devices(told, session, view, recorder))
        stack.callback(watcher.cancel)
        events = session.converse(source(), card.playback)
        async for event in await stack.enter_async_context(aclosing(events)):
            view(event)
            if recorder is not None:
                recorder(event)


async def _watch_devices(
    told: asyncio.Queue[DeviceChanged], session: Session, view: LiveView, recorder: Recorder | None
) -> None:
    """Tell everybody of devices that come and go; the conversation goes on."""
    while True:
        change = await told.get()
        view(change)
        if recorder is not None:
            recorder(change)
        if not change.present:
            await session.device_lost(change.direction)
