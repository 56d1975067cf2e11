"""The run directory of a sweep: its config, its points and its results."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from disagg_jax.deployment import Deployment
from disagg_jax.errors import require
from disagg_jax.formats import RUN
from disagg_jax.scheduling import find_system
from experiments.runs import folder
from experiments.runs.folder import (
    read_json,
    record_start,
    whole,
    write_json,
    write_text,
)


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """One run of a sweep."""

    system: str
    rate_rps: float  # of the whole deployment
    replica: int  # 0, 1, ...: the run's seed is the config's plus this
    target: str = ""  # whose step sizes the system has; "" where there is one target

    @property
    def name(self) -> str:
        """Return the path of its files below `points/`, without their endings."""
        folder = f"{self.target}/" if self.target else ""
        return f"{folder}{self.system}-{self.rate_rps!r}rps-{self.replica}"

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


# `Point.name`
_POINT = re.compile(r"(?:(.+?)/)?(.+?)-([0-9.]+(?:e[+-][0-9]+)?)rps-([0-9]+)")


class SavedRun:
    """Reads a run directory."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._points = path / "points"

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

    def has(self, point: Point) -> bool:
        return (self._points / f"{point.name}.json").exists()

    def points(self) -> list[Point]:
        """Return the points that are done."""
        paths = [path.relative_to(self._points) for path in self._points.rglob("*")]
        names = [str(path)[:-5] for path in paths if path.suffix == ".json"]
        found = [match.groups() for name in names if (match := _POINT.fullmatch(name))]
        return sorted(
            Point(name, float(rate), int(i), target or "")
            for target, name, rate, i in found
        )

    def load(self, point: Point) -> dict[str, Any]:
        """Return the metrics of a point that is done."""
        return json.loads((self._points / f"{point.name}.json").read_text())

    def has_requests(self, point: Point) -> bool:
        """Return whether a point's requests and events were kept."""
        return (self._points / f"{point.name}.requests.jsonl.gz").exists()

    def requests(self, point: Point) -> list[dict[str, Any]]:
        """Return the requests that were kept of a point."""
        path = self._points / f"{point.name}.requests.jsonl.gz"
        return [json.loads(line) for line in _read_gz(path)]

    def events(self, point: Point) -> Iterator[str]:
        """Return the event log that was kept of a point."""
        return _read_gz(self._points / f"{point.name}.events.jsonl.gz")

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
        seeds = {config["seed"] + point.replica: point for point in rates[asked]}
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


class RunDir(SavedRun):
    """Writes a run directory; a killed run goes on where it was.

    `config.json`, `env.json` and `step_times.json` are written first; each point's
    files appear whole or not at all; `requests.jsonl` and `summary.json` come last. The
    requests and events of a point are kept where its programs ran.

    Raises:
      ValueError: if `path` cannot be written, or holds a run of another config.
    """

    def __init__(self, path: pathlib.Path, config: dict[str, Any]):
        super().__init__(path)
        try:
            self._points.mkdir(parents=True, exist_ok=True)
            write_text(path / ".writable", "")
            (path / ".writable").unlink()
        except OSError as error:
            raise ValueError(f"--out: cannot write to '{path}': {error}") from error
        record_start(path, config, environment())

    def write_json(self, name: str, content: Any) -> None:
        write_json(self.path / name, content)

    def save(
        self,
        point: Point,
        metrics: dict[str, Any],
        requests: Sequence[dict[str, Any]] = (),
        events: Iterable[str] = (),
    ) -> None:
        """Save a point's requests, event log and metrics; the metrics mark it done.

        Without requests there are files of neither.
        """
        marker = self._points / f"{point.name}.json"
        marker.parent.mkdir(exist_ok=True)
        marker.unlink(missing_ok=True)  # while its files are replaced it is not done
        if requests:
            lines = (json.dumps({**point.fields, **row}) for row in requests)
            _write_gz(self._points / f"{point.name}.requests.jsonl.gz", lines)
            _write_gz(self._points / f"{point.name}.events.jsonl.gz", events)
        write_text(marker, json.dumps(metrics, indent=1, allow_nan=False))

    def write_requests(self, points: Iterable[Point]) -> None:
        """Write `requests.jsonl`: a line for each request that is kept of `points`."""
        with whole(self.path / "requests.jsonl") as temporary:
            with temporary.open("w") as file:
                for point in filter(self.has_requests, points):
                    path = self._points / f"{point.name}.requests.jsonl.gz"
                    file.writelines(_read_gz(path))


def environment() -> dict[str, Any]:
    """Return where and when this runs, which may differ between equal configs."""
    return {
        **folder.environment(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _shown(rate_rps: float) -> str:
    """Format a rate per device; rates of a deployment are tried with four digits."""
    return f"{rate_rps:.6g}"


def _write_gz(path: pathlib.Path, lines: Iterable[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    with whole(path) as temporary:
        # No time stamp: equal content, equal bytes.
        temporary.write_bytes(gzip.compress(data, compresslevel=1, mtime=0))


def _read_gz(path: pathlib.Path) -> Iterator[str]:
    with gzip.open(path, "rt") as file:
        yield from file
