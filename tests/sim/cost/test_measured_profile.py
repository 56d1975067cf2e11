"""A calibrated profile: what it says of a deployment, and what a record must have."""

import copy
import dataclasses
import functools
import json
import math
import operator

import pytest

from disagg_jax.deployment import Deployment, KVMemory, Parallelism, Role
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Request
from disagg_jax.scheduling import get_system
from disagg_jax.sim.cost.measured import CalibratedInstance, LayoutTimes, TransferTimes
from disagg_jax.sim.cost.measured_profile import profile_from_json, profile_to_json
from disagg_jax.work import StepLoad, Transfer

SMALL, LARGE = StepShape.prefill(32, 4), StepShape.prefill(64, 8)
BUCKETS = Buckets(
    prefill=(SMALL, LARGE),
    decode_rows=(1, 4),
    pool_blocks=(4, 16),
    transfer_blocks=(1, 2, 4),
)
ROWS = BUCKETS.decode
MEMORY = KVMemory(num_blocks=16, max_context=256)
ABOUT = {"model": "toy", "dtype": "float32", "device": "cpu"}
RECORD = {
    "format": 3,
    "name": "toy",
    "kind": "calibrated",
    "provenance": {**ABOUT, "date": "today", "commit": "none", "by": "me"},
    "block_tokens": 16,
    "block_bytes": 100,
    "held_out": {"prefill": 0.02, "decode": 0.1},
    "layouts": [
        {
            "tp": 1,
            "pp": 1,
            "kv_blocks": 9,
            "measured": [[*ROWS[0], [1 / 3]], [*SMALL, [9.0]]],
            "fits": {
                "prefill": [[1.0, 0.5] + [0.0] * 6],
                "decode": [[2.0, 0.0, 0.25, 0.0]],
            },
            "probes": [[*ROWS[1], [0.7]], [*SMALL, [9.5]]],
            "serving_factor": {"decode": 1.25},
        },
        {
            "tp": 2,
            "pp": 2,
            "measured": [[*SMALL, [4.0, 5.0]]],
            "fits": {"prefill": [[2.0] + [0.0] * 7, [0.0, 0.125] + [0.0] * 6]},
            "probes": [],
            "serving_factor": {},
        },
    ],
    "transfers": [
        {
            "src": [1, 1],
            "dst": [2, 2],
            "blocks": [1, 4],
            "seconds": [0.1, 0.3],
            "base_s": 0.5,
            "block_s": 0.25,
        }
    ],
}
PROFILE = profile_from_json(RECORD)


# ---- by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "load", "expected_s"),
    [
        (Parallelism(1, 1), (((0, 20),), 0, 0), (9.0,)),  # measured
        (
            Parallelism(1, 1),
            (((0, 40),), 0, 0),
            (1 + 0.5 * 64,),
        ),  # the fit, of the whole program
        (Parallelism(1, 1), ((), 1, 9), (1.25 * (1 / 3),)),  # in service
        (Parallelism(1, 1), ((), 1, 90), (1.25 * (2 + 0.25 * 16),)),
        (Parallelism(2, 2), (((0, 20),), 0, 0), (4.0, 5.0)),
        (Parallelism(2, 2), (((0, 40),), 0, 0), (2.0, 8.0)),
    ],
)
def test_a_step_takes_what_was_measured_else_the_fit(layout, load, expected_s):
    instance = CalibratedInstance(PROFILE.layouts[layout], BUCKETS, 16)
    assert instance.stages_s(StepLoad(*load)) == expected_s


def test_a_kind_that_was_not_measured_is_refused():
    instance = CalibratedInstance(PROFILE.layouts[Parallelism(2, 2)], BUCKETS, 16)
    with pytest.raises(ValueError, match=r"decode_B1_P4: .*prefill.*, got 'decode'"):
        instance.stages_s(StepLoad((), 1, 9))
    # And before any step, where an instance has programs of it.
    deployment = Deployment.parse("colocated:tp2pp2")
    message = r"tp2pp2: expected steps of \['prefill'\], got \['decode', 'prefill'\]"
    with pytest.raises(ValueError, match=message):
        PROFILE.cost(deployment, [BUCKETS], [MEMORY])


def test_a_whole_prompt_has_a_program_of_its_size_where_none_is_so_large():
    """Estimates ask for it, where a policy would split the prompt."""
    times = PROFILE.layouts[Parallelism()]
    instance = CalibratedInstance(times, BUCKETS, 16)
    assert instance.stages_s(StepLoad(((0, 65),), 0, 0)) == (1 + 0.5 * 65,)
    mixed = dataclasses.replace(BUCKETS, mixed=(StepShape.mixed(32, 4, 4, 4, 16),))
    with pytest.raises(ValueError, match="mixed_T65_C5_P0: .* got 'mixed'"):
        CalibratedInstance(times, mixed, 16).stages_s(StepLoad(((0, 65),), 0, 0))


def test_without_programs_a_step_takes_one_of_its_own_size():
    """3 decodes of 30 tokens: 52.5 with half of each last block to spare, in 4."""
    instance = PROFILE.instance(Parallelism())
    assert instance.stages_s(StepLoad(((0, 20), (0, 13)), 0, 0)) == (1 + 0.5 * 33,)
    assert instance.stages_s(StepLoad((), 3, 30)) == (1.25 * (2 + 0.25 * 4),)
    assert instance.decode_s(3, 30) == 1.25 * (2 + 0.25 * 4)
    for load in (((8, 20),), 0, 0), (((0, 20),), 1, 9):
        with pytest.raises(ValueError, match="mixed_.* got 'mixed'"):
            instance.stages_s(StepLoad(*load))
    with pytest.raises(ValueError, match=r"toy: .* \[tp1, tp2pp2\], got tp4"):
        PROFILE.instance(Parallelism(4))
    with pytest.raises(ValueError, match="expected pp = 1"):
        PROFILE.instance(Parallelism(2, 2)).decode_s(1, 9)


def test_kv_memory_is_that_of_the_pool_that_the_programs_are_for():
    assert PROFILE.kv_tokens(Parallelism()) == 9 * 16
    with pytest.raises(ValueError, match=r"toy: .* kv_blocks, one of \[tp1\], got tp2"):
        PROFILE.kv_tokens(Parallelism(2, 2))


def test_a_compiled_profile_says_so():
    assert PROFILE.mark == "" and not PROFILE.compiled
    compiled = profile_from_json({**RECORD, "kind": "compiled"})
    assert compiled == dataclasses.replace(PROFILE, compiled=True)
    assert compiled.mark == "compiled, not measured"
    assert profile_to_json(compiled) == {**RECORD, "kind": "compiled"}


def hop(context, **fields):
    deployment = Deployment.parse("prefill:tp1,decode:tp2pp2")
    whole_prompts = dataclasses.replace(BUCKETS, decode_rows=(), pool_blocks=())
    cost = PROFILE.cost(deployment, [whole_prompts] * 2, [MEMORY] * 2)
    request = Request(id=0, arrival_s=0, prompt_tokens=context, max_tokens=2)
    return cost.hop(Transfer(1, request, 0, 1, (), (), context, **fields))


@pytest.mark.parametrize(
    ("context", "expected_s", "blocks"),
    # 2 blocks were not measured: 0.5 + 2 x 0.25. 3 are padded to 4.
    [(16, 0.1, 1), (17, 1.0, 2), (32, 1.0, 2), (33, 0.3, 4), (64, 0.3, 4)],
)
def test_a_transfer_takes_as_long_as_what_it_is_padded_to(context, expected_s, blocks):
    found = hop(context)
    assert (found.duration_s, found.bytes) == (expected_s, 100 * blocks)


def test_a_transfer_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="transfer blocks: expected at most 4, got 5"):
        hop(65)
    with pytest.raises(ValueError, match="transfer: expected one of a whole prompt"):
        hop(16, step=7)


@pytest.mark.parametrize(
    ("deployment", "block_tokens", "message"),
    [
        ("colocated:tp4", 16, r"toy: .* \[tp1, tp2pp2\], got tp4"),
        ("prefill:tp1,decode:tp1", 16, r"transfers between .*, got \(tp1, tp1\)"),
        ("colocated:tp1", 8, "toy: expected blocks of 16 tokens, got 8"),
    ],
)
def test_a_deployment_that_was_not_measured_is_refused(
    deployment, block_tokens, message
):
    parsed = Deployment.parse(deployment)
    memory = dataclasses.replace(MEMORY, block_tokens=block_tokens)
    n = len(parsed.instances)
    with pytest.raises(ValueError, match=message):
        PROFILE.cost(parsed, [BUCKETS] * n, [memory] * n)


# ---- the shortcut of decodes ---------------------------------------------------------


@pytest.mark.parametrize(
    "system", ["vllm_v0", "orca", "sarathi_serve", "disaggregated"]
)
@pytest.mark.parametrize(
    "memory",
    [
        KVMemory(num_blocks=70, max_context=300, block_tokens=1),
        KVMemory(num_blocks=75, max_context=300, block_tokens=4),
        KVMemory(num_blocks=20, max_context=320, block_tokens=16),
    ],
    ids=str,
)
def test_the_cheap_path_is_exactly_the_general_one(system, memory):
    """For every context up to the pool's and beyond: a rounding that is one token off
    changes it. Each program takes another time, the odd ones as measured."""
    policies = get_system(system)
    policy = policies.get(Role.COLOCATED) or policies[Role.DECODE]
    buckets = Buckets.for_limits(policy.limits, memory)
    measured = {p: (10.0 + i,) for i, p in enumerate(buckets.step_shapes) if i % 2}
    times = LayoutTimes(1, measured, {"decode": ((0.25, 0.5, 1e-3, 1e-5),)})
    instance = CalibratedInstance(times, buckets, memory.block_tokens)
    found = set()
    for decodes in (1, 2, 3, 5, 8, 13, buckets.most_decodes):
        for context in range(decodes, memory.num_blocks * memory.block_tokens + 20):
            expected_s = instance.stages_s(StepLoad((), decodes, context))
            assert (instance.decode_s(decodes, context),) == expected_s
            found |= {expected_s}
    assert len(found) > 8  # of several programs


def test_with_stages_the_cheap_path_has_no_meaning():
    instance = CalibratedInstance(PROFILE.layouts[Parallelism(2, 2)], BUCKETS, 16)
    with pytest.raises(ValueError, match="decode_s: expected pp = 1 .*, got 2"):
        instance.decode_s(1, 1)


# ---- JSON ----------------------------------------------------------------------------


def test_a_profile_survives_its_json_exactly():
    text = json.dumps(profile_to_json(PROFILE))
    again = profile_from_json(json.loads(text))
    assert again == PROFILE
    assert profile_to_json(again) == json.loads(text) == RECORD
    assert again.layouts[Parallelism(1, 1)].measured[ROWS[0]] == (1 / 3,)


@pytest.mark.parametrize("number", [0, 2])
def test_a_profile_whose_decode_programs_meant_something_else_is_refused(number):
    with pytest.raises(ValueError, match="format 3 or later, .* calibrate again, got"):
        profile_from_json({**RECORD, "format": number})


def test_a_profile_of_a_newer_format_is_refused_before_its_content():
    with pytest.raises(ValueError, match="^profile: expected format 0 to .* got 99$"):
        profile_from_json({"format": 99, "kind": "unknown"})


def test_probes_are_no_measurements_and_older_profiles_have_none():
    layout = PROFILE.layouts[Parallelism(1, 1)]
    assert PROFILE.probes == {
        (Parallelism(), ROWS[1]): 0.7,
        (Parallelism(), SMALL): 9.5,
    }
    assert layout.stages_s(ROWS[1]) == layout.fitted_s(ROWS[1]) == (2.0 + 0.25 * 16,)
    record = copy.deepcopy(RECORD)
    del record["layouts"][0]["probes"], record["layouts"][0]["serving_factor"]
    older = profile_from_json(record)
    assert older.probes == older.layouts[Parallelism(1, 1)].serving_factor == {}
    assert older.layouts[Parallelism(1, 1)].served_s(SMALL) == layout.stages_s(SMALL)


def test_a_profile_of_colocated_systems_needs_no_transfers():
    record = {key: value for key, value in RECORD.items() if key != "transfers"}
    assert profile_from_json(record).transfers == {}


def at(record, path):
    """What is at a path of keys and indices."""
    return functools.reduce(operator.getitem, path, record)


ROW = ("layouts", 0, "measured", 1)
MOVE = ("transfers", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("kind",),
            "fitted",
            "profile.kind: .* 'calibrated' or 'compiled', got 'fitted'",
        ),
        (("layouts", 0, "kv_blocks"), 0, r"layouts\[0\].kv_blocks: .* >= 1, got 0"),
        (("name",), "", "profile.name: expected a text, not empty"),
        (("provenance", "dtype"), 32, "provenance.dtype: expected a text"),
        (("block_tokens",), 0, "block_tokens: expected an integer >= 1, got 0"),
        (("block_bytes",), 1.5, "block_bytes: expected an integer >= 1, got 1.5"),
        (("held_out",), [0.1], r"profile.held_out: expected an object, got \[0.1\]"),
        (("held_out", "decode"), math.nan, "held_out.decode: .* a number, got nan"),
        (("layouts",), [], r"profile.layouts: expected a list, not empty, got \[\]"),
        (("layouts", 1), 7, r"layouts\[1\]: expected an object, got 7"),
        (
            ("layouts", 1),
            RECORD["layouts"][0],
            r"layouts: .* each once, got \[tp1, tp1\]",
        ),
        (("layouts", 1, "pp"), 0, r"layouts\[1\].pp: expected an integer >= 1, got 0"),
        (("layouts", 1, "pp"), 3, r"layouts\[1\]: prefill_T32_R4: expected 3 times"),
        (("layouts", 0, "measured"), [], r"layouts\[0\].measured: .* not empty"),
        (ROW, "prefill", r"layouts\[0\].measured\[1\]: expected a list, got 'prefill'"),
        (ROW, [*SMALL], r"measured\[1\]: expected kind, T, R, C, B, P, seconds, got"),
        ((*ROW, 0), "train", r"measured\[1\]: expected one of \('prefill', .*'train'"),
        ((*ROW, 1), 32.5, r"measured\[1\]: expected an integer >= 0, got 32.5"),
        ((*ROW, 2), -4, r"measured\[1\]: expected an integer >= 0, got -4"),
        ((*ROW, 6), [1.0, 2.0], r"layouts\[0\]: prefill_T32_R4: expected 1 times > 0"),
        ((*ROW, 6), [0.0], r"layouts\[0\]: prefill_T32_R4: expected 1 times > 0"),
        ((*ROW, 6), 9.0, r"measured\[1\].seconds: expected a list"),
        (
            ("layouts", 0, "measured", 0),
            [*SMALL, [8.0]],
            r"layouts\[0\].measured: expected each once, got .*tokens=32",
        ),
        (("layouts", 0, "probes"), {}, r"layouts\[0\].probes: expected a list"),
        (("layouts", 0, "probes", 1), 7, r"layouts\[0\].probes\[1\]: expected a list"),
        (
            ("layouts", 0, "probes", 1, 6),
            [0.0],
            r"probes: prefill_T32_R4: .* > 0, got 0.0",
        ),
        (("layouts", 0, "serving_factor"), [], r"serving_factor: expected an object"),
        (("layouts", 0, "serving_factor", "train"), 1.0, r"serving_factor: .* some of"),
        (
            ("layouts", 0, "serving_factor", "decode"),
            0.0,
            r"layouts\[0\]: decode: expected a factor > 0, got 0.0",
        ),
        (("layouts", 0, "fits"), [], r"layouts\[0\].fits: expected an object"),
        (("layouts", 0, "fits", "train"), [[1.0]], r"layouts\[0\].fits: .* some of"),
        (
            ("layouts", 0, "fits", "decode"),
            [[1.0, 2.0]],
            r"layouts\[0\]: decode: expected 4 coefficients",
        ),
        (
            ("layouts", 0, "fits", "decode", 0, 1),
            -1e-9,
            r"layouts\[0\]: decode: expected 4 coefficients >= 0, got .*-1e-09",
        ),
        (
            ("layouts", 1, "fits", "prefill"),
            [[0.0] * 8],
            r"layouts\[1\]: prefill: expected 2 fits",
        ),
        (("transfers",), {}, "profile.transfers: expected a list, got {}"),
        (("transfers",), RECORD["transfers"] * 2, "transfers: expected each once"),
        ((*MOVE, "src"), [1], r"transfers\[0\].src: expected \[tp, pp\], got \[1\]"),
        ((*MOVE, "dst"), [1, 0.5], r"transfers\[0\].dst: .* integer >= 1, got 0.5"),
        ((*MOVE, "blocks"), [1, 1], r"transfers\[0\].blocks: expected each once"),
        ((*MOVE, "blocks"), [1, 2.5], r"transfers\[0\].blocks: .* >= 1, got 2.5"),
        ((*MOVE, "seconds"), [0.1], r"transfers\[0\]: expected 2 seconds, got"),
        ((*MOVE, "seconds"), [0, 1], r"transfers\[0\]: 1 blocks: expected a time > 0"),
        ((*MOVE, "base_s"), -0.1, r"transfers\[0\]: base_s: expected >= 0, got -0.1"),
        ((*MOVE, "block_s"), None, r"transfers\[0\].block_s: .* a number, got None"),
    ],
)
def test_a_bad_record_is_refused(path, value, message):
    record = copy.deepcopy(RECORD)
    at(record, path[:-1])[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        profile_from_json(record)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("name",), "profile: expected the key 'name'"),
        (("kind",), "profile: expected the key 'kind'"),
        (("provenance",), "profile: expected the key 'provenance'"),
        (("provenance", "model"), "provenance: expected the key 'model'"),
        (("provenance", "device"), "provenance: expected the key 'device'"),
        (("provenance", "commit"), "provenance: expected the key 'commit'"),
        (("block_tokens",), "block_tokens: expected an integer >= 1, got None"),
        (("block_bytes",), "block_bytes: expected an integer >= 1, got None"),
        (("held_out",), "profile: expected the key 'held_out'"),
        (("layouts",), "profile: expected the key 'layouts'"),
        (("layouts", 0, "tp"), r"layouts\[0\].tp: expected an integer >= 1, got None"),
        (("layouts", 0, "measured"), r"layouts\[0\]: expected the key 'measured'"),
        (("layouts", 1, "fits"), r"layouts\[1\]: expected the key 'fits'"),
        ((*MOVE, "src"), r"transfers\[0\]: expected the key 'src'"),
        ((*MOVE, "seconds"), r"transfers\[0\]: expected the key 'seconds'"),
        ((*MOVE, "base_s"), r"transfers\[0\]: expected the key 'base_s'"),
    ],
)
def test_a_missing_part_is_named(path, message):
    record = copy.deepcopy(RECORD)
    del at(record, path[:-1])[path[-1]]
    with pytest.raises(ValueError, match=message):
        profile_from_json(record)


@pytest.mark.parametrize("record", [None, [], "profile", 3])
def test_what_is_no_object_is_no_profile(record):
    with pytest.raises(ValueError, match="profile: expected an object, got"):
        profile_from_json(record)


def test_times_without_sense_are_refused():
    with pytest.raises(ValueError, match="4 blocks: expected a time > 0, got -1.0"):
        TransferTimes({4: -1.0}, 0.0, 0.0)
    with pytest.raises(ValueError, match="block_s: expected >= 0, got -1.0"):
        TransferTimes({4: 1.0}, 0.0, -1.0)
    with pytest.raises(ValueError, match="expected 2 times > 0, got .1.0,"):
        LayoutTimes(2, {SMALL: (1.0,)}, {})
