"""What paged decode policies share: one token for each, the latest makes room.

Source: vLLM v0's recompute preemption, as described for the sarathi-serve fork.
"""

from __future__ import annotations

from disagg_jax.scheduling.view import InstanceView, Plan, RequestView

FOREVER = 1 << 60  # `Plan.repeats` of a plan that never changes by itself


def decode_all(instance: InstanceView) -> Plan:
    """One token for every running request.

    A request whose last block is full needs another. If none is free, the latest
    arrival loses its KV (and is recomputed later), down to the request itself.
    """
    if instance.growth <= instance.blocks.free:
        return Plan(decodes=instance.running, repeats=FOREVER)
    return _decode_what_fits(instance)


def _decode_what_fits(instance: InstanceView) -> Plan:
    """First come, first served; the latest arrivals make room."""
    running = sorted(instance.running, key=lambda request: request.order)
    blocks = instance.blocks
    free, end = blocks.free, len(running)
    decodes: list[RequestView] = []
    while len(decodes) < end:
        request = running[len(decodes)]
        missing = blocks.missing(request.id, request.known)
        while missing > free and end > len(decodes):
            end -= 1
            free += blocks.held(running[end].id)
        if len(decodes) < end:
            free -= missing
            decodes.append(request)
    return Plan(decodes=decodes, preempt=running[end:][::-1])


def fits(instance: InstanceView, request: RequestView, watermark: float) -> bool:
    """Whether `request` can come in and leave a share `watermark` of all blocks free.

    The reserve keeps newcomers from being preempted at once. With nobody else here
    there is nobody to keep it for, and it would lock out a long request for ever.
    """
    blocks = instance.blocks
    free_after = blocks.free - blocks.missing(request.id, request.known)
    reserve = int(watermark * blocks.memory.num_blocks) if instance.resident else 0
    return free_after >= reserve
