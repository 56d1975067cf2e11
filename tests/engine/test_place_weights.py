"""One checkpoint, restored into the sharding of each instance."""

import math

import jax
import numpy as np
import pytest

from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.place_weights import (
    LayerPlacement,
    place_groups,
    restore_shardings,
    weight_specs,
)
from disagg_jax.engine.placed_model import PlacedModel
from models import checkpoint, transformer
from models.checkpoint import Checkpoint
from sharding.heads import head_layout
from sharding.mesh import cut_meshes, make_mesh
from sharding.rules import RULES
from tests.engine.harness import (
    FAMILIES,
    MODELS,
    POOL,
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


# Heads of the model, and where tensor parallelism pads or repeats them.
HEADS = {
    ("divided", 2): (8, 4),
    ("repeated", 2): (4, 2),
    ("repeated", 4): (4, 4),
    ("padded", 2): (8, 4),
    ("padded", 4): (8, 4),
    ("opt", 4): (8, 8),  # tied
}


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("name, tp", HEADS)
def test_weights_are_placed_as_their_specs_say(world, name, tp, pp):
    """With heads of `HEADS` in the attention's weights, and each group's own ends."""
    config = CONFIGS[name]
    programs = make_programs(config, tp, pp)
    placed = PlacedModel(programs, world.params(config)).params

    def same(spec: jax.ShapeDtypeStruct, array: jax.Array) -> None:
        assert (spec.shape, spec.dtype) == (array.shape, array.dtype)
        assert spec.sharding == array.sharding

    for group, params in zip(programs.groups, placed, strict=True):
        jax.tree.map(same, group.specs, params)
        for layer in params["layers"]:
            attention, H = layer["attention"], config.head_dim
            q_heads, kv_heads = HEADS[name, tp]
            assert attention["wq"].shape == (config.embed, q_heads, H)
            assert attention["wv"].shape == (config.embed, kv_heads, H)
            assert attention["wo"].shape == (q_heads, H, config.embed)
    last = "embed" if config.tie_embeddings else "unembed"
    assert "embed" in placed[0] and {last, "final_norm"} <= placed[-1].keys()


def make_programs(config, tp: int, pp: int, layer_groups: int = 1) -> ModelPrograms:
    meshes = cut_meshes(jax.devices(), [tp] * pp)
    return ModelPrograms(
        config, meshes, RULE_TABLE, POOL, XlaAttention("cpu"), layer_groups
    )


def test_a_tied_embedding_is_there_once(world):
    """Where the first and the last group are on one mesh, it is the same array."""
    config = FAMILIES["opt"]
    groups = make_programs(config, tp=2, pp=1, layer_groups=2)
    stages = make_programs(config, tp=2, pp=2)
    for programs, same in ((groups, True), (stages, False)):
        first, last = PlacedModel(programs, world.params(config)).params
        assert (first["embed"] is last["embed"]) == same


@pytest.mark.parametrize(
    "wrong", [np.zeros((32, 64), np.float16), np.zeros((16, 64), np.float32)]
)
def test_weights_of_another_model_are_refused(world, wrong):
    config = CONFIGS["divided"]
    params = world.params(config) | {"unembed": wrong}
    expected = rf"weight unembed: expected float32\[32, 64\], got '{wrong.dtype}"
    with pytest.raises(ValueError, match=expected):
        PlacedModel(make_programs(config, tp=1, pp=1), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_device_holds_the_whole_while_restoring(name):
    """A weight with heads or width is in parts, repeated and padded heads included."""
    config = CONFIGS[name]
    layout = head_layout(config.q_heads, config.kv_heads, 4)
    mesh = make_mesh(jax.devices()[:4])
    places = [LayerPlacement(range(config.layers), mesh)]
    specs = weight_specs(config, layout, places, RULE_TABLE)
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    shardings = restore_shardings(config, layout, specs)

    def check(leaf, axes, sharding):
        part = math.prod(sharding.shard_shape(leaf.shape))
        split = {"heads", "kv_heads", "mlp", "vocab"} & set(axes)
        assert part * (4 if split else 1) == leaf.size, axes

    jax.tree.map(check, shapes, axes, shardings)


@pytest.mark.parametrize(
    "deployment",
    [
        pytest.param("prefill:tp2,decode:tp4", marks=pytest.mark.slow),
        "prefill:tp1pp2,decode:tp2",
    ],
)
def test_restored_instances_generate_the_same_tokens(world, checkpoints, deployment):
    """Nothing is in memory: each mesh restores its layers' shards from disk."""
    config = FAMILIES["opt"]
    fresh = World({config: checkpoints["opt"]})
    engine = fresh.engine(deployment, config)
    timelines = serve_virtual(engine, mixed_requests(world, config))
    assert_reference(world, config, timelines)
