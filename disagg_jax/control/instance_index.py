"""The instances of one side that are up, ranked without a visit to all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence

from disagg_jax.control.instance_state import InstanceState
from disagg_jax.scheduling.routing import Rank


class InstanceIndex:
    """The `Instances` that a router sees.

    Attributes:
      up: the instances that are up; their records may lag behind their spans.
      touched: ids of instances whose counts may have changed; others add to it.

    Args:
      instances: all instances of one side, in the deployment's order.
      look: brings an instance up to date; called before one is handed out for reading.
    """

    def __init__(
        self, instances: Sequence[InstanceState], look: Callable[[InstanceState], None]
    ):
        self._all = {instance.id: instance for instance in instances}
        self._look = look
        self.up: list[InstanceState] = []
        self._by: dict[Rank, _Ranking] = {}
        self.touched: set[int] = set()
        self.find_up()

    def __len__(self) -> int:
        return len(self.up)

    def __iter__(self) -> Iterator[InstanceState]:
        for instance in self.up:
            self._look(instance)
            yield instance

    def __getitem__(self, index: int) -> InstanceState:
        instance = self.up[index]
        self._look(instance)
        return instance

    def __contains__(self, instance: object) -> bool:
        return isinstance(instance, InstanceState) and (
            instance.up and self._all.get(instance.id) is instance
        )

    def find_up(self) -> None:
        """Find the instances that are up again, after a loss or a return."""
        self.up = [instance for instance in self._all.values() if instance.up]
        self._by.clear()

    def least(self, rank: Rank) -> InstanceState:
        """Return the instance of the lowest rank, as `Instances.least` says."""
        for ranking in self._by.values():
            for id in self.touched:
                if self._all[id].up:
                    ranking.update(self._all[id])
        self.touched.clear()
        if rank not in self._by:
            self._by[rank] = _Ranking(rank, self.up)
        return self._by[rank].first(self._all)


class _Ranking:
    """Instances by a rank: a heap with an entry at or below each one's present rank.

    A risen rank is noticed when its entry comes to the top, which most never do.
    """

    def __init__(self, rank: Rank, instances: Sequence[InstanceState]):
        self._rank = rank
        # By instance: its valid entry in the heap, its rank and then its id.
        self._entered = {i.id: (*rank(i), i.id) for i in instances}
        self._heap = list(self._entered.values())
        heapq.heapify(self._heap)

    def update(self, instance: InstanceState) -> None:
        """Enter an instance again if its rank has fallen."""
        entry = (*self._rank(instance), instance.id)
        if entry < self._entered[instance.id]:
            self._entered[instance.id] = entry
            heapq.heappush(self._heap, entry)

    def first(self, instances: Mapping[int, InstanceState]) -> InstanceState:
        """Return the first instance of the lowest rank."""
        heap, entered = self._heap, self._entered
        while True:
            id = heap[0][-1]
            if entered[id] is not heap[0]:  # the instance was entered again
                heapq.heappop(heap)
                continue
            entry = (*self._rank(instances[id]), id)
            if entry == heap[0]:
                return instances[id]
            entered[id] = entry
            heapq.heapreplace(heap, entry)
