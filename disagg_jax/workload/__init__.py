"""What is asked of the systems: requests, drawn or read from a trace.

A `Workload` gives the simulator and the engine the same requests. `lengths` has the
distributions of prompt and output lengths, `requests` arrivals and common random
numbers, `traces` the files of published traces, and `closed_loop` clients that wait.
"""

from disagg_jax.workload.lengths import (
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    UniformLengths,
)
from disagg_jax.workload.requests import Arrivals, TokenOptions
from disagg_jax.workload.workload import (
    PromptsWorkload,
    RandomWorkload,
    TraceWorkload,
    Workload,
    requests_of_rows,
)

__all__ = [
    "Arrivals",
    "FixedLengths",
    "HistogramLengths",
    "LognormalLengths",
    "PromptsWorkload",
    "RandomWorkload",
    "TokenOptions",
    "TraceWorkload",
    "UniformLengths",
    "Workload",
    "requests_of_rows",
]
