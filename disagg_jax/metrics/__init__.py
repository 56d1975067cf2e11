"""The only definitions of latency, attainment, goodput and their intervals.

Names and formulas are vLLM's `bench serve` (0.33): TTFT = first token - arrival, E2EL =
last token - arrival, TPOT = (last - first token) / (n - 1), ITL = every gap between two
tokens of a request, pooled over requests. So E2EL = TTFT + (n - 1) * TPOT always.
Attainment and goodput are DistServe's (OSDI'24). Seconds everywhere.

The edge rules, where tools differ:

* Every request that arrived is in the denominator of attainment.
* Only a FINISHED request can be good. Unfinished, refused and cancelled requests are
  missed, and are left out of latency statistics.
* A one-token request has TPOT 0, so it meets any TPOT target; it is left out of TPOT
  statistics.
* A latency equal to its target meets it (`<=`).

`criteria` has what other papers call good, `summary` one run under vLLM's keys, and
`ranking` the systems in the order of each criterion.
"""

from disagg_jax.metrics.attainment import (
    SLO,
    Attainment,
    attainment,
    is_steady,
    meets,
    meets_tpot,
    meets_ttft,
)
from disagg_jax.metrics.goodput import (
    BestRate,
    Goodput,
    GoodputEstimate,
    Inversion,
    best_rate,
    estimate,
    find_inversion,
    goodput,
    is_resolved,
)
from disagg_jax.metrics.intervals import (
    Interval,
    Margin,
    interval_across,
    look_confidence,
    margin,
    rate_interval,
    runs_to_tell,
    unpaired_margin,
)
from disagg_jax.metrics.latency import (
    Stages,
    e2e_s,
    itl_s,
    pooled_itl_s,
    stage_spans_s,
    stages_s,
    tpot_s,
    ttft_s,
)

__all__ = [
    "Attainment",
    "BestRate",
    "Goodput",
    "GoodputEstimate",
    "Interval",
    "Inversion",
    "Margin",
    "SLO",
    "Stages",
    "attainment",
    "best_rate",
    "e2e_s",
    "estimate",
    "find_inversion",
    "goodput",
    "interval_across",
    "is_resolved",
    "is_steady",
    "itl_s",
    "look_confidence",
    "margin",
    "meets",
    "meets_tpot",
    "meets_ttft",
    "pooled_itl_s",
    "rate_interval",
    "runs_to_tell",
    "stage_spans_s",
    "stages_s",
    "tpot_s",
    "ttft_s",
    "unpaired_margin",
]
