"""The workloads of published evaluations, as distributions of lengths."""

from __future__ import annotations

import json
import pathlib
import re

from disagg_jax.expect import expect
from disagg_jax.lengths import FixedLengths, HistogramLengths
from disagg_jax.sim.points import SimWorkload

LENGTHS = pathlib.Path(__file__).parent / "profiles" / "distserve_lengths.json"
DISTSERVE = ("sharegpt", "humaneval", "longbench")
_FIXED = re.compile(r"fixed:([1-9]\d*)x([1-9]\d*)")
_MAX_TOTAL_TOKENS = 2048  # OPT's longest context; DistServe drops longer requests


def get_workload(name: str) -> SimWorkload:
    """The workload called `name`, with Poisson arrivals.

    "sharegpt", "humaneval" and "longbench" are DistServe's (arXiv 2401.09670 v3, Fig.
    7): prompt and output are drawn apart, and cut to OPT's 2048 tokens together.
    "fixed:512x64" is 512 prompt and 64 output tokens for every request.

    Raises:
      ValueError: on any other name.
    """
    if match := _FIXED.fullmatch(name):
        prompt, output = (FixedLengths(tokens=int(text)) for text in match.groups())
        return SimWorkload(prompt=prompt, output=output)
    known = f"workload: expected one of {DISTSERVE} or 'fixed:PROMPTxOUTPUT'"
    expect(name in DISTSERVE, known, name)
    return SimWorkload(
        prompt=_histogram(name, "prompt"),
        output=_histogram(name, "output"),
        max_total_tokens=_MAX_TOTAL_TOKENS,
    )


def _histogram(name: str, part: str) -> HistogramLengths:
    data = json.loads(LENGTHS.read_text())
    shares = data["shares"][name][part]
    width, first = data["bin_width_tokens"], data["first_edge_tokens"]
    edges = tuple(first + i * width for i in range(len(shares) + 1))
    return HistogramLengths(edges=edges, weights=tuple(shares))
