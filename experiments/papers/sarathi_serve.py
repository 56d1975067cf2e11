"""Reproduces Sarathi-Serve (OSDI'24): hybrid batches, chunks, and capacity.

The published numbers are in the paper's evaluation and its ablation of the two ideas.
Only its chat lengths are public: ours are log-normals through the quantiles of its
Table 2 (experiments/configs/paper_workloads.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from disagg_jax import metrics
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.criteria import sarathi_serve
from disagg_jax.request import Timeline
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim import Simulation
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.sim.run import SimulationTask
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad, Transfer
from experiments.configs.paper_workloads import get_workload
from experiments.papers.colocated import colocated
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.report.colours import system_colours
from experiments.report.intervals import across_seeds, ratio_text
from experiments.report.panel import Panel, banded_curves, curves

_CHAT, _ARXIV = "openchat_sharegpt4", "arxiv_summarization"
_LONGEST = {_CHAT: 8192, _ARXIV: 16_384}  # tokens of a request
_MAX_SEQS = 128  # of all systems but Orca
_TESTBED = (
    "Ours has SXM's bandwidths and 1 ms of host work in a step; the paper's A100s are "
    "PCIe cards with NVLink in pairs, and its engine's lone Yi-34B decode takes 47 ms"
)

# ---- ablation ------------------------------------------------------------------------

_YI = ("yi-34b", "a100-80g")
_TAU = 1024
_ABLATION_RPS = {_CHAT: 1.0, _ARXIV: 0.5}  # of the released script
_ABLATION_REQUESTS = 128
# Published: seconds of (P50 TTFT, P99 TBT).
_ABLATION: Mapping[str, Mapping[str, tuple[float, float]]] = {
    workload: dict(zip(("hybrid-only", "chunked-only", "both"), rows, strict=True))
    for workload, rows in (
        (_CHAT, ((0.53, 0.68), (1.04, 0.17), (0.76, 0.14))),
        (_ARXIV, ((3.78, 1.38), (5.38, 0.20), (3.90, 0.17))),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPasses:
    """A `DeploymentCost` in which a step's decodes and its chunks do not share a pass.

    This is chunking without hybrid batches: the pass of the decodes and the pass of the
    chunks take turns, and a decode waits for one budget of prompt tokens, as it does in
    a hybrid batch.
    """

    cost: DeploymentCost

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        if not (load.chunks and load.decodes):
            return self.cost.stages_s(instance, load)
        passes = (StepLoad((), load.decodes, load.context), StepLoad(load.chunks, 0, 0))
        stages = (self.cost.stages_s(instance, part) for part in passes)
        return tuple(a + b for a, b in zip(*stages, strict=True))

    def decoder(self, instance: int) -> Decoder:
        return self.cost.decoder(instance)

    def hop(self, transfer: Transfer) -> Hop:
        return self.cost.hop(transfer)


def variants(lab: Lab, workload: str) -> dict[str, SimulatedDeployment]:
    """Build Yi-34B on two A100s with one of the two ideas, or both."""
    longest = _LONGEST[workload]
    whole, chunked = (
        colocated(
            lab.roofline(*_YI),
            SarathiServe(token_budget=budget, max_seqs=_MAX_SEQS),
            "colocated:tp2",
            max_context=longest,
        )
        for budget in (longest, _TAU)
    )
    apart = dataclasses.replace(chunked, cost=TwoPasses(cost=chunked.cost))
    return {"hybrid-only": whole, "chunked-only": apart, "both": chunked}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latencies:
    """Latencies of a run, in seconds."""

    ttft_p50_s: float
    tbt_p99_s: float  # of all gaps between tokens, pooled


def latencies(timelines: Sequence[Timeline]) -> Latencies:
    """Return the latencies of requests that all were served."""
    return Latencies(
        ttft_p50_s=statistics.median(metrics.ttft_s(t) for t in timelines),
        tbt_p99_s=float(np.quantile(metrics.pooled_itl_s(timelines), 0.99)),
    )


def run_latencies(point: SimulationTask) -> Latencies:
    """Simulate a point."""
    return latencies(point.simulated.run(point.requests()).timelines)


def run_ablation(lab: Lab, workload: str) -> dict[str, list[Latencies]]:
    """Return each variant's latencies, by seed."""
    points = {
        name: SimulationTask(
            simulated=simulated,
            workload=get_workload(workload),
            rate_rps=_ABLATION_RPS[workload],
            num_requests=lab.requests(_ABLATION_REQUESTS),
            seed=0,
        )
        for name, simulated in variants(lab, workload).items()
    }
    return lab.by_seed(run_latencies, points)


def ablation(lab: Lab) -> Drawn:
    """Draw P50 TTFT and P99 TBT with hybrid batches, with chunks, and with both."""
    found = {workload: run_ablation(lab, workload) for workload in _ABLATION}
    return Drawn(
        panels=[_ablation_panel(w, by_name) for w, by_name in found.items()],
        claims=[c for w, by_name in found.items() for c in _rows(lab, w, by_name)],
        checked=[lab.roofline(*_YI).checked],
    )


def _ablation_panel(workload: str, found: Mapping[str, Sequence[Latencies]]) -> Panel:
    means = {
        name: [
            (
                statistics.mean(run.ttft_p50_s for run in runs),
                statistics.mean(run.tbt_p99_s for run in runs),
            )
        ]
        for name, runs in found.items()
    }
    ours = curves(means)
    paper = {name: [_ABLATION[workload][name]] for name in found}
    theirs = curves(paper, "{}, paper", style="paper")
    # Each system's two points side by side in the legend.
    series = [one for pair in zip(ours, theirs, strict=True) for one in pair]
    return Panel(
        title=f"{workload}, {_ABLATION_RPS[workload]:g} requests/s; means over seeds",
        x="P50 TTFT (s)",
        y="P99 TBT (s)",
        series=series,
        log_y=True,
    )


def _rows(
    lab: Lab, workload: str, found: Mapping[str, Sequence[Latencies]]
) -> list[Claim]:
    runs = (
        f"{_YI[0]}, colocated:tp2, {lab.roofline(*_YI).cost.name}, "
        f"{_ABLATION_RPS[workload]:g} rps, {lab.size(_ABLATION_REQUESTS)}; {workload} "
        "lengths are log-normal through the published median and P90"
    )
    values = [
        Claim(
            claim=f"Ablation, {workload}, {name}: P50 TTFT, P99 TBT",
            paper="{:.2f} s, {:.2f} s".format(*_ABLATION[workload][name]),
            ours=f"{across_seeds([r.ttft_p50_s for r in by_seed], '.2f', ' s')}, "
            f"{across_seeds([r.tbt_p99_s for r in by_seed], '.2f', ' s')}",
            why=_TESTBED,
            runs=runs,
        )
        for name, by_seed in found.items()
    ]
    return [*values, *(_order_claim(workload, found, i, runs) for i in (0, 1))]


def ordering(values: Mapping[str, float]) -> str:
    """Write the names by value, smallest first."""
    return " < ".join(sorted(values, key=lambda name: values[name]))


def _order_claim(
    workload: str, found: Mapping[str, Sequence[Latencies]], field: int, runs: str
) -> Claim:
    attribute = ("ttft_p50_s", "tbt_p99_s")[field]
    paper = ordering({n: both[field] for n, both in _ABLATION[workload].items()})
    ours = {n: [getattr(r, attribute) for r in runs] for n, runs in found.items()}
    by_seed = [
        ordering(dict(zip(ours, values, strict=True)))
        for values in zip(*ours.values(), strict=True)
    ]
    same, seeds = by_seed.count(paper), len(by_seed)
    means = {name: statistics.mean(values) for name, values in ours.items()}
    return Claim(
        claim=f"Ablation, {workload}: the order of {('P50 TTFT', 'P99 TBT')[field]}",
        paper=paper,
        ours=f"{ordering(means)} on average; as published at {same} of {seeds} seeds",
        why="Hybrid-only is a budget of the longest prompt, as in the released script; "
        "chunked-only runs a step's decodes and chunks as two passes",
        runs=runs,
    )


# ---- capacity ------------------------------------------------------------------------

_PLAN = SearchPlan(growth=1.5, tolerance=0.1, max_rates=12)


@dataclasses.dataclass(frozen=True)
class Testbed:
    """A model on its devices, with both SLOs."""

    model: str
    hardware: str
    deployment: str
    tbts_s: tuple[float, float]  # P99 TBT, strict and relaxed
    orca_seqs: int  # Orca's batch, as released; 0: it is not compared
    start_rps: float
    num_requests: int  # of a run; pipelines are simulated step by step, and slowly

    def simulation(self, lab: Lab) -> Simulation:
        """Return the model on its devices."""
        return lab.roofline(self.model, self.hardware)

    def slo_s(self, strict: bool) -> float:
        """Return the P99 TBT allowed."""
        return self.tbts_s[0] if strict else self.tbts_s[1]

    def policies(self, strict: bool, longest: int) -> dict[str, Policy]:
        """Return the systems, with the parameters of the paper and its scripts."""
        budget = 512 if strict else 2048
        found: dict[str, Policy] = {
            "Sarathi-Serve": SarathiServe(token_budget=budget, max_seqs=_MAX_SEQS),
            "vLLM": PrefillFirst(max_batched_tokens=longest, max_seqs=_MAX_SEQS),
        }
        if self.orca_seqs:
            tokens = self.orca_seqs * longest
            found["Orca"] = Orca(max_seqs=self.orca_seqs, max_batched_tokens=tokens)
        return found


_A100, _A100_100GB = "a100-80g", "a100-80g-100gb"
_TP1, _TP2, _TP4PP2 = (f"colocated:{layout}" for layout in ("tp1", "tp2", "tp4pp2"))
TESTBEDS = {
    "Mistral-7B": Testbed("mistral-7b", _A100, _TP1, (0.1, 0.5), 16, 2.0, 512),
    "Yi-34B": Testbed("yi-34b", _A100, _TP2, (0.2, 1.0), 16, 1.0, 512),
    "Falcon-180B": Testbed(
        "falcon-180b", _A100_100GB, _TP4PP2, (1.0, 5.0), 0, 0.5, 256
    ),
}
_DRAWN = ("Mistral-7B", "Yi-34B")  # with both SLOs
Case = tuple[str, str, bool]  # testbed, workload, whether the SLO is strict
CASES: tuple[Case, ...] = (
    *(
        (name, workload, strict)
        for name in _DRAWN
        for workload, strict in ((_CHAT, True), (_CHAT, False), (_ARXIV, True))
    ),
    ("Falcon-180B", _CHAT, True),
)
# (testbed, strict, system divided by) -> published gain of Sarathi-Serve.
_GAINS = {
    ("Mistral-7B", True, "vLLM"): "2.6x; 3.5x at 100 ms",
    ("Yi-34B", True, "vLLM"): "3.7x",
    ("Yi-34B", True, "Orca"): "4.0x",
    ("Yi-34B", False, "vLLM"): "1.65x at 1 s",
    ("Falcon-180B", True, "vLLM"): "5.6x",
}


def capacity(lab: Lab) -> Drawn:
    """Draw capacity of three systems by model, SLO and workload."""
    asked = {
        (*case, system): search
        for case in CASES
        for system, search in _searches(lab, case).items()
    }
    # The longest first: pipelines are simulated step by step.
    order = sorted(asked, key=lambda key: ("Falcon" not in key[0], key))
    found = lab.map(find_goodput, {key: asked[key] for key in order})
    return Drawn(
        panels=[_capacity_panel(name, found) for name in _DRAWN],
        claims=[
            _capacity_claim(lab, case, below, found)
            for case in CASES
            for below in ("vLLM", "Orca")
            if (*case, below) in found
        ],
        checked=[bed.simulation(lab).checked for bed in TESTBEDS.values()],
    )


def _searches(lab: Lab, case: Case) -> dict[str, GoodputSearch]:
    name, workload, strict = case
    bed, longest = TESTBEDS[name], _LONGEST[workload]
    simulation = bed.simulation(lab)
    return {
        system: GoodputSearch(
            simulated=colocated(
                simulation, policy, bed.deployment, max_context=longest
            ),
            workload=get_workload(workload),
            slo=SLO(ttft_s=math.inf, tpot_s=bed.slo_s(strict)),
            criterion=sarathi_serve(tbt_s=bed.slo_s(strict)),
            num_requests=lab.requests(bed.num_requests),
            seeds=tuple(range(lab.seeds)),
            plan=_PLAN,
            start_rps=bed.start_rps,
        )
        for system, policy in bed.policies(strict, longest).items()
    }


Found = Mapping[tuple[str, str, bool, str], SimGoodput]


def _capacity_panel(name: str, found: Found) -> Panel:
    bed = TESTBEDS[name]
    rates = {
        system: {
            bed.slo_s(strict): found[name, _CHAT, strict, system].found.per_seed_rps
            for strict in (True, False)
        }
        for system in ("Sarathi-Serve", "vLLM", "Orca")
    }
    return Panel(
        title=f"{name}, {bed.deployment}, {_CHAT}",
        x="P99 TBT allowed (s): strict and relaxed",
        y="capacity (requests/s of the deployment)",
        series=banded_curves(rates, colours=system_colours(rates)),
    )


def _capacity_claim(lab: Lab, case: Case, below: str, found: Found) -> Claim:
    name, workload, strict = case
    bed = TESTBEDS[name]
    rates, others = (
        found[*case, system].found.per_seed_rps for system in ("Sarathi-Serve", below)
    )
    ratio = ratio_text(rates, others, "no ratio: a seed fails at every rate tried")
    slo = f"{'strict' if strict else 'relaxed'}, {bed.slo_s(strict):g} s"
    return Claim(
        claim=f"Capacity over {below}: {name}, {workload}, {slo}",
        paper=_GAINS.get((name, strict, below), "(not in the facts)"),
        ours=f"{ratio} ({across_seeds(rates)} over {across_seeds(others)} rps)",
        why=f"{_TESTBED}. The facts do not say on which lengths the paper's is",
        runs=f"{bed.deployment}, {bed.simulation(lab).cost.name}, Poisson, "
        f"{sarathi_serve(tbt_s=bed.slo_s(strict))}, "
        f"{lab.size(bed.num_requests)}; lengths log-normal through the published "
        "quantiles",
    )
