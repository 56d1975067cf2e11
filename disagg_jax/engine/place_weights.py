"""One set of weights on the meshes of an instance."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import transformer
from models.checkpoint import Checkpoint, Weights
from models.config import ModelConfig
from sharding.heads import HeadLayout
from sharding.rules import Rules, check_divisible, named_sharding

Slots: TypeAlias = Sequence[int | None]  # the model's head in each; None is a zero head


class LayerPlacement(NamedTuple):
    """Consecutive layers, and the mesh they go to."""

    layers: range
    mesh: Mesh


def place_groups(
    config: ModelConfig,
    weights: Weights,
    layout: HeadLayout,
    places: Sequence[LayerPlacement],
    rules: Rules,
) -> list[transformer.Params]:
    """Return the weights of each group of layers on its mesh, heads as in `layout`.

    The first group has the embedding and the last the unembedding, which are one array
    in a tied model.

    Args:
      places: all layers in order.

    Raises:
      ValueError: if a dimension does not divide over its mesh axis.
    """
    slots = {"heads": layout.q, "kv_heads": layout.kv}
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    meshes = _meshes(shapes, places)

    def check(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...], mesh: Mesh) -> None:
        sizes = zip(leaf.shape, axes, strict=True)
        shape = [len(slots.get(axis, range(size))) for size, axis in sizes]
        check_divisible(shape, axes, mesh, rules)

    jax.tree.map(check, shapes, axes, meshes)
    if isinstance(weights, Checkpoint):
        weights = weights.restore(restore_shardings(config, slots, meshes, rules))

    def place(mesh: Mesh, weight: Array, axes: tuple[str, ...]) -> Array:
        for name in slots.keys() & set(axes):
            weight = take_heads(weight, slots[name], axes.index(name))
        return jax.device_put(weight, named_sharding(mesh, axes, rules))

    return [
        jax.tree.map(
            functools.partial(place, mesh),
            transformer.part(weights, layers),
            transformer.part(axes, layers),
        )
        for layers, mesh in places
    ]


def _meshes(
    shapes: transformer.Params, places: Sequence[LayerPlacement]
) -> transformer.Params:
    """Return the mesh of every weight, for a tied one the first, as `Params`."""
    first, last = places[0].mesh, places[-1].mesh
    by_name = {"embed": first, "positions": first, "final_norm": last, "unembed": last}
    layers = [mesh for part, mesh in places for _ in part]
    prefix = {name: by_name.get(name, layers) for name in shapes}
    return jax.tree.broadcast(prefix, shapes)


def restore_shardings(
    config: ModelConfig,
    slots: Mapping[str, Slots],
    meshes: transformer.Params,
    rules: Rules,
) -> transformer.Params:
    """Return the sharding that each weight is restored to.

    It is the weight's place, but for heads that must first be repeated or padded: they
    do not divide over the mesh. Such a weight is split along another dimension until
    then, so that no device holds all of it.

    Args:
      meshes: the mesh of every weight, in the form of `Params`.
    """

    def sharding(
        leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...], mesh: Mesh
    ) -> NamedSharding:
        for i, axis in enumerate(axes):
            if axis in slots and not _are_all(slots[axis], leaf.shape[i]):
                return _split_elsewhere(leaf.shape, i, mesh, rules[axis])
        return named_sharding(mesh, axes, rules)

    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    return jax.tree.map(sharding, shapes, axes, meshes)


def _split_elsewhere(
    shape: Sequence[int], heads: int, mesh: Mesh, mesh_axis: str | None
) -> NamedSharding:
    """Split along the first dimension but `heads` that divides; whole if none does."""
    spec: list[str | None] = [None] * len(shape)
    for i, size in enumerate(shape):
        if mesh_axis and i != heads and size % mesh.shape[mesh_axis] == 0:
            spec[i] = mesh_axis
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def _are_all(slots: Slots, heads: int) -> bool:
    """Return whether the slots are the heads as they are."""
    return list(slots) == list(range(heads))


def take_heads(weight: Array, slots: Slots, axis: int) -> Array:
    """Return `weight` with each slot's head along `axis`, zeros where there is none."""
    if _are_all(slots, weight.shape[axis]):
        return weight
    heads = jnp.array([0 if head is None else head for head in slots])
    real = jnp.array([head is not None for head in slots])
    real = real.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    taken = jnp.take(weight, heads, axis=axis)
    return jnp.where(real, taken, jnp.zeros((), weight.dtype))
