"""How far two runs of the same requests decided alike."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterable

from disagg_jax.runlog.event_log import LoggedStep, LoggedTransfer, read_turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two runs decided alike, in steps and transfers of the first run."""

    decided: int
    shared: int  # with the second run, whenever they happened there
    before: int  # the first difference on each instance; summed over instances


def agreement(ours: Iterable[str], theirs: Iterable[str]) -> Agreement:
    """Compare two event logs of equal requests on the same deployment."""
    first, second = _decisions(ours), _decisions(theirs)
    counts = [
        collections.Counter(itertools.chain.from_iterable(found.values()))
        for found in (first, second)
    ]
    before = 0
    for instance, decided in first.items():
        pairs = zip(decided, second.get(instance, []), strict=False)
        same = [a == b for a, b in pairs]
        before += same.index(False) if False in same else len(same)
    return Agreement(
        decided=counts[0].total(), shared=(counts[0] & counts[1]).total(), before=before
    )


def _decisions(lines: Iterable[str]) -> dict[int, list[Hashable]]:
    """Return each instance's work in order; a transfer belongs to its destination."""
    found: dict[int, list[Hashable]] = collections.defaultdict(list)
    for _, _, works in read_turns(lines):
        for work in works:
            if isinstance(work, LoggedStep):
                found[work.instance].append((work.instance, *work.slices))
            elif isinstance(work, LoggedTransfer):
                found[work.dst].append((work.request, work.src, work.dst))
    return found
