"""Exported graphs, made on first use and kept in a cache.

A graph is named by a hash of the files it was made from, of the versions that made it and of the
export code's format number, so that new weights, or a new release, never meet an old graph.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import platformdirs
import torch

from stages.checkpoint import CheckpointError, Layout
from stages.hashes import file_sha256
from stages.runtime import OnnxGraph

Progress = Callable[[str, int, int], None]
"""Called with (graph being made, how many of them are done, how many there are to make)."""


def cache_dir() -> Path:
    """Where exported graphs are kept: ``SPIRITLM_CACHE_DIR``, else the user's cache directory."""
    given = os.environ.get("SPIRITLM_CACHE_DIR")
    return Path(given) if given else Path(platformdirs.user_cache_dir("spiritlm-agent"))


@cache
def exporter() -> ModuleType:
    """The module ``onnx/export.py``, loaded by path: its folder must not be a package.

    Raises:
        CheckpointError: the file does not lie beside the installed packages.
    """
    here = Path(__file__).resolve().parent
    for path in (here.parent / "onnx" / "export.py", here / "_data" / "onnx" / "export.py"):
        if path.is_file():
            break
    else:
        raise CheckpointError(f"{here.parent / 'onnx' / 'export.py'}: no such file; reinstall")
    spec = importlib.util.spec_from_file_location("spiritlm_onnx_export", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def graphs(
    layout: Layout,
    names: Iterable[str] | None = None,
    *,
    device: str = "auto",
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, OnnxGraph]:
    """Open the graphs of ``layout`` by name, exporting those that are not in the cache yet.

    Args:
        names: which ones (see ``onnx/README.md``); all by default.
        device, threads: see :class:`stages.runtime.OnnxGraph`.
        progress: told about every graph that has to be made.

    Raises:
        CheckpointError: a checkpoint file is missing or damaged.
    """
    export = exporter()
    wanted = None if names is None else set(names)
    specs = [spec for spec in export.specs(layout) if wanted is None or spec.name in wanted]
    paths = {spec.name: _cached_path(spec.name, spec.sources(layout)) for spec in specs}
    missing = [spec for spec in specs if not paths[spec.name].is_file()]
    for done, spec in enumerate(missing):
        if progress:
            progress(spec.name, done, len(missing))
        export.export_graph(spec, layout, paths[spec.name])
    if progress and missing:
        progress("", len(missing), len(missing))
    return {name: OnnxGraph(path, device, threads) for name, path in paths.items()}


def encoder_files(layout: Layout) -> list[Path]:
    """The files on which the units of a recording depend."""
    vocoder = {"vocoder", "durations"}
    specs = [spec for spec in exporter().specs(layout) if spec.name not in vocoder]
    return [path for spec in specs for path in spec.sources(layout)]


def fingerprint(first: str, files: Iterable[Path]) -> str:
    """A short name for ``first`` together with the content of ``files``.

    Raises:
        CheckpointError: a file is not there.
    """
    digest = hashlib.sha256(first.encode())
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. Is the checkpoint complete?")
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()[:20]


def _cached_path(name: str, sources: Iterable[Path]) -> Path:
    made_by = f"{exporter().FORMAT} {torch.__version__}"
    return cache_dir() / "onnx" / f"{name}-{fingerprint(made_by, sources)}.onnx"
