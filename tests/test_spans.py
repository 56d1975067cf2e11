"""Spans of decode iterations change how fast a simulation runs, and nothing else."""

import dataclasses

from hypothesis import event, given, settings
from hypothesis import strategies as st

from disagg_jax.backend import serve
from disagg_jax.sim.clock import VirtualBackend
from disagg_jax.sim.cost import CostExecutor
from disagg_jax.work import Cut, Progress, Step
from tests.serving import assert_all_free
from tests.test_controller_properties import Case, cases


class Watch:
    """Counts what happened, and checks that spans are told completely and in order."""

    def __init__(self):
        self.spans = self.cuts = self.turns = 0
        self.left = {}  # work id -> iterations still to be told

    def __call__(self, now_s, events, works):
        self.turns += 1
        for told in events:
            if isinstance(told, Progress):
                assert told.ends_s and told.ends_s[-1] <= now_s
                self.left[told.work] -= len(told.ends_s)
                assert self.left[told.work] > 0
        for work in works:
            if isinstance(work, Step) and work.iterations > 1:
                self.spans += 1
                self.left[work.id] = work.iterations
            self.cuts += isinstance(work, Cut)


def run(case: Case, spans: bool):
    requests = [dataclasses.replace(r, prompt=None) for r in case.requests]
    controller = case.controller(spans)
    backend, watch = VirtualBackend(CostExecutor(case.cost)), Watch()
    timelines = serve(controller, backend, requests, case.interventions, watch)
    assert_all_free(controller)
    return [dataclasses.asdict(t) for t in timelines], watch


@st.composite
def lasting_cases(draw) -> Case:
    """Every step takes time, so that no two iterations end at one instant."""
    case = draw(cases())
    costs = st.sampled_from([0.5, 1.0, 1.25, 3.0])
    cost = dataclasses.replace(
        case.cost,
        step_base_s=draw(costs),
        context_token_s=draw(st.sampled_from([0.0, 0.25])),
    )
    requests = [
        dataclasses.replace(r, max_tokens=r.max_tokens, eos_token=None)
        for r in case.requests
    ]
    return dataclasses.replace(case, cost=cost, requests=requests)


@settings(max_examples=500)
@given(lasting_cases())
def test_a_run_with_spans_is_the_run_without(case: Case):
    with_spans, watch = run(case, spans=True)
    without, _ = run(case, spans=False)
    assert with_spans == without
    event(f"spans: {watch.spans > 0}")
    event(f"cuts: {watch.cuts > 0}")
