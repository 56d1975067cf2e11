"""The simulator's cost model of a calibrated engine."""

import copy
import dataclasses
import json

import pytest

from disagg_jax.deployment import Deployment, KVMemory, Parallelism
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.programs.slices import load_slices
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.sim.cost import step_time_terms
from disagg_jax.sim.cost.measured import (
    CalibratedInstance,
    CalibratedProfile,
    LayoutTimes,
    TransferTimes,
)
from disagg_jax.sim.cost.measured_profile import (
    PROVENANCE,
    profile_from_json,
    profile_to_json,
)
from disagg_jax.work import StepLoad, Transfer
from tests.serving import make_request

SIZE = 16
MEMORY = KVMemory(num_blocks=128, block_tokens=SIZE, max_context=256)
LISTED = Buckets(
    prefill=(StepShape.prefill(64, 8),),
    decode_rows=(1, 4),
    pool_blocks=(4, 16),
    transfer_blocks=(),
)
FITS = {
    "prefill": (
        (1e-3, 1e-5, 1e-8, 0.0, *(0.0,) * len(step_time_terms.TOKEN_BREAKPOINTS)),
    ),
    "decode": ((1e-3, 1e-4, 1e-5, 1e-6),),
}
TIMES = LayoutTimes(1, {LISTED.decode[0]: (0.5,)}, FITS)


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_load_takes_the_program_that_the_engine_would_run(system):
    """But for the extent of the pool, which a load does not say.

    With contexts that fill their blocks the guess is at most half a block a request,
    and one, too long; so programs differ in `blocks` only where that passes a size.
    """
    for policy in SYSTEMS[system].values():
        buckets = Buckets.for_limits(policy.limits, MEMORY)
        loads = []
        if buckets.decode_rows:
            loads += [StepLoad((), n, n * 64) for n in (1, 2, 7)]
        if buckets.prefill:
            loads += [StepLoad(((0, 10), (0, 33)), 0, 0), StepLoad(((0, 200),), 0, 0)]
        if buckets.mixed:
            loads += [StepLoad(((0, 20),), 0, 0), StepLoad(((32, 20),), 0, 0)]
        if buckets.mixed and buckets.decode_rows:
            loads += [StepLoad(((0, 30),), 3, 3 * 64)]
        for load in loads:
            slices = load_slices(load, MEMORY)
            shape = buckets.step_shape(slices)
            found = buckets.load_shape(load, SIZE)
            assert found._replace(blocks=0) == shape._replace(blocks=0)
            needed = -(-64 // SIZE) * load.decodes
            for blocks in (found.blocks, shape.blocks):
                assert blocks >= min(needed, MEMORY.num_blocks)


def find(*load):
    return LISTED.load_shape(StepLoad(*load), SIZE)


def test_the_smallest_program_that_holds_a_step_is_taken():
    # 2 requests x 20 tokens: 40 + 2 * 7.5 spare = 55 tokens in 4 blocks of 16.
    assert find((), 2, 40) == StepShape.decode(4, 4)
    assert find((), 2, 50) == StepShape.decode(4, 16)
    assert find(((0, 64),), 0, 0) == StepShape.prefill(64, 8)
    with pytest.raises(ValueError, match="prefill: expected at most"):
        find(((0, 65),), 0, 0)
    with pytest.raises(ValueError, match="decode: expected at most"):
        find((), 5, 40)


def test_what_was_measured_counts_and_the_fit_where_nothing_was():
    instance = CalibratedInstance(TIMES, LISTED, SIZE)
    assert instance.stages_s(StepLoad((), 1, 10)) == (0.5,)
    # B = 4, P = 4: 1 ms + 4 * 0.1 + 4 * 0.01 + 16 * 0.001
    assert instance.stages_s(StepLoad((), 2, 40))[0] == pytest.approx(1.456e-3)
    # T = 64: 1 ms + 64 * 10 us + 64 * 64 * 10 ns
    assert instance.stages_s(StepLoad(((0, 50),), 0, 0))[0] == pytest.approx(1.68096e-3)


def test_a_decode_is_looked_up_as_a_step_is():
    instance = CalibratedInstance(TIMES, LISTED, SIZE)
    for decodes in (1, 2, 3, 4):
        for context in range(decodes, 240):
            (expected,) = instance.stages_s(StepLoad((), decodes, context))
            assert instance.decode_s(decodes, context) == expected
    two = LayoutTimes(2, {}, {kind: fit * 2 for kind, fit in FITS.items()})
    with pytest.raises(ValueError, match="pp = 1"):
        CalibratedInstance(two, LISTED, SIZE).decode_s(1, 10)


def test_in_service_steps_of_a_kind_take_so_much_longer_on_every_way_to_ask():
    in_service = {"decode": 1.25, "prefill": 2.0}
    times = dataclasses.replace(TIMES, serving_factor=in_service)
    alone, serving = (
        CalibratedInstance(TIMES, LISTED, SIZE),
        CalibratedInstance(times, LISTED, SIZE),
    )
    for load, factor in (
        (StepLoad((), 1, 10), 1.25),  # measured
        (StepLoad((), 2, 40), 1.25),  # by the fit
        (StepLoad(((0, 50),), 0, 0), 2.0),
    ):
        (alone_s,) = alone.stages_s(load)
        assert serving.stages_s(load) == pytest.approx([factor * alone_s])
        if not load.chunks:
            assert serving.decode_s(load.decodes, load.context) == pytest.approx(
                factor * alone_s
            )


def make_profile():
    return CalibratedProfile(
        name="hand",
        block_tokens=SIZE,
        block_bytes=1024,
        layouts={Parallelism(): TIMES},
        transfers={
            (Parallelism(), Parallelism()): TransferTimes({1: 0.1, 4: 0.2}, 0.05, 0.04)
        },
        provenance=dict.fromkeys(PROVENANCE, "x"),
        held_out={"decode": 0.01},
    )


def test_each_pair_of_instances_has_the_times_of_its_layouts():
    """Two layouts, between which transfers take 1, 2, 3 and 4 s, of one block."""
    one, two = Parallelism(), Parallelism(2)
    pairs = {(one, one): 1.0, (one, two): 2.0, (two, one): 3.0, (two, two): 4.0}
    slow = LayoutTimes(1, {LISTED.decode[0]: (0.75,)}, FITS)
    profile = dataclasses.replace(
        make_profile(),
        layouts={one: TIMES, two: slow},
        transfers={k: TransferTimes({1: s}, 0.0, 0.0) for k, s in pairs.items()},
    )
    deployment = Deployment.parse("prefill:tp2,decode:tp1,prefill:tp1,2xdecode:tp2")
    listed = dataclasses.replace(LISTED, transfer_blocks=(1, 4))
    cost = profile.cost(deployment, [listed] * 5, [MEMORY] * 5)
    request = make_request(prompt=9)
    found = {
        (src, dst): cost.hop(Transfer(1, request, src, dst, (), (), 9)).duration_s
        for src in (0, 2)
        for dst in (1, 3, 4)
    }
    assert found == {
        (0, 1): 3.0,
        (0, 3): 4.0,
        (0, 4): 4.0,
        (2, 1): 1.0,
        (2, 3): 2.0,
        (2, 4): 2.0,
    }
    load = StepLoad((), 1, 10)
    for instance, step_s in enumerate((0.75, 0.5, 0.5, 0.75, 0.75)):
        assert cost.stages_s(instance, load) == (step_s,)
        assert cost.decoder(instance)(1, 10) == step_s


def test_a_profile_comes_back_from_its_text():
    text = json.dumps(profile_to_json(make_profile()))
    assert profile_from_json(json.loads(text)) == make_profile()


BROKEN = {
    "expected the key 'provenance'": lambda r: r.pop("provenance"),
    "kind: expected 'calibrated'": lambda r: r.update(kind="fitted"),
    "expected the key 'dtype'": lambda r: r["provenance"].pop("dtype"),
    "layouts: expected a list, not empty": lambda r: r.update(layouts=[]),
    r"measured\[0\]: expected one of": lambda r: r["layouts"][0]["measured"][
        0
    ].__setitem__(0, "step"),
    "expected 1 times > 0": lambda r: r["layouts"][0]["measured"][0].__setitem__(
        6, [0.1, 0.2]
    ),
    "expected 4 coefficients >= 0": lambda r: r["layouts"][0]["fits"].update(
        decode=[[1, 2, 3]]
    ),
    "decode: expected 4 coeff": lambda r: r["layouts"][0]["fits"].update(
        decode=[[1, 2, 3, -4]]
    ),
    r"transfers\[0\]: expected 2 seconds": lambda r: r["transfers"][0].update(
        seconds=[0.1]
    ),
    "base_s: expected >= 0": lambda r: r["transfers"][0].update(base_s=-1),
}


@pytest.mark.parametrize("message", sorted(BROKEN))
def test_a_broken_profile_says_where(message):
    record = copy.deepcopy(json.loads(json.dumps(profile_to_json(make_profile()))))
    BROKEN[message](record)
    with pytest.raises(ValueError, match=message):
        profile_from_json(record)


@pytest.mark.parametrize("at", [Parallelism(dp=2), Parallelism(2, ep=2)])
def test_a_profile_has_only_what_an_engine_runs(at):
    known = make_profile()
    (moved,) = known.transfers.values()
    for field in (
        {"layouts": {at: TIMES}},
        {"transfers": {(Parallelism(), at): moved}},
    ):
        with pytest.raises(ValueError, match=f"hand: expected no dp .*, got {at}"):
            dataclasses.replace(known, **field)


@pytest.mark.parametrize(
    "deployment, size, message",
    [
        ("colocated:tp2", SIZE, r"expected one of \[tp1\], got tp2"),
        ("colocated:tp1", 8, "expected blocks of 16 tokens"),
    ],
)
def test_what_was_not_measured_is_refused(deployment, size, message):
    memory = dataclasses.replace(MEMORY, block_tokens=size)
    with pytest.raises(ValueError, match=message):
        make_profile().cost(Deployment.parse(deployment), [LISTED], [memory])
