"""The tables of a placement search as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disagg_jax.search.placement import ALGORITHMS, reasons_of

_SHOWN = 12  # rows of each table that are printed


def report(found: dict[str, Any]) -> str:
    """Return all tables and winners as text."""
    text = [f"skipped {line}" for line in reasons_of(found["skipped"])]
    for name in ALGORITHMS:
        if name not in found:
            continue
        result = found[name]
        for table in ("prefill", "decode", "as a whole", "candidates"):
            if result.get(table):
                text += ["", f"{name}: {table}", *lines(result[table])]
        copies = f"{result['copies']} x " if "copies" in result else ""
        text.append(
            f"{name}: {copies}{result['winner']} on {result['devices']} devices: "
            f"{result['goodput_rps']:.3g} requests/s, "
            f"{result['goodput_per_device_rps']:.3g} per device"
        )
    return "\n".join(text)


def lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of candidates as text."""
    head = f"  {'candidate':<36}{'devices':>8}  {'requests/s/device':<28}{'N':>6} seeds"
    body = [
        f"  {r['candidate']:<36}{r['devices']:>8.4g}  {_figure(r):<28}"
        f"{r['num_requests']:>6} {len(r['seeds'])}{_marks(r)}"
        for r in table[:_SHOWN]
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
