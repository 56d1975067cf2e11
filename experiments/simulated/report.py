"""Writes simulated runs: the text of one, the table of several, and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO, tpot_s, ttft_s
from disagg_jax.request import Timeline
from disagg_jax.runlog import StageShares
from experiments.report.intervals import number
from experiments.report.panel import (
    STAGE_COLOURS,
    STAGE_LEGEND,
    STAGES,
    XY,
    Panel,
    Series,
    curves,
)
from experiments.report.table import align, numbers, underlined
from experiments.simulated.over_time import counts_over_time, percentile_over_time
from experiments.simulated.served import Served

NO_TARGETS = SLO(ttft_s=math.inf, tpot_s=math.inf)
_POINTS = (50, 90, 99)
_ATTAINMENT = ("attainment", "attainment_ttft", "attainment_tpot")


# -- one run -------------------------------------------------------------------------


def text(served: Served, slo: SLO) -> str:
    """Write one run: latencies, stages, what devices and links did, who was refused."""
    lines = [refusals(served), "", *align(_latencies(served.summary(slo), slo)), ""]
    return "\n".join([*lines, *busy_table(served)])


def refusals(served: Served) -> str:
    """Say how many requests were refused, and why."""
    refused, arrived = served.refused, len(served.run.timelines)
    why = ", ".join(f"{count} by {limit}" for limit, count in refused.items() if count)
    return f"{arrived} requests, {sum(refused.values())} refused{why and f': {why}'}"


def _latencies(summary: Mapping[str, Any], slo: SLO) -> list[tuple[str, str]]:
    rows = [
        (f"{name.upper()} P50 / P90 / P99, ms", _percentiles(summary, name))
        for name in ("ttft", "tpot", "itl")
    ]
    if slo != NO_TARGETS:
        rows.append(("attainment: both / TTFT / TPOT", _attainment(summary)))
    rows += [
        (f"mean {label}, ms", number(summary[f"mean_{stage}_ms"], ".2f"))
        for label, stage in zip(STAGE_LEGEND, STAGES, strict=True)
    ]
    return [
        *rows,
        ("output tokens/s", number(summary["output_throughput"], ".0f")),
        ("preemptions", str(summary["preemptions"])),
    ]


def _attainment(summary: Mapping[str, Any]) -> str:
    return " / ".join(f"{summary[key]:.1%}" for key in _ATTAINMENT)


def _percentiles(summary: Mapping[str, Any], latency: str) -> str:
    keys = (f"p{point}_{latency}_ms" for point in _POINTS)
    return " / ".join(number(summary[key], ".2f") for key in keys)


def busy_table(served: Served) -> list[str]:
    """Return a line for each stage of each instance, and for each link."""
    head = ("share of the time", "prefill", "mixed", "decode", "busy")
    links = served.run.busy_links().items()
    rows = [
        *(
            (name, *(f"{s:.1%}" for s in (of.prefill, of.mixed, of.decode, of.busy)))
            for name, of in _stages(served.case.deployment, served.stages)
        ),
        *((f"link: {name}", "", "", "", f"{share:.1%}") for name, share in links),
    ]
    return underlined(numbers([head, *rows]))


def _stages(
    deployment: Deployment, shares: Sequence[Sequence[StageShares]]
) -> Iterator[tuple[str, StageShares]]:
    for i, (spec, stages) in enumerate(zip(deployment.instances, shares, strict=True)):
        for k, of in enumerate(stages):
            stage = f", stage {k}" if spec.pp > 1 else ""
            yield f"instance {i}, {spec}{stage}", of


def latency_panels(served: Served, slo: SLO) -> list[Panel]:
    """Draw latencies by arrival, and the requests in each stage over time."""
    timelines = served.run.timelines
    counts = counts_over_time(timelines, served.run.end_s)
    labels = zip(STAGE_LEGEND, STAGES, strict=True)
    return [
        _over_arrivals("TTFT (s)", timelines, ttft_s, slo.ttft_s),
        _over_arrivals("TPOT (s)", timelines, tpot_s, slo.tpot_s),
        Panel(
            title="requests by stage",
            x="time (s)",
            y="requests",
            series=[
                Series(label=label, points=counts[stage], colour=STAGE_COLOURS[stage])
                for label, stage in labels
            ],
        ),
    ]


def _over_arrivals(
    name: str,
    timelines: Sequence[Timeline],
    latency_s: Callable[[Timeline], float],
    target_s: float,
) -> Panel:
    points = {
        f"P{percent}": percentile_over_time(timelines, latency_s, percent)
        for percent in _POINTS[:2]
    }
    return Panel(
        title="by arrival"
        + ("; the line is the target" if target_s < math.inf else ""),
        x="arrival (s)",
        y=name,
        series=curves(points),
        line=target_s if target_s < math.inf else None,
    )


# -- several runs --------------------------------------------------------------------


def table(found: Sequence[Served], slo: SLO) -> str:
    """Write a row for each run."""
    head = ("deployment", "devices", "requests/s", "refused", "both / TTFT / TPOT met")
    latencies = [f"{name} P50 / P90 / P99, ms" for name in ("TTFT", "TPOT")]
    rows = [_row(served, slo) for served in found]
    return "\n".join(underlined(numbers([(*head, *latencies, "busiest"), *rows])))


def _row(served: Served, slo: SLO) -> tuple[str, ...]:
    summary, deployment = served.summary(slo), served.case.deployment
    shares = [of.busy for stages in served.stages for of in stages]
    busiest = max([*shares, *served.run.busy_links().values()])
    targets = slo != NO_TARGETS
    return (
        *(str(deployment), str(deployment.devices)),
        number(served.case.offered_rps, ".4g"),
        f"{served.refused_share:.1%}",
        _attainment(summary) if targets else "-",
        *(_percentiles(summary, name) for name in ("ttft", "tpot")),
        f"{busiest:.0%}",
    )


def curve_panels(found: Sequence[Served], slo: SLO) -> list[Panel]:
    """Draw attainment, where there are targets, and P90 latencies over the rate."""
    summaries = [(served.case, served.summary(slo)) for served in found]

    def panel(y: str, key: str, unit: float, line: float | None = None) -> Panel:
        points: dict[str, list[XY]] = {}
        for case, summary in summaries:
            value, rate = summary[key], case.offered_rps
            if value is not None and rate is not None:
                of = points.setdefault(str(case.deployment), [])
                of.append((rate, value * unit))
        series = curves({name: sorted(of) for name, of in points.items()}, style="dots")
        title = "" if line is None else "the line is the target"
        ylim = (-3, 103) if key == "attainment" else None
        return Panel(
            title=title, x="requests/s", y=y, series=series, line=line, ylim=ylim
        )

    def seconds(name: str, target_s: float) -> Panel:
        line = target_s if target_s < math.inf else None
        return panel(f"P90 {name.upper()} (s)", f"p90_{name}_ms", 1e-3, line)

    latencies = [seconds("ttft", slo.ttft_s), seconds("tpot", slo.tpot_s)]
    if slo == NO_TARGETS:
        return latencies
    return [panel("requests within both targets (%)", "attainment", 100), *latencies]
