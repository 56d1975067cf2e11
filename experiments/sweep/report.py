"""Writes a sweep's result: the table and the picture."""

from __future__ import annotations

import itertools
import math
import pathlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from disagg_jax.metrics import Interval
from experiments.report.colours import NO_SYSTEM, system_colours
from experiments.report.draw import draw
from experiments.report.intervals import interval_text, number, yes_or_no
from experiments.report.panel import (
    BAND_SEEDS,
    STAGE_COLOURS,
    STAGE_LEGEND,
    STAGES,
    Bar,
    Bars,
    Panel,
    Series,
    Style,
    ends,
)
from experiments.report.table import numbers, side_by_side, underlined
from experiments.runs.saved_run import by_target
from experiments.sweep.hardware_report import hardware_lines
from experiments.sweep.headline import good, headline, timings, too_slow
from experiments.sweep.headline import notes as explained

# Marks of values in a ranking; values of which only a bound is known are left out.
_KNOWN = {"yes": "", "coarsely": "~"}
_TARGETS: Mapping[str, Style] = {
    "attainment_ttft": "dotted",
    "attainment_tpot": "dashed",
}


def table(summary: Mapping[str, Any]) -> str:
    """Write the result as text: of one target, or of several side by side."""
    targets = by_target(summary)
    first = next(iter(targets.values()))
    lines = [
        *itertools.chain(*(headline(*item) for item in targets.items())),
        *unfinished(summary),
        f"model {first['model']}; {_sizes(targets)}",
        f"clock: {first['clock']}, durations: {first['durations']}" + _validity(first),
        *timings(first),
        *caption(first),
        *_executed(first),
        "",
        *_found(targets),
    ]
    for name, found in targets.items():
        lines += ["", *_details(name, found)]
    lines += ["", *_ranks(targets), "", *explained(first)]
    if second := hardware_lines(summary):
        lines += ["", *second]
    return "\n".join(lines)


def _sizes(targets: Mapping[str, Any]) -> str:
    first = next(iter(targets.values()))
    seeds = [
        f"{found['num_seeds']}{f' ({name})' if name else ''}"
        for name, found in targets.items()
    ]
    return f"{first['num_requests']} requests x {' or '.join(seeds)} seeds a point"


def caption(summary: Mapping[str, Any]) -> list[str]:
    """Say where requests come from, which rows a trace lost, and what is in doubt."""
    said = list(summary.get("trace", {}).get("said", []))
    if "no_intervals" in summary:
        said.append(f"no intervals, and nothing resolved: {summary['no_intervals']}")
    return said


def unfinished(summary: Mapping[str, Any]) -> list[str]:
    """Say what there was no time for, if there was a limit."""
    if "missing" not in summary:
        return []
    said = "; ".join(summary["missing"])
    spent = "NOT FINISHED, as --minutes were spent; the same command goes on with"
    return [f"{spent} {said}"]


def _found(targets: Mapping[str, Any]) -> list[str]:
    """Return the goodput or throughput of each system, a block a target."""
    first = next(iter(targets.values()))
    criterion = first["criterion"]
    if first["target"] is None:
        title = f"throughput by {criterion}"
    else:
        title = "goodput" if criterion == "distserve" else f"goodput by {criterion}"
    columns: dict[str, dict[str, str]] = {
        name: {"deployment": system["deployment"]}
        for name, system in first["systems"].items()
    }
    for target, found in targets.items():
        prefix = f"{target}: " if target else ""
        unit = found["criteria"][criterion]["unit"]
        for name, system in found["systems"].items():
            if found["target"] is None:
                column = _throughput_column(system, unit)
            else:
                column = _goodput_column(system)
            columns[name] |= {prefix + key: value for key, value in column.items()}
    lines = underlined(side_by_side(title, columns))
    kind = "throughput" if first["target"] is None else "goodput"
    for pair in first["ratios"]:
        each = [
            f"{f'{target} ' if target else ''}{_interval(found['ratios'][pair], '.2f')}"
            for target, found in targets.items()
            if pair in found["ratios"]
        ]
        lines += ["", f"{kind} {pair}, paired by seed: {', '.join(each)}"]
    return lines


def _details(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Return the step sizes by one target, and the metrics where systems are judged."""
    at = "best" if summary["target"] is None else "highest passing"
    title = f"{f'{name}: ' if name else ''}at its {at} rate"
    columns = {n: _metric_column(s) for n, s in summary["systems"].items()}
    return [
        *(
            f"{system}: {said}"
            for system, choices in summary["choices"].items()
            for said in choices
        ),
        *too_slow(summary),
        *_inversions(summary["systems"]),
        *underlined(side_by_side(title, columns)),
    ]


def _inversions(systems: Mapping[str, Any]) -> list[str]:
    """Say where a rate fails below one that passes, and what the goodput is then."""
    found = {
        name: system["goodput"]["inversion"]["text"]
        for name, system in systems.items()
        if "goodput" in system and system["goodput"]["inversion"]
    }
    if not found:
        return []
    return [
        *(f"{name}: {text}" for name, text in found.items()),
        "goodput is then where attainment first fails above the lowest rate that "
        "passes;",
        "steps of few rows may take longer than those of many, or runs are too short",
    ]


def _ranks(targets: Mapping[str, Any]) -> list[str]:
    """List the systems in the order of each criterion, a block a target.

    A system is left out of a criterion by which only a bound is known of it.
    """
    rows: list[list[str]] = []
    bounds: list[str] = []  # a system for each value that is left out
    for target, summary in targets.items():
        prefix = f"{target}: " if target else ""
        for name, found in summary["criteria"].items():
            star = " *" if name == summary["criterion"] else ""
            known = [row for row in found["rank"] if row["known"] in _KNOWN]
            cells = [f"{row['system']} {_ranked(row)}" for row in known]
            rows.append([f"{prefix}{name}{star}, {found['unit']}", *cells])
            bounds += [row["system"] for row in found["rank"] if row not in known]
    most = max(2, *map(len, rows))
    head = ["rank by each criterion", *map(str, range(1, most))]
    lines = [
        *underlined(numbers([head, *(row + [""] * (most - len(row)) for row in rows)])),
        "* searched for; others are read off its points: ~ between rates far apart",
    ]
    if bounds:
        lines.append(
            f"not listed: {len(bounds)} values, of {len(set(bounds))} systems, of "
            "which only a bound is known (criteria.NAME.rank in summary.json)"
        )
    if any("!" in cell for _, *cells in rows for cell in cells):
        lines.append("! not monotone: a lower rate fails, or a higher one passes again")
    return lines


def _ranked(row: Mapping[str, Any]) -> str:
    mark = _KNOWN[row["known"]] + ("" if row.get("monotone", True) else "!")
    return f"{mark}{row['mean']:.4g}"


def _validity(summary: Mapping[str, Any]) -> str:
    if summary["clock"] == "wall":
        return " (real time on this machine's devices)"
    if summary["durations"] == "modelled":
        return " (times come from a formula; tokens are real)"
    return " (each program timed alone; valid for devices that are really separate)"


def _executed(summary: Mapping[str, Any]) -> list[str]:
    if summary["executed"] == "all":
        return []
    return [
        f"programs ran on the first {summary['executed_requests']} requests of the "
        "first seed at each system's judged rate",
        "(padding is theirs); elsewhere their durations alone made the timelines, "
        "which were equal where both were done",
    ]


def _goodput_column(system: Mapping[str, Any]) -> dict[str, str]:
    found = system["goodput"]
    ends = (found[f"{end}_rps_per_device"] for end in ("pass", "fail"))
    return {
        "requests/s per device": _interval(found["goodput_rps_per_device"], ".1f"),
        "passes at / fails at": " / ".join(number(end, ".1f") for end in ends),
        # Without a pass and a failure of every seed, the figure is a bound only.
        "every seed bracketed": yes_or_no(found["bracketed"]),
        "resolved": yes_or_no(found["resolved"]),
        "steady": yes_or_no(found["steady"]),
    }


def _throughput_column(system: Mapping[str, Any], unit: str) -> dict[str, str]:
    found = system["throughput"]
    return {
        unit: _interval(found["max_throughput_per_device"], ".4g"),
        "at requests/s per device": number(found["best_rps_per_device"], ".1f"),
        "bracketed": yes_or_no(found["bracketed"]),
        "steady": yes_or_no(found["steady"]),
    }


def _metrics_at(system: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics at the rate that judges a system; none if it never passed."""
    if "throughput" in system:
        return system["throughput"]["at_best_rate"]
    return system["goodput"]["at_pass_rate"] or {}


def _metric_column(system: Mapping[str, Any]) -> dict[str, str]:
    metrics = _metrics_at(system)

    def cell(*keys: str, form: str = ".2f", unit: float = 1.0) -> str:
        return " / ".join(number(metrics.get(key), form, unit) for key in keys)

    shares = ("attainment", "attainment_ttft", "attainment_tpot")
    steps = (f"padding_{kind}" for kind in ("prefill", "mixed", "decode"))
    return {
        "attainment: both / TTFT / TPOT": cell(*shares, form=".1%"),
        **{
            f"{name.upper()} P50 / P90 / P99, ms": cell(
                *(f"p{p}_{name}_ms" for p in (50, 90, 99))
            )
            for name in ("ttft", "tpot", "itl")
        },
        **{f"mean {s.replace('_', ' ')}, ms": cell(f"mean_{s}_ms") for s in STAGES},
        "output tokens/s per device": cell("output_throughput_per_device", form=".0f"),
        "preemptions": cell("preemptions", form=".1f"),
        "padding of prefill / mixed / decode steps": cell(*steps, form=".0%"),
        **{
            f"{role} stages busy, mean / idlest": cell(
                f"busy_{role}", f"busy_{role}_least", form=".0%"
            )
            for role in ("prefill", "decode", "colocated")
        },
        "KV moved between instances, MB": cell("transfer_bytes", unit=1e6),
    }


def _interval_of(values: Mapping[str, Any]) -> Interval:
    """Return the interval of a summary's values, which may name the seeds' too."""
    return Interval(mean=values["mean"], low=values["low"], high=values["high"])


def _interval(values: Mapping[str, Any], form: str) -> str:
    return interval_text(_interval_of(values), form)


def plot(summary: Mapping[str, Any], device: str, path: pathlib.Path) -> None:
    """Draw scores over the rate per device, a panel a target.

    Beside a single one are the stages of a request.

    Args:
      device: the kind of device that programs run on.
    """
    targets = by_target(summary)
    first = next(iter(targets.values()))
    what = [
        textwrap.fill(f"{found['model']} on {device}: {_short(name, found)}", 90)
        for name, found in targets.items()
    ]
    none = "no_intervals" in first or first["num_seeds"] < BAND_SEEDS
    intervals = "no" if none else f"{100 * first['confidence']:.3g} %"
    title = "\n".join(
        [
            *what,
            f"{_sizes(targets)}, {intervals} intervals; {first['clock']} clock, "
            f"durations {first['durations']}",
        ]
    )
    panels: list[Panel | Bars] = [
        scores(found, name) for name, found in targets.items()
    ]
    if len(targets) == 1:
        panels.append(stages(first))
    notes = [*unfinished(summary), *caption(first)]
    draw(panels, title, path, notes=notes, dpi=150)


def _short(name: str, summary: Mapping[str, Any]) -> str:
    if summary["criterion"] != "distserve":
        return f"{name} {good(summary)}".strip()
    slo = summary["slo"]
    return (
        f"{name} TTFT <= {slo['ttft_s'] * 1e3:.0f} ms, "
        f"TPOT <= {slo['tpot_s'] * 1e3:.3g} ms"
    ).strip()


def scores(summary: Mapping[str, Any], title: str = "") -> Panel:
    """Return each system's scores, in % or, of a throughput, per device."""
    target = summary["target"]
    series: list[Series] = []
    colours = system_colours(summary["systems"])
    for name, system in summary["systems"].items():
        series += _curves(summary, name, system, colours[name])
    what = f"{summary['criterion']}: score (%)"
    if summary["criterion"] == "distserve":
        what = "requests within the SLO (%)"
        for key, style in _TARGETS.items():
            label = f"{key.removeprefix('attainment_').upper()} only"
            series.append(Series(label=label, points=[], colour=NO_SYSTEM, style=style))
    if target is None:
        what = summary["criteria"][summary["criterion"]]["unit"]
    else:
        label = "goodput at the target"
        series.append(Series(label=label, points=[], colour=NO_SYSTEM, style="diamond"))
    return Panel(
        title=title,
        x="arrival rate (requests/s per device)",
        y=what,
        series=series,
        line=None if target is None else 100 * target,
        ylim=None if target is None else (-3, 103),
    )


def _curves(
    summary: Mapping[str, Any], name: str, system: Mapping[str, Any], colour: int
) -> Iterator[Series]:
    """Yield a system's scores, its attainment of each target, and its goodput."""
    points, target = system["points"], summary["target"]
    unit, most = (1 / system["devices"], math.inf) if target is None else (100, 1)
    rates = [point["rate_rps_per_device"] for point in points]
    found = [_interval_of(p["criteria"][summary["criterion"]]) for p in points]
    # A band only where all seeds ran: of those that scouted it would fill the panel.
    all_seeds = summary["num_seeds"]
    least = max(BAND_SEEDS, all_seeds)
    found = [
        score if p.get("num_seeds", all_seeds) >= least else _alone(score)
        for p, score in zip(points, found, strict=True)
    ]

    def bounded(end: float) -> float:
        return unit * min(most, max(0, end))

    yield Series(
        label=f"{name} ({system['deployment']})",
        points=[(r, unit * s.mean) for r, s in zip(rates, found, strict=True)],
        band=[(bounded(low), bounded(high)) for low, high in map(ends, found)],
        colour=colour,
        style="dots",
    )
    if summary["criterion"] == "distserve":
        for key, style in _TARGETS.items():
            at = [(r, 100 * p[key]["mean"]) for r, p in zip(rates, points, strict=True)]
            yield Series(label="", points=at, colour=colour, style=style)
    if target is not None:
        goodput = system["goodput"]["goodput_rps_per_device"]["mean"]
        at = [(goodput, 100 * target)]
        yield Series(label="", points=at, colour=colour, style="diamond")


def _alone(interval: Interval) -> Interval:
    return Interval(mean=interval.mean, low=None, high=None)


def stages(summary: Mapping[str, Any]) -> Bars:
    """Return the mean stages of a request, at the rate each system is judged by."""
    bars: list[Bar] = []
    for name, system in summary["systems"].items():
        if at := _metrics_at(system):
            times = [at[f"mean_{stage}_ms"] or 0.0 for stage in STAGES]
            stamps = itertools.pairwise([0.0, *itertools.accumulate(times)])
            spans = zip(stamps, STAGE_COLOURS.values(), strict=True)
            bars.append(Bar(label=name, spans=[(*span, c) for span, c in spans]))
    rate = "best" if summary["target"] is None else "highest passing"
    return Bars(
        title=f"at each one's {rate} rate",
        x="mean time of a request (ms)",
        bars=bars,
        legend=STAGE_LEGEND,
    )
