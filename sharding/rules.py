"""The mesh axis of each logical axis: one table of rules for each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import TENSOR

Rules = Mapping[str, str | None]  # logical axis -> mesh axis; None is replicated

# Megatron's split: heads and the MLP's width over the devices, activations replicated.
_MEGATRON: Rules = {
    "embed": None,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "blocks": None,  # of the KV pool
    "length": None,
}
# Tables by role, because the phases need not be sharded alike.
RULES: Mapping[str, Rules] = dict.fromkeys(
    ("prefill", "decode", "colocated"), _MEGATRON
)


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Return the mesh axes of an array whose dimensions have the logical `axes`.

    Raises:
      ValueError: if an axis has no rule, or two dimensions claim one mesh axis.
    """
    mesh_axes: list[str | None] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"no rule for logical axis '{axis}'; have {sorted(rules)}")
        mesh_axis = None if axis is None else rules[axis]
        if mesh_axis is not None and mesh_axis in mesh_axes:
            raise ValueError(f"{tuple(axes)}: two axes map to mesh axis '{mesh_axis}'")
        mesh_axes.append(mesh_axis)
    return PartitionSpec(*mesh_axes)


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], rules: Rules
) -> NamedSharding:
    """Return the sharding on `mesh` of an array with logical `axes`."""
    return NamedSharding(mesh, partition_spec(axes, rules))


def check_divisible(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules
) -> None:
    """Raise a ValueError if a dimension does not divide over its mesh axis."""
    spec = partition_spec(axes, rules)
    for size, axis, mesh_axis in zip(shape, axes, spec, strict=True):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            fitting = [str(n) for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                f"logical axis '{axis}' of size {size} cannot be sharded over "
                f"{mesh.shape[mesh_axis]} devices; {', '.join(fitting)} would fit"
            )
