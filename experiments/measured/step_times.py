"""Where the time of a simulated row's steps goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from disagg_jax.deployment import Deployment
from disagg_jax.sim import SimulatedDeployment
from disagg_jax.sim.cost.interface import DeploymentCost
from disagg_jax.work import Event, Step, StepLoad, Work
from experiments.measured.rows import Loop, MeasuredRow
from experiments.measured.served import serve
from experiments.report.table import Row, numbers, underlined

# (instance, load of a step) -> the seconds of each term of its time.
Terms = Callable[[int, StepLoad], Mapping[str, float]]


class StepLoads:
    """An observer that keeps the instance and the load of each step.

    The run must be without spans, so that each iteration is a step.
    """

    def __init__(self) -> None:
        self.steps = list[tuple[int, StepLoad]]()

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        self.steps += [(w.instance, w.load) for w in works if isinstance(w, Step)]


def time_by_kind(cost: DeploymentCost) -> Terms:
    """Return terms of any cost model: the whole step, by its kind of work."""

    def terms(instance: int, load: StepLoad) -> Mapping[str, float]:
        kind = "mixed" if load.decodes else "prompts"
        seconds = sum(cost.stages_s(instance, load))
        return {kind if load.chunks else "decodes": seconds}

    return terms


def time_by_term(
    steps: Sequence[tuple[int, StepLoad]], terms: Terms
) -> dict[int, dict[str, float]]:
    """Return the seconds of each term in all steps, by instance."""
    found: dict[int, dict[str, float]] = {}
    for instance, load in steps:
        of = found.setdefault(instance, {})
        for name, seconds in terms(instance, load).items():
            of[name] = of.get(name, 0.0) + seconds
    return {instance: found[instance] for instance in sorted(found)}


def describe_steps(simulated: SimulatedDeployment, row: MeasuredRow, loop: Loop) -> str:
    """Simulate a row without spans; return a table of its steps."""
    counter = StepLoads()
    iterated = dataclasses.replace(simulated, spans=False)
    serve(iterated, row, loop, observer=counter)
    seconds = time_by_term(counter.steps, time_by_kind(simulated.cost))
    return "\n".join(_table(counter.steps, seconds, simulated.deployment))


def _table(
    steps: Sequence[tuple[int, StepLoad]],
    seconds: Mapping[int, Mapping[str, float]],
    deployment: Deployment,
) -> list[str]:
    """Return a line for each instance: the share of each term, and mean loads."""
    names = sorted({name for of in seconds.values() for name in of})
    head = ("instance", "steps", "ms a step", *(f"{name}, %" for name in names))
    rows: list[Row] = [(*head, "prompt tokens", "decodes", "context")]
    for instance, of in seconds.items():
        loads = [load for i, load in steps if i == instance]
        count, total = len(loads), sum(of.values())
        sums = (
            sum(load.prompt_tokens for load in loads),
            sum(load.decodes for load in loads),
            sum(load.context for load in loads),
        )
        rows.append(
            (
                f"{instance}: {deployment.instances[instance]}",
                str(count),
                f"{1e3 * total / count:.2f}",
                *(f"{100 * of.get(name, 0.0) / total:.1f}" for name in names),
                *(f"{each / count:.1f}" for each in sums),
            )
        )
    return underlined(numbers(rows))
