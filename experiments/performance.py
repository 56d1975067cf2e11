"""Measures steps of the engine beside the best that the device allows.

    python -m experiments.performance --cores=1
    python -m experiments.performance --model=llama-3-8b --batches=1,8,32,64,128 \
        --prompts=128,512,2048 --context=1024     # on an accelerator, in bfloat16

peaks    Reading a large array, and a large matmul in the model's dtype, each in a jit;
         of a known accelerator also the spec sheet.
steps    Decode at each batch and prefill at each prompt length: the compiled program
         alone, its cache donated. The bound is the roofline with these peaks: weights
         and the KV of the context that is there read once, causal prompt attention
         (`experiments/benchmarks/peaks.py`). `memory` and `compute` are the shares of
         the two peaks, `bound` the share of what the longer of the two allows.
dense    The same decode with a plain [batch, kv heads, context, head_dim] cache.
handoff  KV from one device to another, over a numpy copy of as many bytes.
host     Host time of a step, with a program that computes nothing.

--trace=DIR profiles each step once, after it was timed: DIR gets what TensorBoard's
profiler reads, and a perfetto_trace.json.gz for ui.perfetto.dev.

Weights are random: no time depends on them. Medians of rounds that go over all peaks
and steps in turn. On a busy machine shares hold better than times. About 2 minutes on
2 cores; no device is shared with another process, so nothing else should run. After
--minutes no other round and no other part is begun: medians are of the rounds that were
taken, one at least, and what is left out is named.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
from collections.abc import Sequence

import jax

from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.engine import Engine
from disagg_jax.errors import require
from disagg_jax.programs.shapes import StepShape
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.work import StepLoad
from experiments.benchmarks.dense_baseline import dense_step_s
from experiments.benchmarks.engines import bare_engine, bare_step_s
from experiments.benchmarks.handoff import handoff_figures
from experiments.benchmarks.no_op_programs import NoOpGroup, host_figure, host_step_us
from experiments.benchmarks.peaks import Peaks, StepBound, peak_probes, spec_sheet
from experiments.benchmarks.timing import (
    Figure,
    check_numbers,
    keep_freed_memory,
    load_average,
    medians,
    table,
    values_in_turn,
)
from experiments.cli import host_devices
from experiments.cli.attention import attention_flag
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_used, integers, writable
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.report.table import numbers
from experiments.runs.folder import commit, write_text
from models.config import ModelConfig, get_engine_config

# Tokens per second of a peer JAX engine with a plain dense cache, on one pinned core;
# its decodes are at a context of 256 tokens.
PEER = {
    ("smollm2-135m", "float32"): {
        "decode": {1: 32.0, 8: 133.0, 16: 126.0},
        "prefill": {128: 635.0, 512: 537.0},
    }
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The steps to measure, and how often."""

    config: ModelConfig
    batches: Sequence[int] = (1, 8, 16)  # requests in a decode step
    context: int = 256  # tokens that each of them attends to, the new one included
    prompts: Sequence[int] = (128, 512)  # tokens of the one prompt of a prefill step
    block_tokens: int = 64
    attention: str = AUTO  # the kernel
    handoff_mib: int = 16  # 0 is no hand-off
    repeats: int = 5  # rounds that a median is taken over
    dense: bool = True  # whether decode with a plain cache is timed as well
    trace: pathlib.Path | None = None  # folder for a jax.profiler trace of the steps

    def __post_init__(self) -> None:
        check_numbers(
            batches=self.batches,
            prompts=self.prompts or [1],  # none: decodes alone
            context=[self.context],
            block_tokens=[self.block_tokens],
            repeats=[self.repeats],
        )
        require(self.handoff_mib >= 0, "handoff_mib: expected >= 0", self.handoff_mib)
        whole = f"context: expected a multiple of block_tokens={self.block_tokens}"
        require(self.context % self.block_tokens == 0, whole, self.context)
        longest, limit = max([self.context, *self.prompts]), self.config.max_length
        most = f"{self.config.name}: expected at most {limit} tokens"
        require(longest <= limit, most, longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step, its time, and its least work."""

    kind: str  # "decode" or "prefill"
    size: int  # requests of a decode, tokens of a prefill
    seconds: float
    dense_s: float | None  # with a plain cache
    bound: StepBound

    def row(self, peaks: Peaks, peer_tok_s: float | None) -> tuple[str, ...]:
        bound, rate = self.bound, self.size / self.seconds
        return (
            f"{self.kind} {self.size}",
            f"{bound.size_bytes / 1e6:.4g}",
            f"{bound.flops / 1e9:.4g}",
            f"{self.seconds * 1e3:.2f}",
            f"{bound.seconds * 1e3:.2f}",
            f"{rate:.1f}",
            f"{bound.size_bytes / self.seconds / peaks.bytes_s:.2f}",
            f"{bound.flops / self.seconds / peaks.flops:.2f}",
            f"{bound.seconds / self.seconds:.2f}",
            "" if self.dense_s is None else f"{self.dense_s * 1e3:.2f}",
            "" if self.dense_s is None else f"{self.dense_s / self.seconds:.2f}",
            "" if peer_tok_s is None else f"{peer_tok_s:g}",
            "" if peer_tok_s is None else f"{rate / peer_tok_s:.2f}",
        )


_HEAD = (
    *("step", "MB", "GFLOP", "ms", "bound ms", "tok/s", "memory", "compute", "bound"),
    *("dense ms", "over dense", "peer tok/s", "over peer"),
)


def measure(
    options: StepOptions,
    engine: Engine,
    progress: Progress = silent,
    stop: Stop = never,
) -> tuple[Peaks, list[StepTime], int]:
    """Measure the peaks and the steps, in the same rounds; return their number too.

    Args:
      stop: asked before each round; see `values_in_turn`.
    """
    config = options.config
    loads = step_loads(options)
    probes, once = peak_probes(config.dtype)
    timers = dict(probes)
    for shape in loads:
        timers[str(shape)] = lambda s=shape: bare_step_s(engine, 0, s, 4)
        if options.dense and shape.kind == "decode":
            timers[f"dense {shape}"] = dense_step_s(
                engine, shape.rows, options.context, steps=4
            )
    found = values_in_turn(options.repeats, timers, progress, stop)
    seconds = medians(found)
    peaks = Peaks(
        bytes_s=once.bytes_s / seconds["read"], flops=once.flops / seconds["matmul"]
    )
    steps = [
        StepTime(
            kind=shape.kind,
            size=shape.tokens,
            seconds=seconds[str(shape)],
            dense_s=seconds.get(f"dense {shape}"),
            bound=StepBound.of(config, load, peaks),
        )
        for shape, load in loads.items()
    ]
    return peaks, steps, len(found["read"])


def step_loads(options: StepOptions) -> dict[StepShape, StepLoad]:
    """Return the steps, and the load of each."""
    blocks = options.context // options.block_tokens
    decode = {
        StepShape.decode(n, n * blocks): StepLoad((), n, n * options.context)
        for n in options.batches
    }
    prefill = {
        StepShape.prefill(n, 1): StepLoad(((0, n),), 0, 0) for n in options.prompts
    }
    return {**decode, **prefill}


def trace_steps(options: StepOptions, engine: Engine, folder: pathlib.Path) -> None:
    """Profile each step once; it must have run before, so that this is no warm-up."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for shape in step_loads(options):
            with jax.profiler.TraceAnnotation(f"{shape.kind} {shape.tokens}"):
                bare_step_s(engine, 0, shape, 1)


def peak_figures(peaks: Peaks) -> list[str]:
    """Return the peaks, beside the spec sheet's if there is one."""
    spec = spec_sheet()
    known = (None, None) if spec is None else (spec.hbm_bytes_s, spec.peak_flops)
    rows = (
        ("memory bandwidth", peaks.bytes_s / 1e9, known[0], "GB/s"),
        ("matmul", peaks.flops / 1e9, known[1], "GFLOP/s"),
    )
    return [
        f"{name}: {value:.1f} {unit}"
        + (f", {value * 1e9 / most:.2f} of the spec sheet's" if most else "")
        for name, value, most, unit in rows
    ]


def handoff(options: StepOptions) -> list[Figure]:
    """Measure KV moves from device to device; the model's other sizes are 1."""
    kv_only = dataclasses.replace(options.config, vocab_size=1, mlp=1)
    mib, block_tokens = [options.handoff_mib], options.block_tokens
    return handoff_figures(kv_only, 1, 1, mib, block_tokens, options.repeats)


def host(options: StepOptions, engine: Engine) -> list[Figure]:
    """Measure the host time of decode steps. The engine computes nothing afterwards."""
    shapes = [s for s in step_loads(options) if s.kind == "decode"]
    no_ops, steps = NoOpGroup.replace(engine, shapes), 100 * options.repeats
    return [
        host_figure(
            shape.rows, "step", host_step_us(engine, no_ops, shape, steps)["step"]
        )
        for shape in shapes
    ]


def run(
    options: StepOptions, progress: Progress = silent, deadline: Deadline = ENDLESS
) -> str:
    """Return the report. Every part is printed as soon as it is there.

    Args:
      deadline: after which no other round or part is begun; the report names what is
        left out.
    """
    lines: list[str] = []

    def say(*some: str) -> None:
        print(*some, sep="\n", flush=True)
        lines.extend(some)

    config = options.config
    engine = bare_engine(
        config, list(step_loads(options)), options.block_tokens, options.attention
    )
    say(
        f"# {config.name} {config.dtype}, context {options.context}, blocks of "
        f"{options.block_tokens} tokens, {engine.programs.attention}",
        f"# {options.repeats} rounds on {jax.devices()[0].device_kind}, "
        f"{len(os.sched_getaffinity(0))} cores",
        f"# commit {commit()}, {datetime.date.today()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, load average "
        f"{load_average()} before",
        "",
    )
    peaks, steps, taken = measure(options, engine, progress, deadline.passed)
    peer = PEER.get((config.name, config.dtype), {})
    rows = [step.row(peaks, peer.get(step.kind, {}).get(step.size)) for step in steps]
    say(*peak_figures(peaks), "")
    say(*numbers([_HEAD, *rows]), "")
    few = options.repeats - taken
    left_out = [f"{few} of {options.repeats} rounds"] if few else []

    def begins(part: str) -> bool:
        if deadline.passed():
            left_out.append(part)
        return not deadline.passed()

    if options.trace is not None and begins("trace"):
        trace_steps(options, engine, options.trace)
    figures: list[Figure] = []
    if begins("host"):
        figures += host(options, engine)  # the engine computes nothing afterwards
    if options.handoff_mib and len(jax.devices()) > 1 and begins("handoff"):
        figures += handoff(options)
    if figures:
        say(table(figures), "")
    if left_out:
        say(f"left out, as --minutes were spent: {', '.join(left_out)}", "")
    say(f"load average {load_average()} after")
    return "\n".join(lines) + "\n"


# -- command line ----------------------------------------------------------------------

FLAGS = Flags()
_MODEL = FLAGS.string("model", "smollm2-135m", ENGINE_MODEL)
_DTYPE = FLAGS.string("dtype", None, "Instead of the preset's.")
_BATCHES = FLAGS.list("batches", ["1", "8", "16"], "Requests in a decode step.")
_CONTEXT = FLAGS.integer("context", 256, "Tokens each of them attends to.")
_PROMPTS = FLAGS.list("prompts", ["128", "512"], "Tokens of a prefill step.")
_BLOCK = FLAGS.integer(
    "block_tokens", None, "Tokens in a block of KV; by default what suits the device."
)
_ATTENTION = attention_flag(FLAGS)
_MIB = FLAGS.integer("handoff", 16, "MiB of a hand-off; 0 is none.")
_REPEATS = FLAGS.integer("repeats", 5, "Rounds that a median is taken over.")
_DENSE = FLAGS.boolean("dense", True, "Time a plain dense cache as well.")
_TRACE = FLAGS.string("trace", None, "Folder for a jax.profiler trace of steps.")
_CORES = FLAGS.integer("cores", None, "Cores to run on; default is all.")
_MINUTES = MinutesFlag(FLAGS, "rounds and parts")
_OUT = FLAGS.string("out", None, "File to write.")


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    out, config = writable(_OUT.value), get_engine_config(_MODEL.value)
    if _DTYPE.value is not None:
        config = dataclasses.replace(config, dtype=_DTYPE.value)
    # All of this before JAX starts and says what the device is.
    if _CORES.value is not None:
        host_devices.pin(_CORES.value)
    keep_freed_memory()
    if _MIB.value:
        host_devices.provide(2)
    chosen = choose_kernel(_ATTENTION.value, jax.devices()[0], config, _BLOCK.value)
    options = StepOptions(
        config=config,
        batches=integers("batches", _BATCHES.value),
        context=_CONTEXT.value,
        prompts=integers("prompts", _PROMPTS.value),
        block_tokens=_BLOCK.value or chosen.kernel.block_tokens,
        attention=_ATTENTION.value,
        handoff_mib=_MIB.value,
        repeats=_REPEATS.value,
        dense=_DENSE.value,
        trace=pathlib.Path(_TRACE.value) if _TRACE.value else None,
    )
    if options.handoff_mib:
        several = len(jax.devices()) > 1
        expect_used(several, _MIB, expected="two devices", got="one")
    report = run(options, ProgressLines().step, deadline)
    if out is not None:
        write_text(out, report)


if __name__ == "__main__":
    main()
