"""The KV blocks that requests of a step attend to."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

UNSEEN = 2**30  # `start` of a decode's padding: beyond the position of every row


class Entries(NamedTuple):
    """Blocks that rows attend to: a row's one after the other, in one list.

    No row is padded to the longest, and two rows may have the same block. Owners rise
    from one entry to the next. Those of decodes begin with row 0 and rise by 0 or 1, so
    that rows without entries are the last ones; padding belongs to the last owner. The
    letter P stands for entries.
    """

    block_P: Array  # in the pool
    owner_P: Array  # row that attends to it
    start_P: Array  # position of its first token
