"""What a sweep shows: the table and the picture."""

from __future__ import annotations

import itertools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure

from experiments.report.table import align

# Okabe and Ito's colours, which stay apart for the colour-blind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
STAGE_COLOURS = ("#999999", "#E69F00", "#000000", "#56B4E9", "#009E73")


def table(summary: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"model {summary['model']}; {_good(summary)}; "
        f"{summary['num_requests']} requests x {summary['num_seeds']} seeds a point",
        f"clock: {summary['clock']}, durations: {summary['durations']}"
        + _validity(summary),
        *caption(summary),
        *_executed(summary),
        *(
            f"{name}: {said}"
            for name, choices in summary["choices"].items()
            for said in choices
        ),
        "",
        *_found(summary),
    ]
    kind = "throughput" if summary["target"] is None else "goodput"
    for name, ratio in summary["ratios"].items():
        lines += ["", f"{kind} {name}, paired by seed: {interval_text(ratio, '.2f')}"]
    return "\n".join([*lines, "", *_ranks(summary)])


def caption(summary: Mapping[str, Any]) -> list[str]:
    """Where requests come from and what became of a trace's other rows; doubts."""
    said = list(summary.get("trace", {}).get("said", []))
    if "no_intervals" in summary:
        said.append(f"no intervals, and nothing resolved: {summary['no_intervals']}")
    return said


def _good(summary: Mapping[str, Any]) -> str:
    """What the sweep searched for."""
    if summary["criterion"] != "distserve":
        definition = summary["criteria"][summary["criterion"]]["definition"]
        return f"{summary['criterion']}: {definition}"
    slo = summary["slo"]
    return (
        f"SLO: TTFT <= {slo['ttft_s'] * 1e3:.2f} ms and TPOT "
        f"<= {slo['tpot_s'] * 1e3:.2f} ms for {summary['target']:.0%} of requests"
    )


def _found(summary: Mapping[str, Any]) -> list[str]:
    systems, criterion = summary["systems"], summary["criterion"]
    if summary["target"] is None:
        unit = summary["criteria"][criterion]["unit"]
        title, at = f"throughput by {criterion}", "at its best rate"
        rows = _throughput_rows(systems, unit)
    else:
        title = "goodput" if criterion == "distserve" else f"goodput by {criterion}"
        at = "at its highest passing rate"
        rows = _goodput_rows(systems)
    return [
        *_grid(title, systems, rows),
        *_inversions(systems),
        "",
        *_grid(at, systems, _metric_rows(systems)),
    ]


def _inversions(systems: Mapping[str, Any]) -> list[str]:
    """Where a rate fails below one that passes, and what the goodput is then."""
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


def _ranks(summary: Mapping[str, Any]) -> list[str]:
    """The systems in the order of each criterion."""
    places = {str(i): None for i in range(1, len(summary["systems"]) + 1)}
    rows = [
        (
            f"{name}{' *' if name == summary['criterion'] else ''}, {found['unit']}",
            [f"{row['system']} {_ranked(row)}" for row in found["rank"]],
        )
        for name, found in summary["criteria"].items()
    ]
    return [
        *_grid("rank by each criterion", places, rows),
        "* searched for; others are read off its points: ~ between rates far apart,",
        ">= and < bounds only, as the rates tried end there: their order is open",
        *(
            ["! not monotone: a lower rate fails, or a higher one passes again"]
            if any("!" in cell for _, cells in rows for cell in cells)
            else []
        ),
    ]


def _ranked(row: Mapping[str, Any]) -> str:
    mark = {"yes": "", "coarsely": "~", "at least": ">= ", "below": "< "}[row["known"]]
    mark += "" if row.get("monotone", True) else "!"
    return f"{mark}{row['mean'] if row['bound'] is None else row['bound']:.4g}"


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
        "programs ran at the rates of the second table; elsewhere their durations "
        "alone made",
        "the timelines, which were equal where both were done",
    ]


def _goodput_rows(systems: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    found = [system["goodput"] for system in systems.values()]
    return [
        ("deployment", [system["deployment"] for system in systems.values()]),
        (
            "requests/s per device",
            [interval_text(g["max_goodput_rate_per_device"], ".1f") for g in found],
        ),
        (
            "passes at / fails at",
            [
                f"{_number(g['pass_rps_per_device'], '.1f')} / "
                f"{_number(g['fail_rps_per_device'], '.1f')}"
                for g in found
            ],
        ),
        # Without a pass and a failure of every seed, the figure is a bound only.
        ("every seed bracketed", [_yes(g["bracketed"]) for g in found]),
        ("resolved", [_yes(g["resolved"]) for g in found]),
        ("steady", [_yes(g["steady"]) for g in found]),
    ]


def _throughput_rows(
    systems: Mapping[str, Any], unit: str
) -> list[tuple[str, list[str]]]:
    found = [system["throughput"] for system in systems.values()]
    return [
        ("deployment", [system["deployment"] for system in systems.values()]),
        (unit, [interval_text(t["max_throughput_per_device"], ".4g") for t in found]),
        (
            "at requests/s per device",
            [_number(t["best_rps_per_device"], ".1f") for t in found],
        ),
        ("bracketed", [_yes(t["bracketed"]) for t in found]),
        ("steady", [_yes(t["steady"]) for t in found]),
    ]


def _metrics_at(system: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the rate that a system is judged by; none if it never passed."""
    if "throughput" in system:
        return system["throughput"]["at_best_rate"]
    return system["goodput"]["at_pass_rate"] or {}


def _metric_rows(systems: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    at = [_metrics_at(system) for system in systems.values()]

    def row(
        label: str, *keys: str, form: str = ".2f", unit: float = 1.0
    ) -> tuple[str, list[str]]:
        values = [
            " / ".join(_number(metrics.get(key), form, unit) for key in keys)
            for metrics in at
        ]
        return label, values

    names = ("ttft", "tpot", "itl")
    return [
        row(
            "attainment: both / TTFT / TPOT",
            "attainment",
            "attainment_ttft",
            "attainment_tpot",
            form=".1%",
        ),
        *(
            row(
                f"{n.upper()} P50 / P90 / P99, ms",
                *[f"p{p}_{n}_ms" for p in (50, 90, 99)],
            )
            for n in names
        ),
        *(row(f"mean {s.replace('_', ' ')}, ms", f"mean_{s}_ms") for s in STAGES),
        row("output tokens/s per device", "output_throughput_per_device", form=".0f"),
        row("preemptions", "preemptions", form=".1f"),
        row(
            "padding of prefill / mixed / decode steps",
            *(f"padding_{kind}" for kind in ("prefill", "mixed", "decode")),
            form=".0%",
        ),
        *(
            row(
                f"{role} stages busy, mean / idlest",
                *(f"busy_{role}", f"busy_{role}_least"),
                form=".0%",
            )
            for role in ("prefill", "decode", "colocated")
        ),
        row("KV moved between instances, MB", "transfer_bytes", unit=1e6),
    ]


def _grid(
    title: str, systems: Mapping[str, Any], rows: Sequence[tuple[str, list[str]]]
) -> list[str]:
    table = [(title, *systems), *((label, *cells) for label, cells in rows)]
    lines = align(table, right=range(1, len(table[0])))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def interval_text(interval: Mapping[str, float | None], form: str) -> str:
    """mean [low, high]; the mean alone where one run gives no interval."""
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if low is None or high is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:{form}}"


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[value]


def plot(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Scores over rate per device with intervals, and where the time went."""
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_scores(left, summary)
        _plot_stages(right, summary)
        said = [textwrap.fill(line, 170) for line in caption(summary)]
        if said:
            figure.supxlabel("\n".join(said), fontsize=7)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _plot_scores(axes: Any, summary: Mapping[str, Any]) -> None:
    systems = summary["systems"].items()
    for colour, (name, system) in zip(itertools.cycle(_COLOURS), systems):
        _plot_system(axes, summary, name, system, colour)
    what = f"{summary['criterion']}: score (%)"
    if summary["criterion"] == "distserve":
        what = "requests within the SLO (%)"
        axes.plot([], [], ":", color="grey", label="TTFT only")
        axes.plot([], [], "--", color="grey", label="TPOT only")
    if summary["target"] is None:
        what = summary["criteria"][summary["criterion"]]["unit"]
    else:
        axes.axhline(100 * summary["target"], color="black", lw=0.8)
        axes.plot([], [], "D", color="grey", label="goodput at the target")
        axes.set(ylim=(-3, 103))
    axes.set(xlabel="arrival rate (requests/s per device)", ylabel=what)
    axes.set_title(
        f"{_plot_title(summary)}\n"
        f"{summary['num_requests']} requests x {summary['num_seeds']} seeds a point, "
        f"{_intervals(summary)}; {summary['clock']} clock, "
        f"durations {summary['durations']}",
        fontsize=8.5,
    )
    # Below the axes, where it hides no point.
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _intervals(summary: Mapping[str, Any]) -> str:
    none = "no_intervals" in summary or summary["num_seeds"] == 1
    return "no intervals" if none else "95 % intervals"


def _plot_title(summary: Mapping[str, Any]) -> str:
    slo = summary["slo"]
    if summary["criterion"] != "distserve":
        return textwrap.fill(f"{summary['model']}; {_good(summary)}", 90)
    return (
        f"{summary['model']}: TTFT <= {slo['ttft_s'] * 1e3:.0f} ms, "
        f"TPOT <= {slo['tpot_s'] * 1e3:.3g} ms"
    )


def _plot_system(
    axes: Any,
    summary: Mapping[str, Any],
    name: str,
    system: Mapping[str, Any],
    colour: str,
) -> None:
    points, target = system["points"], summary["target"]
    # A share in %, or a throughput per device.
    unit, most = (1 / system["devices"], math.inf) if target is None else (100, 1)
    rates = [point["request_rate_per_device"] for point in points]
    scores = [point["criteria"][summary["criterion"]] for point in points]
    label = f"{name} ({system['deployment']})"
    mean = [unit * score["mean"] for score in scores]
    axes.plot(rates, mean, "o-", color=colour, ms=3.5, label=label)
    low, high = (
        [unit * min(most, max(0, _or(score[end], score["mean"]))) for score in scores]
        for end in ("low", "high")
    )
    axes.fill_between(rates, low, high, color=colour, alpha=0.15, lw=0)
    if summary["criterion"] == "distserve":
        for key, style in (("attainment_ttft", ":"), ("attainment_tpot", "--")):
            values = [100 * point[key]["mean"] for point in points]
            axes.plot(rates, values, style, color=colour, lw=0.9)
    if target is not None:
        goodput = system["goodput"]["max_goodput_rate_per_device"]["mean"]
        axes.plot([goodput], [100 * target], "D", color=colour, ms=7)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _plot_stages(axes: Any, summary: Mapping[str, Any]) -> None:
    systems = summary["systems"]
    names = [name for name, system in systems.items() if _metrics_at(system)]
    bottom = [0.0] * len(names)
    for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
        values = [_metrics_at(systems[n])[f"mean_{stage}_ms"] or 0.0 for n in names]
        label = stage.replace("_", " ")
        axes.bar(names, values, bottom=bottom, color=colour, label=label, width=0.6)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.set(
        ylabel="mean time of a request (ms)",
    )
    rate = "best" if summary["target"] is None else "highest passing"
    axes.set_title(f"at each one's {rate} rate", fontsize=8.5)
    axes.tick_params(axis="x", rotation=25)
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    axes.grid(axis="x", visible=False)
