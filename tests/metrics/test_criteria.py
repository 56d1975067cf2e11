"""Each paper's criterion on timelines made by hand, and the edge rules."""

import dataclasses
import itertools
import math

import pytest

from disagg_jax import metrics
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.criteria import (
    MLPERF_SLOS,
    NAMES,
    DistServe,
    FastGen,
    Mooncake,
    SarathiThroughput,
    UnloadedLatency,
    for_slo,
    mlperf,
    moving_averages,
    sarathi_serve,
    slowest_gaps_s,
    splitwise,
    vidur_search,
)
from disagg_jax.metrics.percentile_limits import (
    Bound,
    PercentileBounds,
    scheduling_delay,
    tbt,
    tpot,
    ttft,
)
from disagg_jax.request import Status
from tests.timelines import SLO_1, served


def with_gaps(*gaps_s, ttft_s=0.5, **stamps):
    """A request that arrives at 0, with these gaps."""
    return served([*itertools.accumulate(gaps_s, initial=ttft_s)], **stamps)


def unserved(max_tokens, status=Status.REFUSED):
    timeline = served([], status=status, end_s=0.0)
    timeline.request = dataclasses.replace(timeline.request, max_tokens=max_tokens)
    return timeline


def passes(criterion, run):
    return criterion.score(run) >= criterion.target


# ---- shares of good requests ---------------------------------------------------------


def test_distserve_is_the_joint_attainment():
    run = [with_gaps(0.5), with_gaps(0.75), with_gaps(0.5, ttft_s=1.5), unserved(1)]
    criterion = DistServe(slo=SLO_1)
    # Only the first is within TTFT 1 and TPOT 0.5.
    assert criterion.score(run) == metrics.attainment(run, SLO_1).joint == 1 / 4
    assert not passes(criterion, run)
    assert passes(DistServe(slo=SLO_1, target=0.25), run)


def test_mooncake_looks_at_the_slowest_tenth_of_a_requests_gaps():
    # 11 gaps: the slowest ceil(1.1) = 2 are 4 and 2.
    stalled = with_gaps(*[0.5] * 9, 4.0, 2.0)
    assert slowest_gaps_s(stalled) == 3.0
    assert slowest_gaps_s(with_gaps(0.5, 0.75)) == 0.75
    assert slowest_gaps_s(with_gaps()) == 0.0  # one token
    run = [stalled, with_gaps(), with_gaps(ttft_s=31.0), unserved(1)]
    assert Mooncake(tbt_s=3.0).score(run) == 2 / 4
    assert Mooncake(tbt_s=2.9).score(run) == 1 / 4  # the one token
    assert Mooncake(tbt_s=3.0, ttft_s=31.0).score(run) == 3 / 4


# ---- bounds on percentiles -----------------------------------------------------------


def test_sarathi_serve_sees_the_stalls_that_a_mean_hides():
    # 200 gaps; P99 allows 2 of them to be long.
    steady = [with_gaps(*[0.25] * 100)]
    two = [*steady, with_gaps(*[0.25] * 98, 5.0, 5.0)]
    three = [*steady, with_gaps(*[0.25] * 97, 5.0, 5.0, 5.0)]
    criterion = sarathi_serve(tbt_s=0.25)
    assert criterion.score(two) == 198 / 200 == criterion.target
    assert criterion.score(three) == 197 / 200 < criterion.target
    assert passes(DistServe(slo=SLO_1), three)


def test_sarathi_serve_bounds_the_median_delay_but_no_ttft():
    def run(*delays_s):
        return [with_gaps(ttft_s=99.0, prefill_start_s=delay) for delay in delays_s]

    criterion = sarathi_serve(delay_s=2.0)
    assert passes(criterion, run(0.0, 2.0, 3.0, 4.0))  # 2 of 4 within 2 s
    late = run(0.0, 2.5, 3.0, 4.0)
    # 1 of 4 where a half is needed: half of the target.
    assert criterion.score(late) == pytest.approx(0.5 * 0.99)


def test_vidur_search_takes_its_percentiles_of_different_latencies():
    good = [with_gaps(*[0.1] * 10, ttft_s=2.0) for _ in range(9)]
    slow = with_gaps(*[0.1] * 10, ttft_s=2.5)
    criterion = vidur_search()
    assert passes(criterion, [*good, slow])  # TTFT: 9 of 10, and P90 is asked
    assert not passes(criterion, [*good, slow, slow])
    waited = with_gaps(ttft_s=6.0, prefill_start_s=5.5)
    assert not passes(criterion, [*good * 10, waited])  # delay: 90 of 91 < 99 %
    assert passes(criterion, [*good * 11, waited])  # 99 of 100


def test_mlperf_bounds_ttft_and_tpot_each_for_itself():
    bad_ttft, bad_tpot = with_gaps(0.5, ttft_s=1.5), with_gaps(0.75)
    run = [with_gaps(0.5)] * 98 + [bad_ttft, bad_tpot]
    assert mlperf(SLO_1).score(run) == 99 / 100
    assert passes(mlperf(SLO_1), run)
    assert metrics.attainment(run, SLO_1).joint == 98 / 100
    assert not passes(mlperf(SLO_1), [*run, bad_tpot])
    assert MLPERF_SLOS["llama2-70b-interactive"] == SLO(ttft_s=0.45, tpot_s=0.04)


def test_which_criteria_see_a_stall_and_which_the_mean_of_a_requests_gaps():
    # Gaps of 0.25 s and one of 1 s in eight: their mean is 2.75 / 8 s, within 0.5.
    run = [with_gaps(*[0.25] * 7, 1.0)]
    slo = SLO(ttft_s=1.0, tpot_s=0.5)
    for criterion in (DistServe(slo=slo), mlperf(slo)):
        assert criterion.score(run) == 1.0
    # To an idle machine with gaps of 0.25 s the mean is 1.375 times as long, E2E is
    # (0.5 + 2.75) / (0.5 + 2) = 1.3, both within 1.5; the stall alone is four times.
    idle = splitwise(lambda request: UnloadedLatency(ttft_s=0.5, tpot_s=0.25))
    (p90,) = [bound for bound in idle.bounds if str(bound).startswith("P90 TBT")]
    assert p90.met_by([v for t in run for v in p90.latencies(t)]) == 1.0
    for criterion in (
        sarathi_serve(tbt_s=0.5),
        vidur_search(tbt_s=0.5),
        Mooncake(tbt_s=0.5),
    ):
        assert not passes(criterion, run)


def test_shares_are_put_on_the_scale_of_the_strictest_bound():
    half = Bound(what="TTFT", latencies=ttft, share=0.5, limit=1.0)
    strict = Bound(what="TBT", latencies=tbt, share=0.9, limit=1.0)
    criterion = PercentileBounds(bounds=(half, strict))
    assert criterion.target == 0.9

    def score(good, late):  # TTFTs, no gaps
        return criterion.score([with_gaps()] * good + [with_gaps(ttft_s=2.0)] * late)

    # As far from 0, 0.5 and 1 as from 0, 0.9 and 1; exactly on target where needed.
    assert score(0, 4) == 0.0
    assert score(1, 3) == pytest.approx(0.45)
    assert score(2, 2) == 0.9
    assert score(3, 1) == pytest.approx(0.95)
    assert score(4, 0) == 1.0


def test_a_bound_may_be_on_all_latencies():
    strict = Bound(what="TTFT", latencies=ttft, share=1.0, limit=1.0)
    run = [with_gaps()] * 3 + [with_gaps(ttft_s=2.0)]
    for bounds in ((strict,), (strict, dataclasses.replace(strict, share=0.5))):
        criterion = PercentileBounds(bounds=bounds)
        assert criterion.target == 1.0
        assert criterion.score(run) == 3 / 4
        assert criterion.score(run[:3]) == 1.0
    assert str(strict) == "P100 TTFT <= 1000 ms"


def test_what_did_not_finish_misses_every_bound():
    timeline = unserved(5)
    assert len(ttft(timeline)) == len(scheduling_delay(timeline)) == 1
    assert (len(tpot(timeline)), len(tbt(timeline))) == (1, 4)
    boundless = PercentileBounds(
        bounds=(Bound(what="TBT", latencies=tbt, share=0.9, limit=math.inf),)
    )
    # 4 gaps that were asked for beside 12 that came.
    assert boundless.score([timeline, with_gaps(*[1.0] * 12)]) == 12 / 16
    stopped = with_gaps(1.0, 1.0, status=Status.CANCELLED)
    assert boundless.score([stopped]) == 0.0


def test_a_one_token_request_is_in_no_percentile_of_gaps():
    criterion = mlperf(SLO_1)
    assert tpot(with_gaps()) == tbt(with_gaps()) == []
    assert tpot(unserved(1)) == tbt(unserved(1)) == []
    assert criterion.score([with_gaps()]) == 1.0  # no TPOT at all
    # 1 of 2 TPOTs is too long, however many one-token requests there are.
    assert criterion.score([with_gaps()] * 98 + [with_gaps(0.5), with_gaps(2.0)]) == 0.5


# ---- slowdowns -----------------------------------------------------------------------


def test_splitwise_bounds_nine_slowdowns():
    criterion = splitwise(lambda request: UnloadedLatency(ttft_s=1.0, tpot_s=0.5))
    assert str(criterion) == (
        "P50 TTFT slowdown <= 2x, P90 TTFT slowdown <= 3x, P99 TTFT slowdown <= 6x, "
        "P50 TBT slowdown <= 1.25x, P90 TBT slowdown <= 1.5x, "
        "P99 TBT slowdown <= 5x, P50 E2E slowdown <= 1.25x, "
        "P90 E2E slowdown <= 1.5x, P99 E2E slowdown <= 5x"
    )

    # UnloadedLatency, 9 tokens take 1 + 8 * 0.5 = 5 s.
    def nine_tokens(ttft_s, gap_s):
        return with_gaps(*[gap_s] * 8, ttft_s=ttft_s)

    idle = nine_tokens(1.0, 0.5)
    assert criterion.score([idle]) == 1.0
    # TTFT 2x and E2E (2 + 4) / 5 = 1.2x pass at P50; so does TBT 0.625 / 0.5 = 1.25x,
    # with E2E (1 + 5) / 5.
    assert passes(criterion, [nine_tokens(2.0, 0.5)])
    assert passes(criterion, [nine_tokens(1.0, 0.625)])
    # Both at once: E2E 7 / 5 = 1.4x is over 1.25x. It is not for half of the requests.
    both = nine_tokens(2.0, 0.625)
    assert criterion.score([both]) == 0.0
    assert passes(criterion, [both, idle])
    # E2E (2 + 8 * 17 / 32) / 5 is 1.25x exactly; (2 + 4.5) / 5 is more.
    assert passes(criterion, [nine_tokens(2.0, 17 / 32)])
    assert not passes(criterion, [nine_tokens(2.0, 18 / 32)])
    # TTFT 4x: over P90's 3x, so no more than 1 in 10. E2E 8 / 5 likewise.
    late = nine_tokens(4.0, 0.5)
    assert passes(criterion, [late, *[idle] * 9])
    assert not passes(criterion, [late, *[idle] * 8])
    assert not passes(criterion, [unserved(9), *[idle] * 9])  # of P99, 1 in 10


def test_on_a_machine_where_it_is_free_what_takes_time_is_infinitely_slow():
    criterion = splitwise(lambda request: UnloadedLatency(ttft_s=0.0, tpot_s=0.0))
    assert criterion.score([with_gaps(0.0, ttft_s=0.0)]) == 1.0
    assert criterion.score([with_gaps(0.0, ttft_s=0.1)]) == 0.0


# ---- throughputs ---------------------------------------------------------------------


def test_moving_averages():
    # span 3: weights halve. (4 + 1 / 2) / 1.5 = 3; (0 + 4 / 2 + 1 / 4) / 1.75 = 9 / 7.
    assert [*moving_averages([1.0, 4.0, 0.0], 3)] == pytest.approx([1, 3, 9 / 7])


def test_fastgen_counts_good_requests_per_second():
    criterion = FastGen(prompt_token_s=0.1, token_s=3.0, span=3)
    run = [
        with_gaps(1.0, 4.0, ttft_s=1.0),  # averages 1 and 3, TTFT 10 * 0.1: good
        with_gaps(1.0, 4.5, ttft_s=1.0),  # average 5 / 1.5; its mean gap is 2.75
        with_gaps(ttft_s=1.1),  # late
        with_gaps(ttft_s=0.5),  # one token: good
        unserved(1),
        with_gaps(ttft_s=0.9, status=Status.CANCELLED),
    ]
    # 2 good ones from 0 to the last token at 6.5.
    assert criterion.score(run) == 2 / 6.5
    assert criterion.target is None


def test_fastgens_defaults_are_the_blogs_rates():
    # 10 prompt tokens at 512 per s are 19.5 ms; 4 tokens per s are gaps of 0.25 s.
    assert FastGen().score([with_gaps(0.25, ttft_s=10 / 512)]) > 0
    assert FastGen().score([with_gaps(0.25, ttft_s=0.0196)]) == 0
    assert FastGen().score([with_gaps(0.26, ttft_s=0.01)]) == 0


def test_sarathi_counts_tokens_per_ms():
    run = [with_gaps(1.0, 1.0), with_gaps(3.5), unserved(7)]
    # 2 prompts of 10 and 5 tokens, until 4 s.
    assert SarathiThroughput().score(run) == pytest.approx(25 / 4000)
    assert SarathiThroughput().score([unserved(7)]) == 0.0  # nothing took any time
    # One that ended early counts with the tokens that it has.
    ended = with_gaps(3.5)
    ended.request = dataclasses.replace(ended.request, max_tokens=7)
    assert SarathiThroughput().score([ended]) == pytest.approx((10 + 2) / 4000)


# ---- all of them ---------------------------------------------------------------------


def everything(slo=SLO_1):
    return for_slo(
        slo,
        target=0.9,
        prompt_tokens=10,
        unloaded=lambda request: UnloadedLatency(ttft_s=0.5, tpot_s=0.25),
    )


def test_for_slo_has_every_criterion_with_the_slos_seconds():
    found = everything(SLO(ttft_s=1.0, tpot_s=0.5))
    assert tuple(found) == NAMES
    assert {name: str(found[name]) for name in NAMES if name != "splitwise"} == {
        "distserve": "90% of requests with TTFT <= 1000 ms and TPOT <= 500 ms",
        "sarathi_serve": "P99 TBT <= 500 ms, P50 scheduling delay <= 1000 ms",
        "vidur_search": "P99 scheduling delay <= 2500 ms, P90 TTFT <= 1000 ms, "
        "P99 TBT <= 500 ms",
        "mlperf": "P99 TTFT <= 1000 ms, P99 TPOT <= 500 ms",
        "mooncake": "90% of requests with TTFT <= 1000 ms and mean of the longest "
        "10 % of gaps <= 500 ms",
        "fastgen": "TTFT <= 100 ms a prompt token and moving average of gaps <= 500 ms",
        "sarathi": "prompt and generated tokens, saturated",
    }


def test_the_shares_of_good_requests_have_the_target_asked_for():
    found = for_slo(
        SLO_1,
        target=0.75,
        prompt_tokens=10,
        unloaded=lambda request: UnloadedLatency(ttft_s=1.0, tpot_s=1.0),
    )
    shares = ("distserve", "mooncake")
    assert {name: found[name].target for name in shares} == dict.fromkeys(shares, 0.75)
    # What bounds percentiles has the strictest of them; throughputs have none.
    bounds = ("sarathi_serve", "vidur_search", "mlperf", "splitwise")
    assert {found[name].target for name in bounds} == {0.99}
    assert found["fastgen"].target is None and found["sarathi"].target is None


def test_every_figure_has_its_unit():
    units = {name: criterion.unit for name, criterion in everything().items()}
    assert (units.pop("fastgen"), units.pop("sarathi")) == (
        "good requests/s",
        "tokens/ms",
    )
    assert set(units.values()) == {"requests/s"}


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_machine_passes_and_one_that_refuses_does_not(name):
    criterion = everything()[name]
    idle, none = [with_gaps(0.25, 0.25)] * 4, [unserved(3)] * 4
    if criterion.target is None:
        assert criterion.score(idle) > criterion.score(none) == 0
    else:
        assert criterion.score(idle) == 1.0 > criterion.score(none) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_targets_may_be_infinite_and_refused_requests_miss_them(name):
    criterion = everything(SLO(ttft_s=math.inf, tpot_s=math.inf))[name]
    assert criterion.score([unserved(3)] * 4) == 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sarathi_serve(tbt_s=0.0), "TBT limit: expected > 0, got 0.0"),
        (
            lambda: Bound(what="TBT", latencies=tbt, share=1.5, limit=1.0),
            "TBT share: expected in",
        ),
        (lambda: FastGen(span=0), "fastgen span: expected > 0, got 0"),
    ],
)
def test_bad_bounds_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_defaults_are_the_papers_numbers():
    assert str(sarathi_serve()) == "P99 TBT <= 100 ms, P50 scheduling delay <= 2000 ms"
    assert str(vidur_search()) == (
        "P99 scheduling delay <= 5000 ms, P90 TTFT <= 2000 ms, P99 TBT <= 200 ms"
    )
    mooncake = Mooncake()
    assert (mooncake.ttft_s, mooncake.tbt_s, mooncake.target) == (30.0, 0.1, 0.9)
    assert (FastGen().span, FastGen().token_s) == (16, 0.25)
    # loadgen/mlperf.conf: TTFT and TPOT in ms.
    assert {
        name: (round(slo.ttft_s * 1e3), round(slo.tpot_s * 1e3))
        for name, slo in MLPERF_SLOS.items()
    } == {
        "llama2-70b": (2000, 200),
        "llama2-70b-interactive": (450, 40),
        "llama3.1-8b": (2000, 100),
        "llama3.1-8b-interactive": (500, 30),
        "llama3.1-405b": (6000, 175),
        "llama3.1-405b-interactive": (4500, 80),
        "mixtral-8x7b": (2000, 200),
        "deepseek-r1": (2000, 80),
        "deepseek-r1-interactive": (1500, 15),
        "gpt-oss-120b": (3000, 80),
        "gpt-oss-120b-interactive": (2000, 20),
    }
