"""Simulated deployments: pipeline stages, shared links, stragglers, points."""

import dataclasses
import itertools
import math
import statistics
from typing import ClassVar

import pytest

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.metrics import SLO, attainment, interval_across
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.run import SimulationTask, run_task
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import worker_pool
from disagg_jax.work import Done, Down, StageFree, Step, Straggle, Transfer, Up
from disagg_jax.workload import FixedLengths, RandomWorkload, UniformLengths
from tests.serving import make_request

PAIR = "prefill:tp1,decode:tp1"


@dataclasses.dataclass(frozen=True)
class Stages:
    """An `InstanceCost` with given seconds on each stage, whatever the load."""

    seconds: tuple[float, ...]

    def stages_s(self, load):
        return self.seconds

    def decode_s(self, decodes, context):
        (seconds,) = self.seconds
        return seconds


def simulated(deployment, *stages_s, policies=None, bytes_per_token=0, **network):
    """Instances with given stage seconds, by default 1 s each."""
    parsed = Deployment.parse(deployment)
    stages_s = stages_s or ((1.0,),) * len(parsed.instances)
    return SimulatedDeployment(
        deployment=parsed,
        policies={
            Role.PREFILL: PrefillOnly(),
            Role.DECODE: DecodeOnly(),
            Role.COLOCATED: PrefillFirst(),
            **(policies or {}),
        },
        memory=(KVMemory(num_blocks=1000, block_tokens=4, max_context=1000),)
        * len(parsed.instances),
        cost=ModelledCost(
            instances=tuple(Stages(s) for s in stages_s),
            network=Network(
                deployment=parsed, kv_bytes_per_token=bytes_per_token, **network
            ),
        ),
    )


def link(latency_s=0.0):
    return LinkSpec(
        name="slow",
        latency_s=latency_s,
        bandwidth_bytes_s=1.0,
        efficiency=1.0,
    )


class Log:
    """An observer that keeps when steps were in flight, by instance."""

    def __init__(self):
        self.steps, self.starts, self.free, self.ends = [], {}, {}, {}
        self.left = {}

    def __call__(self, now_s, events, works):
        for event in events:
            if isinstance(event, StageFree):
                self.free[event.work] = now_s
            elif isinstance(event, Done):
                self.starts[event.work] = event.start_s
                self.ends[event.work] = event.end_s
                self.left[event.work] = event.stage_ends_s
        self.steps += [work for work in works if isinstance(work, Step)]


# ---- pipeline stages -----------------------------------------------------------------


def test_stages_overlap_as_the_recurrence_says():
    # One prompt a step, stages of 1, 3 and 2 s. start(b, k) = max(end(b, k - 1),
    # end(b - 1, k)); at most 3 steps in flight, so step 4 waits for the first's end.
    run = simulated(
        "colocated:tp1pp3",
        (1.0, 3.0, 2.0),
        policies={Role.COLOCATED: PrefillFirst(max_batched_tokens=4)},
    )
    log = Log()
    requests = [make_request(i, prompt=4) for i in range(5)]
    result = run.run(requests, observer=log)
    # Step:      0        1        2         3          4
    # stage 0   0-1      1-2      2-3       6-7       9-10
    # stage 1   1-4      4-7      7-10     10-13     13-16
    # stage 2   4-6      7-9     10-12     13-15     16-18
    ids = [step.id for step in log.steps]
    assert [log.starts[i] for i in ids] == [0, 1, 2, 6, 9]
    assert [log.free[i] for i in ids] == [1, 2, 3, 7, 10]
    assert [log.left[i] for i in ids] == [(1, 4), (2, 7), (3, 10), (7, 13), (10, 16)]
    assert [log.ends[i] for i in ids] == [6, 9, 12, 15, 18]
    assert [t.token_s for t in result.timelines] == [[6], [9], [12], [15], [18]]
    assert result.busy_s == {(0,): 5.0, (0, 1): 15.0, (0, 2): 10.0}


@pytest.mark.parametrize(("stages", "steps"), [(1, 5), (2, 1), (2, 6), (4, 4), (4, 9)])
def test_fill_and_drain_bubble(stages, steps):
    """Idle share of equal stages with m steps: (pp - 1) / (m + pp - 1) exactly."""
    run = simulated(
        f"colocated:tp1pp{stages}",
        (1.0,) * stages,
        policies={Role.COLOCATED: PrefillFirst(max_batched_tokens=4)},
    )
    result = run.run([make_request(i, prompt=4) for i in range(steps)])
    busy_s = sum(result.busy_s.values())
    bubble = 1 - busy_s / (stages * result.end_s)
    assert bubble == pytest.approx((stages - 1) / (steps + stages - 1), abs=1e-12)


def test_a_decode_is_in_one_step_at_a_time_and_fills_the_pipeline():
    # 2 stages of 1 s. A decoding request is in one stage, so two groups take turns.
    run = simulated("colocated:tp1pp2", (1.0, 1.0))
    log = Log()
    requests = [make_request(0, 0.0, 4, 3), make_request(1, 1.0, 4, 3)]
    result = run.run(requests, observer=log)
    # 0: prefill 0-2, decodes 2-4, 4-6. 1: prefill 1-3, decodes 3-5, 5-7.
    assert [t.token_s for t in result.timelines] == [[2, 4, 6], [3, 5, 7]]
    assert all(step.iterations == 1 for step in log.steps)


# ---- links ---------------------------------------------------------------------------


def transfers(result):
    return [(t.transfer_start_s, t.transfer_end_s) for t in result.timelines]


def test_transfers_to_one_instance_queue_inside_a_node():
    # Two prefill instances end at 1 s; both send 4 bytes to the decode instance at
    # 1 byte/s. The second one's start is when it was asked for: its wait is transfer.
    run = simulated(
        "2xprefill:tp1,decode:tp1",
        bytes_per_token=1,
        inside=link(),
    )
    result = run.run([make_request(i, prompt=4, out=2) for i in range(2)])
    assert transfers(result) == [(1.0, 5.0), (1.0, 9.0)]
    assert result.busy_s[-2, 2] == 8.0
    assert [t.transfer_bytes for t in result.timelines] == [4, 4]


def test_transfers_to_different_instances_do_not_queue_inside_a_node():
    run = simulated(
        "2xprefill:tp1,2xdecode:tp1",
        bytes_per_token=1,
        inside=link(),
    )
    result = run.run([make_request(i, prompt=4, out=2) for i in range(2)])
    assert transfers(result) == [(1.0, 5.0), (1.0, 5.0)]


def test_transfers_between_nodes_share_the_senders_nic():
    # Nodes of 2 devices: prefill 0 and 1 in one, decode 2 and 3 in the other. The NIC
    # has 1 s of latency and is one wire, whoever receives.
    run = simulated(
        "2xprefill:tp1,2xdecode:tp1",
        bytes_per_token=1,
        inside=link(),
        between=link(latency_s=1.0),
        node_devices=2,
    )
    result = run.run([make_request(i, prompt=4, out=2) for i in range(2)])
    assert transfers(result) == [(1.0, 6.0), (1.0, 11.0)]
    assert result.busy_s[-1, 0] == 10.0


def test_lanes_are_the_devices_of_the_smaller_end():
    run = simulated(
        "prefill:tp4,decode:tp2",
        bytes_per_token=1,
        inside=link(),
    )
    result = run.run([make_request(0, prompt=8, out=2)])
    assert transfers(result) == [(1.0, 5.0)]  # 8 bytes over 2 links


def test_which_wire_a_transfer_takes_and_for_how_long():
    # Four devices a node: instance 0 fills node 0, 1 and 2 share node 1, 3 is on 2.
    deployment = Deployment.parse("prefill:tp2pp2,prefill:tp2,decode:tp2,decode:tp1pp2")
    network = Network(
        deployment=deployment,
        kv_bytes_per_token=2,
        inside=link(latency_s=0.25),
        between=link(latency_s=0.5),
        node_devices=4,
        layer_groups=4,
    )

    def hop(src, dst, step=0):
        request = make_request(prompt=8)
        found = network.hop(Transfer(1, request, src, dst, (), (), 4, step))
        return found.link, found.parts_s[0], len(found.parts_s), found.bytes

    # 8 bytes over the one NIC of the sender's node, at a byte a second.
    assert hop(0, 2) == hop(0, 3) == ((-1, 0), 0.5 + 8, 1, 8)
    assert hop(1, 3) == ((-1, 1), 0.5 + 8, 1, 8)
    # Inside a node over the links of both devices, into the receiver.
    assert hop(1, 2) == ((-2, 2), 0.25 + 4, 1, 8)
    # In parts where it goes beside its prompt, each with the latency.
    assert hop(0, 2, step=1) == ((-1, 0), 0.5 + 2, 4, 8)
    assert hop(1, 2, step=1) == ((-2, 2), 0.25 + 1, 4, 8)
    # Where there is no link inside a node it takes no time, and no wire; without one
    # between nodes all are in one.
    network = dataclasses.replace(network, inside=None)
    assert hop(1, 2) == ((), 0.0, 1, 8)
    assert hop(0, 2) == ((-1, 0), 0.5 + 8, 1, 8)
    network = dataclasses.replace(network, inside=link(), between=None)
    assert hop(0, 2) == ((-2, 2), 4.0, 1, 8)


def test_fair_transfers_share_the_wire():
    # 4 bytes at 1 byte/s each, asked for at 1 s and 3 s. The first has 2 left when the
    # second comes: both at half speed until 7 s, when the second has 2 left.
    run = simulated(
        "2xprefill:tp1,decode:tp1",
        bytes_per_token=1,
        inside=link(),
        sharing="fair",
    )
    requests = [make_request(i, 2.0 * i, prompt=4, out=2) for i in range(2)]
    result = run.run(requests)
    assert transfers(result) == [(1.0, 7.0), (3.0, 9.0)]
    assert result.busy_s[-2, 2] == 8.0


def test_a_transfer_that_is_lost_leaves_its_share_to_the_others():
    run = simulated(
        "2xprefill:tp1,decode:tp1",
        bytes_per_token=1,
        inside=link(),
        sharing="fair",
    )
    requests = [make_request(i, prompt=4, out=2) for i in range(2)]
    result = run.run(requests, [(3.0, Down(0)), (50.0, Up(0))])
    # Both share 1-3 and have 3 bytes left; request 1 then goes on alone.
    assert transfers(result)[1] == (1.0, 6.0)


@pytest.mark.parametrize(
    ("arrivals_s", "prompts", "landed_s"),
    [
        # Steps of 1 s, a byte a token, 1 byte/s: 30 and 40 bytes from 1.5 and 1.25 on.
        # 0.25 gone, then 30 by halves to 61.5, and the 9.75 that are left to 71.25.
        ((0.5, 0.25), (30, 40), (61.5, 71.25)),
        ((0.0, 0.0), (7, 7), (15.0, 15.0)),  # both end at one instant
        ((0.0, 0.0), (3, 7), (7.0, 11.0)),
        ((0.0, 2.0), (4, 2), (7.0, 7.0)),  # comes when as much is left of the other
        ((0.0, 4.0), (4, 4), (5.0, 9.0)),  # comes when the other ends
    ],
)
def test_two_fair_transfers(arrivals_s, prompts, landed_s):
    run = simulated(
        "2xprefill:tp1,decode:tp1", bytes_per_token=1, inside=link(), sharing="fair"
    )
    requests = [
        make_request(i, at_s, prompt=n, out=2)
        for i, (at_s, n) in enumerate(zip(arrivals_s, prompts, strict=True))
    ]
    result = run.run(requests)
    by_id = {t.request.id: t.transfer_end_s for t in result.timelines}
    assert (by_id[0], by_id[1]) == landed_s
    assert result.busy_s[-2, 2] == sum(prompts)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("sharing", ["fifo", "fair"])
@pytest.mark.parametrize("streams", [False, True])
def test_kv_that_takes_no_time(size, sharing, streams):
    # No bytes, or no link inside the node.
    network = {"inside": link()} if size == 0 else {}
    run = simulated(
        "2xprefill:tp1,decode:tp1", bytes_per_token=size, sharing=sharing, **network
    )
    run = dataclasses.replace(run, streams=streams)
    result = run.run([make_request(i, prompt=4, out=3) for i in range(4)])
    assert [t.token_s for t in result.timelines] == [[1, 2, 3]] * 4
    assert transfers(result) == [(1.0, 1.0)] * 4


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Down(2), r"one of the 2 instances, got Down\(instance=2\)"),
        (Up(-1), r"one of the 2 instances, got Up\(instance=-1\)"),
        (Straggle(7, 2.0), "one of the 2 instances, got Straggle"),
        (Straggle(0, 0.0), "finite factor > 0, got 0.0"),
    ],
)
def test_interventions_that_cannot_be_are_refused_before_the_run(event, message):
    log = Log()
    with pytest.raises(ValueError, match=message):
        simulated(PAIR).run([make_request(0)], [(90.0, event)], observer=log)
    assert not log.steps
    for at_s in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"expected a finite time, got {at_s}"):
            simulated(PAIR).run([make_request(0)], [(at_s, Up(0))])


def test_mean_time_on_a_fair_link_is_that_of_processor_sharing():
    """M/D/1-PS: D / (1 - rho). Steps take no time: arrivals at the link are Poisson."""
    size, rate = 5, 0.1  # D = 5 s at 1 byte/s, rho = 0.5
    run = simulated(
        "prefill:tp1,decode:tp1",
        (0.0,),
        (0.0,),
        bytes_per_token=1,
        inside=link(),
        sharing="fair",
    )
    workload = RandomWorkload(
        prompt=FixedLengths(tokens=size), output=FixedLengths(tokens=2)
    )
    means = [
        statistics.mean(
            end - start
            for start, end in transfers(run.run(workload.requests(3000, rate, seed)))
        )
        for seed in range(6)
    ]
    interval = interval_across(means, confidence=0.99)
    assert interval.low < 10.0 < interval.high
    assert interval.high - interval.low < 3.0


def test_stages_and_links_have_times_of_their_own():
    # Stage 1 of instance 0 and the link from 0 to 1 once had the same name.
    run = simulated("prefill:tp1pp2,decode:tp1", (1.0, 5.0), (1.0,))
    result = run.run([make_request(i, prompt=600, out=2) for i in range(2)])
    assert transfers(result) == [(6.0, 6.0), (11.0, 11.0)]


# ---- stragglers ----------------------------------------------------------------------


@pytest.mark.parametrize("spans", [False, True])
def test_a_slow_instance_takes_longer_from_the_next_step_on(spans):
    run = dataclasses.replace(simulated("colocated:tp1", (1.0,)), spans=spans)
    slow = [(2.5, Straggle(0, 3.0)), (7.0, Straggle(0, 1.0))]
    result = run.run([make_request(0, prompt=4, out=7)], slow)
    # 0-1 prefill, 1-2, 2-3 as usual; 3-6, 6-9 three times as long; then as usual.
    assert result.timelines[0].token_s == [1, 2, 3, 6, 9, 10, 11]


def test_all_stages_of_a_slow_instance_are_slow():
    # Stages of 1 and 2 s, three times as long: 0-3, 3-9; 9-12, 12-18. From then on as
    # usual; what is on its way keeps its pace.
    run = simulated("colocated:tp1pp2", (1.0, 2.0))
    slow = [(0.0, Straggle(0, 3.0)), (10.0, Straggle(0, 1.0))]
    result = run.run([make_request(0, prompt=4, out=3)], slow)
    assert result.timelines[0].token_s == [9, 18, 21]
    assert result.busy_s == {(0,): 3 + 3 + 1, (0, 1): 6 + 6 + 2}


def test_only_slow_instances_are_slow():
    run = simulated("prefill:tp1pp2,decode:tp1", (1.0, 2.0), (1.0,))
    slow = [(0.0, Straggle(1, 2.0)), (4.0, Straggle(0, 3.0))]
    requests = [make_request(i, 5.0 * i, prompt=4, out=3) for i in range(2)]
    result = run.run(requests, slow)
    # 1 is slow from the start and stays so; 0 is when the second request comes at 5.
    assert [t.token_s for t in result.timelines] == [[3, 5, 7], [14, 16, 18]]


def test_a_factor_is_positive_and_finite():
    run = simulated("colocated:tp1", (1.0,))
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"finite factor > 0, got {factor}"):
            run.run([make_request(0)], [(0.0, Straggle(0, factor))])


# ---- tasks ---------------------------------------------------------------------------

WORKLOAD = RandomWorkload(
    prompt=UniformLengths(low=1, high=200), output=UniformLengths(low=1, high=200)
)


def test_a_result_is_judged_as_the_metrics_do():
    slo = SLO(ttft_s=3.0, tpot_s=1.5)
    run = simulated(PAIR, (1.0,), (1.0,))
    task = SimulationTask(
        simulated=run, workload=WORKLOAD, rate_rps=0.9, num_requests=60
    )
    result = run_task(task)
    timelines = run.run(WORKLOAD.requests(60, 0.9, 0)).timelines
    for scale in (0.5, 1.0, 2.0):
        expected = attainment(timelines, slo.scaled(scale))
        assert result.attainment(slo.scaled(scale)) == expected
    assert 0 < result.attainment(slo).joint < 1


def test_workers_give_the_results_of_one_process_in_order():
    cost = LinearCost(step_base_s=0.01, prefill_token_s=1e-4)
    run = dataclasses.replace(simulated(PAIR, (1.0,), (1.0,)), cost=cost)
    task = SimulationTask(
        simulated=run, workload=WORKLOAD, rate_rps=1.0, num_requests=20
    )
    tasks = [
        dataclasses.replace(task, rate_rps=rate, seed=seed)
        for rate, seed in itertools.product((1.0, 9.0), (0, 1))
    ]
    with worker_pool(2) as mapper:
        assert list(mapper(run_task, tasks)) == list(map(run_task, tasks))


class Seen(LinearCost):
    """Notes of each step its chunks, its decodes and the blocks that these see."""

    seen: ClassVar[list[tuple[object, int, int]]] = []

    def stages_s(self, instance, load):
        self.seen.append((load.chunks, load.decodes, load.decode_blocks))
        return super().stages_s(instance, load)


def test_steps_tell_the_blocks_that_their_decodes_attend_to():
    """Blocks of 4 tokens; two requests, of which the second is 3 tokens behind."""
    Seen.seen.clear()
    policies = {Role.COLOCATED: SarathiServe(token_budget=4, max_seqs=2)}
    run = dataclasses.replace(
        simulated("colocated:tp1", policies=policies),
        cost=Seen(step_base_s=1.0),
        counts_blocks=True,
        spans=False,
    )
    run.run([make_request(prompt=5, out=5), make_request(1, prompt=2, out=4)])
    # Contexts with the new token: 6 and 3, 7 and 4, 8 and 5, then 9.
    first, second = ((0, 4),), ((4, 1), (0, 2))
    decodes = [((), 2, 3), ((), 2, 3), ((), 2, 4), ((), 1, 3)]
    assert Seen.seen == [(first, 0, 0), (second, 0, 0), *decodes]


def test_blocks_are_counted_in_no_span():
    with pytest.raises(ValueError, match="blocks: expected spans=False, got True"):
        dataclasses.replace(simulated(PAIR), counts_blocks=True)
    counted = dataclasses.replace(simulated(PAIR), counts_blocks=True, spans=False)
    requests = [make_request(i, prompt=6, out=5) for i in range(3)]
    found, expected = (it.run(requests).timelines for it in (counted, simulated(PAIR)))
    assert [t.token_s for t in found] == [t.token_s for t in expected]
