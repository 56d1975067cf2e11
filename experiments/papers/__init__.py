"""Holds the figures of DistServe and others, under the names that `reproduce` takes.

A figure is a `PaperFigure`: a function from a `Lab`, which runs simulations, to panels
and claims.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.papers import fastgen, mlperf, sarathi, sarathi_pipeline, sarathi_serve
from experiments.papers.distserve import (
    beyond,
    breakdown,
    motivation,
    placements,
    queueing,
    simulated,
    toy,
)
from experiments.papers.figure import PaperFigure

FIGURES: Mapping[str, PaperFigure] = {
    **toy.FIGURES,
    **motivation.FIGURES,
    **queueing.FIGURES,
    **placements.FIGURES,
    **breakdown.FIGURES,
    **simulated.FIGURES,
    **beyond.FIGURES,
    **sarathi.FIGURES,
    **sarathi_pipeline.FIGURES,
    **sarathi_serve.FIGURES,
    **fastgen.FIGURES,
    **mlperf.FIGURES,
}
