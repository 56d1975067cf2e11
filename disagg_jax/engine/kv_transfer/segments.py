"""The parts in which a request's KV goes from one placed model to another."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jax import Array

from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.kv_transfer.device_put import move
from disagg_jax.engine.kv_transfer.piece_plan import PiecePlan, piece_plan
from disagg_jax.engine.layer_group import LayerGroup
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.stage import Stage

Pieces = list[list[Array]]


class Segment(NamedTuple):
    """Layers of one source group that are on one destination stage."""

    src: LayerGroup
    dst: Stage
    layers: range
    plan: PiecePlan

    def compile(self, blocks: int) -> None:
        """Compile both ends for transfers of `blocks` blocks."""
        self.src.stage.compile_gather(len(self.layers), blocks, self.plan)
        self.dst.compile_insert(len(self.layers), blocks, self.plan)

    def payload_bytes(self, blocks: int) -> int:
        """Return the bytes that arrive for `blocks` blocks."""
        return self.dst.payload_bytes(len(self.layers), blocks, self.plan)

    def gather(self, cache: Cache, ids: np.ndarray) -> Pieces:
        """Copy the blocks `ids` out of the source's cache."""
        return self.src.stage.gather(cache[self._part], ids, self.plan)

    def move(self, pieces: Pieces) -> Pieces:
        """Copy gathered pieces to the destination's devices."""
        return move(pieces, self.plan, self.dst.payload_sharding)

    def insert(self, cache: Cache, ids: np.ndarray, pieces: Pieces) -> Array:
        """Write moved pieces to the blocks `ids` of the destination's cache.

        Returns:
          An array that is ready when the KV has landed.
        """
        cache[self._part], landed = self.dst.insert(
            cache[self._part], ids, pieces, self.plan
        )
        return landed

    @property
    def _part(self) -> slice:
        return slice(self.layers.start, self.layers.stop)


def find_segments(src: PlacedModel, dst: PlacedModel) -> list[Segment]:
    """Return all pairs of a group and a stage that share layers, by layer."""
    plan = piece_plan(src.layout.kv, src.tp, dst.layout.kv, dst.tp)
    found: list[Segment] = []
    for group, stage in itertools.product(src.groups, dst.stages):
        a, b = group.layers, stage.layers
        layers = range(max(a.start, b.start), min(a.stop, b.stop))
        if layers:
            found.append(Segment(group, stage, layers, plan))
    return found
