from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest

from models.config import PRESETS, get_config

TINY = get_config("tiny")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers: expected > 0, got 0"),
        ({"rope_theta": -1.0}, "rope_theta: expected > 0, got -1.0"),
        ({"norm_eps": float("nan")}, "norm_eps: expected > 0, got nan"),
        ({"kv_heads": 3}, "q_heads: expected a multiple of kv_heads=3, got 8"),
        ({"rope_divisors": ()}, "rope_divisors: expected 8 > 0, got ()"),
        ({"rope_divisors": (1.0,) * 7}, "rope_divisors: expected 8 > 0, got (1.0"),
        ({"rope_divisors": (1.0,) * 7 + (0.0,)}, "rope_divisors: expected 8 > 0, got"),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
        ({"head_dim": 17}, "head_dim: expected an even number, got 17"),
        ({"dtype": "float16"}, "expected one of ['bfloat16', 'float32'], got 'float16"),
        ({"norm": "batch"}, "norm: expected one of ['layer', 'rms'], got 'batch'"),
        ({"positions": "alibi"}, "expected one of ['learned', 'rotary'], got 'alibi'"),
        ({"mlp_kind": "moe"}, "mlp_kind: expected one of ['relu', 'swiglu'], got"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


def test_the_smallest_sizes_are_allowed() -> None:
    one = dict.fromkeys(["vocab_size", "layers", "embed", "q_heads", "mlp"], 1)
    dataclasses.replace(TINY, **one, kv_heads=1, head_dim=2, max_length=1)
    dataclasses.replace(TINY, head_dim=18)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-3-8b'.*'tiny'.*got 'gpt-5'"):
        get_config("gpt-5")


def test_presets_are_called_what_they_are_named() -> None:
    assert all(config.name == name for name, config in PRESETS.items())


@pytest.mark.parametrize(
    "name, num_params",
    [
        # The totals in the safetensors metadata on Hugging Face.
        ("smollm2-135m", 134_515_008),
        ("llama-3-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        # Counted by transformers 5.23; the hub stores the tied embedding twice.
        ("qwen3-0.6b", 596_049_920),
        # Also so, less the two rows of positions that are for padding only.
        ("opt-125m", 125_239_296 - 2 * 768),
        ("opt-13b", 12_853_473_280 - 2 * 5120),
        ("opt-66b", 65_719_701_504 - 2 * 9216),
    ],
)
def test_num_params_is_the_published_number(name: str, num_params: int) -> None:
    assert get_config(name).num_params == num_params


def test_kv_bytes_per_token() -> None:
    # 2 (k and v) * 32 layers * 8 kv heads * 128 * 2 bytes = 128 KiB
    assert get_config("llama-3-8b").kv_bytes_per_token == 128 * 1024
    # 2 * 30 * 3 * 64 * 4 bytes
    assert get_config("smollm2-135m").kv_bytes_per_token == 46_080


def test_a_simulation_can_read_shapes_without_jax() -> None:
    code = (
        "import sys, models.config, models.tokenizer; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
