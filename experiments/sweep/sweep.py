"""The goodput sweep: every system at every rate with every seed, by one target."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax.engine.engine import Progress
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics import SLO, find_inversion, look_confidence
from disagg_jax.metrics.criteria import Criterion
from disagg_jax.request import Timeline
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.search.rates import SearchPlan, climb, refine, search
from disagg_jax.sim.workers import Mapper
from experiments.configs.config import Config
from experiments.runs.request_rows import to_row
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point
from experiments.sweep.point import (
    PointTask,
    Serving,
    padding,
    point_metrics,
    run_point,
)
from experiments.sweep.request_source import RequestSource
from experiments.sweep.summary import (
    RATE_DIGITS,
    Judge,
    Runs,
    pairs,
    ranked,
    ratios,
    scores_of,
    system_summary,
    with_most_seeds,
)
from models.load import Model
from models.tokenizer import NoText

_SCOUTS = 2  # seeds that find the rates to look at, where there are several looks


class OutOfTime(Exception):
    """The time of a sweep is spent; what was saved is kept."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs the points that are not done yet, and summarises all points.

    Attributes:
      served: engines by system, which run programs.
      timed: the same by the durations of programs alone.
      durations: of the first system.
      choices: of step sizes, by system: which and why.
      too_slow_s: the smallest full step with a prompt beside decodes, of systems in
        which it takes longer than TPOT may.
      criteria: by name; `config.criterion` is searched for.
      compile_system: called by a system's name before its programs run.
      step: told of a part how many steps are done, and of how many.
      out_of_time: whether nothing more is to be run.
      target: the name of the target; "" of a single one.
      mapper: runs the seeds of a rate by `timed`.
      tried: by system, the rates and the seeds that each was run with.
      scouted_rps: by system, the goodput that few seeds gave; see `Config.looks`. The
        first search of a system begins at the last of them.
    """

    config: Config
    model: Model
    source: RequestSource
    served: Mapping[str, ServedDeployment]
    timed: Mapping[str, Serving]
    durations: StepDurations
    slo: SLO
    choices: Mapping[str, Sequence[str]]
    criteria: Mapping[str, Criterion]
    too_slow_s: Mapping[str, float]
    run_dir: RunDir
    progress: Progress
    compile_system: Callable[[str], None] = lambda name: None
    step: Callable[[str, int, int], None] = lambda part, done, total: None
    out_of_time: Callable[[], bool] = lambda: False
    target: str = ""
    mapper: Mapper = map
    tried: dict[str, dict[float, int]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(dict)
    )
    scouted_rps: dict[str, float] = dataclasses.field(default_factory=dict)
    # What `out_of_time` left out, in words.
    missing: list[str] = dataclasses.field(default_factory=list)

    @property
    def good(self) -> Criterion:
        """The criterion that rates are searched for, and systems compared by."""
        return self.criteria[self.config.criterion]

    @property
    def looks(self) -> Sequence[int]:
        """Return `Config.looks`; a throughput is never resolved, so it has one."""
        looks = self.config.looks
        return looks if self.good.target is not None else looks[:1]

    @property
    def judge(self) -> Judge:
        return Judge(
            name=self.config.criterion,
            criterion=self.good,
            tolerance=self.config.search.tolerance,
            independent=not self.source.why_dependent,
            confidence=look_confidence(len(self.looks)),
        )

    def run(self) -> dict[str, Any]:
        """Search each system's goodput and return the summary.

        Raises:
          OutOfTime: if there was no time for the first look at any system. If there
            was for less than all, `missing` says what the summary lacks.
        """
        for seeds in self.looks:
            before = {name: dict(rates) for name, rates in self.tried.items()}
            if (cut := self._look_at_all(seeds)) is not None:
                self._cut(seeds, before, cut)
                break
            if len(self.looks) == 1 or self._all_resolved():
                break
        for name in self.names:
            self._report_inversion(name)
            if self.config.executed == "passing":
                self._execute(name)
        return self._summary()

    @property
    def names(self) -> list[str]:
        """Return the systems that were looked at."""
        return [name for name in self.served if self.tried.get(name)]

    def points(self) -> list[Point]:
        """Return the points of the sweep, in the order of its systems and rates."""
        return [
            point
            for name in self.names
            for rate, seeds in sorted(self.tried[name].items())
            for point in self._at(name, rate, seeds)
        ]

    def goodput_rps(self, name: str) -> float:
        """Return the goodput of a system so far; the lowest rate if none passed."""
        found = self.judge.goodput(with_most_seeds(self._runs(name)))
        return found.interval.mean or min(self.tried[name])

    # -- looks --------------------------------------------------------------------

    def _look_at_all(self, seeds: int) -> str | None:
        """Look at every system; return the one for which there was no time, if any."""
        part = f"{self.target} look after {seeds} seeds".strip()
        each = max(1, len(self.config.rates))
        total = each * len(self.served)
        for i, name in enumerate(self.served):
            told = functools.partial(self._told, part, i * each, total)
            told(0)
            try:
                self._look(name, seeds, told)
            except OutOfTime:
                return name
        self.step(part, total, total)
        return None

    def _told(self, part: str, before: int, total: int, done: int) -> None:
        self.step(part, before + done, total)

    def _cut(self, seeds: int, before: dict[str, dict[float, int]], name: str) -> None:
        """Go back to the last look that was done, and say what is missing.

        In the first look, systems that were looked at stay, and the rates at which
        `name` ran if rates are given.

        Args:
          before: `tried` before this look.
          name: of the system for which there was no time.

        Raises:
          OutOfTime: if nothing is left.
        """
        missing = f"{self.target} the look after {seeds} seeds".strip()
        if not before:
            order = list(self.served)
            at = order.index(name)
            kept = order[: at + 1] if self.config.rates else order[:at]
            before = {n: self.tried[n] for n in kept if n in self.tried}
            missing += f" at {', '.join(order[at:])}"
        self.missing.append(missing)
        self.tried.clear()
        self.tried.update(before)
        if not before:
            raise OutOfTime

    def _look(self, name: str, seeds: int, told: Callable[[int], None]) -> None:
        """Run a system with so many seeds at the given rates, or at a search's.

        Args:
          told: how many of the given rates are done.
        """

        def scores(rate: float) -> list[float]:
            return self._scores(name, rate, seeds)

        def scout(rate: float) -> list[float]:
            return self._scores(name, rate, _SCOUTS)

        devices, several = self._devices(name), len(self.looks) > 1
        if self.config.rates:
            for done, rate in enumerate(self.config.rates, 1):
                scores(rate * devices)
                told(done)
        elif self.good.target is None:
            climb(scores, self._start_rps(), self.config.search)
        elif not several:
            search(scores, self._start_rps(), self._plan)
        else:
            if name not in self.scouted_rps:
                search(scout, self._scout_from(), self._scouting)
                self.scouted_rps[name] = self.goodput_rps(name)
            refine(scores, self.scouted_rps[name], self._plan)

    @property
    def _plan(self) -> SearchPlan:
        assert self.good.target is not None
        return dataclasses.replace(self.config.search, target=self.good.target)

    @property
    def _scouting(self) -> SearchPlan:
        """Return the plan of a first search: any bracket will do."""
        return dataclasses.replace(self._plan, tolerance=self._plan.growth - 1)

    def _scout_from(self) -> float:
        """Return the rate to scout from: near what the system before got."""
        before = next(reversed(self.scouted_rps.values()), None)
        return before or self._start_rps()

    def _all_resolved(self) -> bool:
        return all(
            self.judge.goodput(with_most_seeds(self._runs(name))).resolved
            for name in self.names
        )

    def _report_inversion(self, name: str) -> None:
        if self.good.target is None:
            return
        scores = scores_of(self.config.criterion, self._runs(name))
        if inversion := find_inversion(scores, self.good.target):
            self.progress(f"{name:>14}  {inversion.text(self._devices(name))}")

    def _start_rps(self) -> float:
        """Return the first rate of all searches: half of what busy devices could serve.

        It is estimated for the first system, so that all systems try the same rates.
        """
        decode_s, rows = self.durations.decode_s()
        busy_s = statistics.mean(
            self.durations.prefill_s(request.prompt_tokens)
            + request.max_tokens * decode_s / rows
            for request in self.source(1.0)
        )
        devices = self._devices(next(iter(self.served)))
        return float(f"{0.5 * devices / busy_s:.3g}")

    def _devices(self, name: str) -> int:
        return self.served[name].deployment.devices

    def _at(self, name: str, rate: float, seeds: int) -> list[Point]:
        """Return a system's points at a rate, with so many of the config's seeds."""
        return [
            Point(name, rate, seed, self.target) for seed in self.config.seeds[:seeds]
        ]

    # -- points -------------------------------------------------------------------

    def _scores(self, name: str, rate: float, seeds: int) -> list[float]:
        rate = float(f"{rate:.{RATE_DIGITS}g}")
        points = self._at(name, rate, seeds)
        missing = [point for point in points if not self.run_dir.has(point)]
        if missing and self.out_of_time():
            raise OutOfTime
        self.tried[name][rate] = max(seeds, self.tried[name].get(rate, 0))
        if self.config.executed == "all":
            for point in missing:
                self._run(point)
        else:
            self._run_timed(missing)
        criterion = self.config.criterion
        values = [self.run_dir.load(point)["criteria"][criterion] for point in points]
        self._report_scores(name, rate, values)
        return values

    def _report_scores(self, name: str, rate: float, values: Sequence[float]) -> None:
        criterion, per_device = self.config.criterion, rate / self._devices(name)
        what = "attainment" if criterion == "distserve" else criterion
        form = ".4g" if self.good.target is None else ".1%"
        target = f"{self.target}: " if self.target else ""
        self.progress(
            f"{target}{name:>14}  {per_device:8.2f} requests/s per device: "
            f"{what} {statistics.mean(values):6{form}}  "
            f"({', '.join(f'{value:{form}}' for value in values)})"
        )

    def _task(self, point: Point, served: Serving) -> PointTask:
        return PointTask(
            served=served,
            source=self.source,
            point=point,
            slo=self.slo,
            criteria=self.criteria,
            virtual=self.config.clock == "virtual",
        )

    def _run_timed(self, points: Sequence[Point]) -> None:
        """Run points by durations alone; of these only metrics are kept."""
        tasks = [self._task(point, self.timed[point.system]) for point in points]
        found = self.mapper(run_point, tasks)
        for point, values in zip(points, found, strict=True):
            self.run_dir.save(point, values)

    def _run(self, point: Point) -> None:
        """Run a point with its programs, and keep its requests and events."""
        self.compile_system(point.system)
        served, log = self.served[point.system], EventLog()
        run = served.run(self.source(point.rate_rps, point.seed), observer=log)
        found = point_metrics(self._task(point, served), run)
        rows = [self._request_row(timeline) for timeline in run.timelines]
        self.run_dir.save(point, found, rows, log.lines)

    def _execute(self, name: str) -> None:
        """Run programs at the rate that a system is judged by, and keep their requests.

        Raises:
          RuntimeError: if their timelines are not those of their durations.
        """
        rate = self.judge.judged_rps(with_most_seeds(self._runs(name)))
        if rate is None:
            return
        (point,) = self._at(name, rate, 1)
        found = self.run_dir.load(point)
        if found["executed"]:  # by a run that is resumed
            return
        if self.out_of_time():
            self.missing.append(f"{self.target} the programs of {name}".strip())
            return
        shown = f"{rate / self._devices(name):8.2f} requests/s per device"
        self.progress(f"{name:>14}  {shown}: running its programs")
        requests = self.source(rate)[: self.config.executed_requests]
        self.compile_system(name)
        log = EventLog()
        run = self.served[name].run(requests, observer=log)
        rows = [self._request_row(timeline) for timeline in run.timelines]
        expected = self.timed[name].run(requests, observer=None).timelines
        if _timelines(rows) != _timelines([to_row(t, self.slo) for t in expected]):
            raise RuntimeError(
                f"{point.name}: the programs' timelines are not those of their "
                "durations"
            )
        found |= {"executed": True, **padding(run.totals or {})}
        self.run_dir.save(point, found, rows, log.lines)

    def _request_row(self, timeline: Timeline) -> dict[str, Any]:
        row = to_row(timeline, self.slo)
        if self.config.weights == "random":
            return row
        if not isinstance(self.model.tokenizer, NoText):
            row["text"] = self.model.tokenizer.decode(timeline.tokens)
        return row

    def _runs(self, name: str) -> Runs:
        return {
            rate: [*map(self.run_dir.load, self._at(name, rate, seeds))]
            for rate, seeds in sorted(self.tried[name].items())
        }

    # -- summary ------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        judge, runs = self.judge, {name: self._runs(name) for name in self.names}
        devices = {name: self._devices(name) for name in self.names}
        systems = {
            name: system_summary(
                judge, self.config.systems[name].deployment, devices[name], found
            )
            for name, found in runs.items()
        }
        wall = self.config.clock == "wall"
        return {
            "model": self.config.model,
            "clock": self.config.clock,
            "durations": "live" if wall else self.config.durations,
            "slo": dataclasses.asdict(self.slo),
            "criterion": self.config.criterion,
            "target": self.good.target,
            "num_requests": self.config.workload.num_requests,
            "num_seeds": max(max(tried.values()) for tried in self.tried.values()),
            "looks": list(self.looks),
            "confidence": judge.confidence,
            "apart": judge.apart,
            "executed": self.config.executed,
            "executed_requests": self.config.executed_requests,
            **({"trace": self.source.trace} if self.source.trace else {}),
            **({"no_intervals": why} if (why := self.source.why_dependent) else {}),
            "choices": {name: list(said) for name, said in self.choices.items()},
            "too_slow_s": dict(self.too_slow_s),
            "systems": systems,
            "ratios": ratios(systems, judge.across),
            "pairs": pairs(judge, systems),
            "criteria": {
                name: ranked(judge, (name, criterion), runs, devices)
                for name, criterion in self.criteria.items()
            },
        }


def _timelines(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the parts of requests' rows that do not depend on tokens, as in a file."""
    kept = [
        {key: row[key] for key in row if key not in ("tokens", "text")} for row in rows
    ]
    return json.loads(json.dumps(kept))
