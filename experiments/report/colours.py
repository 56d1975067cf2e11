"""The colours of pictures: a system has the same one in each of them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping

from disagg_jax.scheduling import find_system

# Okabe and Ito's colours, which stay apart for the colour-blind; then six of Paul
# Tol's, for more systems than those name.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#999999"),
    *("#882255", "#44AA99", "#999933", "#332288", "#DDCC77", "#AA4499"),
)
DARK = (0, 2, 6, 8, 11)  # colours that black letters cannot be read on
NO_SYSTEM = 7  # the colour of what is no system's

_SYSTEMS: Mapping[str, int] = {
    "disaggregated": 0,
    "vllm_v0": 1,
    "sarathi_serve": 2,
    "splitfuse": 3,
    "vllm_v1": 4,
    "disaggregated_chunked": 5,
    "orca": 6,
    "sarathi": 8,
    "tensorrt_llm": 9,
}
_OWN = (10, 11, 12, 13)
# Systems by the names that papers give them.
_OF_PAPERS: Mapping[str, str] = {
    "DeepSpeed-MII": "splitfuse",
    "DistServe": "disaggregated",
    "DistServe-Low": "disaggregated",
    "Orca": "orca",
    "SARATHI": "sarathi",
    "Sarathi-Serve": "sarathi_serve",
    "SplitFuse": "splitfuse",
    "vLLM": "vllm_v0",
}


def system_colours(systems: Iterable[str]) -> dict[str, int]:
    """Return the index in `COLOURS` of each system, by names here or in a paper.

    A system of one's own has a colour by its name. If another own system of the picture
    has that colour already, the next free one.
    """
    names = list(systems)
    known = {name: _known(name) for name in names}
    found = {name: colour for name, colour in known.items() if colour is not None}
    for name in sorted(set(names) - found.keys()):
        found[name] = _own(name, set(found.values()))
    return {name: found[name] for name in names}


def system_colour(system: str) -> int:
    """Return the colour of a system beside which there is no own one."""
    return system_colours([system])[system]


def _known(name: str) -> int | None:
    return _SYSTEMS.get(find_system(_OF_PAPERS.get(name, name), _SYSTEMS))


def _own(name: str, taken: set[int]) -> int:
    first = zlib.crc32(name.encode()) % len(_OWN)
    turned = [*_OWN[first:], *_OWN[:first]]
    others = (c for c in range(len(COLOURS)) if c not in (*_OWN, NO_SYSTEM))
    free = (c for c in itertools.chain(turned, others) if c not in taken)
    return next(free, turned[0])
