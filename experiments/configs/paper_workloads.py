"""The workloads of published evaluations, as distributions of lengths."""

from __future__ import annotations

import json
import math
import pathlib
import re

from disagg_jax.errors import require
from disagg_jax.workload import (
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    RandomWorkload,
)

LENGTHS = pathlib.Path(__file__).parents[1] / "profiles" / "distserve_lengths.json"
DISTSERVE = ("sharegpt", "humaneval", "longbench")
_FIXED = re.compile(r"fixed:([1-9]\d*)x([1-9]\d*)")
# Name -> median and P90 of prompts and of outputs, and the longest request, in tokens.
# Sarathi-Serve (OSDI'24) Table 2, from memory. A log-normal through them has an output
# standard deviation of 283 (chat) and 109 (arxiv). The table prints 101 and 265, which
# look swapped: the chat lengths that its authors released have 265.6.
SARATHI_SERVE = {
    "openchat_sharegpt4": ((1730, 5696), (415, 834), 8192),
    "arxiv_summarization": ((7059, 12_985), (208, 371), 16_384),
}
# All names, for --help.
WORKLOADS = (
    f"{', '.join((*DISTSERVE, *SARATHI_SERVE))}, fixed:PROMPTxOUTPUT, or lengths of "
    "prompts and outputs, each fixed:N, uniform:LOW:HIGH or "
    "lognormal:MEDIAN:SIGMA:HIGH, such as lognormal:500:0.5:1500,uniform:16:64"
)
_P90 = 1.2816  # standard deviations of a normal from its median
_MAX_TOTAL_TOKENS = 2048  # OPT's longest context; DistServe drops longer requests


def get_workload(name: str) -> RandomWorkload:
    """Return the workload called `name`, with Poisson arrivals.

    "sharegpt", "humaneval" and "longbench" are DistServe's (arXiv 2401.09670 v3, Fig.
    7): prompt and output are drawn apart, and cut to OPT's 2048 tokens together.
    "openchat_sharegpt4" and "arxiv_summarization" are Sarathi-Serve's: log-normals with
    the published medians and P90s. "fixed:512x64" is 512 prompt and 64 output tokens
    for every request. "lognormal:500:0.5:1500,uniform:16:64" are lengths of prompts and
    of outputs, as `parse_lengths` reads them.

    Raises:
      ValueError: on any other name.
    """
    if match := _FIXED.fullmatch(name):
        prompt, output = (FixedLengths(tokens=int(text)) for text in match.groups())
        return RandomWorkload(prompt=prompt, output=output)
    if "," in name:
        prompt, _, output = name.partition(",")
        return RandomWorkload.parse(prompt, output)
    if name in SARATHI_SERVE:
        prompt, output, longest = SARATHI_SERVE[name]
        return RandomWorkload(
            prompt=_lognormal(*prompt, longest),
            output=_lognormal(*output, longest),
            max_total_tokens=longest,
        )
    require(name in DISTSERVE, f"workload: expected one of {WORKLOADS}", name)
    return RandomWorkload(
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


def _lognormal(median: float, p90: float, longest: int) -> LognormalLengths:
    """Return the log-normal through both quantiles, before it is cut at `longest`."""
    sigma = math.log(p90 / median) / _P90
    return LognormalLengths(median=median, sigma=sigma, high=longest)
