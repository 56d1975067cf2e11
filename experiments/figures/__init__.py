"""Figures of DistServe and others, by the name that `experiments.reproduce` takes."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.figures import (
    beyond,
    breakdown,
    fastgen,
    mlperf,
    motivation,
    pipeline,
    placements,
    queueing,
    sarathi,
    sarathi_serve,
    simulated,
    toy,
)
from experiments.figures.figure import Figure

FIGURES: Mapping[str, Figure] = {
    **toy.FIGURES,
    **motivation.FIGURES,
    **queueing.FIGURES,
    **placements.FIGURES,
    **breakdown.FIGURES,
    **simulated.FIGURES,
    **beyond.FIGURES,
    **sarathi.FIGURES,
    **pipeline.FIGURES,
    **sarathi_serve.FIGURES,
    **fastgen.FIGURES,
    **mlperf.FIGURES,
}
