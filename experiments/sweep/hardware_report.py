"""Writes the main job's second table: the same systems on hardware, and why it differs.

Each claim follows from the numbers beside it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import Interval
from experiments.report.intervals import interval_text
from experiments.report.table import numbers, underlined
from experiments.runs.saved_run import by_target
from experiments.sweep.headline import headline
from experiments.sweep.step_prices import GRAIN
from experiments.sweep.summary import per_seed


def hardware_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the second table of a sweep; no lines where it was not asked for.

    Args:
      summary: of the whole sweep, whose results stand beside those on the hardware.
    """
    table = summary.get("hardware_table")
    if not table:
        return []
    here, there = by_target(summary), table["targets"]
    names = ("here", f"on {table['hardware']}")
    lines = [
        f"the same systems on {table['devices']} x {table['hardware']}, simulated: "
        f"{table['model']}",
        *_conditions(table),
        *itertools.chain(*(headline(*each) for each in there.items())),
        "",
        *underlined(numbers(list(_rows(names, here, there)))),
        *_kinds(names, here, there),
        "",
        *_choices(there),
    ]
    if table["prices"]:
        lines += ["", *_why(table["prices"])]
    return lines


def _conditions(table: Mapping[str, Any]) -> Iterator[str]:
    """Say what was simulated, and how far it can be trusted."""
    yield f"{table['checked']}; every system has its step times, memory and limits"
    yield (
        f"requests: {table['workload']}, Poisson arrivals; on average "
        f"{table['prompt_tokens']} prompt and {table['output_tokens']} output tokens "
        f"(above: {table['here']['prompt_tokens']} and "
        f"{table['here']['output_tokens']}), at most {table['max_context']} together"
    )
    lengths = ", ".join(
        f"{found['requests']}{f' ({name})' if name else ''}"
        for name, found in table["targets"].items()
    )
    short = " that the targets ask for, so goodputs are somewhat too high"
    yield (
        f"requests a run: {lengths}{short if ' of ' in lengths else ''}; "
        f"{table['seeds']} seeds, 95 % intervals"
    )
    yield (
        "targets and step sizes by the rules of the first table; a full decode step "
        f"has {table['decodes']} requests of {table['max_context']} tokens"
    )
    if table["left_out"]:
        names = ", ".join(table["left_out"])
        yield f"left out, as they are made for the first table: {names}"


def _rows(
    names: Sequence[str], here: Mapping[str, Any], there: Mapping[str, Any]
) -> Iterator[Sequence[str]]:
    """Yield the goodputs of each system, here and on the hardware, by target."""
    sides = [
        (f"{target} {name}".strip(), found)
        for target in there
        if target in here
        for name, found in zip(names, (here[target], there[target]), strict=True)
    ]
    heads = ((name, "of the best") for name, _ in sides)
    yield ("goodput, requests/s per device", *itertools.chain(*heads))
    for system in next(iter(there.values()))["systems"]:
        cells = (_cells(system, found["systems"]) for _, found in sides)
        yield (system, *itertools.chain(*cells))


def _cells(name: str, systems: Mapping[str, Any]) -> tuple[str, str]:
    """Return a system's goodput, and its share of the best system's."""
    if name not in systems:  # the time did not suffice for it
        return "-", "-"
    best = max(map(_mean, systems.values()))
    found = systems[name]["goodput"]["goodput_rps_per_device"]
    share = f"{found['mean'] / best:.0%}" if best else "-"
    return interval_text(Interval(**found), ".3g"), share


def _mean(system: Mapping[str, Any]) -> float:
    return statistics.mean(per_seed(system))


def _kinds(
    names: Sequence[str], here: Mapping[str, Any], there: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the ratio of disaggregated to colocated by each target, on both sides."""
    for target, found in there.items():
        sides = zip(names, (here.get(target), found), strict=True)
        ratios = [
            f"{over} {name}"
            for name, side in sides
            if side and (over := _over_colocated(side))
        ]
        if ratios:
            what = f"{target}: disaggregated over the best colocated system"
            yield f"{what.removeprefix(': ')}: {', '.join(ratios)}"


def _over_colocated(found: Mapping[str, Any]) -> str:
    """Write the best disaggregated system over the best colocated one; "" without."""
    best: dict[bool, str] = {}  # by whether it is colocated
    for name, system in sorted(found["systems"].items(), key=lambda s: -_mean(s[1])):
        deployment = Deployment.parse(system["deployment"])
        best.setdefault(bool(deployment.of(Role.COLOCATED)), name)
    if len(best) < 2:
        return ""
    pair = next(
        pair
        for pair in found["pairs"]
        if {pair["ahead"], pair["behind"]} == set(best.values())
    )
    open_ = "" if pair["told_apart"] else ", undecided"
    if pair["ratio"] is None:
        return f"{pair['ahead']} alone has a goodput at every seed{open_}"
    ratio = Interval(**pair["ratio"])
    if pair["ahead"] == best[True]:
        ratio = _inverse(ratio)
    return f"{interval_text(ratio)} ({best[True]}{open_})"


def _inverse(ratio: Interval) -> Interval:
    """Return the ratio the other way round; its interval is one of logarithms."""
    low, high = ratio.low, ratio.high
    return Interval(
        mean=1 / ratio.mean,
        low=None if high is None else 1 / high,
        high=None if not low else 1 / low,
    )


def _choices(targets: Mapping[str, Any]) -> Iterator[str]:
    """Yield the layout and the step size of each system by each target."""
    for target, found in targets.items():
        for name, system in found["systems"].items():
            said = "; ".join([system["deployment"], *found["choices"][name]])
            yield f"{target} {name}: {said}".strip()


# ---- why -----------------------------------------------------------------------------


def _why(prices: Mapping[str, Any]) -> list[str]:
    """Compare the steps of both sides, and say what they show."""
    decodes, tokens, few = (prices[key] for key in ("decodes", "tokens", "few_tokens"))
    sides = prices["devices"]
    rows: list[Sequence[str]] = [
        ("why they differ: ms of a step", *(side["device"] for side in sides))
    ]

    def row(label: str, *cells: str) -> None:
        rows.append((label, *cells))

    def times(label: str, key: str) -> None:
        row(label, *(f"{side[key] * 1e3:.2f}" for side in sides))

    times("1 decode", "one_decode_s")
    times(f"{decodes} decodes", "decodes_s")
    times(f"{few} tokens of a prompt", "few_s")
    times(f"{tokens} tokens of a prompt", "part_s")
    times(f"{decodes} decodes and {tokens} tokens of a prompt", "both_s")
    row(
        f"{tokens} tokens beside {decodes} decodes, over their time alone",
        *(f"{_share(side):.0%}" for side in sides),
    )
    row(
        f"most tokens that make {decodes} decodes at most 10 % longer",
        *(_free(side["free_tokens"], tokens) for side in sides),
    )
    row(f"host work and launches of {decodes} decodes", *map(_overhead, sides))
    return [*underlined(numbers(rows)), _growth(tokens / few, sides), _price(sides)]


def _growth(more: float, sides: Sequence[Mapping[str, Any]]) -> str:
    """Say how the time of a part of a prompt grows with its tokens.

    Time that is bound by compute grows with the tokens, other time does not: what is
    nearer, on a logarithm, is said.
    """
    said: list[str] = []
    for side in sides:
        longer = side["part_s"] / side["few_s"]
        bound = "compute" if longer**2 > more else "weights, launches or host work"
        said.append(f"{longer:.1f} x the time with {side['device']} (bound by {bound})")
    return f"{more:.1f} x the tokens of a prompt take {' and '.join(said)}"


def _price(sides: Sequence[Mapping[str, Any]]) -> str:
    pays = " and ".join(f"{_share(s):.0%} with {s['device']}" for s in sides)
    return f"so what a prompt costs beside decodes, of its time alone, is {pays}"


def _share(side: Mapping[str, Any]) -> float:
    """Return what a part of a prompt costs beside decodes, over its time alone."""
    return (side["both_s"] - side["decodes_s"]) / side["part_s"]


def _free(tokens: int, most: int) -> str:
    if tokens == 0:
        return f"fewer than {GRAIN}"
    return f"{tokens} or more" if tokens + GRAIN > most else f"{tokens}"


def _overhead(side: Mapping[str, Any]) -> str:
    if side["overhead_s"] is None:
        return "not told apart"
    share = side["overhead_s"] / side["decodes_s"]
    return f"{side['overhead_s'] * 1e3:.2f} ({share:.0%})"
