"""What `placement_search` asks and shows: problems, algorithms, tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.errors import require
from disagg_jax.metrics import SLO, Interval
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.search import placement
from disagg_jax.search.goodput import SimGoodput
from disagg_jax.search.placement import Layout, Outcome, Problem
from disagg_jax.sim.workers import Mapper
from experiments.configs.named_simulations import (
    Simulation,
    distserve_profile,
    link_inside,
)
from experiments.configs.shapes import get_shape
from experiments.report.intervals import interval_text

ALGORITHMS = ("high", "low", "joint")
_HARDWARE = {"a100": "a100-80g"}  # short names
_APART = "disaggregated"  # the system of prefill and decode instances
_SHOWN = 12  # rows of each table that are printed

# ---- the question --------------------------------------------------------------------


def simulation_of(model: str, hardware: str) -> Simulation:
    """How a model is simulated on a device: one cost model for all systems.

    Raises:
      ValueError: on an unknown name.
    """
    device = _HARDWARE.get(hardware, hardware)
    measured = distserve_profile().fits["distserve"]
    fitted = device == "a100-80g" and model in measured
    return Simulation(
        model=model,
        cost="fitted/distserve" if fitted else f"roofline/{device}",
        inside=link_inside(device),
    )


def layouts_of(model: str, devices: int, node_devices: int) -> tuple[Layout, ...]:
    """tp inside a node; pp divides the layers, as in DistServe's own search."""
    layers = get_shape(model).layers
    return tuple(
        Layout(tp, pp)
        for tp in range(1, min(devices, node_devices) + 1)
        for pp in range(1, devices // tp + 1)
        if layers % pp == 0
    )


def parse_slo(text: str) -> SLO:
    """Reads 'TTFT_S,TPOT_S'.

    Raises:
      ValueError: on anything else.
    """
    try:
        ttft_s, tpot_s = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"slo: expected TTFT_S,TPOT_S, got '{text}'") from None
    return SLO(ttft_s=ttft_s, tpot_s=tpot_s)


def problem_of(simulation: Simulation, devices: int, **fields: Any) -> Problem:
    """The problem of placing a simulation's model on `devices` devices."""
    colocated = {
        name: dataclasses.replace(simulation, policies=policies).build
        for name, policies in SYSTEMS.items()
        if set(policies) == {Role.COLOCATED}
    }
    return Problem(
        build=simulation.build,
        colocated=colocated,
        layouts=layouts_of(simulation.model, devices, simulation.node_devices),
        devices=devices,
        node_devices=simulation.node_devices,
        **fields,
    )


# ---- the search ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Runs the algorithms of a problem."""

    problem: Problem
    mapper: Mapper
    progress: Callable[[str], None]
    prune: bool = True
    whole: bool = False  # simulate Algorithm 1's answer as a whole, too

    def run(self, algorithms: Sequence[str]) -> dict[str, Any]:
        """The tables and winners, ready for JSON.

        Raises:
          ValueError: if no layout fits, or no candidate meets the targets.
        """
        layouts, skipped = self.problem.feasible()
        reasons = "; ".join(reasons_of({str(k): why for k, why in skipped.items()}))
        fits = "layouts: expected at least one that fits"
        require(len(layouts) > 0, f"{fits} ({reasons})", "none")
        found: dict[str, Any] = {"skipped": {str(k): v for k, v in skipped.items()}}
        least = min(layout.devices for layout in layouts)
        room = self.problem.devices - least  # what the other phase leaves
        paired = [layout for layout in layouts if layout.devices <= room]
        # The joint search lives on good bounds: there phases are searched in full.
        prune = self.prune and "joint" not in algorithms
        prefill, decode = (
            self._phase(role, paired, prune) for role in (Role.PREFILL, Role.DECODE)
        )
        phases = placement.phase_rates(prefill), placement.phase_rates(decode)
        if "high" in algorithms:
            found["high"] = self._high(prefill, decode)
        if "low" in algorithms:
            pairs = placement.low_affinity_candidates(self.problem, paired, phases)
            found["low"] = self._units("low", pairs)
        if "joint" in algorithms:
            units = [
                *placement.joint_candidates(self.problem, paired, phases),
                *placement.colocated_candidates(self.problem, layouts),
            ]
            found["joint"] = self._units("joint", units)
        return found

    def _phase(
        self, role: Role, layouts: Sequence[Layout], prune: bool
    ) -> list[Outcome]:
        candidates = placement.phase_candidates(self.problem, layouts, role)
        outcomes = self._best(f"{role} alone", candidates, prune)
        if outcomes:
            expect_reachable(outcomes, f"{role} alone")
        return outcomes

    def _best(
        self, name: str, candidates: Sequence[placement.Candidate], prune: bool
    ) -> list[Outcome]:
        return placement.best_first(
            candidates,
            self.mapper,
            lambda text: self.progress(f"{name}: {text}"),
            prune=prune,
        )

    def _high(
        self, prefill: Sequence[Outcome], decode: Sequence[Outcome]
    ) -> dict[str, Any]:
        p, d = self._fitting(prefill, decode)
        n, m = placement.replicas(
            p, d, devices=self.problem.devices, rate_rps=self.problem.rate_rps
        )
        devices = int(n * p.candidate.devices + m * d.candidate.devices)
        served = min(n * rps_of(p), m * rps_of(d))
        deployment = f"{n}x{p.candidate.name},{m}x{d.candidate.name}"
        return {
            "winner": deployment,
            "system": _APART,
            "deployment": deployment,
            "devices": devices,
            "goodput_rps": served,
            "goodput_per_device_rps": served / devices,
            "prefill": [row(outcome) for outcome in prefill],
            "decode": [row(outcome) for outcome in decode],
            "as a whole": self._as_a_whole((p, n), (d, m), served),
        }

    def _as_a_whole(
        self, prefill: tuple[Outcome, int], decode: tuple[Outcome, int], served: float
    ) -> list[dict[str, Any]]:
        """The goodput of all instances together, which Algorithm 1 does not look at."""
        (p, n), (d, m) = prefill, decode
        if not self.whole or p.candidate.layout is None or d.candidate.layout is None:
            return []
        unit = placement.pair(p.candidate.layout, d.candidate.layout, n, m)
        asked = self.problem.ask(self.problem.build(unit), unit.devices)
        candidate = placement.Candidate(
            name=str(unit),
            search=dataclasses.replace(asked, start_rps=served),
            devices=unit.devices,
        )
        return [row(outcome) for outcome in self._best("whole", [candidate], False)]

    def _fitting(
        self, prefill: Sequence[Outcome], decode: Sequence[Outcome]
    ) -> tuple[Outcome, Outcome]:
        """The best of both; where they do not fit, the best that were found and do."""
        room = math.inf if self.problem.rate_rps else self.problem.devices
        pairs = [
            (p, d)
            for p in prefill
            for d in decode
            if p.won and d.won and p.candidate.devices + d.candidate.devices <= room
        ]
        expected = "high: expected devices for the best layout of each phase"
        require(len(pairs) > 0, expected, self.problem.devices)
        return max(pairs, key=lambda pair: min(o.per_device_rps for o in pair))

    def _units(self, name: str, units: Sequence[placement.Candidate]) -> dict[str, Any]:
        expected = f"{name}: expected devices for a prefill and a decode instance"
        require(len(units) > 0, expected, self.problem.devices)
        outcomes = self._best(name, units, self.prune)
        expect_reachable(outcomes, name)
        best = outcomes[0]
        unit = best.candidate.search.simulated.deployment
        copies = best.candidate.copies
        if self.problem.rate_rps is not None:
            copies = math.ceil(self.problem.rate_rps / rps_of(best))
        return {
            "winner": best.candidate.name,
            "system": _system_of(best.candidate, unit),
            "deployment": str(Deployment(copies * unit.instances)),
            "copies": copies,
            "devices": copies * unit.devices,
            "goodput_rps": copies * rps_of(best),
            "goodput_per_device_rps": best.per_device_rps,
            "candidates": [row(outcome) for outcome in outcomes],
        }


def _system_of(candidate: placement.Candidate, unit: Deployment) -> str:
    """The name in `SYSTEMS` of what runs on a unit; a colocated one's name has it."""
    return candidate.name.split()[0] if unit.of(Role.COLOCATED) else _APART


def rps_of(outcome: Outcome) -> float:
    """The goodput of one unit."""
    return outcome.per_device_rps * outcome.candidate.devices


def expect_reachable(outcomes: Sequence[Outcome], name: str) -> None:
    """Raises a ValueError if the targets are below every unloaded latency."""
    if outcomes[0].won:
        return
    scales = {
        outcome.goodput.unloaded_scale: outcome.candidate.name
        for outcome in outcomes
        if outcome.goodput is not None
    }
    scale = min(scales)
    raise ValueError(
        f"slo: expected targets that {name} can meet, got ones below the unloaded "
        f"latency: the fastest, {scales[scale]}, needs {scale:.3g} times as much for "
        "requests that are served alone"
        if scale > 1
        else f"slo: expected targets that {name} can meet under load; the fastest, "
        f"{scales[scale]}, meets them only for requests that are served alone"
    )


# ---- what is shown -------------------------------------------------------------------


def row(outcome: Outcome) -> dict[str, Any]:
    """What is reported of a candidate; goodputs per device."""
    candidate, goodput = outcome.candidate, outcome.goodput
    shown: dict[str, Any] = {
        "candidate": candidate.name,
        "devices": candidate.devices,
        "num_requests": candidate.search.num_requests,
        "seeds": list(candidate.search.seeds),
        "at_most": outcome.at_most_rps / candidate.devices,
    }
    if goodput is None or not outcome.won:
        reason = "bound" if goodput is None else "beaten"
        if goodput is not None and goodput.unloaded_scale > 1:
            reason = f"alone it needs {goodput.unloaded_scale:.3g} x the targets"
        return {**shown, "goodput": None, "why": reason}
    interval = goodput.found.interval
    return {
        **shown,
        "goodput": outcome.per_device_rps,
        "interval": [
            None if end is None else end / candidate.devices
            for end in (interval.low, interval.high)
        ],
        "resolved": goodput.found.resolved,
        "bracketed": goodput.found.bracketed,
        "steady": goodput.steady,
        "inversion": _inversion(goodput, candidate.devices),
    }


def _inversion(goodput: SimGoodput, devices: float) -> str | None:
    found = goodput.found.inversion
    return None if found is None else found.text(devices)


def lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """A table as text."""
    head = f"  {'candidate':<36}{'devices':>8}  {'requests/s/device':<28}{'N':>6} seeds"
    body = [
        f"  {r['candidate']:<36}{r['devices']:>8.4g}  {_figure(r):<28}"
        f"{r['num_requests']:>6} {len(r['seeds'])}{_marks(r)}"
        for r in table[:_SHOWN]
    ]
    more = len(table) - _SHOWN
    return [head, *body, *([f"  ... and {more} more"] if more > 0 else [])]


def _figure(shown: dict[str, Any]) -> str:
    if shown["goodput"] is None:
        return f"<= {shown['at_most']:.3g} ({shown['why']})"
    low, high = shown["interval"]
    return interval_text(Interval(mean=shown["goodput"], low=low, high=high), ".3g")


def _marks(shown: dict[str, Any]) -> str:
    marks = ("resolved", "bracketed", "steady")
    missing = [f"not {mark}" for mark in marks if shown.get(mark) is False]
    if shown.get("inversion"):
        missing.append(shown["inversion"])
    return "  " + ", ".join(missing) if missing else ""


def reasons_of(skipped: Mapping[str, str]) -> list[str]:
    """Why layouts are left out, those with one reason together."""
    layouts: dict[str, list[str]] = {}
    for layout, why in skipped.items():
        reason = why.rpartition(", got")[0].removeprefix(f"{layout}: ")
        layouts.setdefault(reason, []).append(layout)
    return [f"{' '.join(names)}: {reason}" for reason, names in layouts.items()]


def report(found: dict[str, Any]) -> str:
    """All tables and winners as text."""
    text = [f"skipped {line}" for line in reasons_of(found["skipped"])]
    for name in ALGORITHMS:
        if name not in found:
            continue
        result = found[name]
        for table in ("prefill", "decode", "as a whole", "candidates"):
            if result.get(table):
                text += ["", f"{name}: {table}", *lines(result[table])]
        copies = f"{result['copies']} x " if "copies" in result else ""
        text.append(
            f"{name}: {copies}{result['winner']} on {result['devices']} devices: "
            f"{result['goodput_rps']:.3g} requests/s, "
            f"{result['goodput_per_device_rps']:.3g} per device"
        )
    return "\n".join(text)
