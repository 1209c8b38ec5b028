"""What is installed, which devices there are, which models, what is missing and how to mend it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

from agent.config import config_names, load_config
from agent.errors import UserError
from agent.graphs import cache_dir
from stages.checkpoint import CheckpointError, Layout
from stages.llama_adapter import find_base
from stages.models import CHECKPOINTS_VARIABLE, find_model

PACKAGES = {
    "torch": "language model",
    "transformers": "HuBERT and wav2vec2",
    "onnxruntime": "encoders and vocoder",
    "onnx": "export of graphs",
    "onnxscript": "export of graphs",
    "sentencepiece": "text tokenizer",
    "torchfcpe": "weights of the pitch estimator",
    "webrtcvad-wheels": "voice activity detection",
    "soundfile": "audio files",
    "soxr": "sampling rates",
    "numpy": "arrays",
}
OPTIONAL = {
    "matplotlib": "plot",
    "sounddevice": "mic",
    "livekit": "aec",
    "aiomqtt": "mqtt",
    "faster-whisper": "eval",
}
_MENDS = {"torchfcpe": "pip install --no-deps torchfcpe==0.0.4"}


@dataclass
class Model:
    """A model that was found: its folder, its version, and which files it lacks."""

    name: str
    root: str
    version: str
    missing: list[str]
    megabytes: float


@dataclass
class Inventory:
    """Everything that ``python -m agent info`` says."""

    system: dict[str, str]
    packages: dict[str, str | None]
    optional: dict[str, str | None]
    devices: list[str]
    providers: list[str]
    models: list[Model]
    configurations: dict[str, str]
    cache: str
    missing: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_inventory() -> Inventory:
    """Look at everything; nothing is loaded but the headers of packages."""
    found = Inventory(
        system={
            "program": version("spiritlm-agent") or "not installed, run from its folder",
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cores": str(os.cpu_count()),
        },
        packages={name: version(name) for name in PACKAGES},
        optional={name: version(name) for name in OPTIONAL},
        devices=_devices(),
        providers=_providers(),
        models=list(_models()),
        configurations={name: _configuration(name) for name in config_names()},
        cache=_cache(),
    )
    found.missing = list(_missing(found))
    return found


def version(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "onnxruntime":  # its CUDA build goes by another name
            return version("onnxruntime-gpu")
        return None


def about(config: str, layout: Layout) -> dict[str, Any]:
    """What a measurement should be read with: the machine, the versions, the model."""
    return {
        "config": config,
        "model": str(layout.lm),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": _devices(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("spiritlm-agent", "torch", "onnxruntime")},
    }


def lacking(layout: Layout) -> list[Path]:
    """Files that a complete checkpoint has and this one has not."""
    files = [
        layout.hubert,
        layout.quantizer,
        layout.lm / "config.json",
    ]
    if not (layout.lm / "tokenizer.json").is_file():
        files.append(layout.lm / "tokenizer.model")
    files += [layout.vocoder / "config.json", layout.vocoder / "generator.pt"]
    if layout.expressive:
        files += [layout.pitch / "config.yaml", layout.pitch / "model.pt"]
        files += [layout.style / "config.json"]
    missing = [path for path in files if not path.is_file()]
    for folder, patterns in (
        (layout.lm, ("*.safetensors", "*.bin")),
        *([(layout.style, ("*.safetensors", "*.bin"))] if layout.expressive else []),
    ):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            missing.append(folder / "(weights)")
    return missing


def _models() -> Iterator[Model]:
    names = ["nano"]
    root = os.environ.get(CHECKPOINTS_VARIABLE)
    if root and (Path(root) / "spiritlm_model").is_dir():
        names += sorted(p.name for p in (Path(root) / "spiritlm_model").iterdir() if p.is_dir())
    for name in names:
        try:
            layout = find_model(name)
        except CheckpointError as error:
            yield Model(name, "", "", [str(error)], 0.0)
            continue
        missing = [str(path) for path in lacking(layout)]
        yield Model(name, str(layout.root), layout.version, missing, _size(layout) / 1e6)


def _size(layout: Layout) -> int:
    folders = [layout.hubert.parent, layout.vocoder, layout.lm]
    folders += [layout.pitch, layout.style] if layout.expressive else []
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def _configuration(name: str) -> str:
    try:
        layout = load_config(name).model.layout()
        find_base(layout.lm)
    except (UserError, CheckpointError) as error:
        return f"not usable: {error}"
    missing = lacking(layout)
    return f"not usable: {missing[0]} is missing" if missing else f"ready: {layout.lm}"


def _devices() -> list[str]:
    import torch

    devices = [f"cpu ({_processor()}, PyTorch uses {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            devices.append(f"cuda:{i} ({device.name}, {device.total_memory / 2**30:.0f} GiB)")
    return devices


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cache() -> str:
    graphs = list((cache_dir() / "onnx").glob("*.onnx"))
    megabytes = sum(path.stat().st_size for path in graphs) / 1e6
    return f"{cache_dir()} ({len(graphs)} exported graphs, {megabytes:.0f} MB)"


def _missing(found: Inventory) -> Iterator[str]:
    for name, installed in found.packages.items():
        if installed is None:
            mend = _MENDS.get(name, f"pip install {name}")
            yield f"package {name} ({PACKAGES[name]}): {mend}"
    if found.packages["torchfcpe"] is not None and not _fcpe_weights():
        yield f"weights fcpe_c_v001.pt in torchfcpe: {_MENDS['torchfcpe']}"
    for model in found.models:
        for file in model.missing:
            yield f"model {model.name}: {file}; get the complete checkpoint"
    if not os.environ.get(CHECKPOINTS_VARIABLE):
        yield (
            f"official checkpoints: none. If you have them, set {CHECKPOINTS_VARIABLE} to the "
            "folder with speech_tokenizer/ and spiritlm_model/"
        )
    if len(found.devices) == 1:
        yield "a GPU: none that PyTorch sees; nano does without, a 7B model wants one"
    for name, installed in found.optional.items():
        if installed is None:
            extra = OPTIONAL[name]
            yield f"optional package {name}: pip install 'spiritlm-agent[{extra}]'"


def _fcpe_weights() -> bool:
    spec = util.find_spec("torchfcpe")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any(next(Path(folder).rglob("fcpe_c_v001.pt"), None) for folder in folders)
