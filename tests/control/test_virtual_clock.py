"""The virtual clock: one thing at a time for each device and link, exactly timed."""

import dataclasses
import math

import numpy as np
import pytest

from disagg_jax.control.backend import Outcome
from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Role
from disagg_jax.metrics import interval_across
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Done, Slice, Step, Transfer
from tests.serving import SECOND, assert_all_free, make_controller, make_request


def step(id, instance=0, *parts) -> Step:
    """A step of slices (start, count)."""
    request = make_request(prompt=100)
    slices = [
        Slice(request, start, n, True, (0,), ()) for start, n in parts or [(0, 1)]
    ]
    return Step.of(id, instance, slices)


def transfer(id, src=0, dst=1, context=1) -> Transfer:
    return Transfer(id, make_request(prompt=100), src, dst, (0,), (0,), context)


class Durations:
    """An executor with a duration for each work id, or one on each of its stages."""

    def __init__(self, *durations_s, **fields):
        self._durations_s, self._fields = durations_s, fields

    def run(self, work) -> Outcome:
        duration_s = self._durations_s[work.id]
        if isinstance(duration_s, tuple):
            return Outcome(duration_s[:1], later_stages_s=duration_s[1:])
        fields = self._fields if isinstance(work, Transfer) else {}
        return Outcome((duration_s,), **fields)


def spans(done):
    return [(d.work, d.start_s, d.end_s) for d in done]


def rest(backend):
    """Every Done that is still to come."""
    found = []
    while done := backend.wait(math.inf):
        found += [d for d in done if isinstance(d, Done)]
    return found


def test_a_link_is_first_in_first_out():
    backend = VirtualBackend(Durations(2.0, 1.0, 0.5))
    for id in range(3):
        backend.submit(transfer(id))
    assert spans(backend.wait(math.inf)) == [(0, 0.0, 2.0)]
    assert spans(backend.wait(math.inf)) == [(1, 2.0, 3.0)]
    assert spans(backend.wait(math.inf)) == [(2, 3.0, 3.5)]
    assert backend.now_s() == 3.5


def test_other_links_and_instances_do_not_wait():
    backend = VirtualBackend(Durations(4.0, 3.0, 2.0, 1.0))
    works = [transfer(0, 0, 1), transfer(1, 1, 0), transfer(2, 0, 2), step(3, 0)]
    for work in works:
        backend.submit(work)
    done = [d for _ in works for d in backend.wait(math.inf)]
    assert spans(done) == [(3, 0, 1), (2, 0, 2), (1, 0, 3), (0, 0, 4)]


def test_what_ends_at_an_instant_comes_together_links_first_then_instances():
    backend = VirtualBackend(Durations(2.0, 1.0, 1.0, 1.0))
    for work in (step(0, 0), step(1, 1), transfer(2, 0, 1), transfer(3, 0, 1)):
        backend.submit(work)
    assert [d.work for d in backend.wait(math.inf)] == [2, 1]
    assert [d.work for d in backend.wait(math.inf)] == [3, 0]


def test_of_an_instant_the_end_of_a_stream_comes_last():
    # Its step ends at 2 and its KV, 1 s on the link, at 3, as does another's step.
    backend = VirtualBackend(Durations(3.0, 2.0, 1.0, 3.0))
    stream = dataclasses.replace(transfer(2, 0, 1), step=1)
    for work in (step(0, 2), step(1, 0), stream, transfer(3, 2, 1)):
        backend.submit(work)
    assert [d.work for d in backend.wait(math.inf)] == [1]
    assert [d.work for d in backend.wait(math.inf)] == [3, 0, 2]


def test_wait_goes_to_the_next_completion_and_no_further_than_asked():
    backend = VirtualBackend(Durations(2.0))
    backend.submit(step(0))
    assert (backend.wait(1.5), backend.now_s()) == ([], 1.5)
    assert spans(backend.wait(2.0)) == [(0, 0.0, 2.0)]  # at the very instant
    assert (backend.wait(5.0), backend.now_s()) == ([], 5.0)
    assert (backend.wait(math.inf), backend.now_s()) == ([], 5.0)
    assert (backend.wait(3.0), backend.now_s()) == ([], 5.0)  # time does not go back


def test_work_starts_when_it_is_submitted_or_when_its_device_is_free():
    backend = VirtualBackend(Durations(2.0, 2.0, 2.0))
    backend.wait(1.0)
    backend.submit(step(0))
    backend.submit(step(1))
    assert [backend.wait(math.inf)[0].start_s for _ in range(2)] == [1.0, 3.0]
    backend.wait(9.0)
    backend.submit(step(2))
    assert backend.wait(math.inf)[0].start_s == 9.0


def test_drop_forgets_what_touches_an_instance_and_frees_its_links():
    backend = VirtualBackend(Durations(9.0, 9.0, 9.0, 3.0, 1.0, 1.0))
    for work in (step(0, 1), transfer(1, 0, 1), transfer(2, 1, 2), transfer(3, 0, 2)):
        backend.submit(work)
    backend.wait(2.0)
    backend.drop(1)
    backend.submit(step(4, 1))
    backend.submit(transfer(5, 0, 1))
    done = [*backend.wait(math.inf), *backend.wait(math.inf)]
    assert spans(done) == [(5, 2.0, 3.0), (3, 0.0, 3.0), (4, 2.0, 3.0)]


def test_a_loss_frees_the_stages_of_its_own_instance_only():
    # Stages of 1 s and 4 s. (0, 1) is a stage of instance 0 though it ends with a 1.
    backend = VirtualBackend(Durations(*[(1.0, 4.0)] * 6))
    for work in (step(0, 0), step(1, 0), step(2, 1), step(3, 1)):
        backend.submit(work)
    backend.wait(1.5)
    backend.wait(1.5)
    backend.drop(1)
    backend.submit(step(4, 0))  # first stage 2-3; on the second, behind two: 9-13
    backend.submit(step(5, 1))  # both stages are free
    assert spans(rest(backend)) == [(0, 0, 5), (5, 1.5, 6.5), (1, 1, 9), (4, 2, 13)]
    # What was lost is not counted, on no stage.
    assert backend.busy_s == {(0,): 3, (0, 1): 12, (1,): 1, (1, 1): 4}


@pytest.mark.parametrize("wire", [(-1, 0), (-1, 1), (-2, 1), (-2, 2)])
def test_a_loss_leaves_a_wire_to_the_transfers_of_others(wire):
    # Whatever the numbers in its name: 0 and 1 are nodes, or those that receive.
    backend = VirtualBackend(Durations(9.0, 1.0, link=wire))
    backend.submit(transfer(0, 0, 2))
    backend.wait(2.0)
    backend.drop(1)
    backend.submit(transfer(1, 0, 2))
    assert spans(rest(backend)) == [(0, 0, 9), (1, 9, 10)]


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        # Four transfers of 4 s on one wire, to 1, 2, 3 and 2, and a loss at 5 s.
        (1, [(0, 0, 4), (1, 4, 8), (2, 8, 12), (3, 12, 16)]),  # its was done
        (2, [(0, 0, 4), (2, 5, 9)]),  # the one on the wire, and the last
        (3, [(0, 0, 4), (1, 4, 8), (3, 8, 12)]),  # the next
        (0, [(0, 0, 4)]),  # the sender: all
    ],
)
def test_transfers_behind_one_that_is_lost_move_up(lost, expected):
    backend = VirtualBackend(Durations(4.0, 4.0, 4.0, 4.0, 2.0, link=(-1, 0)))
    for id, dst in enumerate([1, 2, 3, 2]):
        backend.submit(transfer(id, 0, dst))
    done = backend.wait(5.0)
    assert backend.wait(5.0) == []
    backend.drop(lost)
    end_s = max(5, expected[-1][-1])
    backend.submit(transfer(4, 7, 8))  # another's, behind them
    expected = [*expected, (4, end_s, end_s + 2)]
    assert spans(done + rest(backend)) == expected
    assert backend.busy_s[-1, 0] == 2 + 4 * (len(expected) - 1)  # no lost ones


def test_a_loss_while_transfers_end_at_its_very_instant():
    backend = VirtualBackend(Durations(2.0, 2.0, 2.0, link=(-1, 0)))
    for id, dst in enumerate([1, 2, 3]):
        backend.submit(transfer(id, 0, dst))
    assert spans(backend.wait(2.0)) == [(0, 0, 2)]  # it landed before
    backend.drop(1)
    backend.drop(2)  # has just begun
    assert spans(rest(backend)) == [(2, 2, 4)]


def test_fair_transfers_that_end_together_are_told_together():
    # Thirds are no binary fractions; each of three gets a third of the wire.
    backend = VirtualBackend(Durations(*[1 / 3] * 4, link=(-1, 0), shared=True))
    for id in range(3):
        backend.submit(transfer(id, id, 9))
    done = backend.wait(math.inf)
    assert [d.work for d in done] == [0, 1, 2]
    assert [d.end_s for d in done] == [pytest.approx(1.0)] * 3
    assert backend.wait(math.inf) == []
    backend.submit(transfer(3, 0, 9))
    assert spans(rest(backend)) == [(3, 1.0, pytest.approx(4 / 3))]


def test_a_fair_transfer_comes_within_a_rounding_error_of_anothers_end():
    # The first ends at 0.2 + 0.4 > 0.6, when the others come, one of them of no bytes.
    backend = VirtualBackend(Durations(0.4, 0.3, 0.0, link=(-2, 1), shared=True))
    backend.wait(0.2)
    backend.submit(transfer(0))
    assert backend.wait(0.6) == []
    backend.submit(transfer(1))
    backend.submit(transfer(2))
    done = rest(backend)
    ends_s = [d.end_s for d in done]
    assert ends_s == sorted(ends_s) == pytest.approx([0.6, 0.6, 0.9])
    assert done[-1].work == 1


def test_a_link_is_no_stage_of_an_instance():
    backend = VirtualBackend(Durations(1.0, link=(0, 1)))
    with pytest.raises(ValueError, match=r"name that begins below 0, got \(0, 1\)"):
        backend.submit(transfer(0))


@pytest.mark.parametrize("duration_s", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("work", [step(0), transfer(0)])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_duration_is_finite_and_not_negative(duration_s, work, stages):
    if stages == 2 and isinstance(work, Step):
        duration_s = (1.0, duration_s)
    backend = VirtualBackend(Durations(duration_s))
    with pytest.raises(ValueError, match="work 0: expected a finite duration >= 0"):
        backend.submit(work)


def test_linear_cost_counts_prompt_decode_and_context_tokens():
    cost = LinearCost(
        step_base_s=1000.0,
        prefill_token_s=100.0,
        decode_token_s=10.0,
        context_token_s=1.0,
        transfer_base_s=5.0,
        transfer_token_s=0.5,
    )
    # A prompt of 1 is a prompt too; contexts of 5 and 3; a chunk beside a decode.
    for parts, seconds in (
        ([(0, 3), (0, 1)], 1400.0),
        ([(4, 1), (2, 1)], 1028.0),
        ([(4, 2), (2, 1)], 1213.0),
    ):
        assert cost.stages_s(0, step(0, 0, *parts).load) == (seconds,)
    assert cost.hop(transfer(0, context=6)).duration_s == 8.0
    executor = CostExecutor(cost)
    assert executor.run(transfer(0, context=6)) == Outcome((8.0,), link=())


def test_linear_cost_of_stages_and_of_parts():
    cost = LinearCost(
        step_base_s=1.0,
        prefill_token_s=0.25,
        transfer_base_s=5.0,
        transfer_token_s=0.5,
        transfer_parts=4,
        pp=(2, 4),
    )
    # A prompt of 4 takes 2 s, equally long on each stage of its instance.
    load = step(0, 0, (0, 4)).load
    assert cost.stages_s(0, load) == (1.0, 1.0)
    assert cost.stages_s(1, load) == (0.5,) * 4
    # KV that leaves beside its prompt goes in 4 parts, each with the link's latency: 6
    # tokens are 1.5 a part.
    beside = dataclasses.replace(transfer(0, context=6), step=1)
    whole, parts = cost.hop(transfer(0, context=6)), cost.hop(beside)
    assert whole.parts_s == (8.0,)
    assert parts.parts_s == (5.75,) * 4
    assert parts.duration_s == 23.0
    assert CostExecutor(cost).run(beside).durations_s == (5.75,) * 4
    # Stages after the first are told apart.
    outcome = CostExecutor(cost).run(step(0, 1, (0, 4)))
    assert (outcome.durations_s, outcome.later_stages_s) == ((0.5,), (0.5,) * 3)


# ---- against a closed form -----------------------------------------------------------


def mean_wait_s(utilisation: float, seed: int, n: int = 2500) -> float:
    """Mean queueing time of one colocated instance that serves 1 request a second."""
    arrivals_s = np.random.default_rng(seed).exponential(1 / utilisation, n).cumsum()
    requests = [make_request(i, t) for i, t in enumerate(arrivals_s.tolist())]
    controller = make_controller(policies={Role.COLOCATED: PrefillFirst(max_seqs=1)})
    timelines = serve(controller, VirtualBackend(CostExecutor(SECOND)), requests)
    assert all(t.end_s == t.prefill_start_s + 1.0 for t in timelines)
    return float(np.mean([t.prefill_start_s - t.request.arrival_s for t in timelines]))


@pytest.mark.parametrize("utilisation", [0.4, 0.7])
def test_mean_wait_of_an_md1_queue(utilisation):
    # Pollaczek-Khinchine: W = rho D / (2 (1 - rho)), here with D = 1 s. The seeds are
    # fixed; at 99 % one utilisation in a hundred would miss with seeds drawn anew.
    waits = [mean_wait_s(utilisation, seed) for seed in range(8)]
    interval = interval_across(waits, confidence=0.99)
    expected_s = utilisation / (2 * (1 - utilisation))
    assert interval.low < expected_s < interval.high
    assert interval.high - interval.low < 0.4 * expected_s  # narrow enough to fail


# ---- determinism ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "deployment", ["2xcolocated:tp1", "2xprefill:tp1,2xdecode:tp1"]
)
def test_two_runs_are_the_same_bytes(deployment):
    rng = np.random.default_rng(0)
    requests = [
        make_request(
            i, t, prompt=int(rng.integers(1, 30)), out=int(rng.integers(1, 30))
        )
        for i, t in enumerate(rng.exponential(0.5, 60).cumsum().tolist())
    ]
    cost = LinearCost(step_base_s=0.1, prefill_token_s=0.01, transfer_token_s=0.003)

    def one_run():
        controller, log = make_controller(deployment, blocks=20), EventLog()
        backend = VirtualBackend(CostExecutor(cost))
        timelines = serve(controller, backend, requests, observer=log)
        assert_all_free(controller)
        return "\n".join(log.lines), [dataclasses.asdict(t) for t in timelines]

    log, timelines = one_run()
    assert one_run() == (log, timelines)
    assert sum(len(t["dropped_s"]) for t in timelines) > 0
