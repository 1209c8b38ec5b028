"""A broker of one's own for tests: Mosquitto on a free port of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def program() -> str | None:
    """Where Mosquitto is; Debian keeps it out of a user's path."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """A broker that can be killed and started again on the same port.

    ``lines`` are appended to its configuration.
    """

    def __init__(self, folder: Path, lines: str = "allow_anonymous true") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        self._log = folder / "mosquitto.log"
        owner = "user root\n" if os.geteuid() == 0 else ""
        self._config.write_text(f"listener {self.port} 127.0.0.1\n{owner}{lines}\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        found = program()
        assert found is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [found, "-c", str(self._config)], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise RuntimeError(f"mosquitto did not start: {self._log.read_text(errors='replace')}")

    def kill(self) -> None:
        """End it without a good-bye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def running(folder: Path, lines: str = "allow_anonymous true") -> Iterator[Mosquitto]:
    """A broker. Skips without Mosquitto; fails if SPIRIT_BROKER_REQUIRED=1."""
    if program() is None:
        message = "no MQTT broker: apt-get install mosquitto"
        if os.environ.get("SPIRIT_BROKER_REQUIRED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    broker = Mosquitto(folder, lines)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()
