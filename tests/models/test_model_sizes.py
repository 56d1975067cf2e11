"""Model sizes against the figures that papers state."""

import dataclasses

import pytest

from models.config import PRESETS
from models.lookup import find_model


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        # DistServe 3.3 [P], fp16: 0.82, 2.36 and 4.72 MB per token
        ("opt-13b", 819_200),  # 2 * 40 layers * 40 heads * 128 * 2 bytes
        ("opt-66b", 2_359_296),
        ("opt-175b", 4_718_592),
        ("llama-2-70b", 327_680),  # 2 * 80 * 8 * 128 * 2; 2048 tokens are 0.671 GB
        ("llama-3-8b", 131_072),
        ("smollm2-135m", 23_040),
    ],
)
def test_kv_bytes_of_a_token(name, kv_bytes):
    assert find_model(name).kv_bytes_per_token == kv_bytes


def test_kv_bytes_of_a_request():
    # The paper says 1.13 GB; it is 1.125 GiB.
    assert 512 * find_model("opt-66b").kv_bytes_per_token == 1_207_959_552


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("opt-13b", 26), ("opt-66b", 132), ("opt-175b", 350)]
)
def test_weights_fill_the_memory_that_the_paper_states(name, gigabytes):
    # DistServe, Table 1: parameters in billions times 2, rounded. Ours leaves out
    # positions, biases and norms.
    weights = find_model(name).weight_bytes / 1e9
    assert 0.985 * gigabytes < weights < gigabytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # Parameters of the Hugging Face checkpoints.
        ("llama-2-13b", 13.016),
        ("llama-2-70b", 68.977),
        ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.554),
        ("smollm2-135m", 0.1345),
    ],
)
def test_parameters_are_the_checkpoints(name, billions):
    assert find_model(name).params / 1e9 == pytest.approx(billions, rel=1e-3)


# Neither may import the other (the core imports no models), so they stand twice.
SHARED = sorted(MODEL_SHAPES.keys() & PRESETS.keys())


def test_some_shapes_are_shared_with_the_engine():
    assert SHARED == ["llama-3-8b", "opt-13b", "opt-66b", "smollm2-135m"]


@pytest.mark.parametrize("name", SHARED)
def test_shapes_that_the_engine_also_runs_are_the_same(name):
    config, shape = PRESETS[name], find_model(name)
    for field in ("layers", "embed", "q_heads", "kv_heads", "head_dim", "mlp"):
        assert getattr(shape, field) == getattr(config, field), field
    assert shape.vocab == config.vocab_size
    assert shape.tie_embeddings == config.tie_embeddings
    assert shape.gated_mlp == (config.mlp_kind == "swiglu")
    # What the shape leaves out: vectors, and a table of positions.
    E, layers, kv = config.embed, config.layers, config.kv_heads * config.head_dim
    norms = (2 * layers + 1) * E * (1 if config.norm == "rms" else 2)
    biases = layers * (E + 2 * kv + E + config.mlp + E) if config.biases else 0
    positions = config.max_length * E if config.positions == "learned" else 0
    assert shape.params + norms + biases + positions == config.num_params


def test_dtypes_scale_what_they_are_the_dtype_of():
    shape = find_model("llama-3-70b")
    quantised = dataclasses.replace(shape, weight_dtype_bytes=1, kv_dtype_bytes=1)
    assert 2 * quantised.weight_bytes == shape.weight_bytes == 2 * shape.params
    assert 2 * quantised.kv_bytes_per_token == shape.kv_bytes_per_token


def test_tables_may_be_wider_than_the_layers():
    shape = find_model("llama-3-8b")
    awq = dataclasses.replace(shape, weight_dtype_bytes=0.5, table_dtype_bytes=2)
    # 8.03e9 weights, of which 1.05e9 are in the two tables.
    assert awq.weight_bytes / 1e9 == pytest.approx(6.98 / 2 + 1.05 * 2, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected >= 1, got 0"),
        ({"kv_dtype_bytes": 0}, "kv_dtype_bytes: expected >= 1, got 0"),
        ({"weight_dtype_bytes": 0}, "weight_dtype_bytes: expected > 0, got 0"),
        ({"table_dtype_bytes": -1}, "table_dtype_bytes: expected > 0, got -1"),
        ({"kv_heads": 7}, "q_heads: expected a multiple of kv_heads=7, got 64"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(find_model("llama-3-70b"), **change)


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="model: .*'opt-13b'.*, got 'gpt-5'"):
        find_model("gpt-5")
