"""Writes simulated runs: the text of one, the table of several, and pictures.

All but the picture of one run is made from the summaries, `Served.summary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.metrics import SLO, tpot_s, ttft_s
from disagg_jax.request import Timeline
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

Summary = Mapping[str, Any]
_POINTS = (50, 90, 99)
_ATTAINMENT = ("attainment", "attainment_ttft", "attainment_tpot")
_KINDS = ("prefill", "mixed", "decode")


# -- one run -------------------------------------------------------------------------


def text(summary: Summary) -> str:
    """Write one run: who was refused, latencies, stages, what was busy."""
    latencies = align([*_latencies(summary)])
    return "\n".join([refusals(summary), "", *latencies, "", *busy_table(summary)])


def refusals(summary: Summary) -> str:
    """Say how many requests were refused, and why."""
    found = {limit: count for limit, count in summary["refused"].items() if count}
    why = ", ".join(f"{count} by {limit}" for limit, count in found.items())
    refused = f"{sum(found.values())} refused{why and f': {why}'}"
    return f"{summary['num_prompts']} requests, {refused}"


def refused_share(summary: Summary) -> float:
    """Return the share of the requests that were refused."""
    return sum(summary["refused"].values()) / summary["num_prompts"]


def _latencies(summary: Summary) -> Iterator[tuple[str, str]]:
    for name in ("ttft", "tpot", "itl"):
        yield f"{name.upper()} P50 / P90 / P99, ms", _percentiles(summary, name)
    if _has_targets(summary):
        yield "attainment: both / TTFT / TPOT", _attainment(summary)
    for label, stage in zip(STAGE_LEGEND, STAGES, strict=True):
        yield f"mean {label}, ms", number(summary[f"mean_{stage}_ms"], ".2f")
    yield "output tokens/s", number(summary["output_throughput"], ".0f")
    yield "preemptions", str(summary["preemptions"])


def _has_targets(summary: Summary) -> bool:
    return any(summary["slo"][name] is not None for name in ("ttft_s", "tpot_s"))


def _attainment(summary: Summary) -> str:
    return " / ".join(f"{summary[key]:.1%}" for key in _ATTAINMENT)


def _percentiles(summary: Summary, latency: str) -> str:
    keys = (f"p{point}_{latency}_ms" for point in _POINTS)
    return " / ".join(number(summary[key], ".2f") for key in keys)


def busy_table(summary: Summary) -> list[str]:
    """Return a line for each stage of each instance, and for each link."""
    rows: list[tuple[str, ...]] = [("share of the time", *_KINDS, "busy")]
    for name, stage in _stages(summary):
        shares = (*(stage[kind] for kind in _KINDS), sum(stage.values()))
        rows.append((name, *(f"{share:.1%}" for share in shares)))
    for name, share in summary["busy_links"].items():
        rows.append((f"link: {name}", "", "", "", f"{share:.1%}"))
    return underlined(numbers(rows))


def _stages(summary: Summary) -> Iterator[tuple[str, Mapping[str, float]]]:
    for i, instance in enumerate(summary["busy_instances"]):
        for k, stage in enumerate(instance["stages"]):
            which = f", stage {k}" if len(instance["stages"]) > 1 else ""
            yield f"instance {i}, {instance['instance']}{which}", stage


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


def table(summaries: Sequence[Summary]) -> str:
    """Write a row for each run."""
    head = (
        *("deployment", "system", "devices", "requests/s", "refused"),
        "both / TTFT / TPOT met",
    )
    latencies = [f"{name} P50 / P90 / P99, ms" for name in ("TTFT", "TPOT")]
    rows = [(*head, *latencies, "busiest"), *map(_row, summaries)]
    return "\n".join(underlined(numbers(rows, labels=2)))


def _row(summary: Summary) -> tuple[str, ...]:
    stages = (sum(stage.values()) for _, stage in _stages(summary))
    return (
        *(summary["deployment"], summary["system"], str(summary["devices"])),
        number(summary["request_rate"], ".4g"),
        f"{refused_share(summary):.1%}",
        _attainment(summary) if _has_targets(summary) else "-",
        *(_percentiles(summary, name) for name in ("ttft", "tpot")),
        f"{max([*stages, *summary['busy_links'].values()]):.0%}",
    )


def curve_panels(summaries: Sequence[Summary]) -> list[Panel]:
    """Draw attainment, where there are targets, and P90 latencies over the rate."""
    targets, panels = summaries[0]["slo"], list[Panel]()
    if _has_targets(summaries[0]):
        y, shares = "requests within both targets (%)", ("attainment", 100)
        panels.append(_over_rate(y, summaries, *shares, ylim=(-3, 103)))
    for name in ("ttft", "tpot"):
        y, line = f"P90 {name.upper()} (s)", targets[f"{name}_s"]
        panels.append(_over_rate(y, summaries, f"p90_{name}_ms", 1e-3, line=line))
    return panels


def _over_rate(
    y: str,
    summaries: Sequence[Summary],
    key: str,
    unit: float,
    *,
    line: float | None = None,
    ylim: XY | None = None,
) -> Panel:
    """Return a curve for each deployment, of `unit` times the value at `key`."""
    points: dict[str, list[XY]] = {}
    for summary in summaries:
        value, rate = summary[key], summary["request_rate"]
        if value is not None and rate is not None:
            points.setdefault(summary["deployment"], []).append((rate, value * unit))
    series = curves({name: sorted(of) for name, of in points.items()}, style="dots")
    title = "" if line is None else "the line is the target"
    return Panel(title=title, x="requests/s", y=y, series=series, line=line, ylim=ylim)
