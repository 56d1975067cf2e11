"""The highest rate that attains, the best deployment, and the best system.

`rates` chooses which rates to try. `goodput` finds the goodput of one simulated
deployment, with runs cut short by `early_stop` and a first rate from `capacity`.
`candidates` finds the best of several deployments; `placement` (DistServe's algorithms)
and `comparison` (which system wins a workload with its targets) use it.
`cells` compares systems over `maps`, with seeds enough to tell. Of one cell, `layouts`
completes the goodputs, and `fewest` finds the fewest devices that serve a rate.
"""

from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput

__all__ = ["GoodputSearch", "SimGoodput", "find_goodput"]
