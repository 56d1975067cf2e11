"""Measures what serving costs on top of the device work, beside a bound each.

    python -m experiments.overhead
    python -m experiments.overhead --parts=host,decode --out=overhead.json

host     Host time of an engine step, from `Engine.start` to the tokens as a tuple, with
         a no-op program in place of the model: it takes the same number of arrays,
         donates the cache and returns zeros. Packing, copying to the device, dispatch
         and copying back are all real; device time is the few microseconds of an empty
         program. Waiting in threads is in the whole loop only.
decode   Tokens per second of the whole loop (controller, wall backend, engine) with
         the batch full and only decodes going on, over those of the bare program.
prefill  The same for full prefill steps back to back.
attention
         Decode attention of one layer with the heads of Llama-3-8B in float32, 256 rows
         over 16k and 49k tokens, over a sum of the KV that it reads.
handoff  KV from mesh to mesh: gather, move, insert. Over a numpy copy of as many bytes
         into a new array; over three such copies, since KV is copied three times; and
         over the shortest way to write it in JAX: indexing, `jax.device_put` to the
         other sharding, `.at[].set`.
m32      32 requests at once, beside the figures of a peer JAX engine on two such cores.

Large blocks of host memory stay with the process when they are freed, as they do on an
accelerator (`timing.keep_freed_memory`); the copy that is the bound gains from it too.

Warm-up and compilation are outside the timing; figures are medians of rounds that
alternate between the two sides of a ratio. Takes about 3 minutes on 2 cores. On a busy
machine ratios hold better than absolute figures, so the load is printed as well. After
--minutes no other part is begun, and those left out are named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.errors import require
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.summary import summarise
from disagg_jax.programs.shapes import StepShape
from disagg_jax.progress import Progress, silent
from disagg_jax.request import Request
from disagg_jax.sim.workers import process_pool, worker_pool
from disagg_jax.work import Event, Step, Work
from experiments.benchmarks.attention import AttentionShape, attention_figure
from experiments.benchmarks.engines import (
    NamedShape,
    bare_step_s,
    burst,
    burst_deployment,
)
from experiments.benchmarks.handoff import handoff_figures
from experiments.benchmarks.no_op_programs import NoOpGroup, host_figure, host_step_us
from experiments.benchmarks.timing import (
    Figure,
    check_numbers,
    interleaved,
    keep_freed_memory,
    load_average,
    table,
)
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_used, integers, writable
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.runs.folder import write_text
from models.config import ModelConfig, get_config, get_engine_config

BLOCK_TOKENS = 16  # in all parts but attention and m32
PAIRS = ((4, 4), (4, 2), (2, 4), (1, 4))  # hand-off: TP of prefill, TP of decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadOptions:
    """Sizes of the measurements, and how often each is taken."""

    config: ModelConfig
    batches: Sequence[int] = (16, 64)  # requests in a decode step
    handoff_mib: Sequence[int] = (1, 16, 128)
    repeats: int = 7  # rounds that a median is taken over
    prompt: int = 64  # tokens of a request in the host and decode parts
    output: int = 64
    prefill_tokens: int = 512  # of a full prefill step of 4 prompts
    attention: AttentionShape = AttentionShape()
    named: NamedShape | None = None  # None is m32


# -- host and decode: a full batch -----------------------------------------------------


def _full_batch(
    options: OverheadOptions, batch: int
) -> tuple[ServedDeployment, StepShape, list[Request]]:
    """Return an instance, its decode step, and requests that fill its batch at once."""
    config, prompt, output = options.config, options.prompt, options.output
    deployment, shape = burst_deployment(
        config,
        StepShape.prefill(batch * prompt, batch),
        context=prompt + output,
        block_tokens=BLOCK_TOKENS,
    )
    return deployment, shape, burst(config, batch, prompt, output)


def host(options: OverheadOptions) -> list[Figure]:
    """Measure host time: of a decode step, of the controller, from token to token."""
    figures: list[Figure] = []
    for batch in options.batches:
        deployment, shape, requests = _full_batch(options, batch)
        engine = deployment.engine
        shapes = engine.instances[0].buckets.step_shapes
        no_ops = NoOpGroup.replace(engine, shapes)
        micros = host_step_us(engine, no_ops, shape, 100 * options.repeats)
        micros |= _host_loop_us(deployment, requests, options.repeats)
        figures += [host_figure(batch, name, value) for name, value in micros.items()]
    return figures


def _host_loop_us(
    deployment: ServedDeployment, requests: Sequence[Request], repeats: int
) -> dict[str, float]:
    """Return medians over decode steps."""
    runs = [_host_loop_s(deployment, requests) for _ in range(repeats + 1)][1:]
    controller_s, loop_s = (sum(part, []) for part in zip(*runs, strict=True))
    return {
        "controller": statistics.median(controller_s) * 1e6,
        "whole loop": statistics.median(loop_s) * 1e6,
    }


def _host_loop_s(
    deployment: ServedDeployment, requests: Sequence[Request]
) -> tuple[list[float], list[float]]:
    """Return seconds from each decode step to the plan of the next, and of gaps."""
    backend, plans_s = deployment.backend(), []

    def watch(now_s: float, events: Sequence[Event], works: Sequence[Work]) -> None:
        steps = [work for work in works if isinstance(work, Step)]
        if any([step.slices[0].is_decode for step in steps]):  # makes them
            plans_s.append(backend.now_s() - now_s)

    run = deployment.run(requests, observer=watch, backend=backend)
    return plans_s, np.diff(run.timelines[0].token_s).tolist()


def decode(options: OverheadOptions) -> list[Figure]:
    """Measure decode tokens per second of the whole loop and of the bare program."""
    return [
        _against_bare(
            "decode", f"B{batch}", batch, options, *_full_batch(options, batch)
        )
        for batch in options.batches
    ]


def prefill(options: OverheadOptions) -> list[Figure]:
    """Measure prefill tokens per second of the whole loop and of the bare program."""
    rows, steps = 4, 12
    prompt = options.prefill_tokens // rows
    shape = StepShape.prefill(rows * prompt, rows)
    deployment, _ = burst_deployment(
        options.config,
        shape,
        context=prompt,
        block_tokens=BLOCK_TOKENS,
        decodes=False,
    )
    requests = burst(options.config, rows * steps, prompt, 1)
    name = f"{rows} x {prompt}"
    return [
        _against_bare(
            "prefill", name, shape.tokens, options, deployment, shape, requests
        )
    ]


def _against_bare(
    part: str,
    name: str,
    tokens: int,
    options: OverheadOptions,
    deployment: ServedDeployment,
    shape: StepShape,
    requests: Sequence[Request],
) -> Figure:
    """Return `tokens` over the time of a step: in the whole loop, and `shape` alone."""
    steps = options.output if shape.kind == "decode" else 12
    step_s = interleaved(
        options.repeats,
        {
            "loop": lambda: _loop_step_s(deployment, requests),
            "bare": lambda: bare_step_s(deployment.engine, 0, shape, steps),
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


def _loop_step_s(deployment: ServedDeployment, requests: Sequence[Request]) -> float:
    """Return the mean seconds from one step's tokens to the next, all steps alike."""
    timelines = deployment.run(requests).timelines
    ends_s = sorted({stamp for t in timelines for stamp in t.token_s})
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


# -- attention -------------------------------------------------------------------------


def attention(options: OverheadOptions) -> list[Figure]:
    """Measure decode attention of one layer, and a read of its KV."""
    shape = options.attention
    kernel = XlaAttention(jax.default_backend())
    return [attention_figure(shape, kernel, n, options.repeats) for n in shape.tokens]


# -- hand-off --------------------------------------------------------------------------


def handoff(options: OverheadOptions) -> list[Figure]:
    """Measure KV moves from a prefill to a decode mesh, for every pair and size."""
    config, mib, repeats = options.config, options.handoff_mib, options.repeats
    return [
        figure
        for pair in PAIRS
        for figure in handoff_figures(config, *pair, mib, BLOCK_TOKENS, repeats)
    ]


# -- the named shape -------------------------------------------------------------------

# What a peer JAX engine reached on two such cores: (name, unit, value). Its decode
# attends to 512 slots for at most 164 tokens of context.
PEER = {
    "output_throughput": ("throughput", "tok/s", 1937.0),
    "median_ttft_ms": ("TTFT P50", "ms", 487.0),
    "median_tpot_ms": ("TPOT P50", "ms", 4.7),
    "bare_ms": ("bare decode step", "ms", 5.45),
}


def named_shape(options: OverheadOptions) -> list[Figure]:
    """Measure a burst on the wall clock, beside the peer's figures."""
    shape = options.named or NamedShape(config=get_config("m32"))
    deployment = shape.deployment()
    requests = burst(shape.config, shape.requests, shape.prompt, shape.output)
    runs: list[dict[str, float]] = []
    for i in range(options.repeats + 1):
        bare_s = bare_step_s(deployment.engine, 1, shape.decode_shape, 50)
        timelines = deployment.run(requests).timelines
        summary = summarise(timelines, SLO(ttft_s=1, tpot_s=1), devices=2)
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

PARTS: dict[str, Callable[[OverheadOptions], list[Figure]]] = {
    "host": host,
    "decode": decode,
    "prefill": prefill,
    "attention": attention,
    "handoff": handoff,
    "m32": named_shape,
}
# JAX's host devices share a pool of as many threads: with 8 of them a program on one
# device took 1.3 times as long as with 2. So parts that need fewer run in a process of
# their own.
DEVICES = {**dict.fromkeys(PARTS, 2), "handoff": 8}

FLAGS = Flags()
_PARTS = FLAGS.list("parts", list(PARTS), "What to measure.")
_MODEL = FLAGS.string(
    "model", "m32", f"Model of all parts but attention and m32. {ENGINE_MODEL}"
)
_BATCHES = FLAGS.list("batches", ["16", "64"], "Requests in a decode step.")
_MIB = FLAGS.list("handoff_mib", ["1", "16", "128"], "Sizes of a hand-off.")
_REPEATS = FLAGS.integer("repeats", 7, "Rounds that a median is taken over.")
_MINUTES = MinutesFlag(FLAGS, "parts")
_OUT = FLAGS.string("out", None, "JSON file to write.")
# The parts that read a flag; --repeats is for all.
_READERS = (
    (_MODEL, ("host", "decode", "prefill", "handoff")),
    (_BATCHES, ("host", "decode")),
    (_MIB, ("handoff",)),
)


def run(
    parts: Sequence[str],
    options: OverheadOptions,
    progress: Progress = silent,
    deadline: Deadline = ENDLESS,
) -> list[Figure]:
    """Measure `parts`, and print the figures of each as soon as it is done.

    Args:
      deadline: after which no other part is begun; those left out are named.

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
    of = f"parts on {DEVICES[parts[0]]} devices"
    for i, part in enumerate(parts):
        if deadline.passed():
            print(f"left out, as --minutes were spent: {', '.join(parts[i:])}\n")
            break
        progress(of, i, len(parts), f"now {part}")
        found = PARTS[part](options)
        print(f"{table(found)}\n\nload average {load_average()}\n", flush=True)
        figures += found
    return figures


def check(parts: Sequence[str], options: OverheadOptions) -> None:
    """Raise ValueError on bad parts or options, without asking for devices."""
    known = f"parts: expected some of {list(PARTS)}"
    if not parts:
        raise ValueError(f"{known}, got none")
    for part in parts:
        require(part in PARTS, known, part)
    check_numbers(
        batches=options.batches,
        handoff_mib=options.handoff_mib,
        repeats=[options.repeats],
    )
    context, limit = options.prompt + options.output, options.config.max_length
    if context > limit:
        name = options.config.name
        raise ValueError(
            f"{name}: expected at most {limit} tokens, got {context} tokens"
        )


def to_json(figures: Sequence[Any]) -> str:
    """Return the figures as JSON, and the machine they were measured on."""
    result = {
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "figures": figures,
    }
    return json.dumps(result, indent=2) + "\n"


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    host_devices.one_thread_each()
    parts, out = _PARTS.value, writable(_OUT.value)
    options = OverheadOptions(
        config=get_engine_config(_MODEL.value),
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
    # The clock is the machine's, so that processes have one deadline.
    run_here = functools.partial(_run_here, options=options, deadline=deadline)
    figures: list[Any] = []
    for group in groups:  # several: in a process of its own each, which prints
        with process_pool(1) if len(groups) > 1 else worker_pool(1) as mapper:
            figures += next(mapper(run_here, [group]))
    if out is not None:
        write_text(out, to_json(figures))


def _by_devices(parts: Sequence[str]) -> list[list[str]]:
    """Return groups of parts that can share a process."""
    return [
        [part for part in parts if DEVICES[part] == devices]
        for devices in sorted({DEVICES[part] for part in parts})
    ]


def _run_here(
    parts: Sequence[str], options: OverheadOptions, deadline: Deadline
) -> list[Any]:
    """Split the host into the devices that `parts` need, and run them."""
    if "handoff" in parts:
        keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", DEVICES[parts[0]])
    found = run(parts, options, ProgressLines().step, deadline)
    return [figure.to_json() for figure in found]


if __name__ == "__main__":
    main()
