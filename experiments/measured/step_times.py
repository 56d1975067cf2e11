"""Where the time of a simulated row's steps goes."""

from __future__ import annotations

from collections.abc import Mapping

from disagg_jax.deployment import Deployment
from disagg_jax.sim.engines import EngineProfile
from experiments.measured.described import simulation_of
from experiments.measured.rows import Loop, MeasuredRow
from experiments.measured.served import serve, term_totals
from experiments.report.table import Row, numbers, underlined


def describe_steps(row: MeasuredRow, loop: Loop, profile: EngineProfile) -> str:
    """Simulate a row again; return a table of its instances' steps by term."""
    simulation = simulation_of(row, loop, profile)
    simulated = simulation.build(loop.deployment)
    totals = term_totals(simulation, simulated.deployment)
    serve(simulated, row, loop, observer=totals)
    instances = range(len(simulated.deployment.instances))
    seconds = {i: totals.seconds(i) for i in instances}
    steps = {i: totals.steps(i) for i in instances}
    return "\n".join(_table(seconds, steps, simulated.deployment))


def _table(
    seconds: Mapping[int, Mapping[str, float]],
    steps: Mapping[int, int],
    deployment: Deployment,
) -> list[str]:
    """Return a line for each instance: the share of each term that takes any time."""
    names = [n for n in seconds[0] if any(of[n] for of in seconds.values())]
    rows: list[Row] = [
        ("instance", "steps", "ms a step", *(f"{name}, %" for name in names))
    ]
    for i, of in seconds.items():
        total = sum(of.values())
        rows.append(
            (
                f"{i}: {deployment.instances[i]}",
                str(steps[i]),
                f"{1e3 * total / steps[i]:.2f}",
                *(f"{100 * of[name] / total:.1f}" for name in names),
            )
        )
    return underlined(numbers(rows))
