"""The tables of a placement search as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disagg_jax.metrics import Interval
from disagg_jax.search.placement import ALGORITHMS, reasons_of
from experiments.report.intervals import interval_text

_SHOWN = 12  # rows of each table that are printed


def report(found: dict[str, Any]) -> str:
    """Return all tables and winners as text."""
    text = [found["checked"]] if found["checked"] else []
    text += [f"skipped {line}" for line in reasons_of(found["skipped"])]
    if found.get("left_out"):
        text.append(_left_out(found["left_out"], "layouts of a phase alone"))
    for name in ALGORITHMS:
        if name not in found:
            continue
        result = found[name]
        for table in ("prefill", "decode", "as a whole", "candidates"):
            if result.get(table):
                text += ["", f"{name}: {table}", *lines(result[table])]
        if result.get("left_out"):
            text.append(_left_out(result["left_out"], "candidates"))
        copies = f"{result['copies']} x " if "copies" in result else ""
        text.append(
            f"{name}: {copies}{result['winner']} on {result['devices']} devices: "
            f"{result['goodput_rps']:.3g} requests/s, "
            f"{result['goodput_per_device_rps']:.3g} per device"
        )
        if result.get("as_one"):
            text += _as_one(result)
    return "\n".join(text)


def _left_out(count: int, what: str) -> str:
    return f"left out, as the time of --minutes was spent: {count} {what}"


def _as_one(result: dict[str, Any]) -> list[str]:
    """Say how one deployment does that has the instances of all copies."""
    one, over = result["as_one"], result["as_one"]["over_copies"]
    ratio = "no ratio" if over is None else interval_text(Interval(**over)) + " x"
    return [
        f"  as one deployment, KV between any two instances: {one['candidate']}: "
        f"{_figure(one)} requests/s per device, {ratio} that of "
        f"{result['copies']} copies"
    ]


def lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of candidates as text."""
    shown = table[:_SHOWN]
    # Names may begin with that of a system.
    wide = max([36, *(1 + len(row["candidate"]) for row in shown)])
    name, goodput = "candidate", "requests/s/device"
    head = f"  {name:<{wide}}{'devices':>8}  {goodput:<28}{'N':>6} seeds"
    body = [
        f"  {r['candidate']:<{wide}}{r['devices']:>8.4g}  {_figure(r):<28}"
        f"{r['num_requests']:>6} {len(r['seeds'])}{_marks(r)}"
        for r in shown
    ]
    more = len(table) - _SHOWN
    return [head, *body, *([f"  ... and {more} more"] if more > 0 else [])]


def _figure(shown: dict[str, Any]) -> str:
    if shown["goodput"] is None:
        return f"<= {shown['at_most']:.3g} ({shown['why']})"
    low, high = shown["interval"]
    interval = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{shown['goodput']:.3g}{interval}"


def _marks(shown: dict[str, Any]) -> str:
    marks = ("resolved", "bracketed", "steady")
    missing = [f"not {mark}" for mark in marks if shown.get(mark) is False]
    if shown.get("inversion"):
        missing.append(shown["inversion"])
    return "  " + ", ".join(missing) if missing else ""
