"""One checkpoint, restored into the sharding of each instance."""

import math

import jax
import numpy as np
import pytest

from disagg_jax.engine.place_weights import (
    LayerPlacement,
    place_groups,
    restore_shardings,
    weight_specs,
)
from models import checkpoint, transformer
from models.checkpoint import Checkpoint
from sharding.heads import head_layout
from sharding.mesh import abstract_mesh, make_mesh
from sharding.rules import RULES
from tests.engine.harness import (
    FAMILIES,
    MODELS,
    World,
    assert_reference,
    mixed_requests,
    serve_virtual,
)

CONFIGS = MODELS | FAMILIES
RULE_TABLE = RULES["decode"]


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: checkpoint.save(folder / name, config, world.params(config))
        for name, config in CONFIGS.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_device_gets_its_shards(world, checkpoints, name):
    """As if the weights had been in memory, in values and in places."""
    config = CONFIGS[name]
    mesh = make_mesh(jax.devices()[4:8])
    layout = head_layout(config.q_heads, config.kv_heads, 4)
    places = [LayerPlacement(range(config.layers), mesh)]
    specs = weight_specs(config, layout, places, RULE_TABLE)
    placed, restored = (
        place_groups(config, weights, layout, [range(config.layers)], specs)
        for weights in (world.params(config), checkpoints[name])
    )

    def same(a: jax.Array, b: jax.Array) -> None:
        assert a.sharding == b.sharding
        assert {shard.device for shard in b.addressable_shards} == {*mesh.devices.flat}
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, placed, restored)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_device_holds_the_whole_while_restoring(name):
    """A weight with heads or width is in parts, repeated and padded heads included."""
    config = CONFIGS[name]
    layout = head_layout(config.q_heads, config.kv_heads, 4)
    places = [LayerPlacement(range(config.layers), abstract_mesh(4))]
    specs = weight_specs(config, layout, places, RULE_TABLE)
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    shardings = restore_shardings(config, layout, specs)

    def check(leaf, axes, sharding):
        part = math.prod(sharding.shard_shape(leaf.shape))
        split = {"heads", "kv_heads", "mlp", "vocab"} & set(axes)
        assert part * (4 if split else 1) == leaf.size, axes

    jax.tree.map(check, shapes, axes, shardings)


@pytest.mark.parametrize(
    "deployment", ["prefill:tp2,decode:tp4", "prefill:tp2pp2,decode:tp1pp2"]
)
def test_restored_instances_generate_the_same_tokens(world, checkpoints, deployment):
    """Nothing is in memory: each mesh restores its layers' shards from disk."""
    config = FAMILIES["opt"]
    fresh = World({config: checkpoints["opt"]})
    engine = fresh.engine(deployment, config)
    timelines = serve_virtual(engine, mixed_requests(world, config))
    assert_reference(world, config, timelines)
