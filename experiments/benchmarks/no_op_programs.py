"""Host time of an engine's step, measured with programs that compute nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled

from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.layer_group import FlatWeights, LayerGroup
from disagg_jax.programs import StepShape
from disagg_jax.programs.slices import full_slices
from disagg_jax.work import Step
from experiments.benchmarks.timing import Figure


class NoOpGroup(LayerGroup):
    """A layer group whose programs compute nothing, and that times its own calls.

    Inputs, donated caches and outputs are those of the real programs.
    """

    real: LayerGroup
    step_start_s = step_end_s = 0.0

    @classmethod
    def replace(cls, engine: Engine, shapes: Iterable[StepShape]) -> NoOpGroup:
        """Put no-op programs in the place of the only layer group of the only instance.

        Args:
          shapes: of the steps to come; their real programs must be compiled.
        """
        (instance,) = engine.instances
        groups = instance.programs.groups
        (real,) = groups
        group = cls(real.stage, real.layers, real.specs)
        group.real, groups[0] = real, group
        for shape in shapes:
            group.step_program(shape).compile()
        return group

    def step(
        self,
        shape: StepShape,
        weights: FlatWeights,
        cache: Cache,
        packed: np.ndarray | Array,
        *x_TE: Array,
    ) -> tuple[Cache, Any]:
        self.step_start_s = time.perf_counter()
        out = super().step(shape, weights, cache, packed, *x_TE)
        self.step_end_s = time.perf_counter()
        return out

    def _compile_step(self, shape: StepShape) -> Compiled:
        real = self.real.program(shape)
        args, _ = real.args_info
        _, out = real.out_info

        def no_op(params: Any, cache: Cache, packed: Array) -> Any:
            del params, packed
            return cache, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

        # keep_unused: jax would drop the weights, and the cost of passing them.
        program = jax.jit(no_op, donate_argnums=1, keep_unused=True)
        return program.lower(*args).compile()


def host_step_us(
    engine: Engine, group: NoOpGroup, shape: StepShape, steps: int
) -> dict[str, float]:
    """Return the median microseconds of the whole step and of its parts."""
    step = Step.of(0, 0, full_slices(shape, group.stage.memory))
    samples: dict[str, list[float]] = {}
    warm_up = 20
    with engine.serving():
        for i in range(warm_up + steps):
            start_s = time.perf_counter()
            for _ in engine.start(step):
                pass  # no need to wait: reading the tokens back does
            end_s = time.perf_counter()
            spans_s = {
                "step": end_s - start_s,
                "- pack": group.step_start_s - start_s,
                "- put, dispatch": group.step_end_s - group.step_start_s,
                "- readback": end_s - group.step_end_s,
            }
            for name, span_s in spans_s.items():
                if i >= warm_up:
                    samples.setdefault(name, []).append(span_s * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def host_figure(rows: int, name: str, micros: float) -> Figure:
    """Return a part of the host time of a decode step; only the whole has an aim."""
    return Figure(
        part="host",
        name=f"B{rows} {name}",
        measured=micros,
        bound=100.0 + rows,
        unit="us",
        bound_name="100 us + 1 us per token",
        better="less",
        aim=1.0 if name == "step" else None,
    )
