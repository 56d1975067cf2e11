"""What is asked of the systems: requests, drawn or read from a trace.

A `Workload` gives the simulator and the engine the same requests. `lengths` has the
distributions of prompt and output lengths, `requests` arrivals and common random
numbers, `traces` the files of published traces, and `closed_loop` clients that wait.
"""

from disagg_jax.workload.closed_loop import ClosedLoop
from disagg_jax.workload.lengths import (
    FixedLengths,
    HistogramLengths,
    Lengths,
    LognormalLengths,
    NormalLengths,
    UniformLengths,
    parse_lengths,
)
from disagg_jax.workload.requests import POISSON, Arrivals, TokenOptions
from disagg_jax.workload.workload import (
    PromptsWorkload,
    RandomWorkload,
    TraceWorkload,
    Workload,
    requests_of_rows,
)

__all__ = [
    "POISSON",
    "Arrivals",
    "ClosedLoop",
    "FixedLengths",
    "HistogramLengths",
    "Lengths",
    "LognormalLengths",
    "NormalLengths",
    "PromptsWorkload",
    "RandomWorkload",
    "TokenOptions",
    "TraceWorkload",
    "UniformLengths",
    "Workload",
    "parse_lengths",
    "requests_of_rows",
]
