"""Step times from a model's sizes and a device's peaks: no measurement of the model.

The form joins Sarathi's max of compute and weight streaming (arXiv 2308.16369),
DistServe's attention terms (OSDI'24, appendix A) and Vidur's split into operators
(MLSys'24). Seconds on a stage with L layers, for n tokens in the pass, on tp devices of
F FLOP/s and W byte/s:

    t0
    + max(2 P n~ / (tp F eta_f), P s / (tp W eta_w))        linear layers, P weights
    + the same for the unembedding, on the last stage, for the rows that need logits
    + the same for routed experts: n K / E rows and E (1 - (1 - K/E)^n) of E experts
    + sum over chunks of L max(4 h c (k + c/2) / (tp F eta_a),   c tokens after k cached
                               kv_bytes k / (min(tp, kv_heads) W eta_kv))
    + L t_kv + L kv_bytes context / (min(tp, kv_heads) W eta_kv)      if any decode
    + 2 L (alpha + 2 (tp - 1)/tp n h s / bus)               if tp > 1
    + 2 L (alpha + n K h s / bus), to the experts and back  if dp > 1
    + the activations' hop to the next stage                if there is one

An engine's profile multiplies these terms, and adds seconds for a step, a layer and a
sequence (`sim.cost.step_terms`). Without one, t0 and t_kv are the device's.

Decodes and prompt parts share the linear layers of a mixed step, its t0 and its
communication latency; attention adds. A chunk reads the KV before it once more
(SARATHI, section 4.2), and the read takes longer than the FLOPs only for short chunks.
All of a decode-only step but one product depends on the number of decodes alone, so
`decode_s` is base[decodes] + slope * context; layers with a window read no more than
the window.

Of dp attention replicas the fullest counts: it has the next whole share of the tokens,
and prompts of a step are spread evenly. So are tokens over experts. Latent attention
decodes in its absorbed form, whose FLOPs can take longer than reading the latents.

The form leaves out sampling, the embedding lookup, norms and activations (bandwidth),
other memory traffic of prefill attention, and overlap of communication with compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.sim.cost.step_terms import EngineFactors, StepTerms
from disagg_jax.sim.hardware.device import Hardware
from disagg_jax.sim.hardware.memory import Partition
from disagg_jax.work import StepLoad
from models.blocks import Block, ExpertMLP, LatentAttention
from models.config import ModelConfig

# Of a value of linear attention's state: float32 ("mamba_ssm_dtype" of Qwen3.5).
_STATE_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineCost:
    """A `CostModel` of any model on any device, by default of no engine."""

    model: ModelConfig
    hardware: Hardware
    factors: EngineFactors | None = None  # None: the device's fixed times, no factors
    memory_utilisation: float = 0.9  # share of a device's memory for weights and KV

    @property
    def name(self) -> str:
        """Return the name that outputs are marked with."""
        return f"roofline/{self.hardware.name}/{self.model.name}"

    def instance(self, parallelism: Parallelism) -> RooflineInstance:
        """Return the durations on the devices of an instance.

        Raises:
          ValueError: if the model does not divide or fit on them (see `kv_tokens`), or
            the hardware has no all-reduce over tp devices, or nothing that takes tokens
            to experts on other replicas.
        """
        partition = Partition(self.model, parallelism)
        hardware, tp = self.hardware, parallelism.tp
        known = sorted((1, *hardware.all_reduce))
        require(tp in known, f"{hardware.name}: expected tp in {known}", tp)
        if parallelism.dp > 1 and partition.has_experts:
            joined, known = parallelism.stage_devices, sorted(hardware.all_to_all)
            expected = f"{hardware.name}: expected tp x dp in {known}, to reach experts"
            require(joined in known, expected, joined)
        self.kv_tokens(parallelism)
        windows = any(block.attention.window for block in self.model.blocks)
        kind = _WindowedInstance if windows else RooflineInstance
        return kind(partition, hardware, self.factors)

    def kv_tokens(self, parallelism: Parallelism) -> int:
        """Return the tokens of KV that an instance can hold.

        Raises:
          ValueError: with the numbers, if the model does not divide or fit.
        """
        partition = Partition(self.model, parallelism)
        return partition.kv_tokens(self.hardware.memory_bytes, self.memory_utilisation)


class RooflineInstance:
    """An `InstanceCost`; `decode_s` caches the part without context by `decodes`.

    Attributes:
      factors: of the engine; by default the device's fixed times alone.
    """

    def __init__(
        self,
        partition: Partition,
        hardware: Hardware,
        factors: EngineFactors | None = None,
    ):
        factors = factors or EngineFactors(
            step_s=hardware.step_s, kv_layer_s=hardware.kv_startup_s
        )
        self.factors = factors
        last = partition.parallelism.pp - 1
        self._stages = tuple(
            _Stage(partition, hardware, blocks, is_last=i == last)
            for i, blocks in enumerate(partition.stage_blocks)
        )
        # Seconds per token of context, on each stage.
        self._slopes = tuple(
            factors.kv * stage.attention.context_s for stage in self._stages
        )
        self._slope = self._slopes[0]
        self._bases: dict[int, float] = {}  # decodes -> seconds without context

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage."""
        time_s, context = self.factors.time_s, load.context
        return tuple(
            [
                time_s(stage.terms(load)) + slope * context
                for stage, slope in zip(self._stages, self._slopes, strict=True)
            ]
        )

    def terms(self, load: StepLoad) -> tuple[StepTerms, ...]:
        """Return what an engine's factors multiply, for each stage."""
        return tuple(stage.all_terms(load) for stage in self._stages)

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        base_s = self._bases.get(decodes)
        if base_s is None:
            require_one_stage(len(self._stages))
            base_s = self.factors.time_s(
                self._stages[0].terms(StepLoad((), decodes, 0))
            )
            self._bases[decodes] = base_s
        return base_s + self._slope * context


class _WindowedInstance(RooflineInstance):
    """The same where some layers attend to a window of the latest tokens only."""

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage."""
        return tuple(
            time_s
            + self.factors.kv * stage.attention.windows_s(load.decodes, load.context)
            for stage, time_s in zip(self._stages, super().stages_s(load), strict=True)
        )

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        windows_s = self._stages[0].attention.windows_s(decodes, context)
        return super().decode_s(decodes, context) + self.factors.kv * windows_s


class _Matmuls:
    """Matrices that every row passes: computing the rows, or streaming the weights."""

    __slots__ = ("_flops", "_flops_s", "_hardware", "_stream_s")

    def __init__(
        self, hardware: Hardware, params: float, size_bytes: float, bits: int, tp: int
    ):
        self._hardware = hardware
        self._flops = 2 * params
        self._flops_s = tp * hardware.peak(bits)
        self._stream_s = size_bytes / (tp * hardware.hbm_bytes_s * hardware.weight_mbu)

    def time_s(self, rows: int) -> float:
        billed = self._hardware.rows(rows)
        flops_s = self._flops_s * self._hardware.gemm_mfu.at(billed)
        return max(self._flops * billed / flops_s, self._stream_s)


class _Experts:
    """The routed experts of equal layers, spread evenly over all devices of a stage."""

    def __init__(
        self, partition: Partition, hardware: Hardware, layers: int, mlp: ExpertMLP
    ):
        stored, devices = partition.model.stored, partition.parallelism.stage_devices
        self._mlp, self._gemm_mfu = mlp, hardware.gemm_mfu
        expert_bytes = layers * mlp.expert_params * stored.experts
        bytes_s = devices * hardware.hbm_bytes_s * hardware.weight_mbu
        self._expert_s = expert_bytes / bytes_s  # to stream one of each layer
        flops = 2 * layers * mlp.expert_params * mlp.active
        # Seconds per token at the peak.
        self._token_s = flops / (devices * hardware.peak(stored.expert_matmul_bits))

    def time_s(self, tokens: int) -> float:
        mlp = self._mlp
        rows = tokens * mlp.active / mlp.experts  # of each expert, if it has any
        compute_s = tokens * self._token_s / self._gemm_mfu.at(rows)
        return max(compute_s, mlp.touched(tokens) * self._expert_s)


class _Attention:
    """Attention in the layers of a stage: of decodes to their context, and of prompts.

    Attributes:
      layers: that read KV.
      context_s: seconds for a token of context, all replicas together, in the layers
        without a window.
      state_s: seconds for a decode in which linear attention reads and writes its
        state.
    """

    def __init__(
        self, partition: Partition, hardware: Hardware, blocks: Sequence[Block]
    ):
        parallelism, stored = partition.parallelism, partition.model.stored
        bytes_s = hardware.hbm_bytes_s * hardware.kv_mbu
        flops_s = parallelism.tp * hardware.peak(16)
        self._mfu, self._dp = hardware.attention_mfu, parallelism.dp
        self.layers, self.context_s, self.state_s = 0, 0.0, 0.0
        # (window, seconds for a token of context in the layers with it)
        self._windows: list[tuple[int, float]] = []
        # (layers, window, seconds of a pair at the peak, of reading a token's KV)
        self._prefill: list[tuple[int, int | None, float, float]] = []
        for block in blocks:
            attention = block.attention
            state_bytes = 2 * attention.state_values * _STATE_BYTES
            self.state_s += block.count * state_bytes / (parallelism.tp * bytes_s)
            if not attention.kv_values_per_token:
                continue
            self.layers += block.count
            kv_bytes = attention.kv_values_per_token * stored.kv
            read_s = kv_bytes / (attention.kv_shards(parallelism.tp) * bytes_s)
            token_s = read_s
            if isinstance(attention, LatentAttention):
                # All heads share a latent: several hundred FLOPs for each byte. Others
                # have at most some 30 (16 heads a KV head), and reading takes longer.
                best_flops_s = flops_s * self._mfu.points[-1][1]
                token_s = max(read_s, attention.decode_pair_flops / best_flops_s)
            token_s *= block.count / parallelism.dp
            if attention.window is None:
                self.context_s += token_s
            else:
                self._windows.append((attention.window, token_s))
            pair_s = attention.prefill_pair_flops / flops_s
            self._prefill.append((block.count, attention.window, pair_s, read_s))

    def windows_s(self, decodes: int, context: int) -> float:
        """Return the seconds of reading KV in the layers that have a window."""
        return sum(
            token_s * min(context, decodes * window)
            for window, token_s in self._windows
        )

    def prompts_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Return the seconds of causal attention over prompt parts."""
        return sum([self._chunk_s(*chunk) for chunk in chunks]) / self._dp

    def _chunk_s(self, start: int, count: int) -> float:
        mfu = self._mfu.at(start + count)
        time_s = 0.0
        for layers, window, pair_s, read_s in self._prefill:
            # Tokens that a token attends to, on average, and those that are read again.
            seen, cached = start + count / 2, float(start)
            if window is not None:
                seen, cached = min(seen, window), min(cached, window)
            time_s += layers * max(count * seen * pair_s / mfu, cached * read_s)
        return time_s


class _Stage:
    """The terms of steps on one pipeline stage."""

    def __init__(
        self,
        partition: Partition,
        hardware: Hardware,
        blocks: Sequence[Block],
        *,
        is_last: bool,
    ):
        model, parallelism = partition.model, partition.parallelism
        stored, tp = model.stored, parallelism.tp
        self._hardware, self._tp, self._dp = hardware, tp, parallelism.dp
        self._row_bytes = model.embed * stored.activation  # exchanged for each row
        dense = sum(block.count * block.dense_params for block in blocks)
        self._linear = _Matmuls(
            hardware, dense, dense * stored.weight, stored.matmul_bits, tp
        )
        self._head = None
        if is_last:
            table, size = model.table_params, model.table_bytes
            self._head = _Matmuls(hardware, table, size, 16, tp)
        mixtures = [
            (block.count, mlp)
            for block in blocks
            if isinstance(mlp := block.mlp, ExpertMLP)
        ]
        self._experts = [_Experts(partition, hardware, *each) for each in mixtures]
        self._layers = sum(block.count for block in blocks)
        self._expert_layers = sum(count for count, _ in mixtures)
        self._copies = max((mlp.active for _, mlp in mixtures), default=0)
        bits = stored.expert_matmul_bits
        native = bits in hardware.peak_flops_by_bits
        self._expanded = stored.experts < 1 and not native
        self._scaled = stored.block_scaled
        self.attention = _Attention(partition, hardware, blocks)

    def all_terms(self, load: StepLoad) -> StepTerms:
        """Return the terms of a step."""
        terms, context = self.terms(load), load.context
        read_s = self.attention.context_s * context
        read_s += self.attention.windows_s(load.decodes, context)
        return terms._replace(kv_s=terms.kv_s + read_s)

    def terms(self, load: StepLoad) -> StepTerms:
        """Return the terms of a step, but for what grows with the context."""
        decodes, chunks, dp = load.decodes, load.chunks, self._dp
        tokens = decodes + load.prompt_tokens
        # Of the fullest replica:
        rows, sequences = -(-tokens // dp), -(-(decodes + len(chunks)) // dp)
        linear_s = self._linear.time_s(rows)
        reduce_s, exchange_s = self._communicate(rows)
        if self._head is None:
            reduce_s += self._hardware.hop.transfer_s(rows * self._row_bytes)
        else:
            # Only a prompt's last chunk needs logits. A load does not say which chunks
            # are last: each is billed for one row.
            linear_s += self._head.time_s(sequences)
        experts_s = 0.0
        for experts in self._experts:
            experts_s += experts.time_s(tokens)
        return StepTerms(
            linear_s,
            0.0 if self._expanded else experts_s,
            experts_s if self._expanded else 0.0,
            self.attention.prompts_s(chunks) if chunks else 0.0,
            self.attention.state_s * -(-decodes // dp),
            reduce_s,
            exchange_s,
            self._layers,
            self._layers if self._scaled else 0,
            self._expert_layers,
            self.attention.layers if decodes else 0,
            sequences,
        )

    def _communicate(self, rows: int) -> tuple[float, float]:
        """Return the seconds of all-reduces, and of tokens to experts and back.

        Layers end with an all-reduce over tp devices after attention and after the MLP.
        Between replicas tokens go to the experts instead of the second one.
        """
        size_bytes, reduce_s, exchange_s = rows * self._row_bytes, 0.0, 0.0
        spread = self._expert_layers if self._dp > 1 else 0
        if self._tp > 1:
            one_s = self._hardware.all_reduce[self._tp].time_s(self._tp, size_bytes)
            reduce_s = (2 * self._layers - spread) * one_s
        if spread:
            devices = self._tp * self._dp
            copies = min(self._copies, devices - 1)
            exchange = self._hardware.all_to_all[devices]
            exchange_s = 2 * spread * exchange.time_s(devices, copies * size_bytes)
        return reduce_s, exchange_s
