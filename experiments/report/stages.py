"""The stages of requests as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disagg_jax import metrics
from disagg_jax.request import Timeline
from experiments.report.panel import STAGE_LEGEND
from experiments.report.table import numbers


def stage_table(timelines: Mapping[str, Timeline]) -> list[str]:
    """Return a line for each finished request: the milliseconds of its stages."""
    head = ("ms", *STAGE_LEGEND, "TTFT", "TPOT")
    return numbers([head, *([name, *_ms(t)] for name, t in timelines.items())])


def _ms(timeline: Timeline) -> list[str]:
    stages = dataclasses.astuple(metrics.stages_s(timeline))
    latencies = metrics.ttft_s(timeline), metrics.tpot_s(timeline)
    return [f"{seconds * 1e3:.2f}" for seconds in (*stages, *latencies)]
