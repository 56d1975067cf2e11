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
    resident = sorted(
        [*instance.running, *instance.partial], key=lambda request: request.order
    )
    blocks = instance.blocks
    free, end, i = blocks.free, len(resident), 0
    decodes: list[RequestView] = []
    while i < end:
        request = resident[i]
        decodes_next = request.id in running
        missing = blocks.missing(request.id, request.num_tokens) if decodes_next else 0
        while missing > free and end > i:
            end -= 1
            free += blocks.held(resident[end].id)
        if decodes_next and i < end:
            free -= missing
            decodes.append(request)
        i += 1
    return Plan(decodes=decodes, preempt=resident[end:][::-1])


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
