"""What a part of a prompt costs in a step with decodes, on two kinds of devices.

Where matmuls take the longer the more tokens pass them, a part costs its full price
beside decodes. Where a step streams the weights whatever passes, it is nearly free up
to some tokens. So systems that mix prompts into steps of decodes rank differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from disagg_jax.deployment import Role
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.request import Request
from disagg_jax.work import StepLoad
from experiments.configs.config import Config

GRAIN = 16  # tokens between the parts that are tried
_LITTLE = 1.1  # a step that is longer by no more than this factor counts as no longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The steps that are compared."""

    decodes: int
    tokens: int  # of a part of a prompt
    few_tokens: int  # of a smaller part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The times of steps on one device."""

    name: str
    step_s: Callable[[StepLoad], float]
    alone_s: Callable[[int], float]  # of a part of a prompt alone, by its tokens
    context: int  # cached tokens of a decode
    # Host work and launches, which nothing hides; None where steps were timed without.
    overhead_s: Callable[[StepLoad], float] | None = None

    def with_decodes_s(self, decodes: int, tokens: int) -> float:
        """Return the seconds of a step of decodes and a part of a prompt."""
        return self.step_s(self._load(decodes, tokens))

    def _load(self, decodes: int, tokens: int) -> StepLoad:
        chunks = ((0, tokens),) if tokens else ()
        return StepLoad(chunks, decodes, decodes * self.context)

    def prices(self, shape: Shape) -> dict[str, Any]:
        """Return the seconds of steps, ready for JSON.

        `free_tokens` are of the largest part that makes a step of decodes longer by a
        tenth at most.
        """
        decode_s = self.with_decodes_s(shape.decodes, 0)
        parts = range(GRAIN, shape.tokens + 1, GRAIN)
        free = [
            tokens
            for tokens in parts
            if self.with_decodes_s(shape.decodes, tokens) <= _LITTLE * decode_s
        ]
        return {
            "device": self.name,
            "one_decode_s": self.with_decodes_s(1, 0),
            "decodes_s": decode_s,
            "part_s": self.alone_s(shape.tokens),
            "few_s": self.alone_s(shape.few_tokens),
            "both_s": self.with_decodes_s(shape.decodes, shape.tokens),
            "free_tokens": max(free, default=0),
            "overhead_s": self.overhead_s
            and self.overhead_s(self._load(shape.decodes, 0)),
        }


def this_machine(
    config: Config,
    durations: Mapping[str, StepDurations],
    requests: Sequence[Request],
) -> tuple[Device, Shape] | None:
    """Return the steps of the config's engines, and the largest to compare.

    Returns:
      None if no system puts parts of prompts beside decodes.
    """
    mixing = [
        name
        for name, system in config.systems.items()
        if (policy := system.policies.get(Role.COLOCATED))
        and policy.limits.mixed
        and policy.limits.splits
    ]
    if not mixing:
        return None
    first, mixed = next(iter(durations.values())), durations[mixing[0]]
    instance = mixed.engine.deployment.of(Role.COLOCATED)[0]
    inputs = mixed.tuning_inputs(instance, requests)
    _, decodes = mixed.decode_s()
    tokens, few = inputs.sizes[-1] - decodes, inputs.sizes[0]
    if tokens <= few:
        return None
    device = Device(
        name=f"{config.model} on {jax.devices()[0].device_kind}",
        step_s=lambda load: mixed.step_s(instance, load),
        alone_s=first.prefill_s,
        context=inputs.context,
    )
    return device, Shape(decodes=decodes, tokens=tokens, few_tokens=few)
