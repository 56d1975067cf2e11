"""The first and last lines of a sweep's table: who is ahead, and what words mean."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any


def good(summary: Mapping[str, Any]) -> str:
    """Name the quantity that the sweep searched for."""
    if summary["criterion"] != "distserve":
        definition = summary["criteria"][summary["criterion"]]["definition"]
        return f"{summary['criterion']}: {definition}"
    slo = summary["slo"]
    return (
        f"SLO: TTFT <= {slo['ttft_s'] * 1e3:.2f} ms and TPOT "
        f"<= {slo['tpot_s'] * 1e3:.2f} ms for {summary['target']:.0%} of requests"
    )


def headline(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Return who is ahead by a target, and how surely.

    Args:
      name: of the target; "" of a single one.
    """
    target = f"{name} {good(summary)}" if name else good(summary)
    lines = [f"{target}: {_order(summary)}", f"  {_told_apart(summary)}"]
    if summary.get("settled"):
        lines.append(f"  {_settled(summary['settled'])}")
    return lines


def _order(summary: Mapping[str, Any]) -> str:
    """Return the systems, the best first, with > between two that are told apart."""
    apart = {(p["ahead"], p["behind"]): p["told_apart"] for p in summary["pairs"]}
    order = list(dict.fromkeys(name for pair in apart for name in pair))
    order = order or list(summary["systems"])
    signs = [" > " if apart[pair] else " ~ " for pair in itertools.pairwise(order)]
    return "".join(itertools.chain(*zip(order, [*signs, ""], strict=True)))


def _told_apart(summary: Mapping[str, Any]) -> str:
    found = summary["pairs"]
    unclear = [f"{p['ahead']} ~ {p['behind']}" for p in found if not p["told_apart"]]
    clear = len(found) - len(unclear)
    told = f"told apart, paired by seed: {clear} of {len(found)} pairs"
    return f"{told}, all but {', '.join(unclear)}" if clear and unclear else told


def _settled(settled: Mapping[str, Any]) -> str:
    first, second = settled["winners"]
    if settled["settled"]:
        return f"settled by these timings: {first} is ahead by either half of them"
    return (
        f"not settled by these timings: {first} is ahead by the first half of them, "
        f"{second} by the second"
    )


def timings(summary: Mapping[str, Any]) -> list[str]:
    """Say how the step times were taken."""
    taken = summary.get("step_times")
    if not taken:
        return []
    if taken["unsteady_share"] is None:
        return ["step times: one median a program, so nothing says how steady they are"]
    steady = "steady" if taken["steady"] else "not steady"
    return [
        f"step times: {taken['rounds']} rounds, {steady}: the medians of their halves "
        f"differ by over 5 % for {taken['unsteady_share']:.0%} of programs"
    ]


def too_slow(summary: Mapping[str, Any]) -> list[str]:
    """Say for which systems no step size meets the target for time per token."""
    tpot_s = summary["slo"]["tpot_s"]
    return [
        f"{name}: no step size meets TPOT <= {tpot_s * 1e3:.2f} ms: its smallest full "
        f"step with a prompt beside decodes takes {smallest_s * 1e3:.2f} ms"
        for name, smallest_s in summary.get("too_slow_s", {}).items()
    ]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Explain the words of the table, each with what to do about a no."""
    said = [
        "steady: at that rate the backlog stopped growing in 9 of 10 seeds; else take "
        "longer runs (--set workload.num_requests=3000)"
    ]
    if summary["target"] is not None:
        share = f"{summary['target']:.0%}"
        said.insert(
            0,
            f"resolved: attainment is surely at least {share} at a rate, and surely "
            f"below at another that is at most {summary['apart'] - 1:.0%} higher; else "
            "take more seeds or longer runs (--set num_seeds=32, --set "
            "workload.num_requests=3000)",
        )
    if summary.get("settled"):
        said.append(
            "settled: the same system is ahead by the first and by the second half of "
            "the timings of programs; else take more rounds (--set timing_repeats=40) "
            "on a quieter machine"
        )
    looks, confidence = summary["looks"], summary["confidence"]
    if len(looks) > 1:
        said.append(
            f"intervals: {confidence:.1%} each, so that they hold with 95 % together "
            f"over {len(looks)} looks, after {', '.join(map(str, looks))} seeds"
        )
    return said
