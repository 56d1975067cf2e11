"""The files of one simulated run: its requests, its summary and its picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from disagg_jax.metrics import SLO, meets
from disagg_jax.metrics.latency import Stages, stages_s, tpot_s, ttft_s
from disagg_jax.request import Status, Timeline
from disagg_jax.runlog import EventLog, chrome_trace
from experiments.report.draw import draw
from experiments.runs.folder import read_json, whole, write_json, write_text
from experiments.simulated.report import latency_panels
from experiments.simulated.served import NO_TARGETS, Served

FILES = ("requests.csv", "summary.json", "latencies.png")  # of a run
STAGES = tuple(field.name for field in dataclasses.fields(Stages))
COLUMNS = (
    *("request_id", "arrival_s", "prompt_tokens", "output_tokens"),
    *("ttft_s", "tpot_s", *STAGES, "good", "error"),
)


def write_requests(
    path: pathlib.Path,
    timelines: Sequence[Timeline],
    extra_tokens: int,
    slo: SLO = NO_TARGETS,
) -> None:
    """Write a row for each request; floats read back as they were.

    Args:
      extra_tokens: that the simulation added to each output.
      slo: whose latencies make a request good, which is 1 or 0.
    """
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for timeline in timelines:
            request = timeline.request
            output = request.max_tokens - extra_tokens
            asked = (request.id, request.arrival_s, request.prompt_tokens, output)
            good = timeline.status is Status.FINISHED and meets(timeline, slo)
            found = (*_latencies_s(timeline), int(good), timeline.error)
            rows.writerow((*asked, *found))


def _latencies_s(timeline: Timeline) -> tuple[float | str, ...]:
    if timeline.status is not Status.FINISHED:
        return ("",) * (2 + len(STAGES))
    stages = dataclasses.astuple(stages_s(timeline))
    return (ttft_s(timeline), tpot_s(timeline), *stages)


def write_run(
    out: pathlib.Path, served: Served, slo: SLO, title: str, extra_tokens: int
) -> dict[str, Any]:
    """Write `FILES` into the folder `out`; return the summary.

    The summary comes last: a folder that has one is complete.
    """
    out.mkdir(exist_ok=True)
    requests, summary, picture = (out / name for name in FILES)
    write_requests(requests, served.run.timelines, extra_tokens, slo)
    draw(latency_panels(served, slo), title, picture)
    found = served.summary(slo)
    write_json(summary, found)
    return found


def read_summary(out: pathlib.Path) -> dict[str, Any] | None:
    """Return the summary of the run in the folder `out`; None if it is not complete.

    A run of before systems were named has other files, so it is not complete either.
    """
    found = read_json(out / FILES[1])
    return found if found and "system" in found else None


def write_timeline(path: pathlib.Path, served: Served, log: EventLog) -> None:
    """Write a run as a timeline that Perfetto opens."""
    timelines = served.run.timelines
    drawn = chrome_trace(served.case.deployment, log.lines, timelines)
    write_text(path, json.dumps(drawn))
