"""Random work on the virtual clock: what one resource does, and what a loss changes.

Two levels: whole simulations, with what must hold of any, and the clock alone beside a
model of it that is slow and exact. `--hypothesis-profile=thorough` draws 10,000 cases
of each.
"""

import collections
import copy
import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from disagg_jax.control.backend import Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Parallelism
from disagg_jax.request import Status
from disagg_jax.sim.cost.deployment import CostExecutor, ModelledCost
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.sim.hardware.network import Network
from disagg_jax.work import Cancelled, Done, Down, Step, Straggle, Transfer, Up
from tests.control.test_controller_properties import (
    BACK_UP_S,
    BLOCK,
    MIXES,
    deploy,
    policies,
    requests,
)
from tests.serving import assert_all_free, make_request

# ---- whole simulations ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stages:
    """An `InstanceCost`: (base, per prompt token, per context token) of each stage."""

    stages: tuple[tuple[float, float, float], ...]

    def stages_s(self, load):
        tokens, context = load.prompt_tokens, load.context
        return tuple(b + p * tokens + c * context for b, p, c in self.stages)

    def decode_s(self, decodes, context):
        ((base_s, _, context_s),) = self.stages
        return base_s + context_s * context


@dataclasses.dataclass(frozen=True)
class Simulation:
    deployment: Deployment
    policies: dict
    memory: list[KVMemory]
    cost: ModelledCost
    requests: list
    interventions: list
    streams: bool

    def controller(self, spans):
        return Controller(
            self.deployment,
            self.policies,
            self.memory,
            streams=self.streams,
            spans=spans,
        )


@st.composite
def links(draw) -> LinkSpec:
    return LinkSpec(
        name="toy",
        latency_s=draw(st.sampled_from([0.0, 0.5, 1 / 3])),
        bandwidth_bytes_s=draw(st.sampled_from([0.5, 1.0, 3.0])),
        efficiency=1.0,
    )


@st.composite
def simulations(draw, most_stages=3) -> Simulation:
    roles = deploy(*draw(st.sampled_from(MIXES))).instances
    deployment = Deployment(
        tuple(
            InstanceSpec(
                role=spec.role,
                parallelism=Parallelism(
                    draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, most_stages))
                ),
            )
            for spec in roles
        )
    )
    seconds = st.sampled_from([0.0, 0.25, 1 / 3, 1.0])
    stage = st.tuples(st.sampled_from([0.5, 1.0, 2.0, 10 / 3]), seconds, seconds)
    cost = ModelledCost(
        instances=tuple(
            Stages(tuple(draw(stage) for _ in range(spec.parallelism.pp)))
            for spec in deployment.instances
        ),
        network=Network(
            deployment=deployment,
            kv_bytes_per_token=draw(st.integers(0, 3)),
            inside=draw(st.none() | links()),
            between=draw(st.none() | links()),
            node_devices=draw(st.integers(1, 4)),
            sharing=draw(st.sampled_from(["fifo", "fair"])),
            layer_groups=draw(st.integers(1, 4)),
        ),
    )
    asked = [
        dataclasses.replace(draw(requests(id)), prompt=None, eos_token=None)
        for id in range(draw(st.integers(1, 8)))
    ]
    times = st.sampled_from([i / 2 for i in range(80)])
    instances = st.integers(0, len(roles) - 1)
    changes = [
        (r.arrival_s + draw(times), Cancelled(r.id))
        for r in draw(st.lists(st.sampled_from(asked), max_size=2, unique=True))
    ]
    for kind in draw(st.lists(st.sampled_from([Down, Down, Up, Straggle]), max_size=6)):
        factor = [draw(st.sampled_from([0.5, 1.0, 3.0]))] if kind is Straggle else []
        changes.append((draw(times), kind(draw(instances), *factor)))
    changes += [(BACK_UP_S, Up(i)) for i in range(len(roles))]
    memory = [
        KVMemory(num_blocks=draw(st.integers(3, 9)), block_tokens=BLOCK, max_context=14)
        for _ in roles
    ]
    return Simulation(
        deployment,
        draw(policies()),
        memory,
        cost,
        asked,
        changes,
        draw(st.booleans()),
    )


@dataclasses.dataclass
class Piece:
    """A piece of work that was submitted; `done` when it was told."""

    work: Step | Transfer
    outcome: Outcome
    submitted_s: float
    factor: float
    done: Done | None = None

    @property
    def wire(self):
        return self.outcome.link or (-3, self.work.src, self.work.dst)

    @property
    def is_transfer(self):
        return isinstance(self.work, Transfer)

    @property
    def alone_s(self):
        """Seconds of the wire that it takes."""
        return sum(self.outcome.durations_s)


class Watched:
    """A `Backend` that keeps all pieces of work, and looks into the future at a loss.

    At a loss it asks two copies of the clock when all that is in flight will be done:
    one with it and one without.
    """

    def __init__(self, cost):
        self._cost = CostExecutor(cost)
        self.clock = VirtualBackend(self)
        self.pieces, self.in_flight, self._factors = {}, {}, {}
        self.moved_up = 0
        self.now_s, self.progress = self.clock.now_s, self.clock.progress

    def run(self, work):
        outcome = self._cost.run(work)
        factor = 1.0 if isinstance(work, Transfer) else self._factor(work)
        piece = Piece(work, outcome, self.now_s(), factor)
        self.pieces[work.id] = self.in_flight[work.id] = piece
        return outcome

    def _factor(self, step):
        return self._factors.get(step.instance, 1.0)

    def submit(self, work):
        self.clock.submit(work)

    def wait(self, until_s):
        told = self.clock.wait(until_s)
        for done in told:
            if isinstance(done, Done):
                self.in_flight.pop(done.work).done = done
        return told

    def slow(self, instance, factor):
        self._factors[instance] = factor
        self.clock.slow(instance, factor)

    def drop(self, instance):
        before = self._future()
        self.clock.drop(instance)
        after = self._future()
        lost = {
            id
            for id, piece in self.in_flight.items()
            if instance in piece.work.instances
        }
        assert before.keys() == self.in_flight.keys()
        assert after.keys() == before.keys() - lost
        freed = {
            piece.wire
            for id, piece in self.in_flight.items()
            if id in lost and piece.is_transfer
        }
        for id in lost:
            del self.in_flight[id]
        for id, done in after.items():
            piece = self.in_flight[id]
            if not piece.is_transfer or piece.wire not in freed:
                assert done == before[id]
            else:
                assert done.end_s <= before[id].end_s + 1e-9
                self.moved_up += done.end_s < before[id].end_s
        for wire in freed:
            self._check_moved_up(wire, before, after)

    def _future(self):
        """The Done of all that is in flight, if nothing is submitted."""
        clock = copy.deepcopy(self.clock, {id(self): self})
        told = iter(lambda: clock.wait(math.inf), [])
        done = [d for d in itertools.chain.from_iterable(told) if isinstance(d, Done)]
        return {d.work: d for d in done}

    def _check_moved_up(self, wire, before, after):
        """Whole transfers in turn: one begins when the one before it ends, or now."""
        queue = [
            piece
            for piece in self.in_flight.values()
            if piece.is_transfer and piece.wire == wire
        ]
        if any(piece.work.step or piece.outcome.shared for piece in queue):
            return
        free_s = self.now_s()
        for piece in queue:
            id = piece.work.id
            began = before[id].start_s < self.now_s()
            assert after[id].start_s == (before[id].start_s if began else free_s)
            free_s = after[id].end_s


def served(case: Simulation) -> Watched:
    backend, controller = Watched(case.cost), case.controller(spans=False)
    serve(controller, backend, case.requests, case.interventions)
    assert_all_free(controller)
    assert not backend.in_flight
    for timeline in controller.timelines:
        assert timeline.status is not Status.ACTIVE
    return backend


def held(backend: Watched):
    """What was done: by resource, (start, end) of each piece of work, in its order.

    Of streams and of shared links only when they began and ended, so not these.
    """
    found = collections.defaultdict(list)
    for piece in backend.pieces.values():
        done = piece.done
        if done is None:
            continue
        if piece.is_transfer:
            if not piece.outcome.shared and not piece.work.step:
                found[piece.wire].append((done.start_s, done.end_s))
            continue
        ends_s = (*done.stage_ends_s, done.end_s)
        durations_s = (*piece.outcome.durations_s, *piece.outcome.later_stages_s)
        assert done.start_s == pytest.approx(
            ends_s[0] - durations_s[0] * piece.factor, abs=1e-9
        )
        for stage, (end_s, duration_s) in enumerate(
            zip(ends_s, durations_s, strict=True)
        ):
            name = (piece.work.instance, stage) if stage else (piece.work.instance,)
            found[name].append((end_s - duration_s * piece.factor, end_s))
        assert list(ends_s) == sorted(ends_s)
    return found


@given(simulations())
def test_no_resource_holds_two_pieces_of_work(case: Simulation):
    backend = served(case)
    for spans in held(backend).values():
        for (_, end_s), (start_s, _) in itertools.pairwise(sorted(spans)):
            assert start_s >= end_s - 1e-9
    for piece in backend.pieces.values():
        assert piece.done is None or piece.done.start_s >= piece.submitted_s
    check_wires(backend)
    event(f"streams: {any(p.is_transfer and p.work.step for p in done_of(backend))}")
    event(f"moved up: {backend.moved_up > 0}")
    event(f"sharing: {case.cost.network.sharing}")


def done_of(backend: Watched):
    return [piece for piece in backend.pieces.values() if piece.done]


def check_wires(backend: Watched) -> None:
    """In no stretch of time does a wire carry more than fits, shared or not."""
    by_wire = collections.defaultdict(list)
    for piece in done_of(backend):
        if piece.is_transfer:
            by_wire[piece.wire].append(piece)
    for pieces in by_wire.values():
        starts_s, ends_s = ({getattr(p.done, n) for p in pieces} for n in STAMPS)
        for start_s, end_s in itertools.product(starts_s, ends_s):
            inside = [
                p for p in pieces if start_s <= p.done.start_s and p.done.end_s <= end_s
            ]
            carried_s = sum(piece.alone_s for piece in inside)
            assert not inside or carried_s <= end_s - start_s + 1e-9


STAMPS = ("start_s", "end_s")


@given(simulations())
def test_bytes_over_bandwidth_is_the_time_a_link_was_held(case: Simulation):
    network, backend = case.cost.network, served(case)
    expected_s = collections.Counter()
    for piece in done_of(backend):
        work = piece.work
        if not piece.is_transfer:
            ends_s = (*piece.outcome.durations_s, *piece.outcome.later_stages_s)
            for stage, duration_s in enumerate(ends_s):
                name = (work.instance, stage) if stage else (work.instance,)
                expected_s[name] += duration_s * piece.factor
            continue
        assert piece.done.bytes == network.kv_bytes_per_token * work.context
        nodes = [
            sum(spec.devices for spec in case.deployment.instances[:i])
            // network.node_devices
            for i in (work.src, work.dst)
        ]
        apart = network.between is not None and nodes[0] != nodes[1]
        link = network.between if apart else network.inside
        if link is not None:
            lanes = 1 if apart else case.deployment.lanes(work.src, work.dst)
            messages = network.layer_groups if work.step else 1
            rate_bytes_s = lanes * link.bandwidth_bytes_s
            wire = (-1, nodes[0]) if apart else (-2, work.dst)
            expected_s[wire] += messages * link.latency_s
            expected_s[wire] += piece.done.bytes / rate_bytes_s
    busy_s = {name: s for name, s in backend.clock.busy_s.items() if s}
    assert busy_s == pytest.approx({k: s for k, s in expected_s.items() if s})


@given(simulations(most_stages=1))
def test_spans_change_nothing_over_any_network(case: Simulation):
    runs = []
    for spans in (False, True):
        controller = case.controller(spans)
        backend = VirtualBackend(CostExecutor(case.cost))
        timelines = serve(controller, backend, case.requests, case.interventions)
        busy_s = {name: s for name, s in backend.busy_s.items() if s}
        runs.append(([dataclasses.asdict(t) for t in timelines], busy_s))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == pytest.approx(runs[1][1])


# ---- the clock alone, beside a model of it -------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pass:
    """A step on the stages of an instance, and a transfer that goes along with it."""

    id: int
    at_s: Fraction
    instance: int
    stages_s: tuple[Fraction, ...]


@dataclasses.dataclass(frozen=True)
class Move:
    id: int
    at_s: Fraction
    src: int
    dst: int
    wire: tuple[int, ...]
    parts_s: tuple[Fraction, ...]
    along: Pass | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    at_s: Fraction
    instance: int


INSTANCES = 3
# A node, or who receives: instances have these numbers too, and so do stages.
WIRES = [(-1, 0), (-1, 1), (-2, 1), (-2, 2), (-3, 0, 1)]


@st.composite
def operations(draw) -> list:
    """Work and losses in the order of time.

    Losses are at fifths and sevenths of seconds, where no work ends.
    """
    found, ids = [], itertools.count(1)
    pp = [draw(st.integers(1, 3)) for _ in range(INSTANCES)]
    quarters = st.integers(0, 24).map(lambda n: Fraction(n, 4))
    for _ in range(draw(st.integers(1, 10))):
        at_s = Fraction(draw(st.integers(0, 12)))
        src = draw(st.integers(0, INSTANCES - 1))
        dst = draw(st.integers(0, INSTANCES - 1).filter(lambda i, src=src: i != src))
        along = None
        if draw(st.booleans()):
            whole = st.integers(1, 4).map(Fraction)
            stages_s = tuple(draw(whole) for _ in range(pp[src]))
            along = Pass(next(ids), at_s, src, stages_s)
            found.append(along)
        if along is None or draw(st.booleans()):
            most = draw(st.sampled_from([1, 2, 4])) if along else 1
            parts_s = tuple(draw(quarters) for _ in range(most))
            wire = draw(st.sampled_from(WIRES))
            found.append(Move(next(ids), at_s, src, dst, wire, parts_s, along))
    for share in draw(st.sampled_from([(), (5,), (5, 7)])):
        at_s = draw(st.integers(0, 20)) + Fraction(1, share)
        found.append(Loss(at_s, draw(st.integers(0, INSTANCES - 1))))
    return sorted(found, key=lambda op: op.at_s)


class ByOperation:
    """An executor whose outcomes are those of the operations."""

    def __init__(self, operations, shared):
        self._ops = {op.id: op for op in operations if not isinstance(op, Loss)}
        self._shared = shared

    def run(self, work) -> Outcome:
        op = self._ops[work.id]
        if isinstance(op, Pass):
            first_s, *later_s = map(float, op.stages_s)
            return Outcome((first_s,), later_stages_s=later_s)
        parts_s = tuple(map(float, op.parts_s))
        return Outcome(parts_s, link=op.wire, shared=self._shared)


def clock_ends_s(operations, shared) -> dict[int, float]:
    """When each piece of work is done, by the clock."""
    clock, ends_s = VirtualBackend(ByOperation(operations, shared)), {}

    def advance(until_s):
        while told := clock.wait(until_s):
            ends_s.update((d.work, d.end_s) for d in told if isinstance(d, Done))

    request = make_request(prompt=100)
    for op in operations:
        advance(float(op.at_s))
        match op:
            case Loss():
                clock.drop(op.instance)
            case Pass():
                load = Step.of(op.id, op.instance, []).load
                load.chunks = ((0, 1),)
                clock.submit(Step(op.id, op.instance, [], load))
            case Move():
                step = op.along.id if op.along else 0
                clock.submit(
                    Transfer(op.id, request, op.src, op.dst, (), (), 1, step=step)
                )
    advance(math.inf)
    return ends_s


def model_ends_s(operations, shared) -> dict[int, Fraction]:
    """The same from instant to instant, without a heap, in exact numbers."""
    losses = [op for op in operations if isinstance(op, Loss)]
    stages_s, ends_s = {}, {}

    def lost_s(since_s, *instances):
        """The first loss of one of `instances` from then on."""
        times = [x.at_s for x in losses if x.instance in instances and x.at_s > since_s]
        return min(times, default=math.inf)

    free_s = collections.defaultdict(Fraction)  # (instance, stage) -> when
    for op in operations:
        if isinstance(op, Loss):
            for name in free_s:
                if name[0] == op.instance:
                    free_s[name] = op.at_s
        if isinstance(op, Pass):
            end_s, spans = op.at_s, []
            for stage, duration_s in enumerate(op.stages_s):
                start_s = max(end_s, free_s[op.instance, stage])
                free_s[op.instance, stage] = end_s = start_s + duration_s
                spans.append((start_s, end_s))
            stages_s[op.id] = spans
            if end_s <= lost_s(op.at_s, op.instance):
                ends_s[op.id] = end_s
    moves = [op for op in operations if isinstance(op, Move)]
    for wire in WIRES:
        ends_s |= _wire_ends_s(
            [move for move in moves if move.wire == wire], stages_s, lost_s, shared
        )
    return ends_s


def _wire_ends_s(moves, stages_s, lost_s, shared):
    coming = []  # (when, whole transfers last, work, index, seconds, lost when)
    for move in moves:
        gone_s = lost_s(move.at_s, move.src, move.dst)
        for i, part_s in enumerate(move.parts_s):
            at_s = move.at_s
            if move.along:
                spans = stages_s[move.along.id]
                share = Fraction(i + 1, len(move.parts_s)) * len(spans)
                stage = math.ceil(share) - 1
                start_s, end_s = spans[stage]
                at_s = start_s + (share - stage) * (end_s - start_s)
            coming.append([at_s, move.along is None, move.id, i, part_s, gone_s])
    coming.sort()
    left = {move.id: len(move.parts_s) for move in moves}
    on, ends_s, now_s = [], {}, Fraction(0)
    while coming or on:
        # One instant: take on what comes, then serve until the next thing happens.
        while coming and coming[0][0] == now_s:
            on.append(coming.pop(0))
        on = [part for part in on if part[5] > now_s]
        coming = [part for part in coming if part[5] > part[0]]
        flows = list({part[2]: part for part in reversed(on)}.values())  # its first
        serving = flows if shared else on[:1]
        until_s = [part[0] for part in coming[:1]]
        until_s += [part[5] for part in on]
        until_s += [now_s + part[4] * len(serving) for part in serving]
        if not until_s:
            break
        then_s = min(until_s)
        for part in serving:
            part[4] -= (then_s - now_s) / len(serving)
        now_s = then_s
        for part in [part for part in serving if part[4] == 0]:
            on.remove(part)
            left[part[2]] -= 1
            if not left[part[2]]:
                ends_s[part[2]] = now_s
    return ends_s


@pytest.mark.parametrize("shared", [False, True])
@given(ops=operations())
def test_the_clock_is_its_model(shared, ops):
    expected = model_ends_s(ops, shared)
    found = clock_ends_s(ops, shared)
    assert found == pytest.approx({id: float(s) for id, s in expected.items()})
    event(f"lost: {len(expected) < sum(not isinstance(op, Loss) for op in ops)}")
