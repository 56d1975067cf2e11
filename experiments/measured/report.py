"""Writes how far the simulator is from measured rows: text, rows and a picture."""

from __future__ import annotations

import collections
import csv
import pathlib
from collections.abc import Sequence

from experiments.measured.errors import (
    GROUPS,
    QUANTITIES,
    errors_of,
    grouped,
    relative_error,
)
from experiments.measured.served import STANDARD, SimulatedRow, client_of
from experiments.report.panel import Panel, Series
from experiments.report.table import Row, align, numbers, underlined
from experiments.runs.folder import whole

_WORST = 10
_COLUMNS = ("id", "simulated_ttft_ms", "simulated_tpot_ms", "skipped")
_LATENCIES = ("TPOT", "TTFT", "request latency")  # that have a panel


def text(found: Sequence[SimulatedRow]) -> str:
    """Write what was skipped, the errors of all rows and of groups, the worst rows."""
    served = [one for one in found if one.simulated is not None]
    counted = [one for one in served if not one.is_too_fast]
    lines = [f"{len(found)} rows, {len(served)} simulated", "", *_skipped(found)]
    lines += [*_too_fast(served), *_shortened(served)]
    if not counted:
        return "\n".join(lines)
    lines += _profiles(counted)
    lines += ["errors in %: MAPE / median / P90 / mean with its sign", ""]
    lines += _table("", {"all": counted})
    for group in GROUPS:
        lines += ["", *_table(group, grouped(counted, group))]
    for quantity in _LATENCIES:
        lines += ["", *_worst(counted, quantity)]
    return "\n".join(lines)


def _skipped(found: Sequence[SimulatedRow]) -> list[str]:
    colocated = [one for one in found if one.row.mode == "agg"]
    skipped = sum(bool(one.skipped) for one in colocated)
    lines = list[str]()
    if colocated:
        share = f"{skipped / len(colocated):.1%}"
        lines = [f"skipped of {len(colocated)} colocated rows: {skipped} ({share})"]
    reasons = collections.Counter(
        (one.row.mode, one.skipped) for one in found if one.skipped
    )
    rows = [(str(n), mode, why) for (mode, why), n in reasons.most_common()]
    return [*lines, *(align(rows, right=[0]) if rows else []), ""]


def _profiles(counted: Sequence[SimulatedRow]) -> list[str]:
    """Say whose profiles were used for which versions."""
    versions: dict[str, set[str]] = {}
    for one in counted:
        versions.setdefault(one.profile, set()).add(one.row.version or "no version")
    return [
        *(
            f"profile {name} for {', '.join(sorted(versions[name]))}"
            for name in sorted(versions)
        ),
        "",
    ]


def _too_fast(served: Sequence[SimulatedRow]) -> list[str]:
    """Name the rows that are counted apart."""
    fast = [one.row.id for one in served if one.is_too_fast]
    if not fast:
        return []
    why = "weights and KV cannot be read once a token in the measured TPOT"
    head = f"{len(fast)} rows are left out of the errors: {why} (speculative decoding?)"
    return [head, *(f"  {id}" for id in fast), ""]


def _shortened(served: Sequence[SimulatedRow]) -> list[str]:
    """Say of which loops less was simulated than was measured."""
    rows = [(one.row, one.row.loop.clients) for one in served if one.row.loop]
    clients = [n for row, n in rows if STANDARD.is_shortened(client_of(row), n)]
    if not clients:
        return []
    many = f"{len(clients)} loops of {min(clients)} or more clients"
    return [f"{many} were simulated with fewer requests of each than it sent", ""]


def _table(group: str, groups: dict[str, list[SimulatedRow]]) -> list[str]:
    rows: list[Row] = [(group, "N", *QUANTITIES)]
    for name, of in groups.items():
        cells = [
            f"{100 * e.mape:.1f} / {100 * e.median:.1f} / {100 * e.p90:.1f} / "
            f"{100 * e.signed:+.1f}"
            for e in errors_of(of).values()
        ]
        rows.append((name, str(len(of)), *cells))
    return underlined(numbers(rows))


def _worst(counted: Sequence[SimulatedRow], quantity: str) -> list[str]:
    def size(one: SimulatedRow) -> float:
        return abs(relative_error(one, quantity))

    head = f"largest errors of {quantity}"
    rows: list[Row] = [(head, "%", "measured ms", "simulated ms")]
    for one in sorted(counted, key=size, reverse=True)[:_WORST]:
        both = (QUANTITIES[quantity](one.row, means) for means in one.latencies)
        error = f"{100 * relative_error(one, quantity):+.0f}"
        rows.append((one.row.id, error, *(f"{1e3 * seconds:.1f}" for seconds in both)))
    return underlined(numbers(rows))


def write_rows(path: pathlib.Path, found: Sequence[SimulatedRow]) -> None:
    """Write a line for each row, in their order; floats read back as they were."""
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(_COLUMNS)
        for one in found:
            means = one.simulated
            ms = (1e3 * means.ttft_s, 1e3 * means.tpot_s) if means else ("", "")
            lines.writerow((one.row.id, *ms, one.skipped))


def panels(found: Sequence[SimulatedRow]) -> list[Panel]:
    """Draw each latency as simulated over as measured; [] if no row has both."""
    counted = [one for one in found if one.simulated and not one.is_too_fast]
    return [_panel(counted, quantity) for quantity in _LATENCIES if counted]


def _panel(counted: Sequence[SimulatedRow], quantity: str) -> Panel:
    engines = grouped(counted, "engine's profile")
    points = {
        engine: [
            tuple(1e3 * QUANTITIES[quantity](one.row, means) for means in one.latencies)
            for one in of
        ]
        for engine, of in engines.items()
    }
    every = [value for of in points.values() for point in of for value in point]
    ends = [(end, end) for end in (min(every), max(every))]
    clouds = [
        Series(
            label=f"{engine}, {len(of)} rows",
            points=[(measured, simulated) for measured, simulated in of],
            colour=i,
            style="cloud",
        )
        for i, (engine, of) in enumerate(points.items())
    ]
    return Panel(
        title=quantity,
        x="measured (ms)",
        y="simulated (ms)",
        series=[*clouds, Series(label="equal", points=ends, colour=6, style="dotted")],
        log_x=True,
        log_y=True,
    )
