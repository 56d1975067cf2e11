"""Every number here is worked out by hand, from raw stamps or from queueing theory."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax import metrics
from disagg_jax.metrics import SLO, Interval
from disagg_jax.request import Status, Timeline
from tests.serving import make_request
from tests.timelines import DISAGGREGATED, SLO_1, served


class TestRequest:
    def test_latencies(self):
        assert metrics.ttft_s(DISAGGREGATED) == 3.0  # 4 - 1
        assert metrics.tpot_s(DISAGGREGATED) == 1.75  # (11 - 4) / 4
        assert metrics.itl_s(DISAGGREGATED) == [4.0, 0.5, 0.5, 2.0]
        assert metrics.e2e_s(DISAGGREGATED) == 10.0  # 11 - 1

    def test_stages(self):
        assert metrics.stages_s(DISAGGREGATED) == metrics.Stages(
            prefill_queue_s=1.0,  # 2 - 1
            prefill_s=2.0,  # 4 - 2
            transfer_s=2.0,  # 7 - 5
            decode_queue_s=1.5,  # 7.5 - 4 - 2
            decode_s=3.5,  # 11 - 7.5
        )

    def test_stages_without_transfer(self):
        timeline = served([2.0, 5.0], prefill_start_s=0.5, decode_start_s=3.0)
        assert dataclasses.astuple(metrics.stages_s(timeline)) == (0.5, 1.5, 0, 1, 2)

    def test_transfer_under_prefill_is_free(self):
        # First token at 4; the pull runs from 3 to 4.5, so 0.5 s of it is waited for.
        timeline = served(
            [4.0, 6.0], transfer_start_s=3.0, transfer_end_s=4.5, decode_start_s=5.0
        )
        assert dataclasses.astuple(metrics.stages_s(timeline)) == (0, 4, 0.5, 0.5, 1)
        timeline.transfer_end_s = 3.5  # all of it before the first token
        assert dataclasses.astuple(metrics.stages_s(timeline)) == (0, 4, 0, 1, 1)

    def test_one_token(self):
        # Its KV may have been moved, but nobody waited for it.
        timeline = served([3.0], transfer_start_s=3.0, transfer_end_s=4.0)
        timeline.decode_start_s = None
        assert metrics.tpot_s(timeline) == 0
        assert metrics.itl_s(timeline) == []
        assert dataclasses.astuple(metrics.stages_s(timeline)) == (0, 3, 0, 0, 0)

    @pytest.mark.parametrize("metric", [metrics.ttft_s, metrics.tpot_s])
    def test_needs_a_token(self, metric):
        with pytest.raises(ValueError, match="request 7: expected at least one token"):
            metric(served([], status=Status.ACTIVE))

    @pytest.mark.parametrize("metric", [metrics.e2e_s, metrics.stages_s])
    def test_needs_the_end(self, metric):
        with pytest.raises(ValueError, match="finished request, got status cancelled"):
            metric(served([1.0, 2.0], status=Status.CANCELLED))

    @pytest.mark.parametrize(
        "stamps",
        [
            {"prefill_start_s": None},
            {"prefill_start_s": 2.5},  # after the first token
            {"decode_start_s": None},
            {"decode_start_s": 1.5},  # before the first token
            {"decode_start_s": 4.5},  # after the last token
        ],
    )
    def test_stamps_out_of_order(self, stamps):
        with pytest.raises(ValueError, match="request 7: expected arrival <= prefill"):
            metrics.stages_s(served([2.0, 4.0], **stamps))


durations_s = st.floats(0, 1e4)


@st.composite
def timelines(draw: st.DrawFn) -> tuple[Timeline, list[float]]:
    """A finished disaggregated request, and its stamps in the order of time."""
    gaps_s = draw(st.lists(durations_s, min_size=8, max_size=30))
    at = list(itertools.accumulate(gaps_s))
    timeline = served(
        [at[2], *at[6:]],
        arrival_s=at[0],
        prefill_start_s=at[1],
        transfer_start_s=at[3],
        transfer_end_s=at[4],
        decode_start_s=at[5],
    )
    return timeline, at


@given(timelines())
def test_latencies_from_raw_stamps(drawn):
    timeline, at = drawn
    tokens = [at[2], *at[6:]]
    close = {"rel": 1e-9, "abs": 1e-9}  # stamps reach 3e5 s: an ulp is 6e-11 s
    assert metrics.ttft_s(timeline) == tokens[0] - at[0]
    assert metrics.e2e_s(timeline) == tokens[-1] - at[0]
    itl_s = metrics.itl_s(timeline)
    assert len(itl_s) == len(tokens) - 1
    assert sum(itl_s) == pytest.approx(tokens[-1] - tokens[0], **close)
    assert metrics.tpot_s(timeline) == pytest.approx(np.mean(itl_s), **close)
    steps_s = metrics.tpot_s(timeline) * (len(tokens) - 1)
    assert metrics.e2e_s(timeline) == pytest.approx(
        metrics.ttft_s(timeline) + steps_s, **close
    )


@given(timelines())
def test_stages_from_raw_stamps(drawn):
    timeline, at = drawn
    stages = metrics.stages_s(timeline)
    close = {"rel": 1e-9, "abs": 1e-9}
    assert stages.transfer_s == at[4] - at[3]
    assert stages.decode_queue_s == pytest.approx(
        at[5] - at[2] - stages.transfer_s, **close
    )
    parts = dataclasses.astuple(stages)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(metrics.e2e_s(timeline), **close)


@given(timelines(), durations_s, durations_s)
def test_stages_whenever_the_transfer_was(drawn, start_s, long_s):
    """A streamed or repeated transfer may overlap anything; the sum still holds."""
    timeline, _ = drawn
    timeline.transfer_start_s, timeline.transfer_end_s = start_s, start_s + long_s
    stages = metrics.stages_s(timeline)
    parts = dataclasses.astuple(stages)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(metrics.e2e_s(timeline), rel=1e-9, abs=1e-9)
    spans = metrics.stage_spans_s(timeline)
    for name, value in dataclasses.asdict(stages).items():
        spent = sum(end - start for stage, start, end in spans if stage == name)
        assert spent == pytest.approx(value, rel=1e-9, abs=1e-9)
    bounds = [timeline.request.arrival_s, *(end for _, _, end in spans)]
    assert [start for _, start, _ in spans] == bounds[:-1]  # no gaps
    assert bounds[-1] == timeline.end_s


@pytest.mark.parametrize(
    ("token_s", "stamps", "spans"),
    [
        # Of DISAGGREGATED's life, cancelled ever later.
        ([], {"prefill_start_s": None}, [("prefill_queue_s", 1, 9)]),
        ([], {}, [("prefill_queue_s", 1, 2), ("prefill_s", 2, 9)]),
        (
            [4.0],
            {},
            [
                ("prefill_queue_s", 1, 2),
                ("prefill_s", 2, 4),
                ("decode_queue_s", 4, 9),  # a transfer that broke off has no stamps
            ],
        ),
        (
            [4.0, 8.0],
            {"transfer_start_s": 5.0, "transfer_end_s": 7.0, "decode_start_s": 7.5},
            [
                ("prefill_queue_s", 1, 2),
                ("prefill_s", 2, 4),
                ("decode_queue_s", 4, 5),
                ("transfer_s", 5, 7),
                ("decode_queue_s", 7, 7.5),
                ("decode_s", 7.5, 9),
            ],
        ),
    ],
)
def test_the_last_stage_of_a_cancelled_request_ends_with_it(token_s, stamps, spans):
    stamps = {"prefill_start_s": 2.0, "decode_start_s": None, **stamps}
    timeline = served(token_s, 1.0, Status.CANCELLED, **stamps, end_s=9.0)
    assert metrics.stage_spans_s(timeline) == spans


def test_stages_of_a_request_that_goes_on_are_not_known():
    timeline = served([2.0], status=Status.ACTIVE, end_s=None)
    with pytest.raises(ValueError, match="one that has ended, got status active"):
        metrics.stage_spans_s(timeline)


class TestAttainment:
    def test_targets_are_inclusive(self):
        timeline = served([1.0, 1.5, 2.0])  # TTFT 1.0, TPOT 0.5: exactly the targets
        assert metrics.meets(timeline, SLO_1)
        just_below = SLO(ttft_s=math.nextafter(1.0, 0), tpot_s=0.5)
        assert not metrics.meets(timeline, just_below)
        assert not metrics.meets(timeline, dataclasses.replace(SLO_1, tpot_s=0.49))

    def test_one_token_meets_any_tpot(self):
        tiny = SLO(ttft_s=1.0, tpot_s=1e-9)
        assert metrics.meets(served([1.0]), tiny)
        assert not metrics.meets(served([1.1]), tiny)

    @pytest.mark.parametrize(
        "status", [Status.ACTIVE, Status.CANCELLED, Status.REFUSED]
    )
    def test_only_finished_can_be_good(self, status):
        fast = served([0.1, 0.2], status=status)
        assert not metrics.meets(fast, SLO_1)
        shares = metrics.attainment([served([0.1, 0.2]), fast], SLO_1)
        assert shares == metrics.Attainment(joint=0.5, ttft_only=0.5, tpot_only=0.5)

    def test_shares(self):
        run = [
            served([1.0, 1.5]),  # both
            served([1.0, 2.0]),  # TTFT only
            served([3.0]),  # TPOT only (one token)
            served([2.0, 3.0]),  # neither
            served([], status=Status.REFUSED),  # arrived, so counted
        ]
        shares = metrics.attainment(run, SLO_1)
        assert shares == metrics.Attainment(joint=0.2, ttft_only=0.4, tpot_only=0.4)

    def test_no_requests(self):
        with pytest.raises(ValueError, match="at least one request"):
            metrics.attainment([], SLO_1)

    def test_slo_scale(self):
        assert SLO_1.scaled(2) == SLO(ttft_s=2.0, tpot_s=1.0)

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
    def test_slo_is_positive(self, bad):
        with pytest.raises(ValueError, match="ttft_s: expected > 0"):
            SLO(ttft_s=bad, tpot_s=1)
        with pytest.raises(ValueError, match="tpot_s: expected > 0"):
            SLO(ttft_s=1, tpot_s=bad)


def md1_waits(
    rng: np.random.Generator, utilisation: float, runs: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """`[runs, n]` arrivals and waits of a one-server queue with 1 s service.

    Lindley's recursion, wait' = max(0, wait + 1 - gap), written as a sum less its
    smallest value so far.
    """
    gaps = rng.standard_exponential((runs, n)) / utilisation
    walk = np.cumsum(1 - gaps, axis=1) - (1 - gaps[:, :1])
    return np.cumsum(gaps, axis=1), walk - np.minimum.accumulate(walk, axis=1)


class TestIntervals:
    def test_by_hand(self):
        # Mean 2, standard deviation 1, error 1/sqrt(3); t(0.975, 2 degrees) = 4.302653.
        interval = metrics.interval_across([1.0, 2.0, 3.0])
        half = 4.302653 / math.sqrt(3)
        assert interval.mean == 2.0
        assert interval.low == pytest.approx(2 - half, rel=1e-6)  # digits of the table
        assert interval.high == pytest.approx(2 + half, rel=1e-6)

    def test_one_run_knows_no_interval(self):
        assert metrics.interval_across([0.9]) == Interval(mean=0.9, low=None, high=None)

    def test_confidence_widens(self):
        narrow = metrics.interval_across([1.0, 2.0], confidence=0.5)
        # t(0.75, 1 degree) = 1 (Cauchy); the error of {1, 2} is 0.5.
        assert (narrow.low, narrow.high) == (pytest.approx(1.0), pytest.approx(2.0))

    def test_of_a_rate_it_does_not_begin_below_0(self):
        low = metrics.interval_across([1.0, 2.0, 3.0]).low
        assert low is not None and low < 0
        found = metrics.rate_interval([1.0, 2.0, 3.0])
        assert found.low == 0.0 and found.mean == 2.0
        assert found.high == metrics.interval_across([1.0, 2.0, 3.0]).high
        above = [10.0, 11.0, 12.0]
        assert metrics.rate_interval(above) == metrics.interval_across(above)

    def test_runs_that_share_what_they_sample_have_none(self):
        found = metrics.rate_interval([1.0, 2.0, 3.0], independent=False)
        assert found == Interval(mean=2.0, low=None, high=None)

    def test_errors(self):
        with pytest.raises(ValueError, match="at least one value"):
            metrics.interval_across([])
        with pytest.raises(ValueError, match="confidence: expected in"):
            metrics.interval_across([1, 2], confidence=95)

    def test_coverage_justifies_the_rule(self):
        """Across seeds a 95 % interval covers the truth; a binomial one does not."""
        rng = np.random.default_rng(0)
        waits = md1_waits(rng, 0.75, runs=4000, n=1000)[1]
        # The queue is an M/D/1: mean wait u / (2 (1 - u)) = 1.5 once warm. 2e6
        # correlated waits estimate it to about 0.5 %.
        assert waits[:, 500:].mean() == pytest.approx(1.5, rel=0.02)
        good = waits <= np.quantile(waits, 0.9)
        shares = good.mean(axis=1)  # attainment of each run; its expectation is `truth`
        truth = shares.mean()

        across = [metrics.interval_across(group) for group in shares.reshape(-1, 8)]
        covered = np.mean([i.low <= truth <= i.high for i in across])
        # 500 intervals: standard error 1 %; attainment is skewed, which costs a little.
        assert 0.92 <= covered <= 0.98

        z, n = 1.96, waits.shape[1]
        centre = (shares + z**2 / (2 * n)) / (1 + z**2 / n)
        spread = shares * (1 - shares) / n + z**2 / (4 * n**2)
        half = z / (1 + z**2 / n) * np.sqrt(spread)
        wilson = np.mean(np.abs(centre - truth) <= half)
        assert wilson < 0.5  # nominally 0.95; 0.34 here


class TestSteady:
    def md1(self, utilisation: float, n: int = 1000) -> list[Timeline]:
        rng = np.random.default_rng(0)
        (arrivals,), (waits,) = md1_waits(rng, utilisation, runs=1, n=n)
        ends = arrivals + waits + 1
        return [
            served([end], arrival_s=at)
            for at, end in zip(arrivals.tolist(), ends.tolist(), strict=True)
        ]

    def test_below_and_above_capacity(self):
        assert metrics.is_steady(self.md1(0.5))
        assert not metrics.is_steady(self.md1(1.3))

    def test_order_does_not_matter(self):
        assert not metrics.is_steady(self.md1(1.3)[::-1])

    def test_growth_by_hand(self):
        # 16 arrivals, one a second, none ever ends: 5..8 in the system in the second
        # quarter, 13..16 in the last. Growth 14.5 - 6.5 = 8 = 16 / 2: all pile up.
        run = [served([], arrival_s=at, status=Status.ACTIVE) for at in range(16)]
        assert not metrics.is_steady(run, tolerance=0.99)
        assert metrics.is_steady(run, tolerance=1.0)

    def test_who_leaves_when_another_comes_has_left(self):
        # One a second, gone after half a second and, from the middle on, after a whole
        # one, just when the next comes: there is never more than one.
        run = [
            served([at + (0.5 if at < 8 else 1.0)], arrival_s=at) for at in range(16)
        ]
        assert metrics.is_steady(run, tolerance=0)

    def test_who_come_together_find_each_other(self):
        # 12 that come one a second, then two pairs: 1 in the system, then 2 for each of
        # the last four. So 1 of 16 / 2 is added to the backlog.
        times = [*range(12), 12, 12, 13, 13]
        run = [served([at + 0.5], arrival_s=at) for at in times]
        assert not metrics.is_steady(run, tolerance=0.12)
        assert metrics.is_steady(run, tolerance=0.125)

    def test_cancelled_and_refused_leave(self):
        gone = [
            served([], arrival_s=at, end_s=at, status=status)
            for at in range(32)
            for status in (Status.CANCELLED, Status.REFUSED)
        ]
        assert metrics.is_steady(gone, tolerance=0)

    def test_too_few_show_nothing(self):
        run = [served([at + 0.5], arrival_s=at) for at in range(4)]
        assert metrics.is_steady(run)
        assert not metrics.is_steady(run[:3])


class TestGoodput:
    def test_interpolates_at_the_first_crossing(self):
        # From (2, 0.95) to (4, 0.85) the line is at 0.9 half way; any order will do.
        found = metrics.goodput([(4, 0.85), (1, 1.0), (2, 0.95)])
        assert found.rate_rps == pytest.approx(3)
        assert (found.pass_rps, found.fail_rps) == (2, 4)
        assert found.bracketed

    def test_a_later_pass_is_luck(self):
        found = metrics.goodput([(1, 1.0), (2, 0.8), (3, 0.95), (4, 0.1)])
        assert found.rate_rps == pytest.approx(1.5)
        assert found.fail_rps == 2

    def test_a_pass_on_the_line(self):
        # 0.9 attains 0.9, so the crossing is there, wherever the failure lies.
        assert metrics.goodput([(1, 0.9), (2, 0.0)]).rate_rps == 1

    def test_never_failed(self):
        found = metrics.goodput([(1, 1.0), (2, 0.9)])
        assert (found.rate_rps, found.fail_rps, found.bracketed) == (2, None, False)

    def test_lowest_rate_fails(self):
        found = metrics.goodput([(1, 0.5), (2, 0.95)])
        assert (found.rate_rps, found.pass_rps, found.bracketed) == (0, None, False)

    @given(st.dictionaries(st.floats(0.1, 100), st.floats(0, 1), min_size=1))
    def test_lies_between_its_rates(self, points):
        found = metrics.goodput(points.items(), target=0.9)
        below = [rate for rate in points if rate <= found.rate_rps]
        assert found.rate_rps == 0 or all(points[rate] >= 0.9 for rate in below[:-1])
        if found.bracketed:
            assert found.pass_rps <= found.rate_rps <= found.fail_rps
            assert points[found.pass_rps] >= 0.9 > points[found.fail_rps]

    @pytest.mark.parametrize(
        ("points", "target", "message"),
        [
            ([], 0.9, "at least one"),
            ([(1, 0.5)], 90, "target: expected in"),
            ([(0, 0.5)], 0.9, "rate > 0"),
            ([(1, 95)], 0.9, r"attainment in \[0, 1\]"),
            ([(1, math.nan)], 0.9, r"attainment in \[0, 1\]"),
            ([(1.0, 0.5), (1.0, 0.6)], 0.9, "each rate once, got 1.0 twice"),
        ],
    )
    def test_errors(self, points, target, message):
        with pytest.raises(ValueError, match=message):
            metrics.goodput(points, target)

    @pytest.mark.parametrize(
        ("low_at_pass", "high_at_fail", "resolved"),
        [
            (0.90, 0.89, True),  # at or above the target; below it
            (0.89, 0.89, False),
            (0.90, 0.90, False),
            (None, 0.89, False),
            (0.90, None, False),
        ],
    )
    def test_resolved(self, low_at_pass, high_at_fail, resolved):
        at_pass = Interval(mean=0.95, low=low_at_pass, high=1.0)
        at_fail = Interval(mean=0.8, low=0.7, high=high_at_fail)
        assert metrics.is_resolved(at_pass, at_fail, target=0.9) is resolved


def test_pooled_gaps_are_those_of_each_request_one_after_the_other():
    stamps = [[], [1.0, 1.5, 3.0], [], [2.0], [0.5, 9.0], []]
    timelines = [
        Timeline(request=make_request(i), token_s=list(s)) for i, s in enumerate(stamps)
    ]
    assert metrics.pooled_itl_s(timelines).tolist() == [0.5, 1.5, 8.5]
    assert [gap for t in timelines for gap in metrics.itl_s(t)] == [0.5, 1.5, 8.5]
    assert (
        metrics.pooled_itl_s(timelines[:1]).tolist()
        == metrics.pooled_itl_s([]).tolist()
        == []
    )


def test_a_margin_is_a_geometric_mean_with_an_interval():
    # Logs of the ratios are 0.1, 0.2, 0.3: mean 0.2, sd 0.1; t of 2 degrees is 4.303.
    ratios = [math.exp(x) for x in (0.1, 0.2, 0.3)]
    found = metrics.margin([2 * r for r in ratios], [2.0, 2.0, 2.0])
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert found.ratio.mean == pytest.approx(math.exp(0.2))
    assert found.ratio.low == pytest.approx(math.exp(0.2 - half), rel=1e-4)
    assert found.ratio.high == pytest.approx(math.exp(0.2 + half), rel=1e-4)
    assert not found.clear  # 0.2 - 0.248 < 0
    inverse = metrics.margin([2.0, 2.0, 2.0], [2 * r for r in ratios])
    assert inverse.ratio.low == pytest.approx(1 / found.ratio.high)


def test_an_unpaired_margin_is_welchs():
    """Logarithms 0, 2 and 4 against 1 and 1: variances of means 4/3 and 0.

    So there are 2 degrees of freedom, whose 97.5 % quantile is 4.302653.
    """
    ours, theirs = [1.0, math.e**2, math.e**4], [math.e, math.e]
    found = metrics.unpaired_margin(ours, theirs).ratio
    half = 4.302653 * math.sqrt(4 / 3)
    ends = (found.mean, found.low, found.high)
    expected = (math.e, math.exp(1 - half), math.exp(1 + half))
    assert ends == pytest.approx(expected, rel=1e-6)
    inverse = metrics.unpaired_margin(theirs, ours).ratio
    assert (inverse.low, inverse.high) == pytest.approx((1 / found.high, 1 / found.low))


def test_an_unpaired_margin_is_clear_only_by_an_interval_or_a_zero():
    apart = ([3.0, 3.1, 3.2], [2.0, 2.1])
    assert metrics.unpaired_margin(*apart).clear
    assert not metrics.unpaired_margin(*apart, independent=False).clear
    assert metrics.unpaired_margin(*apart, independent=False).ratio.low is None
    assert metrics.unpaired_margin([3.0], [2.0, 2.1]).ratio.low is None
    assert metrics.unpaired_margin([2.0, 2.0], [1.0, 1.0]).clear
    nothing = metrics.unpaired_margin([3.0, 3.1, 3.2], [0.0, 0.0])
    assert nothing.clear and nothing.ratio is None
    assert not metrics.unpaired_margin([0.0, 1.0], [1.0, 1.0, 1.0]).clear


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"),
    [
        ((2.0, 2.1), (1.0, 1.05), True),
        ((1.0, 1.05), (2.0, 2.1), True),
        ((1.0, 1.0), (1.0, 1.0), False),
        ((2.0, 1.0), (1.0, 2.0), False),
        ((2.0,), (1.0,), False),  # one seed says nothing
    ],
)
def test_a_margin_is_clear_where_its_interval_excludes_1(ours, theirs, clear):
    assert metrics.margin(ours, theirs).clear is clear


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"),
    [
        ((1.0, 2.0), (0.0, 0.0), True),
        ((0.0, 0.0), (1.0, 2.0), True),
        ((1.0, 2.0), (0.0, 1.0), False),
        ((0.0, 2.0), (0.0, 0.0), False),
        ((0.0, 0.0), (0.0, 0.0), False),
    ],
)
def test_without_goodput_there_is_no_ratio(ours, theirs, clear):
    found = metrics.margin(ours, theirs)
    assert found.ratio is None and found.clear is clear


# Three seeds that differ by 0.02 about their means.
NOISY = {
    rate: [mean - 0.02, mean, mean + 0.02]
    for rate, mean in ((80.0, 0.97), (100.0, 0.91), (110.0, 0.89), (120.0, 0.8))
}


@pytest.mark.parametrize(
    ("apart", "confidence", "resolved"),
    [
        (1.0, 0.95, False),  # 0.91 and 0.89 are too near to the target
        (1.4, 0.95, False),  # 80 and 120 are decided, but 1.5 times apart
        (1.5, 0.95, True),
        # The interval at 80 reaches down to 0.97 - 9.9 x 0.0115.
        (1.5, 0.99, False),
    ],
)
def test_a_goodput_is_resolved_by_rates_that_are_decided_and_near(
    apart, confidence, resolved
):
    found = metrics.estimate(NOISY, 0.9, apart=apart, confidence=confidence)
    assert (found.pass_rps, found.fail_rps) == (100.0, 110.0)
    assert found.resolved is resolved


def test_a_higher_confidence_widens_every_interval():
    narrow, wide = (
        metrics.estimate(NOISY, 0.9, confidence=c).interval for c in (0.95, 0.99)
    )
    assert narrow.mean == wide.mean
    ratio = (wide.high - wide.mean) / (narrow.high - narrow.mean)
    assert ratio == pytest.approx(9.925 / 4.303, rel=1e-3)  # t of 2 degrees
    ours, theirs = (1.0, 1.1, 1.2), (1.0, 1.0, 1.0)
    assert not metrics.margin(ours, theirs, confidence=0.95).clear
    assert metrics.margin(ours, theirs, confidence=0.5).clear
