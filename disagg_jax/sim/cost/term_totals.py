"""What the time of a simulated run consists of, by the terms of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from disagg_jax.sim.cost.roofline import RooflineInstance
from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.work import Event, Step, StepLoad, TruncateSpan, Work

Chunks: TypeAlias = tuple[tuple[int, int], ...]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class TermTotals:
    """An `Observer` that sums what an engine's factors multiply, by instance.

    Attributes:
      instances: the costs of the instances, in the deployment's order.
    """

    def __init__(self, instances: Sequence[RooflineInstance]):
        self.instances = instances
        self._steps: dict[int, tuple[Step, int]] = {}  # id -> step, its iterations

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        for work in works:
            if isinstance(work, Step):
                self._steps[work.id] = work, work.iterations
            elif isinstance(work, TruncateSpan):
                step, _ = self._steps[work.work]
                self._steps[work.work] = step, work.iterations

    def of(self, instance: int) -> Array:
        """Return the total of each factor's term on one instance, all its stages.

        The terms are in the order of the fields of `EngineFactors`. The last, steps,
        counts stages: each has the engine's seconds of a step.
        """
        # Terms grow linearly with the context, so steps that differ in it alone count
        # together: (chunks, decodes) -> [steps, tokens of context of all].
        alike: dict[tuple[Chunks, int], list[int]] = {}
        for step, iterations in self._steps.values():
            if step.instance == instance:
                load = step.load
                sums = alike.setdefault((load.chunks, load.decodes), [0, 0])
                grown = load.decodes * (iterations * (iterations - 1) // 2)
                sums[0] += iterations
                sums[1] += iterations * load.context + grown
        total = np.zeros(len(dataclasses.fields(EngineFactors)))
        for (chunks, decodes), (steps, context) in alike.items():
            below, rest = divmod(context, steps)
            for each, count in ((below, steps - rest), (below + 1, rest)):
                if count:
                    load = StepLoad(chunks, decodes, each)
                    for terms in self.instances[instance].terms(load):
                        total += count * np.array((*terms, 1.0))
        return total

    def steps(self, instance: int) -> int:
        """Return the number of steps of one instance, each iteration of a span."""
        return sum(n for step, n in self._steps.values() if step.instance == instance)

    def seconds(self, instance: int) -> Mapping[str, float]:
        """Return the seconds of each factor on one instance: its steps' time."""
        factors = self.instances[instance].factors
        names = [field.name for field in dataclasses.fields(factors)]
        totals = zip(names, self.of(instance).tolist(), strict=True)
        return {name: getattr(factors, name) * total for name, total in totals}
