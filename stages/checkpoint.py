"""Finding and loading Spirit LM checkpoints in the official on-disk layout.

A root directory holds ``speech_tokenizer/`` (HuBERT and its quantizer, the pitch VQ-VAE, the style
classifier, two HiFi-GANs) and ``spiritlm_model/`` (one folder per language model). Checkpoints are
untrusted input: nothing here can run code from a file, and every failure names the file, the key
and what was expected.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
import yaml
from torch import Tensor, nn

Version = Literal["base", "expressive"]
T = TypeVar("T")

_KEYS_SHOWN = 5


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or not what its configuration says.

    The message names the file, the key where there is one, and the mend.
    """


@dataclass(frozen=True)
class Layout:
    """Where the parts of one model lie.

    ``root`` holds ``speech_tokenizer/``; ``lm`` is the language model's own folder; ``version``
    says which vocoder and which units go with it.
    """

    root: Path
    lm: Path
    version: Version

    @property
    def tokenizer(self) -> Path:
        return self.root / "speech_tokenizer"

    @property
    def hubert(self) -> Path:
        return self.tokenizer / "hubert_25hz" / "mhubert_base_25hz.pt"

    @property
    def quantizer(self) -> Path:
        return self.tokenizer / "hubert_25hz" / "L11_quantizer_500.pt"

    @property
    def pitch(self) -> Path:
        return self.tokenizer / "vqvae_f0_quantizer"

    @property
    def style(self) -> Path:
        return self.tokenizer / "style_encoder_w2v2"

    @property
    def vocoder(self) -> Path:
        name = "hifigan_spiritlm_base" if self.version == "base" else _EXPRESSIVE_VOCODER
        return self.tokenizer / name

    @property
    def expressive(self) -> bool:
        return self.version == "expressive"


def package_file(package: str, path: str) -> Path | None:
    """A data file inside an installed package, which is not imported; ``None`` if not there.

    Args:
        path: below the package's folder.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = (Path(folder) / path for folder in folders)
    return next((file for file in found if file.is_file()), None)


_EXPRESSIVE_VOCODER = "hifigan_spiritlm_expressive_w2v2"


def find_layout(root: str | Path, lm: str | None = None, version: str | None = None) -> Layout:
    """Resolve a checkpoints root to a :class:`Layout`.

    Args:
        root: directory with ``speech_tokenizer/`` and ``spiritlm_model/``.
        lm: name of the folder under ``spiritlm_model/``; may be left out when there is only one,
            or when ``version`` singles one out.
        version: ``"base"`` or ``"expressive"``; by default read off the folder's name, else off
            which vocoder is present.

    Raises:
        CheckpointError: a directory is missing, or the choice is ambiguous.
    """
    root = Path(root).expanduser()
    models = root / "spiritlm_model"
    for folder in (root, root / "speech_tokenizer", models):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such directory. Expected the official layout: a root with "
                "speech_tokenizer/ and spiritlm_model/ (set model.root in the config, or "
                "SPIRITLM_CHECKPOINTS_DIR)"
            )
    if version not in (None, "base", "expressive"):
        raise CheckpointError(f"version {version!r}: expected 'base' or 'expressive'")
    found = sorted(p.name for p in models.iterdir() if p.is_dir())
    name = lm if lm is not None else _choose(models, found, version)
    if name not in found:
        raise CheckpointError(
            f"{models / name}: no such language model. Present: {', '.join(found) or 'none'}"
        )
    return Layout(root, models / name, _version_of(root, name, version))


def _choose(models: Path, found: list[str], version: str | None) -> str:
    fitting = [n for n in found if version is None or version in n] if len(found) > 1 else found
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"{models}: expected one language model, found {', '.join(found) or 'none'}. "
        "Name one (model.lm in the config) or give the version"
    )


def _version_of(root: Path, name: str, version: str | None) -> Version:
    if version is not None:
        return "base" if version == "base" else "expressive"
    if "expressive" in name:
        return "expressive"
    if "base" in name:
        return "base"
    has_expressive = (root / "speech_tokenizer" / _EXPRESSIVE_VOCODER).is_dir()
    return "expressive" if has_expressive else "base"


def load_state(path: str | Path) -> Any:
    """Load a ``.pt``/``.bin`` (``weights_only``) or ``.safetensors`` file onto the CPU.

    Raises:
        CheckpointError: missing, empty or truncated file, or a pickle that would run code.
    """
    path = Path(path)
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_mmap(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because loading it would run code or it is no checkpoint "
            f"({_first_line(error)}). Only plain tensors and containers are accepted; re-save it "
            "as a state dict or as safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint; truncated or corrupt? "
            f"({_first_line(error)}). Download it again and compare its size"
        ) from error


def load_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises :class:`CheckpointError` if it is missing or malformed."""
    path = Path(path)
    _check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({_first_line(error)})") from error
    return _as_dict(value, path)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises :class:`CheckpointError` if it is missing or malformed."""
    path = Path(path)
    _check_file(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not valid YAML ({_first_line(error)})") from error
    return _as_dict(value, path)


@overload
def require(mapping: Mapping[str, Any], key: str, path: str | Path, kind: type[T]) -> T: ...
@overload
def require(mapping: Mapping[str, Any], key: str, path: str | Path, kind: None = None) -> Any: ...
def require(
    mapping: Mapping[str, Any], key: str, path: str | Path, kind: type[T] | None = None
) -> Any:
    """``mapping[key]``, checked to be of type ``kind`` (an ``int`` passes for ``float``).

    ``key`` may be dotted to reach into nested mappings.

    Raises:
        CheckpointError: naming the file ``path``, the key and the type expected.
    """
    value: Any = mapping
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise CheckpointError(f"{path}: key {key!r} is missing")
        value = value[part]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not None and (not isinstance(value, kind) or (kind is int and value is True)):
        raise CheckpointError(
            f"{path}: key {key!r} is a {type(value).__name__}, expected {kind.__name__}"
        )
    return value


def load_weights(
    module: nn.Module,
    state: Mapping[str, Any],
    path: str | Path,
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Copy ``state`` into ``module``, strictly, casting to the module's dtypes.

    Args:
        state: parameter and buffer names of ``module`` to tensors.
        path: the file they come from, for messages.
        ignore: prefixes of keys in ``state`` that the module does not use.

    Raises:
        CheckpointError: a key is missing, unexpected, not a tensor or of the wrong shape.
    """
    skipped = tuple(ignore)
    given = {k: v for k, v in state.items() if not (skipped and k.startswith(skipped))}
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in given]
    if missing:
        raise CheckpointError(f"{path}: {_some(missing)} missing from the checkpoint")
    unexpected = [k for k in given if k not in wanted]
    if unexpected:
        raise CheckpointError(
            f"{path}: {_some(unexpected)} not known to {type(module).__name__}; does its "
            "configuration belong to this file?"
        )
    for key, target in wanted.items():
        check_tensor(given[key], tuple(target.shape), path, key)
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(given[key])


def check_tensor(value: Any, shape: tuple[int, ...], path: str | Path, key: str) -> Tensor:
    """``value`` if it is a tensor of ``shape``; :class:`CheckpointError` otherwise."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: key {key!r} is a {type(value).__name__}, expected a tensor")
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"{path}: key {key!r} has shape {list(value.shape)}, expected {list(shape)}"
        )
    return value


_NORM_FORMS = (  # as torch has stored weight norm, before version 2 and since
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def fold_weight_norm(
    state: Mapping[str, Any], path: str | Path, *, axis: int = 0
) -> dict[str, Any]:
    """Replace each pair of gain ``g`` and direction ``v`` by the weight ``g v / |v|``, in float32.

    Both forms of torch's key names are read; weights stored folded pass through.

    Args:
        axis: the one along which gains differ; the norm runs over all others.

    Raises:
        CheckpointError: one of a pair is missing, no tensor or of the wrong shape.
    """
    folded = dict(state)
    for gain_name, direction_name in _NORM_FORMS:
        names = (gain_name, direction_name)
        stems = {k.removesuffix(n) for n in names for k in folded if k.endswith(n)}
        for stem in sorted(stems):
            gain_key, direction_key = stem + gain_name, stem + direction_name
            gain = _key(folded, gain_key, path)
            direction = _key(folded, direction_key, path)
            del folded[gain_key], folded[direction_key]
            if not isinstance(direction, Tensor) or direction.dim() <= max(axis, 1):
                raise CheckpointError(f"{path}: key {direction_key!r} is no weight")
            others = [i for i in range(direction.dim()) if i != axis]
            shape = tuple(n if i == axis else 1 for i, n in enumerate(direction.shape))
            check_tensor(gain, shape, path, gain_key)
            norm = torch.linalg.vector_norm(direction.float(), dim=others, keepdim=True)
            folded[stem + "weight"] = direction.float() * (gain.float() / norm)
    return folded


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Is the checkpoint complete?")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty. Download it again")


def _can_mmap(path: Path) -> bool:
    """Memory-mapping spares a second copy of a 7B model; only the zip format supports it."""
    return zipfile.is_zipfile(path)


def _key(mapping: Mapping[str, Any], key: str, path: str | Path) -> Any:
    """``mapping[key]``, the key taken as it is, dots included; :class:`CheckpointError` if not."""
    if key not in mapping:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    return mapping[key]


def _as_dict(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a mapping, found a {type(value).__name__}")
    return value


def _some(keys: list[str]) -> str:
    shown = ", ".join(repr(k) for k in keys[:_KEYS_SHOWN])
    more = len(keys) - _KEYS_SHOWN
    noun = "key" if len(keys) == 1 else "keys"
    return f"{noun} {shown}" + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
