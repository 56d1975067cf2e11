"""Rules that paged decode policies share: all decode, the latest arrival makes room.

Source: vLLM v0's preemption by recompute, as in microsoft/sarathi-serve @ 96f9911.
"""

from __future__ import annotations

from disagg_jax.scheduling.interface import InstanceView, Plan, RequestView

FOREVER = 1 << 60  # `Plan.repeats` of a plan that never changes by itself


def decode_all(instance: InstanceView) -> Plan:
    """Plan one token for every running request.

    A request whose last block is full needs another. If none is free, the latest
    arrival loses its KV and is recomputed later, at last the request itself.
    """
    if instance.blocks_for_next_token <= instance.blocks.free:
        return Plan(decodes=instance.running, repeats=FOREVER)
    return _decode_what_fits(instance)


def _decode_what_fits(instance: InstanceView) -> Plan:
    """Plan decodes first come, first served; the latest arrivals make room."""
    running = {request.id for request in instance.running}
    room = Room(instance)
    decodes = [
        request
        for request in room.requests
        if request.id in running and room.take(request, request.num_tokens)
    ]
    return Plan(decodes=decodes, preempt=room.victims)


class Room:
    """The free blocks of an instance, while its requests take some in turn.

    Attributes:
      requests: those that hold KV and are not in a step, in order of arrival. `take`
        drops victims from the end, also during an iteration.
      victims: requests that made room, the latest arrival first, as in `Plan.preempt`.
      free: blocks that are left.
    """

    def __init__(self, instance: InstanceView):
        self.requests = sorted(
            [*instance.running, *instance.partial], key=lambda request: request.order
        )
        self.victims: list[RequestView] = []
        self.free = instance.blocks.free
        self._blocks = instance.blocks

    def take(self, request: RequestView, tokens: int) -> bool:
        """Take the blocks that `request`, one of `requests`, needs for `tokens` tokens.

        The latest arrivals lose theirs for it, at last the request itself: then return
        False.
        """
        missing = self._blocks.missing(request.id, tokens)
        while missing > self.free:
            victim = self.requests.pop()
            self.victims.append(victim)
            self.free += self._blocks.held(victim.id)
            if victim is request:
                return False
        self.free -= missing
        return True


def fits(
    instance: InstanceView, request: RequestView, watermark: float, taken: int = 0
) -> bool:
    """Return whether `request` fits and leaves a share `watermark` of blocks free.

    The reserve keeps new requests from being preempted at once. On an empty instance
    there is no reserve: it would lock out a long request for ever.

    Args:
      taken: free blocks that are promised to others.
    """
    blocks = instance.blocks
    free_after = blocks.free - taken - blocks.missing(request.id, request.num_tokens)
    others = instance.resident or taken
    reserve = int(watermark * blocks.memory.num_blocks) if others else 0
    return free_after >= reserve
