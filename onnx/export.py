"""Export of the stages to ONNX, with dynamic time, and the check that a graph computes the same.

One :class:`GraphSpec` per graph says which network it is, which axes vary and which checkpoint
files it depends on. This folder is no package (``onnx`` would shadow the library): load this file
by path, as ``agent/graphs.py`` does, or run it::

    python onnx/export.py CHECKPOINTS_ROOT OUT_DIR
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stages.checkpoint import CheckpointError, Layout, find_layout
from stages.fcpe import find_weights, load_fcpe
from stages.hifigan import UnitHiFiGAN
from stages.phonetic import PhoneticEncoder
from stages.runtime import OnnxGraph
from stages.style import StyleEncoder
from stages.vocoder import Vocoder
from stages.vqvae import load_vqvae

FORMAT = 3
"""Part of every cache key: raise it when an exported graph's meaning changes."""

# Left-overs of training (random layer drop, dropout) and of padded batches (mask arithmetic on
# attention lengths) would make a graph answer differently from the network it stands for.
FORBIDDEN_OPS = frozenset(
    {"RandomUniform", "RandomUniformLike", "Bernoulli", "Dropout", "If", "Loop"}
)

Axes = dict[int, tuple[str, int, int]] | Literal["any"]
"""Varying axes of one input: axis -> (name, smallest, largest size); "any" for a whole number."""

Example = tuple[Tensor | int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One exported graph.

    Attributes:
        name: file stem.
        build: makes the network; its ``forward`` is the graph.
        example: arguments to trace it with, given the network.
        inputs, outputs: names in order.
        axes: varying axes, one entry per input.
        sources: the files whose content decides the graph.
    """

    name: str
    build: Callable[[Layout], nn.Module]
    example: Callable[[nn.Module], Example]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[Axes, ...]
    sources: Callable[[Layout], tuple[Path, ...]]


class _SpeakBase(nn.Module):
    """The Base vocoder with its inputs in the graph's order."""

    def __init__(self, model: UnitHiFiGAN) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, code: Tensor, speaker: Tensor, style_id: Tensor, left: int, right: int
    ) -> Tensor:
        return self.model(code, speaker=speaker, style_id=style_id, left=left, right=right)


class _SpeakExpressive(nn.Module):
    """The Expressive vocoder with its inputs in the graph's order."""

    def __init__(self, model: UnitHiFiGAN) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, code: Tensor, pitch: Tensor, style: Tensor, speaker: Tensor, left: int, right: int
    ) -> Tensor:
        return self.model(code, pitch, style, speaker, left=left, right=right)


class _Durations(nn.Module):
    def __init__(self, model: UnitHiFiGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, code: Tensor) -> Tensor:
        return self.model.log_durations(code)


def specs(layout: Layout) -> list[GraphSpec]:
    """The graphs that a layout's models need, in the order of the pipeline."""
    encoders = [_phonetic()]
    if layout.expressive:
        encoders += [_f0(), _pitch(), _style()]
    return [*encoders, *_vocoder(layout.expressive)]


def _phonetic() -> GraphSpec:
    return GraphSpec(
        name="phonetic",
        build=lambda layout: PhoneticEncoder.load(layout).network,
        example=lambda network: (torch.randn(1, 40_960) * 0.1,),
        inputs=("wave",),
        outputs=("features", "logits"),
        axes=({1: ("samples", 640, 1_600_000)},),
        sources=lambda layout: (layout.hubert, layout.quantizer),
    )


def _f0() -> GraphSpec:
    return GraphSpec(
        name="f0",
        build=lambda layout: load_fcpe()[1],
        example=lambda network: (_voiced(load_fcpe()[0])[None],),
        inputs=("log_mel",),
        outputs=("peak", "hz"),
        axes=({1: ("frames", 2, 10_001)},),
        sources=lambda layout: (find_weights(),),
    )


def _voiced(log_mel: nn.Module) -> Tensor:
    """The spectrogram of a voice whose pitch moves. In noise two pitches may be equally likely, and
    rounding decides which is found."""
    seconds = torch.arange(19_040) / 16_000
    phase = 2 * torch.pi * (150 * seconds + 20 * torch.sin(3 * seconds))
    wave = sum(torch.sin(n * phase) / n for n in range(1, 12)) * 0.1
    return log_mel(wave)


def _pitch() -> GraphSpec:
    return GraphSpec(
        name="pitch",
        build=lambda layout: load_vqvae(layout.pitch)[0],
        example=lambda network: (torch.randn(1, 2, 320),),
        inputs=("f0_and_voicing",),
        outputs=("codes",),
        axes=({2: ("frames", 16, 20_001)},),
        sources=lambda layout: (layout.pitch / "config.yaml", layout.pitch / "model.pt"),
    )


def _style() -> GraphSpec:
    return GraphSpec(
        name="style",
        build=lambda layout: StyleEncoder.load(layout).network,
        example=lambda network: (torch.randn(1, 40_000),),
        inputs=("wave",),
        outputs=("logits",),
        axes=({1: ("samples", 1280, 1_600_000)},),
        sources=lambda layout: (layout.style / "config.json", _style_weights(layout.style)),
    )


def _style_weights(folder: Path) -> Path:
    """The file that the style encoder is loaded from; see ``stages.style``."""
    path = folder / "model.safetensors"
    return path if path.is_file() else folder / "pytorch_model.bin"


def _vocoder(expressive: bool) -> list[GraphSpec]:
    def sources(layout: Layout) -> tuple[Path, ...]:
        return layout.vocoder / "config.json", layout.vocoder / "generator.pt"

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    speak = _SpeakExpressive if expressive else _SpeakBase
    frames: Axes = {1: ("frames", 1, 90_000)}
    streams = ("code", "pitch", "style") if expressive else ("code",)
    scalars = ("speaker",) if expressive else ("speaker", "style_id")
    context = ("left", "right")  # frames of it at the ends
    example: Example = (*(zeros(1, 30) for _ in streams), *(zeros(1) for _ in scalars), 3, 4)
    axes: tuple[Axes, ...] = (*(frames for _ in streams), *({} for _ in scalars), "any", "any")
    vocoder = GraphSpec(
        name="vocoder",
        build=lambda layout: speak(Vocoder.load(layout).model),
        example=lambda network: example,
        inputs=streams + scalars + context,
        outputs=("wave",),
        axes=axes,
        sources=sources,
    )
    durations = GraphSpec(
        name="durations",
        build=lambda layout: _Durations(Vocoder.load(layout).model),
        example=lambda network: (zeros(1, 30),),
        inputs=("code",),
        outputs=("log_durations",),
        axes=({1: ("units", 1, 90_000)},),
        sources=sources,
    )
    return [vocoder, durations]


def export_graph(spec: GraphSpec, layout: Layout, path: Path) -> None:
    """Write one graph to ``path``, checked: nothing random in it, and it runs.

    The file appears whole or not at all, so that an interrupted export leaves no broken cache.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        RuntimeError: the graph holds a forbidden operation or differs from its network.
    """
    network = spec.build(layout).eval().requires_grad_(False).cpu()
    with torch.random.fork_rng(devices=[]):  # what is checked is the same every time
        torch.manual_seed(0)
        example = spec.example(network)
    names: dict[str, torch.export.Dim] = {}
    shapes = tuple(
        torch.export.Dim.DYNAMIC
        if axes == "any"
        else {axis: _dim(names, *size) for axis, size in axes.items()} or None
        for axes in spec.axes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                network,
                example,
                dynamo=True,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert program is not None
        program.save(str(draft), external_data=False)
        widen_convolutions(draft)
        _check(spec, network, example, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def export_all(
    layout: Layout, out_dir: Path, progress: Callable[[str, int, int], None] | None = None
) -> list[Path]:
    """Export every graph of ``layout`` to ``out_dir``; returns the files.

    ``progress`` is called with (graph name, how many are done, how many there are).
    """
    todo = specs(layout)
    paths = []
    for done, spec in enumerate(todo):
        if progress:
            progress(spec.name, done, len(todo))
        paths.append(out_dir / f"{spec.name}.onnx")
        export_graph(spec, layout, paths[-1])
    if progress:
        progress("", len(todo), len(todo))
    return paths


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the graph at ``path`` and in its functions."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counts: Counter[str] = Counter()
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            counts[node.op_type] += 1
    return counts


def widen_convolutions(path: Path) -> int:
    """Turn the one-dimensional convolutions of a graph into two-dimensional ones of height 1.

    The same function; but ONNX Runtime's blocked kernels for the CPU know two dimensions only, and
    without them a convolution takes two to three times as long, a depthwise one up to ten times.
    Returns how many there were.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    weights = {w.name: w for w in graph.initializer if len(w.dims) == 3}
    nodes = list(graph.node)
    found = [n for n in nodes if n.op_type == "Conv" and n.input[1] in weights]
    for number, node in enumerate(found):
        at = nodes.index(node)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = numpy_helper.to_array(weights[node.input[1]])[:, :, None]
        before, after = attributes.get("pads", (0, 0))
        wide = [f"{name}.{number}.wide" for name in (node.input[0], node.input[1], node.output[0])]
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), wide[1]))
        conv = helper.make_node(
            "Conv", [wide[0], wide[1], *node.input[2:]], [wide[2]], name=node.name,
            group=attributes.get("group", 1), kernel_shape=weight.shape[2:],
            pads=(0, before, 0, after), strides=(1, *attributes.get("strides", (1,))),
            dilations=(1, *attributes.get("dilations", (1,))),
        )  # fmt: skip
        nodes[at : at + 1] = [
            helper.make_node("Unsqueeze", [node.input[0], _HEIGHT], [wide[0]]),
            conv,
            helper.make_node("Squeeze", [wide[2], _HEIGHT], [node.output[0]]),
        ]
    if found:
        graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), _HEIGHT))
        del graph.node[:]
        graph.node.extend(nodes)
        _drop_unused(graph)
        onnx.save(model, str(path))
    return len(found)


_HEIGHT = "height_axis"


def _drop_unused(graph: Any) -> None:
    """Leave out constants that no node reads any more."""
    read = {name for node in graph.node for name in node.input}
    kept = [w for w in graph.initializer if w.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _check(spec: GraphSpec, network: nn.Module, example: Example, path: Path) -> None:
    found = FORBIDDEN_OPS & set(operations(path))
    if found:
        raise RuntimeError(f"{path.name}: exported with {', '.join(sorted(found))}; not usable")
    with torch.inference_mode():
        expected = network(*example)
    got = OnnxGraph(path, device="cpu", threads=1)(*(np.asarray(x) for x in example))
    for name, want, have in zip(spec.outputs, _as_tuple(expected), got, strict=True):
        difference = float(np.abs(want.numpy().astype(np.float64) - have).max(initial=0))
        if want.shape != have.shape or difference > 1e-3 * (1 + float(want.abs().max())):
            raise RuntimeError(
                f"{spec.name}: output {name!r} of the exported graph differs by {difference:.2g} "
                "from its network"
            )


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _dim(names: dict[str, torch.export.Dim], name: str, low: int, high: int) -> torch.export.Dim:
    if name not in names:
        names[name] = torch.export.Dim(name, min=low, max=high)
    return names[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about packages that nobody here needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(f"usage: python {__file__} CHECKPOINTS_ROOT OUT_DIR", file=sys.stderr)
        return 2
    try:
        layout = find_layout(arguments[0])
        for path in export_all(layout, Path(arguments[1])):
            print(path)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main(sys.argv[1:]))
