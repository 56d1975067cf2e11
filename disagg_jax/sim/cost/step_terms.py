"""What a step consists of, and what an engine makes of each part.

A device's kernels alone do not give a step's time: the engine that calls them adds host
work, launches of many small kernels, and kernels that reach less than the best ones. A
step's time is the scalar product of its terms and the engine's factors, so that factors
can be fitted by least squares.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from disagg_jax.errors import require


class StepTerms(NamedTuple):
    """A step on one stage: seconds by the device's efficiencies, and counts."""

    linear_s: float  # matmuls of attention, dense MLPs, shared experts and logits
    experts_s: float  # matmuls of routed experts
    expanded_s: float  # the same where weights are expanded to 16 bits on the way
    attention_s: float  # of prompts
    kv_s: float  # attention of decodes: reading KV or a state
    reduce_s: float  # all-reduces of tensor parallelism, and the hop between stages
    exchange_s: float  # tokens to the experts of other replicas, and back
    layers: int
    scaled_layers: int  # layers whose activations are scaled to 8 bits block by block
    expert_layers: int  # layers with routed experts
    kv_layers: int  # layers that read KV for decodes
    sequences: int  # decodes and prompt parts, of the fullest replica


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineFactors:
    """How an engine's steps differ from a device's kernels, one after the other.

    The first seven multiply terms: below 1, kernels are better than those that the
    device's efficiencies were read from, or hidden behind others. The rest adds seconds
    that nothing hides.

    Raises:
      ValueError: on a negative value.
    """

    linear: float = 1.0
    experts: float = 1.0
    expanded: float = 1.0
    attention: float = 1.0
    kv: float = 1.0
    reduce: float = 1.0
    exchange: float = 1.0
    layer_s: float = 0.0  # of each layer: kernels too small for any peak, launches
    scaled_layer_s: float = 0.0  # of a layer's kernels that scale activations
    expert_layer_s: float = 0.0  # of a layer with routed experts, beside layer_s
    kv_layer_s: float = 0.0  # of each layer of a step with decodes
    sequence_s: float = 0.0  # of each sequence of a step: host work, whatever tp is
    step_s: float = 0.0  # of a step: host work

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value >= 0, f"{field.name}: expected >= 0", value)

    def without_overheads(self) -> EngineFactors:
        """Return the factors without the seconds that nothing hides."""
        return dataclasses.replace(
            self,
            layer_s=0.0,
            scaled_layer_s=0.0,
            expert_layer_s=0.0,
            kv_layer_s=0.0,
            sequence_s=0.0,
            step_s=0.0,
        )

    def time_s(self, terms: StepTerms) -> float:
        """Return the seconds of a step."""
        return (
            self.step_s
            + self.linear * terms.linear_s
            + self.experts * terms.experts_s
            + self.expanded * terms.expanded_s
            + self.attention * terms.attention_s
            + self.kv * terms.kv_s
            + self.reduce * terms.reduce_s
            + self.exchange * terms.exchange_s
            + self.layer_s * terms.layers
            + self.scaled_layer_s * terms.scaled_layers
            + self.expert_layer_s * terms.expert_layers
            + self.kv_layer_s * terms.kv_layers
            + self.sequence_s * terms.sequences
        )
