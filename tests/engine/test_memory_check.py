"""What does not fit in a device's memory is refused, with what would."""

from types import SimpleNamespace
from typing import cast

import jax
import pytest
from jax.stages import Compiled

from disagg_jax.deployment import (
    Deployment,
    InstanceSpec,
    KVMemory,
    Parallelism,
    Role,
)
from disagg_jax.engine import engine as engine_module
from disagg_jax.engine.attention import kv_cache
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.memory_check import (
    check_fits,
    default_memory,
)
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.programs import StepShape
from models.config import get_config
from sharding.mesh import cut_meshes
from sharding.rules import RULES
from tests.engine.harness import BUCKETS, FAMILIES, MODELS, make_config, random_params

RULE_TABLE = RULES["decode"]
BLOCKS = 16


def placed_bytes(config, spec, memory, layer_groups: int) -> int:
    """What the fullest device really holds."""
    programs = make_programs(config, spec, memory, layer_groups)
    arrays = jax.tree.leaves(PlacedModel(programs, random_params(config)).params)
    arrays += jax.tree.leaves(programs.new_cache())
    by_device = dict.fromkeys(jax.devices(), 0)
    for array in {id(array): array for array in arrays}.values():
        for shard in array.addressable_shards:
            by_device[shard.device] += shard.data.nbytes
    return max(by_device.values())


def make_programs(config, spec, memory, layer_groups: int = 1) -> ModelPrograms:
    meshes = cut_meshes(jax.devices(), [spec.parallelism.tp] * spec.parallelism.pp)
    return ModelPrograms(
        config, meshes, RULE_TABLE, memory, XlaAttention("cpu"), layer_groups
    )


@pytest.mark.parametrize(
    "tp, pp, layer_groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)]
)
@pytest.mark.parametrize(
    "config",
    [MODELS["divided"], MODELS["padded"], FAMILIES["opt"]],
    ids=lambda config: config.name,
)
def test_the_limit_is_what_is_really_placed(config, tp, pp, layer_groups):
    """To the byte: a byte less is refused, and one block fewer would fit."""
    spec = InstanceSpec(role=Role.DECODE, parallelism=Parallelism(tp, pp))
    memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    needed = placed_bytes(config, spec, memory, layer_groups)
    programs = make_programs(config, spec, memory, layer_groups)
    check_fits(spec, programs, needed)
    check_fits(spec, programs, None)
    with pytest.raises(ValueError, match=f"{BLOCKS - 1} blocks would fit"):
        check_fits(spec, programs, needed - 1)


@pytest.mark.parametrize("head_dim, stored", [(8, 128), (128, 128), (192, 256)])
def test_heads_that_are_padded_count_as_such(monkeypatch, head_dim, stored):
    config = make_config(f"heads of {head_dim}", head_dim=head_dim, layers=1)
    spec = InstanceSpec(role=Role.DECODE)
    pools = []
    for tiled in (False, True):
        monkeypatch.setattr(kv_cache, "is_tiled", lambda mesh, tiled=tiled: tiled)
        memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
        programs = make_programs(config, spec, memory)
        part, _ = programs.stages[0].cache_spec(1)[0]
        assert part.shape[-1] == (stored if tiled else head_dim)
        needed = placed_bytes(config, spec, memory, 1)
        check_fits(spec, programs, needed)
        with pytest.raises(ValueError, match=f"{BLOCKS - 1} blocks would fit"):
            check_fits(spec, programs, needed - 1)
        pools.append(programs.new_cache()[0][0].nbytes)
    assert pools[1] * head_dim == pools[0] * stored


# -- with compiled programs -----------------------------------------------------------


def test_an_engine_that_cannot_run_its_largest_program_says_so(world, monkeypatch):
    """Weights and pool fit; the programs are compiled, and serve nobody."""
    config, spec = MODELS["divided"], InstanceSpec(role=Role.COLOCATED)
    pool = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    held = placed_bytes(config, spec, pool, 1)
    limit = {"bytes": held}
    monkeypatch.setattr(engine_module, "memory_bytes", lambda device: limit["bytes"])
    params, deployment = world.params(config), Deployment((spec,))
    engine = Engine(config, params, deployment, jax.devices(), [pool], [BUCKETS])
    with pytest.raises(ValueError, match=rf"of {BLOCKS} KV blocks, .* would fit"):
        engine.compile()
    programs = engine.programs.programs([BUCKETS])
    assert all(program.is_compiled for program in programs)
    analyses = [program.compile().memory_analysis() for program in programs]
    temp = max(analysis.temp_size_in_bytes for analysis in analyses)
    assert temp > 0
    limit["bytes"] = held + temp - 1
    with pytest.raises(ValueError, match="blocks would fit"):
        engine.compile()
    # Results and code are no more than these.
    results = max(analysis.output_size_in_bytes for analysis in analyses)
    code = sum(analysis.generated_code_size_in_bytes for analysis in analyses)
    limit["bytes"] = held + temp + results + code
    engine.compile()


def test_donated_arrays_are_no_results():
    """A step gives the pool back; only tokens and logits are new."""
    config, spec = MODELS["divided"], InstanceSpec(role=Role.DECODE)
    memory = KVMemory(num_blocks=4095, block_tokens=4, max_context=64)
    programs = make_programs(config, spec, memory)
    (step,) = programs.step_programs(StepShape.prefill(8, 1))
    analysis = step.compile().memory_analysis()
    pool_bytes = 4096 * 4 * 2 * config.layers * config.kv_heads * config.head_dim * 4
    assert analysis.output_size_in_bytes > pool_bytes
    held = placed_bytes(config, spec, memory, 1)
    check_fits(spec, programs, held + analysis.temp_size_in_bytes + pool_bytes // 2)


def test_a_backend_that_cannot_say_is_taken_at_its_weights_and_pool():
    config, spec = MODELS["divided"], InstanceSpec(role=Role.DECODE)
    memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    programs = make_programs(config, spec, memory)
    silent = SimpleNamespace(memory_analysis=lambda: None)
    programs.stages[0].programs.add("silent", cast(Compiled, silent))
    check_fits(spec, programs, placed_bytes(config, spec, memory, 1))


# -- weights and pools ----------------------------------------------------------------


def test_weights_alone_may_be_too_large():
    config = make_config("large", embed=1024, mlp=8192)
    spec = InstanceSpec(role=Role.DECODE)
    memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    with pytest.raises(ValueError, match="large on 'decode:tp1'.* 0 blocks would fit"):
        check_fits(spec, make_programs(config, spec, memory), 2**20)


def default(model: str, limit_bytes: int | None, *max_context: int, tp: int = 1):
    spec = InstanceSpec(role=Role.DECODE, parallelism=Parallelism(tp))
    config = get_config(model)
    return default_memory(
        config, spec, RULE_TABLE, jax.devices(), limit_bytes, *max_context
    )


@pytest.mark.parametrize(
    ("model", "tp", "max_context", "blocks"),
    [
        ("tiny", 1, 1024, 16 * 16),  # 16 longest requests
        # 512 MiB in blocks of 64 tokens of 46,080 bytes: 182, one of them scratch.
        ("smollm2-135m", 1, 8192, 181),
        # In blocks of 8 MiB, or of 4 MiB on each of two devices.
        ("llama-3-8b", 1, 63 * 64, 63),
        ("llama-3-8b", 2, 127 * 64, 127),
    ],
)
def test_a_host_has_room_for_a_modest_pool(model, tp, max_context, blocks):
    memory = default(model, None, tp=tp)
    assert (memory.max_context, memory.num_blocks) == (max_context, blocks)


def test_a_pool_takes_its_share_of_what_weights_leave():
    """24 GiB, less 14.957 of weights: 0.8 is 925 blocks of 8 MiB, one is scratch."""
    spec, limit_bytes = InstanceSpec(role=Role.DECODE), 24 * 2**30
    memory = default("llama-3-8b", limit_bytes)
    assert memory == KVMemory(num_blocks=924, block_tokens=64, max_context=8192)
    config = get_config("llama-3-8b")
    check_fits(spec, make_programs(config, spec, memory), limit_bytes)


def test_a_context_that_is_asked_for_must_fit():
    assert default("llama-3-8b", None, 4000).max_context == 4000
    with pytest.raises(ValueError, match="max_context: expected at most 4032, .* 5000"):
        default("llama-3-8b", None, 5000)


def test_blocks_are_those_of_the_device_or_as_asked():
    """A TPU's are as long as a dimension of its tiles."""
    kinds = "tpu", "gpu", "cpu"
    assert [XlaAttention(kind).block_tokens for kind in kinds] == [128, 64, 64]
    spec, config = InstanceSpec(role=Role.DECODE), get_config("tiny")
    args = config, spec, RULE_TABLE, jax.devices(), None
    assert default_memory(*args).block_tokens == 64
    asked = default_memory(*args, block_tokens=16)
    assert (asked.block_tokens, asked.num_blocks) == (16, 16 * 64)


def test_where_the_weights_do_not_fit_the_check_says_so():
    config, limit_bytes = get_config("llama-3-8b"), 2**30
    spec, memory = InstanceSpec(role=Role.DECODE), default("llama-3-8b", limit_bytes)
    with pytest.raises(ValueError, match="GiB on a device, got 14.96 of weights"):
        check_fits(spec, make_programs(config, spec, memory), limit_bytes)
