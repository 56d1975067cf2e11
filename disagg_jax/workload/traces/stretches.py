"""Which rows each seed gets: stretches of a trace that share no row while it lasts.

The same rule serves both lists from which seeds take: rows of a trace, and prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from disagg_jax.workload.traces.rows import TraceRow

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are far apart on a circle


def first_of(seed: int, n: int, count: int) -> int:
    """Return where the run of a seed begins in a list of `count` entries.

    Consecutive seeds have neighbouring stretches of `n`. In a list that is shorter than
    `n`, each seed has all entries, beginning at a place of its own.
    """
    return seed * n % count if n < count else round(_GOLDEN * seed * count) % count


def stretch(rows: Sequence[TraceRow], n: int, seed: int) -> list[TraceRow]:
    """Return the `n` rows of a seed, with the gaps of the trace.

    The trace begins again when it ends, one mean gap after its last row.
    """
    count, start = len(rows), first_of(seed, n, len(rows))
    if start + n <= count:
        return list(rows[start : start + n])
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    lap_s = span_s * count / max(1, count - 1)
    return [
        rows[i % count]._replace(
            arrival_s=rows[i % count].arrival_s + i // count * lap_s
        )
        for i in range(start, start + n)
    ]


def why_shared(seeds: Sequence[int], n: int, count: int, what: str) -> str:
    """Say why runs of `n` are no independent samples; '' if no two share an entry.

    The spread of runs that share rows says little about another trace.
    """
    starts = sorted(first_of(seed, n, count) for seed in seeds)
    gaps = [b - a for a, b in itertools.pairwise([*starts, starts[0] + count])]
    if len(seeds) < 2 or min(gaps) >= n:
        return ""
    enough = count >= n * len(seeds)
    which = f"seeds {', '.join(map(str, seeds))}: " if enough else ""
    return (
        f"{which}{len(seeds)} runs x {n} requests share the {count} {what}, so they "
        "are no independent samples"
    )
