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
        ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
        ({"dtype": "float16"}, "expected one of ['bfloat16', 'float32'], got 'float16"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


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
