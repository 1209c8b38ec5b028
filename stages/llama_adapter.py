"""Llama weights as an adapter: what was learnt besides a published model, which is not copied.

A folder with ``adapter.safetensors`` and ``adapter_config.json`` names a base, a GGUF file inside
an installed package, and holds low-rank changes of its matrices (LoRA; Hu et al., 2021) and
embedding rows after its own. Both are put together while loading and give the tensors of a whole
checkpoint, rounded to float16, which a CPU reads in half of the time (:mod:`stages.lm_linear`) and
which is far finer than the base's own 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.checkpoint import (
    CheckpointError,
    check_tensor,
    load_json,
    load_state,
    package_file,
    require,
)
from stages.hashes import file_sha256

ADAPTER = "adapter.safetensors"
SETTINGS = "adapter_config.json"
EMBEDDING = "model.embed_tokens.weight"
ROWS = "model.embed_tokens.rows"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Base:
    """A published model: a GGUF file inside an installed package, which is not imported.

    Attributes:
        file: its path below the package's folder.
        sha256: of the file, in hexadecimal digits.
        install: the command that brings it.
    """

    package: str
    file: str
    sha256: str
    install: str

    @classmethod
    def read(cls, path: Path) -> Base:
        """Read the key ``base`` of ``adapter_config.json``."""
        names = ("package", "file", "sha256", "install")
        raw = load_json(path)
        return cls(**{name: require(raw, f"base.{name}", path, str) for name in names})

    def find(self) -> Path:
        """Where the file is.

        Raises:
            CheckpointError: it is not installed.
        """
        # A dotted name would import the package before the dot: a checkpoint must not run code.
        plain = self.package.isidentifier() and Path(self.file).name == self.file
        path = package_file(self.package, self.file) if plain else None
        if path is None:
            raise CheckpointError(
                f"{self.file} of the package {self.package} is not installed, from which this "
                f"model was made: {self.install}"
            )
        return path

    def check(self, path: Path) -> None:
        """Raises :class:`CheckpointError` if ``path`` is not the file that it was made from."""
        found = file_sha256(path)
        if found != self.sha256:
            raise CheckpointError(
                f"{path}: not the file from which this model was made (its SHA-256 is {found}, "
                f"expected {self.sha256}): {self.install}"
            )


def find_base(folder: Path) -> Path | None:
    """The file that the model in ``folder`` takes its base from; None if it is whole.

    Raises:
        CheckpointError: it is not installed.
    """
    settings = folder / SETTINGS
    return Base.read(settings).find() if settings.is_file() else None


def adapted_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values, float32 rounded to float16, of the checkpoint that ``adapter.safetensors``
    and its base are together.

    Raises:
        CheckpointError: the base is not installed or another one; a tensor is missing, unexpected
            or of the wrong shape.
    """
    state = load_state(path)
    settings = path.with_name(SETTINGS)
    raw = load_json(settings)
    rank = require(raw, "r", settings, int)
    scale = require(raw, "lora_alpha", settings, float) / rank
    base = Base.read(settings)
    file = base.find()
    base.check(file)
    used: set[str] = set()
    for name, weight in gguf_tensors(file):
        if name == EMBEDDING:
            rows = _take(state, ROWS, (None, weight.shape[1]), path)
            yield name, torch.cat((rounded(weight), rounded(rows)))
            used.add(ROWS)
            continue
        a, b = lora_names(name)
        if a in state:
            down = _take(state, a, (rank, weight.shape[1]), path)
            up = _take(state, b, (weight.shape[0], rank), path)
            weight = weight + scale * (up @ down)
            used |= {a, b}
        yield name, rounded(weight)
    unknown = sorted(set(state) - used)
    if unknown:
        raise CheckpointError(f"{path}: key {unknown[0]!r} changes nothing that is in {file.name}")


def lora_names(name: str) -> tuple[str, str]:
    """Names of the two factors ``[r, in]`` and ``[out, r]`` that change the matrix ``name``."""
    stem = name.removesuffix("weight")
    return f"{stem}lora_A", f"{stem}lora_B"


def rounded(weight: Tensor) -> Tensor:
    """``weight`` rounded to float16, as float32."""
    return weight.half().float()


def _take(state: Mapping[str, Any], key: str, shape: tuple[int | None, int], path: Path) -> Tensor:
    if key not in state:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    value = state[key]
    rows = value.shape[0] if shape[0] is None and isinstance(value, Tensor) else shape[0]
    return check_tensor(value, (rows or 0, shape[1]), path, key).float()


def gguf_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names as in ``LlamaForCausalLM`` and values, float32, of a Llama in a GGUF file.

    Raises:
        CheckpointError: it is none, or the package ``gguf`` is missing.
    """
    reader = gguf_reader(path)
    from gguf import dequantize

    fields = reader.fields
    heads = int(fields["llama.attention.head_count"].contents())
    kv_heads = int(fields["llama.attention.head_count_kv"].contents())
    for tensor in reader.tensors:
        name = _official_name(tensor.name, path)
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if ".q_proj." in name or ".k_proj." in name:
            value = half_split(value, heads if ".q_proj." in name else kv_heads)
        yield name, value


def gguf_reader(path: Path) -> Any:
    """A reader of ``path``. Raises :class:`CheckpointError` if it is no Llama in a GGUF file, or
    the package ``gguf`` is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it takes the package gguf: pip install 'spiritlm-agent[smol]'"
        ) from error
    try:
        reader = GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read as a GGUF file ({error})") from error
    if kind != "llama":
        raise CheckpointError(f"{path}: a model of the kind {kind!r}, expected 'llama'")
    return reader


def _official_name(name: str, path: Path) -> str:
    *block, part, suffix = name.split(".")
    if part not in _NAMES or suffix != "weight" or block[:-1] not in ([], ["blk"]):
        raise CheckpointError(f"{path}: tensor {name!r} does not belong to a plain Llama")
    layer = f"model.layers.{block[-1]}." if block else ""
    return f"{layer}{_NAMES[part]}.weight"


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of Llama's half-split rotary layout: GGUF stores the two
    halves of every head interleaved."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
