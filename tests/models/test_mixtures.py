"""Presets that are not dense: published totals, and the files that they are from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from models.blocks import Block, DenseMLP, ExpertMLP
from models.config import PRESETS, ModelConfig, Widths, get_config
from models.lookup import find_model
from models.model_config import of_blocks
from models.quantization import at_precision


@pytest.mark.parametrize(
    "name, billions, active",
    [
        # What the models are published with.
        ("deepseek-v3", 671, 37),
        ("kimi-k2.5", 1000, 32),
        ("qwen3-235b-a22b", 235, 22),
        ("gpt-oss-120b", 117, 5.1),
        ("gpt-oss-20b", 21, 3.6),
        ("mixtral-8x7b", 46.7, 12.9),
        ("minimax-m2.5", 230, 10),
        ("qwen3.5-397b-a17b", 397, 17),
    ],
)
def test_totals_are_the_published_ones(
    name: str, billions: float, active: float
) -> None:
    model = get_config(name)
    # Rounded; and some count the embedding as active, we do not.
    assert model.num_params / 1e9 == pytest.approx(billions, rel=0.03)
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.05)


def test_the_model_card_of_gpt_oss_counts_as_we_do() -> None:
    """Active there: the experts of a token and the unembedding, not the embedding.

    gpt-oss-120b & gpt-oss-20b Model Card (arXiv 2508.10925), Table 1, as below.
    """
    for name, total, active in (("20b", 20.91, 3.61), ("120b", 116.83, 5.13)):
        model = get_config(f"gpt-oss-{name}")
        assert model.num_params / 1e9 == pytest.approx(total, abs=0.05)
        assert model.active_params / 1e9 == pytest.approx(active, abs=0.01)


def test_weights_of_deepseek_v3_by_hand() -> None:
    attention, expert, router = 187_105_280, 3 * 7168 * 2048, 7168 * 256
    dense, tables, norms = 3 * 7168 * 18_432, 129_280 * 7168, 7168
    layers = 61 * (attention + 2 * norms) + 3 * dense + 58 * (257 * expert + router)
    model = get_config("deepseek-v3")
    assert model.num_params == layers + 2 * tables + norms
    matrices = 61 * attention + 3 * dense + 58 * (9 * expert + router)
    assert model.active_params == matrices + tables


@pytest.mark.parametrize(
    "name, values",
    [
        ("deepseek-v3", 61 * 576),
        ("kimi-k2.5", 61 * 576),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128),
        ("gpt-oss-120b", 36 * 2 * 8 * 64),
        ("mixtral-8x7b", 32 * 2 * 8 * 128),
        ("minimax-m2.5", 62 * 2 * 8 * 128),
        ("qwen3.5-397b-a17b", 15 * 2 * 2 * 256),  # 45 layers keep no token
    ],
)
def test_kv_of_a_token(name: str, values: int) -> None:
    model = get_config(name)
    assert model.kv_bytes_per_token == 2 * values
    assert at_precision(model, kv="fp8").kv_bytes_per_token == values


def test_state_of_a_sequence() -> None:
    def states(name: str) -> list[tuple[int, int]]:
        blocks = get_config(name).blocks
        return [(b.count, b.attention.state_values) for b in blocks]

    assert states("qwen3.5-397b-a17b") == [(45, 1_085_440), (15, 0)]
    assert [values for _, values in states("deepseek-v3")] == [0, 0]


def test_half_of_gpt_oss_has_a_window() -> None:
    blocks = get_config("gpt-oss-120b").blocks
    assert [(b.count, b.attention.window) for b in blocks] == [(18, 128), (18, None)]


def test_bytes_of_gpt_oss_are_those_of_its_model_card() -> None:
    for name, gibibytes in (("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)):
        weights = get_config(name).weight_bytes / 2**30
        assert weights == pytest.approx(gibibytes, abs=0.15)


FILES = {
    "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama--Meta-Llama-3.1-70B",
    "qwen3-8b": "Qwen--Qwen3-8B",
    "qwen3-32b": "Qwen--Qwen3-32B",
    "qwen3-235b-a22b": "Qwen--Qwen3-235B-A22B",
    "gpt-oss-20b": "openai--gpt-oss-20b",
    "gpt-oss-120b": "openai--gpt-oss-120b",
    "mixtral-8x7b": "mistralai--Mixtral-8x7B-v0.1",
    "deepseek-v3": "deepseek-ai--DeepSeek-V3",
    "deepseek-r1": "deepseek-ai--DeepSeek-R1",
    "kimi-k2.5": "moonshotai--Kimi-K2.5",
    "minimax-m2.5": "MiniMaxAI--MiniMax-M2.5",
    "qwen3.5-397b-a17b": "Qwen--Qwen3.5-397B-A17B",
}


def file_of(shared_dir: Path, name: str) -> str:
    path = shared_dir / "data" / "models" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no config.json of the model: {path} is missing")
    return str(path)


def costs(model: ModelConfig) -> object:
    """All that a cost model sees of it."""
    stored = model.stored
    bits = (stored.matmul_bits, stored.expert_matmul_bits)
    widths = (stored.weight, stored.experts, stored.table, stored.kv, stored.activation)
    tables = (model.table_params, model.tie_embeddings)
    return (model.blocks, widths, bits, tables)


@pytest.mark.parametrize("name", FILES)
def test_presets_are_their_files(shared_dir: Path, name: str) -> None:
    read = find_model(file_of(shared_dir, FILES[name]))
    assert costs(read) == costs(find_model(name))
    assert read.is_dense == PRESETS[name].is_dense


def test_another_precision_of_a_file(shared_dir: Path) -> None:
    fp8 = find_model(file_of(shared_dir, "Qwen--Qwen3-235B-A22B-FP8"))
    bf16 = find_model("qwen3-235b-a22b")
    want = at_precision(bf16, gemm="fp8_block", experts="fp8_block")
    assert costs(fp8) == costs(want)


def test_sparse_attention_is_refused_by_name(shared_dir: Path) -> None:
    path = file_of(shared_dir, "zai-org--GLM-5")
    with pytest.raises(ValueError, match="index_topk=2048: sparse attention is not"):
        find_model(path)


# -- ModelConfig by its blocks --------------------------------------------------------

MIXTRAL = get_config("mixtral-8x7b")


def test_blocks_of_a_dense_model_are_its_fields() -> None:
    model = get_config("opt-13b")
    (block,) = model.blocks
    assert isinstance(block.mlp, DenseMLP)
    assert (block.count, block.mlp.matrices, block.mlp.width) == (40, 2, 20_480)
    assert block.dense_params == block.active_params == block.params
    assert model.is_dense and not MIXTRAL.is_dense
    described = of_blocks("opt-13b", model.blocks, vocab_size=50_272, max_length=2048)
    assert described.blocks == model.blocks
    assert described.kv_bytes_per_token == model.kv_bytes_per_token


def test_fields_of_a_model_that_is_not_dense() -> None:
    """Of its first attention to a cache, and of its first MLP; a latent is one head."""

    def fields(name: str) -> tuple[int, ...]:
        model = get_config(name)
        heads = (model.q_heads, model.kv_heads, model.head_dim)
        return (model.layers, model.embed, *heads, model.mlp)

    assert fields("deepseek-v3") == (61, 7168, 128, 1, 576, 18_432)
    assert fields("qwen3.5-397b-a17b") == (60, 4096, 32, 2, 256, 1024)


def test_active_weights_of_a_dense_model_are_all_but_the_embedding() -> None:
    model = get_config("llama-3-8b")
    assert model.active_params == 32 * model.blocks[0].params + model.table_params


def test_experts_may_be_narrower_than_the_rest() -> None:
    (block,) = MIXTRAL.blocks
    assert isinstance(block.mlp, ExpertMLP)
    widths = Widths(weight=2, table=2, kv=2, activation=2, expert_weight=0.5)
    narrow = dataclasses.replace(MIXTRAL, widths=widths)
    routed = 32 * 8 * 3 * 4096 * 14_336
    assert MIXTRAL.weight_bytes - narrow.weight_bytes == 1.5 * routed
    same = Widths(weight=2, table=2, kv=2, activation=2)
    assert (widths.experts, same.experts) == (0.5, 2)


@pytest.mark.parametrize(
    "name, gemm, experts, precision",
    [
        ("tiny", None, None, "float32"),
        ("llama-3-8b", None, None, "bf16"),
        ("llama-3-8b", "fp8", None, "fp8"),
        ("llama-3-8b", "fp8_block", None, "fp8"),  # a little over one byte
        ("llama-3-8b", "nvfp4", None, "fp4"),
        ("llama-3-8b", "mxfp4", None, "fp4"),
        ("llama-3-8b", "int4_wo", None, "int4"),
        ("llama-3-8b", "bf16", "nvfp4", "bf16"),  # it has no experts
        # Of a mixture most weights are the experts'.
        ("mixtral-8x7b", None, None, "bf16"),
        ("mixtral-8x7b", "bf16", "nvfp4", "fp4"),
        ("mixtral-8x7b", "fp8", "int4_wo", "int4"),
        ("mixtral-8x7b", "fp8", "fp8_block", "fp8"),
        ("gpt-oss-120b", None, None, "fp4"),
        ("deepseek-r1", None, None, "fp8"),
        ("kimi-k2.5", None, None, "int4"),
    ],
)
def test_precision_of_most_weights(
    name: str, gemm: str | None, experts: str | None, precision: str
) -> None:
    model = at_precision(get_config(name), gemm=gemm, experts=experts)
    assert model.precision == precision


def test_impossible_structures_are_refused() -> None:
    (block,) = MIXTRAL.blocks
    linear = get_config("qwen3.5-397b-a17b").blocks[0]
    with pytest.raises(ValueError, match="structure: expected 32 layers, got 31"):
        one_less = dataclasses.replace(block, count=31)
        dataclasses.replace(MIXTRAL, structure=(one_less,))
    with pytest.raises(ValueError, match="structure: expected embed=4096, got .*7168"):
        other = dataclasses.replace(get_config("deepseek-v3").blocks[0], count=1)
        both = (dataclasses.replace(block, count=31), other)
        dataclasses.replace(MIXTRAL, structure=both)
    with pytest.raises(ValueError, match="m: expected a block with keys and values"):
        of_blocks("m", [linear], vocab_size=8, max_length=8)


def test_figures_do_not_depend_on_how_blocks_are_grouped() -> None:
    (block,) = MIXTRAL.blocks
    parts = [dataclasses.replace(block, count=n) for n in (12, 20)]
    cut = dataclasses.replace(MIXTRAL, structure=tuple(parts))
    for field in ("num_params", "active_params", "weight_bytes", "kv_bytes_per_token"):
        assert getattr(cut, field) == getattr(MIXTRAL, field)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"matmul_bits": 12}, "matmul_bits: expected 16, 8 or 4, got 12"),
        ({"expert_matmul_bits": 0}, "expert_matmul_bits: expected 16, 8 or 4, got 0"),
        ({"expert_weight": 0}, "expert_weight: expected > 0 bytes, got 0"),
    ],
)
def test_impossible_widths_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Widths(**{"weight": 2, "table": 2, "kv": 2, "activation": 2, **change})


# -- precisions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size_bytes, bits",
    [
        ("bf16", 2, 16),
        ("fp8", 1, 8),
        ("fp8_block", 1 + 4 / 16_384, 8),  # a float32 for 128 x 128 weights
        ("nvfp4", 0.5 + 1 / 16, 4),  # a byte for 16 weights
        ("mxfp4", 0.5 + 1 / 32, 4),
        ("int4_wo", 0.5 + 2 / 32, 16),
    ],
)
def test_precisions(name: str, size_bytes: float, bits: int) -> None:
    dense = at_precision(get_config("qwen3-32b"), gemm=name)
    assert (dense.stored.weight, dense.stored.matmul_bits) == (size_bytes, bits)
    assert (dense.stored.table, dense.stored.kv, dense.stored.activation) == (2, 2, 2)
    mixed = at_precision(MIXTRAL, experts=name).stored
    assert (mixed.experts, mixed.expert_matmul_bits) == (size_bytes, bits)
    assert (mixed.weight, mixed.matmul_bits) == (2, 16)


def test_a_precision_that_is_not_given_stays() -> None:
    model = get_config("gpt-oss-120b")
    assert costs(at_precision(model)) == costs(model)
    fp8 = at_precision(model, gemm="fp8").stored
    assert (fp8.weight, fp8.experts, fp8.kv) == (1, 0.53125, 2)
    bf16 = at_precision(model, experts="bf16", kv="fp8").stored
    assert (bf16.experts, bf16.kv) == (2, 1)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"gemm": "fp6"}, "gemm: expected one of .*'fp8_block'.*, got 'fp6'"),
        ({"experts": ""}, "experts: expected one of .*, got ''"),
        ({"kv": "fp4"}, "kv: expected bf16 or fp8, got 'fp4'"),
    ],
)
def test_unknown_precisions_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at_precision(MIXTRAL, **given)


def test_blocks_are_counted_alike_whoever_lists_them() -> None:
    """No preset has two equal kinds of blocks, which a reader would take for unlike."""
    for model in PRESETS.values():
        kinds = [(block.attention, block.mlp) for block in model.blocks]
        assert len(kinds) == len({*kinds})
        assert all(isinstance(block, Block) for block in model.blocks)
