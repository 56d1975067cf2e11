"""What serving costs on top of the device work: each figure beside its bound.

    python -m experiments.overhead
    python -m experiments.overhead --parts=host,decode --out=overhead.json

host     Host time of an engine step, from `Engine.start` to the tokens as a tuple, with
         a program that does nothing in place of the model: it takes the same number of
         arrays, donates the cache and returns the first numbers of its input. So
         packing, copying to the device, dispatch and copying back are all real; what
         is left of device time is the few microseconds of an empty program.
decode   Tokens per second of the whole loop (controller, wall backend, engine) with
         the batch full and only decodes going on, over those of the bare program.
prefill  The same for full prefill steps back to back.
handoff  KV from mesh to mesh: gather, move, insert. Over a numpy copy of as many bytes
         into fresh memory, and over plain `jax.device_put` between the same gather and
         insert.
m32      32 requests at once, beside what a peer JAX engine reached on two such cores.

Warm-up and compilation are outside the timing; figures are medians of rounds that
alternate between the two sides of a ratio. About 4 minutes on 2 idle cores. On a busy
machine ratios hold better than absolute figures, so the load is printed as well.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from disagg_jax.controller import Controller
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine import kv_cache
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.executor import full_slices, run_alone
from disagg_jax.engine.programs import Compiled, ModelOnMesh
from disagg_jax.engine.transfer import PiecePlan, piece_plan
from disagg_jax.metrics import SLO, summarise
from disagg_jax.request import Request
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_first import PrefillFirst
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.work import Event, Step, Transfer, Work
from experiments.timing import (
    Figure,
    Rig,
    bare_step_s,
    burst,
    interleaved,
    table,
    timed_s,
)
from models import transformer
from models.config import ModelConfig, get_config
from sharding.rules import RULES

BLOCK_TOKENS = 16  # in all parts but m32
PROMPT, OUTPUT = 64, 64  # tokens of a request in the host and decode parts
PAIRS = ((4, 4), (4, 2), (2, 4), (1, 4))  # hand-off: TP of prefill, TP of decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the parts measure, and how often."""

    config: ModelConfig
    batches: Sequence[int] = (16, 64)  # requests in a decode step
    handoff_mib: Sequence[int] = (1, 16, 128)
    repeats: int = 7  # rounds that a median is taken over
    prefill_tokens: int = 512  # of a full prefill step of 4 prompts
    named: NamedShape | None = None  # default: m32

    @property
    def params(self) -> transformer.Params:
        return transformer.init_params(self.config, 0)


# -- host
# -------------------------------------------------------------------------------


class HollowModel(ModelOnMesh):
    """Programs of the same inputs and outputs that compute nothing, and a stopwatch.

    On one device, with one layer group.
    """

    put_start_s = put_end_s = step_end_s = 0.0

    def put(self, vector: np.ndarray) -> Array:
        self.put_start_s = time.perf_counter()
        packed = super().put(vector)
        self.put_end_s = time.perf_counter()
        return packed

    def step(
        self, shape: StepShape, cache: list[kv_cache.Cache], packed: Array
    ) -> tuple[Array, Array]:
        out = super().step(shape, cache, packed)
        self.step_end_s = time.perf_counter()
        return out

    def _group_program(self, shape: StepShape, group: int) -> Compiled:
        real = super()._group_program(shape, group)
        args, _ = real.args_info
        _, out = real.out_info

        def hollow(params: Any, cache: kv_cache.Cache, packed: Array) -> Any:
            return cache, jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out
            )

        # keep_unused: jax would drop the weights, and the cost of passing them.
        program = jax.jit(hollow, donate_argnums=1, keep_unused=True)
        return program.lower(*args).compile()


def host(options: Options) -> list[Figure]:
    """Host time of a decode step, and the controller's."""
    figures: list[Figure] = []
    for batch in options.batches:
        rig, shape = _decode_rig(options, batch)
        _make_hollow(rig, options)
        aim = {"bound": 100.0 + batch, "bound_name": "100 us + 1 us per token"}
        micros = _host_step_us(rig, shape, 100 * options.repeats)
        loop = _host_loop_us(rig, options, batch)
        figures += [
            Figure(
                part="host",
                name=f"B{batch} {name}",
                measured=value,
                unit="us",
                better="less",
                aim=1.0 if name == "step" else None,
                **aim,
            )
            for name, value in (micros | loop).items()
        ]
    return figures


def _make_hollow(rig: Rig, options: Options) -> None:
    instance = rig.engine.instances[0]
    real = instance.model
    rules = RULES[instance.role]
    hollow = HollowModel(options.config, options.params, real.mesh, rules, real.memory)
    instance.model = hollow
    rig.engine.compile()


def _host_step_us(rig: Rig, shape: DecodeShape, steps: int) -> dict[str, float]:
    """Medians of the whole step and of its four parts."""
    model = rig.engine.instances[0].model
    assert isinstance(model, HollowModel)
    step = Step(0, 0, full_slices(shape, model.memory))
    samples: dict[str, list[float]] = {}
    with rig.engine.serving():
        for i in range(steps + 20):
            start_s = time.perf_counter()
            running = rig.engine.start(step)
            for _ in running:  # the tokens are there at once: no need to poll
                pass
            end_s = time.perf_counter()
            spans_s = {
                "step": end_s - start_s,
                "- pack": model.put_start_s - start_s,
                "- put": model.put_end_s - model.put_start_s,
                "- dispatch": model.step_end_s - model.put_end_s,
                "- readback": end_s - model.step_end_s,
            }
            for name, span_s in spans_s.items():
                if i >= 20:
                    samples.setdefault(name, []).append(span_s * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


class _TimedController(Controller):
    """Notes how long it took to turn a finished decode step into the next one."""

    def step(self, now_s: float, events: Sequence[Event]) -> list[Work]:
        start_s = time.perf_counter()
        works = super().step(now_s, events)
        span_s = time.perf_counter() - start_s
        if works and isinstance(works[0], Step) and works[0].slices[0].is_decode:
            self.spans_s = [*getattr(self, "spans_s", []), span_s]
        return works


def _host_loop_us(rig: Rig, options: Options, batch: int) -> dict[str, float]:
    """Per decode step: the controller, and everything from token to token."""
    controllers: list[float] = []
    loops: list[float] = []
    for i in range(options.repeats + 1):
        controller = rig.controller(_TimedController)
        assert isinstance(controller, _TimedController)
        requests = burst(options.config, batch, PROMPT, OUTPUT)
        timelines = rig.serve(requests, controller)
        if i:
            controllers += controller.spans_s
            loops += np.diff(timelines[0].token_s).tolist()
    return {
        "controller": statistics.median(controllers) * 1e6,
        "whole loop": statistics.median(loops) * 1e6,
    }


# -- decode and prefill -----------------------------------------------------------------


def _decode_rig(options: Options, batch: int) -> tuple[Rig, DecodeShape]:
    """One colocated instance whose batch is full after one prefill step."""
    blocks = batch * math.ceil((PROMPT + OUTPUT) / BLOCK_TOKENS)
    buckets = Buckets(
        prefill=(PrefillShape(batch * PROMPT, batch),),
        decode_rows=(batch,),
        pool_blocks=(blocks,),
        transfer_blocks=(),
    )
    policy = PrefillFirst(
        max_batched_tokens=batch * PROMPT, max_seqs=batch, watermark=0.0
    )
    rig = _colocated(options, policy, blocks, buckets)
    return rig, DecodeShape(batch, blocks)


def _colocated(
    options: Options, policy: PrefillFirst, blocks: int, buckets: Buckets
) -> Rig:
    memory = KVMemory(
        num_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        max_context=options.config.max_length,
    )
    policies = {Role.COLOCATED: policy}
    return Rig.build(
        options.config, options.params, "colocated:tp1", policies, [memory], [buckets]
    )


def _loop_step_s(rig: Rig, requests: Sequence[Request]) -> float:
    """Mean seconds from one step's tokens to the next one's, all steps alike."""
    timelines = rig.serve(requests)
    ends_s = sorted({stamp for t in timelines for stamp in t.token_s})
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def decode(options: Options) -> list[Figure]:
    """Decode tokens per second of the whole loop and of the bare program."""
    figures: list[Figure] = []
    for batch in options.batches:
        rig, shape = _decode_rig(options, batch)
        requests = burst(options.config, batch, PROMPT, OUTPUT)
        figures.append(
            _against_bare(f"B{batch}", "decode", batch, options, rig, shape, requests)
        )
    return figures


def prefill(options: Options) -> list[Figure]:
    """Prefill tokens per second of the whole loop and of the bare program."""
    tokens, rows, steps = options.prefill_tokens, 4, 12
    prompt = tokens // rows
    policy = PrefillFirst(max_batched_tokens=tokens, max_seqs=rows, watermark=0.0)
    shape = PrefillShape(tokens, rows)
    buckets = Buckets(
        prefill=(shape,), decode_rows=(), pool_blocks=(), transfer_blocks=()
    )
    blocks = rows * math.ceil(prompt / BLOCK_TOKENS)
    rig = _colocated(options, policy, blocks, buckets)
    requests = burst(options.config, rows * steps, prompt, 1)
    name = f"{rows} x {prompt}"
    return [_against_bare(name, "prefill", tokens, options, rig, shape, requests)]


def _against_bare(
    name: str,
    part: str,
    tokens: int,
    options: Options,
    rig: Rig,
    shape: StepShape,
    requests: Sequence[Request],
) -> Figure:
    steps = OUTPUT if isinstance(shape, DecodeShape) else 12
    step_s = interleaved(
        options.repeats,
        {
            "loop": lambda: _loop_step_s(rig, requests),
            "bare": lambda: bare_step_s(rig.engine, 0, shape, steps),
        },
    )
    return Figure(
        part=part,
        name=f"{name} whole loop",
        measured=tokens / step_s["loop"],
        bound=tokens / step_s["bare"],
        unit="tok/s",
        bound_name=f"bare {shape}, {step_s['bare'] * 1e3:.2f} ms",
        aim=0.9,
    )


# -- hand-off ---------------------------------------------------------------------------


def handoff(options: Options) -> list[Figure]:
    """KV from a prefill to a decode mesh, against a copy and against device_put."""
    block_bytes = options.config.kv_bytes_per_token * BLOCK_TOKENS
    sizes = {mib: math.ceil(mib * 2**20 / block_bytes) for mib in options.handoff_mib}
    figures: list[Figure] = []
    for src_tp, dst_tp in PAIRS:
        rig = _handoff_rig(options, src_tp, dst_tp, tuple(sizes.values()))
        for mib, blocks in sizes.items():
            name = f"TP{src_tp}->TP{dst_tp} {mib} MiB"
            figures += _handoff(name, rig, blocks, options.repeats)
    return figures


def _handoff_rig(options: Options, src_tp: int, dst_tp: int, sizes: tuple) -> Rig:
    memory = KVMemory(
        num_blocks=max(sizes),
        block_tokens=BLOCK_TOKENS,
        max_context=options.config.max_length,
    )
    buckets = Buckets(prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=sizes)
    return Rig.build(
        options.config,
        options.params,
        f"prefill:tp{src_tp},decode:tp{dst_tp}",
        {Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly()},
        [memory] * 2,
        [buckets] * 2,
    )


def _handoff(name: str, rig: Rig, blocks: int, repeats: int) -> list[Figure]:
    src, dst = rig.engine.instances
    # Blocks that lie scattered, as they do after a while of serving.
    order = np.random.default_rng(0).permutation(src.model.memory.num_blocks)
    ids = tuple(order[:blocks].tolist())
    request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
    transfer = Transfer(0, request, 0, 1, ids, ids, context=1)
    size = run_alone(rig.engine, transfer)[1][1]
    source = np.ones(size, np.uint8)
    plain = _plain_device_put(src.model, dst.model, ids)
    seconds = interleaved(
        repeats,
        {
            "ours": lambda: run_alone(rig.engine, transfer)[0],
            "copy": lambda: timed_s(source.copy),
            "plain": lambda: timed_s(lambda: plain(src.cache, dst.cache)),
        },
    )
    rate = {side: size / value / 1e9 for side, value in seconds.items()}
    equal = src.model.tp == dst.model.tp

    def figure(side: str, bound_name: str, aim: float | None) -> Figure:
        return Figure(
            part="handoff",
            name=name,
            measured=rate["ours"],
            bound=rate[side],
            unit="GB/s",
            bound_name=bound_name,
            aim=aim,
        )

    return [
        figure("copy", "numpy copy into fresh memory", 0.6 if equal else None),
        figure("plain", "gather, device_put, insert", None if equal else 2.0),
    ]


Caches = list[kv_cache.Cache]


def _plain_device_put(
    src: ModelOnMesh, dst: ModelOnMesh, ids: Sequence[int]
) -> Callable[[Caches, Caches], None]:
    """The hand-off with `jax.device_put` of the payload in place of our plan.

    The payload is a new array every time, because jax keeps the host's copy of one that
    passed through it.
    """
    plans = [_whole(model) for model in (src, dst)]
    src.compile_gather(len(ids), plans[0])
    dst.compile_insert(len(ids), plans[1])
    vector = np.array(ids, np.int32)

    def run(src_cache: Caches, dst_cache: Caches) -> None:
        src_ids, dst_ids = src.put(vector), dst.put(vector)
        payload = src.gather(0, src_cache[0], src_ids, plans[0])
        moved = jax.device_put(jax.block_until_ready(payload), dst.payload_sharding)
        jax.block_until_ready(moved)
        dst_cache[0], flag = dst.insert(0, dst_cache[0], dst_ids, moved, plans[1])
        jax.block_until_ready(flag)

    return run


def _whole(model: ModelOnMesh) -> PiecePlan:
    """A plan in which each shard is one piece."""
    return piece_plan(model.layout.kv, model.tp, model.layout.kv, model.tp)


# -- the named shape --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedShape:
    """A burst of equal requests on one prefill and one decode device."""

    config: ModelConfig
    requests: int = 32
    prompt: int = 100
    output: int = 64
    batch: int = 16  # requests in a decode step
    prefill_rows: int = 4
    block_tokens: int = 16

    @property
    def context(self) -> int:
        return self.prompt + self.output

    def rig(self) -> Rig:
        tokens = self.prefill_rows * self.prompt
        prompt_blocks = math.ceil(self.prompt / self.block_tokens)
        # The decode pool holds a batch; the prefill pool all that can wait for it.
        pools = (self.requests * prompt_blocks, self.batch * self._blocks)
        memory = [
            KVMemory(
                num_blocks=blocks,
                block_tokens=self.block_tokens,
                max_context=self.config.max_length,
            )
            for blocks in pools
        ]
        prefill = Buckets(
            prefill=(PrefillShape(tokens, self.prefill_rows),),
            decode_rows=(),
            pool_blocks=(),
            transfer_blocks=(prompt_blocks,),
        )
        decode = Buckets(
            prefill=(),
            decode_rows=(self.batch // 2, self.batch),
            pool_blocks=(pools[1] // 2, pools[1]),
            transfer_blocks=(prompt_blocks,),
        )
        policies = {
            Role.PREFILL: PrefillOnly(token_budget=tokens, max_seqs=self.prefill_rows),
            Role.DECODE: DecodeOnly(max_seqs=self.batch, watermark=0.0),
        }
        return Rig.build(
            self.config,
            transformer.init_params(self.config, 0),
            "prefill:tp1,decode:tp1",
            policies,
            memory,
            [prefill, decode],
        )

    @property
    def full_step(self) -> DecodeShape:
        return DecodeShape(self.batch, self.batch * self._blocks)

    @property
    def _blocks(self) -> int:
        return math.ceil(self.context / self.block_tokens)


# What a peer JAX engine reached on two such cores (issue 2): (name, unit, value). Its
# decode attends to 512 slots for at most 164 tokens of context.
PEER = {
    "output_throughput": ("throughput", "tok/s", 1937.0),
    "median_ttft_ms": ("TTFT P50", "ms", 487.0),
    "median_tpot_ms": ("TPOT P50", "ms", 4.7),
    "bare_ms": ("bare decode step", "ms", 5.45),
}


def named_shape(options: Options) -> list[Figure]:
    """A burst on the wall clock beside the peer's figures."""
    shape = options.named or NamedShape(config=get_config("m32"))
    rig = shape.rig()
    runs: list[dict[str, float]] = []
    for i in range(options.repeats + 1):
        bare_s = bare_step_s(rig.engine, 1, shape.full_step, 50)
        requests = burst(shape.config, shape.requests, shape.prompt, shape.output)
        summary = summarise(rig.serve(requests), SLO(ttft_s=1, tpot_s=1), devices=2)
        summary["bare_ms"] = bare_s * 1e3
        if i:
            runs.append({key: summary[key] or 0.0 for key in PEER})
    return [
        Figure(
            part=shape.config.name,
            name=name,
            measured=statistics.median(run[key] for run in runs),
            bound=peer,
            unit=unit,
            bound_name="peer JAX engine",
            better="more" if unit == "tok/s" else "less",
            aim=1.0,
        )
        for key, (name, unit, peer) in PEER.items()
    ]


# -- command line -----------------------------------------------------------------------

PARTS: dict[str, Callable[[Options], list[Figure]]] = {
    "host": host,
    "decode": decode,
    "prefill": prefill,
    "handoff": handoff,
    "m32": named_shape,
}
DEVICES = {"handoff": 8, "m32": 2}  # that a part takes, where it is more than one

_PARTS = flags.DEFINE_list("parts", list(PARTS), "What to measure.")
_MODEL = flags.DEFINE_string("model", "m32", "Model of all parts but m32.")
_BATCHES = flags.DEFINE_list("batches", ["16", "64"], "Requests in a decode step.")
_MIB = flags.DEFINE_list("handoff_mib", ["1", "16", "128"], "Sizes of a hand-off.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds that a median is taken over.")
# Other experiments have an --out as well, and a test may import several.
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", allow_override=True)


def run(parts: Sequence[str], options: Options) -> list[Figure]:
    """Measures `parts`, and prints the figures of each as soon as they are there.

    Raises:
      ValueError: on an unknown part, or one that needs more devices than there are.
    """
    check(parts, options)
    figures: list[Figure] = []
    for part in parts:
        found = PARTS[part](options)
        print(f"{table(found)}\n\nload average {_load()}\n", flush=True)
        figures += found
    return figures


def check(parts: Sequence[str], options: Options) -> None:
    """Raises ValueError on what could not be measured."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: expected some of {list(PARTS)}, got '{part}'")
    numbers = {
        "batches": options.batches,
        "handoff_mib": options.handoff_mib,
        "repeats": [options.repeats],
    }
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name}: expected numbers >= 1, got {list(values)}")
    for part in parts:
        if (have := len(jax.devices())) < DEVICES.get(part, 1):
            raise ValueError(
                f"part {part} needs {DEVICES[part]} devices, got {have} "
                f"{jax.default_backend()} devices"
            )


def _load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _integers(name: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {list(texts)}") from error


def _writable(path: str | None) -> pathlib.Path | None:
    if path is None:
        return None
    out = pathlib.Path(path)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a writable folder, got '{path}'")
    return out


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    jax.config.update("jax_num_cpu_devices", max(DEVICES.values()))
    try:
        out = _writable(_OUT.value)
        options = Options(
            config=get_config(_MODEL.value),
            batches=_integers("batches", _BATCHES.value),
            handoff_mib=_integers("handoff_mib", _MIB.value),
            repeats=_REPEATS.value,
        )
        print(f"{os.cpu_count()} cores, load average {_load()} before\n")
        figures = run(_PARTS.value, options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if out is not None:
        result = {
            "backend": jax.default_backend(),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
            "figures": [figure.to_json() for figure in figures],
        }
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
