"""What serving costs on top of the device work: each figure beside its bound.

    python -m experiments.overhead
    python -m experiments.overhead --parts=host,decode --out=overhead.json

host     Host time of an engine step, from `Engine.start` to the tokens as a tuple, with
         a program that does nothing in place of the model: it takes the same number of
         arrays, donates the cache and returns zeros. So packing, copying to the device,
         dispatch and copying back are all real; what is left of device time is the few
         microseconds of an empty program. Waiting in threads is in the whole loop only.
decode   Tokens per second of the whole loop (controller, wall backend, engine) with
         the batch full and only decodes going on, over those of the bare program.
prefill  The same for full prefill steps back to back.
handoff  KV from mesh to mesh: gather, move, insert. Over a numpy copy of as many bytes
         into a new array; over three of them, as it copies all three times; and over
         the shortest way to write it in JAX: indexing, `jax.device_put` to the other
         sharding, `.at[].set`.
m32      32 requests at once, beside what a peer JAX engine reached on two such cores.

Large blocks of host memory stay with the process when they are freed, as they do on an
accelerator (`timing.keep_freed_memory`); the copy that is the bound gains from it too.

Warm-up and compilation are outside the timing; figures are medians of rounds that
alternate between the two sides of a ratio. About 3 minutes on 2 cores. On a busy
machine ratios hold better than absolute figures, so the load is printed as well.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from disagg_jax.control.loop import serve
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.metrics import SLO
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Request
from disagg_jax.sim.workers import process_pool
from disagg_jax.work import Event, Step, Work
from experiments.benchmarks.engines import (
    NamedShape,
    Rig,
    bare_step_s,
    burst,
    colocated,
)
from experiments.benchmarks.handoff import handoff_figures, handoff_rig
from experiments.benchmarks.no_op_programs import HollowGroup, host_step_us
from experiments.benchmarks.timing import (
    Figure,
    interleaved,
    keep_freed_memory,
    load_average,
    table,
)
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import expect_used, integers, writable
from experiments.runs.folder import write_text
from models.config import ModelConfig, get_config

BLOCK_TOKENS = 16  # in all parts but m32
PAIRS = ((4, 4), (4, 2), (2, 4), (1, 4))  # hand-off: TP of prefill, TP of decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the parts measure, and how often."""

    config: ModelConfig
    batches: Sequence[int] = (16, 64)  # requests in a decode step
    handoff_mib: Sequence[int] = (1, 16, 128)
    repeats: int = 7  # rounds that a median is taken over
    prompt: int = 64  # tokens of a request in the host and decode parts
    output: int = 64
    prefill_tokens: int = 512  # of a full prefill step of 4 prompts
    named: NamedShape | None = None  # None is m32


# -- host and decode: a full batch -----------------------------------------------------


def _full_batch(options: Options, batch: int) -> tuple[Rig, DecodeShape, list[Request]]:
    """An instance, its decode step, and requests that fill it in one prefill step."""
    prefill = PrefillShape(batch * options.prompt, batch)
    context = options.prompt + options.output
    rig, shape = colocated(
        options.config, prefill, context=context, block_tokens=BLOCK_TOKENS
    )
    return rig, shape, burst(options.config, batch, options.prompt, options.output)


def host(options: Options) -> list[Figure]:
    """Host time of a decode step, of the controller, and of all from token to token."""
    figures: list[Figure] = []
    for batch in options.batches:
        rig, shape, requests = _full_batch(options, batch)
        (instance,) = rig.engine.instances
        hollow = HollowGroup.replace(rig.engine, instance.buckets.step_shapes)
        micros = host_step_us(rig.engine, hollow, shape, 100 * options.repeats)
        micros |= _host_loop_us(rig, requests, options.repeats)
        figures += [
            Figure(
                part="host",
                name=f"B{batch} {name}",
                measured=value,
                bound=100.0 + batch,
                unit="us",
                bound_name="100 us + 1 us per token",
                better="less",
                aim=1.0 if name == "step" else None,
            )
            for name, value in micros.items()
        ]
    return figures


def _host_loop_us(
    rig: Rig, requests: Sequence[Request], repeats: int
) -> dict[str, float]:
    """Medians over decode steps."""
    runs = [_host_loop_s(rig, requests) for _ in range(repeats + 1)][1:]
    controller_s, loop_s = (sum(part, []) for part in zip(*runs, strict=True))
    return {
        "controller": statistics.median(controller_s) * 1e6,
        "whole loop": statistics.median(loop_s) * 1e6,
    }


def _host_loop_s(
    rig: Rig, requests: Sequence[Request]
) -> tuple[list[float], list[float]]:
    """From each finished decode step to the plan of the next; between the tokens."""
    backend, plans_s = WallBackend(rig.engine), []

    def watch(now_s: float, events: Sequence[Event], works: Sequence[Work]) -> None:
        steps = [work for work in works if isinstance(work, Step)]
        if any([step.slices[0].is_decode for step in steps]):  # makes them
            plans_s.append(backend.now_s() - now_s)

    with rig.engine.serving():
        timelines = serve(rig.controller(), backend, requests, observer=watch)
    return plans_s, np.diff(timelines[0].token_s).tolist()


def decode(options: Options) -> list[Figure]:
    """Decode tokens per second of the whole loop and of the bare program."""
    return [
        _against_bare(
            "decode", f"B{batch}", batch, options, *_full_batch(options, batch)
        )
        for batch in options.batches
    ]


def prefill(options: Options) -> list[Figure]:
    """Prefill tokens per second of the whole loop and of the bare program."""
    rows, steps = 4, 12
    prompt = options.prefill_tokens // rows
    shape = PrefillShape(rows * prompt, rows)
    rig, _ = colocated(
        options.config,
        shape,
        context=prompt,
        block_tokens=BLOCK_TOKENS,
        decodes=False,
    )
    requests = burst(options.config, rows * steps, prompt, 1)
    name = f"{rows} x {prompt}"
    return [_against_bare("prefill", name, shape.tokens, options, rig, shape, requests)]


def _against_bare(
    part: str,
    name: str,
    tokens: int,
    options: Options,
    rig: Rig,
    shape: StepShape,
    requests: Sequence[Request],
) -> Figure:
    """`tokens` over the time of a step: in the whole loop, and of `shape` alone."""
    steps = options.output if isinstance(shape, DecodeShape) else 12
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


def _loop_step_s(rig: Rig, requests: Sequence[Request]) -> float:
    """Mean seconds from one step's tokens to the next one's, all steps alike."""
    timelines = rig.serve(requests)
    ends_s = sorted({stamp for t in timelines for stamp in t.token_s})
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


# -- hand-off --------------------------------------------------------------------------


def handoff(options: Options) -> list[Figure]:
    """KV from a prefill to a decode mesh, against a copy and against device_put."""
    block_bytes = options.config.kv_bytes_per_token * BLOCK_TOKENS
    sizes = {mib: math.ceil(mib * 2**20 / block_bytes) for mib in options.handoff_mib}
    figures: list[Figure] = []
    for src_tp, dst_tp in PAIRS:
        blocks = sorted(set(sizes.values()))
        rig = handoff_rig(options.config, src_tp, dst_tp, blocks, BLOCK_TOKENS)
        for mib in sizes:
            name = f"TP{src_tp}->TP{dst_tp} {mib} MiB"
            equal = src_tp == dst_tp
            figures += handoff_figures(name, rig, sizes[mib], options.repeats, equal)
    return figures


# -- the named shape -------------------------------------------------------------------

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
    requests = burst(shape.config, shape.requests, shape.prompt, shape.output)
    runs: list[dict[str, float]] = []
    for i in range(options.repeats + 1):
        bare_s = bare_step_s(rig.engine, 1, shape.decode_shape, 50)
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


# -- command line ----------------------------------------------------------------------

PARTS: dict[str, Callable[[Options], list[Figure]]] = {
    "host": host,
    "decode": decode,
    "prefill": prefill,
    "handoff": handoff,
    "m32": named_shape,
}
# JAX's host devices share a pool of as many threads: with 8 of them a program on one
# device took 1.3 times as long as with 2. So parts that need fewer run in a process of
# their own.
DEVICES = {"host": 2, "decode": 2, "prefill": 2, "handoff": 8, "m32": 2}

_PARTS = flags.DEFINE_list("parts", list(PARTS), "What to measure.")
_MODEL = flags.DEFINE_string("model", "m32", "Model of all parts but m32.")
_BATCHES = flags.DEFINE_list("batches", ["16", "64"], "Requests in a decode step.")
_MIB = flags.DEFINE_list("handoff_mib", ["1", "16", "128"], "Sizes of a hand-off.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds that a median is taken over.")
# Other experiments have an --out as well, and a test may import several.
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", allow_override=True)
# The parts that read a flag; --repeats is for all.
_READERS = (
    (_MODEL, ("host", "decode", "prefill", "handoff")),
    (_BATCHES, ("host", "decode")),
    (_MIB, ("handoff",)),
)


def run(parts: Sequence[str], options: Options) -> list[Figure]:
    """Measures `parts`, and prints the figures of each as soon as they are there.

    Raises:
      ValueError: on bad options, or a part that needs more devices than there are.
    """
    check(parts, options)
    for part in parts:
        if (have := len(jax.devices())) < DEVICES[part]:
            raise ValueError(
                f"part {part} needs {DEVICES[part]} devices, got {have} "
                f"{jax.default_backend()} devices"
            )
    print(f"{os.cpu_count()} cores, load average {load_average()} before\n")
    figures: list[Figure] = []
    for part in parts:
        found = PARTS[part](options)
        print(f"{table(found)}\n\nload average {load_average()}\n", flush=True)
        figures += found
    return figures


def check(parts: Sequence[str], options: Options) -> None:
    """Raises ValueError on what cannot be measured, without asking for devices."""
    if not parts:
        raise ValueError(f"parts: expected some of {list(PARTS)}, got none")
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
    context, limit = options.prompt + options.output, options.config.max_length
    if context > limit:
        name = options.config.name
        raise ValueError(
            f"{name}: expected at most {limit} tokens, got {context} tokens"
        )


def to_json(figures: Sequence[Any]) -> str:
    """The figures as JSON values, and what they were measured on."""
    result = {
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "figures": figures,
    }
    return json.dumps(result, indent=2) + "\n"


@command
def main() -> None:
    host_devices.one_thread_each()
    parts, out = _PARTS.value, writable(_OUT.value)
    options = Options(
        config=get_config(_MODEL.value),
        batches=integers("batches", _BATCHES.value),
        handoff_mib=integers("handoff_mib", _MIB.value),
        repeats=_REPEATS.value,
    )
    check(parts, options)
    for flag, readers in _READERS:
        expect_used(
            not set(parts).isdisjoint(readers),
            flag,
            expected=f"--parts with {' or '.join(readers)}",
            got=f"--parts={','.join(parts)}",
        )
    groups = _by_devices(parts)
    if len(groups) > 1:
        figures = [f for group in groups for f in _run_apart(group, options)]
    else:
        figures = _run_here(parts, options)
    if out is not None:
        write_text(out, to_json(figures))


def _by_devices(parts: Sequence[str]) -> list[list[str]]:
    """Parts that can share a process."""
    return [
        [part for part in parts if DEVICES[part] == devices]
        for devices in sorted({DEVICES[part] for part in parts})
    ]


def _run_apart(parts: Sequence[str], options: Options) -> list[Any]:
    """Runs `parts` in a process of their own, which prints; their figures."""
    with process_pool(1) as mapper:
        (figures,) = mapper(functools.partial(_run_here, options=options), [parts])
    return figures


def _run_here(parts: Sequence[str], options: Options) -> list[Any]:
    """Splits the host into the devices that `parts` need, and runs them."""
    if "handoff" in parts:
        keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", DEVICES[parts[0]])
    return [figure.to_json() for figure in run(parts, options)]


if __name__ == "__main__":
    app.run(main)
