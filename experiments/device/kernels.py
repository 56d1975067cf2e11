"""Every attention kernel against float64, and beside the bytes and FLOPs it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from disagg_jax.engine.attention import KERNELS, AttentionKernel, choose_kernel
from experiments.benchmarks.attention import (
    STEPS,
    AttentionShape,
    attention_s,
    draw,
    random_decodes,
    read_s,
    step_error,
)
from experiments.benchmarks.peaks import spec_sheet
from experiments.benchmarks.timing import interleaved
from experiments.device.part import Bench, Found, Kept, Part
from experiments.device.sizes import DeviceSizes
from experiments.report.table import align
from models.config import ModelConfig

# bfloat16 rounds weights, values and outputs to 3 digits; float32 leaves room for
# another order of sums and a device's own exp.
_LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
_STEPS = 8  # in one timed program, beside which a device's launch is short
_WORDS = 100  # characters of a reason

Timer: TypeAlias = Callable[[], float]


def usable(sizes: DeviceSizes) -> tuple[list[AttentionKernel], str]:
    """Return the kernels that can serve the model, and why others cannot.

    They are the listed ones, and the one that was asked for.
    """
    config, device = sizes.config, sizes.devices
    asked = choose_kernel(sizes.attention, device, config).kernel
    listed = [kind.on(device) for kind in KERNELS.values()]
    kernels = list(dict.fromkeys([*listed, asked]))
    problems = {k: _problem(k, config) for k in kernels}
    reasons = [f"{k.name}: {why}" for k, why in problems.items() if why]
    return [k for k, why in problems.items() if not why], "; ".join(reasons)


def _problem(kernel: AttentionKernel, config: ModelConfig) -> str:
    try:
        return kernel.problem(config, kernel.block_tokens)
    except Exception as failure:  # what it imports may not be there
        return _reason(failure)


def run(bench: Bench) -> Found:
    """Print the errors of each kernel, then its times."""
    sizes, config = bench.sizes, bench.sizes.config
    kernels, reasons = usable(sizes)
    print(f"{config.name} {config.dtype}, one layer on one device")
    if reasons:
        print(f"cannot serve it: {reasons}")
    kept = bench.kept(PART.name)
    right, wrong, broken = [], [], []
    for kernel in kernels:
        found: list[bool | None] = []
        for step in STEPS:
            name = f"{kernel.name:12} {step:8}"
            said, ok = kept[name] if name in kept else _checked(kernel, config, step)
            if ok:  # what is wrong, or cannot run, is tried again
                kept[name] = said, ok
            print(name, said)
            found.append(ok)
        names = wrong if False in found else broken if None in found else right
        names.append(kernel.name)
    lists = {"right": right, "WRONG": wrong, "cannot run": broken}
    said = "; ".join(
        f"{', '.join(names)} {how}" for how, names in lists.items() if names
    )
    print()
    return Found(said or "no kernel", _times(bench, kernels, kept), wrong=bool(wrong))


def _checked(
    kernel: AttentionKernel, config: ModelConfig, step: str
) -> tuple[str, bool | None]:
    """Return what is said of a kernel's error, and whether it is small.

    None is a kernel that raises: cuDNN may be missing, or a compiler.
    """
    most = _LARGEST_ERROR[config.dtype]
    try:
        error = step_error(kernel, config, step)
    except Exception as failure:
        return _reason(failure), None
    right = error <= most  # not so of NaN
    return f"error {error:.1e} {'<=' if right else 'WRONG, over'} {most:g}", right


def _reason(failure: Exception) -> str:
    said = " ".join(str(failure).split())
    return f"cannot run: {type(failure).__name__}: {said[:_WORDS]}"


# -- time ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """Attention of one shape.

    Attributes:
      amount: bytes it must read, or FLOPs it must compute.
      unit: of `amount` over time, in 1e9.
      peak: of the spec sheet, in `amount` a second; None if it is not known.
      timer: compiles a kernel's attention, and returns a timer of it.
      others: the same of what kernels are held against.
    """

    name: str
    amount: float
    unit: str
    peak: float | None
    timer: Callable[[AttentionKernel], Timer]
    others: Mapping[str, Callable[[], Timer]]

    def table(self, kernels: Sequence[AttentionKernel], repeats: int) -> list[str]:
        """Time them, and return a row for each."""
        of_kernels = {k.name: functools.partial(self.timer, k) for k in kernels}
        rows = [(self.name, "ms", self.unit, "of the spec sheet", "")]
        for name, compiled in {**self.others, **of_kernels}.items():
            try:
                seconds = interleaved(repeats, {"": compiled()})[""]
            except Exception as failure:
                rows.append((name, "", "", "", _reason(failure)))
                continue
            rate = self.amount / seconds
            share = "" if self.peak is None else f"{rate / self.peak:.2f}"
            rows.append((name, f"{seconds * 1e3:.4g}", f"{rate / 1e9:.4g}", share, ""))
        return align(rows, right=(1, 2, 3))


def _times(bench: Bench, kernels: Sequence[AttentionKernel], kept: Kept) -> str:
    """Print a table for each shape; return what there was no time for."""
    steps = 1 if bench.sizes.devices.platform == "cpu" else _STEPS
    cases = [*_decode_cases(bench.sizes, steps), *_prompt_cases(bench.sizes, steps)]
    for i, case in enumerate(cases):
        if case.name not in kept:
            if bench.deadline.passed():
                return f"times of {len(cases) - i} of {len(cases)} shapes"
            kept[case.name] = case.table(kernels, bench.sizes.repeats)
        print(*kept[case.name], "", sep="\n")
    return ""


def _decode_cases(sizes: DeviceSizes, steps: int) -> Iterator[_Case]:
    """Yield decodes of equal context, beside one read of their KV."""
    config, spec = sizes.config, spec_sheet()
    for context in sizes.contexts:
        for rows in sizes.batches_at(context):
            tokens = rows * context
            shape = AttentionShape(
                rows=rows,
                dtype=config.dtype,
                q_heads=config.q_heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
            )

            def timer(
                kernel: AttentionKernel,
                shape: AttentionShape = shape,
                tokens: int = tokens,
            ) -> Timer:
                shape = dataclasses.replace(shape, block_tokens=kernel.block_tokens)
                decodes = random_decodes(shape, tokens)
                return attention_s(kernel.decodes, *decodes, steps=steps)

            def read(shape: AttentionShape = shape, tokens: int = tokens) -> Timer:
                return read_s(random_decodes(shape, tokens).layer)

            yield _Case(
                name=f"decodes, {rows} over {context} tokens",
                amount=tokens * config.kv_bytes_per_token / config.layers,
                unit="GB/s of KV",
                peak=None if spec is None else spec.hbm_bytes_s,
                timer=timer,
                others={"one read": read},
            )


def _prompt_cases(sizes: DeviceSizes, steps: int) -> Iterator[_Case]:
    """Yield one prompt of each length: causal, so half of the products."""
    config, spec = sizes.config, spec_sheet()
    for tokens in sizes.prompts:

        def timer(kernel: AttentionKernel, tokens: int = tokens) -> Timer:
            heads = (config.q_heads, config.kv_heads, config.kv_heads)
            q, k, v = (
                draw(i, (tokens, n, config.head_dim), config.dtype)
                for i, n in enumerate(heads)
            )
            row_T = jnp.zeros(tokens, jnp.int32)
            return attention_s(kernel.prompts, q, k, v, row_T, steps=steps)

        yield _Case(
            name=f"prompt of {tokens} tokens",
            amount=2.0 * config.q_heads * config.head_dim * tokens**2,
            unit="GFLOP/s",
            peak=None if spec is None else spec.peak_flops,
            timer=timer,
            others={},
        )


PART = Part(
    name="kernels",
    about="attention kernels against float64, and their times",
    run=run,
    weight=3,
)
