"""Writes what a single cell asks besides its winner: layouts, and how many devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disagg_jax.metrics import Interval
from disagg_jax.search.comparison import SystemResult
from disagg_jax.search.fewest import Demand, FewestDevices
from experiments.report.intervals import interval_text, number
from experiments.report.table import align
from experiments.runs.folder import plain

_POINTS = ("p50", "p90", "p99")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateAnswer:
    """On how many devices each system serves a rate."""

    demand: Demand
    own: bool  # whether the rate is the trace's own
    found: Sequence[FewestDevices]

    @property
    def rate(self) -> str:
        """Write the rate and whose it is."""
        whose = ", the trace's own rate" if self.own else ""
        return f"{self.demand.rate_rps:.4g} requests/s{whose}"


def layouts(found: Sequence[SystemResult]) -> str:
    """Write a row for every layout of every system."""
    head = ("system", "layout", "requests/s per device", "seeds", "")
    rows = [
        (one.system, row["candidate"], *_goodput(row))
        for one in found
        for row in one.candidates
    ]
    return "\n".join(
        [
            "all layouts that were tried; 95 % intervals over the first seeds",
            *align([head, *rows]),
        ]
    )


def _goodput(row: Mapping[str, Any]) -> tuple[str, str, str]:
    seeds = f"{len(row['seeds'])}"
    if row["goodput"] is None:
        return f"<= {row['at_most']:.3g}", seeds, row["why"]
    low, high = row["interval"]
    interval = Interval(mean=row["goodput"], low=low, high=high)
    return interval_text(interval, ".3g"), seeds, _doubt(row)


def _doubt(row: Mapping[str, Any]) -> str:
    """Say where a goodput ends at the rates that were tried, or depends on them."""
    ends = "" if row["bracketed"] else "a seed passes or fails at every rate tried"
    return "; ".join(filter(None, [ends, row["inversion"]]))


def fewest(served: RateAnswer) -> str:
    """Write on how many devices a system serves the rate, and its latencies there."""
    demand = served.demand
    head = ("system", "devices", "deployment", "good", "TTFT P50, P90, P99 (s)")
    rows = [_fewest_row(one, demand.max_devices) for one in served.found]
    runs = f"{len(demand.seeds)} run{'s' if len(demand.seeds) > 1 else ''}"
    return "\n".join(
        [
            f"the fewest devices that serve {served.rate}; at most "
            f"{demand.max_devices} are tried",
            f"whole deployments simulated at that rate: {runs} of "
            f"{demand.num_requests} requests",
            "of a number of devices all deployments with the layouts above, but for "
            "those that cannot by a bound:",
            "an estimate of the capacity, with a margin; simulations of prefill and of "
            "decode alone",
            *align([(*head, "TPOT P50, P90, P99 (ms)", "fewer"), *rows]),
        ]
    )


def _fewest_row(one: FewestDevices, most: int) -> tuple[str, ...]:
    best = one.best
    if best is None:
        return (one.system, f"> {most}", "-", "-", "-", "-", why_none(one, most))
    return (
        one.system,
        f"{best.devices}",
        best.deployment,
        f"{best.attainment:.1%}",
        _latencies(best.ttft_s, ".3g", 1.0),
        _latencies(best.tpot_s, ".3g", 1e-3),
        why_not_fewer(one),
    )


def _latencies(values: Mapping[str, float | None], form: str, unit: float) -> str:
    return ", ".join(number(values.get(point), form, unit) for point in _POINTS)


def why_not_fewer(one: FewestDevices) -> str:
    """Say what is known of fewer devices."""
    assert one.best is not None
    if one.best.devices == one.least:
        return "there is no smaller deployment"
    if one.below is None:
        return f"bound: fewer than {one.bound} cannot"
    return f"{one.below.devices} are too few, as simulated"


def why_none(one: FewestDevices, most: int) -> str:
    """Say why no number of devices was found."""
    if one.below is not None:
        return f"{one.below.devices} are too few, as simulated"
    if one.least == 0:
        return "no layout meets the targets, even alone"
    return f"bound: {most} cannot"


def sentence(served: RateAnswer) -> str:
    """Say on how many devices each system serves the rate."""
    found = sorted(served.found, key=_devices)
    counts = ", ".join(_count(one, served.demand.max_devices) for one in found)
    return f"For {served.rate}, devices needed: {counts}."


def _devices(one: FewestDevices) -> float:
    return one.best.devices if one.best else float("inf")


def _count(one: FewestDevices, most: int) -> str:
    return f"{one.system} {one.best.devices if one.best else f'more than {most}'}"


def record(served: RateAnswer) -> dict[str, Any]:
    """Return what was found, ready for JSON."""
    return {
        "rate_rps": served.demand.rate_rps,
        "own_rate": served.own,
        "demand": plain(served.demand),
        "systems": [{**plain(one), "below": plain(one.below)} for one in served.found],
    }


def left_out(parts: Iterable[str]) -> str:
    """Say what the time did not suffice for; '' for nothing."""
    said = "; ".join(parts)
    return f"Left out, as the time of --minutes was spent: {said}." if said else ""
