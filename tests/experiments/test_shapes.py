"""Models and devices of a user's own."""

import dataclasses
import json

import pytest

from disagg_jax.deployment import InstanceSpec, Role
from disagg_jax.sim.hardware_presets import get_hardware
from disagg_jax.sim.model_shape import MODEL_SHAPES, get_model_shape
from experiments.shapes import get_device, get_shape, shape_of
from experiments.simulations import roofline_simulation
from models.config import PRESETS

_SPEC = InstanceSpec(role=Role.DECODE, tp=1)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def fields(name):
    shape = dataclasses.asdict(get_model_shape(name))
    return {key: value for key, value in shape.items() if key != "name"}


def test_presets_of_the_simulator_come_before_those_of_the_engine():
    assert get_shape("llama-3-8b") is MODEL_SHAPES["llama-3-8b"]
    assert get_shape("tiny") == shape_of(PRESETS["tiny"])


def test_a_file_of_sizes(tmp_path):
    path = write(tmp_path / "mine.json", fields("llama-3-8b"))
    expected = dataclasses.replace(get_model_shape("llama-3-8b"), name="mine")
    assert get_shape(path) == expected
    assert roofline_simulation(path, "h100").model_name == "mine"


def test_widths_of_numbers_may_be_left_out(tmp_path):
    some = {k: v for k, v in fields("opt-13b").items() if "dtype" not in k}
    path = write(tmp_path / "opt-13b.json", some)
    assert get_shape(path) == get_model_shape("opt-13b")


# As in the config.json of meta-llama/Meta-Llama-3-8B and facebook/opt-13b.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 20_480,
    "vocab_size": 50_272,
}


@pytest.mark.parametrize(("name", "config"), [("llama-3-8b", LLAMA), ("opt-13b", OPT)])
def test_a_config_of_hugging_face(tmp_path, name, config):
    path = write(tmp_path / f"{name}.json", config)
    assert get_shape(path) == get_model_shape(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON, got"),
        ([1], r"expected a JSON object, got \[1\]"),
        ({"layers": 2}, r"got no \['embed', .*\] and unknown \[\]"),
        ({**fields("opt-13b"), "depth": 3}, r"got no \[\] and unknown \['depth'\]"),
        ({**LLAMA, "model_type": "mamba"}, "expected one of .*, got 'mamba'"),
        ({**fields("opt-13b"), "layers": 0}, "layers: expected >= 1, got 0"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        get_shape(write(tmp_path / "bad.json", content))


def test_no_such_file_or_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        get_shape(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="model: expected one of .* or a .json file"):
        get_shape("llama-9")


def test_a_device_like_another(tmp_path):
    path = write(tmp_path / "h200.json", {"like": "h100", "hbm_bytes_s": 4.8e12})
    expected = dataclasses.replace(
        get_hardware("h100"), name="h200", hbm_bytes_s=4.8e12
    )
    assert get_device(path) == expected
    faster, slower = (
        roofline_simulation("llama-3-8b", name)
        .cost_of(_SPEC)
        .instance(1)
        .decode_s(8, 8 * 1000)
        for name in (path, "h100")
    )
    assert faster < slower
    assert get_device("h100") is get_hardware("h100")


@pytest.mark.parametrize(
    "content", [{"hbm_bytes_s": 1e12}, {"like": "h100", "flops": 1.0}]
)
def test_bad_devices(tmp_path, content):
    with pytest.raises(ValueError, match="hardware: .*expected 'like', a preset, and"):
        get_device(write(tmp_path / "bad.json", content))
