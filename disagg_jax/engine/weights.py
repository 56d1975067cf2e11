"""Placing one set of weights on an instance's mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from models import transformer
from models.config import ModelConfig
from sharding.heads import HeadLayout
from sharding.rules import Rules, check_divisible, named_sharding


def place_params(
    config: ModelConfig,
    params: transformer.Params,
    layout: HeadLayout,
    mesh: Mesh,
    rules: Rules,
) -> transformer.Params:
    """`params` on `mesh`, sharded by `rules`, their heads laid out by `layout`.

    Raises:
      ValueError: if a dimension does not divide over its mesh axis.
    """
    slots = {"heads": layout.q, "kv_heads": layout.kv}

    def place(weight: Array, axes: tuple[str, ...]) -> Array:
        for name in slots.keys() & set(axes):
            weight = take_heads(weight, slots[name], axes.index(name))
        check_divisible(weight.shape, axes, mesh, rules)
        return jax.device_put(weight, named_sharding(mesh, axes, rules))

    return jax.tree.map(place, params, transformer.param_axes(config))


def take_heads(weight: Array, slots: Sequence[int | None], axis: int) -> Array:
    """`weight` with each slot's head along `axis`, zeros where there is none."""
    if list(slots) == list(range(weight.shape[axis])):
        return weight
    heads = jnp.array([0 if head is None else head for head in slots])
    real = jnp.array([head is not None for head in slots])
    real = real.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    taken = jnp.take(weight, heads, axis=axis)
    return jnp.where(real, taken, jnp.zeros((), weight.dtype))
