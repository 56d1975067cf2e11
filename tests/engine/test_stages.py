"""Pipeline stages: layers on meshes of their own, each phase cut as it likes."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Role
from disagg_jax.engine.executor import EngineExecutor, as_measured, run_alone
from disagg_jax.engine.kv_transfer.segments import find_segments
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.programs import StepShape
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.work import Done, Slice, StageFree, Step, Transfer
from tests.engine.harness import (
    BUCKETS,
    FAMILIES,
    MODELS,
    POLICIES,
    assert_reference,
    drive,
    make_config,
    make_controller,
    make_request,
    mixed_requests,
    serve_virtual,
)

DEEP = make_config("deep", layers=4, q_heads=8, kv_heads=4)
NARROW = make_config("narrow", q_heads=4, kv_heads=1)  # kv heads < tp


@pytest.mark.parametrize(
    "config, deployment",
    [
        (DEEP, "prefill:tp2pp2,2xdecode:tp1"),
        pytest.param(DEEP, "prefill:tp4,decode:tp1pp2", marks=pytest.mark.slow),
        pytest.param(DEEP, "prefill:tp1pp4,decode:tp2", marks=pytest.mark.slow),
        (DEEP, "prefill:tp1pp3,decode:tp1pp2"),
        pytest.param(DEEP, "colocated:tp2pp2", marks=pytest.mark.slow),
        (NARROW, "prefill:tp2pp2,decode:tp4"),
        pytest.param(
            MODELS["padded"], "prefill:tp2pp2,decode:tp1pp2", marks=pytest.mark.slow
        ),
        (FAMILIES["opt"], "prefill:tp1pp2,decode:tp2"),
        pytest.param(
            FAMILIES["qwen3"], "prefill:tp2,decode:tp1pp2", marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_tokens(world, config, deployment):
    """Uneven stages, a tied embedding at both ends, preemption: all as one device."""
    engine = world.engine(deployment, config)
    timelines = serve_virtual(engine, mixed_requests(world, config))
    assert_reference(world, config, timelines)


@pytest.mark.parametrize(
    "deployment", ["prefill:tp1pp3,decode:tp1pp2", "prefill:tp2pp2,decode:tp1"]
)
def test_tokens_with_everything_in_flight_at_once(world, deployment):
    engine = world.engine(deployment, DEEP)
    timelines = drive(engine, WallBackend(engine), mixed_requests(world, DEEP))
    assert_reference(world, DEEP, timelines)


def test_each_stage_has_its_layers_on_its_own_devices(world):
    engine = world.engine("prefill:tp1pp3,decode:tp1pp2", DEEP)
    prefill, decode = (instance.programs for instance in engine.instances)
    assert [stage.layers for stage in decode.stages] == [range(2), range(2, 4)]
    assert [len(stage.layers) for stage in prefill.stages] == [2, 1, 1]
    devices = [
        {device.id for device in stage.mesh.devices.flat}
        for stage in (*prefill.stages, *decode.stages)
    ]
    assert devices == [{0}, {1}, {2}, {4}, {5}]
    for instance in engine.instances:
        for stage in instance.programs.stages:
            for k, v in instance.cache[stage.layers.start : stage.layers.stop]:
                assert k.sharding.mesh == v.sharding.mesh == stage.mesh


def test_times_of_other_cuts_have_other_keys(world):
    one = world.engine("prefill:tp1,decode:tp1")
    four = world.engine("prefill:tp1,decode:tp1", DEEP, layer_groups=4)
    request = make_request(0, 8, 4)
    transfer = transfer_of(request, (0, 1), (1, 0))
    step = prompt_step(1, request, (0, 1))
    assert one.part_keys(step) == ["tp1/prefill_T64_R4"]
    assert four.part_keys(step) == ["tp1g4/prefill_T64_R4"]
    assert one.part_keys(transfer) == ["tp1->tp1/transfer_16"]
    assert four.part_keys(transfer) == ["tp1g4->tp1g4/transfer_16"]
    stream = transfer_of(request, (0, 1), (1, 0), step=1)
    assert four.part_keys(stream)[-1] == "tp1g4->tp1g4/transfer_16/4of4"


def test_segments_are_the_common_parts_of_both_cuts(world):
    engine = world.engine("prefill:tp1pp3,decode:tp1pp2", DEEP)
    prefill, decode = (instance.programs for instance in engine.instances)
    found = [segment.layers for segment in find_segments(prefill, decode)]
    assert found == [range(0, 2), range(2, 3), range(3, 4)]
    found = [segment.layers for segment in find_segments(decode, prefill)]
    assert found == [range(0, 2), range(2, 3), range(3, 4)]


def test_kv_of_every_layer_arrives_in_its_blocks(world):
    """From three stages to two, on other blocks; what is beside them stays."""
    engine = world.engine("prefill:tp1pp3,decode:tp1pp2", DEEP)
    src, dst = engine.instances
    rng = np.random.default_rng(0)
    for instance in (src, dst):
        instance.cache[:] = jax.tree.map(
            lambda part: jax.device_put(
                rng.normal(size=part.shape).astype(part.dtype), part.sharding
            ),
            instance.cache,
        )
    before = [np.asarray(part) for part in jax.tree.leaves(dst.cache)]
    request = make_request(0, 8, 4)
    transfer = transfer_of(request, (3, 1), (0, 15))
    _, (_, size) = run_alone(engine, transfer)
    both = zip(
        jax.tree.leaves(src.cache), jax.tree.leaves(dst.cache), before, strict=True
    )
    for sent, got, old in both:
        np.testing.assert_array_equal(got[np.array([0, 15])], sent[np.array([3, 1])])
        np.testing.assert_array_equal(got[1:15], old[1:15])
    assert size == engine.transfer_bytes(transfer)
    block_bytes = 2 * 4 * 4 * DEEP.head_dim * 4 * 4  # k, v; layers; heads; tokens
    assert size == 16 * block_bytes


def test_kv_never_passes_through_the_host(world):
    """Between gather and the end nothing may be copied from host to device."""
    engine = world.engine("prefill:tp1pp3,decode:tp1pp2", DEEP)
    running = engine.start(transfer_of(make_request(0, 8, 4), (0, 1), (1, 0)))
    next(running)  # the block ids went to the devices, KV was gathered
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        for pause in running:
            jax.block_until_ready(pause.arrays)


@pytest.mark.parametrize("deployment", ["colocated:tp1pp3", "colocated:tp2pp2"])
def test_activations_never_pass_through_the_host(world, deployment):
    first, second, *_ = world.engine(deployment, DEEP).instances[0].programs.stages
    x = jax.block_until_ready(first.put(np.ones((4, DEEP.embed), np.float32)))
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        moved = jax.block_until_ready(second.put(x))
    assert moved.sharding == second.replicated


# -- time -----------------------------------------------------------------------------


class Recorder:
    """Keeps what was submitted, and when what left a stage or was over."""

    def __init__(self, executor):
        self._backend = VirtualBackend(executor)
        self.steps, self.freed_s, self.done = [], {}, {}

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def submit(self, work):
        if isinstance(work, Step):
            self.steps.append((self.now_s(), work))
        self._backend.submit(work)

    def wait(self, until_s):
        reports = self._backend.wait(until_s)
        for report in reports:
            if isinstance(report, StageFree):
                self.freed_s[report.work] = self.now_s()
            elif isinstance(report, Done):
                self.done[report.work] = report
        return reports


def test_measured_steps_stand_on_the_timeline_as_a_pipeline(world):
    """start(b, k) = max(end(b, k - 1), end(b - 1, k)) for steps b on stages k."""
    engine = world.engine("colocated:tp1pp3", DEEP)
    measured = {}

    def live(work, parts_s):
        measured[work.id] = parts_s
        return as_measured(work, parts_s)

    backend = Recorder(EngineExecutor(engine, live))
    controller = make_controller(engine)
    requests = [make_request(i, 6 + i, 9, arrival_s=0.001 * i) for i in range(4)]
    with engine.serving():
        timelines = serve(controller, backend, requests)
    assert_reference(world, DEEP, {t.request.id: t for t in timelines})
    ends_s, in_flight, bubbles_s = [0.0] * 3, {}, 0.0
    for submit_s, step in backend.steps:
        end_s = submit_s
        assert len(measured[step.id]) == 3 and min(measured[step.id]) > 0
        for stage, part_s in enumerate(measured[step.id]):
            start_s = max(end_s, ends_s[stage])
            bubbles_s += start_s - ends_s[stage]
            end_s = ends_s[stage] = start_s + part_s
            if stage == 0:
                assert backend.freed_s[step.id] == pytest.approx(end_s, abs=1e-12)
        assert backend.done[step.id].end_s == pytest.approx(end_s, abs=1e-12)
        for part in step.slices:  # in at most one step at a time
            assert in_flight.get(part.request.id, 0.0) <= submit_s + 1e-12
            in_flight[part.request.id] = end_s
    busy_s = sum(backend.busy_s[key] for key in ((0,), (0, 1), (0, 2)))
    assert busy_s == pytest.approx(sum(map(sum, measured.values())))
    assert 3 * max(ends_s) - busy_s == pytest.approx(
        bubbles_s + sum(max(ends_s) - end_s for end_s in ends_s)
    )
    assert len({step.id for _, step in backend.steps}) > 9


def test_the_next_step_starts_while_the_last_is_on_a_later_stage(world):
    """On the wall clock: two requests on two stages are never in the same step."""
    engine = world.engine("colocated:tp1pp2", DEEP)
    backend = WallBackend(engine)
    request = make_request(0, 8, 4)
    other = make_request(1, 8, 4)
    with engine.serving():
        backend.submit(prompt_step(1, request, (0, 1)))
        reports = backend.wait(float("inf"))
        assert reports == [StageFree(1)]
        backend.submit(prompt_step(2, other, (2, 3)))
        seen = []
        while len(seen) < 3:
            seen += backend.wait(float("inf"))
    assert [type(report) for report in seen if report.work == 1] == [Done]
    assert [type(report) for report in seen if report.work == 2] == [StageFree, Done]
    done = [report for report in seen if isinstance(report, Done)]
    for report in done:
        (left_s,) = report.stage_ends_s
        assert report.start_s < left_s < report.end_s
    tokens = {report.work: report.tokens[0] for report in done}
    assert tokens[1] == world.reference(DEEP, request)[0]
    assert tokens[2] == world.reference(DEEP, other)[0]


# -- KV that leaves while it is computed -----------------------------------------------


@pytest.mark.parametrize(
    "config, deployment, layer_groups",
    [
        (DEEP, "prefill:tp1,decode:tp1", 4),
        (DEEP, "prefill:tp1pp2,decode:tp2", 2),
        pytest.param(
            MODELS["padded"], "prefill:tp4,decode:tp2", 2, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_streamed_tokens(world, config, deployment, layer_groups, clock):
    engine = world.engine(deployment, config, layer_groups=layer_groups)
    controller = make_controller(engine, streams=True)
    requests, streamed = mixed_requests(world, config), []

    def look(now_s, events, works):
        streamed.extend(w for w in works if getattr(w, "step", 0))

    with engine.serving():
        timelines = serve(
            controller, make_backend(engine, clock), requests, observer=look
        )
    assert_reference(world, config, {t.request.id: t for t in timelines})
    assert streamed
    for transfer in streamed:
        assert len(engine.part_keys(transfer)) > 1


CHUNKS = dataclasses.replace(
    BUCKETS,
    prefill=(),
    mixed=(StepShape.mixed(tokens=16, rows=4, context=16, decodes=0, blocks=0),),
)


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("budget", [4, 7, 16])
def test_tokens_where_kv_leaves_chunk_by_chunk(world, budget, clock):
    """Several chunks' KV of a request are on the way at once, to two stages."""
    engine = world.engine("prefill:tp1,decode:tp1pp2", DEEP, CHUNKS)
    prefill = PrefillChunked(token_budget=budget, max_seqs=4)
    controller = make_controller(
        engine, {**POLICIES, Role.PREFILL: prefill}, streams=True
    )
    requests, sent = mixed_requests(world, DEEP), collections.Counter()

    def look(now_s, events, works):
        sent.update(w.request.id for w in works if isinstance(w, Transfer))

    with engine.serving():
        timelines = serve(
            controller, make_backend(engine, clock), requests, observer=look
        )
    assert_reference(world, DEEP, {t.request.id: t for t in timelines})
    assert sent.most_common(1)[0][1] >= 3


def make_backend(engine, clock):
    if clock == "wall":
        return WallBackend(engine)
    return VirtualBackend(EngineExecutor(engine, as_measured))


def test_a_part_that_is_computed_leaves_before_the_rest_is(world):
    """The first group's KV is gathered after it, not after the last group."""
    engine = world.engine("prefill:tp1,decode:tp1", DEEP, layer_groups=4)
    request = make_request(0, 8, 4)
    step = engine.start(prompt_step(1, request, (0, 1)))
    stream = engine.start(transfer_of(request, (0, 1), (2, 3), step=1))
    with engine.serving():
        jax.block_until_ready(next(step).arrays)  # two of four groups are dispatched
        parts = 0
        for pause in itertools.islice(stream, 6):
            jax.block_until_ready(pause.arrays)
            parts += pause.ends_part
        assert parts == 2
        waiting = next(stream)  # for the group that was dispatched last
        assert not waiting.ends_part and waiting.arrays is next(step).arrays
        for _ in step:
            pass
        parts += sum(pause.ends_part for pause in stream)
    assert parts == 4


@pytest.mark.parametrize(
    "pauses, left",
    [
        (1, 2),  # two of four groups are dispatched: their parts leave
        (2, 1),
        (3, 1),  # all are, but nobody has seen the step's end
        (4, 1),
    ],
)
def test_kv_does_not_land_before_its_step_is_over(world, pauses, left):
    """However often it is asked, the last part waits for whoever drives the step."""
    engine = world.engine("prefill:tp1,decode:tp1", DEEP, layer_groups=4)
    request = make_request(0, 8, 4)
    step = engine.start(prompt_step(1, request, (0, 1)))
    stream = engine.start(transfer_of(request, (0, 1), (2, 3), step=1))
    with engine.serving():
        for _ in range(pauses):
            next(step)
        for _ in range(20):
            next(stream)
        for _ in step:
            pass
        assert [pause.ends_part for pause in stream] == [False, False, True] * left


def prompt_step(id, request, blocks) -> Step:
    count = request.prompt_tokens
    return Step.of(id, 0, (Slice(request, 0, count, True, blocks, request.prompt),))


def transfer_of(request, src_blocks, dst_blocks, step=0):
    context = request.prompt_tokens
    return Transfer(9, request, 0, 1, src_blocks, dst_blocks, context, step)


# -- what does not fit -----------------------------------------------------------------


def test_more_stages_than_layers(world):
    with pytest.raises(ValueError, match="pp: expected at most 4, .* of deep, got 5"):
        world.engine("colocated:tp1pp5", DEEP)


@pytest.mark.parametrize("text", ["tp1dp2", "tp2ep2", "tp1pp2dp2ep2"])
def test_data_and_expert_parallelism_inside_an_instance(world, text):
    with pytest.raises(ValueError, match=f"engine: expected no dp .*, got {text}"):
        world.engine(f"prefill:tp1,decode:{text}", DEEP)


def test_more_groups_than_a_stage_has_layers(world):
    message = "expected 1 to 2, the layers of the smallest of 2 stages of deep, got 3"
    with pytest.raises(ValueError, match=message):
        world.engine("colocated:tp1pp2", DEEP, layer_groups=3)


def test_devices_of_all_stages_are_counted(world):
    deployment = "prefill:tp2pp2,decode:tp1pp3"
    with pytest.raises(ValueError, match=r"2\+2\+1\+1\+1 = 7 devices, got 6"):
        world.engine(deployment, DEEP, devices=jax.devices()[:6])
