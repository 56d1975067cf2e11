"""FastGen's figure: its SLA by hand, and what closed-loop clients must show."""

from __future__ import annotations

import pytest

from disagg_jax.request import Request, Status, Timeline
from experiments.figures import fastgen
from experiments.figures.figure import Lab


def test_the_moving_average_is_normalised():
    # span 3: alpha .5. (1), (.5 + 2) / 1.5, (.25 + 1 + 6) / 1.75.
    assert fastgen.averages_s([1, 2, 6], span=3) == pytest.approx(
        [1, 2.5 / 1.5, 7.25 / 1.75]
    )


def timeline(first_s: float, *gaps_s: float) -> Timeline:
    stamps = [first_s]
    for gap_s in gaps_s:
        stamps.append(stamps[-1] + gap_s)
    request = Request(id=0, arrival_s=0, prompt_tokens=1024, max_tokens=9)
    return Timeline(request=request, status=Status.FINISHED, token_s=stamps)


def test_the_sla_by_hand():
    # 1024 tokens have 2 s. Generation is judged by the worst average: after nine gaps
    # of .1 s, one and three of .6 s make .18 and .30 s; .25 s are the limit.
    assert fastgen.within_sla(timeline(2.0, *[0.1] * 9))
    assert not fastgen.within_sla(timeline(2.01, *[0.1] * 9))
    assert fastgen.within_sla(timeline(1.0, *[0.1] * 9, 0.6))
    assert not fastgen.within_sla(timeline(1.0, *[0.1] * 9, 0.6, 0.6, 0.6, *[0.1] * 9))
    assert not fastgen.within_sla(timeline(1.0, 0.25))


def test_a_latency_is_read_between_two_points():
    curve = [(1.0, 2.0), (1.5, 4.0), (1.6, 8.0)]
    assert fastgen.at_latency(curve, 5.0) == pytest.approx(1.525)
    assert fastgen.at_latency(curve, 9.0) is None


def test_splitfuse_has_the_shorter_tail_and_the_same_median():
    lab = Lab(num_requests=96, seeds=1, workers=1)
    runs = fastgen._run(lab, fastgen._LONG_OUTPUT, [fastgen._LONG_CLIENTS])
    (ours,), (theirs,) = (runs[n][fastgen._LONG_CLIENTS] for n in ("SplitFuse", "vLLM"))
    assert theirs.itl_p95_s > 2 * ours.itl_p95_s
    assert theirs.itl_p50_s == pytest.approx(ours.itl_p50_s, rel=0.1)


def test_more_clients_give_more_throughput_and_latency():
    lab = Lab(num_requests=48, seeds=1, workers=1)
    curve = fastgen._curve(fastgen._run(lab, fastgen._OUTPUT, (1, 4, 16))["SplitFuse"])
    assert curve == sorted(curve) and [y for _, y in curve] == sorted(
        y for _, y in curve
    )
