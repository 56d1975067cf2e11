"""One run under vLLM's key names, by the definitions of `metrics`, in milliseconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from disagg_jax.metrics import (
    SLO,
    Stages,
    attainment,
    e2e_s,
    meets,
    pooled_itl_s,
    stages_s,
    tpot_s,
    ttft_s,
)
from disagg_jax.request import Status, Timeline


def percentiles(
    values: Sequence[float], points: Sequence[float] = (50, 90, 99)
) -> dict[str, float | None]:
    """Return `{"p50": ...}`, interpolated linearly; None without values."""
    if len(values) == 0:
        return {f"p{point:g}": None for point in points}
    found = np.percentile(values, points)
    return {f"p{point:g}": float(x) for point, x in zip(points, found, strict=True)}


def summarise(
    timelines: Sequence[Timeline],
    slo: SLO,
    devices: int,
    duration_s: float | None = None,
) -> dict[str, float | None]:
    """Summarise one run as a flat dict for JSON; None where nothing was measured.

    Keys and formulas are vLLM `bench serve` 0.33's where it has them: latencies in ms
    over finished requests, tokens of finished requests only, rates per second.
    `request_goodput` is its rate of good requests, not DistServe's goodput. Ours are
    `attainment*`, `mean_<stage>_ms`, `preemptions` and `transfer_bytes` (both summed
    over all requests), and `*_per_device` (of all devices, prefill and decode).

    Args:
      duration_s: of the run; by default from the first arrival to the last end.

    Raises:
      ValueError: if there are no requests, `devices` < 1 or `duration_s` <= 0.
    """
    if devices < 1:
        raise ValueError(f"devices: expected >= 1, got {devices}")
    if duration_s is None:
        duration_s = span_s(timelines)
    elif not duration_s > 0:
        raise ValueError(f"duration_s: expected > 0, got {duration_s}")
    shares = attainment(timelines, slo)
    finished = [t for t in timelines if t.status is Status.FINISHED]
    return {
        "devices": devices,
        "duration": duration_s,
        "num_prompts": len(timelines),
        "completed": len(finished),
        "failed": len(timelines) - len(finished),
        **_throughput(finished, slo, devices, duration_s),
        "attainment": shares.joint,
        "attainment_ttft": shares.ttft_only,
        "attainment_tpot": shares.tpot_only,
        **_latencies_ms(finished),
        **_mean_stages_ms(finished),
        "preemptions": sum(t.preemptions for t in timelines),
        "transfer_bytes": sum(t.transfer_bytes for t in timelines),
    }


def span_s(timelines: Sequence[Timeline]) -> float | None:
    """Return first arrival to last end; None if no request ended or no time passed."""
    ends = [t.end_s for t in timelines if t.end_s is not None]
    if not ends:
        return None
    span = max(ends) - min(t.request.arrival_s for t in timelines)
    return span if span > 0 else None


def _throughput(
    finished: Sequence[Timeline], slo: SLO, devices: int, duration_s: float | None
) -> dict[str, float | None]:
    tokens_in = sum(t.request.prompt_tokens for t in finished)
    tokens_out = sum(len(t.token_s) for t in finished)
    counts = {
        "request_throughput": len(finished),
        "request_goodput": sum(meets(t, slo) for t in finished),
        "output_throughput": tokens_out,
        "total_token_throughput": tokens_in + tokens_out,
    }
    summary: dict[str, float | None] = {
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
    }
    for key, count in counts.items():
        per_s = None if duration_s is None else count / duration_s
        summary[key] = per_s
        summary[f"{key}_per_device"] = None if per_s is None else per_s / devices
    return summary


def _latencies_ms(finished: Sequence[Timeline]) -> dict[str, float | None]:
    pools = {
        "ttft": [ttft_s(t) for t in finished],
        "tpot": [tpot_s(t) for t in finished if len(t.token_s) > 1],
        "itl": pooled_itl_s(finished).tolist(),
        "e2el": [e2e_s(t) for t in finished],
    }
    summary: dict[str, float | None] = {}
    for name, values_s in pools.items():
        spread = percentiles(values_s)
        stats = {
            "mean": _mean(values_s),
            "median": spread["p50"],
            "std": float(np.std(values_s)) if values_s else None,  # vLLM's: ddof 0
            **spread,
        }
        summary |= {f"{stat}_{name}_ms": _ms(value) for stat, value in stats.items()}
    return summary


def _mean_stages_ms(finished: Sequence[Timeline]) -> dict[str, float | None]:
    stages = [stages_s(t) for t in finished]
    means_s = {
        field.name: _mean([getattr(s, field.name) for s in stages])
        for field in dataclasses.fields(Stages)
    }
    return {f"mean_{k.removesuffix('_s')}_ms": _ms(s) for k, s in means_s.items()}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if len(values) else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
