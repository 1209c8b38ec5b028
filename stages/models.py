"""Finding a model by its name."""

from __future__ import annotations

import os
from pathlib import Path

from stages.checkpoint import CheckpointError, Layout, find_layout

CHECKPOINTS_VARIABLE = "SPIRITLM_CHECKPOINTS_DIR"
"""The environment variable that names the folder of the official checkpoints."""


def find_model(name_or_path: str | Path = "nano", version: str | None = None) -> Layout:
    """Where a model is.

    Args:
        name_or_path: "nano", the model that comes with this package; the name of a model under
            ``$SPIRITLM_CHECKPOINTS_DIR/spiritlm_model``, such as "spirit-lm-base-7b"; a root
            directory in the official layout; a model's own folder in one; or the folder of a
            language model alone, such as "smol", which goes with nano's tokenizers and vocoder.
        version: "base" or "expressive", where a root holds both.

    Raises:
        CheckpointError: no such model.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if (path / "speech_tokenizer").is_dir() or (path / "spiritlm_model").is_dir():
        return find_layout(path, version=version)
    if path.is_dir() and path.absolute().parent.name == "spiritlm_model":
        return find_layout(path.absolute().parents[1], lm=path.absolute().name, version=version)
    root = os.environ.get(CHECKPOINTS_VARIABLE)
    if root and path.name == name and (Path(root) / "spiritlm_model" / name).is_dir():
        return find_layout(root, lm=name, version=version)
    if name == "nano":
        return find_layout(_shipped("nano"), version=version)
    alone = _shipped("smol") if name == "smol" else path
    if (alone / "config.json").is_file():
        return Layout(_shipped("nano"), alone, "expressive")
    if name == "smol":
        raise CheckpointError(
            f"{alone}: smol has not been trained here. `python -m recipes smol` does that after "
            "nano's recipes, and wants a GPU (bench/GPU.md); or name the folder that it wrote in "
            "model.lm"
        )
    where = f"{CHECKPOINTS_VARIABLE} is {root}" if root else f"{CHECKPOINTS_VARIABLE} is not set"
    raise CheckpointError(
        f"model {name!r}: neither a directory in the official layout nor a name under "
        f"spiritlm_model/ ({where}). The built-in model is 'nano'"
    )


def _shipped(name: str) -> Path:
    """A checkpoint of the repository, or of the installed package."""
    top = Path(__file__).resolve().parents[1]
    places = [top / "checkpoints" / name, top / "agent" / "_data" / "checkpoints" / name]
    return next((place for place in places if place.is_dir()), places[0])
