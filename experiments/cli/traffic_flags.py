"""The flags of a command that simulates traffic: a trace or a workload, at rates."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.sim import Simulation
from disagg_jax.workload import Arrivals
from experiments.cli.flags import Flags, expect_used, rates_rps
from experiments.cli.trace_flags import TraceFlags
from experiments.configs.named_simulations import trace_requests_at
from experiments.configs.paper_workloads import WORKLOADS, get_workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The requests of a simulation, at one or several rates."""

    said: str  # where they come from
    record: Mapping[str, Any]  # what they follow from, as JSON
    # By rate in requests/s of the whole deployment; None is that of the trace.
    requests: Mapping[float | None, Sequence[Request]]


class TrafficFlags:
    """Flags for what arrives, and how often, in a command's namespace `own`."""

    def __init__(self, own: Flags):
        self._trace = own.string("trace", None, "A file of arrivals and lengths.")
        self._trace_file = TraceFlags(own)
        self._workload = own.string(
            "workload", None, f"Instead of a trace: {WORKLOADS}."
        )
        self._requests = own.integer(
            "num_requests", 1000, "Of a workload.", lower_bound=1
        )
        self._seed = own.integer("seed", 0, "Of a workload.", lower_bound=0)
        self._arrivals = own.enum(
            "arrivals",
            "poisson",
            ["poisson", "gamma", "fixed"],
            "How a workload's requests are spread in time.",
        )
        self._burstiness = own.float(
            "burstiness", 1.0, "Shape of gamma arrivals: below 1 they come in bursts."
        )
        self._rate = own.list(
            "rate",
            None,
            "Requests/s of the whole deployment; several, as 2,4,8, make a table and a "
            "curve. A trace's time is stretched to it, by default not; a workload and "
            "a trace without times need it.",
        )

    def read(self, simulation: Simulation) -> Traffic:
        """Return what the flags ask for, with the tokens that a simulation adds.

        Raises:
          ValueError, OSError: on a trace or a workload that cannot be read, both or
            none of them, or a flag without effect.
        """
        trace, workload = self._trace.value, self._workload.value
        given = f"--trace={trace} and --workload={workload}"
        expected = "traffic: expected either --trace or --workload"
        require((trace is None) != (workload is None), expected, given)
        rates = rates_rps("--rate", self._rate.value or [])
        if workload is None:
            return self._of_trace(trace or "", simulation, rates)
        return self._of_workload(workload, simulation, rates)

    def _of_trace(
        self, path: str, simulation: Simulation, rates: Sequence[float]
    ) -> Traffic:
        of_workload = (self._requests, self._seed, self._arrivals, self._burstiness)
        got = f"--trace={path}"
        expect_used(False, *of_workload, expected="--workload", got=got)
        trace = self._trace_file.open(path)
        digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
        return Traffic(
            said=str(trace),
            record={"trace": trace.facts, "trace_sha256": digest},
            requests=trace_requests_at(trace, simulation, rates or [None]),
        )

    def _of_workload(
        self, name: str, simulation: Simulation, rates: Sequence[float]
    ) -> Traffic:
        of_trace, got = self._trace_file.holders, f"--workload={name}"
        expect_used(False, *of_trace, expected="--trace", got=got)
        require(bool(rates), f"--rate: expected requests/s of --workload={name}", None)
        n, seed, shape = self._requests.value, self._seed.value, self._burstiness.value
        # Any: an enum of absl is plain text.
        kind: Any = self._arrivals.value
        workload = dataclasses.replace(
            get_workload(name),
            arrivals=Arrivals(kind=kind, burstiness=shape),
            extra_tokens=simulation.extra_tokens,
        )
        return Traffic(
            said=f"workload {name}, {kind} arrivals, seed {seed}",
            record={
                "workload": name,
                "num_requests": n,
                "seed": seed,
                "arrivals": {"kind": kind, "burstiness": shape},
            },
            requests={rate: workload.requests(n, rate, seed) for rate in rates},
        )
