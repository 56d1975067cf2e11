"""Varies what DistServe's paper does not: the number of requests, and of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import interval_across
from experiments.configs.named_simulations import get_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.papers.distserve.published import SLOS, TARGET
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.papers.runs import Arm, ArmRuns, Goodputs, geometric, run_arms
from experiments.report.colours import system_colour
from experiments.report.intervals import percent
from experiments.report.panel import Panel, Series, banded, curves

_ONE_ENGINE = get_simulation("opt13b_a100")
_SHIPPED = get_simulation("simdistserve_opt13b")

# ---- goodput against the number of requests ----

_NUMBERS = (100, 300, 1000, 3000)
_SPLIT = "prefill:tp2,decode:tp1"
_BY_N = (
    Arm("DistServe, as shipped", _SHIPPED, _SPLIT, num_requests=0),
    Arm("DistServe, one engine", _ONE_ENGINE, _SPLIT, num_requests=0),
    Arm("vLLM policy, one engine", _ONE_ENGINE, "colocated:tp1", num_requests=0),
)


def _rates(arm: Arm, n: int) -> Sequence[float]:
    """Return requests/s per GPU around the goodputs; far overload takes long to run."""
    if n < 1000:
        return geometric(1.2, 3.0, 8)
    colocated = arm.deployment.startswith("colocated")
    return geometric(1.6, 2.6, 5) if colocated else geometric(1.25, 1.9, 5)


def goodput_n(lab: Lab) -> Drawn:
    """Draw goodput of the paper's OPT-13B chatbot by the length of the run."""
    few = lab.num_requests
    numbers = _NUMBERS if few is None else (few, 3 * few)
    found: dict[str, dict[float, Goodputs]] = {arm.label: {} for arm in _BY_N}
    workload = get_workload("sharegpt")
    for n in numbers:
        of_n = dataclasses.replace(lab, num_requests=n)
        for arm in _BY_N:
            runs = run_arms(of_n, [arm], workload, _rates(arm, n))[arm.label]
            found[arm.label][n] = runs.goodputs(SLOS["chat 13B"])
    rates = {
        label: {n: each.rates for n, each in by_n.items()}
        for label, by_n in found.items()
    }
    panel = Panel(
        title="OPT-13B, ShareGPT, TTFT <= 0.25 s, TPOT <= 0.1 s; 95 % over seeds",
        x="requests of a run",
        y="goodput at 90 % (requests/s per GPU)",
        series=[_by_n_curve(label, by_n) for label, by_n in rates.items()],
        log_x=True,
    )
    claims = [
        Claim(
            claim=f"Beyond the paper: goodput against N ({arm.label})",
            paper="2.30 rps per GPU from N=300" if arm is _BY_N[0] else "-",
            ours="; ".join(f"N={n:g}: {each}" for n, each in found[arm.label].items()),
            why="A short run ends before the queue of an overloaded decode GPU has "
            "grown: the published goodput is one of short runs",
            runs=f"{arm.said(lab).rpartition(', ')[0]}, {lab.seeds} seeds, N as given",
        )
        for arm in _BY_N
    ]
    return Drawn(panels=[panel], claims=claims)


def _by_n_curve(label: str, by_n: Mapping[float, Sequence[float]]) -> Series:
    """Draw an arm in its system's colour, with dashes as the artifact ships it."""
    system = "DistServe" if label.startswith("DistServe") else "vLLM"
    style = "dashed" if "as shipped" in label else "line"
    return banded(label, by_n, system_colour(system), style)


# ---- devices that a rate needs ----

_DEMANDS_RPS = (4.0, 8.0, 16.0)
_LONG_RUN = 1000
# Requests/s per GPU that bound what the systems can do here, generously.
_COLOCATED_RPS = (2.0, 4.5)
_SPLIT_RPS = (3.5, 9.0)


def devices(lab: Lab) -> Drawn:
    """Draw the fewest GPUs that serve a rate within the SLO, by trying deployments."""
    kinds = {
        "colocated": {rps: _fewest(lab, rps, _colocated(rps)) for rps in _DEMANDS_RPS},
        "disaggregated": {rps: _fewest(lab, rps, _split(rps)) for rps in _DEMANDS_RPS},
    }
    points = {
        name: [(rps, _devices(runs)) for rps, runs in by_rate.items() if runs]
        for name, by_rate in kinds.items()
    }
    panel = Panel(
        title="OPT-13B, 512 prompt and 64 output tokens, 0.4 s / 0.04 s, one engine",
        x="demand (requests/s)",
        y="GPUs needed for 90 % within the SLO",
        series=curves(
            points,
            colours={
                "colocated": system_colour("vLLM"),
                "disaggregated": system_colour("DistServe"),
            },
        ),
    )
    claims = [
        _devices_claim(lab, rps, [by_rate[rps] for by_rate in kinds.values()])
        for rps in _DEMANDS_RPS
    ]
    return Drawn(panels=[panel], claims=claims)


def _between(rps: float, bounds: tuple[float, float]) -> range:
    """Return the numbers of GPUs to try for a demand."""
    low, high = bounds
    return range(max(1, math.floor(rps / high)), math.ceil(rps / low) + 1)


def _colocated(rps: float) -> list[str]:
    return [f"{n}xcolocated:tp1" for n in _between(rps, _COLOCATED_RPS)]


def _split(rps: float) -> list[str]:
    """Return all splits that give each phase at least a third, fewest GPUs first."""
    return [
        f"{prefill}xprefill:tp1,{total - prefill}xdecode:tp1"
        for total in _between(rps, _SPLIT_RPS)
        for prefill in range(max(1, total // 3), total - max(1, total // 3) + 1)
        if prefill < total
    ]


def _devices(runs: ArmRuns) -> int:
    return Deployment.parse(runs.arm.deployment).devices


def _share(runs: ArmRuns) -> list[float]:
    (shares,) = runs.attainments(SLOS["toy"]).values()
    return shares


def _fewest(lab: Lab, rps: float, deployments: Sequence[str]) -> ArmRuns | None:
    """Return the first deployment, by GPUs and then by attainment, that serves."""
    arms = [  # of one device, as the rate is the whole demand
        Arm(text, _ONE_ENGINE, text, num_requests=_LONG_RUN, devices=1)
        for text in deployments
    ]
    workload = get_workload("fixed:512x64")
    found = run_arms(lab, arms, workload, [rps]).values()
    means = {id(runs): interval_across(_share(runs)).mean for runs in found}
    serving = [runs for runs in found if means[id(runs)] >= TARGET]
    return min(serving, key=lambda s: (_devices(s), -means[id(s)]), default=None)


def _devices_claim(lab: Lab, rps: float, both: Sequence[ArmRuns | None]) -> Claim:
    found = [runs for runs in both if runs is not None]
    ours = " against ".join(
        f"{_devices(s)} GPUs ({s.arm.deployment}: {percent(_share(s))} attain)"
        for s in found
    )
    return Claim(
        claim=f"Beyond the paper: GPUs that {rps:g} rps need, colocated against "
        "disaggregated",
        paper="-",
        ours=ours if len(found) == 2 else f"{ours} (the other serves with none tried)",
        why="Whole devices: both are over-provisioned by up to one, which a goodput "
        "per GPU does not show",
        runs=found[0].arm.said(lab) if found else "-",
    )
