"""The weights of a model on the meshes of an instance: their shapes, placing them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from disagg_jax.errors import require
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


def weight_specs(
    config: ModelConfig,
    layout: HeadLayout,
    places: Sequence[LayerPlacement],
    rules: Rules,
) -> list[transformer.Params]:
    """Return the weights of each group of layers as they lie on its mesh, as
    `jax.ShapeDtypeStruct`s with shardings: heads are those of `layout`.

    The first group has the embedding and the last the unembedding, which in a tied
    model is the embedding again.

    Args:
      places: all layers in order.

    Raises:
      ValueError: if a dimension does not divide over its mesh axis.
    """
    slots = _slots(layout)
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)

    def spec(
        mesh: Mesh, leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]
    ) -> jax.ShapeDtypeStruct:
        sizes = zip(leaf.shape, axes, strict=True)
        shape = tuple(len(slots.get(axis, range(size))) for size, axis in sizes)
        check_divisible(shape, axes, mesh, rules)
        sharding = named_sharding(mesh, axes, rules)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return [
        jax.tree.map(
            functools.partial(spec, mesh),
            transformer.part(shapes, layers),
            transformer.part(axes, layers),
        )
        for layers, mesh in places
    ]


def place_groups(
    config: ModelConfig,
    weights: Weights,
    layout: HeadLayout,
    layers: Sequence[range],
    specs: Sequence[transformer.Params],
) -> list[transformer.Params]:
    """Return the weights of each group of layers, placed as `specs` say.

    A tied embedding is one array where the first and the last group are on one mesh.

    Args:
      layers: of each group, in order.
      specs: of each group, by `weight_specs` for the same `layout`.

    Raises:
      ValueError: if a weight has another shape or dtype than the model's.
    """
    slots, axes = _slots(layout), transformer.param_axes(config)
    # By the weight, of which a tied one is in two groups, and its place.
    placed: dict[tuple[int, Sharding], Array] = {}
    if isinstance(weights, Checkpoint):
        weights = weights.restore(restore_shardings(config, layout, specs))

    def place(
        path: tuple[Any, ...],
        spec: jax.ShapeDtypeStruct,
        weight: Array,
        axes: tuple[str, ...],
    ) -> Array:
        key = id(weight), spec.sharding
        if key in placed:
            return placed[key]
        for name in slots.keys() & set(axes):
            weight = take_heads(weight, slots[name], axes.index(name))
        expected, got = (f"{x.dtype}{list(x.shape)}" for x in (spec, weight))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        require(got == expected, f"weight {name}: expected {expected}", got)
        return placed.setdefault(key, jax.device_put(weight, spec.sharding))

    return [
        jax.tree_util.tree_map_with_path(
            place,
            group,
            transformer.part(weights, part),
            transformer.part(axes, part),
        )
        for part, group in zip(layers, specs, strict=True)
    ]


def restore_shardings(
    config: ModelConfig, layout: HeadLayout, specs: Sequence[transformer.Params]
) -> transformer.Params:
    """Return the sharding that each weight is restored to.

    It is the weight's place, of a tied one the first, but for heads that must first be
    repeated or padded: they do not divide over the mesh. Such a weight is split along
    another dimension until then, so that no device holds all of it.

    Args:
      specs: the groups of `weight_specs`, for the same `layout`.
    """
    slots = _slots(layout)

    def sharding(
        leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...], spec: jax.ShapeDtypeStruct
    ) -> NamedSharding:
        placed = spec.sharding
        for i, axis in enumerate(axes):
            if axis in slots and not _are_all(slots[axis], leaf.shape[i]):
                return _split_elsewhere(leaf.shape, i, placed)
        return placed

    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    return jax.tree.map(sharding, shapes, axes, join_groups(specs))


def join_groups(groups: Sequence[transformer.Params]) -> transformer.Params:
    """Return consecutive groups as one tree; a tied embedding is that of the first."""
    ends = {name: part for group in reversed(groups) for name, part in group.items()}
    return {**ends, "layers": [layer for group in groups for layer in group["layers"]]}


def _slots(layout: HeadLayout) -> dict[str, Slots]:
    """Return the slots of each logical axis that `layout` lays out anew."""
    return {"heads": layout.q, "kv_heads": layout.kv}


def _split_elsewhere(
    shape: Sequence[int], heads: int, placed: NamedSharding
) -> NamedSharding:
    """Split along the first dimension but `heads` that divides; whole if none does."""
    mesh, mesh_axis = placed.mesh, placed.spec[heads]
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
