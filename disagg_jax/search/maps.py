"""Maps: workloads with targets over two axes, and the regions of a verdict."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

from disagg_jax.errors import require
from disagg_jax.metrics.attainment import SLO
from disagg_jax.workload.lengths import FixedLengths, Lengths, LognormalLengths
from disagg_jax.workload.workload import RandomWorkload, Workload

# Verdicts on a cell, beside `scheduling.DISAGGREGATED`.
COLOCATED, UNCLEAR, INFEASIBLE = "colocated", "no clear winner", "infeasible"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A workload and its targets."""

    workload: Workload
    slo: SLO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The quantity that changes along one side of a map.

    Raises:
      ValueError: unless the values rise and are above 0.
    """

    name: str
    unit: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = itertools.pairwise((0.0, *self.values))
        rises = len(self.values) > 0 and all(a < b for a, b in pairs)
        expected = f"{self.name}: expected one or more values that rise from above 0"
        require(rises, expected, list(self.values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Cells over two axes."""

    name: str
    fixed: str  # the conditions of all cells
    x: Axis
    y: Axis
    cells: Mapping[tuple[int, int], Cell]  # by the indices of x and y

    def where(self, at: tuple[int, int]) -> str:
        """Return the values of a cell's axes."""
        x, y = self.x.values[at[0]], self.y.values[at[1]]
        return f"{self.x.name} {x:g}, {self.y.name} {y:g} {self.y.unit}"


def lengths_map(
    prompts: Sequence[float],
    outputs: Sequence[float],
    sigma: float,
    slo: SLO,
    max_tokens: int,
) -> Map:
    """Return the map of mean prompt length x mean output length.

    Args:
      sigma: of the logarithm of both lengths; 0 gives all requests the mean.
      max_tokens: of a request; longer requests lose output.

    Raises:
      ValueError: on bad axes or lengths, or if a mean request is too long.
    """
    x = Axis(name="mean prompt", unit="tokens", values=tuple(prompts))
    y = Axis(name="mean output", unit="tokens", values=tuple(outputs))
    longest = x.values[-1] + y.values[-1]
    expected = f"prompts, outputs: expected {max_tokens} tokens together at most"
    require(longest <= max_tokens, expected, longest)
    lengths = functools.partial(_lengths, sigma=sigma, high=max_tokens)
    cells = {
        (i, j): Cell(
            workload=RandomWorkload(
                prompt=lengths(prompt),
                output=lengths(output),
                max_total_tokens=max_tokens,
            ),
            slo=slo,
        )
        for i, prompt in enumerate(x.values)
        for j, output in enumerate(y.values)
    }
    spread = f"log-normal lengths, sigma {sigma:g}" if sigma else "fixed lengths"
    fixed = f"{spread}; {slo}"
    return Map(name="lengths", fixed=fixed, x=x, y=y, cells=cells)


def _lengths(mean: float, sigma: float, high: int) -> Lengths:
    if sigma == 0:
        return FixedLengths(tokens=int(mean))
    return LognormalLengths.from_mean(mean=mean, sigma=sigma, high=high)


def slos_map(
    ttfts_s: Sequence[float], tpots_s: Sequence[float], workload: Workload, name: str
) -> Map:
    """Return the map of TTFT target x TPOT target.

    Raises:
      ValueError: on bad axes.
    """
    x = Axis(name="TTFT target", unit="s", values=tuple(ttfts_s))
    y = Axis(name="TPOT target", unit="s", values=tuple(tpots_s))
    cells = {
        (i, j): Cell(workload=workload, slo=SLO(ttft_s=ttft_s, tpot_s=tpot_s))
        for i, ttft_s in enumerate(x.values)
        for j, tpot_s in enumerate(y.values)
    }
    return Map(name="targets", fixed=f"workload {name}", x=x, y=y, cells=cells)


# ---- where a verdict holds -----------------------------------------------------------

Region = tuple[range, range]  # indices of x and of y


def regions(verdicts: Mapping[tuple[int, int], str], wanted: str) -> list[Region]:
    """Return rectangles that cover all cells with the verdict `wanted`, largest first.

    The rectangles also cover infeasible cells, and no others, nor any without verdict.
    """
    xs, ys = (1 + max(at[axis] for at in verdicts) for axis in (0, 1))
    pure = [
        (x, y)
        for x, y in itertools.product(_ranges(xs), _ranges(ys))
        if {verdicts.get(at) for at in itertools.product(x, y)} <= {wanted, INFEASIBLE}
    ]
    left = {at for at, verdict in verdicts.items() if verdict == wanted}
    chosen: list[Region] = []
    while left:
        best = max(pure, key=lambda r: len(left.intersection(itertools.product(*r))))
        chosen.append(best)
        left.difference_update(itertools.product(*best))
    return chosen


def _ranges(n: int) -> list[range]:
    return [range(i, j) for i in range(n) for j in range(i + 1, n + 1)]
