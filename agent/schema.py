"""What can be set.

Every key is known here and described, with its unit; :mod:`agent.config` reads files into it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stages.vad import VadSettings

if TYPE_CHECKING:  # both import torch, which `--help` should not wait for
    from stages.checkpoint import Layout
    from stages.lm import Sampling


def _switch(value: object) -> object:
    """YAML takes a bare ``on`` or ``off`` for true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which checkpoint, and on what it runs."""

    root: str | None = Field(
        default=None,
        description="folder with speech_tokenizer/ and spiritlm_model/; null looks into "
        "$SPIRITLM_CHECKPOINTS_DIR for the model named in lm, or takes the nano that comes with "
        "this program when lm is null too",
    )
    lm: str | None = Field(
        default=None,
        description="folder under spiritlm_model/; null when there is only one. Without a root, "
        "also smol, or the folder of a language model that speaks with nano's voice",
    )
    version: Literal["base", "expressive"] | None = Field(
        default=None,
        description="which kind of units the model speaks; null reads it off the checkpoint",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where models run; auto takes CUDA where there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the language model; auto is bfloat16 on CUDA, float32 on a CPU",
    )
    eight_bits: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="weights of the language model in 8 bits, on a GPU only: half of the memory, "
        "faster, no longer exact; null for none",
    )
    runtime: Literal["onnx", "torch"] = Field(
        default="onnx",
        description="what runs the encoders: exported graphs on ONNX Runtime, or PyTorch",
    )

    def layout(self) -> Layout:
        """Where the parts of the checkpoint lie.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        from stages.checkpoint import find_layout
        from stages.models import find_model

        if self.root is not None:
            return find_layout(self.root, self.lm, self.version)
        return find_model(self.lm or "nano", self.version)


class VadConfig(Section):
    """When somebody speaks. The fields are those of :class:`stages.vad.VadSettings`."""

    aggressiveness: int = Field(
        default=2,
        ge=0,
        le=3,
        description="of WebRTC's detector: 0 hears speech in most, 3 in least",
    )
    frame_ms: Literal[10, 20, 30] = Field(default=20, description="length of one vote, ms")
    window_ms: int = Field(default=160, ge=10, description="votes looked at together, ms")
    on_share: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="speech begins at this share of voiced frames in the window",
    )
    off_share: float = Field(
        default=0.3, gt=0, le=1, description="silence begins under this share of voiced frames"
    )
    pre_roll_ms: int = Field(
        default=300, ge=0, description="audio kept from before speech began, ms"
    )
    min_speech_ms: int = Field(
        default=160, ge=0, description="less voiced audio is no utterance, ms"
    )
    hangover_ms: int = Field(default=600, ge=0, description="silence that ends an utterance, ms")
    trailing_ms: int = Field(
        default=200, ge=0, description="how much of that silence still counts as audio, ms"
    )
    max_utterance_ms: int = Field(
        default=30_000, ge=500, description="an utterance is cut here, ms"
    )
    energy_floor_dbfs: float = Field(
        default=-55.0, ge=-120, le=0, description="frames below this level are silence, dBFS (RMS)"
    )

    @model_validator(mode="after")
    def _possible(self) -> VadConfig:
        self.settings()
        return self

    def settings(self) -> VadSettings:
        """For the detector."""
        return VadSettings(**self.model_dump())


class SamplingConfig(Section):
    """How a token is chosen."""

    temperature: float = Field(
        default=0.9, gt=0, le=10, description="divides the logits; 1 changes none"
    )
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="likeliest tokens up to this probability; 1 keeps all"
    )
    top_k: int = Field(default=0, ge=0, description="this many likeliest tokens; 0 keeps all")
    seed: int | None = Field(
        default=None, ge=0, description="makes replies repeatable; null draws afresh each time"
    )
    greedy: bool = Field(default=False, description="take the likeliest token; the rest is ignored")

    def sampling(self) -> Sampling:
        """For the language model."""
        from stages.lm import Sampling

        return Sampling(**self.model_dump())


class SamplingSections(Section):
    """Words and sounds are chosen differently: a wrong word costs more."""

    text: SamplingConfig = Field(default=SamplingConfig(), description="for text tokens")
    speech: SamplingConfig = Field(default=SamplingConfig(), description="for speech units")


class ReplyConfig(Section):
    """The form of a reply, and when to stop."""

    mode: Literal["text-then-speech", "speech", "any"] = Field(
        default="text-then-speech",
        description="text-then-speech plans words and speaks them (nano); speech continues in "
        "units, any in what the model likes (models that were not trained on dialogue)",
    )
    separator: str = Field(
        default=" | ",
        description="between transcript and reply in text-then-speech; empty for none",
    )
    user_tag: str = Field(
        default="", description='text before each request, such as "User: "; empty for none'
    )
    agent_tag: str = Field(
        default="", description='text before each reply, such as " Agent: "; empty for none'
    )
    stop_text: str = Field(
        default="",
        description="a reply ends where it would write this (the turn tag of a model that goes on "
        "with the user's part); empty for none",
    )
    max_text_tokens: int = Field(
        default=160, ge=1, le=4096, description="limit of text in a reply, tokens"
    )
    max_seconds: float = Field(
        default=20.0, gt=0, le=600, description="limit of sound in a reply, s"
    )
    skip_silence: bool = Field(
        default=True, description="begin a reply at its first sound (above -40 dBFS)"
    )
    trailing_silence_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="silence at the end of a reply after which it is over, s",
    )
    actions: dict[str, Any] | None = Field(
        default=None,
        description="JSON schema of the actions that may begin a planned reply, or the name of a "
        "file that holds it, for models trained on them or shown examples: "
        '{"action":"stop"} I stand still. null for none',
    )
    context_tokens: int = Field(
        default=1600, ge=64, description="past conversation that is remembered, tokens"
    )
    reserve_tokens: int = Field(
        default=1024, ge=1, description="room kept for the next request and its reply, tokens"
    )


class ExampleConfig(Section):
    """A turn that precedes the conversation."""

    user: str = Field(description="what the user says: text, or a recording's file name")
    agent: str = Field(description="what is answered: text, or a recording's file name")


class ConversationConfig(Section):
    """What the model is to know before somebody speaks."""

    examples: tuple[ExampleConfig, ...] = Field(
        default=(),
        description="turns that show a model which only continues how the conversation goes; they "
        "stay in its context for ever",
    )


class VocoderConfig(Section):
    """The voice."""

    speaker: int | None = Field(
        default=None, ge=0, description="number of the voice; null takes the checkpoint's default"
    )
    style: int | None = Field(
        default=None, ge=0, description="number of the style, Base only; null takes the default"
    )
    first_chunk_frames: int = Field(
        default=4, ge=1, description="length of the first sound, frames of 40 ms; smaller is sooner"
    )
    max_chunk_frames: int = Field(
        default=32, ge=1, description="chunks double up to this length, frames of 40 ms"
    )
    lookahead_frames: int | None = Field(
        default=None,
        ge=0,
        description="frames of 40 ms that must be known after a chunk; null for as many as make "
        "it exact, fewer is sooner and approximate",
    )

    @model_validator(mode="after")
    def _growing(self) -> VocoderConfig:
        if self.max_chunk_frames < self.first_chunk_frames:
            raise ValueError(
                f"max_chunk_frames is {self.max_chunk_frames}, expected at least "
                f"first_chunk_frames ({self.first_chunk_frames})"
            )
        return self


class ChannelsConfig(Section):
    """Capacities of the channels between stages; a full one makes its producer wait."""

    speech: int = Field(default=256, ge=1, description="VAD to encoder, VAD frames")
    units: int = Field(default=64, ge=1, description="encoder to language model, batches of units")
    reply: int = Field(default=128, ge=1, description="language model to vocoder, units")
    events: int = Field(default=256, ge=1, description="to whoever listens, events")


class TurnsConfig(Section):
    """Who speaks when."""

    speculate: bool = Field(
        default=True,
        description="prepare the reply in the silence that may be the end; throw it away if not",
    )
    adapt: bool = Field(
        default=True,
        description="let the hangover follow the speaker's pauses, from vad.hangover_ms on",
    )
    min_hangover_ms: int = Field(default=300, ge=0, description="it becomes no shorter, ms")
    max_hangover_ms: int = Field(default=1500, ge=0, description="nor longer, ms")
    detector: Literal["none", "smart-turn"] = Field(
        default="none",
        description="asked in the silence whether the sentence sounded finished; smart-turn needs "
        "pip install --no-deps pipecat-ai==1.14.0",
    )
    barge_in: bool = Field(default=True, description="speech over a reply interrupts it")
    barge_in_ms: int = Field(
        default=400,
        ge=0,
        description="speech this long interrupts; anything shorter (a cough, mm-hmm) only ducks "
        "the reply, ms",
    )
    half_duplex: bool = Field(
        default=False,
        description="hear nothing while a reply plays: without headphones or canceller",
    )
    stall_seconds: float = Field(
        default=15.0,
        gt=0,
        le=600,
        description="a turn in which nothing moves for so long is let go of, s",
    )

    @model_validator(mode="after")
    def _ordered(self) -> TurnsConfig:
        if self.max_hangover_ms < self.min_hangover_ms:
            raise ValueError(
                f"max_hangover_ms is {self.max_hangover_ms}, expected at least "
                f"min_hangover_ms ({self.min_hangover_ms})"
            )
        return self


class SoundConfig(Section):
    """The sound card."""

    input: int | str | None = Field(
        default=None, description="microphone: number or part of its name; null for the default"
    )
    output: int | str | None = Field(
        default=None, description="loudspeaker: number or part of its name; null for the default"
    )
    block_ms: Literal[10, 20] = Field(default=10, description="audio moved at a time, ms")
    latency_ms: int = Field(
        default=40,
        ge=0,
        le=2000,
        description="sound kept ready before a reply starts; grows by itself where the machine "
        "stutters, ms",
    )
    max_latency_ms: int = Field(default=400, ge=0, le=5000, description="it grows no further, ms")
    echo: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        default="auto",
        description="cancel the reply's echo in the microphone; auto where "
        "pip install 'spiritlm-agent[aec]' was done",
    )
    stall_seconds: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="a device that delivers nothing for so long is opened anew, s",
    )


DEVICE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What a device on a network may be called."""


class MqttConfig(Section):
    """Serving devices over MQTT (docs/mqtt.md)."""

    base: str = Field(
        default="spirit",
        pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$",
        max_length=128,
        description="what all topics begin with",
    )
    credentials: str | None = Field(
        default=None,
        description="file with one line, user:password; null takes SPIRIT_MQTT_USER and "
        "SPIRIT_MQTT_PASSWORD from the environment",
    )
    ca: str | None = Field(
        default=None,
        description="file with the certificate authority that vouches for the broker (PEM), for "
        "mqtts://; null trusts those of the system",
    )
    certificate: str | None = Field(
        default=None, description="file with our own certificate (PEM), for brokers that ask for it"
    )
    key: str | None = Field(
        default=None,
        description="file with its private key (PEM); null looks into the certificate's file. "
        "SPIRIT_MQTT_KEY_PASSWORD opens one that is locked",
    )
    shared: bool = Field(
        default=False,
        description="share the devices with other services of the same base: all of them need this",
    )
    group: str = Field(
        default="spirit-agents",
        pattern=r"^[A-Za-z0-9_.-]+$",
        max_length=64,
        description="name of the shared subscription, the same for all services; where devices are "
        "not trusted, one that they cannot guess",
    )
    away_seconds: int = Field(
        default=60,
        ge=0,
        le=86_400,
        description="commands and requests are kept by the broker while the service is away for so "
        "long, s; not with mqtt.shared",
    )
    snapshot_bytes: int = Field(
        default=16_384,
        ge=512,
        le=262_144,
        description="of a conversation kept by the broker, so that another service or a later one "
        "can go on with it, bytes; the oldest turns are left out",
    )
    snapshot_seconds: int = Field(
        default=86_400,
        ge=0,
        le=31_536_000,
        description="a conversation is kept for so long after its last turn, s; 0 for ever",
    )
    max_sessions: int = Field(
        default=4, ge=1, le=1000, description="devices served at once; others are told busy"
    )
    idle_seconds: float = Field(
        default=120.0, gt=0, description="a device silent for so long gives up its place, s"
    )
    max_packet_bytes: int = Field(
        default=16_384, ge=64, le=1_048_576, description="longer payloads are refused, bytes"
    )
    max_messages: float = Field(
        default=250.0,
        gt=0,
        description="of one device; more are refused, per second (twice as many at once)",
    )
    max_bytes: float = Field(
        default=262_144.0,
        gt=0,
        description="of one device; more are refused, bytes per second (twice as many at once)",
    )
    max_text: int = Field(
        default=400, ge=1, le=4000, description="longer typed requests are refused, characters"
    )
    jitter_ms: int = Field(
        default=200, ge=0, le=2000, description="audio held back at most for a late packet, ms"
    )
    lead_ms: int = Field(
        default=400, ge=40, le=10_000, description="reply sent ahead of the playhead at most, ms"
    )


class ThreadsConfig(Section):
    """CPU threads inside a computation; 0 leaves it to the library."""

    encoder: int = Field(default=1, ge=0, le=256, description="threads of each encoder graph")
    lm: int = Field(default=1, ge=0, le=256, description="threads of the language model (PyTorch)")
    vocoder: int = Field(default=1, ge=0, le=256, description="threads of the vocoder")


class AudioConfig(Section):
    """Audio from outside."""

    max_seconds: float = Field(default=3600.0, gt=0, description="longer files are refused, s")
    chunk_ms: int = Field(default=20, ge=1, le=1000, description="audio handed on at a time, ms")


class Config(Section):
    """Everything that can be set."""

    model: ModelConfig = Field(
        default=ModelConfig(), description="which checkpoint, and where it runs"
    )
    vad: VadConfig = Field(default=VadConfig(), description="when somebody speaks")
    sampling: SamplingSections = Field(
        default=SamplingSections(), description="how tokens are chosen"
    )
    reply: ReplyConfig = Field(default=ReplyConfig(), description="form and limits of a reply")
    conversation: ConversationConfig = Field(
        default=ConversationConfig(), description="what precedes it"
    )
    vocoder: VocoderConfig = Field(default=VocoderConfig(), description="the voice")
    channels: ChannelsConfig = Field(
        default=ChannelsConfig(), description="capacities between stages"
    )
    threads: ThreadsConfig = Field(default=ThreadsConfig(), description="CPU threads")
    turns: TurnsConfig = Field(default=TurnsConfig(), description="who speaks when")
    sound: SoundConfig = Field(default=SoundConfig(), description="the sound card")
    audio: AudioConfig = Field(default=AudioConfig(), description="audio from outside")
    mqtt: MqttConfig = Field(default=MqttConfig(), description="serving devices over MQTT")
