"""The text, the table and the pictures of simulated runs."""

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO, ttft_s
from disagg_jax.metrics.summary import percentiles
from disagg_jax.sim import Simulation
from experiments.report.panel import STAGE_LEGEND
from experiments.simulated.report import (
    curve_panels,
    latency_panels,
    refused_share,
    table,
    text,
)
from experiments.simulated.served import NO_TARGETS, list_cases
from tests.serving import make_request

TARGETS = SLO(ttft_s=0.5, tpot_s=1e-6)  # everybody misses the second


@pytest.fixture(scope="module")
def found():
    """Two deployments at 2 and 1 requests/s; one of ten requests is refused."""
    simulation = Simulation.of("llama-3-8b", "h100", max_context=1000)
    deployments = map(Deployment.parse, ("prefill:tp1,decode:tp1", "colocated:tp1pp2"))
    requests = {
        rate: [
            make_request(i, arrival_s=i / rate, prompt=2000 if i == 5 else 100, out=5)
            for i in range(10)
        ]
        for rate in (2.0, 1.0)
    }
    return [case.serve() for case in list_cases(simulation, [*deployments], requests)]


def test_the_text_of_one_run(found):
    served = found[0]
    lines = text(served.summary(TARGETS)).splitlines()
    assert lines[0] == "10 requests, 1 refused: 1 by context"
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines[2:]}
    done = [ttft_s(t) for t in served.run.timelines if t.token_s]
    expected = percentiles([1e3 * s for s in done]).values()
    got = rows["TTFT P50 / P90 / P99, ms"]
    assert got == " / ".join(f"{ms:.2f}" for ms in expected)
    assert rows["attainment: both / TTFT / TPOT"] == "0.0% / 90.0% / 0.0%"
    assert {f"mean {stage}, ms" for stage in STAGE_LEGEND} < rows.keys()
    busy = {
        line.split("  ")[0]: line.split()[-4:] for line in lines if "instance" in line
    }
    assert [*busy] == [
        "instance 0, prefill:tp1",
        "instance 1, decode:tp1",
        "link: into instance 1",
    ]
    prefill, mixed, decode, all_of_it = busy["instance 0, prefill:tp1"]
    assert prefill == all_of_it != "0.0%" == mixed == decode


def test_without_targets_nothing_is_said_of_them(found):
    summaries = [served.summary(NO_TARGETS) for served in found]
    assert "attainment" not in text(summaries[0])
    assert "instance 0, colocated:tp1pp2, stage 1 " in text(summaries[2])
    *_, row = table(summaries).splitlines()
    assert row.split()[1:6] == ["vllm_v0", "2", "1", "10.0%", "-"]
    panels = curve_panels(summaries)
    assert [panel.y for panel in panels] == ["P90 TTFT (s)", "P90 TPOT (s)"]
    panels += latency_panels(found[0], NO_TARGETS)
    assert all(panel.line is None for panel in panels)


def test_a_row_for_each_run(found):
    summaries = [served.summary(TARGETS) for served in found]
    head, _, *rows = table(summaries).splitlines()
    assert head.split()[:4] == ["deployment", "system", "devices", "requests/s"]
    assert [row.split()[:5] for row in rows] == [
        ["prefill:tp1,decode:tp1", "disaggregated", "2", "2", "10.0%"],
        ["prefill:tp1,decode:tp1", "disaggregated", "2", "1", "10.0%"],
        ["colocated:tp1pp2", "vllm_v0", "2", "2", "10.0%"],
        ["colocated:tp1pp2", "vllm_v0", "2", "1", "10.0%"],
    ]
    assert all("0.0% / 90.0% / 0.0%" in row for row in rows)
    assert [refused_share(summary) for summary in summaries] == [0.1] * 4


def test_curves_over_the_rate_have_a_line_for_each_deployment(found):
    summaries = [served.summary(TARGETS) for served in found]
    attainment, ttft, tpot = curve_panels(summaries)
    assert (attainment.line, ttft.line, tpot.line) == (None, 0.5, 1e-6)
    for panel in (attainment, ttft, tpot):
        assert [series.label for series in panel.series] == [
            "prefill:tp1,decode:tp1",
            "colocated:tp1pp2",
        ]
        assert all([x for x, _ in s.points] == [1.0, 2.0] for s in panel.series)
    p90_s = summaries[1]["p90_ttft_ms"] / 1e3
    assert ttft.series[0].points[0] == (1.0, pytest.approx(p90_s))


def test_the_picture_of_a_run(found):
    ttft, tpot, stages = latency_panels(found[0], TARGETS)
    assert (ttft.line, tpot.line) == (0.5, 1e-6)
    assert [series.label for series in ttft.series] == ["P50", "P90"]
    assert [series.label for series in stages.series] == [*STAGE_LEGEND]
    # Requests of 0.5 s and more apart: none waits, and one is computed at a time.
    assert max(y for _, y in stages.series[0].points) == 0
    assert 0 < max(y for _, y in stages.series[1].points) <= 1
