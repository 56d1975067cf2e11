"""Routers: which instance a request goes to. Ties go to the first instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from disagg_jax.scheduling.interface import InstanceView, RequestView
from models.named import find_named

# The key that a router minimises; ties go to the first instance.
Rank = Callable[[InstanceView], tuple[int, ...]]


class Instances(Protocol):
    """The instances that a request can go to: all of one side that are up.

    Iteration visits each instance. `least` costs the same for any number of instances.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[InstanceView]: ...

    def __getitem__(self, index: int) -> InstanceView: ...

    def least(self, rank: Rank) -> InstanceView:
        """Return the instance of the lowest rank, the first one of equals.

        Args:
          rank: a function of an instance's counts of requests (`queued`, `load`,
            `resident`) only; the index does not notice changes of blocks and contexts.
            Pass the same object in every call: each gets an index of its own.
        """
        ...


Router = Callable[[RequestView, Instances], InstanceView]


def shortest_queue(request: RequestView, instances: Instances) -> InstanceView:
    """Pick the instance with the fewest requests before their first token.

    Break ties by the least load.
    Source: DistServe (OSDI'24) section 4.3, for prefill.
    """
    return instances.least(_queue)


def least_loaded(request: RequestView, instances: Instances) -> InstanceView:
    """Pick the instance with the fewest requests assigned to it.

    Source: DistServe (OSDI'24) section 4.3, for decode.
    """
    return instances.least(_load)


ROUTERS: Mapping[str, Router] = {
    "shortest_queue": shortest_queue,
    "least_loaded": least_loaded,
}


def get_router(name: str, routers: Mapping[str, Router] = ROUTERS) -> Router:
    """Return the router of that name.

    Args:
      name: a key of `routers`, or what `find_named` finds, such as `my_module:mine`.

    Raises:
      ValueError: on an unknown name.
    """
    return find_named(
        name,
        routers,
        kind="router",
        what="a function of a request and instances",
        is_one=callable,
    )


def _queue(instance: InstanceView) -> tuple[int, ...]:
    return instance.queued, instance.load


def _load(instance: InstanceView) -> tuple[int, ...]:
    return (instance.load,)
