"""What each paper calls good, as criteria that score a run.

A criterion with a `target` scores a run by a share in [0, 1], and the run passes if the
share reaches the target: a system's capacity is its highest passing rate, which
`search.rates.search` finds. A criterion without a target scores by a throughput, and a
system's figure is its best throughput over the rates (`search.rates.climb`).

The defaults are the papers' numbers. Seconds belong to the paper's hardware, so
`for_slo` replaces them by one SLO of the machine at hand.

The edge rules are those of `metrics`: every request that arrived counts, only a
FINISHED one can be good, a one-token request meets any target for its gaps, and a
latency equal to its target meets it, also where a paper writes `<`.
`percentile_limits` says what these rules mean for percentiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.metrics import SLO
from disagg_jax.metrics.percentile_limits import (
    Bound,
    Latencies,
    PercentileBounds,
    e2e,
    finished,
    in_ms,
    scheduling_delay,
    share_of,
    tbt,
    tpot,
    ttft,
)
from disagg_jax.metrics.summary import span_s
from disagg_jax.request import Request, Timeline


class Criterion(Protocol):
    """Scores one run; `str` of it is the definition, bounds included."""

    @property
    def target(self) -> float | None:
        """The share, in (0, 1], that passes; None for a throughput."""
        ...

    @property
    def unit(self) -> str:
        """Of the figure that a system gets: its highest passing rate, or best score."""
        ...

    def score(self, run: Sequence[Timeline]) -> float:
        """A share in [0, 1], or a throughput of the whole deployment."""
        ...


# ---- shares of good requests ---------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistServe:
    """Share of requests within TTFT and TPOT, the mean over a request (OSDI'24)."""

    slo: SLO
    target: float = 0.9  # or 0.99
    unit = "requests/s"

    def score(self, run: Sequence[Timeline]) -> float:
        return metrics.attainment(run, self.slo).joint

    def __str__(self) -> str:
        ttft, tpot = in_ms(self.slo.ttft_s), in_ms(self.slo.tpot_s)
        return f"{self.target:.0%} of requests with TTFT <= {ttft} and TPOT <= {tpot}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mooncake:
    """Share of requests within TTFT and TBT, the mean of a request's slowest gaps.

    The paper (arXiv 2407.00079) plots shares at TBT bounds of 100, 200 and 300 ms; the
    target of 90 % is DistServe's. Of n gaps the longest ceil(n / 10) are taken: the
    paper's 10 %, at least one.
    """

    ttft_s: float = 30.0
    tbt_s: float = 0.1  # or 0.2, 0.3
    target: float = 0.9
    unit = "requests/s"

    def score(self, run: Sequence[Timeline]) -> float:
        return share_of([self._is_good(timeline) for timeline in run])

    def _is_good(self, timeline: Timeline) -> bool:
        return (
            finished(timeline)
            and metrics.ttft_s(timeline) <= self.ttft_s
            and slowest_gaps_s(timeline) <= self.tbt_s
        )

    def __str__(self) -> str:
        return (
            f"{self.target:.0%} of requests with TTFT <= {in_ms(self.ttft_s)} and mean "
            f"of the longest 10 % of gaps <= {in_ms(self.tbt_s)}"
        )


def slowest_gaps_s(timeline: Timeline) -> float:
    """Return the mean of the longest tenth of a request's gaps; 0 without gaps."""
    gaps_s = sorted(metrics.itl_s(timeline), reverse=True)
    if not gaps_s:
        return 0.0
    slowest_s = gaps_s[: math.ceil(len(gaps_s) / 10)]
    return math.fsum(slowest_s) / len(slowest_s)


# ---- bounds on percentiles -----------------------------------------------------------


def sarathi_serve(*, tbt_s: float = 0.1, delay_s: float = 2.0) -> PercentileBounds:
    """Return Sarathi-Serve's bounds (OSDI'24) on stalls and backlog; none on TTFT.

    Args:
      tbt_s: for a P99 over all gaps of all requests. The paper takes 5 (strict) or 25
        times a decode step of 32 requests with a context of 4k: 0.1 and 0.5 s for
        Mistral-7B, 0.2 and 1 s for Yi-34B, 1 and 5 s for Llama2-70B and Falcon-180B.
      delay_s: for the median scheduling delay, which guards against a growing queue.
    """
    return PercentileBounds(
        bounds=(
            Bound(what="TBT", latencies=tbt, share=0.99, limit=tbt_s),
            _delay_bound(0.5, delay_s),
        )
    )


def vidur_search(
    *, delay_s: float = 5.0, ttft_s: float = 2.0, tbt_s: float = 0.2
) -> PercentileBounds:
    """Return the SLOs of Vidur-Search (MLSys'24), which reports rate per dollar."""
    return PercentileBounds(
        bounds=(
            _delay_bound(0.99, delay_s),
            Bound(what="TTFT", latencies=ttft, share=0.9, limit=ttft_s),
            Bound(what="TBT", latencies=tbt, share=0.99, limit=tbt_s),
        )
    )


def mlperf(slo: SLO) -> PercentileBounds:
    """Return the bounds of MLPerf's server scenario: P99 of TTFT and P99 of TPOT.

    The rules also ask for a Poisson run of at least 600 s. `MLPERF_SLOS` has the bounds
    of the models.
    """
    return PercentileBounds(
        bounds=(
            Bound(what="TTFT", latencies=ttft, share=0.99, limit=slo.ttft_s),
            Bound(what="TPOT", latencies=tpot, share=0.99, limit=slo.tpot_s),
        )
    )


def _delay_bound(share: float, delay_s: float) -> Bound:
    return Bound(
        what="scheduling delay", latencies=scheduling_delay, share=share, limit=delay_s
    )


# MLPerf Inference, loadgen/mlperf.conf: server scenario.
MLPERF_SLOS: Mapping[str, SLO] = {
    "llama2-70b": SLO(ttft_s=2.0, tpot_s=0.2),
    "llama2-70b-interactive": SLO(ttft_s=0.45, tpot_s=0.04),
    "llama3.1-8b": SLO(ttft_s=2.0, tpot_s=0.1),
    "llama3.1-8b-interactive": SLO(ttft_s=0.5, tpot_s=0.03),
    "llama3.1-405b": SLO(ttft_s=6.0, tpot_s=0.175),
    "llama3.1-405b-interactive": SLO(ttft_s=4.5, tpot_s=0.08),
    "mixtral-8x7b": SLO(ttft_s=2.0, tpot_s=0.2),
    "deepseek-r1": SLO(ttft_s=2.0, tpot_s=0.08),
    "deepseek-r1-interactive": SLO(ttft_s=1.5, tpot_s=0.015),
    "gpt-oss-120b": SLO(ttft_s=3.0, tpot_s=0.08),
    "gpt-oss-120b-interactive": SLO(ttft_s=2.0, tpot_s=0.02),
}


# ---- slowdowns over the unloaded latency ---------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnloadedLatency:
    """The latencies of a request that finds the system empty."""

    ttft_s: float
    tpot_s: float


Unloaded = Callable[[Request], UnloadedLatency]

_SPLITWISE_SHARES = (0.5, 0.9, 0.99)
_SPLITWISE_FACTORS: Mapping[str, tuple[Latencies, tuple[float, float, float]]] = {
    "TTFT": (ttft, (2.0, 3.0, 6.0)),
    "TBT": (tpot, (1.25, 1.5, 5.0)),
    "E2E": (e2e, (1.25, 1.5, 5.0)),
}


def splitwise(unloaded: Unloaded) -> PercentileBounds:
    """Return Splitwise's nine slowdowns (ISCA'24): TTFT, TBT, E2E at P50, P90, P99.

    As in splitwise-sim, TBT is a request's mean gap, and the unloaded E2E is the TTFT
    plus (n - 1) times the TBT.

    Args:
      unloaded: of the machine that slowdowns refer to, the same for all systems (a
        DGX-A100 in the paper).
    """
    bounds: list[Bound] = []
    for what, (latencies, factors) in _SPLITWISE_FACTORS.items():
        slowdown = _Slowdown(latencies=latencies, what=what, unloaded=unloaded)
        bounds += [
            Bound(
                what=f"{what} slowdown",
                latencies=slowdown,
                share=share,
                limit=factor,
                is_factor=True,
            )
            for share, factor in zip(_SPLITWISE_SHARES, factors, strict=True)
        ]
    return PercentileBounds(bounds=tuple(bounds))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # so it is hashable
class _Slowdown:
    """Latencies over the unloaded latencies of the same request."""

    latencies: Latencies
    what: str
    unloaded: Unloaded

    def __call__(self, timeline: Timeline) -> Sequence[float]:
        alone = self.unloaded(timeline.request)
        alone_s = {
            "TTFT": alone.ttft_s,
            "TBT": alone.tpot_s,
            "E2E": alone.ttft_s + (len(timeline.token_s) - 1) * alone.tpot_s,
        }[self.what]
        return [_ratio(value, alone_s) for value in self.latencies(timeline)]


def _ratio(latency_s: float, alone_s: float) -> float:
    if alone_s == 0:  # the machine takes no time for it
        return 1.0 if latency_s == 0 else latency_s * math.inf
    return latency_s / alone_s


# ---- throughputs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastGen:
    """Effective throughput (DeepSpeed-FastGen): good requests/s.

    Good means a prompt latency, our TTFT, of at most `prompt_token_s` a prompt token
    and, at every token, a moving average of the gaps so far of at most `token_s`. The
    blog does not define the average (EMA), but its benchmark does (DeepSpeedExamples,
    benchmarks/inference/mii/src/plot_effective_throughput.py): pandas' `ewm(span=16)`
    over the gaps after the first token. The time is from first arrival to last end.
    """

    prompt_token_s: float = 1 / 512  # 512 prompt tokens/s
    token_s: float = 1 / 4  # 4 tokens/s; or 1/2, 1/6
    span: int = 16  # of the moving average, in gaps
    target = None
    unit = "good requests/s"

    def __post_init__(self) -> None:
        for name in ("prompt_token_s", "token_s", "span"):
            value = getattr(self, name)
            require(value > 0, f"fastgen {name}: expected > 0", value)

    def score(self, run: Sequence[Timeline]) -> float:
        return _per_s(sum(self._is_good(timeline) for timeline in run), run)

    def _is_good(self, timeline: Timeline) -> bool:
        if not finished(timeline):
            return False
        limit_s = timeline.request.prompt_tokens * self.prompt_token_s
        averages_s = moving_averages(metrics.itl_s(timeline), self.span)
        return metrics.ttft_s(timeline) <= limit_s and all(
            average_s <= self.token_s for average_s in averages_s
        )

    def __str__(self) -> str:
        return (
            f"TTFT <= {in_ms(self.prompt_token_s)} a prompt token and moving average "
            f"of gaps <= {in_ms(self.token_s)}"
        )


def moving_averages(values: Iterable[float], span: int) -> Iterator[float]:
    """Yield the exponentially weighted mean of the values up to each value.

    Each value counts 1 - 2 / (span + 1) times as much as the next value, and the
    weights are divided by their sum (pandas' `ewm(span).mean()`).
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    for value in values:
        total = value + decay * total
        weight = 1 + decay * weight
        yield total / weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class SarathiThroughput:
    """Tokens per ms of a saturated system (SARATHI, arXiv 2308.16369); no SLO.

    Prompt and generated tokens of finished requests, from the first arrival to the last
    end, at the rate where this throughput is highest.
    """

    target = None
    unit = "tokens/ms"

    def score(self, run: Sequence[Timeline]) -> float:
        served = [timeline for timeline in run if finished(timeline)]
        tokens = sum(t.request.prompt_tokens + len(t.token_s) for t in served)
        return _per_s(tokens, run) / 1e3

    def __str__(self) -> str:
        return "prompt and generated tokens, saturated"


def _per_s(count: int, run: Sequence[Timeline]) -> float:
    seconds = span_s(run)
    return 0.0 if seconds is None else count / seconds


# ---- all of them ---------------------------------------------------------------------

NAMES = (
    "distserve",
    "sarathi_serve",
    "vidur_search",
    "mlperf",
    "mooncake",
    "splitwise",
    "fastgen",
    "sarathi",
)


def for_slo(
    slo: SLO, *, target: float, prompt_tokens: int, unloaded: Unloaded
) -> dict[str, Criterion]:
    """Return every criterion by name, with bounds for the machine of `slo`.

    A paper's TBT bound becomes `slo.tpot_s`, its TTFT bound `slo.ttft_s`. For single
    gaps that is strict where `slo` was chosen for means: Sarathi-Serve's own bound is 5
    or 25 decode steps. And:

    * a median scheduling delay (Sarathi-Serve) is bounded by `slo.ttft_s`, and its P99
      (Vidur-Search) by 2.5 times that, which is 5 s over 2 s;
    * FastGen's rates become `prompt_tokens` in `slo.ttft_s`, and a token each
      `slo.tpot_s`; shorter prompts get less time, as in the blog;
    * Splitwise's factors are kept: they refer to unloaded latencies anyway.

    Args:
      target: of the criteria that are a share of good requests.
      prompt_tokens: of a long prompt, for FastGen.
      unloaded: for Splitwise.
    """
    criteria: tuple[Criterion, ...] = (
        DistServe(slo=slo, target=target),
        sarathi_serve(tbt_s=slo.tpot_s, delay_s=slo.ttft_s),
        vidur_search(delay_s=2.5 * slo.ttft_s, ttft_s=slo.ttft_s, tbt_s=slo.tpot_s),
        mlperf(slo),
        Mooncake(ttft_s=slo.ttft_s, tbt_s=slo.tpot_s, target=target),
        splitwise(unloaded),
        FastGen(prompt_token_s=slo.ttft_s / prompt_tokens, token_s=slo.tpot_s),
        SarathiThroughput(),
    )
    return dict(zip(NAMES, criteria, strict=True))
