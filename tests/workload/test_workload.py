"""Workloads: the same requests for every system, in the simulator and on the engine."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import pytest

from disagg_jax.request import Sampling
from disagg_jax.workload import (
    Arrivals,
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    PromptsWorkload,
    RandomWorkload,
    TokenOptions,
    TraceWorkload,
    UniformLengths,
    requests_of_rows,
)
from disagg_jax.workload.traces import TraceRow, load_trace

ROWS = tuple(
    TraceRow(arrival_s=float(at), prompt_tokens=10 + i, output_tokens=1 + i)
    for i, at in enumerate([0, 1, 1, 5, 6, 10])
)
TOKENS = TokenOptions(vocab_size=5)
TRACE = TraceWorkload(rows=ROWS)
RANDOM = RandomWorkload(
    prompt=HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
    output=LognormalLengths(median=8, sigma=1, high=40),
)
PROMPTS = PromptsWorkload(
    prompts=((1, 2, 3), (4,), (5, 6)), output=UniformLengths(low=2, high=50)
)
ALL = [TRACE, RANDOM, PROMPTS]


def with_tokens(workload, **changes):
    tokens = dataclasses.replace(TOKENS, **changes)
    return dataclasses.replace(workload, tokens=tokens)


def column(requests, name):
    return [getattr(request, name) for request in requests]


def gaps(requests):
    return np.diff(column(requests, "arrival_s"))


def lengths(requests):
    return [(request.prompt_tokens, request.max_tokens) for request in requests]


# ---- every workload ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "prompts", "trace", "untimed"])
def test_golden_requests(name):
    """Seeds mean the same requests for ever: published results depend on them.

    The file is from the commit before simulator and engine shared their workloads. Make
    it again only if a new numpy changes its streams, and say so beside every result.
    """
    bursty = Arrivals(kind="gamma", burstiness=0.5)
    untimed = tuple(row._replace(arrival_s=math.nan) for row in ROWS)
    workload = {
        "random": dataclasses.replace(RANDOM, arrivals=bursty),
        "prompts": PROMPTS,
        "trace": TRACE,
        "untimed": TraceWorkload(rows=untimed, arrivals=bursty),
    }[name]
    golden = pathlib.Path(__file__).with_name("golden") / "requests.json"
    for seed, rows in json.loads(golden.read_text())[name].items():
        found = with_tokens(workload).requests(len(rows), 2.0, int(seed))
        assert rows == [
            [r.arrival_s, r.max_tokens, list(r.prompt), r.sampling.seed] for r in found
        ]


@pytest.mark.parametrize("workload", ALL)
def test_equal_seeds_give_equal_requests_and_another_rate_stretches_them(workload):
    slow, fast = (workload.requests(20, rate, 3) for rate in (0.5, 2.0))
    assert slow == workload.requests(20, 0.5, 3)
    assert slow != workload.requests(20, 0.5, 4)
    assert column(slow, "id") == [*range(20)]
    np.testing.assert_allclose(gaps(slow), 4 * gaps(fast))
    for name in ("prompt_tokens", "max_tokens", "prompt", "sampling"):
        assert column(slow, name) == column(fast, name)
    assert lengths(workload.requests(8, 0.5, 3)) == lengths(slow)[:8]


@pytest.mark.parametrize("workload", ALL)
def test_a_vocabulary_adds_prompts_and_leaves_all_else_as_it_is(workload):
    """The engine's requests are the simulator's, with tokens."""
    bare, full = (w.requests(9, 1.0, 1) for w in (workload, with_tokens(workload)))
    assert [dataclasses.replace(r, prompt=None) for r in full] == [
        dataclasses.replace(r, prompt=None) for r in bare
    ]
    assert [len(r.prompt) for r in full] == column(bare, "prompt_tokens")


@pytest.mark.parametrize("workload", ALL)
def test_prompts_only(workload):
    whole, prompts = (
        w.requests(9, 1.0, 1) for w in (workload, workload.prompts_only())
    )
    assert [r.prompt_tokens for r in whole] == [r.prompt_tokens for r in prompts]
    assert {r.max_tokens for r in prompts} == {1}


@pytest.mark.parametrize("workload", ALL)
def test_each_request_has_the_options_and_a_sampling_seed_of_its_own(workload):
    sampling = Sampling(temperature=0.5, top_k=3)
    options = {"sampling": sampling, "eos_token": 2, "stop_tokens": (4,)}
    made = with_tokens(workload, ignore_eos=False, **options).requests(50, 2.0, 3)
    assert len({r.sampling.seed for r in made}) == 50
    assert {dataclasses.replace(r.sampling, seed=0) for r in made} == {sampling}
    assert all(r.stops_at(2) and r.stops_at(4) and not r.stops_at(1) for r in made)
    ignoring = with_tokens(workload, **options).requests(50, 2.0, 3)
    assert not any(r.stops_at(2) for r in ignoring)


@pytest.mark.parametrize("workload", ALL)
def test_bad_arguments(workload):
    with pytest.raises(ValueError, match="rate_rps: expected > 0 .* got -2"):
        workload.requests(9, -2, 0)
    with pytest.raises(ValueError, match="seed: expected >= 0, got -1"):
        workload.requests(9, 1.0, -1)


def test_a_vocabulary_has_tokens():
    with pytest.raises(ValueError, match="vocab_size: expected >= 1, got 0"):
        TokenOptions(vocab_size=0)


# ---- random lengths ------------------------------------------------------------------


@pytest.mark.parametrize(
    "drawn",
    [
        UniformLengths(low=1, high=50),
        LognormalLengths(median=20, sigma=1, high=50),
        HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
    ],
)
def test_a_longer_run_begins_with_the_shorter(drawn):
    workload = RandomWorkload(
        prompt=drawn,
        output=drawn,
        arrivals=Arrivals(kind="gamma", burstiness=0.5),
        tokens=TOKENS,
    )
    assert workload.requests(51, 2.0, 3)[:20] == workload.requests(20, 2.0, 3)


def test_streams_are_independent():
    """Other prompts leave arrivals, outputs and sampling seeds alone."""
    other = dataclasses.replace(RANDOM, prompt=FixedLengths(tokens=3))
    usual, other = (w.requests(50, 2.0, 3) for w in (RANDOM, other))
    for name in ("arrival_s", "max_tokens", "sampling"):
        assert column(usual, name) == column(other, name)
    same = UniformLengths(low=1, high=1000)
    made = RandomWorkload(prompt=same, output=same).requests(50, 2.0, 3)
    assert column(made, "prompt_tokens") != column(made, "max_tokens")


def test_random_prompts_use_the_whole_vocabulary():
    prompts = column(with_tokens(RANDOM).requests(50, 2.0, 3), "prompt")
    assert set(itertools.chain(*prompts)) == {0, 1, 2, 3, 4}  # token 0 included


def test_too_long_requests_lose_output_then_prompt():
    def made(limit):
        workload = RandomWorkload(
            prompt=FixedLengths(tokens=100),
            output=FixedLengths(tokens=30),
            extra_tokens=1,
            max_total_tokens=limit,
        )
        return lengths(workload.requests(1, 1.0, seed=0))

    assert made(None) == made(130) == [(100, 31)]
    assert made(110) == [(100, 11)]
    assert made(50) == [(49, 2)]


def test_a_run_has_a_request():
    with pytest.raises(ValueError, match="n: expected at least one"):
        RANDOM.requests(0, 1.0, 0)


# ---- given prompts -------------------------------------------------------------------


def test_prompts_come_again_with_the_output_lengths_that_they_had():
    made = PROMPTS.requests(7, 1.0, seed=0)
    assert column(made, "prompt") == [*PROMPTS.prompts * 2, PROMPTS.prompts[0]]
    outputs = column(made, "max_tokens")
    assert outputs == [*outputs[:3] * 2, outputs[0]] and len(set(outputs)) == 3


def test_another_seed_goes_on_with_the_next_prompts():
    first, second = (
        column(PROMPTS.requests(2, 1.0, seed), "prompt") for seed in (0, 1)
    )
    assert [*first, *second] == [*PROMPTS.prompts, PROMPTS.prompts[0]]
    assert PROMPTS.why_dependent(1, (0, 1)) == ""
    why = PROMPTS.why_dependent(2, (0, 1))
    assert "2 runs x 2 requests share the 3 prompts" in why


def test_prompts_share_arrivals_with_random_lengths():
    made, expected = (w.requests(5, 2.0, 3) for w in (PROMPTS, RANDOM))
    assert column(made, "arrival_s") == column(expected, "arrival_s")


def test_bad_prompts():
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        dataclasses.replace(PROMPTS, prompts=())
    with pytest.raises(ValueError, match="prompt of at least one token"):
        dataclasses.replace(PROMPTS, prompts=((1,), ())).requests(2, 1.0, 0)


# ---- traces --------------------------------------------------------------------------


def test_a_trace_keeps_its_rows_and_gaps_and_begins_again():
    n = 2 * len(ROWS)
    requests = TRACE.requests(n, 1.0, 0)
    # 19 rows from somewhere in the trace, whose own gaps are 1 0 4 1 4, and 2, the
    # mean, where it begins again.
    start = lengths(requests)[0][0] - 10
    order = [(start + i) % len(ROWS) for i in range(n)]
    assert lengths(requests) == [(10 + i, 1 + i) for i in order]
    own = [[1, 0, 4, 1, 4, 2][i] for i in order[:-1]]
    np.testing.assert_allclose(gaps(requests), np.array(own) * (n - 1) / sum(own))
    # The mean rate is what was asked for.
    assert requests[-1].arrival_s == pytest.approx(n - 1)


def test_seeds_have_rows_of_their_own_until_there_are_no_more():
    first, second = (lengths(TRACE.requests(3, 1.0, seed)) for seed in (0, 1))
    assert not set(first) & set(second)
    assert TRACE.why_dependent(3, (0, 1)) == ""
    assert "3 runs x 3 requests share the 6 rows" in TRACE.why_dependent(3, (0, 1, 2))
    assert RANDOM.why_dependent(10**6, range(100)) == ""


def test_rows_without_times_arrive_as_the_workload_says():
    rows = tuple(TraceRow(math.nan, 1 + i, 1) for i in range(8))
    workload = TraceWorkload(rows=rows, arrivals=Arrivals(kind="fixed"))
    np.testing.assert_allclose(gaps(workload.requests(20, 4.0, 0)), 0.25)
    drawn = [gaps(TraceWorkload(rows=rows).requests(8, 1.0, i)) for i in (0, 1)]
    assert not np.allclose(*drawn)


def test_one_request_and_two_at_the_same_time():
    for seed in range(40):
        for n in (1, 2):
            requests = TRACE.requests(n, 7.0, seed)
            assert len(requests) == n
            assert requests[0].arrival_s == 0


def test_rows_at_one_time_have_no_rate_but_their_trace_may():
    rows = [TraceRow(at, 5 + i, 1) for i, at in enumerate([3.0, 3.0, 5.0, 6.0])]
    workload = TraceWorkload(rows=tuple(rows))
    found = [workload.requests(2, 4.0, seed) for seed in (0, 1)]
    # The first two come together; the others a quarter of a second apart.
    assert [column(run, "arrival_s") for run in found] == [[0, 0], [0, 0.25]]
    assert [column(run, "prompt_tokens") for run in found] == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:1], "trace: expected two rows or more, got 1"),
        (ROWS[1:3], "trace: expected a span > 0 s, got 0.0"),
        ((*ROWS, TraceRow(11.0, 0, 5)), "trace: expected rows with tokens only, got 0"),
        (ROWS[::-1], "trace: expected rows in time order"),
    ],
)
def test_bad_traces(rows, message):
    with pytest.raises(ValueError, match=message):
        TraceWorkload(rows=rows)


@pytest.fixture
def ticking(tmp_path):
    """A trace whose clock ticks every 3 s, with four rows in each tick."""
    path = tmp_path / "trace.csv"
    rows = [f"{3 * (i // 4)},{1 + i},1" for i in range(12)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, ""]))
    return path


def test_rows_of_one_tick_are_spread_over_it_unless_kept(ticking):
    workload = TraceWorkload.fitting(load_trace(ticking), 99)
    np.testing.assert_allclose(gaps(workload.requests(12, 1.0, 0)), [1.0] * 11)
    kept = TraceWorkload.fitting(load_trace(ticking, ties="keep"), 99)
    found = column(kept.requests(12, 11 / 6, 0), "arrival_s")
    np.testing.assert_allclose(found, [0] * 4 + [3] * 4 + [6] * 4)


def test_rows_that_are_too_long_take_their_part_of_the_tick_with_them(ticking):
    some = TraceWorkload.fitting(load_trace(ticking), 8)
    np.testing.assert_allclose([r.arrival_s for r in some.rows], 0.75 * np.arange(7))
    assert some.notes[1:] == ["5 of 12 rows are left out: over 8 tokens"]
    assert some.facts["left_out_long"] == 5


def test_lengths_are_scaled_before_they_are_compared_with_the_maximum(ticking):
    half = TraceWorkload.fitting(
        load_trace(ticking), 5, scale=0.5, limit_name="context"
    )
    # 1 to 12 tokens: round(6.5 / 2) to even, and never to none.
    assert [row[1:] for row in half.rows] == [
        (tokens, 1) for tokens in (1, 1, 2, 2, 2, 3, 4, 4, 4)
    ]
    assert half.notes[1:] == [
        "lengths x 0.5",
        "3 of 12 rows are left out: over 5 tokens (context)",
    ]


# ---- rows at their own times ---------------------------------------------------------

APART = [TraceRow(at, 9, 1) for at in (3.0, 5.0, 6.0, 7.0)]


def test_rows_keep_their_own_times_from_zero_on_without_a_rate():
    assert column(requests_of_rows(APART), "arrival_s") == [0, 2, 3, 4]


def test_a_rate_stretches_the_times_of_rows():
    # Four rows over 4 s are 3 gaps: 0.75 a second; at 1.5 it takes half the time.
    assert column(requests_of_rows(APART, 1.5), "arrival_s") == [0, 1, 1.5, 2]


@pytest.mark.parametrize(
    ("rows", "rate_rps", "message"),
    [
        (APART[:1], 1, "to set a rate, expected a span > 0 s, got 0"),
        (APART, 0, "rate_rps: expected > 0"),
        ([TraceRow(math.nan, 9, 1)], None, "rate: expected one for a trace without"),
    ],
)
def test_a_rate_that_rows_cannot_have(rows, rate_rps, message):
    with pytest.raises(ValueError, match=message):
        requests_of_rows(rows, rate_rps)
