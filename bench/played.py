"""Models that are played, so that everything around them can be measured and worn out alone.

They take no time. A loud chunk is speech, whatever it holds; a request of any length is a few
units; the reply is always the same words and a given number of units of 40 ms. The conversation,
the dialogue with its cache, and what serves devices are the real ones.

``python -m bench.played --mqtt mqtt://host`` serves devices with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, cast

import numpy as np
import typer

from agent.config import Config, load_config
from agent.garbage import exempt_what_is_here
from agent.models import Models
from agent.reply import Dialogue
from stages.encoder import Revision
from stages.lm import LanguageModel, Sampling
from stages.prompt import TEXT_TAG
from stages.text import Tokenizer
from stages.units import Unit, UnitFrame
from stages.vad import VoiceActivityDetector
from stages.vocoder_stream import AudioChunk, UnitSpan

UNIT = 640  # samples
LOUD = 0.05
HEARD, SAID = "a tone", "I heard a tone"


class PlayedVad(VoiceActivityDetector):
    """The real detector, for which whatever is loud is voiced."""

    def _is_voiced(self, frame: np.ndarray) -> bool:
        return bool(np.abs(frame).max() > LOUD)


class PlayedEncoder:
    """One unit for each piece of sound."""

    def __init__(self) -> None:
        self._count = 0

    def reset(self) -> None:
        self._count = 0

    def push(self, wave: np.ndarray) -> list[Revision]:
        self._count += 1
        return [Revision(self._count - 1, [UnitFrame("Hu", self._count % 400, 0, final=True)])]

    def settle(self) -> list[Revision]:
        return []


class PlayedModel:
    """A language model that writes what it heard, what it says, and ``units`` units."""

    capacity = 1024

    def __init__(self, tokenizer: Tokenizer, separator: str, units: int) -> None:
        self._tokenizer, self._units = tokenizer, units
        self._words = tokenizer.encode(f"{TEXT_TAG}{HEARD}{separator}{SAID}", bos=False)[1:]
        self._separator = separator
        self._at = 0
        self.ids: list[int] = []

    def another(self) -> PlayedModel:
        """Another stream of the same model."""
        return PlayedModel(self._tokenizer, self._separator, self._units)

    @property
    def length(self) -> int:
        return len(self.ids)

    def reset(self) -> None:
        self.rewind(0)

    def close(self) -> None:
        """Nothing to give back."""

    def append(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self._at = 0

    def rewind(self, length: int) -> None:
        del self.ids[length:]
        self._at = 0

    def decode(self, sampling: Sampling, mask: Any) -> int:
        token = self._next(words=bool(mask[self._tokenizer.speech_tag]))
        self._at += 1
        self.ids.append(token)
        return token

    def _next(self, words: bool) -> int:
        t = self._tokenizer
        if words:
            return self._words[self._at] if self._at < len(self._words) else t.speech_tag
        return t.unit_id("Hu", self._at % 400) if self._at < self._units else t.eos


class PlayedVocoder:
    """640 samples of a quiet ramp for each unit."""

    def __init__(self) -> None:
        self._count = 0

    def reset(self) -> None:
        self._count = 0

    def push(self, unit: Unit) -> list[AudioChunk]:
        start = self._count * UNIT
        span = UnitSpan(self._count, self._count, start, start + UNIT)
        self._count += 1
        return [AudioChunk(np.linspace(0.01, 0.02, UNIT, dtype=np.float32), start, (span,))]

    def flush(self) -> list[AudioChunk]:
        return []


class PlayedModels:
    """Stands where :class:`agent.models.Models` does.

    Args:
        units: of every reply, 40 ms each.
    """

    def __init__(self, config: Config, units: int = 30) -> None:
        self.config, self._units = config, units
        self.layout = config.model.layout()
        self.tokenizer = Tokenizer.load(self.layout)
        self.lm = PlayedModel(self.tokenizer, config.reply.separator, units)

    def beside(self) -> PlayedModels:
        """The same with a stream of its own."""
        view = object.__new__(PlayedModels)
        view.__dict__ |= self.__dict__
        view.lm = self.lm.another()
        return view

    def vad(self) -> PlayedVad:
        return PlayedVad(self.config.vad.settings())

    def encoder(self) -> PlayedEncoder:
        return PlayedEncoder()

    def vocoder(self) -> PlayedVocoder:
        return PlayedVocoder()

    def turn_end(self) -> None:
        return None

    def dialogue(self) -> Dialogue:
        self.lm.reset()
        lm = cast(LanguageModel, self.lm)
        return Dialogue(lm, self.tokenizer, self.config.reply, Sampling(), Sampling())


def played(config: Config, units: int = 30) -> Models:
    """For whoever expects models."""
    return cast(Models, PlayedModels(config, units))


def main(
    mqtt: Annotated[str, typer.Option("--mqtt", metavar="URL")],
    units: Annotated[int, typer.Option(help="Of every reply, 40 ms each.")] = 30,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Serve devices over MQTT with models that are played."""
    from agent.mqtt import Service, until_told
    from agent.mqtt_link import Broker

    config = load_config("nano", overrides or ())
    service = Service(Broker.parse(mqtt, config.mqtt), played(config, units), config)
    exempt_what_is_here()  # as after the loading of real models
    asyncio.run(until_told(service, lambda: typer.echo("serving")))


if __name__ == "__main__":
    typer.run(main)
