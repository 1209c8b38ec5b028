"""``python -m recipes hearing``: nano's ears, put together from Whisper's encoder blocks.

The blocks of Whisper tiny.en have the shape of a pre-norm HuBERT's layers (hidden 384, 6 heads,
1536; no key bias). With a constructed front end (``recipes/front_end.py``) they make a
``HubertModel`` that hears people it never met, without training. Its fourth layer, averaged from
50 to 25 Hz and heard through the streaming window, is then divided into phonetic classes
(``recipes/quantizer.py``).

Writes the two files of ``speech_tokenizer/hubert_25hz`` in fairseq's naming, and
{work}/reports/hearing.json.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from recipes import quantizer
from recipes.front_end import HOP, INPUT_PADDING, STRIDES, Constants, front_end, positional
from recipes.hearing_report import measure
from recipes.manifest import PROCESSES, recordings
from recipes.whisper import HEADS, WhisperEncoder
from recipes.windows import HUBERT, OUT, QUANTIZER, cache_stamp, encode_many, load_listener
from stages.hubert import build_hubert

WINDOW = {"chunk": 12, "left": 60, "right": 8}
POOL = 2
SECONDS = {"heart": 540.0}  # of speech to fit to, by voice
SECONDS_OTHERS = 210.0


def checkpoint(
    teacher: WhisperEncoder,
    constants: Constants | None = None,
    window: dict[str, int] | None = None,
) -> dict[str, Any]:
    """nano's HuBERT as a fairseq checkpoint: plain containers and tensors."""
    constants = constants or Constants()
    state = fairseq_state(teacher, constants)
    width = len(state["post_extract_proj.bias"])
    shapes = (state[f"feature_extractor.conv_layers.{i}.0.weight"].shape for i in range(4))
    config = {
        "_name": "hubert",
        "label_rate": 25,
        "extractor_mode": "layer_norm",
        "conv_feature_layers": str(
            [
                (out, kernel, stride)
                for (out, _, kernel), stride in zip(shapes, STRIDES, strict=True)
            ]
        ),
        "conv_bias": True,
        "feat_proj_layer_norm": False,
        "encoder_layers": teacher.layers,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": len(state["encoder.layers.0.fc1.bias"]),
        "encoder_attention_heads": HEADS,
        "activation_fn": "gelu",
        "layer_type": "transformer",
        "layer_norm_first": True,
        "conv_pos": constants.positions,
        "conv_pos_groups": width,
        "features_layer": teacher.layers,
        "pool": POOL,
        "input_padding": list(INPUT_PADDING),
        "window": window or WINDOW,
    }
    return {
        "model_cfg": config,
        "task_cfg": {"_name": "hubert_pretraining", "sample_rate": 16_000, "normalize": False},
        "model_weight": {k: v.half() if in_half(k) else v for k, v in state.items()},
        "dictionaries_symbols": [],
    }


def in_half(key: str) -> bool:
    """Whether a weight may be stored in half precision; all are used in float32.

    Matrices may (Whisper's own were), but for the spectrum's: its phases must cancel.
    """
    if not key.endswith("weight") or key == "feature_extractor.conv_layers.0.0.weight":
        return False
    return key.startswith(("encoder.layers.", "post_extract_proj")) or key.endswith(".0.weight")


def fairseq_state(teacher: WhisperEncoder, constants: Constants) -> dict[str, Tensor]:
    """Every weight under fairseq's name, float32."""
    whisper, width = teacher.w, len(teacher.w["conv1/bias"])
    state: dict[str, Tensor] = {}
    layers = front_end(whisper, constants)
    for i, layer in enumerate(layers):
        name = f"feature_extractor.conv_layers.{i}"
        state |= {f"{name}.0.weight": layer.weight, f"{name}.0.bias": layer.bias}
        state |= {f"{name}.2.1.weight": layer.gain, f"{name}.2.1.bias": layer.offset}
    state["post_extract_proj.weight"] = torch.eye(width, len(layers[-1].bias))
    state["post_extract_proj.bias"] = torch.full((width,), -constants.carrier)
    weight, state["encoder.pos_conv.0.bias"] = positional(whisper, constants)
    gain = weight.norm(dim=(0, 1), keepdim=True)
    state["encoder.pos_conv.0.weight_g"] = gain
    # A tap of gain zero still needs a direction, or its norm would divide by zero.
    state["encoder.pos_conv.0.weight_v"] = torch.where(gain > 0, weight, 1.0)
    for i in range(teacher.layers):
        state |= _block(whisper, i)
    # Whisper's closing norm has its place here, though the features are taken before it.
    state["encoder.layer_norm.weight"] = whisper["layer_norm/gamma"]
    state["encoder.layer_norm.bias"] = whisper["layer_norm/beta"]
    return {k: v.float() for k, v in state.items()}


def _block(whisper: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    ours, attention, ffn = f"encoder.layers.{i}", f"layer_{i}/self_attention", f"layer_{i}/ffn"
    out = {}
    for leaf in ("weight", "bias"):
        q, k, v = whisper[f"{attention}/linear_0/{leaf}"].chunk(3)
        out[f"{ours}.self_attn.q_proj.{leaf}"] = q
        out[f"{ours}.self_attn.k_proj.{leaf}"] = k
        out[f"{ours}.self_attn.v_proj.{leaf}"] = v
        out[f"{ours}.self_attn.out_proj.{leaf}"] = whisper[f"{attention}/linear_1/{leaf}"]
        out[f"{ours}.fc1.{leaf}"] = whisper[f"{ffn}/linear_0/{leaf}"]
        out[f"{ours}.fc2.{leaf}"] = whisper[f"{ffn}/linear_1/{leaf}"]
    for leaf, name in (("weight", "gamma"), ("bias", "beta")):
        out[f"{ours}.self_attn_layer_norm.{leaf}"] = whisper[f"{attention}/layer_norm/{name}"]
        out[f"{ours}.final_layer_norm.{leaf}"] = whisper[f"{ffn}/layer_norm/{name}"]
    return out


def fit_plan(manifest: list[dict[str, Any]], seed: int) -> list[tuple[dict[str, Any], int]]:
    """Recordings to fit the classes to, and how many samples to cut off each one's beginning.

    The cut, within the silence before the speech, makes the phase of frames and chunks random.
    """
    rng = random.Random(seed)
    order = list(manifest)
    rng.shuffle(order)
    left: dict[str, float] = defaultdict(lambda: SECONDS_OTHERS, SECONDS)
    plan = []
    for row in order:
        if row["split"] != "train" or not row["phones"] or left[row["voice"]] <= 0:
            continue
        left[row["voice"]] -= row["samples"] / 16_000
        lead = next((start for phone, start, _ in row["phones"] if phone != "sil"), 0.0)
        plan.append((row, rng.randrange(max(HOP * 2 * POOL, int((lead - 0.05) * 16_000)))))
    return plan


def phone_labels(phones: list[list[Any]], frames: int, cut: int = 0, hop: int = 640) -> np.ndarray:
    """The phone at the centre of each frame of a recording whose first ``cut`` samples are gone."""
    time = (cut + (np.arange(frames) + 0.5) * hop) / 16_000
    names = np.array([name for name, _, _ in phones] + ["sil"])
    labels = names[np.searchsorted([end for _, _, end in phones], time, side="right")]
    labels[time < phones[0][1]] = "sil"
    return labels


def _features(
    work: Path, hubert: Path, seed: int, jobs: int, progress: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and phones of the recordings to fit to; kept in {work}/hearing for a next run."""
    plan = fit_plan(recordings(work), seed)
    folder = work / "hearing" / f"fit-{cache_stamp(hubert)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    todo = {
        f"{row['id']}@{cut}": (work / "corpus" / row["wav"], cut)
        for row, cut in plan
        if not (folder / f"{row['id']}@{cut}.npy").is_file()
    }
    task = progress.add_task("listening", total=len(plan), completed=len(plan) - len(todo))
    for name, features in encode_many(hubert, todo, jobs):
        np.save(folder / "draft.npy", features)
        (folder / "draft.npy").replace(folder / f"{name}.npy")
        progress.advance(task)
    for row, cut in sorted(plan, key=lambda item: f"{item[0]['id']}@{item[1]}"):
        features = np.load(folder / f"{row['id']}@{cut}.npy")
        yield features, phone_labels(row["phones"], len(features), cut)


def main(
    work: Annotated[Path, typer.Option(help="Folder of the corpus and reports.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")] = OUT,
    clusters: Annotated[int, typer.Option(min=2, max=500, help="Phonetic classes.")] = 200,
    dims: Annotated[int, typer.Option(min=1, help="Discriminant directions.")] = 40,
    ready: Annotated[
        Path | None, typer.Option(help="Take the ears in this folder and fit nothing.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = PROCESSES,
    seed: Annotated[int, typer.Option(help="Of the fit.")] = 0,
    judge: Annotated[
        bool, typer.Option(help="Measure the ears, with strangers' voices too.")
    ] = True,
) -> None:
    """Construct nano's HuBERT, fit its quantizer, measure both."""
    console = Console(stderr=True)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if ready is not None:
        for name in (HUBERT, QUANTIZER):
            shutil.copy2(ready / name, out / name)
        return
    teacher = WhisperEncoder.load()
    content = checkpoint(teacher)
    build_hubert(content, out / HUBERT)  # it loads, before anything is overwritten
    _save(content, out / HUBERT)
    console.print(f"{out / HUBERT}: {(out / HUBERT).stat().st_size / 1e6:.1f} MB")
    with Progress(console=console) as progress:
        frames = list(_features(work, out / HUBERT, seed, jobs, progress))
    features, phones = (np.concatenate(column) for column in zip(*frames, strict=True))
    console.print(f"fitting {clusters} classes to {len(features)} frames")
    found = quantizer.fit(features, phones, clusters=clusters, dims=dims, seed=seed)
    _save(quantizer.embed(found), out / QUANTIZER)
    if not judge:
        return
    listener = load_listener(out / HUBERT, out / QUANTIZER)
    report = measure(listener, teacher, work, recordings(work), seed)
    report["fit"] = {
        "frames": len(features),
        "embedding_is_nearest_centroid": float(
            (listener.classify(features) == found.codes(features)).mean()
        ),
    }
    path = work / "reports" / "hearing.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print_json(data=report)


def _save(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all; the same bytes for the same content (hence the handle, not a name)."""
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as handle:
        torch.save(content, handle)
    draft.replace(path)


if __name__ == "__main__":
    typer.run(main)
