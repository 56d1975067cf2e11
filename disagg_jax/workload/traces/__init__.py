"""Trace files -> rows, with every row that is lost on the way counted.

`files` opens and streams, `formats` tells the formats apart, `clock` finds ticks and
ties, `read` puts the three together, `fit` leaves out rows that cannot be served, and
`stretches` gives each seed rows of its own.
"""

from disagg_jax.workload.traces.clock import Ties
from disagg_jax.workload.traces.fit import FittedRows, TooLong, fit_rows
from disagg_jax.workload.traces.read import Trace, has_times, load_trace
from disagg_jax.workload.traces.rows import TraceRow, Unit

__all__ = [
    "FittedRows",
    "Ties",
    "TooLong",
    "Trace",
    "TraceRow",
    "Unit",
    "fit_rows",
    "has_times",
    "load_trace",
]
