"""The offline API for researchers: encode, decode and generate with one object.

>>> model = SpiritLM.load("nano")                                         # doctest: +SKIP
>>> model.generate([Speech("question.wav")], output="text")[0].text       # doctest: +SKIP

A prompt is a list of parts; few-shot prompts are longer lists. With a pretrained model:

* speech recognition: ``[Speech("a.wav"), Text("what a says"), Speech("b.wav")]``, output "text",
  ``stop="[Speech]"``
* speech synthesis: ``[Text("what a says"), Speech("a.wav"), Text("say this")]``, output "speech"
* classification: ``[Speech("a.wav"), Text("happy"), Speech("b.wav"), Text("sad"),
  Speech("c.wav")]``, output "text", ``stop="[Speech]"``
* continuation in both modalities: ``[Speech("a.wav")]``, output "any"

What generation returns can be given back as parts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from stages import SAMPLE_RATE
from stages.checkpoint import Layout
from stages.lm import LanguageModel, Sampling
from stages.models import find_model
from stages.parts import Part, Speech, Text, read_audio
from stages.prompt import SHORTEST_SPEECH, Modality, Run, build_prompt, read_continuation
from stages.text import IncrementalDecoder, Tokenizer
from stages.units import Units, speech_tokens, string_to_units, units_to_string
from stages.vocoder import Vocoder

if TYPE_CHECKING:
    from stages.encoder import SpeechTokenizer

__all__ = ["Part", "Speech", "SpiritLM", "Text", "find_model"]


class SpiritLM:
    """A Spirit LM with its speech tokenizer and vocoder, each loaded when first needed.

    Attributes:
        layout: where the weights are.
        expressive: whether the model has pitch and style units.
    """

    def __init__(
        self, layout: Layout, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.layout = layout
        self.expressive = layout.expressive
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "nano",
        version: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SpiritLM:
        """Find a model; its parts are loaded when first used.

        Args:
            name_or_path: see :func:`stages.models.find_model`.
            device: a torch device; by default the GPU if there is one.
            dtype: of the language model; by default float32 on the CPU, else bfloat16.

        Raises:
            CheckpointError: no such model.
        """
        return cls(find_model(name_or_path, version), device, dtype)

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.layout)

    @cached_property
    def lm(self) -> LanguageModel:
        return LanguageModel.load(self.layout, device=self.device, dtype=self._dtype)

    @cached_property
    def speech_tokenizer(self) -> SpeechTokenizer:
        from stages.encoder import SpeechTokenizer

        return SpeechTokenizer.load(self.layout, self.device)

    @cached_property
    def vocoder(self) -> Vocoder:
        return Vocoder.load(self.layout, device=self.device)

    # Speech to units and back.

    def encode(
        self,
        audio: str | Path | np.ndarray,
        rate: int | None = None,
        channel: int | None = None,
        allow_unvoiced: bool = False,
    ) -> Units:
        """The units of a recording, each stream at its own rate.

        Args:
            audio: a file, or samples ``[n]`` or ``[n, channels]`` in [-1, 1].
            rate: Hz, of samples; 16000 by default.
            channel: the one to take; by default all are averaged.
            allow_unvoiced: take a whisper, too, which the reference refuses.

        Returns:
            empty streams for less than 1280 samples at 16 kHz.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not audio, samples that are no numbers, or (Expressive) no voiced frame.
        """
        if isinstance(audio, np.ndarray):
            samples, given = audio, SAMPLE_RATE if rate is None else rate
        else:
            samples, given = read_audio(audio)
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(
                f"samples of type {samples.dtype}: give floats in [-1, 1] (int16: divide by 32768)"
            )
        if not np.isfinite(samples).all():
            first = int(np.argwhere(~np.isfinite(samples))[0][0])
            raise ValueError(f"sample {first} of the audio is {samples[first]}: not a number")
        return self.speech_tokenizer.encode(samples, given, channel, allow_unvoiced)

    def encode_string(
        self, audio: str | Path | np.ndarray, rate: int | None = None, channel: int | None = None
    ) -> str:
        """As :meth:`encode`, as the string of tokens that the language model reads."""
        return self.units_string(self.encode(audio, rate, channel))

    def units_string(self, units: Units) -> str:
        """Units as this model reads them: a Base model leaves pitch and style out."""
        wanted = None if self.expressive else False
        return units_to_string(units, has_pitch=wanted, has_style=wanted)

    def decode(
        self, units: Units | str, speaker: int | None = None, seed: int | None = None
    ) -> np.ndarray:
        """Speak units: a float32 wave at 16 kHz.

        As in the reference, durations are predicted, unless pitch comes at its own rate (as from
        :meth:`encode` of an Expressive model): then every unit lasts 40 ms. For a Base model give
        the string, in which repeats are dropped.

        Args:
            speaker: index of the voice; the vocoder's default otherwise.
            seed: of the style, drawn where there is pitch but no style.

        Raises:
            ValueError: nothing to speak, or a unit or speaker that the vocoder does not have.
        """
        return self.vocoder.decode(units, speaker=speaker, seed=seed)

    # Generation.

    def prompt(self, parts: Iterable[Part], output: str | Modality = "any") -> str:
        """The prompt string for ``parts``; see :func:`stages.prompt.build_prompt`."""
        return build_prompt([self._part(part) for part in parts], output)

    def generate(
        self,
        parts: Iterable[Part] | str,
        output: str | Modality = "any",
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.9,
        top_p: float = 0.95,
        greedy: bool = False,
        seed: int | None = None,
        speaker: int | None = None,
        stop: str | Sequence[str] = (),
        force: bool = True,
        shortest_speech: int = SHORTEST_SPEECH,
    ) -> list[Text | Speech]:
        """Continue a prompt in text, speech or whatever comes.

        Args:
            parts: text and speech, or a prompt string with its tags.
            output: "text", "speech" or "any".
            max_new_tokens: the most that is generated; less if the model's positions run out.
            temperature, top_p, greedy, seed: see :class:`stages.lm.Sampling`; the seed also draws
                the style of speech that has none.
            speaker: index of the voice of the output.
            stop: generation ends where one of these strings comes; it is cut off. A tag given
                here may be generated even where the modality would ban it.
            force: ban the other modality's tokens.
            shortest_speech: see :meth:`read`.

        Returns:
            for "text" one :class:`Text`, for "speech" one :class:`Speech` (without samples if
            nothing could be spoken), for "any" pieces of both, maybe none. Speech holds the new
            samples and the new tokens.

        Raises:
            ValueError: the prompt does not fit into the model, or an argument is out of range.
        """
        prompt = parts if isinstance(parts, str) else self.prompt(parts, output)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, greedy=greedy)
        ids = self.text_tokenizer.encode(prompt)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        new = self.continue_ids(ids, output if force else "any", max_new_tokens, sampling, stops)
        before = self.text_tokenizer.decode(ids)
        continuation = self.text_tokenizer.decode(ids + new)[len(before) :]
        for end in filter(None, stops):
            continuation = continuation.split(end, 1)[0]
        return self.read(
            before,
            continuation,
            output,
            speaker=speaker,
            seed=seed,
            shortest_speech=shortest_speech,
        )

    def continue_ids(
        self,
        ids: Sequence[int],
        output: str | Modality,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> list[int]:
        """The ids that follow ``ids``, the end of the sequence included if it comes.

        What the cache has in common with ``ids`` is not computed again.

        Raises:
            ValueError: ``ids`` leave no room in the cache.
        """
        tokenizer, lm = self.text_tokenizer, self.lm
        if len(ids) >= lm.capacity:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model room for {lm.capacity}: "
                "give fewer or shorter parts"
            )
        shared = 0
        while shared < min(lm.length, len(ids)) and lm.ids[shared] == ids[shared]:
            shared += 1
        lm.rewind(shared)
        lm.append(ids[shared:])
        tags = {m.tag: i for m, i in ((Modality.TEXT, tokenizer.text_tag),
                                      (Modality.SPEECH, tokenizer.speech_tag))}  # fmt: skip
        mask = tokenizer.mask(output, also=[tags[s] for s in stop if s in tags])
        mask = mask.to(lm.device)
        said = _Watch(tokenizer, stop)
        new: list[int] = []
        while len(new) < min(max_new_tokens, lm.capacity - len(ids)):
            new.append(lm.decode(sampling, mask))
            if new[-1] == tokenizer.eos or said.stops_at(new[-1]):
                break
        return new

    def read(
        self,
        prompt: str,
        continuation: str,
        output: str | Modality = "any",
        *,
        speaker: int | None = None,
        seed: int | None = None,
        shortest_speech: int = SHORTEST_SPEECH,
    ) -> list[Text | Speech]:
        """Turn what was generated after ``prompt`` into text and speech.

        The rules of what is dropped and cut are those of the reference, see
        :func:`stages.prompt.read_continuation`. Where it fails, this goes on: speech without
        pitch takes the pitch before it, units that no vocoder can speak are left out, text in
        between is ignored.

        Args:
            shortest_speech: output "any" drops speech of fewer units, plus one, than this, unless
                it comes first; 0 keeps all.
        """
        rng = random.Random(seed)
        outputs: list[Text | Speech] = []
        context = prompt
        for run in read_continuation(prompt, continuation, output, shortest_speech):
            if run.modality is Modality.SPEECH and (
                speech_tokens(run.content) or Modality.parse(output) is Modality.SPEECH
            ):
                outputs.append(self._speak(run, context, speaker, rng))
            else:
                outputs.append(Text(run.content))
            context += run.content
        return outputs

    def _speak(self, run: Run, context: str, speaker: int | None, rng: random.Random) -> Speech:
        tokens = speech_tokens(run.content[run.prompt :])
        units = self._speakable(string_to_units(run.content), context)
        if not units.hubert:
            return Speech(np.zeros(0, np.float32), tokens=tokens)
        wave = self.vocoder.decode(units, speaker=speaker, seed=rng.getrandbits(32))
        share, of = run.cut
        return Speech(wave[-(-len(wave) * share // of) :], tokens=tokens)

    def _speakable(self, units: Units, context: str) -> Units:
        """``units`` as the vocoder can speak them: those it has, and with a pitch."""
        pitch, style = units.pitch, units.style
        if self.expressive and pitch is None:
            before = string_to_units(context + "[Hu0]")
            pitch = [before.pitch[-1] if before.pitch else 0] * len(units.hubert)
            if style is None and before.style is not None:
                style = before.style[-1:] * len(units.hubert)
        known = [n for n, i in enumerate(units.hubert) if i < self.vocoder.config.units]

        def keep(stream: list[int] | None) -> list[int] | None:
            return None if stream is None else [stream[n] for n in known]

        return Units([units.hubert[n] for n in known], keep(pitch), keep(style))

    def _part(self, part: Part) -> tuple[Modality, str]:
        """A part as its modality and its text or token string."""
        if isinstance(part, tuple):
            name, content = part
            modality = Modality.parse(name, of_input=True)
            if modality is Modality.SPEECH and isinstance(content, str):
                content = Path(content)
        else:
            content = part
            modality = Modality.TEXT if isinstance(part, str | Text) else Modality.SPEECH
        if modality is Modality.TEXT:
            return modality, content.text if isinstance(content, Text) else str(content)
        if isinstance(content, Path | np.ndarray):
            content = Speech(content)
        elif isinstance(content, Units):
            content = Speech(tokens=content)
        if not isinstance(content, Speech):
            raise ValueError(
                f"part {content!r}: expected text, a path, samples, units, Text or Speech"
            )
        return modality, self._tokens(content)

    def _tokens(self, speech: Speech) -> str:
        tokens = speech.tokens
        if tokens is None:
            if speech.audio is None:
                raise ValueError("Speech(): give audio or tokens")
            tokens = self.encode(speech.audio, speech.rate)
        return tokens if isinstance(tokens, str) else self.units_string(tokens)


class _Watch:
    """Looks for stop strings in what is generated."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = [s for s in stop if s]
        self._text = ""

    def stops_at(self, i: int) -> bool:
        if not self._stop:
            return False
        for item in self._decoder.push(i):
            self._text += item.tag if isinstance(item, Modality) else str(item)
        return any(s in self._text for s in self._stop)
