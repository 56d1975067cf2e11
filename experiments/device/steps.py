"""Decode and prefill steps beside their bounds, at several batches and contexts."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from disagg_jax.engine.attention.registry import choose_kernel
from experiments import performance
from experiments.benchmarks.engines import bare_engine, compile_steps
from experiments.benchmarks.peaks import Peaks, spec_sheet
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import Sizes
from experiments.performance import StepOptions, StepTime
from experiments.report.table import numbers

_HEAD = (
    *("step", "ms", "bound ms", "tok/s", "of the read", "of the matmul"),
    *("of the bound", "of spec GB/s", "of spec FLOP/s"),
)


def groups(sizes: Sizes, block_tokens: int) -> Iterator[StepOptions]:
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


def problem(sizes: Sizes) -> str:
    """Return the room that a device lacks."""
    fits = any(map(sizes.batches_at, sizes.contexts))
    return "" if fits else "no batch of these contexts has room beside the weights"


def run(bench: Bench) -> Found:
    """Measure them on one engine, a group after the other."""
    sizes = bench.sizes
    chosen = choose_kernel(sizes.attention, jax.default_backend(), sizes.config)
    listed = list(groups(sizes, chosen.kernel.block_tokens))
    shapes = [shape for options in listed for shape in performance.step_loads(options)]
    engine = bare_engine(
        sizes.config,
        shapes,
        chosen.kernel.block_tokens,
        sizes.attention,
        compiled=False,
    )
    print(f"# {sizes.config.name} {sizes.config.dtype}, {engine.programs.attention}")
    best: dict[str, float] = {}  # share of the bound, by kind
    left_out: list[str] = []
    for options in listed:
        if bench.deadline.passed():
            left_out.append(f"decodes over {options.context} tokens")
            continue
        compile_steps(engine, performance.step_loads(options))
        peaks, steps, taken = performance.measure(
            options, engine, stop=bench.deadline.passed
        )
        if few := options.repeats - taken:
            left_out.append(f"{few} of {options.repeats} rounds at {options.context}")
        print("", *performance.peak_figures(peaks), sep="\n")
        print(*numbers([_HEAD, *(_row(s, options, peaks) for s in steps)]), sep="\n")
        for step in steps:
            share = step.bound.seconds / step.seconds
            best[step.kind] = max(share, best.get(step.kind, 0.0))
    said = ", ".join(f"{kind} {share:.0%}" for kind, share in best.items())
    return Found(f"at best {said} of the bound", ", ".join(left_out))


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
