"""Fitting forms, with coefficients >= 0, to measured times; least relative errors.

    terms      the sums of `sim/cost/terms.py`, which the simulator uses
    distserve  DistServe's: 1, T, T^2 of a prefill; 1, B, P of a decode; their sum of a
               step with both, with T C for chunks (`sim/cost/distserve.py`)
    roofline   t0 + max(compute, memory): compute is T and the products of attention,
               memory is 1 and the blocks of KV; for decodes T is B

The last two are there to be compared with the first on the same measurements.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from disagg_jax.programs import StepShape
from disagg_jax.sim.cost import terms

# Compiled once for each shape: as it is, it is compiled anew in each call.
_nnls = jax.jit(optax.nnls, static_argnums=2)
_STEPS = 20_000  # of the projected gradient: 8 digits of what an active set finds


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 with the least mean squared relative error.

    Args:
      rows: the value of each term, for each measurement.
      seconds: of each, > 0.
    """
    design = np.array(rows) / np.array(seconds)[:, None]  # each is to add up to 1
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0  # a term that is 0 in all
    with jax.enable_x64(True):
        found = _nnls(jnp.asarray(design / scale), jnp.ones(len(design)), _STEPS)
        return (np.asarray(found) / scale).tolist()


def fit_programs(seconds: Mapping[StepShape, float]) -> tuple[float, ...]:
    """The coefficients of `terms.TERMS`, for programs of one kind."""
    rows = [terms.values(program) for program in seconds]
    return tuple(fit(rows, list(seconds.values())))


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """`(base, slope)` of base + slope x."""
    base, slope = fit([(1.0, x) for x in seconds], list(seconds.values()))
    return base, slope


# -- forms -----------------------------------------------------------------------------

Predict = Callable[[StepShape], float]
# By kind, those of `terms.TERMS` that a form has.
_DISTSERVE = {
    "prefill": ("1", "T", "TT"),
    "decode": ("1", "B", "P"),
    "mixed": ("1", "T", "TC", "B", "P"),
}
_COMPUTE = {"prefill": ("T", "TT"), "decode": ("B", "BP"), "mixed": ("T", "TC", "BP")}
_MEMORY = {"prefill": ("1",), "decode": ("1", "P"), "mixed": ("1", "C", "P")}


def _pick(program: StepShape, names: Sequence[str]) -> list[float]:
    """The values of some terms."""
    _, T, R, C, B, P = program
    products = {"TT": T * T, "TC": T * C, "BP": B * P}
    known = {"1": 1, "T": T, "R": R, "C": C, "B": B, "P": P, **products}
    return [float(known[name]) for name in names]


def fit_terms(seconds: Mapping[StepShape, float]) -> Predict:
    """Programs of one kind, as the simulator fits them."""
    found = fit_programs(seconds)
    return lambda program: terms.time_s(program, found)


def fit_distserve(seconds: Mapping[StepShape, float]) -> Predict:
    """The same by DistServe's form."""
    rows = [_pick(p, _DISTSERVE[p.kind]) for p in seconds]
    found = fit(rows, list(seconds.values()))
    return lambda p: float(np.dot(_pick(p, _DISTSERVE[p.kind]), found))


def fit_roofline(seconds: Mapping[StepShape, float]) -> Predict:
    """The same by a roofline and a constant.

    The larger of two sums is no linear problem: gradient descent on the logarithms of
    the coefficients, from where each term alone makes half of the mean time, and from
    where all of memory or the constant is next to nothing. The best is taken.
    """
    kind = next(iter(seconds)).kind
    parts = [
        np.array([_pick(p, names[kind]) for p in seconds])
        for names in (_COMPUTE, _MEMORY)
    ]
    compute = parts[0].shape[1]
    scale = np.concatenate([part.mean(axis=0) for part in parts])
    scale[scale == 0] = 1.0  # a term that is 0 in all
    times = np.array(list(seconds.values()))
    unit = times.mean()
    design = np.concatenate(parts, axis=1) / scale
    with jax.enable_x64(True):
        found = np.asarray(
            _descend(jnp.asarray(design), jnp.asarray(times / unit), compute)
        )
    share = found[1:] * unit / scale

    def predict(program: StepShape) -> float:
        values = _pick(program, (*_COMPUTE[kind], *_MEMORY[kind]))
        each = share * values
        return float(found[0] * unit + max(each[:compute].sum(), each[compute:].sum()))

    return predict


@functools.partial(jax.jit, static_argnums=2)
def _descend(design: jax.Array, times: jax.Array, compute: int) -> jax.Array:
    """`[1 + terms]` the constant and the coefficients, all > 0."""

    def loss(logs: jax.Array) -> jax.Array:
        constant, each = jnp.exp(logs[0]), design * jnp.exp(logs[None, 1:])
        larger = jnp.maximum(each[:, :compute].sum(1), each[:, compute:].sum(1))
        return jnp.mean(((constant + larger) / times - 1) ** 2)

    schedule = optax.cosine_decay_schedule(0.05, _STEPS)
    adam = optax.adam(schedule)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        logs, state = carry
        updates, state = adam.update(jax.grad(loss)(logs), state)
        return (optax.apply_updates(logs, updates), state), None

    def descend(start: jax.Array) -> jax.Array:
        (logs, _), _ = jax.lax.scan(step, (start, adam.init(start)), length=_STEPS)
        return logs

    place = jnp.arange(design.shape[1] + 1)
    none = [place < 0, place > compute, place == 0]
    starts = jnp.log(jnp.where(jnp.stack(none), 1e-4, 0.5)).astype(design.dtype)
    ends = jax.vmap(descend)(starts)
    return jnp.exp(ends[jnp.argmin(jax.vmap(loss)(ends))])


FORMS: Mapping[str, Callable[[Mapping[StepShape, float]], Predict]] = {
    "terms": fit_terms,
    "distserve": fit_distserve,
    "roofline": fit_roofline,
}


def left_out_error(
    seconds: Mapping[StepShape, float], form: str = "terms", parts: int = 5
) -> float | None:
    """Mean relative error of a form for programs of one kind that it was not given.

    Every `parts`-th is left out in turn. None where there are fewer than two parts.
    """
    items = list(seconds.items())
    if len(items) < 2 * parts:
        return None
    errors: list[float] = []
    for i in range(parts):
        rest = [item for n, item in enumerate(items) if n % parts != i]
        predict = FORMS[form](dict(rest))
        errors += [abs(predict(p) / time_s - 1) for p, time_s in items[i::parts]]
    return statistics.fmean(errors)
