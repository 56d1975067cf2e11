"""Decode steps are timed with the caches that a device of their own would have."""

import itertools

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.engine.executor import EngineExecutor
from disagg_jax.work import Step
from tests.engine.harness import (
    MODELS,
    assert_reference,
    make_controller,
    mixed_requests,
    one_second,
)

CONFIG = MODELS["divided"]


class Spy(EngineExecutor):
    """Keeps what ran, and what ran before it was timed."""

    def __init__(self, engine, warm_up):
        super().__init__(engine, one_second, warm_up)
        self.ran, self.warmed = [], []
        start, warm = engine.start, engine.warm_up
        engine.start = lambda work: self.ran.append(work) or start(work)
        engine.warm_up = lambda step: self.warmed.append(step) or warm(step)


def run(world, deployment, warm_up):
    engine = world.engine(deployment, CONFIG)
    spy = Spy(engine, warm_up)
    requests = mixed_requests(world, CONFIG)
    with engine.serving():
        timelines = serve(make_controller(engine), VirtualBackend(spy), requests)
    assert_reference(world, CONFIG, {t.request.id: t for t in timelines})
    return spy, [t.token_s for t in timelines]


def cold(works):
    """Decode steps whose last step before, transfers aside, was another's prompt."""
    steps = [work for work in works if isinstance(work, Step)]
    return [
        b
        for a, b in itertools.pairwise(steps)
        if not b.load.chunks and a.load.chunks and a.instance != b.instance
    ]


def test_a_decode_step_after_another_instances_prompt_runs_twice(world):
    plain, stamps = run(world, "2xcolocated:tp1", warm_up=False)
    assert not plain.warmed and cold(plain.ran)
    warmed, again = run(world, "2xcolocated:tp1", warm_up=True)
    assert warmed.warmed == cold(warmed.ran) != []
    assert again == stamps
    # What was padding is told of the steps that counted.
    assert warmed.engine.totals == plain.engine.totals


def test_tokens_stay_where_kv_comes_from_another_instance(world):
    spy, _ = run(world, "prefill:tp1,decode:tp1", warm_up=True)
    assert spy.warmed == cold(spy.ran) != []


def test_one_instance_has_the_caches_it_would_have(world):
    spy, _ = run(world, "colocated:tp1", warm_up=True)
    assert spy.ran and not spy.warmed
