"""Summaries of a sweep made by hand, in which no two numbers are alike."""

from __future__ import annotations

from typing import Any

STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
KINDS = ("prefill", "mixed", "decode")
ROLES = ("prefill", "decode", "colocated")


def interval(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "per_seed": [mean]}


def metrics(first: float, **changes: Any) -> dict[str, Any]:
    """Metrics of a point: `first`, `first` + 1, ... in the order of the table."""
    shares = ("attainment", "attainment_ttft", "attainment_tpot")
    latencies = [
        f"p{p}_{name}_ms" for name in ("ttft", "tpot", "itl") for p in (50, 90, 99)
    ]
    names = (*latencies, *(f"mean_{stage}_ms" for stage in STAGES))
    found: dict[str, Any] = {name: first + i for i, name in enumerate(names)}
    found |= {name: (first + 10 * i) / 1000 for i, name in enumerate(shares)}
    found |= {f"padding_{kind}": i / 100 for i, kind in enumerate(KINDS, 11)}
    for i, role in enumerate(ROLES):
        found |= {f"busy_{role}": (60 + i) / 100, f"busy_{role}_least": (50 + i) / 100}
    found |= {"output_throughput_per_device": 10 * first + 0.6, "preemptions": 1.76}
    return {**found, "transfer_bytes": 2.5e6, **changes}


def point(rate: float, devices: int, share: float, **scores: Any) -> dict[str, Any]:
    """A rate that was tried, with another share for each line of the picture."""
    return {
        "rate_rps": rate,
        "rate_rps_per_device": rate / devices,
        "attainment": interval(share, share - 0.1, share + 0.2),
        "attainment_ttft": interval(share + 0.01, None, None),
        "attainment_tpot": interval(share + 0.02, None, None),
        "criteria": {
            "distserve": interval(share, share - 0.1, share + 0.2),
            "fastgen": interval(40 * share, 30 * share, None),
            **scores,
        },
    }


def rank(*rows: tuple[str, float, str, float | None]) -> list[dict[str, Any]]:
    keys = ("system", "mean", "known", "bound")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def goodput(**changes: Any) -> dict[str, Any]:
    """A sweep for a goodput: one system is bracketed, the other never passed."""
    summary: dict[str, Any] = {
        "model": "tiny",
        "clock": "virtual",
        "durations": "table",
        "slo": {"ttft_s": 0.0123, "tpot_s": 0.00456},
        "criterion": "distserve",
        "target": 0.9,
        "num_requests": 70,
        "num_seeds": 3,
        "looks": [3],
        "confidence": 0.95,
        "apart": 1.21,
        "executed": "all",
        "executed_requests": 50,
        "choices": {"vllm_v0": ["colocated max_batched_tokens = 64: the default"]},
        "systems": {
            "vllm_v0": {
                "deployment": "2xcolocated:tp1",
                "devices": 2,
                "goodput": {
                    "goodput_rps_per_device": interval(12.34, 11.0, 13.5),
                    "pass_rps_per_device": 12.0,
                    "fail_rps_per_device": 14.0,
                    "bracketed": True,
                    "resolved": False,
                    "inversion": None,
                    "steady": True,
                    "at_pass_rate": metrics(100.0, busy_prefill=None),
                },
                "points": [point(24.0, 2, 0.7), point(28.0, 2, 0.4)],
            },
            "pair": {
                "deployment": "prefill:tp1,decode:tp3",
                "devices": 4,
                "goodput": {
                    "goodput_rps_per_device": interval(5.0, None, None),
                    "pass_rps_per_device": None,
                    "fail_rps_per_device": 6.0,
                    "bracketed": False,
                    "resolved": True,
                    "inversion": None,
                    "steady": None,
                    "at_pass_rate": None,
                },
                "points": [point(24.0, 4, 0.05)],
            },
        },
        "ratios": {"pair/vllm_v0": interval(0.4049, 0.3, 0.5)},
        "pairs": [
            {
                "ahead": "vllm_v0",
                "behind": "pair",
                "ratio": interval(2.5, 2.0, 3.3),
                "told_apart": True,
            }
        ],
        "too_slow_s": {},
        "criteria": {
            "distserve": {
                "definition": "90% of requests",
                "unit": "requests/s per device",
                "rank": rank(
                    ("vllm_v0", 12.3456, "yes", None), ("pair", 5.0, "below", 6.0)
                ),
            },
            "fastgen": {
                "definition": "good requests",
                "unit": "good requests/s per device",
                "rank": rank(
                    ("pair", 9.5, "coarsely", None), ("vllm_v0", 8.5, "at least", 7.5)
                ),
            },
        },
    }
    return {**summary, **changes}


def throughput() -> dict[str, Any]:
    """The same, searched for FastGen's throughput."""
    summary = goodput(criterion="fastgen", target=None)
    for first, (name, system) in enumerate(summary["systems"].items(), 2):
        del system["goodput"]
        system["throughput"] = {
            "max_throughput_per_device": interval(first + 0.12345, 1.0, 9.0),
            "best_rps_per_device": 10.0 * first,
            "bracketed": name == "vllm_v0",
            "steady": name != "vllm_v0",
            "at_best_rate": metrics(100.0 * first),
        }
    return summary


def two_targets() -> dict[str, Any]:
    """Two targets: by the relaxed one no pair is told apart, and nothing is settled."""
    relaxed = goodput(slo={"ttft_s": 0.02, "tpot_s": 0.008}, num_seeds=6)
    relaxed["pairs"][0] |= {"ahead": "pair", "behind": "vllm_v0", "told_apart": False}
    tight = goodput(too_slow_s={"pair": 0.0051})
    for found, winners in ((tight, ["vllm_v0"] * 2), (relaxed, ["pair", "vllm_v0"])):
        found |= {"looks": [3, 6], "confidence": 0.975}
        found["settled"] = {"settled": len(set(winners)) == 1, "winners": winners}
        found["step_times"] = {"rounds": 8, "unsteady_share": 0.05, "steady": True}
    return {"targets": {"tight": tight, "relaxed": relaxed}}
