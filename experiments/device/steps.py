"""Decode and prefill steps beside their bounds, at several batches and contexts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from disagg_jax.engine.attention.registry import choose_kernel
from disagg_jax.engine.engine import Engine
from disagg_jax.progress import Stop
from experiments.benchmarks.engines import bare_engine, compile_steps
from experiments.benchmarks.peaks import Peaks, spec_sheet
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes
from experiments.performance import (
    StepOptions,
    StepTime,
    measure,
    peak_figures,
    step_loads,
)
from experiments.report.table import numbers

_HEAD = (
    *("step", "ms", "bound ms", "tok/s", "of the read", "of the matmul"),
    *("of the bound", "of spec GB/s", "of spec FLOP/s"),
)


def groups(sizes: DeviceSizes, block_tokens: int) -> Iterator[StepOptions]:
    """Yield the steps that are measured together: those of one context.

    Prefills are with the first. Contexts are rounded up to whole blocks.
    """
    for i, tokens in enumerate(sizes.contexts):
        context = -(-tokens // block_tokens) * block_tokens
        if batches := sizes.batches_at(context):
            yield StepOptions(
                config=sizes.config,
                batches=batches,
                context=context,
                prompts=() if i else sizes.prompts,
                block_tokens=block_tokens,
                attention=sizes.attention,
                handoff_mib=0,
                repeats=sizes.repeats,
                dense=False,
            )


def problem(sizes: DeviceSizes) -> str:
    """Return the room that a device lacks."""
    fits = any(map(sizes.batches_at, sizes.contexts))
    return "" if fits else "no batch of these contexts has room beside the weights"


def run(bench: Bench) -> Found:
    """Measure them on one engine, a group after the other."""
    sizes, config, kept = bench.sizes, bench.sizes.config, bench.kept(PART.name)
    chosen = choose_kernel(sizes.attention, sizes.devices, config)
    block_tokens = chosen.kernel.block_tokens
    listed = list(groups(sizes, block_tokens))
    print(f"# {config.name} {config.dtype}, {chosen}")

    @functools.cache
    def engine() -> Engine:
        shapes = [shape for options in listed for shape in step_loads(options)]
        attention = sizes.attention
        return bare_engine(config, shapes, block_tokens, attention, compiled=False)

    best: dict[str, float] = {}  # share of the bound, by kind
    left_out: list[str] = []
    for options in listed:
        name = f"context {options.context}"
        whole = name in kept and kept[name]["rounds"] == options.repeats
        if not whole and not bench.deadline.passed():
            kept[name] = _measured(options, engine(), bench.deadline.passed)
        elif name not in kept:
            left_out.append(f"decodes over {options.context} tokens")
            continue
        found = kept[name]
        print("", *found["lines"], sep="\n")
        for kind, share in found["best"].items():
            best[kind] = max(share, best.get(kind, 0.0))
        if few := options.repeats - found["rounds"]:
            left_out.append(f"{few} of {options.repeats} rounds at {options.context}")
    said = ", ".join(f"{kind} {share:.0%}" for kind, share in best.items())
    return Found(f"at best {said} of the bound", ", ".join(left_out))


def _measured(options: StepOptions, engine: Engine, stop: Stop) -> dict[str, Any]:
    """Return a table, the best share of the bound of each kind, and the rounds."""
    compile_steps(engine, step_loads(options))
    peaks, steps, rounds = measure(options, engine, stop=stop)
    best: dict[str, float] = {}
    for step in steps:
        share = step.bound.seconds / step.seconds
        best[step.kind] = max(share, best.get(step.kind, 0.0))
    rows = [_HEAD, *(_row(step, options, peaks) for step in steps)]
    lines = [*peak_figures(peaks), *numbers(rows)]
    return {"lines": lines, "best": best, "rounds": rounds}


def _row(step: StepTime, options: StepOptions, peaks: Peaks) -> tuple[str, ...]:
    """Return a step's time, its bound by the measured peaks, and shares of peaks."""
    bound, seconds = step.bound, step.seconds
    spec = spec_sheet()
    of_spec = (
        ("", "")
        if spec is None
        else (
            f"{bound.size_bytes / seconds / spec.hbm_bytes_s:.2f}",
            f"{bound.flops / seconds / spec.peak_flops:.2f}",
        )
    )
    over = f" over {options.context}" if step.kind == "decode" else ""
    return (
        f"{step.kind} {step.size}{over}",
        f"{seconds * 1e3:.2f}",
        f"{bound.seconds * 1e3:.2f}",
        f"{step.size / seconds:.1f}",
        f"{bound.size_bytes / seconds / peaks.bytes_s:.2f}",
        f"{bound.flops / seconds / peaks.flops:.2f}",
        f"{bound.seconds / seconds:.2f}",
        *of_spec,
    )


PART = Part(
    name="steps",
    about="decode and prefill beside bounds",
    run=run,
    problem=problem,
    weight=3,
)
