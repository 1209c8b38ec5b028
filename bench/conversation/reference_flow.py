"""The same turns the way the reference does them, to compare with.

It waits for the endpoint, tokenises the whole utterance, calls Hugging Face ``generate`` over the
whole conversation so far (the cache is kept within a call, as there, and not between calls), and
vocodes the whole reply; then there is sound. Weights, prompt format, sampling and voice activity
detection are the agent's; everything runs in PyTorch, with as many threads as the agent's language
model has (``threads.lm``). The hangover is ``vad.hangover_ms``, which does not follow the speaker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from agent.config import Config
from agent.errors import UserError
from agent.models import torch_device
from agent.schema import SamplingConfig
from bench.conversation.recordings import Request
from bench.conversation.sound import NOISE
from stages import SAMPLE_RATE
from stages.parts import Speech
from stages.prompt import Modality
from stages.spiritlm import SpiritLM
from stages.units import interleave
from stages.vad import SpeechEnded, VoiceActivityDetector

Row = dict[str, Any]
UNITS_PER_SECOND = 40
"""More tokens of speech than a second of it has."""


class _Allowed(LogitsProcessor):
    """Only the tokens of a modality may come."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._banned = ~mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self._banned[: scores.shape[-1]], float("-inf"))


class ReferenceFlow:
    """A conversation without streaming; call :meth:`answer` for each turn.

    Raises:
        UserError: the configuration's replies are not planned as text, which this knows alone.
    """

    def __init__(self, config: Config) -> None:
        if config.reply.mode != "text-then-speech":
            raise UserError(
                f"reply.mode={config.reply.mode}: --baseline reference-flow knows only "
                "text-then-speech; measure without --baseline"
            )
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        layout = config.model.layout()
        device = torch_device(config.model.device)
        self._config = config
        self._device = device
        self._model = SpiritLM(layout, str(device))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._lm = LlamaForCausalLM.from_pretrained(layout.lm, dtype=dtype).eval()
        self._lm.to(device=device)
        self._tokenizer = tokenizer = self._model.text_tokenizer
        text = tokenizer.mask(Modality.TEXT, also=[tokenizer.speech_tag])
        self._masks = [m.to(device) for m in (text, tokenizer.mask(Modality.SPEECH))]
        self._turns: list[list[int]] = []
        self._noise = np.random.default_rng(0)
        self._endpoint(np.zeros(SAMPLE_RATE, np.float32), 0)
        self._reply(np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32))
        self._turns.clear()  # the first call of everything is slow, and is nobody's turn

    def answer(self, request: Request, number: int) -> Row:
        """One turn. The waiting for the endpoint is counted and not waited for."""
        endpoint = self._endpoint(request.wave, request.end)
        waited = (endpoint - request.end) / SAMPLE_RATE
        began = time.perf_counter()
        row, work = self._reply(request.wave[: request.end])
        took = 1e3 * (time.perf_counter() - began)
        row |= {"turn": number, "request": request.name, "work_ms": work}
        if row.pop("sounds"):
            row["ms"] = {
                "end_to_endpoint": 1e3 * waited,
                "endpoint_to_sample": took,
                "end_to_sample": 1e3 * waited + took,
            }
            row["ms"] = {name: round(value, 2) for name, value in row["ms"].items()}
            row["real_time_factor"] = round(took / 1e3 / row["reply_seconds"], 4)
        row["request_seconds"] = round((request.end - request.begin) / SAMPLE_RATE, 2)
        return row

    def _endpoint(self, wave: np.ndarray, end: int) -> int:
        """The sample at which the last endpoint of a request is decided."""
        vad = VoiceActivityDetector(self._config.vad.settings())
        quiet = np.zeros(2 * SAMPLE_RATE, np.float32)
        whole = np.concatenate((quiet[: SAMPLE_RATE // 2], wave, quiet))
        whole += self._noise.normal(0, NOISE, len(whole)).astype(np.float32)
        ended = [event for event in vad.push(whole) if isinstance(event, SpeechEnded)]
        hangover = self._config.vad.hangover_ms * SAMPLE_RATE // 1000
        return ended[-1].endpoint - SAMPLE_RATE // 2 if ended else end + hangover

    def _reply(self, wave: np.ndarray) -> tuple[Row, dict[str, float]]:
        """Tokenise, generate and vocode."""
        tokenizer, times = self._tokenizer, [time.perf_counter()]
        units = self._model.encode(wave, allow_unvoiced=True)
        heard = tokenizer.unit_ids(interleave(units))
        times.append(time.perf_counter())
        text_ids, speech_ids = self._generate(heard)
        times.append(time.perf_counter())
        prompt = tokenizer.decode([*tokenizer.encode("[Text]"), *text_ids, tokenizer.speech_tag])
        spoken = tokenizer.decode(speech_ids)
        pieces = self._model.read(prompt, spoken, "speech", shortest_speech=0) if spoken else []
        sound = sum(len(piece.wave) for piece in pieces if isinstance(piece, Speech))
        times.append(time.perf_counter())
        steps = ("encode", "generate", "vocode")
        work = {
            n: round(1e3 * (b - a), 1) for n, a, b in zip(steps, times, times[1:], strict=False)
        }
        said = tokenizer.decode(text_ids).partition(self._config.reply.separator)[2]
        row: Row = {
            "outcome": "answered" if sound else "silent",
            "said": said,
            "tokens_before": self._before,
            "tokens": len(text_ids) + len(speech_ids),
            "reply_seconds": round(sound / SAMPLE_RATE, 2),
            "sounds": bool(sound),
        }
        return row, work

    def _generate(self, heard: Sequence[int]) -> tuple[list[int], list[int]]:
        """The reply's text and its units, and the turn remembered."""
        tokenizer, reply, sampling = self._tokenizer, self._config.reply, self._config.sampling
        begin = tokenizer.encode("[Speech]")[:-1]
        turn = [tokenizer.speech_tag, *heard, tokenizer.text_tag]
        positions = int(self._lm.config.max_position_embeddings)
        longest = int(reply.max_seconds * UNITS_PER_SECOND)
        limit = min(reply.context_tokens, positions - reply.reserve_tokens)
        while self._turns and sum(map(len, self._turns)) > limit:
            self._turns.pop(0)  # the agent forgets as well when its context is full
        before = [*begin, *(i for past in self._turns for i in past)]
        self._before = len(before)
        text = self._continue([*before, *turn], 0, sampling.text, reply.max_text_tokens)
        while text and text[-1] in (tokenizer.speech_tag, tokenizer.eos):
            text.pop()
        turn += [*text, tokenizer.speech_tag]
        room = positions - len(before) - len(turn)
        units = self._continue([*before, *turn], 1, sampling.speech, min(longest, room))
        self._turns.append([*turn, *units])
        return text, [i for i in units if i != tokenizer.eos]

    def _continue(self, ids: list[int], mask: int, how: SamplingConfig, most: int) -> list[int]:
        given = torch.tensor([ids], device=self._device)
        generate: Callable[..., torch.Tensor] = getattr(self._lm, "generate")  # noqa: B009
        drawn = (
            {} if how.greedy else {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        )
        torch.manual_seed(how.seed or 0)
        out = generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max(1, most),
            do_sample=not how.greedy,
            eos_token_id=[self._tokenizer.eos, self._tokenizer.speech_tag],
            pad_token_id=self._tokenizer.eos,
            logits_processor=LogitsProcessorList([_Allowed(self._masks[mask])]),
            **drawn,
        )
        return [int(i) for i in out[0, len(ids) :]]
