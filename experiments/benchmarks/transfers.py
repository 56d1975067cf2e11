"""Measuring KV transfers: how fast they are, and what a request sees of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from disagg_jax.control.backend import Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.batch import MixedShape, PrefillShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import (
    TimingExecutor,
    measure_step_times,
    outcome,
    run_alone,
)
from disagg_jax.request import Request
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim.clock import VirtualBackend
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.work import Step, Task, Transfer
from experiments.benchmarks.engines import NO_STEPS, Rig
from experiments.benchmarks.handoff import handoff_rig, handoff_s, scattered_transfer
from models import transformer
from models.config import ModelConfig

BLOCK = 16  # tokens in a block
OUTPUT_TOKENS = 4  # tokens: the second is the one that waits for KV


# -- bandwidth of each formulation -----------------------------------------------------


class Rate(NamedTuple):
    """How fast a way to move KV is."""

    pair: str
    way: str
    size_bytes: int
    seconds: float
    copy_s: float  # of as many bytes, on the host, in the same rounds


def rates(
    config: ModelConfig,
    pairs: Sequence[tuple[int, int]],
    sizes_bytes: Sequence[int],
    layer_groups: int,
    repeats: int,
) -> list[Rate]:
    """Every way, pair of meshes and size."""
    block_bytes = BLOCK * config.kv_bytes_per_token
    blocks = sorted({math.ceil(size / block_bytes) for size in sizes_bytes})
    found: list[Rate] = []
    for src_tp, dst_tp in pairs:
        whole, groups = (
            handoff_rig(config, src_tp, dst_tp, blocks, BLOCK, layer_groups=n)
            for n in (1, layer_groups)
        )
        for n in blocks:
            found += _rates(f"tp{src_tp}->tp{dst_tp}", whole, groups, n, repeats)
    return found


def _rates(pair: str, whole: Rig, groups: Rig, n: int, repeats: int) -> list[Rate]:
    transfer = scattered_transfer(whole, n)
    stream = dataclasses.replace(transfer, step=1)  # of a step that is not going on
    ways = {
        "whole": lambda: sum(run_alone(whole.engine, transfer)[0]),
        "groups": lambda: sum(run_alone(groups.engine, stream)[0]),
    }
    seconds = handoff_s(whole, transfer, ways, repeats)
    size, copy_s = whole.engine.transfer_bytes(transfer), seconds.pop("copy")
    return [Rate(pair, way, size, time_s, copy_s) for way, time_s in seconds.items()]


# -- what is seen of it ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """When KV leaves."""

    chunks: int = 1  # of a prompt
    layer_groups: int = 1  # of a stage
    streams: bool = True  # while the rest is computed

    def policy(self, prompt: int) -> Policy:
        """Of the prefill side."""
        if self.chunks == 1:
            return PrefillOnly(token_budget=prompt, max_seqs=1)
        return PrefillChunked(token_budget=self.chunk_tokens(prompt), max_seqs=1)

    def chunk_tokens(self, prompt: int) -> int:
        """In whole blocks."""
        return math.ceil(prompt / self.chunks / BLOCK) * BLOCK

    def buckets(self, prompt: int) -> Buckets:
        """The programs of the prefill side: just what is needed."""
        blocks, tokens = math.ceil(prompt / BLOCK), self.chunk_tokens(prompt)
        if self.chunks == 1:
            return dataclasses.replace(
                NO_STEPS, prefill=(PrefillShape(prompt, 1),), transfer_blocks=(blocks,)
            )
        shape = MixedShape(tokens=tokens, rows=1, context=blocks, decodes=0, blocks=0)
        sizes = tuple(sorted({tokens // BLOCK, blocks}))
        return dataclasses.replace(NO_STEPS, mixed=(shape,), transfer_blocks=sizes)


def modes(chunks: int, layer_groups: int) -> dict[str, Mode]:
    """Every mode by name."""
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
    params: transformer.Params,
    deployment: str,
    name: str,
    mode: Mode,
    prompt: int,
    link: LinkSpec | None,
    repeats: int,
) -> Seen:
    """Measures the programs that one request needs, and puts it on the timeline."""
    engine = _engine(config, params, deployment, mode, prompt)
    engine.compile(sampled=False)
    times = measure_step_times([engine], repeats, streams=mode.streams)
    phases = _Phases(engine, link, repeats)

    def timing(work: Task, _: Sequence[float]) -> Outcome:
        if isinstance(work, Step):
            return outcome(work, [times[key] for key in engine.part_keys(work)])
        return outcome(work, [sum(part) for part in phases.of(work)])

    policies = {Role.PREFILL: mode.policy(prompt), Role.DECODE: DecodeOnly(max_seqs=1)}
    memory = [instance.model.memory for instance in engine.instances]
    controller = Controller(engine.deployment, policies, memory, streams=mode.streams)
    request = Request(id=0, arrival_s=0, prompt_tokens=prompt, max_tokens=OUTPUT_TOKENS)
    backend = VirtualBackend(TimingExecutor(engine, timing))
    (timeline,) = serve(controller, backend, [request])
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


def _engine(
    config: ModelConfig,
    params: transformer.Params,
    deployment: str,
    mode: Mode,
    prompt: int,
) -> Engine:
    prefill = mode.buckets(prompt)
    blocks = math.ceil((prompt + OUTPUT_TOKENS) / BLOCK)
    decode = dataclasses.replace(
        NO_STEPS, decode_rows=(1,), pool_blocks=(blocks,), transfer_blocks=()
    )
    memory = KVMemory(
        num_blocks=blocks, block_tokens=BLOCK, max_context=prompt + OUTPUT_TOKENS
    )
    parsed = parse_sides(deployment)
    devices = jax.devices()
    return Engine(
        config,
        params,
        parsed,
        devices,
        [memory] * 2,
        [prefill, decode],
        layer_groups=mode.layer_groups,
    )


class _Phases:
    """Medians of the phases of transfers, by size and kind, and what was asked for."""

    def __init__(self, engine: Engine, link: LinkSpec | None, repeats: int):
        self._engine, self._link, self._repeats = engine, link, repeats
        self._medians: dict[tuple[str, ...], list[Phases]] = {}
        self.served: list[Phases] = []  # of every part of every transfer so far

    def of(self, transfer: Transfer) -> list[Phases]:
        """Of each part of `transfer`."""
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
    """Reads 'tp1pp2:tp1', the prefill and the decode side.

    Raises:
      ValueError: on anything else.
    """
    prefill, colon, decode = text.partition(":")
    if not colon:
        raise ValueError(f"deployments: expected PREFILL:DECODE, got '{text}'")
    return Deployment.parse(f"prefill:{prefill},decode:{decode}")
