"""Draws DistServe's Figs. 8 and 9: attainment over the rate and the SLO scale.

Where the released profile has the model, each system is simulated twice: as DistServe's
own simulator does ("as shipped": a slower engine for vLLM, no KV memory, free links,
the paper's few requests), and with one engine, KV memory and links for both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.metrics.attainment import SLO
from disagg_jax.search.goodput import slo_scale
from experiments.configs.paper_workloads import get_workload
from experiments.papers.distserve.published import TARGET, paper_crossings, paper_panel
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.papers.runs import IDLE, Arm, ArmRuns, run_arms
from experiments.report.colours import system_colours
from experiments.report.intervals import across_seeds, percent, ratio_text
from experiments.report.panel import Panel, banded

_COLOURS = system_colours(["DistServe", "vLLM", "DeepSpeed-MII"])
_ONE_ENGINE = (
    "Not the paper's comparison: one engine for both sides, KV memory, links, and runs "
    "long enough to fill the queues"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """A pair of panels of Figs. 8 and 9."""

    title: str
    workload: str
    slo: SLO  # the one that the figure was drawn with
    scale_rate: float  # requests/s per GPU of the SLO scale panel
    arms: Sequence[Arm]
    why: str  # where the systems' goodputs differ from the paper's
    # Labels: a DistServe, and what to divide by.
    compared: Sequence[tuple[str, str]] = (
        ("DistServe, as shipped", "vLLM, as shipped"),
        ("DistServe, one engine", "vLLM policy, one engine"),
        ("DistServe, one engine", "DeepSpeed-MII policy, one engine"),
    )
    other_slo: tuple[str, SLO] | None = None  # where the paper's versions disagree


Found = Mapping[str, ArmRuns]  # by label


def make(figure: str, spec: EndToEnd, lab: Lab) -> Drawn:
    """Draw both panels, and state goodputs and their ratios."""
    slo, rate = spec.slo, spec.scale_rate
    rates, scales = (
        [x for x, _ in paper_panel(figure, name).series["DistServe"]]
        for name in ("rate", "scale")
    )
    workload = get_workload(spec.workload)
    found = run_arms(lab, spec.arms, workload, sorted({IDLE, rate, *rates}))
    by_rate = {label: runs.percentages(slo) for label, runs in found.items()}
    by_scale = {label: r.by_scale(slo, rate, scales) for label, r in found.items()}
    targets = f"TTFT <= {slo.ttft_s:g} s, TPOT <= {slo.tpot_s:g} s"
    scaled = f"both targets times the scale, at {rate:g} requests/s per GPU"
    return Drawn(
        panels=[
            _panel(figure, "rate", f"{spec.workload}; {targets}", by_rate),
            _panel(figure, "scale", scaled, by_scale),
        ],
        claims=[
            *_goodput_claims(figure, spec, found, lab),
            *_ratio_claims(figure, spec, found, lab),
            *_other_slo_claims(figure, spec, found),
        ],
        checked=[arm.simulation.checked for arm in spec.arms],
    )


def _name(label: str) -> str:
    """Return the paper's name of the system that `label` begins with."""
    return next(name for name in _COLOURS if label.startswith(name))


def _panel(
    figure: str,
    name: str,
    title: str,
    shares: Mapping[str, Mapping[float, list[float]]],
) -> Panel:
    """Draw attainments in % over the paper's points."""
    axes = paper_panel(figure, name)
    series = axes.curves({name: _COLOURS[name] for name in axes.series})
    for label, of_arm in shares.items():
        style = "dashed" if "as shipped" in label else "line"
        series.append(banded(label, of_arm, _COLOURS[_name(label)], style))
    return axes.attainment(title, series)


def _goodput_claims(figure: str, spec: EndToEnd, found: Found, lab: Lab) -> list[Claim]:
    crossings = paper_crossings(figure, "rate")
    return [
        Claim(
            claim=f"{_name(label)} serves this rate per GPU at 90 % ({label})",
            paper=f"{crossings[_name(label)]:g} rps",
            ours=f"{runs.goodputs(spec.slo)} rps, limited by {runs.limit(spec.slo)}; "
            f"without any queue {percent(runs.attainments(spec.slo)[IDLE])} attain",
            why=_ONE_ENGINE if "one engine" in label else spec.why,
            runs=runs.arm.said(lab),
        )
        for label, runs in found.items()
    ]


def _ratio_claims(figure: str, spec: EndToEnd, found: Found, lab: Lab) -> list[Claim]:
    rate, scale = paper_crossings(figure, "rate"), paper_crossings(figure, "scale")
    claims: list[Claim] = []
    for ours, theirs in spec.compared:
        above, below, other = found[ours], found[theirs], _name(theirs)
        runs = f"{above.arm.said(lab)}; {below.arm.said(lab)}"
        tight, loose = (
            [slo_scale([r], spec.slo, TARGET) for r in side.results[spec.scale_rate]]
            for side in (above, below)
        )
        both = f"{across_seeds(tight)} against {across_seeds(loose)}"
        marked = " (UNEQUAL ENGINES)" if above.arm.simulation.mark else ""
        claims += [
            Claim(
                claim=f"DistServe's goodput over {other}'s{marked}",
                paper=f"{rate['DistServe'] / rate[other]:.2f}x",
                ours=above.goodputs(spec.slo).over(below.goodputs(spec.slo)),
                why="Follows from the two goodputs",
                runs=runs,
            ),
            Claim(
                claim=f"DistServe meets tighter SLOs than {other}{marked}",
                paper=f"{scale[other] / scale['DistServe']:.2f}x "
                f"({scale['DistServe']:g} against {scale[other]:g})",
                ours=f"{ratio_text(loose, tight)} ({both})",
                why=f"At {spec.scale_rate:g} rps per GPU. Ours is exact, the paper's "
                "interpolated; a system over capacity at this rate has a scale that "
                "grows with N",
                runs=runs,
            ),
        ]
    return claims


def _other_slo_claims(figure: str, spec: EndToEnd, found: Found) -> list[Claim]:
    if spec.other_slo is None:
        return []
    name, slo = spec.other_slo
    crossings = paper_crossings(figure, "rate")
    claims: list[Claim] = []
    for ours, theirs in spec.compared:
        paper, other = crossings["DistServe"], crossings[_name(theirs)]
        above, below = found[ours].goodputs(slo), found[theirs].goodputs(slo)
        claims.append(
            Claim(
                claim=f"The same runs judged by {name}: goodputs per GPU and their "
                "ratio",
                paper=f"{paper:g} and {other:g} rps, {paper / other:.2f}x",
                ours=f"{above} and {below} rps, {above.over(below)}",
                why="The paper's versions give this chatbot different SLOs; the "
                "crossings printed are the figure's, whichever it used",
                runs=f"{ours}; {theirs}: as above",
            )
        )
    return claims
