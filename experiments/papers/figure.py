"""Defines a reproduced figure: the runs it needs, its curves, and its claims."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from disagg_jax.errors import require
from disagg_jax.sim import Simulation
from experiments.cli.progress import ProgressLines
from experiments.cli.workers import Workers, open_workers
from experiments.report.panel import Panel

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the report."""

    claim: str  # what the paper says; "beyond" where it says nothing
    paper: str
    ours: str  # from the runs
    why: str  # where they differ
    runs: str  # requests, seeds, system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure's curves and claims, from its runs."""

    panels: Sequence[Panel]
    claims: Sequence[Claim]
    # How far the durations of its simulations were from measurements, in words.
    checked: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab:
    """How runs are done, the same for all figures."""

    num_requests: int | None = None  # instead of each figure's own
    seeds: int = 5
    workers: Workers | None = None  # None is one for each core
    progress: ProgressLines = ProgressLines(show=lambda line: None)
    # "Low" or "High" -> devices -> seconds, measured elsewhere; None: not run.
    search_times: Mapping[str, Mapping[str, float]] | None = None
    engine: str | None = None  # of `get_engine`: whose overheads rooflines have

    def __post_init__(self) -> None:
        for name, least in (("num_requests", 4), ("seeds", 1), ("workers", 1)):
            value = getattr(self, name)
            if isinstance(value, int):
                require(value >= least, f"{name}: expected >= {least}", value)

    def roofline(self, model: str, hardware: str, **fields: Any) -> Simulation:
        """Simulate a model on hardware by a roofline with the lab's engine.

        Args:
          fields: of `Simulation.of`, such as the policies of a paper.
        """
        return Simulation.of(model, hardware, engine=self.engine, **fields)

    def requests(self, default: int) -> int:
        """Return the requests of a run for which the figure says `default`."""
        return self.num_requests or default

    def by_seed(
        self, task: Callable[[Any], Result], runs: Mapping[Key, Any]
    ) -> dict[Key, list[Result]]:
        """Do a task for each run with every seed, the longest first; results by seed.

        Args:
          runs: key -> a dataclass with `num_requests` and a seed, which is replaced.
        """
        asked = {
            (key, seed): dataclasses.replace(run, seed=seed)
            for key, run in runs.items()
            for seed in range(self.seeds)
        }
        order = sorted(asked, key=lambda at: -asked[at].num_requests)
        found = self.map(task, {at: asked[at] for at in order})
        return {key: [found[key, seed] for seed in range(self.seeds)] for key in runs}

    def size(self, default: int) -> str:
        """Write the requests and seeds of a run, for a claim."""
        return f"N={self.requests(default)} x {self.seeds} seeds"

    def map(
        self, task: Callable[[Item], Result], items: Mapping[Key, Item]
    ) -> dict[Key, Result]:
        """Do a task for each item in worker processes, and show the progress."""
        workers = self.workers or os.cpu_count() or 1
        if isinstance(workers, int):
            workers = min(workers, max(1, len(items)))
        found: list[Result] = []
        self.progress.step("runs", 0, len(items))
        with open_workers(workers) as mapper:
            for result in mapper(task, list(items.values())):
                found.append(result)
                self.progress.step("runs", len(found), len(items))
        return dict(zip(items, found, strict=True))


RUNS = ("num_requests", "seeds", "workers")
ROOFLINE = (*RUNS, "engine")


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure or table that can be reproduced."""

    title: str
    make: Callable[[Lab], Drawn]
    # What of a lab decides its numbers, or how fast they are made.
    reads: Sequence[str] = RUNS
