"""A run directory of a sweep, read."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from disagg_jax.deployment import Deployment
from disagg_jax.errors import require
from disagg_jax.formats import RUN
from disagg_jax.scheduling import find_system
from experiments.runs.folder import read_json


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """One run of a sweep."""

    system: str
    rate_rps: float  # of the whole deployment
    seed: int  # of its requests: the config's, or one of those after it
    target: str = ""  # whose step sizes the system has; "" where there is one target

    @property
    def name(self) -> str:
        """Return the path of its files below `points/`, without their endings."""
        folder = f"{self.target}/" if self.target else ""
        return f"{folder}{self.system}-{self.rate_rps!r}rps-{self.seed}"

    @property
    def fields(self) -> dict[str, Any]:
        """Return what a row of `requests.jsonl` says of its run."""
        fields = dataclasses.asdict(self)
        target = fields.pop("target")
        return {"target": target, **fields} if target else fields


@dataclasses.dataclass(frozen=True)
class PickedPoint:
    """A point as a user names it."""

    point: Point
    deployment: Deployment
    rate_rps: str  # per device, as in table.txt
    seed: int


# Endings of the files of a point whose programs ran.
REQUESTS, EVENTS = ".requests.jsonl.gz", ".events.jsonl.gz"
_BY_SEED = 2  # the oldest format in which files are named by `Point.name`
# `Point.name`
_POINT = re.compile(r"(?:(.+?)/)?(.+?)-([0-9.]+(?:e[+-][0-9]+)?)rps-([0-9]+)")


class SavedRun:
    """Reads a run directory, also of formats before today's."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._points = path / "points"

    @functools.cached_property
    def _first_number(self) -> int:
        """Return the seed whose files are numbered 0: the first, before `_BY_SEED`."""
        written = self.read_json("config.json") or {}
        return written.get("seed", 0) if RUN.number_of(written) < _BY_SEED else 0

    def _file(self, point: Point, ending: str) -> pathlib.Path:
        numbered = dataclasses.replace(point, seed=point.seed - self._first_number)
        return self._points / f"{numbered.name}{ending}"

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, or None if there is no file."""
        return read_json(self.path / name)

    def config(self) -> dict[str, Any]:
        """Return the config.

        Raises:
          ValueError: if this is no run directory, or one of another format.
        """
        config = self.read_json("config.json")
        require(config is not None, "--run: expected a run directory", str(self.path))
        return RUN.read(config)

    def table_of(self, config: Mapping[str, Any]) -> str | None:
        """Return the table of a run that has ended; None if it has not.

        It is None too for a run of another config or format, which `record_start`
        refuses.

        Args:
          config: what was asked, without what was read of a trace.
        """
        written, table = self.read_json("config.json"), self.path / "table.txt"
        if not table.exists() or RUN.number_of(written or {}) != RUN.number:
            return None
        asked = json.loads(json.dumps(config))
        before = RUN.read(written)
        before.pop("trace", None)
        summary = self.read_json("summary.json")
        ended = summary is not None and "missing" not in summary and before == asked
        return table.read_text().rstrip("\n") if ended else None

    def expect_resumable(self) -> None:
        """Raise ValueError if there is a run of an older format, naming the format."""
        written = self.read_json("config.json")
        number = RUN.number if written is None else RUN.number_of(written)
        if number < RUN.number:
            raise ValueError(
                f"--out: '{self.path}' holds a run of format {number}, which can be "
                "read but not resumed; expected an empty directory, or format "
                f"{RUN.number}"
            )

    def has(self, point: Point) -> bool:
        return self._file(point, ".json").exists()

    def points(self) -> list[Point]:
        """Return the points that are done."""
        paths = [path.relative_to(self._points) for path in self._points.rglob("*")]
        names = [str(path)[:-5] for path in paths if path.suffix == ".json"]
        found = [match.groups() for name in names if (match := _POINT.fullmatch(name))]
        return sorted(
            Point(name, float(rate), self._first_number + int(i), target or "")
            for target, name, rate, i in found
        )

    def load(self, point: Point) -> dict[str, Any]:
        """Return the metrics of a point that is done."""
        return json.loads(self._file(point, ".json").read_text())

    def has_requests(self, point: Point) -> bool:
        """Return whether a point's requests and events were kept."""
        return self._file(point, REQUESTS).exists()

    def requests(self, point: Point) -> list[dict[str, Any]]:
        """Return the requests that were kept of a point."""
        return [json.loads(line) for line in self.request_lines(point)]

    def request_lines(self, point: Point) -> Iterator[str]:
        """Return the same as lines of JSON."""
        return _read_gz(self._file(point, REQUESTS))

    def events(self, point: Point) -> Iterator[str]:
        """Return the event log that was kept of a point."""
        return _read_gz(self._file(point, EVENTS))

    def kept(self, target: str | None) -> tuple[str, list[Point]]:
        """Return a target, by default the first, and its points with requests.

        Raises:
          ValueError: naming the targets there are, if it is none of them.
        """
        kept = [p for p in self.points() if self.has_requests(p)]
        targets = sorted({p.target for p in kept}, reverse=True) or [""]
        target = targets[0] if target is None else target
        require(target in targets, f"--target: expected one of {targets}", target)
        return target, [point for point in kept if point.target == target]

    def pick(
        self,
        system: str,
        rate_rps: float | None,
        seed: int | None,
        target: str | None = None,
    ) -> PickedPoint:
        """Return the point of `system` at a rate and a seed, if its requests are kept.

        Args:
          rate_rps: per device; None is the highest that passes.
          seed: None is the first.
          target: None is the first of the run's.

        Raises:
          ValueError: naming the runs there are, if there is no such run.
        """
        config = self.config()
        names = sorted(config["systems"])
        system = find_system(system, names)
        require(system in names, f"--system: expected one of {names}", system)
        deployment = Deployment.parse(config["systems"][system]["deployment"])
        target, kept = self.kept(target)
        rates: dict[str, list[Point]] = {}  # by the rate per device
        for point in kept:
            if point.system == system:
                shown = _shown(point.rate_rps / deployment.devices)
                rates.setdefault(shown, []).append(point)
        asked = _shown(rate_rps) if rate_rps is not None else None
        asked = asked or self._passing(system, rates, target)
        require(asked in rates, f"--rate: expected one of {list(rates)}", asked)
        seeds = {point.seed: point for point in rates[asked]}
        asked_seed: int = config["seed"] if seed is None else seed
        require(
            asked_seed in seeds, f"--seed: expected one of {list(seeds)}", asked_seed
        )
        return PickedPoint(seeds[asked_seed], deployment, asked, asked_seed)

    def _passing(self, system: str, rates: Iterable[str], target: str) -> str:
        """Return the rate per device that a system is judged by."""
        known = f"--rate: expected one of {list(rates)}, or a run with one that passes"
        summary = self.read_json("summary.json")
        require(summary is not None, known, "no summary.json")
        found = by_target(summary)[target]["systems"][system]
        if "throughput" in found:
            return _shown(found["throughput"]["best_rps_per_device"])
        rate = found["goodput"]["pass_rps_per_device"]
        require(rate is not None, known, rate)
        return _shown(rate)


def by_target(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of each target by its name; "" of a single one."""
    return summary["targets"] if "targets" in summary else {"": summary}


def _shown(rate_rps: float) -> str:
    """Format a rate per device; rates of a deployment are tried with four digits."""
    return f"{rate_rps:.6g}"


def _read_gz(path: pathlib.Path) -> Iterator[str]:
    with gzip.open(path, "rt") as file:
        yield from file
