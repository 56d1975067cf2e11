"""Measured tables: read between the points, continued outside, checked when loaded."""

import copy
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.sim.interpolated import interpolate
from disagg_jax.sim.interpolated_profile import cost_from_json
from disagg_jax.work import StepLoad

STAGE = {
    "floor_s": 1.0,
    "prefill": {"tokens": [10, 20, 40], "seconds": [1.8, 3.0, 9.0]},
    "decode": {
        "decodes": [2, 4],
        "context": [10, 30],
        "seconds": [[1.5, 2.0], [2.5, 5.0]],
    },
}
SLOWER = {
    "floor_s": 0.5,
    "prefill": {"tokens": [10], "seconds": [4.0]},
    "decode": {"decodes": [2], "context": [10, 30], "seconds": [[6.0, 7.0]]},
}
RECORD = {
    "name": "toy",
    "kind": "interpolated",
    "provenance": {"source": "made up", "hardware": "none"},
    "instances": [
        {"tp": 1, "stages": [STAGE]},
        {"tp": 2, "stages": [STAGE, SLOWER]},
    ],
}
COST = cost_from_json(RECORD)
TOY = COST.instance(1)


def with_square(square_s):
    record = copy.deepcopy(RECORD)
    record["instances"][0]["stages"][0]["prefill"]["square_s"] = square_s
    return cost_from_json(record).instance(1)


# ---- by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "expected"),
    # through (10, 2), (20, 3), (40, 9): slopes .1 and .3
    [(10, 2), (20, 3), (40, 9), (15, 2.5), (30, 6), (0, 1), (50, 12)],
)
def test_a_line_through_points_goes_on_outside(x, expected):
    assert interpolate((10, 20, 40), (2, 3, 9), x) == pytest.approx(expected)


def test_above_the_last_point_it_does_not_fall():
    assert interpolate((1, 2), (5, 4), 1.5) == 4.5  # as measured
    assert interpolate((1, 2), (5, 4), 9) == 4
    assert interpolate((1, 2), (5, 4), 0) == 6
    assert interpolate((7,), (3,), 100) == interpolate((7,), (3,), 1) == 3


@pytest.mark.parametrize(
    ("chunks", "square_s", "expected_s"),
    [
        (((0, 15),), 0.0, 2.4),
        (((0, 10), (5, 5)), 0.0, 2.4),  # tokens computed count, cached ones do not
        (((0, 15),), 0.01, 2.4 + 2.25),
        (((20, 5), (0, 10)), 0.01, 2.4 + 0.01 * (625 - 400 + 100)),
        (((0, 100),), 0.0, 27.0),
        (((0, 1),), 0.0, 1.0),  # 1.8 - 9 * .12 = .72, but the floor is 1
    ],
)
def test_prefill_by_hand(chunks, square_s, expected_s):
    stages_s = with_square(square_s).stages_s(StepLoad(chunks, 0, 0))
    assert stages_s == pytest.approx((expected_s,))


@pytest.mark.parametrize(
    ("decodes", "mean", "expected_s"),
    [
        (2, 10, 1.5),  # the measured points
        (2, 30, 2.0),
        (4, 10, 2.5),
        (4, 30, 5.0),
        (3, 10, 2.0),  # between 1.5 and 2.5
        (3, 20, 2.75),  # the middle of all four
        (4, 50, 7.5),  # 5 + 20 * .125
        (8, 10, 4.5),  # 2.5 + 4 * .5
        (8, 50, 17.5),  # the row of 8 is 4.5, 11.0
        (1, 10, 1.0),  # 1.5 - .5
        (1, 30, 1.0),  # 2 - 1.5 = .5, but the floor is 1
    ],
)
def test_decode_by_hand(decodes, mean, expected_s):
    assert TOY.decode_s(decodes, decodes * mean) == pytest.approx(expected_s)


def test_a_mixed_step_pays_the_floor_once():
    load = StepLoad(((0, 15),), 3, 60)
    assert TOY.stages_s(load) == pytest.approx((2.4 + 2.75 - 1.0,))
    # Each stage has its own tables and floor: 4 + 6.5 - .5.
    assert COST.instance(2, 2).stages_s(load) == pytest.approx((4.15, 10.0))


def test_a_table_that_falls_at_its_end_is_continued_flat():
    record = copy.deepcopy(RECORD)
    table = record["instances"][0]["stages"][0]["decode"]
    table["seconds"] = [[1.5, 2.0], [2.5, 2.25]]
    instance = cost_from_json(record).instance(1)
    assert instance.decode_s(4, 4 * 20) == 2.375  # as measured
    assert instance.decode_s(4, 4 * 30) == instance.decode_s(4, 4 * 900) == 2.25


def test_a_single_measured_point_is_constant():
    record = copy.deepcopy(RECORD)
    decode = {"decodes": [2, 4], "context": [10], "seconds": [[1.5], [2.5]]}
    record["instances"][0]["stages"][0]["decode"] = decode
    instance = cost_from_json(record).instance(1)
    assert instance.decode_s(3, 30) == instance.decode_s(3, 9999) == 2.0


# ---- properties ----------------------------------------------------------------------

PROMPTS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=4
).map(tuple)
DECODES = st.tuples(st.integers(1, 9), st.integers(1, 50)).map(
    lambda pair: (pair[0], pair[0] * pair[1])
)


@given(DECODES)
def test_the_cheap_path_is_exactly_the_general_one(decode):
    for _ in range(2):
        assert (TOY.decode_s(*decode),) == TOY.stages_s(StepLoad((), *decode))


@given(PROMPTS, DECODES)
def test_a_mixed_step_lies_between_its_parts_and_their_sum(prompts, decode):
    instance = COST.instance(2, 2)
    prefill = instance.stages_s(StepLoad(prompts, 0, 0))
    decoding = instance.stages_s(StepLoad((), *decode))
    mixed = instance.stages_s(StepLoad(prompts, *decode))
    for both, a, b in zip(mixed, prefill, decoding, strict=True):
        assert max(a, b) <= both + 1e-12 and both < a + b


# Rising tables: times are sums of non-negative steps, so that no noise falls.
STEPS = st.lists(st.floats(0, 10), min_size=4, max_size=4)


@given(STEPS, PROMPTS, DECODES, st.integers(1, 60))
def test_more_work_takes_no_less_time_where_the_table_rises(
    steps, prompts, decode, more
):
    a, b, c, d = steps
    record = copy.deepcopy(RECORD)
    stage = record["instances"][0]["stages"][0]
    stage["prefill"]["seconds"] = [1 + a, 1 + a + b, 1 + a + b + c]
    stage["decode"]["seconds"] = [[1 + a, 1 + a + b], [1 + a + c, 1 + a + b + c + d]]
    instance = cost_from_json(record).instance(1)
    # Below the grid (2 requests, 10 tokens each) the cell's tilt may turn the line.
    decodes, context = max(decode[0], 2), max(decode[1], 10 * max(decode[0], 2))
    base = instance.stages_s(StepLoad(prompts, decodes, context))
    (start, count), *rest = prompts
    for load in (
        StepLoad(((start, count + more), *rest), decodes, context),
        StepLoad(prompts, decodes, context + more),
    ):
        assert base[0] <= instance.stages_s(load)[0] * (1 + 1e-9)


def test_a_model_can_go_to_a_worker_process():
    again = pickle.loads(pickle.dumps(COST))
    assert again == COST
    assert (again.name, again.provenance["source"]) == ("toy", "made up")


# ---- bad input -----------------------------------------------------------------------

WHERE = ("instances", 0, "stages", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "fitted", "profile.kind: expected 'interpolated', got 'fitted'"),
        (
            ("instances",),
            [],
            r"profile.instances: expected a list, not empty, got \[\]",
        ),
        (("instances",), [1], r"instances\[0\]: expected an object, got 1"),
        (("instances", 1), RECORD["instances"][0], r"each \(tp, pp\) once, got \(1, 1"),
        (("instances", 0, "tp"), 0, r"instances\[0\].tp: expected an integer .* got 0"),
        (("instances", 0, "stages"), [], r"instances\[0\].stages: expected a list"),
        (("provenance",), {"source": "me"}, "provenance: expected the key 'hardware'"),
        (
            (*WHERE, "prefill", "tokens"),
            [10, 10, 40],
            r"stages\[0\]: prefill.tokens: expected increasing .* got \(10.0, 10.0",
        ),
        ((*WHERE, "prefill", "tokens"), [10, 20], "prefill.seconds: expected 2 times"),
        ((*WHERE, "prefill", "seconds"), [0, 1, 2], "prefill.seconds: .* times > 0"),
        ((*WHERE, "prefill", "seconds"), [1, math.nan, 2], "a number, got nan"),
        ((*WHERE, "prefill", "square_s"), -1.0, "square_s: expected >= 0, got -1.0"),
        ((*WHERE, "decode", "decodes"), [2, 4, 8], "decode.seconds: expected 3 rows"),
        ((*WHERE, "decode", "context"), [10], "decode.seconds: expected 1 times"),
        ((*WHERE, "decode", "context"), [0, 9], "decode.context: .* numbers > 0, got"),
        ((*WHERE, "floor_s"), 1.6, "floor_s: expected >= 0 and <= 1.5, .*, got 1.6"),
        ((*WHERE, "floor_s"), -0.1, "floor_s: expected >= 0 .*, got -0.1"),
        ((*WHERE, "floor_s"), True, "floor_s: expected a number, got True"),
    ],
)
def test_a_bad_record_is_refused(path, value, message):
    record = copy.deepcopy(RECORD)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        cost_from_json(record)


@pytest.mark.parametrize("key", ["floor_s", "prefill", "decode"])
def test_a_missing_part_is_named(key):
    record = copy.deepcopy(RECORD)
    del record["instances"][0]["stages"][0][key]
    with pytest.raises(ValueError, match=rf"stages\[0\]: expected the key '{key}'"):
        cost_from_json(record)


def test_what_was_not_measured_is_refused():
    with pytest.raises(
        ValueError, match=r"toy: .*\[\(1, 1\), \(2, 2\)\], got \(2, 1\)"
    ):
        COST.instance(2)
    with pytest.raises(ValueError, match="decode_s: expected pp = 1 .*, got 2"):
        COST.instance(2, 2).decode_s(1, 1)
