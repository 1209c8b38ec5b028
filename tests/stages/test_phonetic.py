"""Loading HuBERT in all its forms, the blank rule, and listening through windows."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.checkpoint import CheckpointError, Layout
from stages.hubert import build_hubert, parse_convolutions
from stages.phonetic import (
    PhoneticEncoder,
    PhoneticNetwork,
    Quantizer,
    Window,
    fill_blanks,
    read_window,
)

PATH = Path("mhubert.pt")
NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
WIDTH, HEADS, INNER, CHANNELS = 16, 2, 24, 8
HOP = 640


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "extractor_mode": "default",
        "conv_feature_layers": f"[({CHANNELS},10,8)] + [({CHANNELS},4,4)] * 2 + [({CHANNELS},5,5)]",
        "encoder_layers": 3,
        "features_layer": 2,
        "encoder_embed_dim": WIDTH,
        "encoder_ffn_embed_dim": INNER,
        "encoder_attention_heads": HEADS,
        "activation_fn": "gelu",
        "conv_pos": 6,
        "conv_pos_groups": 4,
    }
    return base | changes


def weights(cfg: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under fairseq's names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + random(size), f"{name}.bias": random(size)}

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": random(out, into), f"{name}.bias": random(out)}

    state = norm("layer_norm", CHANNELS) | linear("post_extract_proj", WIDTH, CHANNELS)
    state |= norm("encoder.layer_norm", WIDTH)
    into, every = 1, cfg["extractor_mode"] == "layer_norm"
    for i, (out, kernel, _) in enumerate(parse_convolutions(cfg["conv_feature_layers"], PATH)):
        name = f"feature_extractor.conv_layers.{i}"
        state[f"{name}.0.weight"] = random(out, into, kernel)
        if cfg.get("conv_bias"):
            state[f"{name}.0.bias"] = random(out)
        if every or i == 0:
            state |= norm(f"{name}.2.1" if every else f"{name}.2", out)
        into = out
    for i in range(cfg["encoder_layers"]):
        name = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= linear(f"{name}.self_attn.{part}", WIDTH, WIDTH)
        state |= linear(f"{name}.fc1", INNER, WIDTH) | linear(f"{name}.fc2", WIDTH, INNER)
        state |= norm(f"{name}.self_attn_layer_norm", WIDTH)
        state |= norm(f"{name}.final_layer_norm", WIDTH)
    taps, group = cfg["conv_pos"], WIDTH // cfg["conv_pos_groups"]
    state["encoder.pos_conv.0.bias"] = random(WIDTH)
    state["encoder.pos_conv.0.weight_g"] = 1 + random(1, 1, taps)
    state["encoder.pos_conv.0.weight_v"] = random(WIDTH, group, taps)
    state |= {"mask_emb": random(WIDTH), "label_embs_concat": random(3, 4)}
    return state | linear("final_proj", 4, WIDTH)


def content(state: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    cfg = config(**changes)
    return {
        "model_cfg": cfg,
        "task_cfg": {"normalize": False},
        "model_weight": weights(cfg) if state is None else state,
    }


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def hear(checkpoint: dict[str, Any], samples: int = 6 * HOP) -> torch.Tensor:
    with torch.inference_mode():
        return build_hubert(checkpoint, PATH)(torch.from_numpy(wave(samples))[None])[0]


@functools.cache
def windowed() -> PhoneticEncoder:
    """A small random encoder that listens through a window."""
    cfg = {
        "extractor_mode": "layer_norm",
        "conv_bias": True,
        "layer_norm_first": True,
        "input_padding": [300, 200],
        "conv_feature_layers": f"[({CHANNELS},400,160), ({CHANNELS},3,2)]",
        "pool": 2,
    }
    hubert = build_hubert(content(**cfg), PATH)
    torch.manual_seed(0)
    quantizer = Quantizer(WIDTH, WIDTH, 31)
    with torch.no_grad():
        quantizer[-1].bias[-1] = -1e4  # no blanks, as in nano
    return PhoneticEncoder(PhoneticNetwork(hubert, quantizer), Window(chunk=3, left=5, right=2))


@functools.cache
def nano() -> PhoneticEncoder:
    if not (NANO / "speech_tokenizer" / "hubert_25hz").is_dir():
        pytest.skip(f"{NANO} holds no hubert_25hz")
    return PhoneticEncoder.load(Layout(NANO, NANO / "spiritlm_model", "expressive"))


def stream(encoder: PhoneticEncoder, samples: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Units of ``samples`` pushed in pieces, the past forgotten as soon as no window needs it."""
    assert encoder.window is not None
    held, origin, done, seen, parts = np.zeros(0, np.float32), 0, 0, 0, []
    borders = [0, *sorted(cuts), len(samples)]
    for a, b in itertools.pairwise(borders):
        held, seen = np.concatenate([held, samples[a:b]]), b
        ready = encoder.frames_ready(seen)
        parts.append(
            encoder.window_codes(held, done, ready, origin=origin, total=encoder.frames(seen))
        )
        done = max(done, ready)
        keep = encoder.window.seen(done, encoder.frames(seen))[0]
        held, origin = held[(keep - origin) * encoder.hop :], keep
    total = encoder.frames(seen)
    parts.append(encoder.window_codes(held, done, total, origin=origin, total=total))
    return np.concatenate(parts)


# --- fairseq checkpoints --------------------------------------------------------------------


def test_layers_above_the_wanted_one_do_not_matter() -> None:
    state = weights(config())
    fewer = {k: v for k, v in state.items() if ".layers.2." not in k}
    torch.testing.assert_close(hear(content(state)), hear(content(fewer)))


def test_both_forms_of_weight_norm() -> None:
    old = weights(config())
    new = dict(old)
    for name, modern in (("weight_g", "original0"), ("weight_v", "original1")):
        new[f"encoder.pos_conv.0.parametrizations.weight.{modern}"] = new.pop(
            f"encoder.pos_conv.0.{name}"
        )
    torch.testing.assert_close(hear(content(old)), hear(content(new)), rtol=0, atol=0)


def test_batch_norm_before_the_positional_convolution() -> None:
    """A batch norm that changes nothing, and the weight multiplied out, is the weight norm."""
    state = weights(config())
    gain = state["encoder.pos_conv.0.weight_g"]
    direction = state["encoder.pos_conv.0.weight_v"]
    other = {k: v for k, v in state.items() if not k.startswith("encoder.pos_conv.")}
    weight = direction * gain / direction.norm(dim=(0, 1), keepdim=True)
    scale, shift = torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)
    other |= {
        "encoder.pos_conv.1.weight": weight,
        "encoder.pos_conv.1.bias": state["encoder.pos_conv.0.bias"],
        "encoder.pos_conv.0.running_mean": shift,
        "encoder.pos_conv.0.running_var": scale**2 - 1e-5,
        "encoder.pos_conv.0.weight": scale,
        "encoder.pos_conv.0.bias": shift,
        "encoder.pos_conv.0.num_batches_tracked": torch.tensor(7),
    }
    torch.testing.assert_close(hear(content(other)), hear(content(state)), rtol=1e-4, atol=1e-4)


def test_equal_widths_need_no_projection() -> None:
    same = {"conv_feature_layers": f"[({WIDTH},400,320), ({WIDTH},2,2)]"}
    state = weights(config(**same))
    state = {k: v for k, v in state.items() if not k.startswith("post_extract_proj")}
    state |= {"layer_norm.weight": torch.ones(WIDTH), "layer_norm.bias": torch.zeros(WIDTH)}
    bare = hear(content(state, **same))
    state |= {"post_extract_proj.weight": torch.eye(WIDTH)}
    state |= {"post_extract_proj.bias": torch.zeros(WIDTH)}
    torch.testing.assert_close(bare, hear(content(state, **same)))


@pytest.mark.parametrize("samples", [0, 1, 399, 640, 1279, 1280, 5000])
def test_frames_are_counted(samples: int) -> None:
    for hubert in (build_hubert(content(), PATH), windowed().network.hubert):
        count = hubert.frames(samples)
        if count:
            assert hubert(torch.zeros(1, samples)).shape == (1, count, WIDTH)


def test_half_precision_is_cast() -> None:
    state = {k: v.half() for k, v in weights(config()).items()}
    out = hear(content(state))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, hear(content({k: v.float() for k, v in state.items()})))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.layers.1.fc1.weight", None, r"encoder\.layers\.1\.feed_forward|fc1"),
        ("encoder.layers.1.fc1.weight", torch.zeros(3, 3), "shape"),
        ("encoder.pos_conv.0.weight_v", None, "weight_v"),
        ("encoder.pos_conv.0.weight_g", torch.zeros(2), "weight_g"),
        ("surprise", torch.zeros(1), "surprise"),
    ],
)
def test_a_wrong_weight_is_named(key: str, value: Any, message: str) -> None:
    state = weights(config())
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        build_hubert(content(state), PATH)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_layer": 4}, "layer 4"),
        ({"extractor_mode": "spectral"}, "spectral"),
        ({"layer_type": "conformer"}, "conformer"),
        ({"conv_feature_layers": "__import__('os').abort()"}, "conv_feature_layers"),
        ({"encoder_embed_dim": "wide"}, "encoder_embed_dim"),
        ({"encoder_attention_heads": 3}, "HuBERT"),
        ({"pool": 0}, "pool"),
        ({"input_padding": [1]}, "input_padding"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    state = weights(config())
    with pytest.raises(CheckpointError, match=message):
        build_hubert(content(state, **changes), PATH)


@pytest.mark.parametrize("value", [{"chunk": 0, "left": 1, "right": 1}, {"chunk": 3}, "wide"])
def test_a_wrong_window_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="window"):
        read_window({"window": value}, PATH)


def test_convolutions_are_read_without_running_them() -> None:
    text = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 3"
    assert parse_convolutions(text, PATH) == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 3
    for bad in ("[(1,2)]", "[(1,2,3)] * 99", "[(1,2,-3)]", "[]", "(", "[(True,1,1)]", "[x]"):
        with pytest.raises(CheckpointError, match="conv_feature_layers"):
            parse_convolutions(bad, PATH)


# --- the blank rule -------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=30))
def test_blanks_take_what_is_left_of_them(codes: list[int]) -> None:
    out = list(codes)
    if any(c != 3 for c in codes):
        while 3 in out:
            out = [out[i - 1] if c == 3 else c for i, c in enumerate(out)]
    assert fill_blanks(np.array(codes, np.int64), blank=3).tolist() == out


# --- windows --------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 9), st.integers(0, 9), st.integers(0, 60))
def test_windows_cover_every_frame_once(chunk: int, left: int, right: int, total: int) -> None:
    window = Window(chunk, left, right)
    covered = []
    for first, end in window.spans(0, total):
        low, high = window.seen(first, total)
        assert max(0, first - left) == low <= first < end <= high <= total
        covered += range(first, end)
    assert covered == list(range(total))
    ready = window.ready(total)
    assert 0 <= ready <= max(0, total - right) and ready % chunk == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30 * HOP), st.data())
def test_streaming_is_offline(samples: int, data: st.DataObject) -> None:
    encoder, x = windowed(), wave(samples)
    cuts = data.draw(st.lists(st.integers(0, samples), max_size=12))
    np.testing.assert_array_equal(stream(encoder, x, cuts), encoder.units(x))


def test_a_window_sees_its_samples_only() -> None:
    encoder, x = windowed(), wave(30 * HOP)
    far = x.copy()
    far[: 10 * HOP] = 0  # chunk 15..17 sees frames 10..19
    far[20 * HOP :] = 0
    features = encoder.features(x)
    np.testing.assert_array_equal(features[15:18], encoder.features(far)[15:18])
    assert np.abs(features[14] - encoder.features(far)[14]).max() > 0


def test_a_window_without_its_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples"):
        windowed().window_codes(wave(4 * HOP), 0, 3, total=9)


def test_nano_streams_as_it_listens_offline() -> None:
    encoder = nano()
    assert encoder.window is not None and encoder.hop == HOP
    x = wave(45_000, seed=1) * np.hanning(45_000).astype(np.float32)
    cuts = np.random.default_rng(2).integers(0, len(x), 9).tolist()
    offline = encoder.units(x)
    assert len(offline) == len(x) // HOP
    np.testing.assert_array_equal(stream(encoder, x, cuts), offline)
    assert offline.max() < 500 and encoder.logits(x)[:, encoder.blank].max() < -1000
