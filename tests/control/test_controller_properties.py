"""Random runs of both systems: what must hold after every turn, and at the end.

Costs and times are small whole numbers, so that arrivals, completions, cancellations
and losses often fall on one instant.
"""

import dataclasses
import itertools

from hypothesis import event, given
from hypothesis import strategies as st

from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.control.request_state import Place
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role
from disagg_jax.metrics import stages_s
from disagg_jax.request import Request, Status
from disagg_jax.runlog.event_log import EventLog, replay
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Cancelled, Done, Down, Transfer, Up
from tests.serving import CheckingEngine, assert_all_free, expected_tokens, with_prompt

BLOCK = 2  # tokens
BACK_UP_S = 200.0  # all lost instances return


@dataclasses.dataclass(frozen=True)
class Case:
    deployment: Deployment
    policies: dict
    memory: list[KVMemory]
    cost: LinearCost
    requests: list[Request]
    interventions: list
    streams: bool

    def controller(self, spans: bool = False) -> Controller:
        return Controller(
            self.deployment,
            self.policies,
            self.memory,
            prefill_router=checked(shortest_queue),
            decode_router=checked(least_loaded),
            streams=self.streams,
            spans=spans,
        )


def checked(router: Router) -> Router:
    """The same, and whenever it is asked it must pick what a look at all would."""

    def pick(request, instances):
        def counts(instance):
            queued = instance.queued if router is shortest_queue else 0
            return queued, instance.load, instance.id

        picked = router(request, instances)
        assert picked is min(instances, key=counts)
        return picked

    return pick


# (prefill, decode, colocated) instances
ONE_ENTRY = [(0, 0, 1), (1, 1, 0), (1, 2, 0)]
MIXES = [*ONE_ENTRY, (0, 0, 2), (2, 1, 0), (2, 2, 0), (1, 1, 1), (2, 1, 2)]


def deploy(prefill: int, decode: int, colocated: int) -> Deployment:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
    roles += [Role.COLOCATED] * colocated
    return Deployment(tuple(InstanceSpec(role=role) for role in roles))


@st.composite
def colocated(draw, watermark: float) -> Policy:
    tokens, seqs = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    budget = max(tokens, seqs)
    return draw(
        st.sampled_from(
            [
                Orca(max_batched_tokens=tokens, max_seqs=seqs),
                PrefillFirst(
                    max_batched_tokens=tokens, max_seqs=seqs, watermark=watermark
                ),
                RunningFirst(
                    max_batched_tokens=budget, max_seqs=seqs, watermark=watermark
                ),
                NoEvict(max_batched_tokens=budget, max_seqs=seqs),
                Sarathi(chunk_tokens=budget, max_seqs=seqs),
                SarathiServe(token_budget=budget, max_seqs=seqs, watermark=watermark),
                SplitFuse(token_budget=budget, max_seqs=seqs),
            ]
        )
    )


@st.composite
def policies(draw) -> dict:
    watermark = draw(st.sampled_from([0.0, 0.3, 1.0]))
    seqs = st.integers(1, 4)
    prefill = draw(st.sampled_from([PrefillOnly, PrefillChunked]))
    return {
        Role.COLOCATED: draw(colocated(watermark)),
        Role.PREFILL: prefill(
            token_budget=draw(st.integers(1, 12)), max_seqs=draw(seqs)
        ),
        Role.DECODE: DecodeOnly(max_seqs=draw(seqs), watermark=watermark),
    }


@st.composite
def requests(draw, id: int) -> Request:
    return with_prompt(
        id,
        float(draw(st.integers(0, 12))),
        prompt=draw(st.integers(1, 6)),
        out=draw(st.integers(1, 8)),
        eos_token=draw(st.sampled_from([None, 0])),
        ignore_eos=draw(st.booleans()),
    )


@st.composite
def cases(draw, mixes=MIXES) -> Case:
    deployment = deploy(*draw(st.sampled_from(mixes)))
    instances = range(len(deployment.instances))
    asked = [draw(requests(id)) for id in range(draw(st.integers(1, 8)))]
    times = st.integers(0, 40).map(float)
    cancelled = st.lists(st.sampled_from(asked), max_size=2, unique_by=lambda r: r.id)
    interventions = [
        (r.arrival_s + draw(times), Cancelled(r.id)) for r in draw(cancelled)
    ]
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from([Down, Down, Up]))
        change = kind(draw(st.sampled_from(instances)))
        interventions.append((draw(times), change))
    interventions += [(BACK_UP_S, Up(i)) for i in instances]
    costs = st.sampled_from([0.0, 1.0, 2.0])
    return Case(
        deployment,
        draw(policies()),
        # 3 blocks are 6 tokens: some requests never fit, most cause preemption.
        [
            KVMemory(
                num_blocks=draw(st.integers(3, 9)), block_tokens=BLOCK, max_context=14
            )
            for _ in instances
        ],
        LinearCost(
            step_base_s=draw(costs),
            prefill_token_s=draw(costs),
            decode_token_s=draw(costs),
            transfer_base_s=draw(costs),
            transfer_token_s=draw(costs),
            transfer_parts=draw(st.sampled_from([1, 2, 4])),  # exact in binary
        ),
        asked,
        interventions,
        draw(st.booleans()),
    )


APART = [(1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0)]


@st.composite
def streamed_cases(draw) -> Case:
    """Small chunks, prompts that take many of them, and room on the other side."""
    case = draw(cases(APART))
    budget, seqs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    prefill = PrefillChunked(token_budget=budget, max_seqs=seqs)
    memory = [dataclasses.replace(pool, num_blocks=9) for pool in case.memory]
    policies = {**case.policies, Role.PREFILL: prefill}
    return dataclasses.replace(case, policies=policies, memory=memory, streams=True)


# ---- after every turn ----------------------------------------------------------------


def check_blocks(controller: Controller) -> None:
    """Blocks are held by requests that are here, owned once, and add up."""
    for instance in controller.instances:
        blocks = instance.blocks
        here = [*instance.running, *instance.stepping, *instance.parked.values()]
        here += [*instance.partial, *instance.arriving.values()]
        leaving = [  # the source keeps its blocks until the transfer has landed
            s
            for other in controller.instances
            for s in other.arriving.values()
            if s.instance == instance.id
        ]
        holders = {s.id for s in [*here, *leaving]}
        assert set(blocks.held_by) == holders
        owned = [block for id in blocks.held_by for block in blocks.table(id)]
        assert len(set(owned)) == len(owned)
        assert len(owned) + blocks.free == blocks.memory.num_blocks
        assert instance.up or not holders


def _landing(instance) -> list:
    """Those whose KV is on its way in, and who wait for nothing else."""
    return [s for s in instance.arriving.values() if s.place is Place.MOVING]


def check_places(controller: Controller, case: Case) -> None:
    """Every request is in one container: the one of its place, at its holder."""
    found = [(s.id, Place.UNROUTED) for s in controller._fleet.unrouted]
    assert all(s.instance is s.pull_target is None for s in controller._fleet.unrouted)
    for instance in controller.instances:
        for states, place in (
            (instance.waiting, Place.WAITING),
            (instance.stepping, Place.STEPPING),
            (instance.partial, Place.PARTIAL),
            (instance.running, Place.RUNNING),
            (instance.parked.values(), Place.PARKED),
            (_landing(instance), Place.MOVING),
        ):
            found += [(s.id, place) for s in states]
            for s in states:
                at = s.pull_target if place is Place.MOVING else s.instance
                assert at == instance.id
                leaving = (Place.PARKED, Place.MOVING)
                if case.streams:
                    leaving += (Place.STEPPING, Place.PARTIAL)
                assert s.pull_target is None or place in leaving
                assert s.transfers_in_flight == sum(
                    isinstance(flight.work, Transfer) and flight.state is s
                    for flight in controller._in_flight.values()
                )
        to_pull = {
            s.id for s in controller._requests.values() if s.pull_target == instance.id
        }
        pulls = [s.id for s in instance.pull_queue]
        assert sorted([*pulls, *instance.arriving]) == sorted(to_pull)
        assert bool(instance.step) == bool(instance.stepping)
    in_flight = (Place.STEPPING, Place.MOVING)  # cancelled ones stay until it is done
    assert len({id for id, _ in found}) == len(found)
    assert dict(found) == {
        s.id: s.place
        for s in controller._requests.values()
        if s.active or s.place in in_flight
    }


def check_no_idle(controller: Controller, policies: dict) -> None:
    """No instance is idle while its policy would plan something."""
    for instance in controller.instances:
        if not instance.up:
            continue
        policy = policies[instance.spec.role]
        if instance.step is None:
            plan = policy.plan(instance)
            assert not plan.chunks and not plan.decodes and not plan.preempt
        if instance.pull_queue:
            assert not policy.admits_pull(instance, instance.pull_queue[0])


class Watch:
    """An observer that checks the controller after each of its turns."""

    def __init__(self, case: Case, controller: Controller, engine: CheckingEngine):
        self.case, self.controller, self.engine = case, controller, engine
        self.open = {}  # work id -> work
        self.several_transfers = False  # of one request at a time
        self.log = EventLog()

    def __call__(self, now_s, events, works):
        for told in events:
            if isinstance(told, Done):
                del self.open[told.work]  # one Done for each work, and none but those
            if isinstance(told, Down):
                self.open = {
                    id: work for id, work in self.open.items() if not on(work, told)
                }
        self.open |= {work.id: work for work in works}
        moving = [w.request.id for w in self.open.values() if isinstance(w, Transfer)]
        self.several_transfers |= len(set(moving)) < len(moving)
        assert len(self.open) == self.controller.in_flight
        # First, as a replay does: reading a table settles which blocks are in it.
        self.log(now_s, events, works)
        self.engine.done(events)
        check_blocks(self.controller)
        check_places(self.controller, self.case)
        check_no_idle(self.controller, self.case.policies)


def on(work, down: Down) -> bool:
    if isinstance(work, Transfer):
        return down.instance in (work.src, work.dst)
    return down.instance == work.instance


def serve_watched(case: Case) -> Watch:
    controller = case.controller()
    engine = CheckingEngine(case.cost, BLOCK)
    watch = Watch(case, controller, engine)
    serve(controller, VirtualBackend(engine), case.requests, case.interventions, watch)
    return watch


# ---- at the end ----------------------------------------------------------------------


def check_timeline(timeline, cancelled: set[int]) -> None:
    request, expected = timeline.request, expected_tokens(timeline.request)
    if timeline.status is Status.REFUSED:
        assert timeline.error and not timeline.token_s
        return
    if timeline.status is Status.CANCELLED:
        assert request.id in cancelled
        assert timeline.tokens == expected[: len(timeline.tokens)]
    else:
        assert timeline.status is Status.FINISHED
        assert timeline.tokens == expected
        stages = dataclasses.astuple(stages_s(timeline))  # raises on bad order
        assert min(stages) >= 0
        assert sum(stages) == timeline.end_s - request.arrival_s
        # A transfer that broke off, not repeated before decode, leaves no stamp.
        assert (timeline.transfer_start_s is None) == (timeline.transfer_end_s is None)
    assert len(timeline.token_s) == len(timeline.tokens)
    order = [request.arrival_s, timeline.prefill_start_s, *timeline.token_s]
    order = [stamp for stamp in [*order, timeline.end_s] if stamp is not None]
    assert order == sorted(order)
    start, end = timeline.transfer_start_s, timeline.transfer_end_s
    if end is not None:
        assert timeline.token_s[0] <= start <= end <= timeline.end_s
        if timeline.decode_start_s is not None:
            assert end <= timeline.decode_start_s


@given(cases())
def test_every_request_gets_its_tokens_and_nothing_is_lost(case: Case):
    watch = serve_watched(case)
    assert not watch.open
    assert_all_free(watch.controller)
    timelines = watch.controller.timelines
    assert sorted(t.request.id for t in timelines) == [r.id for r in case.requests]
    cancelled = {e.request for _, e in case.interventions if isinstance(e, Cancelled)}
    for timeline in timelines:
        check_timeline(timeline, cancelled)
    # --hypothesis-show-statistics tells how many cases are hard ones.
    event(type(case.policies[Role.COLOCATED]).__name__)
    for status in {t.status for t in timelines}:
        event(f"some {status}")
    event(f"preempted: {any(t.preemptions for t in timelines)}")


@given(streamed_cases())
def test_the_same_where_kv_leaves_chunk_by_chunk(case: Case):
    watch = serve_watched(case)
    assert not watch.open
    assert_all_free(watch.controller)
    cancelled = {e.request for _, e in case.interventions if isinstance(e, Cancelled)}
    for timeline in watch.controller.timelines:
        check_timeline(timeline, cancelled)
    event(f"sent in several transfers: {watch.several_transfers}")


@given(cases())
def test_replaying_the_log_gives_the_same_decisions(case: Case):
    lines = serve_watched(case).log.lines
    assert serve_watched(case).log.lines == lines
    assert list(replay(lines, case.controller())) == []


@given(cases(ONE_ENTRY))
def test_first_tokens_come_in_order_of_arrival_where_there_is_one_queue(case: Case):
    """No policy lets a prompt overtake another, and neither does a loss."""
    timelines = serve_watched(case).controller.timelines
    firsts = [t.token_s[0] for t in timelines if t.token_s]
    assert all(sooner <= later for sooner, later in itertools.pairwise(firsts))
