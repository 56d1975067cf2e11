"""The layout of attention heads that divides over a tensor-parallel mesh.

There may be more stored heads ("slots") than the model has. The layout names the
model's head in each slot. Moving KV between two unequal meshes needs the same names.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Slot -> the model's head; None is a zero head and adds exactly nothing."""

    kv: tuple[int | None, ...]
    q: tuple[int | None, ...]  # equally many for each kv slot, in the order of kv


def head_layout(q_heads: int, kv_heads: int, tp: int) -> HeadLayout:
    """Return the layout for `tp` devices, with equally many slots on each.

    If tp does not divide the kv heads, they are repeated where this divides the queries
    of each evenly (no device is idle), and else padded with zero heads.
    """
    group = q_heads // kv_heads
    if kv_heads % tp == 0:
        return HeadLayout(tuple(range(kv_heads)), tuple(range(q_heads)))
    copies = tp // kv_heads
    if tp % kv_heads == 0 and group % copies == 0:
        kv = tuple(head for head in range(kv_heads) for _ in range(copies))
        return HeadLayout(kv, tuple(range(q_heads)))
    padding = -kv_heads % tp
    return HeadLayout(
        tuple(range(kv_heads)) + (None,) * padding,
        tuple(range(q_heads)) + (None,) * (padding * group),
    )
