"""Judges every system by MLPerf's bounds, with Llama-2-70B on eight H100s.

MLPerf's submissions are no reference: they are tuned stacks, in lower precision. The
question is which system its server and interactive bounds favour.
"""

from __future__ import annotations

from collections.abc import Mapping

from disagg_jax.deployment import Role
from disagg_jax.metrics.criteria import MLPERF_SLOS, mlperf
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput
from disagg_jax.search.rates import SearchPlan
from experiments.configs.paper_workloads import get_workload
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.report.colours import system_colours
from experiments.report.intervals import across_seeds
from experiments.report.panel import Panel, banded_curves

_ON = ("llama-2-70b", "h100")
_BOUNDS = ("llama2-70b", "llama2-70b-interactive")
_WORKLOAD = "sharegpt"  # for want of OpenOrca's lengths
_COLOCATED, _SPLIT = "2xcolocated:tp4", "prefill:tp4,decode:tp4"
_REQUESTS = 1000
# TensorRT-LLM's would be Sarathi-Serve with steps of 8192 tokens.
_SYSTEMS = tuple(name for name in SYSTEMS if name != "tensorrt_llm")
_PLAN = SearchPlan(growth=1.5, tolerance=0.1, max_rates=12)


def _search(lab: Lab, system: str, bounds: str) -> GoodputSearch:
    simulation = lab.roofline(*_ON, policies=SYSTEMS[system], max_context=4096)
    deployment = _COLOCATED if Role.COLOCATED in SYSTEMS[system] else _SPLIT
    slo = MLPERF_SLOS[bounds]
    return GoodputSearch(
        simulated=simulation.build(deployment),
        workload=get_workload(_WORKLOAD),
        slo=slo,
        criterion=mlperf(slo),
        num_requests=lab.requests(_REQUESTS),
        seeds=tuple(range(lab.seeds)),
        plan=_PLAN,
        start_rps=10.0,
    )


Found = Mapping[tuple[str, str], SimGoodput]  # (system, bounds)


def make(lab: Lab) -> Drawn:
    """Draw goodput of each system at both bounds."""
    keys = [(system, bounds) for system in _SYSTEMS for bounds in _BOUNDS]
    found = lab.map(find_goodput, {key: _search(lab, *key) for key in keys})
    rates = {
        system: {
            1000 * MLPERF_SLOS[bounds].tpot_s: found[system, bounds].found.per_seed_rps
            for bounds in _BOUNDS
        }
        for system in _SYSTEMS
    }
    panel = Panel(
        title="Llama-2-70B, 8 H100; TTFT <= 450 ms (interactive) and 2 s (server)",
        x="P99 TPOT allowed (ms)",
        y="goodput (requests/s of the deployment)",
        series=banded_curves(rates, colours=system_colours(rates)),
    )
    claims = [_claim(lab, bounds, found) for bounds in _BOUNDS]
    checked = [lab.roofline(*_ON).checked]
    return Drawn(panels=[panel], claims=claims, checked=checked)


def _claim(lab: Lab, bounds: str, found: Found) -> Claim:
    best = sorted(_SYSTEMS, key=lambda system: -found[system, bounds].rps)
    slo = MLPERF_SLOS[bounds]
    return Claim(
        claim=f"Beyond the papers: goodput at MLPerf's {bounds} bounds, {mlperf(slo)}",
        paper="-",
        ours="; ".join(
            f"{name} {across_seeds(found[name, bounds].found.per_seed_rps, '.1f')} rps"
            for name in best
        ),
        why="Default parameters of each system. The benchmark's OpenOrca lengths are "
        f"not at hand: {_WORKLOAD} instead; runs are shorter than its 600 s",
        runs=f"{_COLOCATED} or {_SPLIT}, {lab.roofline(*_ON).cost.name}/{_ON[0]}, "
        f"{lab.size(_REQUESTS)}",
    )
