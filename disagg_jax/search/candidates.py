"""Deployments to choose from, searched best first.

A candidate is first simulated at the rate at which it would beat the best so far, and
searched further only if it passes there. A candidate whose bound cannot win is not
simulated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from disagg_jax.deployment import Parallelism
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput
from disagg_jax.sim.workers import Mapper

# Why a candidate has no goodput: it failed at the rate to beat, or was not simulated.
BEATEN, BOUND = "beaten", "bound"
# Candidates between two updates of the best; fixed, so that the number of workers does
# not matter. The first batch has nothing to beat, so it is searched in full.
_FIRST, _AT_ONCE = 2, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A deployment, or a phase of one, to rank by its goodput per device."""

    name: str
    search: GoodputSearch
    devices: float  # divisor of its goodput
    bound_rps: float = math.inf  # its goodput is at most this
    copies: int = 1  # copies that fit on all devices
    layout: Parallelism | None = None  # of a phase alone
    system: str = ""  # whose it is, where several are searched together


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """The goodput of a candidate, as far as the search needed it."""

    candidate: Candidate
    goodput: SimGoodput | None  # None: not simulated, since its bound does not win
    had_to_beat: bool = False  # the best so far, to be searched any further

    @property
    def per_device_rps(self) -> float:
        """Return the goodput per device; 0 if it did not beat the best at its turn."""
        if self.goodput is None or self.goodput.found.pass_rps is None:
            return 0.0
        return self.goodput.rps / self.candidate.devices

    @property
    def won(self) -> bool:
        """Return whether its goodput was found; if not, it is at most `at_most_rps`."""
        return self.per_device_rps > 0

    @property
    def rps(self) -> float:
        """Return the goodput of one copy; 0 if it did not beat the best at its turn."""
        return self.per_device_rps * self.candidate.devices

    @property
    def at_most_rps(self) -> float:
        """Return an upper bound of the goodput; inf if every rate tried passed."""
        if self.goodput is None:
            return self.candidate.bound_rps
        found = self.goodput.found
        if found.pass_rps is not None and found.fail_rps is None:
            return math.inf
        return max(found.interval.mean, found.fail_rps or 0.0)


def best_first(
    candidates: Sequence[Candidate],
    mapper: Mapper,
    progress: Progress = silent,
    *,
    part: str = "candidates",
    prune: bool = True,
    first: int = _FIRST,
    at_once: int = _AT_ONCE,
    stop: Stop = never,
) -> list[CandidateResult]:
    """Find the candidate with the highest goodput per device.

    Args:
      part: the name that `progress` is told.
      prune: without it all candidates are searched in full.
      first: candidates of the first batch.
      at_once: candidates of each later batch. With a mapper that runs one candidate at
        a time, 1 prunes most.
      stop: is asked before each batch but the first.

    Returns:
      A result for each candidate that was begun, the best first. If none has a goodput,
      none is `won`.
    """
    order = sorted(candidates, key=_promise, reverse=True)
    best, results = 0.0, list[CandidateResult]()
    progress(part, 0, len(order), "")
    while len(results) < len(order) and not (results and stop()):
        begin, size = len(results), at_once if results else first
        batch = order[begin : begin + size]
        to_beat = best if prune else 0.0
        live = [c for c in batch if not prune or c.bound_rps > best * c.devices]
        asked = [_to_beat(c, to_beat) for c in live]
        found = dict(zip(map(id, live), mapper(find_goodput, asked), strict=True))
        done = [
            CandidateResult(
                candidate=c, goodput=found.get(id(c)), had_to_beat=to_beat > 0
            )
            for c in batch
        ]
        results += done
        best = max(best, *(result.per_device_rps for result in done))
        if live or len(results) == len(order):
            said = f"best {best:.3g} requests/s per device"
            progress(part, len(results), len(order), said)
    return sorted(results, key=lambda r: (-r.per_device_rps, r.candidate.devices))


def _promise(candidate: Candidate) -> float:
    """Return the order of trial: an early good candidate saves the search of many."""
    rate = min(candidate.search.first_rps(), candidate.bound_rps)
    return rate / candidate.devices


def _to_beat(candidate: Candidate, best: float) -> GoodputSearch:
    if best == 0:
        return candidate.search
    return dataclasses.replace(candidate.search, must_beat_rps=best * candidate.devices)


def candidate_row(result: CandidateResult) -> dict[str, Any]:
    """Return the record of a candidate for JSON; goodputs are per device."""
    candidate, goodput = result.candidate, result.goodput
    shown: dict[str, Any] = {
        "candidate": candidate.name,
        "devices": candidate.devices,
        "num_requests": candidate.search.num_requests,
        "seeds": list(candidate.search.seeds),
        "at_most": result.at_most_rps / candidate.devices,
    }
    if goodput is None or not result.won:
        return {**shown, "goodput": None, "why": _why_none(result)}
    interval, inversion = goodput.found.interval, goodput.found.inversion
    return {
        **shown,
        "goodput": result.per_device_rps,
        "interval": [
            None if end is None else end / candidate.devices
            for end in (interval.low, interval.high)
        ],
        "resolved": goodput.found.resolved,
        "bracketed": goodput.found.bracketed,
        "steady": goodput.steady,
        "inversion": inversion and inversion.text(candidate.devices),
    }


def _why_none(result: CandidateResult) -> str:
    if result.goodput is None:
        return BOUND
    if result.goodput.unloaded_scale > 1:
        return f"alone it needs {result.goodput.unloaded_scale:.3g} x the targets"
    return BEATEN if result.had_to_beat else "fails at every rate that was tried"
