"""The goodput sweep: every system at every rate with every seed, and its summary."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax import metrics
from disagg_jax.calibration.timing import Progress
from disagg_jax.control.run import StepTotals
from disagg_jax.deployment import Deployment, Role
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics import (
    SLO,
    BestRate,
    GoodputEstimate,
    Interval,
    Inversion,
    best_rate,
    estimate,
    find_inversion,
)
from disagg_jax.metrics.criteria import Criterion
from disagg_jax.metrics.ranking import rank
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Timeline
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.scheduling import find_system
from disagg_jax.search.rates import climb, search
from experiments.configs.config import Config
from experiments.runs.request_rows import to_row
from experiments.runs.run_dir import Point, RunDir
from experiments.sweep.request_source import RequestSource
from models.load import Model
from models.tokenizer import NoText

Runs = Mapping[float, Sequence[dict[str, Any]]]  # rate -> the metrics of each seed

# values of each seed -> mean, low and high
Across = Callable[[Sequence[float]], dict[str, float | None]]

RATIO_BASE = "vllm_v0"  # ratios are over this system, where it takes part


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs the points that are not done yet, and summarises all points."""

    config: Config
    model: Model
    source: RequestSource
    served: Mapping[str, ServedDeployment]  # by system
    durations: StepDurations  # of the first system
    slo: SLO
    choices: Mapping[str, Sequence[str]]  # of step sizes, by system: which and why
    criteria: Mapping[str, Criterion]  # by name; `config.criterion` is searched for
    run_dir: RunDir
    progress: Progress

    @property
    def good(self) -> Criterion:
        """The criterion that rates are searched for, and systems compared by."""
        return self.criteria[self.config.criterion]

    def run(self) -> dict[str, Any]:
        """Search each system's goodput and return the summary."""
        rates = {name: self._try_rates(name) for name in self.served}
        if self.config.executed == "passing":
            for name, tried in rates.items():
                self._execute(name, tried)
        self.run_dir.write_requests(
            Point(name, rate, replica)
            for name, tried in rates.items()
            for rate in tried
            for replica in range(self.config.num_seeds)
        )
        return self._summary(rates)

    def _try_rates(self, name: str) -> list[float]:
        """Run a system at the given rates, or at a search's; return the rates."""
        tried: list[float] = []

        def scores(rate: float) -> list[float]:
            return self._scores(name, rate, tried)

        devices = self._devices(name)
        for rate in self.config.rates:
            scores(rate * devices)
        if not self.config.rates:
            plan, target = self.config.search, self.good.target
            if target is None:
                climb(scores, self._start_rps(), plan)
            else:
                plan = dataclasses.replace(plan, target=target)
                search(scores, self._start_rps(), plan)
        if self.good.target is not None:
            found = self._scores_at(name, tried)
            if inversion := find_inversion(found, self.good.target):
                self.progress(f"{name:>14}  {inversion.text(devices)}")
        return sorted(tried)

    def _scores_at(self, name: str, rates: Sequence[float]) -> dict[float, list[float]]:
        """Return the scores of finished points, by the criterion of the search."""
        return _scores_of(self.config.criterion, self._runs(name, rates))

    def _execute(self, name: str, rates: Sequence[float]) -> None:
        """Run the programs at the rate that a system is judged by."""
        rate = self._judged_at(self._scores_at(name, rates))
        if rate is None:
            return
        devices = self._devices(name)
        shown = f"{rate / devices:8.2f} requests/s per device"
        self.progress(f"{name:>14}  {shown}: running its programs")
        for replica in range(self.config.num_seeds):
            point = Point(name, rate, replica)
            if not self.run_dir.load(point)["executed"]:  # by a run that is resumed
                self._run(point, execute=True, expected=self.run_dir.requests(point))

    def _judged_at(self, scores: Mapping[float, Sequence[float]]) -> float | None:
        """Return the highest passing rate, or the best for a throughput."""
        target = self.good.target
        if target is None:
            return best_rate(scores, self.config.search.tolerance).rate_rps
        return estimate(scores, target).pass_rps

    def _start_rps(self) -> float:
        """Return the first rate of all searches: half of what busy devices could serve.

        It is estimated for the first system, so that all systems try the same rates.
        """
        decode_s, rows = self.durations.decode_s()
        busy_s = statistics.mean(
            self.durations.prefill_s(request.prompt_tokens)
            + request.max_tokens * decode_s / rows
            for request in self.source(1.0, 0)
        )
        devices = self._devices(next(iter(self.served)))
        return float(f"{0.5 * devices / busy_s:.3g}")

    def _devices(self, name: str) -> int:
        return self.served[name].deployment.devices

    def _scores(self, name: str, rate: float, tried: list[float]) -> list[float]:
        rate = float(f"{rate:.4g}")
        if rate not in tried:
            tried.append(rate)
        points = [Point(name, rate, i) for i in range(self.config.num_seeds)]
        criterion = self.config.criterion
        values = [self._point(point)["criteria"][criterion] for point in points]
        per_device = rate / self._devices(name)
        what = "attainment" if criterion == "distserve" else criterion
        form = ".4g" if self.good.target is None else ".1%"
        self.progress(
            f"{name:>14}  {per_device:8.2f} requests/s per device: "
            f"{what} {statistics.mean(values):6{form}}  "
            f"({', '.join(f'{value:{form}}' for value in values)})"
        )
        return values

    def _point(self, point: Point) -> dict[str, Any]:
        if not self.run_dir.has(point):
            self._run(point, execute=self.config.executed == "all")
        return self.run_dir.load(point)

    def _run(
        self,
        point: Point,
        *,
        execute: bool,
        expected: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Run a point, and save it if its timelines are those of `expected`."""
        served = dataclasses.replace(self.served[point.system], executed=execute)
        requests, log = self.source(point.rate_rps, point.replica), EventLog()
        run = served.run(requests, observer=log)
        virtual = self.config.clock == "virtual"
        shares = run.busy_shares(served.deployment) if virtual else None
        found: dict[str, Any] = {
            **summarise(run.timelines, self.slo, served.deployment.devices),
            "steady": metrics.is_steady(run.timelines),
            "executed": run.totals is not None,
            **_padding(run.totals or {}),
            **_busy(served.deployment, shares),
            "criteria": {
                name: criterion.score(run.timelines)
                for name, criterion in self.criteria.items()
            },
        }
        rows = [self._request_row(timeline) for timeline in run.timelines]
        if expected is not None and _timelines(rows) != _timelines(expected):
            raise RuntimeError(
                f"{point.name}: the programs' timelines are not those of their "
                "durations"
            )
        self.run_dir.save(point, found, rows, log.lines)

    def _request_row(self, timeline: Timeline) -> dict[str, Any]:
        row = to_row(timeline, self.slo)
        if self.config.weights == "random":
            return row
        if not isinstance(self.model.tokenizer, NoText):
            row["text"] = self.model.tokenizer.decode(timeline.tokens)
        return row

    # -- summary ------------------------------------------------------------------

    def _summary(self, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        runs = {name: self._runs(name, tried) for name, tried in rates.items()}
        systems = {name: self._system(name, found) for name, found in runs.items()}
        return {
            "model": self.config.model,
            "clock": self.config.clock,
            "durations": "live"
            if self.config.clock == "wall"
            else self.config.durations,
            "slo": dataclasses.asdict(self.slo),
            "criterion": self.config.criterion,
            "target": self.good.target,
            "num_requests": self.config.workload.num_requests,
            "num_seeds": self.config.num_seeds,
            "executed": self.config.executed,
            **({"trace": self.source.trace} if self.source.trace else {}),
            **({"no_intervals": why} if (why := self.source.why_dependent) else {}),
            "choices": {name: list(said) for name, said in self.choices.items()},
            "systems": systems,
            "ratios": _ratios(systems, self._interval),
            "criteria": {
                name: self._ranked(name, criterion, runs)
                for name, criterion in self.criteria.items()
            },
        }

    def _interval(self, values: Sequence[float]) -> dict[str, float | None]:
        """Return the mean across seeds, and an interval if they are independent."""
        independent = not self.source.why_dependent
        found: Interval = metrics.rate_interval(values, independent=independent)
        return dataclasses.asdict(found)

    def _runs(self, name: str, rates: Sequence[float]) -> Runs:
        return {
            rate: [
                self.run_dir.load(Point(name, rate, replica))
                for replica in range(self.config.num_seeds)
            ]
            for rate in rates
        }

    def _system(self, name: str, runs: Runs) -> dict[str, Any]:
        devices = self._devices(name)
        scores = _scores_of(self.config.criterion, runs)
        independent = not self.source.why_dependent
        if self.good.target is None:
            tolerance = self.config.search.tolerance
            best = best_rate(scores, tolerance, independent=independent)
            found = {"throughput": _throughput(best, runs, devices)}
        else:
            goodput = estimate(scores, self.good.target, independent=independent)
            found = {"goodput": _goodput(goodput, runs, devices)}
        return {
            "deployment": self.config.systems[name].deployment,
            "devices": devices,
            **found,
            "points": [
                _point_row(rate, points, self._interval)
                for rate, points in runs.items()
            ],
        }

    def _ranked(
        self, name: str, criterion: Criterion, runs: Mapping[str, Runs]
    ) -> dict[str, Any]:
        """Return a criterion's definition, and the order of the systems by it."""
        scores: dict[str, dict[float, list[float]]] = {}
        for system, found in runs.items():
            devices = self._devices(system)
            each = devices if criterion.target is None else 1
            scores[system] = {
                rate / devices: [score / each for score in values]
                for rate, values in _scores_of(name, found).items()
            }
        return {
            "definition": str(criterion),
            "target": criterion.target,
            "unit": f"{criterion.unit} per device",
            "rank": rank(
                criterion,
                scores,
                self.config.search.tolerance,
                independent=not self.source.why_dependent,
            ),
        }


def _padding(totals: Mapping[str, StepTotals]) -> dict[str, float | None]:
    """Return the share of tokens that were padding, by kind of step."""
    shares: dict[str, float | None] = {}
    for kind in ("prefill", "mixed", "decode"):
        done = totals.get(kind)
        shares[f"padding_{kind}"] = 1 - done.tokens / done.width if done else None
    return shares


def _busy(
    deployment: Deployment, shares: Sequence[Sequence[float]] | None
) -> dict[str, float | None]:
    """Return the busy share of each role's devices, and of its idlest stage."""
    found: dict[str, float | None] = {}
    for role in Role:
        stages = [s for i in deployment.of(role) for s in shares[i]] if shares else []
        found[f"busy_{role}"] = statistics.mean(stages) if stages else None
        found[f"busy_{role}_least"] = min(stages, default=None)
    return found


def _timelines(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the parts of requests' rows that do not depend on tokens, as in a file."""
    other = ("tokens", "text", *(field.name for field in dataclasses.fields(Point)))
    kept = [{key: row[key] for key in row if key not in other} for row in rows]
    return json.loads(json.dumps(kept))


def _scores_of(criterion: str, runs: Runs) -> dict[float, list[float]]:
    return {
        rate: [run["criteria"][criterion] for run in points]
        for rate, points in runs.items()
    }


def _goodput(found: GoodputEstimate, runs: Runs, devices: int) -> dict[str, Any]:
    def per_device(value: float | None) -> float | None:
        return None if value is None else value / devices

    at_pass = runs[found.pass_rps] if found.pass_rps else None
    return {
        "max_goodput_rate_per_device": {
            key: per_device(value)
            for key, value in dataclasses.asdict(found.interval).items()
        },
        "per_seed_rps_per_device": [rate / devices for rate in found.per_seed_rps],
        "pass_rps_per_device": per_device(found.pass_rps),
        "fail_rps_per_device": per_device(found.fail_rps),
        "bracketed": found.bracketed,
        "resolved": found.resolved,
        "inversion": _inversion(found.inversion, devices),
        "steady": all(run["steady"] for run in at_pass) if at_pass else None,
        "at_pass_rate": _mean_metrics(at_pass) if at_pass else None,
    }


def _inversion(found: Inversion | None, devices: int) -> dict[str, Any] | None:
    """Return where attainment is not monotone; see `GoodputEstimate`."""
    if found is None:
        return None
    return {
        "fail_rps_per_device": found.fail_rps / devices,
        "fail_score": found.fail_score,
        "pass_rps_per_device": found.pass_rps / devices,
        "pass_score": found.pass_score,
        "text": found.text(devices),
    }


def _throughput(found: BestRate, runs: Runs, devices: int) -> dict[str, Any]:
    return {
        "max_throughput_per_device": {
            key: None if value is None else value / devices
            for key, value in dataclasses.asdict(found.interval).items()
        },
        "per_seed_per_device": [value / devices for value in found.per_seed],
        "best_rps_per_device": found.rate_rps / devices,
        "bracketed": found.bracketed,
        "steady": all(run["steady"] for run in runs[found.rate_rps]),
        "at_best_rate": _mean_metrics(runs[found.rate_rps]),
    }


def _point_row(
    rate: float, runs: Sequence[dict[str, Any]], across: Across
) -> dict[str, Any]:
    return {
        "request_rate": rate,
        "request_rate_per_device": rate / runs[0]["devices"],
        **{
            key: across([run[key] for run in runs])
            for key in ("attainment", "attainment_ttft", "attainment_tpot")
        },
        "criteria": {
            name: across([run["criteria"][name] for run in runs])
            for name in runs[0]["criteria"]
        },
        "steady": all(run["steady"] for run in runs),
        "metrics": _mean_metrics(runs),
    }


def _mean_metrics(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return each metric's mean over the seeds; None if a run lacks it."""
    means: dict[str, float | None] = {}
    for key, value in runs[0].items():
        if isinstance(value, bool | dict):
            continue
        values = [run[key] for run in runs]
        means[key] = None if None in values else statistics.mean(values)
    return means


def _ratios(systems: Mapping[str, Any], across: Across) -> dict[str, Any]:
    """Return each system's goodput or throughput over the base's, paired by seed."""
    over = find_system(RATIO_BASE, systems)
    if over not in systems:
        return {}
    base = _per_seed(systems[over])
    ratios: dict[str, Any] = {}
    for name, system in systems.items():
        if name == over or not all(base):
            continue
        paired = [
            rate / other for rate, other in zip(_per_seed(system), base, strict=True)
        ]
        ratios[f"{name}/{over}"] = {**across(paired), "per_seed": paired}
    return ratios


def _per_seed(system: Mapping[str, Any]) -> list[float]:
    if "throughput" in system:
        return system["throughput"]["per_seed_per_device"]
    return system["goodput"]["per_seed_rps_per_device"]
