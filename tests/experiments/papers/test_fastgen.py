"""FastGen's figure: what closed-loop clients must show."""

from __future__ import annotations

import pytest

from experiments.papers import fastgen
from experiments.papers.figure import Lab


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
