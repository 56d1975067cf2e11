"""One copy of the weights on the devices of an instance, with the programs of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.layer_group import FlatWeights, LayerGroup
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.place_weights import place_groups
from disagg_jax.programs.shapes import StepShape
from models.checkpoint import Weights


class PlacedModel:
    """The programs of a model and one copy of its weights, on the programs' meshes.

    It holds no requests and no cache: several pools may use it.

    Attributes:
      params: the weights of each layer group.
      on_host: whether the model's arrays are in the host's memory already.

    Raises:
      ValueError: if `weights` are not those of the programs' model.
    """

    def __init__(self, programs: ModelPrograms, weights: Weights):
        self.programs = programs
        self.on_host: bool = programs.device.platform == "cpu"
        self.params = place_groups(
            programs.config,
            weights,
            programs.layout,
            [group.layers for group in programs.groups],
            [group.specs for group in programs.groups],
        )
        self._weights: list[FlatWeights] = [jax.tree.leaves(p) for p in self.params]

    def forward(
        self, shape: StepShape, cache: Cache, packed: np.ndarray | Array
    ) -> Iterator[tuple[LayerGroup, Any]]:
        """Dispatch one step, a layer group each time the iterator is advanced.

        The cache of the group's layers is donated, and replaced in the list by the
        updated one.

        Yields:
          A group and its output, see `LayerGroup.step`.

        Raises:
          ValueError: if the step of `shape` was not compiled.
        """
        x: tuple[Array, ...] = ()
        for group, weights in zip(self.programs.groups, self._weights, strict=True):
            if x and group.layers.start == group.stage.layers.start:
                x = (group.stage.put(*x),)
            part = slice(group.layers.start, group.layers.stop)
            cache[part], out = group.step(shape, weights, cache[part], packed, *x)
            x = (out,)
            yield group, out

    def step(
        self, shape: StepShape, cache: Cache, packed: np.ndarray | Array
    ) -> tuple[Array, Array]:
        """Dispatch all of `forward`.

        Returns:
          `[rows] int32` likeliest next tokens, and `[rows, V]` logits.

        Raises:
          ValueError: if the step of `shape` was not compiled.
        """
        *_, (_, out) = self.forward(shape, cache, packed)
        return out
