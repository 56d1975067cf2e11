"""What a row says of its model, its engine and its server."""

import dataclasses

import pytest

from disagg_jax.deployment import Role
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.engines import engine_names, engine_of, get_engine
from experiments.measured.described import model_of, simulation_of
from experiments.measured.engines import STARTS
from tests.experiments.measured.measurements import fields, read_one

# Bytes of a weight: a float32 scale for 128 x 128 of 8 bits, an 8-bit scale for 16 or
# for 32 of 4 bits, a 16-bit scale for 32 of 4 bits.
BLOCK_FP8, NVFP4, MXFP4, INT4 = 1 + 4 / 2**14, 9 / 16, 17 / 32, 9 / 16


def stored(folder, path, gemm="", experts="", engine="vllm", precision="fp8"):
    row = fields(
        model_path=path,
        gemm_quant_mode=gemm,
        moe_quant_mode=experts,
        backend=engine,
        precision=precision,
    )
    return model_of(read_one(folder, row)).stored


@pytest.mark.parametrize(
    "path, gemm, experts, weight, bits, expert_weight, expert_bits",
    [
        ("llama-3.1-70b", "", "", 2, 16, 2, 16),
        ("llama-3.1-70b", "fp8", "fp8", 1, 8, 1, 8),
        ("llama-3.1-70b", "nvfp4", "nvfp4", NVFP4, 4, NVFP4, 4),
        # All of these are published with scales by blocks, whatever the column says.
        ("qwen3-32b", "fp8", "fp8", BLOCK_FP8, 8, BLOCK_FP8, 8),
        ("deepseek-r1", "fp8_block", "fp8_block", BLOCK_FP8, 8, BLOCK_FP8, 8),
        ("minimax-m2.5", "fp8", "fp8_block", BLOCK_FP8, 8, BLOCK_FP8, 8),
        # All but the experts stay at 16 bits.
        ("deepseek-r1", "nvfp4", "nvfp4", 2, 16, NVFP4, 4),
        ("kimi-k2.5", "int4_wo", "int4_wo", 2, 16, INT4, 16),
        # Nothing of it does.
        ("minimax-m2.5", "nvfp4", "nvfp4", NVFP4, 4, NVFP4, 4),
        # It is published in one precision, and rows name several.
        ("gpt-oss-120b", "nvfp4", "nvfp4", 2, 16, MXFP4, 4),
        ("gpt-oss-120b", "", "", 2, 16, MXFP4, 4),
    ],
)
def test_precision_of_the_weights(
    tmp_path, path, gemm, experts, weight, bits, expert_weight, expert_bits
):
    widths = stored(tmp_path, path, gemm, experts)
    assert (widths.weight, widths.matmul_bits) == (weight, bits)
    assert (widths.experts, widths.expert_matmul_bits) == (expert_weight, expert_bits)
    assert widths.block_scaled == (weight == BLOCK_FP8)
    assert (widths.table, widths.activation) == (2, 2)


@pytest.mark.parametrize(
    "engine, precision, kv",
    [
        ("vllm", "bf16", 2),
        ("vllm", "fp8", 1),
        ("trtllm", "fp8", 1),
        ("sglang", "fp4", 1),
        ("sglang", "bf16", 2),
    ],
)
def test_precision_of_the_kv(tmp_path, engine, precision, kv):
    given = {"engine": engine, "precision": precision}
    assert stored(tmp_path, "llama-3.1-70b", **given).kv == kv


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="experts: expected one of .*'mxfp4'.*, got"):
        stored(tmp_path, "llama-3.1-70b", experts="fp3")


def simulated(folder, profile=None, **changes):
    row = read_one(folder, fields(**changes))
    profile = profile or engine_of(row.engine, row.version)
    return row, simulation_of(row, row.loop, profile)


@pytest.mark.parametrize(
    "engine, policy",
    [("sglang", PrefillFirst), ("trtllm", NoEvict), ("vllm", RunningFirst)],
)
def test_a_server_is_started_for_its_clients(tmp_path, engine, policy):
    row, simulation = simulated(tmp_path, backend=engine, concurrency=300)
    built = simulation.build(row.loop.deployment).policies[Role.COLOCATED]
    assert built == policy(max_batched_tokens=8192, max_seqs=300)


def test_each_replica_has_a_budget_and_room_for_its_share_of_clients(tmp_path):
    replicas = {"tp_size": 1, "attention_dp_size": 4, "moe_ep_size": 4}
    model = {"model_path": "gpt-oss-20b", "concurrency": 30, "batch_size": 8}
    row, simulation = simulated(tmp_path, **replicas, **model)
    assert row.loop.deployment == "colocated:tp1dp4ep4"
    built = simulation.build(row.loop.deployment).policies[Role.COLOCATED]
    assert built.max_batched_tokens == 4 * 8192
    assert built.max_seqs >= 30


def test_more_clients_than_tokens_of_a_step(tmp_path):
    # Decodes alone could exceed the step, which policies refuse.
    small = dataclasses.replace(get_engine("ideal"), token_budget=64, max_seqs=64)
    row, simulation = simulated(tmp_path, small, concurrency=100)
    built = simulation.build(row.loop.deployment).policies[Role.COLOCATED]
    assert (built.max_batched_tokens, built.max_seqs) == (64, 64)


def test_a_row_is_simulated_on_its_devices_at_its_lengths(tmp_path):
    _, simulation = simulated(tmp_path, isl=256, osl=32, system="h200_sxm")
    assert simulation.cost.name == "roofline/h200/vllm"
    assert simulation.max_context == 288
    assert (simulation.inside, simulation.between) == ("nvlink-h100", "400gb")
    assert simulation.node_devices == 8
    _, rack = simulated(tmp_path, isl=256, osl=32, system="gb200")
    assert (rack.inside, rack.node_devices) == ("nvlink5", 72)


def test_profiles_have_the_limits_that_fits_start_with():
    fitted = [get_engine(name) for name in engine_names()]
    fitted = [profile for profile in fitted if profile.engine != "ideal"]
    assert {profile.engine for profile in fitted} == set(STARTS)
    for profile in fitted:
        start = STARTS[profile.engine]
        assert start.is_default and start.errors == ()
        for field in ("system", "token_budget", "max_seqs", "memory_utilisation"):
            assert getattr(profile, field) == getattr(start, field)
