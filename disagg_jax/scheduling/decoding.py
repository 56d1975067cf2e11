"""What paged decode policies share: one token for each, the latest makes room.

Source: vLLM v0's recompute preemption, as described for the sarathi-serve fork.
"""

from __future__ import annotations

from disagg_jax.scheduling.view import InstanceView, Plan, RequestView


def decode_all(instance: InstanceView) -> Plan:
    """One token for every running request, first come first served.

    A request whose last block is full needs another. If none is free, the latest
    arrival loses its KV (and is recomputed later), down to the request itself.
    """
    running = sorted(instance.running, key=lambda request: request.order)
    blocks = instance.blocks
    free, end = blocks.free, len(running)
    slices: list[tuple[RequestView, int]] = []
    while len(slices) < end:
        request = running[len(slices)]
        missing = blocks.missing(request.id, request.known)
        while missing > free and end > len(slices):
            end -= 1
            free += blocks.held(running[end].id)
        if len(slices) < end:
            free -= missing
            slices.append((request, 1))
    return Plan(slices, running[end:][::-1])


def fits(instance: InstanceView, request: RequestView, watermark: float) -> bool:
    """Whether `request` can come in and leave a share `watermark` of all blocks free.

    The reserve keeps newcomers from being preempted at once. With nobody else here
    there is nobody to keep it for, and it would lock out a long request for ever.
    """
    blocks = instance.blocks
    free_after = blocks.free - blocks.missing(request.id, request.known)
    reserve = int(watermark * blocks.memory.num_blocks) if instance.resident else 0
    return free_after >= reserve
