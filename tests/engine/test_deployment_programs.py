"""Programs made from shapes alone, for devices that are here and that are not."""

import dataclasses
import math

import jax
import pytest
from jax.experimental import topologies

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.deployment_programs import DeploymentPrograms
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.programs import Buckets, StepShape
from models.config import get_config
from tests.engine.harness import (
    BUCKETS,
    FAMILIES,
    MODELS,
    POOL,
    assert_reference,
    make_config,
    mixed_requests,
    serve_virtual,
)

CONFIG = MODELS["divided"]
DEEP = make_config("deep", layers=4)


def make_programs(deployment: str, config=CONFIG, devices=None, **options):
    parsed = Deployment.parse(deployment)
    pools = [POOL] * len(parsed.instances)
    return DeploymentPrograms(
        config, parsed, devices or jax.devices(), pools, **options
    )


def buckets_of(programs: DeploymentPrograms) -> list[Buckets]:
    return [
        BUCKETS
        if spec.role is Role.COLOCATED
        else dataclasses.replace(BUCKETS, decode_rows=(), pool_blocks=())
        if spec.role is Role.PREFILL
        else dataclasses.replace(BUCKETS, prefill=())
        for spec in programs.deployment.instances
    ]


def listed(programs: DeploymentPrograms, **options) -> list[tuple[int, str]]:
    found = programs.programs(buckets_of(programs), **options)
    return [(program.instance, program.name) for program in found]


# -- what is listed -------------------------------------------------------------------


def test_every_program_of_both_sides_is_listed():
    programs = make_programs("prefill:tp2,decode:tp1pp2", DEEP, layer_groups=2)
    each = ["/layers_0-0", "/layers_1-1", "/layers_2-2", "/layers_3-3"]
    # A source of one stage and two groups; a destination of two stages of two groups.
    assert listed(programs, sampled=False) == [
        *((0, f"prefill_T64_R4/layers_{part}") for part in ("0-1", "2-3")),
        *((1, f"decode_B4_P16{part}") for part in each),
        *((0, "gather_16/layers_0-1"), (1, "insert_16/layers_0-1")),
        (1, "insert_16/layers_2-3"),  # the gather of as many layers is the same
    ]
    sampled = set(listed(programs)) - set(listed(programs, sampled=False))
    assert sampled == {(0, "draw_R4"), (1, "draw_R4")}


def test_a_program_says_what_it_is():
    programs = make_programs("prefill:tp1,decode:tp1")
    found = programs.programs(buckets_of(programs))
    kinds = {program.kind: program for program in found}
    assert list(kinds) == ["prefill", "draw", "decode", "gather", "insert"]
    assert kinds["decode"].size == StepShape.decode(4, 16)
    assert (kinds["draw"].size, kinds["insert"].size) == (4, 16)
    assert kinds["decode"].layers == kinds["gather"].layers == range(CONFIG.layers)


def test_programs_that_instances_share_are_listed_once():
    apart = make_programs("2xprefill:tp1,decode:tp1")
    assert {instance for instance, _ in listed(apart)} == {0, 1, 2}
    assert apart.models[0] is not apart.models[1]
    together = make_programs("2xprefill:tp1,decode:tp1", share_devices=True)
    assert {instance for instance, _ in listed(together)} == {0, 2}
    assert together.models[0] is together.models[1]


def test_too_few_devices_are_an_error_with_the_number_needed():
    with pytest.raises(ValueError, match=r"needs 8\+4 = 12 devices, got 8 cpu"):
        make_programs("prefill:tp8,decode:tp4")


def test_shapes_are_listed_for_each_instance():
    with pytest.raises(ValueError, match="buckets: .* each of the 2 instances, got 1"):
        make_programs("prefill:tp1,decode:tp1").programs([BUCKETS])


# -- without weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, deployment",
    [("padded", "prefill:tp2,decode:tp1"), ("opt", "prefill:tp1pp2,decode:tp4")],
)
def test_programs_of_shapes_alone_serve_real_weights(world, name, deployment):
    """Compiled with no array in sight; then weights come, and nothing is compiled."""
    config = (MODELS | FAMILIES)[name]
    world.params(config)
    arrays = len(jax.live_arrays())
    programs = make_programs(deployment, config)
    buckets = buckets_of(programs)
    for program in programs.programs(buckets, sampled=False):
        program.compile()
    assert len(jax.live_arrays()) == arrays
    models = {
        key: PlacedModel(model, world.params(config))
        for key, model in zip(programs.keys, programs.models, strict=True)
    }
    parsed, pools = programs.deployment, [POOL, POOL]
    engine = Engine(config, {}, parsed, jax.devices(), pools, buckets, models=models)
    said = []
    engine.compile(sampled=False, progress=said.append)
    assert said == []
    assert_reference(
        world, config, serve_virtual(engine, mixed_requests(world, config))
    )


def test_a_decode_step_compiles_for_tpus_that_are_not_here(monkeypatch):
    """From the devices of a topology, which hold nothing and run nothing."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # asks a cloud what the machine is
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    config = get_config("tiny")
    pool = KVMemory(num_blocks=16, block_tokens=16, max_context=64)
    programs = DeploymentPrograms(
        config, Deployment.parse("colocated:tp2"), topology.devices, [pool]
    )
    decode = dataclasses.replace(BUCKETS, prefill=(), transfer_blocks=())
    (program,) = programs.programs([decode], sampled=False)
    memory = program.compile().memory_analysis()
    (stage,), (group,) = programs.models[0].stages, programs.models[0].groups
    cache = stage.cache_spec(config.layers)
    assert memory.argument_size_in_bytes > shard_bytes([group.specs, cache])
    assert memory.alias_size_in_bytes >= shard_bytes(cache)  # worked on in place


def shard_bytes(specs) -> int:
    """The bytes of arrays on one of their devices."""
    return sum(
        math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize
        for spec in jax.tree.leaves(specs)
    )
