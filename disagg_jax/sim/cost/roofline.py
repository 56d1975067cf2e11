"""Step times from a model's sizes and a device's peaks: no measurement of the model.

The form joins Sarathi's max of compute and weight streaming (arXiv 2308.16369),
DistServe's attention terms (OSDI'24, appendix A) and Vidur's split into operators
(MLSys'24). Seconds on a stage with L layers, for n tokens in the pass, on tp devices of
F FLOP/s and W byte/s:

    t0
    + max(2 P n~ / (tp F eta_f), P s / (tp W eta_w))        linear layers, P weights
    + the same for the unembedding, on the last stage, for the rows that need logits
    + sum over chunks of L max(4 h c (k + c/2) / (tp F eta_a),   c tokens after k cached
                               kv_bytes k / (min(tp, kv_heads) W eta_kv))
    + L t_kv + L kv_bytes context / (min(tp, kv_heads) W eta_kv)      if any decode
    + 2 L (alpha + 2 (tp - 1)/tp n h s / bus)               if tp > 1
    + the activations' hop to the next stage                if there is one

Decodes and prompt parts share the linear layers of a mixed step, its t0 and its
communication latency; attention adds. A chunk reads the KV before it once more
(SARATHI, section 4.2), and the read takes longer than the FLOPs only for short chunks.
All of a decode-only step but one product depends on the number of decodes alone, so
`decode_s` is base[decodes] + slope * context.

The form leaves out sampling, the embedding lookup, norms and activations (bandwidth),
other memory traffic of prefill attention, and overlap of communication with compute.
"""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.sim.hardware.device import Hardware
from disagg_jax.sim.hardware.memory import Partition
from disagg_jax.work import StepLoad
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineCost:
    """A `CostModel` of any model on any device."""

    model: ModelConfig
    hardware: Hardware
    memory_utilisation: float = 0.9  # share of a device's memory for weights and KV

    @property
    def name(self) -> str:
        """Return the name that outputs are marked with."""
        return f"roofline/{self.hardware.name}/{self.model.name}"

    def instance(self, parallelism: Parallelism) -> RooflineInstance:
        """Return the durations on an instance.

        Raises:
          ValueError: if the model does not divide or fit on them (see `kv_tokens`), or
            the hardware has no all-reduce over tp devices.
        """
        partition = Partition(self.model, parallelism)
        known, tp = sorted((1, *self.hardware.all_reduce)), parallelism.tp
        require(tp in known, f"{self.hardware.name}: expected tp in {known}", tp)
        self.kv_tokens(parallelism)
        return RooflineInstance(partition, self.hardware)

    def kv_tokens(self, parallelism: Parallelism) -> int:
        """Return the tokens of KV that an instance can hold.

        Raises:
          ValueError: with the numbers, if the model does not divide or fit.
        """
        partition = Partition(self.model, parallelism)
        return partition.kv_tokens(self.hardware.memory_bytes, self.memory_utilisation)


class RooflineInstance:
    """An `InstanceCost`; `decode_s` caches the part without context by `decodes`."""

    __slots__ = ("_bases", "_context_s", "_hardware", "_partition", "_read_s", "_slope")

    def __init__(self, partition: Partition, hardware: Hardware):
        self._partition, self._hardware = partition, hardware
        kv_bytes_s = partition.kv_shards * hardware.hbm_bytes_s * hardware.kv_mbu
        layer_bytes = partition.model.layer_kv_bytes_per_token
        self._read_s = layer_bytes / kv_bytes_s  # a token's KV of one layer
        # Seconds per token of context, on each stage.
        self._context_s = tuple(
            layers * layer_bytes / kv_bytes_s for layers in partition.stage_layers
        )
        self._slope = self._context_s[0]
        self._bases: dict[int, float] = {}  # decodes -> seconds without context

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage."""
        tokens = load.decodes + load.prompt_tokens
        # Only a prompt's last chunk needs logits. A load does not say which chunks are
        # last: each is billed for one row.
        logits = load.decodes + len(load.chunks)
        attention_s = sum(self._attention_s(*chunk) for chunk in load.chunks)
        return tuple(
            self._fixed_s(stage, tokens, logits, load.decodes > 0)
            + layers * attention_s
            + self._context_s[stage] * load.context
            for stage, layers in enumerate(self._partition.stage_layers)
        )

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        base_s = self._bases.get(decodes)
        if base_s is None:
            require_one_stage(self._partition.parallelism.pp)
            base_s = self._bases[decodes] = self._fixed_s(0, decodes, decodes, True)
        return base_s + self._slope * context

    def _fixed_s(self, stage: int, tokens: int, logits: int, decodes: bool) -> float:
        """Return the seconds that depend neither on context nor on prompt lengths."""
        model, hardware = self._partition.model, self._hardware
        layers, tp = self._partition.stage_layers[stage], self._partition.parallelism.tp
        activation_bytes = tokens * model.embed * model.stored.activation
        params, size_bytes = layers * model.layer_params, layers * model.layer_bytes
        time_s = hardware.step_s + self._linear_s(params, size_bytes, tokens)
        if decodes:
            time_s += layers * hardware.kv_startup_s
        if tp > 1:  # after attention and after the MLP
            reduce_s = hardware.all_reduce[tp].time_s(tp, activation_bytes)
            time_s += 2 * layers * reduce_s
        if stage == self._partition.parallelism.pp - 1:
            params, size_bytes = model.table_params, model.table_bytes
            return time_s + self._linear_s(params, size_bytes, logits)
        return time_s + hardware.hop.transfer_s(activation_bytes)

    def _linear_s(self, params: int, weight_bytes: float, tokens: int) -> float:
        """Return the seconds of matmuls with `params` weights: compute or streaming."""
        hardware, tp = self._hardware, self._partition.parallelism.tp
        rows = hardware.rows(tokens)
        flops_s = tp * hardware.peak_flops * hardware.gemm_mfu.at(rows)
        bytes_s = tp * hardware.hbm_bytes_s * hardware.weight_mbu
        return max(2 * params * rows / flops_s, weight_bytes / bytes_s)

    def _attention_s(self, start: int, count: int) -> float:
        """Return the seconds of one layer's causal attention over a prompt part."""
        model, hardware = self._partition.model, self._hardware
        width = model.q_heads * model.head_dim
        flops = 4 * width * count * (start + count / 2)
        mfu = hardware.attention_mfu.at(start + count)
        compute_s = flops / (self._partition.parallelism.tp * hardware.peak_flops * mfu)
        return max(compute_s, start * self._read_s)
