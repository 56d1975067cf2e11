"""Which instance a request goes to. Ties go to the first instance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg_jax.scheduling.view import InstanceView

Router = Callable[[Sequence[InstanceView]], InstanceView]


def shortest_queue(instances: Sequence[InstanceView]) -> InstanceView:
    """The instance with the fewest requests before their first token, then least load.

    Source: DistServe (OSDI'24) section 4.3, for prefill.
    """
    return min(instances, key=lambda instance: (instance.queued, instance.load))


def least_loaded(instances: Sequence[InstanceView]) -> InstanceView:
    """The instance with the fewest requests assigned to it.

    Source: DistServe (OSDI'24) section 4.3, for decode.
    """
    return min(instances, key=lambda instance: instance.load)
