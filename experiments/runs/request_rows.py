"""A request as a line of `requests.jsonl`, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.request import Request, Status, Timeline

# Attributes of a timeline that a row copies.
_STAMPS = (
    *("prefill_start_s", "transfer_start_s", "transfer_end_s", "decode_start_s"),
    *("end_s", "dropped_s", "token_s", "tokens", "transfer_bytes", "error"),
)


def to_row(timeline: Timeline, slo: metrics.SLO) -> dict[str, Any]:
    """Return the row of a request, with its latencies if it finished.

    It is good if it finished within both latencies of `slo`, so that the mean of `good`
    over the requests of a run is the run's attainment.
    """
    request = timeline.request
    finished = timeline.status is Status.FINISHED
    row: dict[str, Any] = {
        "request_id": request.id,
        "status": str(timeline.status),
        "good": finished and metrics.meets(timeline, slo),
        "arrival_s": request.arrival_s,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": len(timeline.token_s),
        "preemptions": timeline.preemptions,
        **{name: getattr(timeline, name) for name in _STAMPS},
    }
    if finished:
        row |= {
            "ttft_s": metrics.ttft_s(timeline),
            "tpot_s": metrics.tpot_s(timeline),
            "e2e_s": metrics.e2e_s(timeline),
            **dataclasses.asdict(metrics.stages_s(timeline)),
        }
    return row


def to_timeline(row: Mapping[str, Any]) -> Timeline:
    """Return the timeline of a row, with a request of the row's lengths.

    Raises:
      ValueError: if the row lacks a key, as rows of older runs do.
    """
    missing = [name for name in _STAMPS if name not in row]
    require(
        not missing, "requests: expected rows of this version, missing none", missing
    )
    request = Request(
        id=row["request_id"],
        arrival_s=row["arrival_s"],
        prompt_tokens=row["prompt_tokens"],
        max_tokens=max(1, row["output_tokens"]),
    )
    stamps = {name: row[name] for name in _STAMPS}
    return Timeline(request=request, status=Status(row["status"]), **stamps)
