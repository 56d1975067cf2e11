"""How the KV of a request goes from the stages of one model to those of another."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jax import Array

from disagg_jax.engine.attention import pool_order
from disagg_jax.engine.kv_transfer.device_put import PiecePlan, move, piece_plan
from disagg_jax.engine.layer_group import LayerGroup
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.stage import Stage

Pieces = list[list[Array]]


class Segment(NamedTuple):
    """Layers of one group of the source that are on one stage of the destination."""

    src: LayerGroup
    dst: Stage
    layers: range
    plan: PiecePlan

    def compile(self, blocks: int) -> None:
        """Compiles both ends for transfers of `blocks` blocks."""
        self.src.stage.compile_gather(len(self.layers), blocks, self.plan)
        self.dst.compile_insert(len(self.layers), blocks, self.plan)

    def payload_bytes(self, blocks: int) -> int:
        """What arrives of `blocks` blocks."""
        return self.dst.payload_bytes(len(self.layers), blocks, self.plan)

    def gather(self, cache: pool_order.Cache, ids: np.ndarray) -> Pieces:
        """Copies the blocks `ids` out of the source's cache."""
        return self.src.stage.gather(cache[self._part], ids, self.plan)

    def move(self, pieces: Pieces) -> Pieces:
        """Copies what was gathered to the destination's devices."""
        return move(pieces, self.plan, self.dst.payload_sharding)

    def insert(self, cache: pool_order.Cache, ids: np.ndarray, pieces: Pieces) -> Array:
        """Writes what was moved to the blocks `ids` of the destination's cache.

        Returns:
          What is ready when it is there.
        """
        cache[self._part], landed = self.dst.insert(
            cache[self._part], ids, pieces, self.plan
        )
        return landed

    @property
    def _part(self) -> slice:
        return slice(self.layers.start, self.layers.stop)


def find_segments(src: PlacedModel, dst: PlacedModel) -> list[Segment]:
    """All pairs of a group and a stage that share layers, in the order of layers."""
    plan = piece_plan(src.layout.kv, src.tp, dst.layout.kv, dst.tp)
    found: list[Segment] = []
    for group, stage in itertools.product(src.groups, dst.stages):
        a, b = group.layers, stage.layers
        layers = range(max(a.start, b.start), min(a.stop, b.stop))
        if layers:
            found.append(Segment(group, stage, layers, plan))
    return found
