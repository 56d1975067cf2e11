"""Writes how accurate the simulator is: tables, verdicts and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.goodput import GoodputEstimate, estimate
from disagg_jax.metrics.intervals import margin
from disagg_jax.sim.cost.measured import CalibratedProfile
from experiments.accuracy_study.paired_runs import Compared, PairedRun, PredictedStep
from experiments.configs.config import Config
from experiments.report.colours import system_colours
from experiments.report.draw import draw
from experiments.report.intervals import across_seeds, number
from experiments.report.panel import STAGES, XY, Panel, Series, Style, curves
from experiments.report.table import numbers
from experiments.runs.folder import commit

GOODPUT_AIM = 0.05  # relative error
_SHOWN = 2000  # steps of a kind in the picture


class StepErrors(NamedTuple):
    """How far predictions of one kind of step are off."""

    steps: int
    measured_s: float  # together
    ratio: float  # predicted over measured, of the sums
    mean_error: float  # of |predicted / measured - 1|
    p90_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemAccuracy:
    """One system, at all its rates."""

    deployment: str
    devices: int
    rates: Sequence[Compared]
    engine: GoodputEstimate  # requests/s of the deployment
    simulated: GoodputEstimate
    profiled: GoodputEstimate  # simulated with the profile's durations as they are
    steps: Mapping[str, StepErrors]
    shown: Sequence[PredictedStep]  # some of them
    # Attainment of the engine's second run less the first's, of the same seed; None if
    # there was no time for it.
    again: float | None

    def error(self, goodput: GoodputEstimate) -> float:
        """Return its relative error; infinite if the engine passed at no rate."""
        if not self.engine.interval.mean:
            return math.inf
        return goodput.interval.mean / self.engine.interval.mean - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """All systems."""

    systems: Mapping[str, SystemAccuracy]
    slo: SLO
    target: float
    num_requests: int
    seeds: int
    clock: str
    profile: Mapping[str, str]  # its provenance
    mark: str  # of the profile: '' if it was measured
    # Programs alone over the profile, before and after all runs; None if there was no
    # time for all.
    moved: tuple[float, float | None]
    missing: int = 0  # points for which there was no time

    def order(self, side: str) -> list[str]:
        """Sort the systems by goodput per device, the best first."""

        def goodput(name: str) -> float:
            found = self.systems[name]
            return getattr(found, side).interval.mean / found.devices

        return sorted(self.systems, key=goodput, reverse=True)

    def told_apart(self) -> list[tuple[str, str]]:
        """Return pairs that the engine's own seeds tell apart, the better first.

        The interval of the ratio of their goodputs, paired by seed, excludes 1.
        """
        per_seed = {
            name: [rps / found.devices for rps in found.engine.per_seed_rps]
            for name, found in self.systems.items()
        }
        return [
            (better, worse)
            for better, worse in itertools.combinations(self.order("engine"), 2)
            if margin(per_seed[better], per_seed[worse]).clear
        ]


def compare(
    pairs: Sequence[PairedRun],
    rates: Mapping[str, Sequence[float]],
    *,
    target: float,
    profile: CalibratedProfile,
    moved: tuple[float, float | None],
    config: Config,
    missing: int = 0,
) -> Result:
    """Compare the runs of each system at its rates, which must be done."""
    return Result(
        systems={pair.name: _system(pair, rates[pair.name], target) for pair in pairs},
        slo=pairs[0].slo,
        target=target,
        num_requests=config.workload.num_requests,
        seeds=config.num_seeds,
        clock=config.clock,
        profile=profile.provenance,
        mark=profile.mark,
        moved=moved,
        missing=missing,
    )


def _system(pair: PairedRun, rates: Sequence[float], target: float) -> SystemAccuracy:
    compared = [pair.compare(rate) for rate in rates]

    def goodput(of: Callable[[Compared], Sequence[float]]) -> GoodputEstimate:
        return estimate({c.rate_rps: of(c) for c in compared}, target)

    points = [point for rate in rates for point in pair.points(rate)]
    by_kind: dict[str, list[PredictedStep]] = {}
    for step in pair.predicted_steps(points):
        by_kind.setdefault(step.kind, []).append(step)
    return SystemAccuracy(
        deployment=str(pair.server.deployment),
        devices=pair.server.deployment.devices,
        rates=compared,
        engine=goodput(lambda c: [run["attainment"] for run in c.engine]),
        simulated=goodput(lambda c: [run["attainment"] for run in c.simulated]),
        profiled=goodput(lambda c: c.profiled),
        steps={kind: _errors(steps) for kind, steps in by_kind.items()},
        shown=[
            s for steps in by_kind.values() for s in steps[:: len(steps) // _SHOWN + 1]
        ],
        again=pair.repeated(rates),
    )


def _errors(steps: Sequence[PredictedStep]) -> StepErrors:
    measured_s = np.array([step.measured_s for step in steps])
    predicted_s = np.array([step.predicted_s for step in steps])
    errors = np.abs(predicted_s / measured_s - 1)
    return StepErrors(
        len(steps),
        float(measured_s.sum()),
        float(predicted_s.sum() / measured_s.sum()),
        float(errors.mean()),
        float(np.percentile(errors, 90)),
    )


# -- text ------------------------------------------------------------------------------


def text(result: Result) -> str:
    """Write the tables and the verdicts."""
    profile = result.profile
    before, after = result.moved
    alone = f"{before - 1:+.1%} before the runs"
    if after is not None:
        alone += f", {after - 1:+.1%} after"
    head = [
        f"# python -m experiments.accuracy   commit {commit()}",
        f"# {_asked(result)}; clock {result.clock}, live durations",
        f"# SLO: TTFT <= {result.slo.ttft_s * 1e3:.2f} ms and TPOT <= "
        f"{result.slo.tpot_s * 1e3:.2f} ms for {result.target:.0%} of requests",
        f"# profile of {profile['date']}, commit {profile['commit']}; programs alone "
        f"take {alone}",
    ]
    if result.missing:
        head.append(
            "# NOT FINISHED, as --minutes were spent; the same command goes on with "
            f"{result.missing} points"
        )
    parts = [
        ("attainment and latency, simulated against engine", _rate_rows(result)),
        ("goodput, requests/s per device", _goodput_rows(result)),
        ("steps in the runs, predicted against measured", _step_rows(result)),
        ("mean stages at the middle rate, engine -> simulated, ms", _stages(result)),
    ]
    for title, rows in parts:
        head += ["", f"# {title}", *numbers(rows, labels=2)]
    return "\n".join([*head, "", *verdicts(result)])


def _rate_rows(result: Result) -> list[tuple[str, ...]]:
    head = (
        *("system", "rate/device", "engine", "simulated", "difference", "allowed"),
        *("", "as profiled", "slower", "durations", "scheduling", "alike"),
        *("TTFT P50", "P90", "P99", "TPOT P50", "P90", "P99"),
    )
    systems = result.systems.items()
    return [head, *((n, *_rate_row(c, s.devices)) for n, s in systems for c in s.rates)]


def _rate_row(compared: Compared, devices: int) -> tuple[str, ...]:
    decided = sum(a.decided for a in compared.agreements)
    shared = sum(a.shared for a in compared.agreements)
    keys = [f"p{p}_{what}_ms" for what in ("ttft", "tpot") for p in (50, 90, 99)]
    return (
        f"{compared.rate_rps / devices:.4g}",
        f"{compared.mean('engine', 'attainment'):.1%}",
        f"{compared.mean('simulated', 'attainment'):.1%}",
        f"{compared.difference:+.1%}",
        f"{compared.allowed:.1%}",
        "ok" if compared.ok else "MISSED",
        f"{compared.difference_as_profiled:+.1%}",
        " ".join(f"{compared.slowdown(k) - 1:+.0%}" for k in ("decode", "prompt")),
        f"{compared.by_durations:+.1%}",
        f"{compared.difference - compared.by_durations:+.1%}",
        f"{shared / decided:.0%}",
        *(f"{compared.relative(key):+.1%}" for key in keys),
    )


def _goodput_rows(result: Result) -> list[tuple[str, ...]]:
    head = ("system", "deployment", "engine", "simulated", "error", "")
    rows: list[tuple[str, ...]] = [(*head, "as profiled", "again")]
    for name, found in result.systems.items():
        sides = (
            across_seeds([rps / found.devices for rps in side.per_seed_rps], ".4g")
            for side in (found.engine, found.simulated)
        )
        error = found.error(found.simulated)
        aim = "ok" if abs(error) <= GOODPUT_AIM else "MISSED"
        profiled = f"{found.error(found.profiled):+.1%}"
        others = (profiled, number(found.again, "+.1%"))
        rows.append((name, found.deployment, *sides, f"{error:+.1%}", aim, *others))
    return rows


def _step_rows(result: Result) -> list[tuple[str, ...]]:
    rows = [
        ("system", "kind", "steps", "seconds", "predicted", "mean error", "P90 error")
    ]
    for name, found in result.systems.items():
        for kind, errors in found.steps.items():
            shares = (f"{errors.mean_error:.1%}", f"{errors.p90_error:.1%}")
            taken = (str(errors.steps), f"{errors.measured_s:.1f}")
            rows.append((name, kind, *taken, f"{errors.ratio - 1:+.1%}", *shares))
    return rows


def _stages(result: Result) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("system", "rate/device", *STAGES)]
    for name, found in result.systems.items():
        middle = found.rates[len(found.rates) // 2]
        both = (
            [middle.mean(side, f"mean_{stage}_ms") for side in ("engine", "simulated")]
            for stage in STAGES
        )
        cells = (f"{engine:.2f} -> {simulated:.2f}" for engine, simulated in both)
        rows.append((name, f"{middle.rate_rps / found.devices:.4g}", *cells))
    return rows


def verdicts(result: Result) -> list[str]:
    """Write a line for each aim."""
    systems = result.systems.values()
    compared = [c for found in systems for c in found.rates]
    missed = [c for c in compared if not c.ok]
    off = [abs(found.error(found.simulated)) for found in systems]
    off_as_profiled = [abs(found.error(found.profiled)) for found in systems]
    orders = result.order("engine"), result.order("simulated")
    rank, apart = orders[1].index, result.told_apart()
    alike = [(a, b) for a, b in apart if rank(a) < rank(b)]
    steps = [errors for found in systems for errors in found.steps.values()]
    measured_s = sum(e.measured_s for e in steps)
    predicted_s = sum(e.measured_s * e.ratio for e in steps)
    return [
        f"attainment: {len(compared) - len(missed)} of {len(compared)} points within "
        f"what is allowed; largest difference "
        f"{max(abs(c.difference) for c in compared):.1%}"
        + (f"   MISSED: {_causes(missed)}" if missed else "   ok"),
        f"goodput: off by {statistics.fmean(off):.1%} on average, {max(off):.1%} at "
        f"most; aim {GOODPUT_AIM:.0%}"
        + _mark(max(off) <= GOODPUT_AIM)
        + f"; as profiled {statistics.fmean(off_as_profiled):.1%} on average",
        f"order of the systems: engine {' > '.join(orders[0])}; simulated "
        f"{' > '.join(orders[1])}" + _mark(orders[0] == orders[1]),
        f"pairs: the engine tells {len(apart)} of {math.comb(len(orders[0]), 2)} apart "
        f"(95 %, paired by seed); the simulator has {len(alike)} of these in the same "
        "order" + _mark(alike == apart),
        f"cost model: steps are predicted to take {predicted_s / measured_s - 1:+.1%} "
        "of what they took, together",
    ]


def _mark(ok: bool) -> str:
    return "   ok" if ok else "   MISSED"


def _causes(missed: Sequence[Compared]) -> str:
    """Count the points by their larger cause, and name the stage that differs."""
    durations = sum(abs(c.by_durations) >= abs(c.difference) / 2 for c in missed)
    worst = statistics.mode(_worst_stage(c) for c in missed)
    return (
        f"{durations} by durations, {len(missed) - durations} by scheduling; the stage "
        f"that differs most is mostly {worst}"
    )


def _worst_stage(compared: Compared) -> str:
    def off(stage: str) -> float:
        key = f"mean_{stage}_ms"
        return abs(compared.mean("simulated", key) - compared.mean("engine", key))

    return max(STAGES, key=off)


# -- record and picture ----------------------------------------------------------------


def to_json(result: Result) -> dict[str, Any]:
    """Return all numbers of the tables."""
    record = dataclasses.asdict(result)
    for name, found in record["systems"].items():
        del found["shown"]
        steps = result.systems[name].steps
        found["steps"] = {kind: errors._asdict() for kind, errors in steps.items()}
    return {**record, "verdicts": verdicts(result)}


def _asked(result: Result) -> str:
    """Name the model, the device, the requests and the seeds."""
    profile = result.profile
    marked = f"; profile {result.mark}" if result.mark else ""
    return (
        f"{profile['model']} {profile['dtype']} on {profile['device']}{marked}; "
        f"{result.num_requests} requests x {result.seeds} seeds a point"
    )


def plot(result: Result, path: pathlib.Path) -> None:
    """Draw attainment on both sides, and steps predicted against measured."""
    panels = [attainment_panel(result), _scatter(result)]
    draw(panels, f"engine and simulator: {_asked(result)}", path)


def attainment_panel(result: Result) -> Panel:
    """Return attainment over the rate, of every system on both sides."""
    sides: Mapping[str, Style] = {"engine": "line", "simulated": "dashed"}
    series: list[Series] = []
    colours = system_colours(result.systems)
    for name, found in result.systems.items():
        for side, style in sides.items():
            at = [(c.rate_rps / found.devices, c) for c in found.rates]
            points = [(rate, c.mean(side, "attainment")) for rate, c in at]
            label = f"{name}, {side}"
            colour = colours[name]
            series.append(
                Series(label=label, points=points, colour=colour, style=style)
            )
    return Panel(
        title="attainment",
        x="requests/s per device",
        y="share of requests within the SLO",
        series=series,
        line=result.target,
    )


def _scatter(result: Result) -> Panel:
    by_kind: dict[str, list[XY]] = {}
    for found in result.systems.values():
        for step in found.shown:
            at = (step.measured_s * 1e3, step.predicted_s * 1e3)
            by_kind.setdefault(step.kind, []).append(at)
    return Panel(
        title="steps in the runs",
        x="measured (ms)",
        y="predicted (ms)",
        series=curves(dict(sorted(by_kind.items())), style="paper"),
        log_x=True,
        log_y=True,
    )
