"""Engines with just the programs of one measurement, and what they are held against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Observer, serve
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import full_slices
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.requests import make_requests
from experiments.benchmarks.timing import timed_s
from models import transformer
from models.config import ModelConfig

NO_STEPS = Buckets(prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=())


@dataclasses.dataclass(frozen=True)
class Rig:
    """A compiled engine, and the policies of the system it serves with."""

    engine: Engine
    policies: Mapping[Role, Policy]

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        deployment: str,
        policies: Mapping[Role, Policy],
        memory: Sequence[KVMemory],
        buckets: Sequence[Buckets],
        layer_groups: int = 1,
    ) -> Rig:
        """Compiles every program, for random weights."""
        parsed = Deployment.parse(deployment)
        params = transformer.init_params(config, 0)
        engine = Engine(
            config,
            params,
            parsed,
            jax.devices(),
            memory,
            buckets,
            layer_groups=layer_groups,
        )
        engine.compile()
        return cls(engine, policies)

    def controller(self) -> Controller:
        """A new one, for one run."""
        memory = [instance.model.memory for instance in self.engine.instances]
        return Controller(self.engine.deployment, self.policies, memory)

    def serve(
        self, requests: Sequence[Request], observer: Observer | None = None
    ) -> list[Timeline]:
        """Serves `requests` on the clock of this machine, guarded as any run is."""
        backend = WallBackend(self.engine)
        with self.engine.serving():
            return serve(self.controller(), backend, requests, observer=observer)


def burst(config: ModelConfig, n: int, prompt: int, output: int) -> list[Request]:
    """`n` requests at once: `prompt` random tokens, then `output` greedy ones."""
    return make_requests(
        n=n,
        rate_rps=math.inf,
        prompt_lengths=FixedLengths(tokens=prompt),
        output_lengths=FixedLengths(tokens=output),
        seed=0,
        vocab_size=config.vocab_size,
    )


def bare_step_s(engine: Engine, instance: int, shape: StepShape, steps: int) -> float:
    """Mean seconds of the compiled program in a tight loop, its cache donated.

    Each step is waited for. Its inputs are on the device before, and the tokens stay.
    """
    model, cache = engine.instances[instance].model, engine.instances[instance].cache
    (stage,) = model.stages
    slices = full_slices(shape, model.memory)
    size, scratch = model.memory.block_tokens, model.scratch_block
    packed = stage.put(shape.pack(slices, size, scratch))

    def loop() -> None:
        for _ in range(steps):
            jax.block_until_ready(model.step(shape, cache, packed))

    return timed_s(loop) / steps


def bare_engine(
    config: ModelConfig, shapes: Sequence[StepShape], block_tokens: int
) -> Engine:
    """One instance that has the programs of `shapes` and random weights.

    Its pool just holds the largest of them.
    """
    prefill = [shape for shape in shapes if isinstance(shape, PrefillShape)]
    decode = [shape for shape in shapes if isinstance(shape, DecodeShape)]
    buckets = dataclasses.replace(
        NO_STEPS,
        prefill=tuple(prefill),
        decode_rows=tuple(sorted({shape.rows for shape in decode})),
        pool_blocks=tuple(sorted({shape.blocks for shape in decode})),
    )
    needed = [math.ceil(shape.tokens / block_tokens) for shape in prefill]
    memory = KVMemory(
        num_blocks=max([*needed, *(shape.blocks for shape in decode)]),
        block_tokens=block_tokens,
        max_context=config.max_length,
    )
    params = transformer.init_params(config, 0)
    deployment = Deployment.parse("colocated:tp1")
    engine = Engine(config, params, deployment, jax.devices(), [memory], [buckets])
    # Not all pairs of rows and blocks, as `Engine.compile` would.
    for shape in shapes:
        engine.instances[0].model.compile_step(shape)
    return engine


# -- one colocated instance ------------------------------------------------------------


def colocated(
    config: ModelConfig,
    prefill: PrefillShape,
    *,
    context: int,
    block_tokens: int,
    decodes: bool = True,
) -> tuple[Rig, DecodeShape]:
    """An instance whose pool holds as many requests of `context` tokens as it prefills.

    So a burst of that many is one prefill step, and then decode steps of that shape.
    """
    blocks = prefill.rows * math.ceil(context / block_tokens)
    buckets = dataclasses.replace(
        NO_STEPS,
        prefill=(prefill,),
        decode_rows=(prefill.rows,) if decodes else (),
        pool_blocks=(blocks,) if decodes else (),
    )
    policy = PrefillFirst(
        max_batched_tokens=prefill.tokens, max_seqs=prefill.rows, watermark=0.0
    )
    memory = KVMemory(
        num_blocks=blocks, block_tokens=block_tokens, max_context=config.max_length
    )
    policies = {Role.COLOCATED: policy}
    rig = Rig.build(config, "colocated:tp1", policies, [memory], [buckets])
    return rig, DecodeShape(prefill.rows, blocks)


# -- the named shape -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedShape:
    """A burst of equal requests on one prefill and one decode device."""

    config: ModelConfig
    requests: int = 32
    prompt: int = 100
    output: int = 64
    batch: int = 16  # requests in a decode step
    # One prompt a step: its first token waits for no other, and decode steps, which
    # share the cores with prefill, are not slowed so long at a time.
    prefill_rows: int = 1
    # Large blocks: fewer products in decode (4.9 ms a step; 7.8 with 16).
    block_tokens: int = 64

    @property
    def decode_shape(self) -> DecodeShape:
        """The step of a full batch, over a pool that just holds it to its end."""
        context = self.prompt + self.output
        blocks = self.batch * math.ceil(context / self.block_tokens)
        return DecodeShape(self.batch, blocks)

    def rig(self) -> Rig:
        tokens = self.prefill_rows * self.prompt
        prompt_blocks = math.ceil(self.prompt / self.block_tokens)
        rows, pool = self.decode_shape.rows, self.decode_shape.blocks
        # Room for one step's prompts while another's wait to be pulled. With more, the
        # later prompts take the cores from the decodes, only to wait for a place.
        memory = [
            KVMemory(
                num_blocks=blocks,
                block_tokens=self.block_tokens,
                max_context=self.config.max_length,
            )
            for blocks in (2 * self.prefill_rows * prompt_blocks, pool)
        ]
        shape = PrefillShape(tokens, self.prefill_rows)
        moves = dataclasses.replace(NO_STEPS, transfer_blocks=(prompt_blocks,))
        buckets = [
            dataclasses.replace(moves, prefill=(shape,)),
            dataclasses.replace(
                moves,
                decode_rows=(rows // 2, rows),
                pool_blocks=(pool // 2, pool * 3 // 4, pool),
            ),
        ]
        policies = {
            Role.PREFILL: PrefillOnly(token_budget=tokens, max_seqs=self.prefill_rows),
            Role.DECODE: DecodeOnly(max_seqs=self.batch, watermark=0.0),
        }
        deployment = "prefill:tp1,decode:tp1"
        return Rig.build(self.config, deployment, policies, memory, buckets)
