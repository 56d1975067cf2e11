"""Moving a request's KV from one mesh to another without passing through the host.

`jax.device_put` between shardings whose shards differ fetches the array to the host. So
the source mesh cuts the KV into pieces such that every destination shard is made of
whole pieces; each piece goes from its device to its destination device, and the
destination joins them while it writes them into its blocks.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding

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
    pieces: Sequence[Array], plan: PiecePlan, target: NamedSharding, head_axis: int
) -> list[Array]:
    """Copies pieces, device to device, to the mesh of `target`.

    Args:
      pieces: one array for each piece of a source shard, sharded along `head_axis`; its
        shard on device i is that piece of source shard i.
      target: the same sharding on the destination mesh.

    Returns:
      One array for each piece of a destination shard, sharded by `target`.
    """
    source = typing.cast(NamedSharding, pieces[0].sharding)
    src_devices = list(typing.cast(Mesh, source.mesh).devices.flat)
    dst_devices = list(typing.cast(Mesh, target.mesh).devices.flat)
    shards = [{s.device: s.data for s in piece.addressable_shards} for piece in pieces]
    parts, devices = [], []
    for device, sources in zip(dst_devices, plan.sources, strict=True):
        for src, piece in sources:
            parts.append(shards[piece][src_devices[src]])
            devices.append(device)
    moved = jax.device_put(parts, devices)
    per_dst = len(plan.sources[0])
    shape = list(pieces[0].shape)
    shape[head_axis] = plan.piece_heads * len(dst_devices)
    return [
        jax.make_array_from_single_device_arrays(
            tuple(shape), target, moved[piece::per_dst]
        )
        for piece in range(per_dst)
    ]
