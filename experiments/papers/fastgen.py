"""Reproduces DeepSpeed-FastGen's blog: SplitFuse and vLLM with closed-loop clients.

Llama-2-70B on four A100-80; prompts and outputs are normal with a deviation of 30 %.
The published numbers are in the blog's text (DeepSpeed, blogs/deepspeed-fastgen).
`criteria.FastGen` judges the requests.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np

from disagg_jax import metrics
from disagg_jax.metrics.criteria import FastGen
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload.closed_loop import ClosedLoop
from disagg_jax.workload.lengths import NormalLengths
from disagg_jax.workload.workload import RandomWorkload
from experiments.papers.colocated import colocated
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.report.colours import system_colours
from experiments.report.intervals import across_seeds, ratio_text
from experiments.report.panel import XY, Panel, banded_curves, curves

_ON = ("llama-2-70b", "a100-80g")
TOKENS_PER_S = 4  # of generation, by a moving average
SLA = FastGen(token_s=1 / TOKENS_PER_S)
_CONTEXT = 4096  # Llama-2's, and so vLLM's cap on the prompt tokens of a step
_SYSTEMS = {
    "SplitFuse": SplitFuse(),
    "vLLM": PrefillFirst(max_batched_tokens=_CONTEXT),
}
_CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
_REQUESTS = 512
_PROMPT, _OUTPUT, _LONG_OUTPUT = 2600, 60, 128
_LATENCY_S, _RATE_RPS = 9.0, 1.2  # where the blog compares
_LONG_CLIENTS = 16
# Published.
_EFFECTIVE = {"SplitFuse": 1.42, "vLLM": 0.63}
_AT_LATENCY = {"SplitFuse": 1.36, "vLLM": 0.67}  # requests/s at _LATENCY_S
_AT_RATE = {"SplitFuse": 7.0, "vLLM": 14.0}  # seconds at _RATE_RPS
_NO_RATIO = "no ratio: a divisor is 0"
_ENGINE = (
    "The blog compares two engines; here one roofline runs both policies, without the "
    "tens of ms of host work that a step of vLLM 0.2 took on this model"
)


def lengths(prompt: int, output: int) -> RandomWorkload:
    """Return normal lengths, with 30 % of the mean as deviation."""
    return RandomWorkload(
        prompt=NormalLengths(mean=prompt, deviation=0.3 * prompt, high=_CONTEXT),
        output=NormalLengths(mean=output, deviation=0.3 * output, high=_CONTEXT),
        max_total_tokens=_CONTEXT,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedPoint:
    """A number of clients of a system, for one seed."""

    simulated: SimulatedDeployment
    workload: RandomWorkload
    clients: int
    num_requests: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedRun:
    """The numbers of a run that claims use."""

    throughput_rps: float
    effective_rps: float  # of requests within the SLA
    latency_s: float  # mean, from arrival to the last token
    itl_p50_s: float
    itl_p95_s: float


def run_closed(point: ClosedPoint) -> ClosedRun:
    """Simulate a point."""
    # The rate does not matter: requests are sent when others end.
    asked = point.workload.requests(point.num_requests, 1.0, point.seed)
    loop = ClosedLoop(asked, point.clients)
    run = point.simulated.run(loop.first(), followers=loop)
    gaps_s = metrics.pooled_itl_s(run.timelines)
    return ClosedRun(
        throughput_rps=len(asked) / run.end_s,
        effective_rps=SLA.score(run.timelines),
        latency_s=mean(metrics.e2e_s(t) for t in run.timelines),
        itl_p50_s=float(np.quantile(gaps_s, 0.5)),
        itl_p95_s=float(np.quantile(gaps_s, 0.95)),
    )


Runs = Mapping[str, Mapping[int, Sequence[ClosedRun]]]  # system -> clients -> by seed


def _run(lab: Lab, output: int, clients: Sequence[int]) -> Runs:
    simulation = lab.roofline(*_ON)
    built = {
        name: colocated(simulation, policy, "colocated:tp4", max_context=_CONTEXT)
        for name, policy in _SYSTEMS.items()
    }
    points = {
        (name, n): ClosedPoint(
            simulated=simulated,
            workload=lengths(_PROMPT, output),
            clients=n,
            num_requests=lab.requests(_REQUESTS),
            seed=0,
        )
        for name, simulated in built.items()
        for n in clients
    }
    found = lab.by_seed(run_closed, points)
    return {name: {n: found[name, n] for n in clients} for name in built}


def make(lab: Lab) -> Drawn:
    """Draw effective throughput, throughput against latency, and token latency."""
    runs = _run(lab, _OUTPUT, _CLIENTS)
    tails = _run(lab, _LONG_OUTPUT, [_LONG_CLIENTS])
    simulation = lab.roofline(*_ON)
    said = (
        f"{_ON[0]}, colocated:tp4, {simulation.cost.name}, closed loop, "
        f"{lab.size(_REQUESTS)}"
    )
    effective = Panel(
        title=f"{_PROMPT} prompt, {_OUTPUT} output tokens, SLA {TOKENS_PER_S} tokens/s",
        x="clients",
        y="effective throughput (requests/s)",
        series=banded_curves(
            {name: _effective_rps(of) for name, of in runs.items()},
            colours=system_colours(runs),
        ),
    )
    return Drawn(
        panels=[effective, _latency_panel(runs)],
        claims=[
            _effective_claim(runs, said),
            *(_latency_claim(runs, name, said) for name in _SYSTEMS),
            _tail_claim(tails, said),
        ],
        checked=[simulation.checked],
    )


def _effective_rps(found: Mapping[int, Sequence[ClosedRun]]) -> dict[int, list[float]]:
    return {n: [run.effective_rps for run in of] for n, of in found.items()}


def _curve(found: Mapping[int, Sequence[ClosedRun]]) -> list[XY]:
    """Return (throughput, latency) by the number of clients, means over seeds."""
    return [
        (mean(r.throughput_rps for r in by_seed), mean(r.latency_s for r in by_seed))
        for by_seed in found.values()
    ]


def _latency_panel(runs: Runs) -> Panel:
    colours = system_colours(runs)
    ours = {name: _curve(found) for name, found in runs.items()}
    paper = {
        name: [(_RATE_RPS, _AT_RATE[name]), (_AT_LATENCY[name], _LATENCY_S)]
        for name in runs
    }
    return Panel(
        title=f"{_PROMPT} prompt, {_OUTPUT} output tokens, 1 to {_CLIENTS[-1]} clients",
        x="throughput (requests/s)",
        y="mean latency (s)",
        series=[
            *curves(ours, colours=colours),
            *curves(paper, "{}, blog", colours=colours, style="paper"),
        ],
    )


def _effective_claim(runs: Runs, said: str) -> Claim:
    rates = {name: _effective_rps(found) for name, found in runs.items()}
    ours, theirs = (
        [max(at_seed) for at_seed in zip(*of.values(), strict=True)]
        for of in rates.values()
    )
    at = {name: max(of, key=lambda n: mean(of[n])) for name, of in rates.items()}  # noqa: B023
    return Claim(
        claim=f"Effective throughput, {_PROMPT}/{_OUTPUT} tokens, {TOKENS_PER_S} "
        "tokens/s: the most of any number of clients",
        paper="1.42 over 0.63 requests/s = 2.3x",
        ours=f"{across_seeds(ours)} over {across_seeds(theirs)} requests/s = "
        f"{ratio_text(ours, theirs, _NO_RATIO)} "
        f"(at {at['SplitFuse']} and {at['vLLM']} clients)",
        why=_ENGINE,
        runs=said,
    )


def at_latency(curve: Sequence[XY], latency_s: float) -> float | None:
    """Return the throughput where a curve of (throughput, latency) has a latency."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y0 <= latency_s <= y1:
            return x0 + (x1 - x0) * (latency_s - y0) / (y1 - y0)
    return None


def _latency_claim(runs: Runs, name: str, said: str) -> Claim:
    found = runs[name]
    seeds = range(len(found[_CLIENTS[0]]))
    curves = [_curve({n: [found[n][seed]] for n in _CLIENTS}) for seed in seeds]
    rates = [at_latency(curve, _LATENCY_S) for curve in curves]
    known = [rate for rate in rates if rate is not None]
    ours = f"{across_seeds(known)} rps" if len(known) == len(rates) else "not reached"
    at = [(y, x) for x, y in _curve(found)]
    latency = at_latency(at, _RATE_RPS)
    seconds = "not reached" if latency is None else f"{latency:.1f} s on average"
    return Claim(
        claim=f"{name}: throughput at {_LATENCY_S:g} s, latency at {_RATE_RPS:g} rps",
        paper=f"{_AT_LATENCY[name]:.2f} rps, {_AT_RATE[name]:g} s",
        ours=f"{ours}, {seconds}",
        why=_ENGINE,
        runs=said,
    )


def _tail_claim(runs: Runs, said: str) -> Claim:
    ours, theirs = (runs[name][_LONG_CLIENTS] for name in ("SplitFuse", "vLLM"))

    def both(field: str) -> tuple[list[float], list[float]]:
        return [getattr(r, field) for r in theirs], [getattr(r, field) for r in ours]

    p50s, p95s = both("itl_p50_s"), both("itl_p95_s")
    p95_ms = [across_seeds([1000 * s for s in of], ".0f", " ms") for of in p95s]
    return Claim(
        claim=f"Token latency of vLLM over SplitFuse's, {_PROMPT}/{_LONG_OUTPUT} "
        f"tokens, {_LONG_CLIENTS} clients: P95, P50",
        paper="3.7x, 1x",
        ours=f"{ratio_text(*p95s, _NO_RATIO)} ({p95_ms[0]} over {p95_ms[1]}), "
        f"{ratio_text(*p50s, _NO_RATIO)}",
        why=_ENGINE,
        runs=said,
    )
