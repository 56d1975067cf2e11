"""Logical axes to mesh axes: everything has a rule, and mistakes are named."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from disagg_jax.deployment import Role
from disagg_jax.engine.attention import kv_cache
from models import transformer
from models.config import PRESETS
from sharding.mesh import TENSOR, cut_meshes, make_mesh
from sharding.rules import RULES, check_divisible, named_sharding, partition_spec


def test_every_role_has_a_table():
    assert set(RULES) == {role.value for role in Role}


@pytest.mark.parametrize("role", RULES)
def test_every_logical_axis_has_a_rule(role):
    """Of weights of dense presets, tied or not, and of KV at rest and on its way."""
    rules = RULES[role]
    arrays = [kv_cache.AXES]
    for config in PRESETS.values():
        if not config.is_dense:
            continue
        axes = transformer.param_axes(config)
        arrays += jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert len(arrays) > 4 * 9
    for axes in arrays:
        partition_spec(axes, rules)
    unused = set(rules) - set(itertools.chain.from_iterable(arrays))
    assert not unused, "a rule for an axis that no array has"


def test_an_axis_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no rule for logical axis 'expert'.*'embed'"):
        partition_spec(("embed", "expert"), RULES["prefill"])


def test_two_axes_on_one_mesh_axis_are_named():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\): .* mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), RULES["prefill"])


def test_specs_by_example():
    rules = RULES["decode"]
    assert partition_spec(("embed", "heads", "head_dim"), rules) == PartitionSpec(
        None, TENSOR, None
    )
    assert partition_spec((None, "embed", "embed"), rules) == PartitionSpec(
        None, None, None
    )
    assert partition_spec((), rules) == PartitionSpec()


def test_a_dimension_must_divide_over_its_mesh_axis():
    mesh = make_mesh(jax.devices()[:4])
    check_divisible((7, 8), ("embed", "mlp"), mesh, RULES["prefill"])
    message = "'mlp' of size 6 cannot be sharded over 4 devices; 1, 2, 3, 6 would"
    with pytest.raises(ValueError, match=message):
        check_divisible((7, 6), ("embed", "mlp"), mesh, RULES["prefill"])


def test_a_sharding_puts_each_part_on_its_device():
    """w[E, F_tensor]: device i has columns i of 4."""
    mesh = make_mesh(jax.devices()[:4])
    weight = np.arange(24).reshape(3, 8)
    sharding = named_sharding(mesh, ("embed", "mlp"), RULES["prefill"])
    shards = jax.device_put(weight, sharding).addressable_shards
    assert [shard.device for shard in shards] == jax.devices()[:4]
    for i, shard in enumerate(shards):
        np.testing.assert_array_equal(shard.data, weight[:, 2 * i : 2 * i + 2])


def test_meshes_are_cut_in_order_and_disjoint():
    devices = jax.devices()
    meshes = cut_meshes(devices, [2, 1, 4])
    cut = [list(mesh.devices.flat) for mesh in meshes]
    assert cut == [devices[:2], devices[2:3], devices[3:7]]
    assert all(mesh.axis_names == (TENSOR,) for mesh in meshes)


def test_too_few_devices_are_counted():
    message = r"needs 4\+4\+1 = 9 devices, got 8 cpu devices"
    with pytest.raises(ValueError, match=message):
        cut_meshes(jax.devices(), [4, 4, 1])
    with pytest.raises(ValueError, match="needs 1 = 1 devices, got 0 usable devices"):
        cut_meshes([], [1])
