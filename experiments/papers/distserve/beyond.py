"""What DistServe's paper does not show: the number of requests, and of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from disagg_jax.metrics import interval_across
from experiments.configs.named_simulations import get_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.papers.distserve.published import SLOS, TARGET
from experiments.papers.figure import Claim, Drawn, Figure, Lab, Panel, Series, banded
from experiments.papers.runs import (
    Goodputs,
    Sweep,
    System,
    geometric,
    percent,
    run_systems,
)

_ONE_ENGINE = get_simulation("opt13b_a100")
_SHIPPED = get_simulation("simdistserve_opt13b")

# ---- goodput against the number of requests ----

_NUMBERS = (100, 300, 1000, 3000)
_BY_N = (
    System(
        label="DistServe, as shipped",
        simulation=_SHIPPED,
        deployment="prefill:tp2,decode:tp1",
        num_requests=0,
    ),
    System(
        label="DistServe, one engine",
        simulation=_ONE_ENGINE,
        deployment="prefill:tp2,decode:tp1",
        num_requests=0,
    ),
    System(
        label="vLLM policy, one engine",
        simulation=_ONE_ENGINE,
        deployment="colocated:tp1",
        num_requests=0,
    ),
)


def _rates(system: System, n: int) -> Sequence[float]:
    """Requests/s per GPU around the goodputs; far overload takes long to run."""
    if n < 1000:
        return geometric(1.2, 3.0, 8)
    colocated = system.deployment.startswith("colocated")
    return geometric(1.6, 2.6, 5) if colocated else geometric(1.25, 1.9, 5)


def goodput_n(lab: Lab) -> Drawn:
    """Goodput of the paper's OPT-13B chatbot by the length of the run."""
    numbers = _NUMBERS
    if lab.num_requests is not None:
        numbers = (lab.num_requests, 3 * lab.num_requests)
    found: dict[str, dict[float, Goodputs]] = {system.label: {} for system in _BY_N}
    for n in numbers:
        of_n = dataclasses.replace(lab, num_requests=n)
        workload = get_workload("sharegpt")
        for system in _BY_N:
            sweeps = run_systems(of_n, [system], workload, _rates(system, n))
            found[system.label][n] = sweeps[system.label].goodputs(SLOS["chat 13B"])
    series = [
        banded(label, {n: each.rates for n, each in by_n.items()}, colour)
        for colour, (label, by_n) in enumerate(found.items())
    ]
    panel = Panel(
        title="OPT-13B, ShareGPT, TTFT <= 0.25 s, TPOT <= 0.1 s; 95 % over seeds",
        x="requests of a run",
        y="goodput at 90 % (requests/s per GPU)",
        series=series,
        log_x=True,
    )
    claims = [_number_claim(lab, system, found[system.label]) for system in _BY_N]
    return Drawn(panels=[panel], claims=claims)


def _number_claim(lab: Lab, system: System, by_n: Mapping[float, Goodputs]) -> Claim:
    return Claim(
        claim=f"Beyond the paper: goodput against N ({system.label})",
        paper="2.30 rps per GPU from N=300" if system is _BY_N[0] else "-",
        ours="; ".join(f"N={n:g}: {each}" for n, each in by_n.items()),
        why="A short run ends before the queue of an overloaded decode GPU has grown: "
        "the published goodput is one of short runs",
        runs=f"{system.said(lab).rpartition(', ')[0]}, {lab.seeds} seeds, N as given",
    )


# ---- devices that a rate needs ----

_DEMANDS_RPS = (4.0, 8.0, 16.0)
_LONG_RUN = 1000
# Requests/s per GPU that bound what the systems can do here, generously.
_COLOCATED_RPS = (2.0, 4.5)
_SPLIT_RPS = (3.5, 9.0)


def devices(lab: Lab) -> Drawn:
    """The fewest GPUs that serve a rate within the SLO, by trying deployments."""
    colocated = {rps: _fewest(lab, rps, _colocated(rps)) for rps in _DEMANDS_RPS}
    split = {rps: _fewest(lab, rps, _split(rps)) for rps in _DEMANDS_RPS}
    kinds = {"colocated": colocated, "disaggregated": split}
    series = [
        Series(
            label=name,
            points=[
                (rps, _devices(sweep))
                for rps, sweep in by_rate.items()
                if sweep is not None
            ],
            colour=colour,
        )
        for (name, by_rate), colour in zip(kinds.items(), (1, 0), strict=True)
    ]
    panel = Panel(
        title="OPT-13B, 512 prompt and 64 output tokens, 0.4 s / 0.04 s, one engine",
        x="demand (requests/s)",
        y="GPUs needed for 90 % within the SLO",
        series=series,
    )
    claims = [
        _devices_claim(lab, rps, colocated[rps], split[rps]) for rps in _DEMANDS_RPS
    ]
    return Drawn(panels=[panel], claims=claims)


def _between(rps: float, bounds: tuple[float, float]) -> range:
    """Numbers of GPUs to try for a demand."""
    low, high = bounds
    return range(max(1, math.floor(rps / high)), math.ceil(rps / low) + 1)


def _colocated(rps: float) -> list[str]:
    return [f"{n}xcolocated:tp1" for n in _between(rps, _COLOCATED_RPS)]


def _split(rps: float) -> list[str]:
    """All splits that give each phase at least a third, fewest GPUs first."""
    return [
        f"{prefill}xprefill:tp1,{total - prefill}xdecode:tp1"
        for total in _between(rps, _SPLIT_RPS)
        for prefill in range(max(1, total // 3), total - max(1, total // 3) + 1)
        if prefill < total
    ]


def _devices(sweep: Sweep) -> int:
    instances = sweep.system.deployment.split(",")
    return sum(int(item.partition("x")[0]) for item in instances)


def _share(sweep: Sweep) -> list[float]:
    (shares,) = sweep.attainments(SLOS["toy"]).values()
    return shares


def _fewest(lab: Lab, rps: float, deployments: Sequence[str]) -> Sweep | None:
    """The first of the deployments, by GPUs and then by attainment, that serves."""
    systems = [
        System(
            label=deployment,
            simulation=_ONE_ENGINE,
            deployment=deployment,
            num_requests=_LONG_RUN,
            devices=1,  # the rate is the whole demand
        )
        for deployment in deployments
    ]
    workload = get_workload("fixed:512x64")
    sweeps = run_systems(lab, systems, workload, [rps]).values()
    means = {id(sweep): interval_across(_share(sweep)).mean for sweep in sweeps}
    serving = [sweep for sweep in sweeps if means[id(sweep)] >= TARGET]
    return min(serving, key=lambda s: (_devices(s), -means[id(s)]), default=None)


def _devices_claim(
    lab: Lab, rps: float, colocated: Sweep | None, split: Sweep | None
) -> Claim:
    found = [s for s in (colocated, split) if s is not None]
    ours = " against ".join(
        f"{_devices(s)} GPUs ({s.system.deployment}: {percent(_share(s))} attain)"
        for s in found
    )
    return Claim(
        claim=f"Beyond the paper: GPUs that {rps:g} rps need, colocated against "
        "disaggregated",
        paper="-",
        ours=ours if len(found) == 2 else f"{ours} (the other serves with none tried)",
        why="Whole devices: both are over-provisioned by up to one, which a goodput "
        "per GPU does not show",
        runs=f"{found[0].system.said(lab)}" if found else "-",
    )


FIGURES = {
    "goodput_n": Figure(
        title="Goodput against the number of requests of a run", make=goodput_n
    ),
    "devices": Figure(title="Devices needed for a demand", make=devices),
}
