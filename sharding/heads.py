"""How attention heads are laid out so that they divide over a tensor-parallel mesh.

The stored heads ("slots") may be more than the model's. The layout names the model's
head in each slot, which is also what moving KV between two unequal meshes needs to
know.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Slot -> the model's head; None is a zero head, which adds exactly nothing."""

    kv: tuple[int | None, ...]
    q: tuple[int | None, ...]  # equally many query slots for each kv slot, in its order


def head_layout(q_heads: int, kv_heads: int, tp: int) -> HeadLayout:
    """The layout for `tp` devices; every device gets equally many slots.

    Where tp does not divide the kv heads, they are repeated if that divides the queries
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
