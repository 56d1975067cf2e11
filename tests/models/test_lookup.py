"""Models and devices of a user's own."""

import dataclasses
import json

import pytest

from disagg_jax.deployment import InstanceSpec, Parallelism, Role
from disagg_jax.sim import Simulation
from disagg_jax.sim.cost.roofline import RooflineCost
from disagg_jax.sim.hardware.presets import get_hardware
from models.config import PRESETS, Widths
from models.lookup import find_model

_SPEC = InstanceSpec(role=Role.DECODE)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def fields(name):
    """The file of one's own that describes a preset."""
    model = find_model(name)
    keys = ("layers", "embed", "q_heads", "kv_heads", "head_dim", "mlp")
    return {
        **{key: getattr(model, key) for key in keys},
        "vocab": model.vocab_size,
        "gated_mlp": model.mlp_kind == "swiglu",
        "tie_embeddings": model.tie_embeddings,
        "weight_dtype_bytes": model.stored.weight,
        "table_dtype_bytes": model.stored.table,
        "kv_dtype_bytes": model.stored.kv,
        "activation_dtype_bytes": model.stored.activation,
    }


def seen(model):
    """All that a cost model sees of it."""
    return (
        (model.layers, model.embed, model.q_heads, model.kv_heads, model.head_dim),
        (model.blocks, model.table_params, model.tie_embeddings),
        (model.stored.weight, model.table_bytes, model.weight_bytes),
        (model.kv_bytes_per_token, model.stored.activation),
    )


def test_models_of_others_are_billed_as_published_and_ours_as_they_run():
    published = find_model("smollm2-135m")
    assert PRESETS["smollm2-135m"].dtype == "float32"  # faster on a CPU
    assert (
        published.weight_bytes
        == 2 * 134_479_872
        == published.stored.weight
        * (published.layers * published.blocks[0].params + published.table_params)
    )
    assert find_model("tiny") is PRESETS["tiny"]
    assert find_model("tiny").stored.weight == 4


def test_a_file_of_sizes(tmp_path):
    path = write(tmp_path / "mine.json", fields("llama-3-8b"))
    model = find_model(path)
    assert seen(model) == seen(find_model("llama-3-8b"))
    assert model.name == Simulation.of(path, "h100").model.name == "mine"


def test_widths_of_numbers_may_be_left_out(tmp_path):
    some = {k: v for k, v in fields("opt-13b").items() if "dtype" not in k}
    path = write(tmp_path / "opt-13b.json", some)
    assert seen(find_model(path)) == seen(find_model("opt-13b"))


def test_each_width_of_a_file_is_that_of_its_part(tmp_path):
    widths = {
        "weight_dtype_bytes": 0.5,
        "table_dtype_bytes": 4,
        "kv_dtype_bytes": 1,
        "activation_dtype_bytes": 8,
    }
    path = write(tmp_path / "m.json", {**fields("opt-13b"), **widths})
    assert find_model(path).stored == Widths(weight=0.5, table=4, kv=1, activation=8)
    no_table = {**widths, "table_dtype_bytes": None}
    path = write(tmp_path / "m.json", {**fields("opt-13b"), **no_table})
    assert find_model(path).stored == Widths(weight=0.5, table=0.5, kv=1, activation=8)


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
    assert seen(find_model(path)) == seen(find_model(name))


# By name: what the config.json of published models says of sizes, and the parameters
# in the metadata of their weights.
PUBLISHED = {
    "Meta-Llama-3.1-8B": (LLAMA, 8_030_261_248),
    "Meta-Llama-3.1-70B": (
        {
            **LLAMA,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "intermediate_size": 28_672,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        },
        70_553_706_496,
    ),
    "Qwen3-8B": (
        {
            **LLAMA,
            "model_type": "qwen3",
            "num_hidden_layers": 36,
            "head_dim": 128,
            "intermediate_size": 12_288,
            "vocab_size": 151_936,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 36,
        },
        8_190_735_360,
    ),
    "Qwen3-32B": (
        {
            **LLAMA,
            "model_type": "qwen3",
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "head_dim": 128,
            "intermediate_size": 25_600,
            "vocab_size": 151_936,
        },
        32_762_123_264,
    ),
    "Qwen2.5-7B": (
        {
            **LLAMA,
            "model_type": "qwen2",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
        },
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(tmp_path, name):
    config, params = PUBLISHED[name]
    model = find_model(write(tmp_path / f"{name}.json", config))
    tables = 1 if model.tie_embeddings else 2
    matrices = model.layers * model.blocks[0].params + tables * model.table_params
    assert matrices == pytest.approx(params, rel=1e-3)  # norms and biases
    assert model.weight_bytes == 2 * matrices


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("settings", "weight", "table", "kv", "activation", "bits"),
    [
        ({}, 2, 2, 2, 2, 16),
        ({"torch_dtype": "bfloat16"}, 2, 2, 2, 2, 16),
        ({"dtype": "float16"}, 2, 2, 2, 2, 16),
        ({"torch_dtype": "float32"}, 4, 4, 4, 4, 16),
        ({"quantization_config": FP8}, 1, 2, 2, 2, 8),
        ({"quantization_config": FP8, "dtype": "float32"}, 1, 4, 4, 4, 8),
        ({"quantization_config": FP8, "kv_cache_dtype": "fp8"}, 1, 2, 1, 2, 8),
        ({"quantization_config": {"quant_method": "mxfp4"}}, 0.53125, 2, 2, 2, 4),
    ],
)
def test_widths_follow_the_file(
    tmp_path, settings, weight, table, kv, activation, bits
):
    model = find_model(write(tmp_path / "m.json", {**LLAMA, **settings}))
    assert model.stored == Widths(
        weight=weight, table=table, kv=kv, activation=activation, matmul_bits=bits
    )
    layers, tables = model.layers * model.blocks[0].params, 2 * model.table_params
    assert model.weight_bytes == layers * weight + tables * table


def test_memory_follows_the_file(tmp_path):
    """Llama-3.1-70B in FP8 fits one H100, which it does not in 16 bits."""
    config = PUBLISHED["Meta-Llama-3.1-70B"][0]

    def kv_tokens(tp, **settings):
        path = write(tmp_path / "m.json", {**config, **settings})
        spec = InstanceSpec(role=Role.DECODE, parallelism=Parallelism(tp))
        return Simulation.of(path, "h100").kv_tokens(spec)

    with pytest.raises(ValueError, match="expected weights and KV in 77.31 GB"):
        kv_tokens(1)
    # 68.45e9 weights in blocks and 2 x 1.05e9 in tables; 327,680 bytes of KV a token.
    memory = 0.9 * 2 * 80 * 2**30
    blocks, tables = 80 * 855_638_016, 2 * 128_256 * 8192
    want = (memory - blocks - 2 * tables) // 327_680
    assert kv_tokens(2, quantization_config=FP8) == want
    assert kv_tokens(1, quantization_config=FP8) > 5_000
    fp8_kv = {"quantization_config": {**FP8, "kv_cache_scheme": {"num_bits": 8}}}
    assert kv_tokens(2, **fp8_kv) == (memory - blocks - 2 * tables) // 163_840


def test_streaming_follows_the_file(tmp_path):
    """An ideal device's decode step of one row takes as long as its bytes do."""

    def decode_s(**settings):
        path = write(tmp_path / "m.json", {**LLAMA, **settings})
        cost = RooflineCost(
            model=find_model(path), hardware=get_hardware("h100").ideal()
        )
        return cost.instance(Parallelism(1)).decode_s(1, 0)

    blocks, table = 32 * 218_103_808, 128_256 * 4096
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    for width, settings in [
        (2, {}),
        (1, {"quantization_config": FP8}),
        (4.15625 / 8, {"quantization_config": awq}),
    ]:
        want = (blocks * width + table * 2) / 3.35e12
        assert decode_s(**settings) == pytest.approx(want, rel=1e-9)


def test_the_file_that_nvidia_lays_beside(tmp_path):
    path = write(tmp_path / "config.json", LLAMA)
    beside = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    write(tmp_path / "hf_quant_config.json", {"quantization": beside, "producer": {}})
    stored = find_model(path).stored
    assert (stored.weight, stored.kv) == (1, 1)


def test_unknown_keys_make_one_warning(tmp_path):
    fields = {**FP8, "novel": 1}
    settings = {**LLAMA, "surprise": 1, "quantization_config": fields}
    path = write(tmp_path / "m.json", settings)
    with pytest.warns(UserWarning) as warned:
        model = find_model(path)
        assert find_model(path) == model
    (message,) = (str(warning.message) for warning in warned)
    named = "['surprise', 'quantization_config.novel']"
    assert message == f"{path}: ignores the unknown keys {named}"
    assert model.stored.weight == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON, got"),
        ([1], r"expected a JSON object, got list"),
        ({"layers": 2}, r"got no \['embed', .*\] and unknown \[\]"),
        ({**fields("opt-13b"), "depth": 3}, r"got no \[\] and unknown \['depth'\]"),
        ({**LLAMA, "model_type": "mamba"}, "expected one of .*, got 'mamba'"),
        ({"architectures": ["X"], "hidden_size": 2}, "model_type: .*, got None"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8: a mixture of"),
        ({**LLAMA, "vocab_size": None}, "model: .*vocab_size: expected a whole number"),
        (
            {**LLAMA, "quantization_config": {"quant_method": "hqq"}},
            "model: .*quantization_config: quant_method: expected one of .*'hqq'",
        ),
        ({**LLAMA, "torch_dtype": "int8"}, "torch_dtype: expected one of .*'int8'"),
        ({**fields("opt-13b"), "gated_mlp": "false"}, "gated_mlp: expected bool, got"),
        ({**fields("opt-13b"), "layers": "40"}, "layers: expected int, got '40'"),
        ({**fields("opt-13b"), "layers": 0}, "layers: expected > 0, got 0"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        find_model(write(tmp_path / "bad.json", content))


def test_no_such_file_or_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_model(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="model: expected one of .*; a .json file may"):
        find_model("llama-9")


def test_a_device_like_another(tmp_path):
    path = write(tmp_path / "fast.json", {"like": "h100", "hbm_bytes_s": 4.8e12})
    expected = dataclasses.replace(
        get_hardware("h100"), name="fast", hbm_bytes_s=4.8e12
    )
    assert get_hardware(path) == expected
    faster, slower = (
        Simulation.of("llama-3-8b", name)
        .cost_of(_SPEC)
        .instance(Parallelism(1))
        .decode_s(8, 8 * 1000)
        for name in (path, "h100")
    )
    assert faster < slower


@pytest.mark.parametrize(
    ("numbers", "peaks"),
    [
        ({}, (2250e12, 4500e12, 9000e12)),
        # narrower peaks keep their ratio to the one at 16 bits, unless given
        ({"peak_flops": 1000e12}, (1000e12, 2000e12, 4000e12)),
        ({"peak_flops_by_bits": {"4": 7e15}}, (2250e12, 4500e12, 7e15)),
        (
            {"peak_flops": 1000e12, "peak_flops_by_bits": {"8": 1500e12}},
            (1000e12, 1500e12, 4000e12),
        ),
    ],
)
def test_a_device_with_other_peaks(tmp_path, numbers, peaks):
    path = write(tmp_path / "other.json", {"like": "b200_sxm"} | numbers)
    device = get_hardware(path)
    assert tuple(device.peak(bits) for bits in (16, 8, 4)) == pytest.approx(peaks)
    assert device.all_reduce == get_hardware("b200").all_reduce


@pytest.mark.parametrize(
    ("peaks", "message"),
    [
        ({"2": 1e15}, r"expected numbers by bits \['8', '4'\], got \['2'\]"),
        ({"8": "fast"}, "8: expected a finite number, got 'fast'"),
        (1e15, "expected an object, got 1000"),
        ({"8": -1.0}, "expected FLOP/s > 0 by bits under 16, got"),
    ],
)
def test_bad_peaks_of_a_device(tmp_path, peaks, message):
    content = {"like": "h100", "peak_flops_by_bits": peaks}
    with pytest.raises(ValueError, match=f"peak_flops_by_bits: {message}"):
        get_hardware(write(tmp_path / "bad.json", content))


@pytest.mark.parametrize(
    "content", [{"hbm_bytes_s": 1e12}, {"like": "h100", "flops": 1.0}, {"like": 3}]
)
def test_bad_devices(tmp_path, content):
    with pytest.raises(ValueError, match="hardware: .*expected 'like', a preset, and"):
        get_hardware(write(tmp_path / "bad.json", content))


def test_a_device_whose_number_is_a_text(tmp_path):
    path = write(tmp_path / "bad.json", {"like": "h100", "memory_bytes": "141 GB"})
    message = "bad.json: memory_bytes: expected a finite number, got '141 GB'"
    with pytest.raises(ValueError, match=message):
        get_hardware(path)
