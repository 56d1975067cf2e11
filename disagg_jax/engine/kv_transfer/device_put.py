"""Moving a request's KV from one mesh to another without passing through the host.

`jax.device_put` between shardings whose shards differ fetches the array to the host. So
the source mesh cuts the KV into pieces such that every destination shard is made of
whole pieces. Each piece goes from its device to its destination device, and the
destination joins the pieces while it writes them into its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

from disagg_jax.engine.kv_transfer.piece_plan import PiecePlan


def move(
    pieces: Sequence[Sequence[Array]], plan: PiecePlan, target: NamedSharding
) -> list[list[Array]]:
    """Copy pieces, device to device, to the mesh of `target`.

    Args:
      pieces: for each piece of a source shard its arrays, sharded along axis 1 (the kv
        heads): the shard on device i is that piece of source shard i.
      target: the same sharding on the destination mesh.

    Returns:
      For each piece of a destination shard its arrays, sharded by `target`.
    """
    src_devices, dst_devices = _devices(pieces[0][0].sharding), _devices(target)
    shards = [
        [{s.device: s.data for s in array.addressable_shards} for array in piece]
        for piece in pieces
    ]
    per_dst, arrays = len(plan.sources[0]), range(len(pieces[0]))
    # [piece of a destination shard][array][destination device], flat for one call.
    parts = [
        shards[sources[i][1]][array][src_devices[sources[i][0]]]
        for i in range(per_dst)
        for array in arrays
        for sources in plan.sources
    ]
    moved = iter(jax.device_put(parts, dst_devices * (per_dst * len(arrays))))

    def assemble() -> Array:
        shards = [next(moved) for _ in dst_devices]
        blocks, width, *rest = shards[0].shape
        shape = (blocks, width * len(shards), *rest)
        return jax.make_array_from_single_device_arrays(shape, target, shards)

    return [[assemble() for _ in arrays] for _ in range(per_dst)]


def _devices(sharding: Any) -> list[Any]:
    """Return the devices of a NamedSharding's mesh, in its order."""
    return list(sharding.mesh.devices.flat)
