"""Programs: compiled before serving and not in it, and working in place."""

import dataclasses
import gc
import itertools
import math
import re

import jax
import numpy as np
import pytest

from disagg_jax.calibration import timing
from disagg_jax.calibration.step_times import check_step_times, measure_step_times
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.executor import (
    EngineExecutor,
    as_measured,
    from_table,
    run_alone,
)
from disagg_jax.engine.kv_transfer.piece_plan import piece_plan
from disagg_jax.engine.kv_transfer.segments import Segment
from disagg_jax.engine.layer_group import LayerGroup
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.programs import StepShape
from disagg_jax.programs.slices import full_slices
from disagg_jax.work import Step
from sharding.mesh import make_mesh
from sharding.rules import RULES
from tests.engine.harness import (
    BUCKETS,
    MODELS,
    POOL,
    assert_reference,
    drive,
    make_config,
    make_request,
    mixed_requests,
    serve_virtual,
)

CONFIG = MODELS["divided"]
# Other sizes than all other tests have, and several of each.
SEVERAL = dataclasses.replace(
    BUCKETS,
    prefill=(StepShape.prefill(16, 2), StepShape.prefill(64, 4)),
    decode_rows=(1, 4),
    pool_blocks=(5, 16),
    transfer_blocks=(2, 16),
)


@pytest.fixture(scope="module")
def compiles():
    """A list that grows by one with every compile, and every trace."""
    seen = []
    names = ("jaxpr_trace_duration", "backend_compile_duration")

    def listen(name, duration_s, **_):
        if name.endswith(names):
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


def test_the_count_of_compiles_counts(compiles):
    before = len(compiles)
    jax.jit(lambda x: x * 3 + 1)(np.ones(7))
    assert {name.rsplit("/")[-1] for name in compiles[before:]} == {
        "jaxpr_trace_duration",
        "backend_compile_duration",
    }


def test_nothing_is_compiled_or_traced_while_serving(world, compiles):
    """With a choice of several sizes for everything."""
    engine = world.engine("prefill:tp1,decode:tp1", buckets=SEVERAL)
    requests = mixed_requests(world, CONFIG)
    before = len(compiles)
    timelines = serve_virtual(engine, requests)
    assert len(compiles) == before
    assert_reference(world, CONFIG, timelines)


def test_what_a_compile_raises_is_raised_by_the_engine(world, monkeypatch):
    """Programs are compiled in threads, which would keep an error to themselves."""

    def fail(group, shape):
        raise RuntimeError(f"no memory for {shape}")

    monkeypatch.setattr(LayerGroup, "_compile_step", fail)
    listed = dataclasses.replace(BUCKETS, decode_rows=(7,))
    with pytest.raises(RuntimeError, match="no memory for "):
        world.engine("colocated:tp1", buckets=listed)


def test_a_shape_that_was_not_compiled_is_an_error(world):
    engine = world.engine("colocated:tp1")
    listed = dataclasses.replace(BUCKETS, decode_rows=(3,))
    engine = dataclasses.replace(engine.instances[0], buckets=listed)
    step = Step.of(1, 0, full_slices(StepShape.decode(3, 16), POOL))
    shape = engine.step_shape(step.slices)
    with pytest.raises(ValueError, match="decode_B3_P16: no such program was"):
        engine.model.step(shape, engine.cache, np.zeros(1))


@pytest.mark.parametrize(
    "slices, message",
    [
        (full_slices(StepShape.decode(5, 16), POOL), "decode: .*, got .*rows=5"),
        (full_slices(StepShape.decode(4, 17), POOL), "decode: .*, got .*blocks=17"),
        (full_slices(StepShape.prefill(65, 4), POOL), "prefill: .*, got .*tokens=65"),
        (full_slices(StepShape.prefill(64, 5), POOL), "prefill: .*, got .*rows=5"),
        (
            full_slices(StepShape.decode(1, 16), POOL)
            + full_slices(StepShape.prefill(8, 1), POOL),
            "whole prompts or decodes only",
        ),
    ],
)
def test_a_step_beyond_the_listed_sizes_is_an_error(world, slices, message):
    engine = world.engine("colocated:tp1")
    with pytest.raises(ValueError, match=message), engine.serving():
        run_alone(engine, Step.of(1, 0, slices))


def test_the_guard_refuses_a_trace_and_a_hidden_transfer(world):
    engine = world.engine("colocated:tp1")
    program = jax.jit(lambda x: x + 1).lower(np.ones(3, np.float32)).compile()
    with engine.serving():
        with pytest.raises(RuntimeError, match="(?i)trac"):
            jax.jit(lambda x: x - 1)(jax.device_put(np.ones(3)))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            program(np.ones(3, np.float32))
    jax.jit(lambda x: x - 2)(np.ones(3))  # the guard ends with serving


def test_no_old_object_is_looked_at_for_garbage(world):
    """Neither in serving nor before it, where that could take longer than serving."""
    engine = world.engine("colocated:tp1")
    collected = []

    def observe(phase, info):
        collected.append(info["generation"])

    gc.callbacks.append(observe)
    try:
        with engine.serving():
            assert gc.get_freeze_count() > 1000
    finally:
        gc.callbacks.remove(observe)
    assert max(collected) == 1
    assert gc.get_freeze_count() == 0


# -- step times -----------------------------------------------------------------------


def test_step_times_cover_all_that_serving_looks_up(world):
    """With the table a run is a function of it alone: every time is one of a sum."""
    engine = world.engine("prefill:tp1,decode:tp1", buckets=SEVERAL)
    rounds = []
    table = measure_step_times(
        [engine], repeats=2, progress=lambda *step: rounds.append(step[1:3])
    ).seconds
    assert rounds == [(0, 3), (1, 3), (2, 3)]
    assert all(time_s > 0 for time_s in table.values())
    assert set(table) == {
        *(f"tp1/{shape}" for shape in SEVERAL.step_shapes),
        *(f"tp1->tp1/transfer_{size}" for size in SEVERAL.transfer_blocks),
    }
    runs = [
        serve_virtual(engine, mixed_requests(world, CONFIG), from_table(engine, t))
        for t in (table, table, {key: 2 * time_s for key, time_s in table.items()})
    ]
    stamps = [[t.token_s for t in run.values()] for run in runs]
    assert stamps[0] == stamps[1]
    np.testing.assert_allclose(
        np.concatenate(stamps[2]), 2 * np.concatenate(stamps[0]), rtol=1e-9
    )


def test_what_ran_before_is_not_in_a_step_time(world, monkeypatch):
    """Steps are timed right after themselves, in a new order in each round."""
    engine = world.engine("prefill:tp1,decode:tp1", buckets=SEVERAL)
    ran = []

    def five_times_as_long_after_another(engine, work):
        cold = not ran or ran[-1] != work
        ran.append(work)
        return [5.0 if cold and isinstance(work, Step) else 1.0], None

    monkeypatch.setattr(timing, "run_alone", five_times_as_long_after_another)
    table = measure_step_times([engine], repeats=3).seconds
    assert set(table.values()) == {1.0}
    each_once = [work for work, _ in itertools.groupby(ran)]
    n = len(table)
    warm_up, *rounds = (each_once[i : i + n] for i in range(0, 4 * n, n))
    assert len(each_once) == 4 * n
    for some in rounds:
        assert set(map(id, some)) == set(map(id, warm_up))
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


def test_a_program_missing_from_the_table_is_named(world):
    engine = world.engine("colocated:tp1")
    with pytest.raises(ValueError, match="missing, such as 'tp1/decode_B4_P16'"):
        check_step_times(engine, {"tp1/prefill_T64_R4": 1.0})


def test_live_durations_are_what_a_step_took(world):
    engine = world.engine("colocated:tp1")
    seen = []

    def live(work, parts_s):
        seen.extend(parts_s)
        return as_measured(work, parts_s)

    backend = VirtualBackend(EngineExecutor(engine, live))
    (timeline,) = drive(engine, backend, [make_request(0, 4, 5)]).values()
    assert len(seen) == 5 and min(seen) > 0
    np.testing.assert_allclose(timeline.token_s, np.cumsum(seen))


# -- in place -------------------------------------------------------------------------


def test_a_query_is_rotated_once_and_not_for_each_block(world):
    """XLA would fuse the rotation of queries into a gather for all their blocks."""
    instance = world.engine("colocated:tp1", CONFIG).instances[0]
    (group,) = instance.programs.groups
    for rows in (1, 2, 4):
        shape = StepShape.decode(rows, POOL.num_blocks)
        group.step_program(shape).compile()
        computations = group.program(shape).as_text().split("\n}\n")
        rotations = [text for text in computations if " sine(" in text]
        assert rotations
        for text in rotations:
            (sizes,) = re.findall(r"ROOT \S+ = f32\[([0-9,]*)\]", text)
            made = math.prod(map(int, sizes.split(",")))
            assert made <= max(2, rows) * CONFIG.q_heads * CONFIG.head_dim, text


@pytest.mark.parametrize("rows", [1, 4])
def test_logits_stay_on_the_device_of_their_part_of_the_vocabulary(rows):
    """No device gets those of all; the likeliest token is found without."""
    pool = KVMemory(num_blocks=16, block_tokens=4, max_context=64)
    meshes = [make_mesh(jax.devices()[:2])]
    model = ModelPrograms(CONFIG, meshes, RULES["decode"], pool, XlaAttention("cpu"))
    shape, (group,) = StepShape.decode(rows, 16), model.groups
    model.compile_step(shape)
    _, (_, logits) = group.program(shape).output_shardings
    assert logits.shard_shape((rows, CONFIG.vocab_size)) == (
        rows,
        CONFIG.vocab_size / 2,
    )
    gathered = re.findall(
        r"= f32\[([\d,]*)\]\S* all-gather", group.program(shape).as_text()
    )
    assert f"{rows},{CONFIG.vocab_size}" not in gathered


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_programs_work_in_place(tp):
    """Beside a pool of 32 MiB a device, no program needs a copy of it, or of a part."""
    config = make_config("deep pool", layers=1, q_heads=4 * tp, kv_heads=2 * tp)
    pool = KVMemory(num_blocks=16_383, block_tokens=16, max_context=64)
    model = ModelPrograms(
        config,
        [make_mesh(jax.devices()[:tp])],
        RULES["decode"],
        pool,
        XlaAttention("cpu"),
    )
    (stage,), (group,) = model.stages, model.groups
    heads = model.layout.kv
    part = StepShape.mixed(tokens=16, rows=8, context=4, decodes=4, blocks=64)
    whole = [
        StepShape.decode(4, pool.num_blocks),
        part._replace(blocks=pool.num_blocks),
    ]
    parts = [StepShape.decode(1, 64), StepShape.decode(4, 64), part]
    one_block = [StepShape.prefill(8, 1), StepShape.mixed(8, 1, 1, 0, 0)]
    for shape in (StepShape.prefill(64, 4), *one_block, *parts, *whole):
        model.compile_step(shape)
    programs = dict(group.programs._compiled)
    for other in (tp, 2 * tp):  # its shards as they are, and in two pieces
        out = Segment(group, stage, range(1), piece_plan(heads, tp, heads, other))
        back = Segment(group, stage, range(1), piece_plan(heads, other, heads, tp))
        for blocks in (1, 16):
            programs["gather", blocks, other] = out._gather_program(blocks)
            programs["insert", blocks, other] = back._insert_program(blocks)
    assert len(programs) == 8 + 8
    part_bytes = 16_384 * 16 * 2 * config.head_dim * 4  # k, or v; on each device
    for key, program in programs.items():
        memory = program.memory_analysis()
        if isinstance(key, StepShape) or key[0] != "gather":
            assert memory.alias_size_in_bytes >= 2 * part_bytes, key
        if not isinstance(key, StepShape):
            # One block is like many: no array is copied.
            assert not re.search(r"\[\d\S* copy\(", program.as_text()), key
        # A chunk of the blocks that decodes attend to, and of bytes of k for each int.
        limit = part_bytes // 5 if key in whole else part_bytes // 50
        assert memory.temp_size_in_bytes < limit, (key, memory.temp_size_in_bytes)


def test_the_pool_stays_where_it_is(world):
    """Steps and transfers get the same buffers back that they were given."""
    engine = world.engine("prefill:tp1,decode:tp1")

    def pointers():
        caches = [instance.cache for instance in engine.instances]
        return [part.unsafe_buffer_pointer() for part in jax.tree.leaves(caches)]

    before = pointers()
    serve_virtual(engine, mixed_requests(world, CONFIG))
    assert pointers() == before
