"""The models of one configuration, loaded once and shared by sessions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from agent.config import Config
from agent.errors import UserError
from agent.examples import prompt
from agent.garbage import exempt_what_is_here
from agent.graphs import Progress, graphs
from agent.reply import Dialogue
from stages import SAMPLE_RATE
from stages.checkpoint import CheckpointError, Layout
from stages.constrained import JsonGrammar
from stages.encoder import ENCODER_GRAPHS, SpeechTokenizer, UnitEncoder
from stages.lm import LanguageModel
from stages.runtime import Graph
from stages.text import Tokenizer
from stages.units import HUBERT, PITCH, STYLE, Unit
from stages.vad import VoiceActivityDetector
from stages.vocoder import Vocoder
from stages.vocoder_stream import StreamingVocoder

if TYPE_CHECKING:
    from stages.turn_end import TurnEndDetector

_VOCODER_GRAPHS = ("vocoder", "durations")


class Models:
    """What a configuration names, in memory. The methods give stages with a state of their own.

    Raises:
        CheckpointError: parts of the checkpoint do not belong together.
        UserError: the configuration asks for something that cannot be.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        tokenizer: Tokenizer,
        speech_tokenizer: SpeechTokenizer,
        lm: LanguageModel,
        vocoder: Vocoder,
    ) -> None:
        self.config = config
        self.layout = layout
        self.tokenizer = tokenizer
        self.speech_tokenizer = speech_tokenizer
        self.lm = lm
        self._vocoder = vocoder
        self._turn_end: TurnEndDetector | None = None
        self._actions = _grammar(config, tokenizer)
        self._examples = prompt(
            config.conversation.examples, config.reply, speech_tokenizer, layout
        )
        if tokenizer.vocab_size != lm.vocab_size:
            raise CheckpointError(
                f"{layout.lm}: the tokenizer counts {tokenizer.vocab_size} rows, the model "
                f"{lm.vocab_size}"
            )

    @classmethod
    def load(cls, config: Config, progress: Progress | None = None, streams: int = 1) -> Models:
        """Load everything; graphs that are not in the cache yet are exported first.

        Args:
            streams: conversations that a language model on a GPU is to answer together, see
                :meth:`beside`; one of them is the models' own.

        Raises:
            CheckpointError: a file is missing, damaged or at odds with its configuration.
            UserError: the device asked for is not there.
        """
        layout = config.model.layout()
        device = torch_device(config.model.device)
        if config.threads.lm:
            torch.set_num_threads(config.threads.lm)
        made = _graphs(config, layout, progress)
        models = cls(
            config,
            layout,
            Tokenizer.load(layout),
            SpeechTokenizer.load(layout, device, made),
            _language_model(config, layout, device, streams),
            Vocoder.load(layout, device, made.get("vocoder"), made.get("durations")),
        )
        models.warm_up()
        exempt_what_is_here()
        return models

    def warm_up(self) -> None:
        """Run everything once: the first call of a graph or a kernel takes several times as long,
        and should not fall into somebody's first turn."""
        noise = np.random.default_rng(0).normal(0, 0.01, SAMPLE_RATE).astype(np.float32)
        self.speech_tokenizer.encode(noise, allow_unvoiced=True)
        self.lm.append([self.tokenizer.bos] * 16)
        self.lm.append([self.tokenizer.speech_tag])
        self.lm.reset()
        vocoder = self.vocoder()
        for kind in (STYLE, PITCH, HUBERT):
            vocoder.push(Unit(kind, 0))
        vocoder.flush()

    def beside(self) -> Models:
        """The same weights with a stream of tokens of its own, for one more conversation."""
        view = copy.copy(self)
        view.lm = self.lm.another()
        return view

    def turn_end(self) -> TurnEndDetector | None:
        """What judges whether a sentence sounded finished, if that is wanted."""
        if self.config.turns.detector == "none":
            return None
        if self._turn_end is None:
            from stages.turn_end import TurnEndDetector

            self._turn_end = TurnEndDetector.load(self.config.threads.encoder)
        return self._turn_end

    def vad(self) -> VoiceActivityDetector:
        """A detector at the start of a session."""
        return VoiceActivityDetector(self.config.vad.settings())

    def encoder(self) -> UnitEncoder:
        """A streaming encoder; its weights are shared."""
        return UnitEncoder(self.speech_tokenizer)

    def vocoder(self) -> StreamingVocoder:
        """A streaming vocoder; its weights are shared."""
        settings = self.config.vocoder
        return StreamingVocoder(
            self._vocoder,
            speaker=settings.speaker,
            style_id=settings.style,
            first_chunk_frames=settings.first_chunk_frames,
            max_chunk_frames=settings.max_chunk_frames,
            lookahead_frames=settings.lookahead_frames,
        )

    def dialogue(self) -> Dialogue:
        """An empty conversation. It owns the language model's cache: one session at a time."""
        self.lm.reset()
        return Dialogue(
            self.lm,
            self.tokenizer,
            self.config.reply,
            self.config.sampling.text.sampling(),
            self.config.sampling.speech.sampling(),
            unspeakable=self._unspeakable(),
            examples=self._examples,
            actions=self._actions,
        )

    def _unspeakable(self) -> list[int]:
        """Ids of units for which the vocoder has no sound, such as the blank."""
        shape = self._vocoder.config
        known = {HUBERT: shape.units, PITCH: shape.pitches, STYLE: shape.style_tokens}
        every = range(self.tokenizer.vocab_size)
        units = ((i, self.tokenizer.id_to_unit(i)) for i in every)
        return [i for i, u in units if u is not None and known[u.kind] and u.index >= known[u.kind]]


def _language_model(
    config: Config, layout: Layout, device: torch.device, streams: int
) -> LanguageModel:
    wanted = config.model
    dtype = None if wanted.dtype == "auto" else getattr(torch, wanted.dtype)
    if wanted.eight_bits and device.type != "cuda":
        raise UserError(
            f"model.eight_bits is {wanted.eight_bits}, which is for a GPU, and this model runs on "
            "the CPU: leave it out"
        )
    return LanguageModel.load(layout, device, dtype, streams=streams, eight_bits=wanted.eight_bits)


def _grammar(config: Config, tokenizer: Tokenizer) -> JsonGrammar | None:
    if not config.reply.actions:
        return None
    try:
        return JsonGrammar(tokenizer, config.reply.actions)
    except ValueError as error:
        raise UserError(f"reply.actions: {error}") from error


def torch_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is one.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda, but PyTorch sees no CUDA device: check the driver and that "
            "PyTorch was installed with CUDA, or set model.device=cpu"
        )
    return torch.device("cuda")


def _graphs(config: Config, layout: Layout, progress: Progress | None) -> dict[str, Graph]:
    """The graphs to use, by name; none where PyTorch is to run everything."""
    if config.model.runtime == "torch":
        return {}
    device, threads = config.model.device, config.threads
    encoders = graphs(
        layout, ENCODER_GRAPHS, device=device, threads=threads.encoder, progress=progress
    )
    vocoder = graphs(
        layout, _VOCODER_GRAPHS, device=device, threads=threads.vocoder, progress=progress
    )
    return {**encoders, **vocoder}
