"""Errors of simulated latencies against measured ones, of all rows and by groups."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.measured.rows import MeasuredRow
from experiments.measured.served import MeanLatencies, SimulatedRow
from models.lookup import find_model

Quantity = Callable[[MeasuredRow, MeanLatencies], float]


def latency_s(row: MeasuredRow, means: MeanLatencies) -> float:
    """Return the latency of a request with the row's output: TTFT + (n - 1) TPOT."""
    return means.ttft_s + (row.output_tokens - 1) * means.tpot_s


def device_tokens_s(row: MeasuredRow, means: MeanLatencies) -> float:
    """Return the output tokens per second and device: Little's law on the loop."""
    if row.loop is None:
        raise RuntimeError(f"row {row.id} has no loop")
    tokens = row.loop.clients * row.output_tokens
    return tokens / latency_s(row, means) / row.loop.devices


QUANTITIES: Mapping[str, Quantity] = {
    "TPOT": lambda _, means: means.tpot_s,
    "TTFT": lambda _, means: means.ttft_s,
    "request latency": latency_s,
    "tokens/s per GPU": device_tokens_s,
}


def relative_error(found: SimulatedRow, quantity: str) -> float:
    """Return simulated / measured - 1 of one of `QUANTITIES`."""
    measured, simulated = (
        QUANTITIES[quantity](found.row, means) for means in found.latencies
    )
    return simulated / measured - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """What relative errors come to."""

    mape: float  # mean of the absolute errors
    median: float  # of the absolute errors
    p90: float  # of the absolute errors
    signed: float  # mean

    @classmethod
    def of(cls, errors: Sequence[float]) -> Errors:
        """Summarise at least one error."""
        absolute = np.abs(errors)
        return cls(
            mape=float(absolute.mean()),
            median=float(np.median(absolute)),
            p90=float(np.percentile(absolute, 90)),
            signed=statistics.fmean(errors),
        )


def errors_of(found: Sequence[SimulatedRow]) -> dict[str, Errors]:
    """Return the errors of each quantity over rows that were simulated."""
    return {
        quantity: Errors.of([relative_error(one, quantity) for one in found])
        for quantity in QUANTITIES
    }


# -- groups ----------------------------------------------------------------------------


def _kind(one: SimulatedRow) -> str:
    """Return what a simulator must know for a row, from the simplest kind on."""
    row, dense = one.row, find_model(one.row.model).is_dense
    if row.may_speculate:
        return "6 one token a step or several, not marked"
    if row.mode == "disagg":
        who = "5 dense" if dense else "4 experts"
        return f"{who}, prefill and decode workers"
    if not dense:
        return "3 experts"
    return "1 dense, 16 bits" if row.precision == "bf16" else "2 dense, 8 or 4 bits"


def _clients(one: SimulatedRow) -> int:
    """Return the least power of two that the loop's clients do not exceed."""
    return 1 << ((one.row.loop.clients if one.row.loop else 1) - 1).bit_length()


GROUPS: Mapping[str, Callable[[SimulatedRow], str | int]] = {
    "kind": _kind,
    "engine's profile": lambda one: one.profile,
    "model": lambda one: one.row.model,
    "GPU": lambda one: one.row.hardware,
    "precision": lambda one: one.row.precision,
    "mode": lambda one: one.row.mode,
    "parallelism": lambda one: one.row.loop.parallelism if one.row.loop else "",
    "clients, at most": _clients,
}


def grouped(found: Sequence[SimulatedRow], group: str) -> dict[str, list[SimulatedRow]]:
    """Return the rows by what they have in common, in the order of its values."""
    groups: dict[str | int, list[SimulatedRow]] = {}
    for one in found:
        groups.setdefault(GROUPS[group](one), []).append(one)
    return {str(value): groups[value] for value in sorted(groups)}
