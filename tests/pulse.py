"""A virtual sound card: a microphone and a loudspeaker, null sinks of private PulseAudio servers.

What is said with :meth:`VirtualCard.say` is what the default microphone records; what is played to
the default output is what :meth:`VirtualCard.listening` hears. Each device has a server of its own:
a server with another device left would quietly move a stream there when one is unplugged, where a
real card takes its streams along. PortAudio reaches both through ALSA's ``pulse`` plugin.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agent.devices import refresh

NEEDED = ("pulseaudio", "pactl", "parec", "pacat")
MEND = "apt-get install pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"
RATE = 48_000  # of the virtual devices, Hz
NAMES = ("mic", "speaker")
# What leads a program to the card, and nothing else of it.
VARIABLES = ("ALSA_CONFIG_PATH", "PULSE_RUNTIME_PATH", "PULSE_STATE_PATH", "PULSE_CONFIG_PATH")
_START_SECONDS = 10.0
_ALSA = """
</usr/share/alsa/alsa.conf>
pcm.test_mic {{ type pulse server "unix:{folder}/mic.socket" device mic.monitor }}
pcm.test_speaker {{ type pulse server "unix:{folder}/speaker.socket" device speaker }}
pcm.!default {{ type asym playback.pcm test_speaker capture.pcm test_mic }}
"""


@dataclass
class VirtualCard:
    """A running card in ``folder``; ``environment`` leads a program to it.

    ``modules`` holds the devices plugged in.
    """

    folder: Path
    environment: dict[str, str]
    modules: dict[str, str]

    def pactl(self, device: str, *arguments: str) -> str:
        """Ask the server of a device something; its answer."""
        done = subprocess.run(
            ("pactl", *arguments),
            env=self._reaching(device),
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    def plug(self, device: str) -> None:
        """Plug in the ``mic`` or the ``speaker``."""
        self.modules[device] = self.pactl(
            device, "load-module", "module-null-sink", f"sink_name={device}", f"rate={RATE}",
            "channels=2", "norewinds=1",  # or an idle sink is deaf for up to two seconds
        )  # fmt: skip

    def unplug(self, device: str) -> None:
        """Pull out the ``mic`` or the ``speaker``, under whoever uses it."""
        self.pactl(device, "unload-module", self.modules.pop(device))

    def say(self, samples: np.ndarray, rate: int) -> threading.Thread:
        """Speak float32 mono ``samples`` into the microphone; join to wait until it is said."""

        def speak() -> None:
            subprocess.run(
                ("pacat", "--playback", "--device=mic", f"--rate={rate}", "--channels=1",
                 "--format=float32le", "--latency-msec=300"),
                env=self._reaching("mic"),
                input=np.asarray(samples, "<f4").tobytes(),
                timeout=120,
                check=True,
            )  # fmt: skip

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        return thread

    @contextlib.contextmanager
    def listening(self, rate: int) -> Iterator[subprocess.Popen[bytes]]:
        """What leaves the loudspeaker, as float32 mono bytes on the process's ``stdout``."""
        recorder = subprocess.Popen(
            ("parec", "--device=speaker.monitor", f"--rate={rate}", "--channels=1",
             "--format=float32le", "--latency-msec=10"),
            env=self._reaching("speaker"),
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield recorder
        finally:
            recorder.kill()
            recorder.wait()

    def _reaching(self, device: str) -> dict[str, str]:
        return {**self.environment, "PULSE_SERVER": f"unix:{self.folder}/{device}.socket"}


def missing() -> str:
    """What a virtual card lacks here, with the mend; empty if nothing."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"no virtual sound card, {', '.join(absent)} missing: {MEND}" if absent else ""


@contextlib.contextmanager
def virtual_card() -> Iterator[VirtualCard]:
    """Start the servers and plug both devices in; stop them at the end."""
    with tempfile.TemporaryDirectory(prefix="spirit-pulse-") as name, contextlib.ExitStack() as all:
        folder = Path(name)
        card = VirtualCard(folder, _environment(folder), {})
        for device in NAMES:
            all.enter_context(_server(card, device))
            card.plug(device)
        yield card


def _environment(folder: Path) -> dict[str, str]:
    for part in ("runtime", "config"):
        (folder / part).mkdir(mode=0o700)
    (folder / "asound.conf").write_text(_ALSA.format(folder=folder), encoding="utf-8")
    inherited = {k: v for k, v in os.environ.items() if k != "PULSE_SERVER"}
    return inherited | {
        "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
        "XDG_RUNTIME_DIR": str(folder / "runtime"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "PULSE_RUNTIME_PATH": str(folder / "runtime"),
        "PULSE_STATE_PATH": str(folder / "config"),
        "PULSE_CONFIG_PATH": str(folder / "config"),
    }


@contextlib.contextmanager
def _server(card: VirtualCard, device: str) -> Iterator[None]:
    log = card.folder / f"{device}.log"
    socket = f"socket={card.folder}/{device}.socket auth-anonymous=1"
    with log.open("wb") as output:
        server = subprocess.Popen(
            ("pulseaudio", "-n", "--daemonize=no", "--system=false", "--exit-idle-time=-1",
             "--use-pid-file=no", "--high-priority=no", "--realtime=no",
             f"-L module-native-protocol-unix {socket}"),
            env=card.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _await(card, device, server, log)
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await(card: VirtualCard, device: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            card.pactl(device, "info")
            return
        time.sleep(0.05)  # the server tells nobody that it is up
    raise RuntimeError(f"pulseaudio did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def sound_server() -> Iterator[VirtualCard]:
    """A virtual sound card. Skips without PulseAudio; fails if SPIRIT_SOUND_REQUIRED=1."""
    if absent := missing():
        if os.environ.get("SPIRIT_SOUND_REQUIRED") == "1":
            pytest.fail(absent)
        pytest.skip(absent)
    with virtual_card() as card, pytest.MonkeyPatch.context() as patch:
        for key in VARIABLES:
            patch.setenv(key, card.environment[key])
        yield card


@pytest.fixture
def pulse(sound_server: VirtualCard) -> VirtualCard:
    """The virtual sound card, with both devices plugged in."""
    for device in NAMES:
        if device not in sound_server.modules:
            sound_server.plug(device)
    refresh()  # PortAudio may have looked at another card before
    return sound_server
