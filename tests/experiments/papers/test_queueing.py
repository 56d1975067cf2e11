"""The simulator against queueing theory, and the published points against it too.

Simulated means are compared with closed forms by 99 % intervals over independent seeds;
the seeds are fixed, so that a test which passes goes on passing.
"""

from __future__ import annotations

import pytest

from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.metrics import interval_across, ttft_s
from disagg_jax.request import Request
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload import FixedLengths, RandomWorkload
from experiments.papers.distserve import queueing
from experiments.papers.distserve.published import paper_panel
from experiments.papers.distserve.queueing import ConstantInstance

D = 0.2  # seconds: DistServe's Fig. 4
SEEDS = range(8)
TRANSFER_S = 512 / 5120  # bytes of a request's KV over bytes/s of the wire
INSTANT_S = 1e-9  # so short that nothing queues for it


def simulated(
    deployment: str, prefill_s: tuple[float, ...], link: LinkSpec | None = None
) -> SimulatedDeployment:
    """Constant stages, one request a step; a token of KV is a byte."""
    parsed = Deployment.parse(deployment)
    memory = KVMemory(num_blocks=10**9, max_context=2048)
    cost = {
        Role.PREFILL: ConstantInstance(prefill_s),
        Role.DECODE: ConstantInstance((INSTANT_S,)),
    }
    return SimulatedDeployment(
        deployment=parsed,
        policies={Role.PREFILL: PrefillOnly(max_seqs=1), Role.DECODE: DecodeOnly()},
        memory=(memory,) * len(parsed.instances),
        cost=ModelledCost(
            instances=tuple(cost[spec.role] for spec in parsed.instances),
            network=Network(deployment=parsed, kv_bytes_per_token=1, inside=link),
        ),
    )


def run(
    system: SimulatedDeployment, rate_rps: float, seed: int, output: int, n: int = 1200
) -> Run:
    workload = RandomWorkload(
        prompt=FixedLengths(tokens=512), output=FixedLengths(tokens=output)
    )
    return system.run(workload.requests(n, rate_rps, seed))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def expect_inside(expected: float, of_seeds: list[float]) -> None:
    found = interval_across(of_seeds, confidence=0.99)
    assert found.low is not None and found.high is not None
    assert found.low <= expected <= found.high
    # Narrow enough to mean something; the forms are 20 % apart and more.
    assert found.high - found.low < 0.2 * expected


def mean_ttfts(system: SimulatedDeployment, rate_rps: float) -> list[float]:
    return [
        mean([ttft_s(t) for t in run(system, rate_rps, seed, output=1).timelines])
        for seed in SEEDS
    ]


@pytest.mark.parametrize("load", [0.3, 0.75])
def test_one_device_is_an_md1_queue(load: float):
    system = simulated("prefill:tp1,decode:tp1", (D,))
    rate = load / D
    expect_inside(queueing.inter_op_ttft_s(rate, D, stages=1), mean_ttfts(system, rate))


@pytest.mark.parametrize("rate_per_gpu", [1.0, 4.0])
def test_two_pipeline_stages_follow_the_inter_op_form(rate_per_gpu: float):
    system = simulated("prefill:tp1pp2,decode:tp1", (D / 2, D / 2))
    rate = 2 * rate_per_gpu
    expected = D + rate * D**2 / (4 * (2 - rate * D))  # the paper's way to write it
    assert queueing.inter_op_ttft_s(rate, D) == pytest.approx(expected, rel=1e-12)
    expect_inside(expected, mean_ttfts(system, rate))


@pytest.mark.parametrize("rate_per_gpu", [1.0, 3.0])
def test_a_faster_device_follows_the_intra_op_form(rate_per_gpu: float):
    speedup = 1.7
    system = simulated("prefill:tp2,decode:tp1", (D / speedup,))
    rate = 2 * rate_per_gpu
    expected = D / speedup + rate * D**2 / (2 * speedup * (speedup - rate * D))
    form = queueing.intra_op_ttft_s(rate, D, speedup)
    assert form == pytest.approx(expected, rel=1e-12)
    expect_inside(expected, mean_ttfts(system, rate))


def test_a_server_that_cannot_keep_up_has_no_mean():
    with pytest.raises(ValueError, match=r"expected in \[0, 1\), got 1.0"):
        queueing.md1_wait_s(5.0, D)


@pytest.mark.parametrize("panel", ["a", "b"])
def test_the_published_points_of_fig_4_are_the_forms(panel: str):
    for name, points in paper_panel("fig4", panel).series.items():
        for rate_per_gpu, ttft in points:
            if name == "inter-op":
                form = queueing.inter_op_ttft_s(2 * rate_per_gpu, D)
            else:
                speedup = float(name.split("K = ")[1])
                form = queueing.intra_op_ttft_s(2 * rate_per_gpu, D, speedup)
            assert ttft == pytest.approx(form, rel=5e-4), (name, rate_per_gpu)


@pytest.mark.parametrize(("batches", "stages"), [(1, 4), (5, 2), (8, 4), (30, 3)])
def test_filling_and_draining_leaves_the_bubble(batches: int, stages: int):
    stage_s = 0.125  # a power of two: sums are exact
    system = simulated(f"prefill:tp1pp{stages},decode:tp1", (stage_s,) * stages)
    requests = [
        Request(id=i, arrival_s=0.0, prompt_tokens=512, max_tokens=1)
        for i in range(batches)
    ]
    done = system.run(requests)
    assert done.end_s == (batches + stages - 1) * stage_s
    busy_s = [done.busy_s[(0, k) if k else (0,)] for k in range(stages)]
    assert busy_s == [batches * stage_s] * stages
    bubble = (stages - 1) / (batches + stages - 1)
    idle = 1 - sum(busy_s) / (stages * done.end_s)
    assert idle == pytest.approx(bubble, abs=1e-12)


@pytest.mark.parametrize(("load", "n"), [(0.3, 1200), (0.7, 2400)])
def test_transfers_on_a_shared_link_are_an_md1_queue(load: float, n: int):
    # Two prefill instances send to one decode instance, whose end is the wire.
    link = LinkSpec(name="wire", latency_s=0.0, bandwidth_bytes_s=5120, efficiency=1)
    system = simulated("2xprefill:tp1,decode:tp1", (INSTANT_S,), link)
    rate = load / TRANSFER_S
    waits, shares = [], []
    for seed in SEEDS:
        done = run(system, rate, seed, output=2, n=n)
        waits.append(mean([_wait_s(t) for t in done.timelines]))
        shares.append(done.busy_s[(-2, 2)] / done.end_s)
    expect_inside(queueing.md1_wait_s(rate, TRANSFER_S), waits)
    expect_inside(load, shares)


def _wait_s(timeline) -> float:
    return timeline.transfer_end_s - timeline.transfer_start_s - TRANSFER_S
