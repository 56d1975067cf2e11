"""The wall backend: real time, everything in flight at once."""

import itertools
import math

import jax
import numpy as np
import pytest

from disagg_jax.control.loop import serve
from disagg_jax.engine.engine import Pause
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.request import Status
from disagg_jax.work import Cancelled, Done, Down, Slice, StageFree, Step, Transfer, Up
from tests.engine.harness import (
    MODELS,
    assert_drained,
    assert_reference,
    drive,
    make_controller,
    make_request,
    mixed_requests,
)

CONFIG = MODELS["divided"]
DEPLOYMENTS = ["colocated:tp1", "prefill:tp1,decode:tp1"]


@pytest.mark.parametrize("deployment", [*DEPLOYMENTS, "prefill:tp2,decode:tp4"])
def test_tokens_and_stamps(world, deployment):
    """Stamps rise along every request; each stage took time; transfers are counted."""
    engine = world.engine(deployment)
    timelines = drive(engine, WallBackend(engine), mixed_requests(world, CONFIG))
    assert_reference(world, CONFIG, timelines)
    for id, timeline in timelines.items():
        stamps = [timeline.request.arrival_s, timeline.prefill_start_s]
        stamps += timeline.token_s[:1]
        if "decode" in deployment and id != 2:  # 2 is done after prefill
            stamps += [timeline.transfer_start_s, timeline.transfer_end_s]
            assert timeline.transfer_bytes > 0
            assert timeline.transfer_end_s > timeline.transfer_start_s
        if id != 2:
            stamps += [timeline.decode_start_s, timeline.token_s[1], timeline.end_s]
        assert stamps == sorted(stamps)
        assert timeline.token_s == sorted(set(timeline.token_s))


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_arrivals_are_waited_for(world, deployment):
    engine = world.engine(deployment)
    controller = make_controller(engine)
    requests = [make_request(i, 5, 6, arrival_s=0.05 * i) for i in range(4)]
    with engine.serving():
        timelines = serve(controller, WallBackend(engine), requests)
    assert_drained(controller)
    assert_reference(world, CONFIG, {t.request.id: t for t in timelines})
    for request, timeline in zip(requests, timelines, strict=True):
        assert timeline.prefill_start_s >= request.arrival_s


@pytest.mark.parametrize("turn", range(1, 12, 2))
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_cancellation_at_any_turn(world, deployment, turn):
    """The others get their tokens; it keeps the ones it had."""
    engine = world.engine(deployment)
    requests = [make_request(i, 9 + i, 10) for i in range(5)]
    timelines = drive(engine, WallBackend(engine), requests, {turn: [Cancelled(1)]})
    cancelled = timelines.pop(1)
    assert_reference(world, CONFIG, timelines)
    expected = world.reference(CONFIG, requests[1])
    if cancelled.status is not Status.FINISHED:
        assert cancelled.status is Status.CANCELLED
        assert len(cancelled.tokens) < 10
    assert cancelled.tokens == expected[: len(cancelled.tokens)]


@pytest.mark.parametrize("turn", range(1, 12, 2))
@pytest.mark.parametrize(
    "deployment, lost",
    [
        ("colocated:tp1", 0),
        ("prefill:tp1,decode:tp1", 0),
        ("prefill:tp1,decode:tp1", 1),
    ],
)
def test_loss_of_an_instance_at_any_turn(world, deployment, lost, turn):
    """What was in flight may still write when the blocks are given to others."""
    engine = world.engine(deployment)
    requests = [make_request(i, 9 + i, 10) for i in range(5)]
    at_turn = {turn: [Down(lost), Up(lost)]}
    timelines = drive(engine, WallBackend(engine), requests, at_turn)
    assert_reference(world, CONFIG, timelines)


@pytest.mark.parametrize("lost", [0, 1])
def test_an_instance_that_stays_away_for_a_while(world, lost):
    engine = world.engine("prefill:tp1,decode:tp1")
    requests = [make_request(i, 9 + i, 10) for i in range(5)]
    at_turn = {5: [Down(lost)], 12: [Up(lost)]}
    timelines = drive(engine, WallBackend(engine), requests, at_turn)
    assert_reference(world, CONFIG, timelines)


def make_work(kind: str):
    request = make_request(0, 8, 4)
    if kind == "transfer":
        return Transfer(7, request, 0, 1, (0, 1), (2, 3), 8)
    return Step.of(7, 0, (Slice(request, 0, 8, True, (0, 1), request.prompt),))


@pytest.mark.parametrize(
    "kind, instance", [("step", 0), ("transfer", 0), ("transfer", 1)]
)
def test_dropped_work_is_never_done(world, kind, instance):
    engine = world.engine("prefill:tp1,decode:tp1")
    backend = WallBackend(engine)
    with engine.serving():
        backend.submit(make_work(kind))
        backend.drop(instance)
        assert backend.wait(math.inf) == []


def test_a_dropped_transfer_does_not_write_later(world):
    """Its blocks may be another request's by then."""
    engine = world.engine("prefill:tp1,decode:tp1")
    backend = WallBackend(engine)
    before = [np.array(part) for part in jax.tree.leaves(engine.instances[1].cache)]
    with engine.serving():
        backend.submit(make_work("transfer"))
        backend.drop(0)
        backend.submit(make_work("step"))
        (done,) = backend.wait(math.inf)
    after = [np.array(part) for part in jax.tree.leaves(engine.instances[1].cache)]
    assert done.work == 7 and len(done.tokens) == 1
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_dropping_one_instance_leaves_the_work_of_others(world):
    engine = world.engine("prefill:tp1,decode:tp1")
    backend = WallBackend(engine)
    with engine.serving():
        backend.submit(make_work("step"))
        backend.drop(1)
        (done,) = backend.wait(math.inf)
    assert done.work == 7


class Scripted:
    """An engine whose work goes through the pauses it is told; `at` is the latest."""

    def __init__(self, *ends_part):
        self.at, self._ends_part = 0, ends_part

    def start(self, work):
        for at, ends_part in enumerate(self._ends_part):
            self.at = at
            yield Pause((), ends_part)
        return (), 0


@pytest.mark.parametrize("kind, free_at", [("step", [2]), ("transfer", [])])
def test_a_step_leaves_the_first_stage_once_with_its_last_group(kind, free_at):
    """Pauses 0 and 1 are of its groups on that stage; transfers have no stages."""
    engine = Scripted(False, True, True, True)
    backend = WallBackend(engine)
    backend.submit(make_work(kind))
    found = []
    while not isinstance(report := backend.wait(math.inf)[0], Done):
        assert report == StageFree(7)
        found.append(engine.at)
    assert found == free_at


def test_wait_ends_at_its_deadline(world):
    backend = WallBackend(world.engine("colocated:tp1"))
    start_s = backend.now_s()
    assert backend.wait(math.inf) == []
    assert backend.now_s() - start_s < 0.05
    assert backend.wait(start_s + 0.1) == []
    assert 0.1 <= backend.now_s() - start_s


def test_time_starts_at_zero_and_rises(world):
    backend = WallBackend(world.engine("colocated:tp1"))
    stamps = [backend.now_s() for _ in range(5)]
    assert 0 <= stamps[0] < 1
    assert all(a <= b for a, b in itertools.pairwise(stamps))
