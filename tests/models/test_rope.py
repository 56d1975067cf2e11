"""Scaled rotary frequencies, against the published formulas written out in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models import layers, transformer
from models.config import ModelConfig, get_config
from models.rope import read_scaling

GOLDEN = pathlib.Path(__file__).parent / "golden"

# As in meta-llama/Llama-3.1-8B's config.json; 3.2's has a factor of 32.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As Qwen's model cards say.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}
LINEAR = {"type": "linear", "factor": 4.0}


def plain(head_dim: int, theta: float) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def llama3(head_dim: int, theta: float, fields: dict[str, Any]) -> np.ndarray:
    """As Meta's apply_scaling, one frequency at a time."""
    original, factor = fields["original_max_position_embeddings"], fields["factor"]
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]
    scaled = []
    for frequency in plain(head_dim, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


def yarn(head_dim: int, theta: float, fields: dict[str, Any]) -> np.ndarray:
    """NTK by parts: YaRN, section 3.2, with the paper's gamma over pairs, as published.

    Pair i turns original / wavelength times; its frequency stays from beta_fast turns
    on, is divided under beta_slow, and between them the mix is linear in i.
    """
    original, factor = fields["original_max_position_embeddings"], fields["factor"]

    def pair(turns: float) -> float:
        # theta ** (2 i / head_dim) = original / (2 pi turns), solved for i
        return head_dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    low, high = pair(fields.get("beta_fast", 32)), pair(fields.get("beta_slow", 1))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    frequency = plain(head_dim, theta)
    return frequency / factor * ramp + frequency * (1 - ramp)


def table(fields: dict[str, Any], head_dim: int, theta: float) -> tuple[Any, ...]:
    scaling = read_scaling(fields, head_dim, theta)
    config = dataclasses.replace(
        get_config("tiny"),
        head_dim=head_dim,
        rope_theta=theta,
        rope_divisors=scaling.divisors,
        rope_attention_factor=scaling.attention_factor,
    )
    return layers.rope_table(config, jnp.arange(3))


def frequencies(fields: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What the model turns by at position 1, all angles being at most 1 radian."""
    sin, cos = table(fields, head_dim, theta)
    return np.arctan2(np.asarray(sin[1], np.float64), np.asarray(cos[1], np.float64))


@pytest.mark.parametrize(
    "rule, head_dim, theta, fields",
    [
        (llama3, 128, 500_000.0, LLAMA3),
        (llama3, 64, 500_000.0, {**LLAMA3, "factor": 32.0}),
        (llama3, 16, 100.0, {**LLAMA3, "original_max_position_embeddings": 64}),
        (llama3, 64, 1e4, {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 9}),
        (yarn, 128, 1e6, YARN),
        (yarn, 64, 150_000.0, {**YARN, "factor": 32, "truncate": False}),
        (yarn, 64, 1e4, {**YARN, "beta_fast": 16, "beta_slow": 2}),
        (yarn, 80, 5e5, {**YARN, "original_max_position_embeddings": 4096}),
        # From before the first pair, -3.4, to behind the last, 18.9 of 0 to 15.
        (
            *(yarn, 16, 10.0),
            {**YARN, "original_max_position_embeddings": 76, "beta_slow": 0.052},
        ),
        (lambda h, t, f: plain(h, t) / 4, 64, 1e4, LINEAR),
        (lambda h, t, f: plain(h, t) / 2.5, 32, 1e5, {**LINEAR, "factor": 2.5}),
        (lambda h, t, f: plain(h, t), 64, 1e4, {"rope_type": "default"}),
        (lambda h, t, f: plain(h, t), 64, 1e4, {"rope_type": None}),
    ],
)
def test_frequencies_are_the_formulas(
    rule: Any, head_dim: int, theta: float, fields: dict[str, Any]
) -> None:
    want = rule(head_dim, theta, fields)
    # A float32 sine and cosine: 6e-8 each, and as much for the rounded frequency.
    np.testing.assert_allclose(frequencies(fields, head_dim, theta), want, rtol=5e-7)
    scaling = read_scaling(fields, head_dim, theta)
    exact = plain(head_dim, theta) / np.array(scaling.divisors or (1.0,))
    np.testing.assert_allclose(exact, want, rtol=1e-14)  # float64 rounding


@pytest.mark.parametrize(
    "fields, factor",
    [
        (YARN, 0.1 * math.log(4) + 1),
        ({**YARN, "factor": 32}, 0.1 * math.log(32) + 1),
        ({**YARN, "attention_factor": 1.5}, 1.5),
        # DeepSeek's: the ratio of two such factors.
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
            (0.0707 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        ({**YARN, "factor": 1}, 1.0),
        # One of the two alone has no effect.
        ({**YARN, "mscale": 0.707}, 0.1 * math.log(4) + 1),
        ({**YARN, "mscale_all_dim": 0.707}, 0.1 * math.log(4) + 1),
        (LLAMA3, 1.0),
        (LINEAR, 1.0),
    ],
)
def test_sines_and_cosines_have_the_attention_factor(
    fields: dict[str, Any], factor: float
) -> None:
    sin, cos = table(fields, 64, 1e4)
    np.testing.assert_allclose(np.hypot(sin, cos), factor, rtol=3e-7)


def test_a_step_without_width_is_sharp() -> None:
    """Both ends at 2.5 = 4 log(original / 2 pi) / log(theta): as in llama.cpp."""
    turns = {"beta_fast": 1.000001, "beta_slow": 1.0, "truncate": False}
    original = 2 * math.pi * 10**2.5
    fields = {**YARN, **turns, "original_max_position_embeddings": original}
    assert read_scaling(fields, 8, 1e4).divisors == pytest.approx(
        (1, 1, 1, 4), rel=1e-2
    )


def test_a_whole_rotation_may_be_said() -> None:
    said = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}
    assert read_scaling(said, 4, 1e4).divisors == (2.0, 2.0)


@pytest.mark.parametrize("fields", [LLAMA3, YARN, LINEAR])
def test_a_factor_of_one_changes_nothing(fields: dict[str, Any]) -> None:
    scaling = read_scaling({**fields, "factor": 1.0}, 64, 1e4)
    assert (scaling.divisors, scaling.attention_factor) == (None, 1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "expected one of .*, got 'dynamic'"),
        ({"type": "longrope", "long_factor": [1.0]}, "got 'longrope'"),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "got 'mrope'"),
        ({"type": "su"}, "got 'su'"),
        ({"rope_type": "default", "mrope_section": [1]}, r"got \['mrope_section'\]"),
        (
            {"type": "linear", "rope_type": "yarn"},
            r"the same, got \['linear', 'yarn'\]",
        ),
        ({"type": "linear"}, "'linear': factor: expected a number > 0, got None"),
        ({"factor": 2.0}, r"'default': expected no other fields, got \['factor'\]"),
        ({**LINEAR, "factor": 0.5}, "factor: expected >= 1, got 0.5"),
        ({**LINEAR, "factor": math.inf}, "factor: expected a number > 0, got inf"),
        ({**YARN, "factor": 0.99}, "'yarn': factor: expected >= 1, got 0.99"),
        ({**LINEAR, "factor": "4"}, "factor: expected a number > 0, got '4'"),
        ({**LINEAR, "factor": True}, "factor: expected a number > 0, got True"),
        ({**LINEAR, "low_freq_factor": 1}, r"other fields, got \['low_freq_factor'\]"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "expected > low_freq_factor=4, got 4.0"),
        ({**LLAMA3, "high_freq_factor": None}, "high_freq_factor: expected a number"),
        (
            {**LLAMA3, "original_max_position_embeddings": 0},
            "original_max_position_embeddings: expected a number > 0, got 0",
        ),
        (
            {k: v for k, v in YARN.items() if k[0] != "o"},
            "'yarn': original_max_position_embeddings: expected a number > 0, got None",
        ),
        ({**YARN, "beta_slow": 32}, "beta_fast: expected > beta_slow=32, got 32"),
        ({**YARN, "attention_factor": -1}, "attention_factor: expected a number > 0"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            r"got \['partial_rotary_factor'\]",
        ),
        ({"full_attention": {"rope_type": "default"}}, r"got \['full_attention'\]"),
    ],
)
def test_other_kinds_and_fields_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_scaling(fields, 64, 1e4)


# -- Hugging Face folders -------------------------------------------------------------


pytest.importorskip("safetensors")


def load(folder: pathlib.Path, **settings: Any) -> tuple[ModelConfig, Any]:
    from models.hf import load_hf

    shutil.copytree(GOLDEN / "llama", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return load_hf(folder)


SHORT = {**LLAMA3, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {**SHORT, "rope_theta": 500.0}},
        {"rope_parameters": None, "rope_scaling": SHORT, "rope_theta": 500.0},
        {"rope_parameters": {**SHORT, "rope_theta": 500.0}, "rope_scaling": SHORT},
    ],
)
def test_a_folder_says_it_in_either_place(
    tmp_path: pathlib.Path, settings: dict[str, Any]
) -> None:
    config, params = load(tmp_path / "scaled", **settings)
    assert config.rope_theta == 500
    want = llama3(8, 500.0, SHORT)
    exact = plain(8, 500.0) / np.array(config.rope_divisors)
    np.testing.assert_allclose(exact, want, rtol=1e-14)
    assert config.max_length == 64
    tokens = jnp.arange(40)
    before, _ = load(tmp_path / "plain")
    logits = [transformer.forward(c, params, tokens) for c in (before, config)]
    assert np.abs(logits[1] - logits[0]).max() > 0.1


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"rope_scaling": {**SHORT, "factor": 2.0}, "rope_parameters": SHORT},
            "factor: expected the same wherever it is, got 8.0 and 2.0",
        ),
        ({"rope_theta": 1e6}, "rope_theta: expected the same .* got 500.0 and 1000000"),
        ({"rope_parameters": [8]}, r"rope_parameters: expected an object, got \[8\]"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: a rotation of a"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tmp_path: pathlib.Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad", **settings)


@pytest.mark.parametrize(
    "max_position_embeddings, scaling, length",
    [
        # Qwen3's config.json keeps 40,960 when its card has YaRN added by hand.
        (40_960, YARN, 131_072),
        # transformers: to be raised to what the scaled model is made for.
        (131_072, YARN, 131_072),
        (262_144, YARN, 262_144),  # never less than the folder says
        (131_072, LLAMA3, 131_072),
        (16_384, LINEAR, 16_384),
        (40_960, None, 40_960),
    ],
)
def test_the_context_is_the_scaled_one(
    tmp_path: pathlib.Path,
    max_position_embeddings: int,
    scaling: dict[str, Any] | None,
    length: int,
) -> None:
    config, _ = load(
        tmp_path / "model",
        max_position_embeddings=max_position_embeddings,
        rope_parameters=None,
        rope_scaling=scaling,
    )
    assert config.max_length == length
