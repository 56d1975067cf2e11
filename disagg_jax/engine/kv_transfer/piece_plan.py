"""How KV is cut into pieces that go from the shards of one mesh to those of another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Slots = tuple[int | None, ...]  # kv head in each slot, see `sharding.heads.HeadLayout`


@dataclasses.dataclass(frozen=True)
class PiecePlan:
    """The pieces of source shards that make up every destination shard."""

    piece_heads: int  # kv head slots in a piece
    pieces_per_source: int  # pieces each source shard is cut into
    sources: tuple[
        tuple[tuple[int, int], ...], ...
    ]  # [dst shard][piece] -> (src, piece)


def piece_plan(src: Slots, src_tp: int, dst: Slots, dst_tp: int) -> PiecePlan:
    """Return the plan with the largest pieces, for kv slots split over meshes.

    A destination slot without a head may receive any head: its queries are zero.

    Args:
      src: the kv heads of the source mesh, split over `src_tp` devices.
      dst: the kv heads of the destination mesh, split over `dst_tp` devices.
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
    """Return an index of `have` that serves `piece`; repeated heads share the load."""
    matches = [
        i
        for i, other in enumerate(have)
        if all(w is None or w == h for w, h in zip(piece, other, strict=True))
    ]
    return matches[index % len(matches)] if matches else None
