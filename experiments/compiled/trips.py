"""How often a loop of a compiled program goes round, where its text says so."""

from __future__ import annotations

import re

from experiments.compiled.hlo import Computation, Instruction, Module
from experiments.compiled.uses import inlined

_SAME = ("copy", "bitcast", "convert", "reshape")


def loop_trips(module: Module, where: Computation, loop: Instruction) -> int | None:
    """Return the rounds of a `while`, or None if they are not known.

    XLA notes them for some targets (`known_trip_count`). Otherwise a counter must begin
    at a constant, grow by a constant, and be compared with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = inlined(module, loop.called("condition")[0])
    body = inlined(module, loop.called("body")[0])
    test = condition.root
    if test.opcode != "compare" or test.text("direction") not in ("LT", "LE"):
        return None
    counter, limit = condition.operands(test)
    index = _element(condition, counter)
    if index is None:
        return None
    begin = _constant(where, _part(where, loop, index))
    step = _step(body, index)
    at = _element(condition, limit)
    end = (
        _constant(condition, limit)
        if at is None
        else _constant(where, _part(where, loop, at))
    )
    if begin is None or end is None or not step:
        return None
    last = end + (test.text("direction") == "LE")
    return max(0, -(-(last - begin) // step))


def _part(where: Computation, loop: Instruction, index: int) -> Instruction:
    """Return the `index`-th of what the loop begins with."""
    (start,) = where.operands(loop)
    while start.opcode in _SAME:
        (start,) = where.operands(start)
    return where.operands(start)[index] if start.opcode == "tuple" else start


def _step(body: Computation, index: int) -> int | None:
    """Return what a round adds to the `index`-th part of the loop's state."""
    if body.root.opcode != "tuple":
        return None
    x = _skip(body, body.operands(body.root)[index])
    if x.opcode != "add":
        return None
    terms = body.operands(x)
    steps = [_constant(body, y) for y in terms if _element(body, y) != index]
    return steps[0] if len(steps) == 1 else None


def _element(where: Computation, x: Instruction) -> int | None:
    """Return which part of the computation's one parameter `x` is, if it is one."""
    x = _skip(where, x)
    if x.opcode != "get-tuple-element":
        return None
    return x.ints("index")[0] if where.operands(x)[0].opcode == "parameter" else None


def _constant(where: Computation, x: Instruction) -> int | None:
    x = _skip(where, x)
    if x.opcode != "constant" or not re.fullmatch(r"-?\d+", x.literal.strip()):
        return None
    return int(x.literal)


def _skip(where: Computation, x: Instruction) -> Instruction:
    while x.opcode in _SAME:
        (x,) = where.operands(x)
    return x
