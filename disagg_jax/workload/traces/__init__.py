"""Trace files -> rows -> requests, with every row that is lost on the way counted.

One file per concern: `files` opens and streams, `formats` tells the formats apart,
`clock` finds units, ticks and ties, `read` puts them together, `requests` leaves rows
out and makes requests, `stretches` gives each seed rows of its own.
"""

from disagg_jax.workload.traces.clock import Ties
from disagg_jax.workload.traces.read import Trace, has_times, load_trace, read_trace
from disagg_jax.workload.traces.requests import (
    FittedRows,
    TooLong,
    TraceRequests,
    fit_rows,
    requests_from_trace,
)
from disagg_jax.workload.traces.rows import TraceRow, Unit

__all__ = [
    "FittedRows",
    "Ties",
    "TooLong",
    "Trace",
    "TraceRequests",
    "TraceRow",
    "Unit",
    "fit_rows",
    "has_times",
    "load_trace",
    "read_trace",
    "requests_from_trace",
]
