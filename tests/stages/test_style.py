"""Style: the forms in which a checkpoint may come, pooling, and bad checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config

from stages.checkpoint import CheckpointError, Layout, load_json, load_state
from stages.style import StyleEncoder, StyleNetwork, load_style_network, normalise

CONV = "wav2vec2.encoder.pos_conv_embed.conv."
CONFIG = {
    "conv_dim": [8] * 7,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 12,
    "id2label": {str(i): str(i) for i in range(7)},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Layout:
    """A style encoder of sizes of its own, the positional convolution in its plain form."""
    torch.manual_seed(0)
    layout = Layout(tmp_path, tmp_path / "lm", "expressive")
    layout.style.mkdir(parents=True)
    (layout.style / "config.json").write_text(json.dumps(CONFIG))
    network = StyleNetwork(Wav2Vec2Config(**CONFIG, mask_time_prob=0.0))
    torch.save(network.state_dict(), layout.style / "pytorch_model.bin")
    return layout


@pytest.mark.parametrize(
    ("gain", "direction"),
    [
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ],
)
@pytest.mark.parametrize("form", ["bin", "safetensors", "half"])
def test_every_form_of_a_checkpoint(
    checkpoint: Layout, gain: str, direction: str, form: str
) -> None:
    wave = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    expected = StyleEncoder.load(checkpoint).logits(wave)
    path = checkpoint.style / "pytorch_model.bin"
    state = {k: v.clone() for k, v in load_state(path).items()}
    weight = state.pop(CONV + "weight")
    state[CONV + direction] = weight * 3  # its length does not count
    state[CONV + gain] = weight.norm(dim=(0, 1), keepdim=True)
    state["wav2vec2.masked_spec_embed"] = torch.zeros(16)
    if form == "half":
        state = {k: v.half() for k, v in state.items()}
    path.unlink()
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, checkpoint.style / "model.safetensors")
    else:
        torch.save(state, path)
    found = StyleEncoder.load(checkpoint).logits(wave)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if form == "half" else 1e-5)


def test_a_short_last_second_is_averaged_by_itself(checkpoint: Layout) -> None:
    network = load_style_network(checkpoint.style)
    hidden = torch.randn(1, 123, 16)
    pooled = network.pool(hidden)
    blocks = [
        network.projector(hidden[:, a:b]).mean(1) for a, b in ((0, 50), (50, 100), (100, 123))
    ]
    torch.testing.assert_close(pooled, torch.stack(blocks, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "units"), [(1280, 1), (16000, 1), (16399, 1), (16400, 2), (48400, 4)]
)
def test_one_unit_for_each_second_begun(checkpoint: Layout, samples: int, units: int) -> None:
    encoder = StyleEncoder.load(checkpoint)
    wave = np.sin(np.arange(samples, dtype=np.float32) / 20)
    assert encoder.logits(wave).shape == (units, 7)
    assert encoder.units(wave).shape == (units,)


def test_normalised_silence_is_silence() -> None:
    assert not normalise(np.zeros(2000, np.float32)).any()
    x = normalise(np.random.default_rng(0).uniform(0, 1, 5000).astype(np.float32))
    assert abs(x.mean()) < 1e-6 and abs(x.std() - 1) < 1e-5


def test_a_graph_replaces_the_network(checkpoint: Layout) -> None:
    encoder = StyleEncoder.load(checkpoint)
    other = StyleEncoder.load(checkpoint, graph=lambda x: [encoder.network(torch.from_numpy(x))])
    wave = np.random.default_rng(1).standard_normal(40000).astype(np.float32)
    np.testing.assert_array_equal(other.units(wave), encoder.units(wave))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classifier.weight", None, "'classifier.weight' missing"),
        ("projector.weight", torch.zeros(3, 3), r"has shape \[3, 3\], expected \[12, 16\]"),
        ("something.else", torch.zeros(1), "'something.else' not known"),
        (CONV + "weight_g", torch.ones(1, 1, 16), "weight_v' is missing"),
        ("classifier.bias", "text", "is a str, expected a tensor"),
    ],
)
def test_bad_weights_name_file_and_key(
    checkpoint: Layout, key: str, value: object, message: str
) -> None:
    path = checkpoint.style / "pytorch_model.bin"
    state = dict(load_state(path))
    if value is None:
        del state[key]
    else:
        state[key] = value
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    path.unlink()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message) as error:
        StyleEncoder.load(checkpoint)
    assert str(path) in str(error.value)


def test_wrong_shape_of_the_weight_norm(checkpoint: Layout) -> None:
    path = checkpoint.style / "pytorch_model.bin"
    state = {k: v.clone() for k, v in load_state(path).items()}
    state[CONV + "weight_v"] = state.pop(CONV + "weight")
    state[CONV + "weight_g"] = torch.ones(16, 1, 1)
    path.unlink()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"weight_g' has shape \[16, 1, 1\]"):
        StyleEncoder.load(checkpoint)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 15), ("conv_dim", [8, 8])])
def test_bad_configuration_is_named(checkpoint: Layout, key: str, value: object) -> None:
    path = checkpoint.style / "config.json"
    path.write_text(json.dumps(load_json(path) | {key: value}))
    with pytest.raises(CheckpointError, match=r"config\.json: not a usable"):
        StyleEncoder.load(checkpoint)
