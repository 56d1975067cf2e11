"""Reproduces DistServe's Fig. 4: pipeline or tensor parallelism for prefill, by M/D/1.

The published points are the paper's own formulas (D = 0.2 s on two GPUs, R = 2 x the
rate per GPU), so they are compared with the formulas; and our simulator, which knows
none of them, is compared with both. The queue is M/D/1: requests arrive at random
(Poisson), are served in order and one at a time, and each takes the same time. Source:
DistServe (OSDI'24) section 3.1, where D is `service_s`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.metrics import rate_interval
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.run import SimulationTask, run_task
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.workload import RandomWorkload
from experiments.papers.distserve.published import paper_panel
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.report.panel import XY, Panel, Series, banded_curves, curves, ends

SERVICE_S = 0.2  # D: 512 tokens of OPT-66B, as the published points have it
GPUS = 2
_REQUESTS = 3000
_SPEEDUPS = (1.5, 1.6, 1.7, 1.8, 1.9)
_SIMULATED_RATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
# One token, so that a request ends with its prefill and no decode is simulated.
_ONE_PROMPT = RandomWorkload(
    prompt=FixedLengths(tokens=512), output=FixedLengths(tokens=1)
)


def md1_wait_s(rate_rps: float, service_s: float) -> float:
    """Return the mean wait before service: R D^2 / (2 (1 - R D)).

    Raises:
      ValueError: unless the server keeps up.
    """
    load = rate_rps * service_s
    require(0 <= load < 1, "rate_rps * service_s: expected in [0, 1)", load)
    return load * service_s / (2 * (1 - load))


def inter_op_ttft_s(rate_rps: float, service_s: float, stages: int = 2) -> float:
    """Return the mean TTFT of equal pipeline stages: all wait is before the first."""
    return service_s + md1_wait_s(rate_rps, service_s / stages)


def intra_op_ttft_s(rate_rps: float, service_s: float, speedup: float) -> float:
    """Return the mean TTFT if tensor parallelism divides the time by `speedup` (K)."""
    return inter_op_ttft_s(rate_rps, service_s / speedup, stages=1)


@dataclasses.dataclass(frozen=True)
class ConstantInstance:
    """An `InstanceCost` whose steps all take the same time."""

    seconds: tuple[float, ...]  # on each pipeline stage

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        return self.seconds

    def decode_s(self, decodes: int, context: int) -> float:
        require_one_stage(len(self.seconds))
        return self.seconds[0]


def prefill_alone(*stages_s: float) -> SimulatedDeployment:
    """Build a prefill instance of constant stages that takes one request at a time."""
    deployment = Deployment.parse(f"prefill:tp1pp{len(stages_s)},decode:tp1")
    memory = KVMemory(num_blocks=10**9, max_context=2048)
    return SimulatedDeployment(
        deployment=deployment,
        policies={Role.PREFILL: PrefillOnly(max_seqs=1), Role.DECODE: DecodeOnly()},
        memory=(memory, memory),
        cost=ModelledCost(
            instances=(ConstantInstance(stages_s), ConstantInstance((0.0,))),
            network=Network(deployment=deployment, kv_bytes_per_token=0),
        ),
    )


def _formula(series: str) -> Callable[[float], float]:
    """Return the closed form of a published series, a function of the rate per GPU."""
    if series == "inter-op":
        return lambda rate: inter_op_ttft_s(GPUS * rate, SERVICE_S)
    speedup = float(series.rpartition(" ")[2])
    return lambda rate: intra_op_ttft_s(GPUS * rate, SERVICE_S, speedup)


def _simulated(lab: Lab, stages_s: Sequence[float]) -> dict[float, list[float]]:
    """Return the mean TTFT of each seed, by the rate per GPU."""
    # Up to 90 % load: beyond it the runs are too short for the mean to settle.
    rates = [r for r in _SIMULATED_RATES if GPUS * r * max(stages_s) <= 0.91]
    runs = {
        rate: SimulationTask(
            simulated=prefill_alone(*stages_s),
            workload=_ONE_PROMPT,
            rate_rps=GPUS * rate,
            num_requests=lab.requests(_REQUESTS),
            seed=0,
        )
        for rate in rates
    }
    found = lab.by_seed(run_task, runs)
    return {rate: [_mean(r.ttft_s) for r in of] for rate, of in found.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def make(lab: Lab) -> Drawn:
    """Draw both panels, and say how far points, formulas and simulator are apart."""
    ours = {
        "inter-op": _simulated(lab, (SERVICE_S / 2, SERVICE_S / 2)),
        "intra-op, K = 1.7": _simulated(lab, (SERVICE_S / 1.7,)),
    }
    simulated = banded_curves(ours, "{}, simulated")
    panels = [_panel("a", simulated), _panel("b", simulated[:1])]
    return Drawn(panels=panels, claims=[_points_claim(), *_claims(lab, ours)])


def _panel(name: str, simulated: Sequence[Series]) -> Panel:
    axes = paper_panel("fig4", name)
    forms = {
        name: [(x, _formula(name)(x)) for x, _ in points]
        for name, points in axes.series.items()
    }
    drawn = [*axes.curves(), *curves(forms, "{}, formula", style="dashed")]
    title = "OPT-66B, 512 tokens, 2 A100" + (", K from 1.5" if name == "b" else "")
    # Without limits the legend would hide the intervals.
    return axes.panel(title, [*drawn, *simulated], ylim=(0, 1.4))


def _apart(points: Sequence[XY], form: Callable[[float], float]) -> float:
    """Return the largest relative difference of points from a form."""
    return max(abs(y / form(x) - 1) for x, y in points)


def _points_claim() -> Claim:
    worst = max(
        _apart(points, _formula(series))
        for panel in ("a", "b")
        for series, points in paper_panel("fig4", panel).series.items()
    )
    return Claim(
        claim='Fig. 4(a) is captioned "Real experiment results"',
        paper="measured",
        ours=f"every point of (a) and (b) is the formula's, to {100 * worst:.2f} %",
        why="Points that equal a formula to the drawing's precision are no "
        "measurement; 0.05 % is the resolution of the digits",
        runs="closed forms, D = 0.2 s, R = 2 x",
    )


def _claims(lab: Lab, ours: dict[str, dict[float, list[float]]]) -> list[Claim]:
    inter, intra = (_formula(name) for name in ours)
    rates = [i / 1000 for i in range(1, 4200)]
    cross = next(rate for rate in rates if inter(rate) < intra(rate))
    means = [{rate: _mean(v) for rate, v in values.items()} for values in ours.values()]
    shared = [rate for rate in means[0] if rate in means[1]]
    above = [rate for rate in shared if means[0][rate] < means[1][rate]]
    simulated = f"from {above[0]:g} rps" if above else "not up to 3.5 rps"
    return [
        *(_simulator_claim(lab, name, values) for name, values in ours.items()),
        Claim(
            claim="Intra-op is better at low rates, inter-op at high ones",
            paper="they cross just above 3 rps per GPU",
            ours=f"formulas cross at {cross:.2f} rps per GPU; simulated, inter-op "
            f"is ahead {simulated} (steps of 0.5)",
            why="Agrees",
            runs=lab.size(_REQUESTS),
        ),
    ]


def _simulator_claim(lab: Lab, name: str, values: dict[float, list[float]]) -> Claim:
    form = _formula(name)
    found = {x: rate_interval(of_seeds) for x, of_seeds in values.items()}
    points = [(x, interval.mean) for x, interval in found.items()]
    within = {x: ends(interval) for x, interval in found.items()}
    inside = sum(low <= form(x) <= high for x, (low, high) in within.items())
    return Claim(
        claim=f"{name}: mean TTFT follows the queueing model",
        paper="(the formula)",
        ours=f"simulated means are within {100 * _apart(points, form):.1f} % of "
        f"it; {inside} of {len(values)} intervals contain it",
        why="A 95 % interval misses one time in twenty; at 90 % load a run of this "
        "length has not quite settled",
        runs=f"constant stage times, one request a step, {lab.size(_REQUESTS)}",
    )
