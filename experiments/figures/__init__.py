"""DistServe's figures, by the name that `experiments.reproduce` takes."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.figures import placements
from experiments.figures.figure import Figure

FIGURES: Mapping[str, Figure] = {**placements.FIGURES}
