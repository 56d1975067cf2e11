"""Requests that decode when a prompt arrives: the scene of `experiments.stalls`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from disagg_jax import metrics
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.batch import MixedShape, PrefillShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import EngineExecutor, Timing, outcome
from disagg_jax.engine.place_weights import Weights
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.errors import require
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.clock import VirtualBackend
from experiments.benchmarks.engines import NO_STEPS
from models.config import ModelConfig

_BLOCK = 16  # tokens in a block
_SHORT = 32  # tokens of the prompts of the requests that decode
_BEFORE, _TOKENS = 16, 64  # tokens they have when the prompt arrives, and in all
_WARM = 3  # runs before; the first is slow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Requests that decode, and the prompts of which one arrives.

    Raises:
      ValueError: on what cannot be served.
    """

    decodes: int = 8
    prompts: tuple[int, ...] = (64, 128, 256, 512)  # tokens
    chunk: int = 64  # tokens of a mixed step, the decodes included
    repeats: int = 5

    def __post_init__(self) -> None:
        require(self.decodes >= 1, "decodes: expected >= 1", self.decodes)
        shortest = min(self.prompts, default=0)
        require(shortest >= 1, "prompts: expected tokens >= 1", list(self.prompts))
        more = f"chunk: expected more tokens than {self.decodes} decodes"
        require(self.chunk > self.decodes, more, self.chunk)
        require(self.repeats >= 1, "repeats: expected >= 1", self.repeats)

    @property
    def memory(self) -> KVMemory:
        """A pool that just holds them all."""
        longest = math.ceil((max(self.prompts) + 1) / _BLOCK) * _BLOCK
        each = math.ceil((_SHORT + _TOKENS) / _BLOCK)
        return KVMemory(
            num_blocks=self.decodes * each + longest // _BLOCK + 1,
            block_tokens=_BLOCK,
            max_context=max(longest, _SHORT + _TOKENS),
        )

    def requests(self, prompt: int, arrival_s: float, vocab: int) -> list[Request]:
        """Those that decode, and one with `prompt` tokens; ids from 0, it is last."""
        rng = np.random.default_rng(0)

        def request(id: int, tokens: int, at_s: float, output: int) -> Request:
            return Request(
                id=id,
                arrival_s=at_s,
                prompt_tokens=tokens,
                max_tokens=output,
                prompt=tuple(rng.integers(0, vocab, tokens).tolist()),
                ignore_eos=True,
            )

        decoding = [request(i, _SHORT, 0.0, _TOKENS) for i in range(self.decodes)]
        return [*decoding, request(self.decodes, prompt, arrival_s, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """A system with just the programs that a scene needs."""

    deployment: str
    policies: Mapping[Role, Policy]
    buckets: tuple[Buckets, ...]  # of each instance


def systems(scene: Scene) -> dict[str, Serving]:
    """Two colocated systems on one device, and disaggregation on two."""
    rows, memory = scene.decodes + 1, scene.memory
    blocks = tuple(sorted({memory.blocks_for(n) for n in (_SHORT, *scene.prompts)}))
    decodes = dataclasses.replace(
        NO_STEPS, decode_rows=(rows,), pool_blocks=(memory.num_blocks,)
    )
    sizes = sorted({*scene.prompts, scene.decodes * _SHORT})
    prefill = tuple(PrefillShape(n, min(rows, max(1, n // 8))) for n in sizes)
    chunks = MixedShape(
        tokens=scene.chunk,
        rows=rows,
        context=max(blocks) + scene.chunk // _BLOCK,
        decodes=rows,
        blocks=memory.num_blocks,
    )
    most = max(sizes)
    return {
        "vllm_v0": Serving(
            deployment="colocated:tp1",
            policies={
                Role.COLOCATED: PrefillFirst(max_batched_tokens=most, max_seqs=rows)
            },
            buckets=(dataclasses.replace(decodes, prefill=prefill),),
        ),
        "sarathi_serve": Serving(
            deployment="colocated:tp1",
            policies={
                Role.COLOCATED: SarathiServe(token_budget=scene.chunk, max_seqs=rows)
            },
            buckets=(dataclasses.replace(decodes, mixed=(chunks,)),),
        ),
        "disaggregated": Serving(
            deployment="prefill:tp1,decode:tp1",
            policies={
                Role.PREFILL: PrefillOnly(token_budget=most, max_seqs=rows),
                Role.DECODE: DecodeOnly(max_seqs=rows),
            },
            buckets=(
                dataclasses.replace(NO_STEPS, prefill=prefill, transfer_blocks=blocks),
                dataclasses.replace(decodes, transfer_blocks=blocks),
            ),
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stall:
    """What one prompt did to the requests that were decoding; times in s."""

    system: str
    prompt: int  # tokens
    gap_s: float  # median between tokens while no prompt is there
    longest_s: float  # gap of the requests that decode; median over the repeats
    ttft_s: float  # of the prompt; median over the repeats
    # (end of a gap, gap) of one request that decodes, in the repeat with the median
    # longest gap; the prompt arrives at 0.
    gaps: tuple[tuple[float, float], ...]

    @property
    def times(self) -> float:
        """The longest gap over the ordinary one."""
        return self.longest_s / self.gap_s


def measure(
    config: ModelConfig,
    params: Weights,
    scene: Scene,
    progress: Callable[[str], None] = lambda text: None,
    timing: Timing = outcome,
) -> list[Stall]:
    """Every system at every prompt.

    Args:
      timing: what a program took; the default is what was measured.

    Raises:
      ValueError: if a prompt is longer than the model's context.
    """
    longest = scene.memory.max_context
    room = f"prompts: expected at most {config.max_length - 1} tokens for {config.name}"
    require(longest <= config.max_length, room, longest - 1)
    found: list[Stall] = []
    shared: dict[Any, PlacedModel] = {}
    for name, serving in systems(scene).items():
        progress(f"{name}: {serving.deployment}")
        deployment = Deployment.parse(serving.deployment)
        count, devices = deployment.devices, jax.devices()
        engine = Engine(
            config,
            params,
            deployment,
            # Programs run one at a time here, so that one device can stand for two.
            devices if len(devices) >= count else devices * count,
            [scene.memory] * len(deployment.instances),
            serving.buckets,
            models=shared,
            share_devices=True,
        )
        engine.compile(sampled=False)
        found += _stalls(name, engine, serving.policies, scene, timing)
    return found


def _stalls(
    name: str,
    engine: Engine,
    policies: Mapping[Role, Policy],
    scene: Scene,
    timing: Timing,
) -> Iterable[Stall]:
    vocab = engine.instances[0].model.config.vocab_size
    memory = [instance.model.memory for instance in engine.instances]

    def run(prompt: int, arrival_s: float) -> list[Timeline]:
        controller = Controller(engine.deployment, policies, memory)
        backend = VirtualBackend(EngineExecutor(engine, timing, warm_up=True))
        requests = scene.requests(prompt, arrival_s, vocab)
        with engine.serving():
            return serve(controller, backend, requests)

    # Long after the decodes: then none of them has seen it.
    *decoding, _ = min(
        (run(scene.prompts[0], 1e6) for _ in range(_WARM)),
        key=lambda timelines: metrics.e2e_s(timelines[0]),
    )
    arrival_s = max(timeline.token_s[_BEFORE] for timeline in decoding)
    gap_s = statistics.median(metrics.pooled_itl_s(decoding).tolist())
    for prompt in scene.prompts:
        runs = [run(prompt, arrival_s) for _ in range(scene.repeats)]
        runs.sort(key=lambda timelines: _longest_s(timelines, arrival_s))
        middle = runs[len(runs) // 2]
        yield Stall(
            system=name,
            prompt=prompt,
            gap_s=gap_s,
            longest_s=_longest_s(middle, arrival_s),
            ttft_s=statistics.median(metrics.ttft_s(run[-1]) for run in runs),
            gaps=tuple(
                (end - arrival_s, end - start)
                for start, end in itertools.pairwise(middle[0].token_s)
            ),
        )


def _longest_s(timelines: Sequence[Timeline], since_s: float) -> float:
    """Of the gaps that end after `since_s`, of all requests but the last."""
    return max(
        end - start
        for timeline in timelines[:-1]
        for start, end in itertools.pairwise(timeline.token_s)
        if end > since_s
    )
