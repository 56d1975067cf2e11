"""Model sizes against the figures that papers state."""

import dataclasses

import pytest

from models.config import Widths
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
    assert find_model(name).num_params / 1e9 == pytest.approx(billions, rel=1e-3)


def test_dtypes_scale_what_they_are_the_dtype_of():
    model = find_model("llama-3-70b")
    eight_bits = Widths(weight=1, table=1, kv=1, activation=2)
    quantised = dataclasses.replace(model, widths=eight_bits)
    params = 80 * model.blocks[0].params + 2 * model.table_params
    assert 2 * quantised.weight_bytes == model.weight_bytes == 2 * params
    assert 2 * quantised.kv_bytes_per_token == model.kv_bytes_per_token


def test_tables_may_be_wider_than_the_layers():
    awq = dataclasses.replace(
        find_model("llama-3-8b"), widths=Widths(weight=0.5, table=2, kv=2, activation=2)
    )
    # 8.03e9 weights, of which 1.05e9 are in the two tables.
    assert awq.weight_bytes / 1e9 == pytest.approx(6.98 / 2 + 1.05 * 2, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected > 0, got 0"),
        ({"kv_heads": 7}, "q_heads: expected a multiple of kv_heads=7, got 64"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(find_model("llama-3-70b"), **change)


@pytest.mark.parametrize("part", ["weight", "table", "kv", "activation"])
def test_impossible_widths_are_refused(part):
    with pytest.raises(ValueError, match=f"{part}: expected > 0 bytes, got 0"):
        Widths(**{"weight": 2, "table": 2, "kv": 2, "activation": 2, part: 0})


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="model: .*'opt-13b'.*, got 'gpt-5'"):
        find_model("gpt-5")
