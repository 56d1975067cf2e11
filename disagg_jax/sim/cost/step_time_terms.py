"""The form of a program's time: a sum of terms, each with a coefficient >= 0.

    prefill  1, T, T^2, R, bends                      T tokens, R rows with logits
    decode   1, B, P, B P                             B decodes over P blocks of KV
    mixed    1, T, T C, C, R, P, B P, bends           chunks attend to C blocks of KV

1 is launches and streaming the weights; T the linear layers; T^2, T C and B P the
products of attention; C and P reading KV; R the unembedding. A bend is the excess of T
over a breakpoint: a step takes the larger of compute and streaming (SARATHI), so its
time bends upwards where compute overtakes streaming, and where caches overflow. With
coefficients >= 0 a larger program never takes less time, and a least-squares fit cannot
make up large terms that cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg_jax.programs import StepShape

TOKEN_BREAKPOINTS = (32, 128, 512, 2048)

_BENDS = tuple(f"T>{tokens}" for tokens in TOKEN_BREAKPOINTS)
TERMS: dict[str, tuple[str, ...]] = {
    "prefill": ("1", "T", "TT", "R", *_BENDS),
    "decode": ("1", "B", "P", "BP"),
    "mixed": ("1", "T", "TC", "C", "R", "P", "BP", *_BENDS),
}


def values(program: StepShape) -> tuple[float, ...]:
    """Return the value of each of `TERMS[program.kind]`."""
    _, T, R, C, B, P = program
    bends = tuple(float(max(0, T - tokens)) for tokens in TOKEN_BREAKPOINTS)
    if program.kind == "decode":
        return (1.0, B, P, B * P)
    if program.kind == "prefill":
        return (1.0, T, T * T, R, *bends)
    return (1.0, T, T * C, C, R, P, B * P, *bends)


def time_s(program: StepShape, coefficients: Sequence[float]) -> float:
    """Return the sum of the terms, in seconds."""
    return sum(map(float.__mul__, map(float, values(program)), coefficients))
