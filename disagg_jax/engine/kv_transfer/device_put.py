"""Moving a request's KV from one mesh to another without passing through the host.

`jax.device_put` between shardings whose shards differ fetches the array to the host. So
the source mesh cuts the KV into pieces such that every destination shard is made of
whole pieces; each piece goes from its device to its destination device, and the
destination joins them while it writes them into its blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

Slots = tuple[int | None, ...]  # kv head in each slot, see `sharding.heads.HeadLayout`


@dataclasses.dataclass(frozen=True)
class PiecePlan:
    """Which piece of which source shard every destination shard is made of."""

    piece_heads: int  # kv head slots in a piece
    pieces_per_source: int  # pieces each source shard is cut into
    sources: tuple[
        tuple[tuple[int, int], ...], ...
    ]  # [dst shard][piece] -> (src, piece)


def piece_plan(src: Slots, src_tp: int, dst: Slots, dst_tp: int) -> PiecePlan:
    """The plan with the largest pieces, for kv slots split over `src_tp` / `dst_tp`.

    A destination slot without a head may receive any head: its queries are zero.
    """
    src_local, dst_local = len(src) // src_tp, len(dst) // dst_tp
    for size in range(math.gcd(src_local, dst_local), 0, -1):
        if src_local % size or dst_local % size:
            continue
        have = [src[i : i + size] for i in range(0, len(src), size)]
        want = [dst[i : i + size] for i in range(0, len(dst), size)]
        found = [_find(piece, have, i) for i, piece in enumerate(want)]
        if None not in found:
            per_src, per_dst = src_local // size, dst_local // size
            flat = [divmod(index, per_src) for index in found if index is not None]
            return PiecePlan(
                size,
                per_src,
                tuple(
                    tuple(flat[i : i + per_dst]) for i in range(0, len(flat), per_dst)
                ),
            )
    raise ValueError(f"kv heads {dst} cannot be made from {src}")


def _find(piece: Slots, have: Sequence[Slots], index: int) -> int | None:
    """The position in `have` that serves `piece`; repeated heads share the load."""
    matches = [
        i
        for i, other in enumerate(have)
        if all(w is None or w == h for w, h in zip(piece, other, strict=True))
    ]
    return matches[index % len(matches)] if matches else None


def move(
    pieces: Sequence[Sequence[Array]], plan: PiecePlan, target: NamedSharding
) -> list[list[Array]]:
    """Copies pieces, device to device, to the mesh of `target`.

    Args:
      pieces: for each piece of a source shard its arrays, sharded along the last axis
        (the kv heads): the shard on device i is that piece of source shard i.
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
        *rest, width = shards[0].shape
        shape = (*rest, width * len(shards))
        return jax.make_array_from_single_device_arrays(shape, target, shards)

    return [[assemble() for _ in arrays] for _ in range(per_dst)]


def _devices(sharding: Any) -> list[Any]:
    """The devices of a NamedSharding's mesh, in its order."""
    return list(sharding.mesh.devices.flat)
