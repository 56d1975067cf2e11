"""KV transfers of requests that are served alone, and what a request sees of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from disagg_jax.calibration.step_times import measure_step_times
from disagg_jax.control.backend import Outcome
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import as_measured, from_table
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Request
from disagg_jax.scheduling import Policy, get_system
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.work import Step, Task, Transfer
from experiments.benchmarks.engines import benchmark_engine, only
from models.checkpoint import Weights
from models.config import ModelConfig

BLOCK = 16  # tokens in a block
OUTPUT_TOKENS = 4  # tokens: the second is the one that waits for KV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """When KV leaves."""

    chunks: int = 1  # of a prompt
    layer_groups: int = 1  # of a stage
    streams: bool = True  # while the rest is computed

    def policies(self, prompt: int) -> Mapping[Role, Policy]:
        """Return the system for one request at a time."""
        return get_system(
            "disaggregated" if self.chunks == 1 else "disaggregated_chunked",
            prefill={"token_budget": self.chunk_tokens(prompt), "max_seqs": 1},
            decode={"max_seqs": 1},
        )

    def chunk_tokens(self, prompt: int) -> int:
        """Return the tokens of a chunk, in whole blocks."""
        return math.ceil(prompt / self.chunks / BLOCK) * BLOCK

    def buckets(self, prompt: int) -> Buckets:
        """Return the only programs that the prefill side needs."""
        blocks, tokens = math.ceil(prompt / BLOCK), self.chunk_tokens(prompt)
        if self.chunks == 1:
            return only(
                prefill=(StepShape.prefill(prompt, 1),), transfer_blocks=(blocks,)
            )
        shape = StepShape.mixed(
            tokens=tokens, rows=1, context=blocks, decodes=0, blocks=0
        )
        sizes = tuple(sorted({tokens // BLOCK, blocks}))
        return only(mixed=(shape,), transfer_blocks=sizes)


def modes(chunks: int, layer_groups: int) -> dict[str, Mode]:
    """Return every mode by name."""
    return {
        "whole": Mode(streams=False),
        "groups": Mode(layer_groups=layer_groups),
        "chunks": Mode(chunks=chunks),
        "chunks, groups": Mode(chunks=chunks, layer_groups=layer_groups),
    }


class Phases(NamedTuple):
    """Seconds of one part of a transfer."""

    gather_s: float  # out of the source's blocks
    move_s: float  # from device to device
    insert_s: float  # into the destination's blocks


class Seen(NamedTuple):
    """One request, served alone."""

    deployment: str
    mode: str
    prompt: int
    size_bytes: int
    phases: Phases  # of all transfers together
    ttft_s: float
    visible_s: float  # from the first token until the KV is there
    decode_s: float  # a decode step
    second_s: float  # from the first token to the second


def serve_alone(
    config: ModelConfig,
    params: Weights,
    deployment: str,
    name: str,
    mode: Mode,
    prompt: int,
    link: LinkSpec | None,
    repeats: int,
) -> Seen:
    """Measure the programs that one request needs, and put it on the timeline."""
    blocks = math.ceil((prompt + OUTPUT_TOKENS) / BLOCK)
    memory = KVMemory(
        num_blocks=blocks, block_tokens=BLOCK, max_context=prompt + OUTPUT_TOKENS
    )
    engine = benchmark_engine(
        config,
        str(parse_sides(deployment)),
        [memory] * 2,
        [mode.buckets(prompt), only(decode_rows=(1,), pool_blocks=(blocks,))],
        params=params,
        layer_groups=mode.layer_groups,
    )
    times = measure_step_times([engine], repeats, streams=mode.streams).seconds
    steps, phases = from_table(engine, times), _Phases(engine, link, repeats)

    def timing(work: Task, _: Sequence[float]) -> Outcome:
        if isinstance(work, Step):
            return steps(work, ())
        return as_measured(work, [sum(part) for part in phases.of(work)])

    served = ServedDeployment(
        engine=engine,
        policies=mode.policies(prompt),
        streams=mode.streams,
        timing=timing,
        executed=False,
    )
    request = Request(id=0, arrival_s=0, prompt_tokens=prompt, max_tokens=OUTPUT_TOKENS)
    (timeline,) = served.run([request]).timelines
    first_s, second_s, third_s, _ = timeline.token_s
    assert timeline.transfer_end_s is not None
    totals = Phases(*map(sum, zip(*phases.served, strict=True)))
    return Seen(
        deployment,
        name,
        prompt,
        timeline.transfer_bytes,
        totals,
        ttft_s=first_s,
        visible_s=timeline.transfer_end_s - first_s,
        decode_s=third_s - second_s,
        second_s=second_s - first_s,
    )


class _Phases:
    """Measures the phases of transfers, once for each size and kind.

    Attributes:
      served: the phases of every part of every transfer so far.
    """

    def __init__(self, engine: Engine, link: LinkSpec | None, repeats: int):
        self._engine, self._link, self._repeats = engine, link, repeats
        self._medians: dict[tuple[str, ...], list[Phases]] = {}
        self.served: list[Phases] = []

    def of(self, transfer: Transfer) -> list[Phases]:
        """Return the median phases of each part of `transfer`."""
        key = tuple(self._engine.part_keys(transfer))
        if key not in self._medians:
            self._medians[key] = self._measure(transfer)
        parts = self._medians[key]
        self.served += parts
        return parts

    def _measure(self, transfer: Transfer) -> list[Phases]:
        rounds = [self._once(transfer) for _ in range(self._repeats + 1)][1:]
        parts = zip(*rounds, strict=True)  # the rounds of each part
        found = [
            Phases(*map(statistics.median, zip(*part, strict=True))) for part in parts
        ]
        if self._link is None:
            return found
        lanes = self._engine.deployment.lanes(transfer.src, transfer.dst)
        sizes = self._engine.part_bytes(transfer)
        return [
            part._replace(move_s=self._link.transfer_s(size, lanes))
            for part, size in zip(found, sizes, strict=True)
        ]

    def _once(self, transfer: Transfer) -> list[Phases]:
        seconds: list[float] = []
        start_s = time.perf_counter()
        for pause in self._engine.start(transfer):
            jax.block_until_ready(pause.arrays)
            end_s = time.perf_counter()
            seconds.append(end_s - start_s)
            start_s = end_s
        return [Phases(*seconds[i : i + 3]) for i in range(0, len(seconds), 3)]


def parse_sides(text: str) -> Deployment:
    """Read 'tp1pp2:tp1', the prefill and the decode side.

    Raises:
      ValueError: on anything else.
    """
    prefill, colon, decode = text.partition(":")
    if not colon:
        raise ValueError(f"deployments: expected PREFILL:DECODE, got '{text}'")
    return Deployment.parse(f"prefill:{prefill},decode:{decode}")
