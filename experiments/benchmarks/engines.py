"""Engines with only the programs that one measurement needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.program_table import compile_all
from disagg_jax.engine.served_deployment import ServedDeployment, devices_for
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.programs.slices import full_slices
from disagg_jax.request import Request
from disagg_jax.scheduling import get_system
from disagg_jax.workload import FixedLengths, RandomWorkload, TokenOptions
from experiments.benchmarks.timing import timed_s
from models import transformer
from models.checkpoint import Weights
from models.config import ModelConfig

# Buckets of the shapes that are named, and no others.
only = functools.partial(
    Buckets, prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=()
)


def benchmark_engine(
    config: ModelConfig,
    deployment: str,
    memory: Sequence[KVMemory],
    buckets: Sequence[Buckets],
    *,
    params: Weights | None = None,
    attention: str = AUTO,
    layer_groups: int = 1,
    virtual: bool = False,
    models: dict[Any, PlacedModel] | None = None,
    shapes: Iterable[StepShape] | None = None,
) -> Engine:
    """Build an engine and compile its programs.

    Args:
      params: random weights by default; no duration depends on them.
      virtual: whether a device may stand for several; see `devices_for`.
      models: see `Engine`.
      shapes: of the only instance, to compile instead of all pairs of rows and blocks.
    """
    parsed = Deployment.parse(deployment)
    engine = Engine(
        config,
        transformer.init_params(config, 0) if params is None else params,
        parsed,
        devices_for(parsed, shared=virtual),
        memory,
        buckets,
        attention=attention,
        layer_groups=layer_groups,
        models=models,
        share_devices=virtual,
    )
    if shapes is None:
        engine.compile(sampled=False)
    else:
        compile_steps(engine, shapes)
    return engine


def compile_steps(engine: Engine, shapes: Iterable[StepShape]) -> None:
    """Compile the steps of the only instance; see `compile_all`."""
    (instance,) = engine.instances
    compile_all(p for s in shapes for p in instance.programs.step_programs(s))


def pool(config: ModelConfig, blocks: int, block_tokens: int) -> KVMemory:
    """Return a pool of `blocks` for requests up to the model's longest context."""
    return KVMemory(
        num_blocks=blocks, block_tokens=block_tokens, max_context=config.max_length
    )


# -- one program -----------------------------------------------------------------------


def bare_engine(
    config: ModelConfig,
    shapes: Sequence[StepShape],
    block_tokens: int,
    attention: str = AUTO,
    *,
    compiled: bool = True,
) -> Engine:
    """Return one instance for steps of `shapes`; its pool holds the largest.

    Args:
      compiled: whether it has their programs; see `compile_steps`.
    """
    prefill = [shape for shape in shapes if shape.kind == "prefill"]
    decode = [shape for shape in shapes if shape.kind == "decode"]
    buckets = only(
        prefill=tuple(prefill),
        decode_rows=tuple(sorted({shape.rows for shape in decode})),
        pool_blocks=tuple(sorted({shape.blocks for shape in decode})),
    )
    needed = [math.ceil(shape.tokens / block_tokens) for shape in prefill]
    blocks = max([*needed, *(shape.blocks for shape in decode)])
    memory = [pool(config, blocks, block_tokens)]
    return benchmark_engine(
        config,
        "colocated:tp1",
        memory,
        [buckets],
        shapes=shapes if compiled else (),
        attention=attention,
    )


def bare_step_s(engine: Engine, instance: int, shape: StepShape, steps: int) -> float:
    """Return the mean seconds of a program in a tight loop, its cache donated.

    The loop waits for each step. The inputs are on the device before, and the tokens
    stay there.
    """
    model, cache = engine.instances[instance].model, engine.instances[instance].cache
    (stage,) = model.programs.stages
    slices = full_slices(shape, stage.memory)
    packed = stage.put(stage.kernel.pack(shape, slices, stage.memory))

    def loop() -> None:
        for _ in range(steps):
            jax.block_until_ready(model.step(shape, cache, packed))

    return timed_s(loop) / steps


# -- bursts ----------------------------------------------------------------------------


def burst(config: ModelConfig, n: int, prompt: int, output: int) -> list[Request]:
    """Return `n` requests at once: `prompt` random and `output` greedy tokens."""
    workload = RandomWorkload(
        prompt=FixedLengths(tokens=prompt),
        output=FixedLengths(tokens=output),
        tokens=TokenOptions(vocab_size=config.vocab_size),
    )
    return workload.requests(n, math.inf, seed=0)


def burst_deployment(
    config: ModelConfig,
    prefill: StepShape,
    deployment: str = "colocated:tp1",
    *,
    context: int,
    block_tokens: int,
    decodes: bool = True,
    attention: str = AUTO,
    virtual: bool = False,
) -> tuple[ServedDeployment, StepShape]:
    """Return a deployment for bursts of as many requests as `prefill` has rows.

    A pool just holds a burst up to `context` tokens each. So a burst is one prefill
    step, and then decode steps of the shape that is returned.

    Args:
      decodes: whether requests have more than one output token.
      virtual: whether a device may stand for several; see `devices_for`.
    """
    rows, tokens = prefill.rows, prefill.tokens
    blocks = rows * math.ceil(context / block_tokens)
    steps = only(decode_rows=(rows,), pool_blocks=(blocks,)) if decodes else only()
    if deployment.startswith("colocated"):
        step = {"max_batched_tokens": tokens, "max_seqs": rows, "watermark": 0.0}
        policies = get_system("vllm_v0", colocated=step)
        buckets = [dataclasses.replace(steps, prefill=(prefill,))]
    else:
        policies = get_system(
            "disaggregated",
            prefill={"token_budget": tokens, "max_seqs": rows},
            decode={"max_seqs": rows, "watermark": 0.0},
        )
        moves = (math.ceil(tokens // rows / block_tokens),)
        buckets = [
            only(prefill=(prefill,), transfer_blocks=moves),
            dataclasses.replace(steps, transfer_blocks=moves),
        ]
    memory = [pool(config, blocks, block_tokens)] * len(buckets)
    engine = benchmark_engine(
        config, deployment, memory, buckets, attention=attention, virtual=virtual
    )
    return ServedDeployment(engine=engine, policies=policies), StepShape.decode(
        rows, blocks
    )


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
    def decode_shape(self) -> StepShape:
        """The step of a full batch, over a pool that just holds it to its end."""
        context = self.prompt + self.output
        blocks = self.batch * math.ceil(context / self.block_tokens)
        return StepShape.decode(self.batch, blocks)

    def deployment(self) -> ServedDeployment:
        """Build and compile what serves the burst."""
        tokens = self.prefill_rows * self.prompt
        prompt_blocks = math.ceil(self.prompt / self.block_tokens)
        rows, blocks = self.decode_shape.rows, self.decode_shape.blocks
        # Room for one step's prompts while another's wait to be pulled. With more, the
        # later prompts take the cores from the decodes, only to wait for a place.
        memory = [
            pool(self.config, each, self.block_tokens)
            for each in (2 * self.prefill_rows * prompt_blocks, blocks)
        ]
        buckets = [
            only(
                prefill=(StepShape.prefill(tokens, self.prefill_rows),),
                transfer_blocks=(prompt_blocks,),
            ),
            only(
                decode_rows=(rows // 2, rows),
                pool_blocks=(blocks // 2, blocks * 3 // 4, blocks),
                transfer_blocks=(prompt_blocks,),
            ),
        ]
        return ServedDeployment(
            engine=benchmark_engine(
                self.config, "prefill:tp1,decode:tp1", memory, buckets
            ),
            policies=get_system(
                "disaggregated",
                prefill={"token_budget": tokens, "max_seqs": self.prefill_rows},
                decode={"max_seqs": self.batch, "watermark": 0.0},
            ),
        )
