"""Layer groups: consecutive layers of a model, each group a program of its own.

All programs are lowered and compiled ahead of time for listed shapes; serving only
looks programs up, so it cannot compile.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.stages import Compiled

from disagg_jax.engine import sampling
from disagg_jax.engine.attention.kernel import AttentionKernel
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.attention.packing import Fields
from disagg_jax.engine.attention.step import step_attend
from disagg_jax.engine.program_table import Program, Programs, program_name
from disagg_jax.engine.stage import Stage
from disagg_jax.programs import StepShape
from models import transformer
from models.config import ModelConfig

# A group's weights. Programs take a flat list: flattening nested dicts took 8 us of
# every step.
FlatWeights: TypeAlias = list[Array]


class LayerGroup:
    """The programs of consecutive layers on the mesh of a stage. It holds no weights.

    Args:
      stage: the stage that the group is part of.
      layers: indices of the model's layers; the group with layer 0 embeds, and the one
        with the last layer unembeds.
      specs: the layers' weights as `jax.ShapeDtypeStruct`s on the stage's mesh, see
        `place_weights.weight_specs`.

    Attributes:
      ends_stage: whether the next group, if any, is on another mesh.
      programs: the steps of the group's layers, and draws.
    """

    def __init__(self, stage: Stage, layers: range, specs: transformer.Params):
        self.stage, self.layers, self.specs = stage, layers, specs
        self.is_first = layers.start == 0
        self.is_last = layers.stop == stage.config.layers
        self.ends_stage = layers.stop == stage.layers.stop
        self.programs = Programs()

    def program(self, shape: StepShape) -> Compiled:
        """Return the group's part of the step of `shape`; see `step`.

        Raises:
          ValueError: if it was not compiled.
        """
        return self.programs[shape]

    def step_program(self, shape: StepShape) -> Program:
        """Return the group's part of the step of `shape`, to be compiled."""
        return Program(
            kind=shape.kind,
            size=shape,
            layers=self.layers,
            name=program_name(str(shape), self.layers, self.stage.config.layers),
            table=self.programs,
            key=shape,
            build=functools.partial(self._compile_step, shape),
        )

    def step(
        self,
        shape: StepShape,
        weights: FlatWeights,
        cache: Cache,
        packed: np.ndarray | Array,
        *x_TE: Array,
    ) -> tuple[Cache, Any]:
        """Run the group's part of one step.

        Args:
          weights: the group's weights, placed as in `specs`.
          cache: the cache of the group's layers; donated.
          x_TE: the residual stream before these layers, for all but the first group.

        Returns:
          The cache, and `[T, E]` the residual stream after the layers; from the last
          group `[rows] int32` likeliest next tokens and `[rows, V]` logits, see
          `Stage.logits`.

        Raises:
          ValueError: if the step of `shape` was not compiled.
        """
        return self.program(shape)(weights, cache, packed, *x_TE)

    def draw_program(self, rows: int) -> Program:
        """Return the draw for steps of `rows` rows, to be compiled."""
        return Program(
            kind="draw",
            size=rows,
            layers=range(0),
            name=f"draw_R{rows}",
            table=self.programs,
            key=("draw", rows),
            build=functools.partial(self._compile_draw, rows),
        )

    def draw(self, logits: Array, packed: np.ndarray) -> Array:
        """Return next tokens by each row's sampling parameters; see `sampling.draw`.

        The draw is a program of its own, so that greedy steps pay nothing for it.
        """
        program = self.programs["draw", logits.shape[0]]
        return program(logits, self.stage.put(packed))

    def _compile_draw(self, rows: int) -> Compiled:
        vocab = self.stage.config.vocab_size
        logits = jax.ShapeDtypeStruct(
            (rows, vocab), jnp.float32, sharding=self.stage.logits
        )
        packed = self.stage.spec((sampling.PARAMETERS, rows), jnp.int32)
        return jax.jit(sampling.draw).lower(logits, packed).compile()

    def _compile_step(self, shape: StepShape) -> Compiled:
        stage, config = self.stage, self.stage.config
        weights, tree = jax.tree.flatten(self.specs)
        fields = stage.kernel.fields(shape, stage.memory.block_tokens)
        packed = stage.spec((fields.size,), jnp.int32)
        x_spec = stage.spec((shape.tokens, config.embed), config.dtype)
        x = [] if self.is_first else [x_spec]
        run_group = functools.partial(
            _run_group,
            config,
            fields,
            shape,
            is_last=self.is_last,
            kernel=stage.kernel,
            kv_sharding=stage.kv_sharding,
        )

        def run(weights: FlatWeights, *inputs: Any) -> tuple[Cache, Any]:
            return run_group(jax.tree.unflatten(tree, weights), *inputs)

        shardings = [weight.sharding for weight in weights]
        step_inputs = (stage.replicated,) * (1 + len(x))
        out = (stage.replicated, stage.logits) if self.is_last else stage.replicated
        program = jax.jit(
            run,
            donate_argnums=1,
            in_shardings=(shardings, stage.kv_sharding, *step_inputs),
            out_shardings=(stage.kv_sharding, out),
        )
        cache = stage.cache_spec(len(self.layers))
        return program.lower(weights, cache, packed, *x).compile()


def _run_group(
    config: ModelConfig,
    fields: Fields,
    shape: StepShape,
    params: transformer.Params,
    cache: Cache,
    packed: Array,
    *x_TE: Array,
    is_last: bool,
    kernel: AttentionKernel,
    kv_sharding: NamedSharding,
) -> tuple[Cache, Any]:
    """Run one layer group of a step; without an `x_TE` embed the tokens first.

    Returns:
      The cache, and `[T, E]` the residual stream; if it is last, tokens and logits.
    """
    inputs = fields.split(packed)
    position = inputs["position"]
    x = x_TE[0] if x_TE else transformer.embed(params, inputs["token"], position)
    attend = step_attend(shape, inputs, kernel, kv_sharding)
    x, cache = transformer.run_layers(
        config, params["layers"], x, position, attend, cache
    )
    if not is_last:
        return cache, x
    if "last" in inputs:
        x = x[inputs["last"]]
    logits_RV = transformer.unembed(config, params, x)
    return cache, (sampling.greedy(logits_RV), logits_RV)
