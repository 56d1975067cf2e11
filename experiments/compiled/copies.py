"""The ops that write a copy of the KV pool to HBM, or of half an array of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from experiments.compiled.hlo import (
    HBM,
    ArrayShape,
    Computation,
    Instruction,
    Module,
    Shape,
    arrays,
    asynchronous,
)
from experiments.compiled.uses import UPDATES, fusion_uses, inlined

# What only moves values. Half a pool that went through other ops is no copy of it.
_MOVES = {
    *("bitcast", "bitcast-convert", "broadcast", "concatenate", "convert", "copy"),
    *("dynamic-slice", "gather", "pad", "reshape", "reverse", "select", "slice"),
    "transpose",
}
_NOT_EXECUTED = {"bitcast", "parameter", "tuple", "get-tuple-element"}
_COPIED = 0.5  # share of the pool's elements from which it is a copy
# Whether a value came from the pool by moves alone; of a tuple for each part.
_Origin: TypeAlias = "bool | tuple[_Origin, ...]"


def pool_copies(module: Module, pool: Sequence[int]) -> set[str]:
    """Return the names of ops that write at least half a pool array, taken from it.

    Args:
      pool: the shape of an array of the pool, on a device: each argument of the program
        that has this shape is one.
    """
    walk = _Walk(module, math.prod(pool))
    entry = module.entry
    shapes = [parameter.shape for parameter in entry.parameters]
    walk.run(entry, [_is_pool(shape, tuple(pool)) for shape in shapes])
    return walk.copies


def _is_pool(shape: Shape, pool: tuple[int, ...]) -> _Origin:
    if isinstance(shape, ArrayShape):
        return shape.dims == pool
    return tuple(_is_pool(part, pool) for part in shape)


class _Walk:
    """Follows the pool through the computations that a program runs."""

    def __init__(self, module: Module, pool_elements: int):
        self._module, self._least = module, _COPIED * pool_elements
        self.copies: set[str] = set()

    def run(self, computation: Computation, given: Sequence[_Origin]) -> _Origin:
        """Note the copies that a computation makes, and return its result's origin."""
        origins: dict[str, _Origin] = {}
        pairs = asynchronous(computation)
        for each in computation.instructions.values():
            x, _ = pairs.get(each.name, (each, each))
            operands = [origins[name] for name in x.operands]
            origins[x.name] = self._origin(x, operands, given)
            if x.opcode not in _NOT_EXECUTED:
                written = self._written_elements(x)
                if any(
                    came and elements >= self._least
                    for came, elements in zip(
                        _flat(origins[x.name]), written, strict=False
                    )
                ):
                    self.copies.add(x.name)
        return origins[computation.root.name]

    def _origin(
        self, x: Instruction, operands: Sequence[_Origin], given: Sequence[_Origin]
    ) -> _Origin:
        match x.opcode:
            case "parameter":
                return given[int(x.literal)]
            case "tuple":
                return tuple(operands)
            case "get-tuple-element":
                (whole,) = operands
                return whole[x.ints("index")[0]] if isinstance(whole, tuple) else False
            case "while":
                return self.run(
                    self._module.computations[x.called("body")[0]], operands
                )
            case "call" | "async":
                name = x.called("to_apply", "calls")[0]
                return self.run(self._module.computations[name], operands)
            case "fusion":
                # Nothing inside is an op of its own.
                fused = self._fused(x.called("calls")[0])
                return _Walk(self._module, 0).run(fused, operands)
            case _ if x.opcode in UPDATES or x.opcode.endswith(("-done", "-update")):
                return operands[0]
            case _ if x.opcode in _MOVES or _puts_together(x):
                return any(came is True for came in operands)
            case _:
                return False

    def _written_elements(self, x: Instruction) -> Iterator[float]:
        """Yield what is written to HBM of each array of the result."""
        results = list(arrays(x.shape))
        if x.opcode in ("while", "call", "async", *UPDATES):
            return
        if x.opcode.endswith(("-done", "-update")):
            return
        shares: Sequence[float] = [1.0] * len(results)
        if x.opcode == "fusion":
            shares = fusion_uses(self._fused(x.called("calls")[0])).writes
        for share, array in zip(shares, results, strict=True):
            yield share * array.elements if array.space == HBM else 0.0

    @functools.cache  # noqa: B019 (the walk is short-lived)
    def _fused(self, name: str) -> Computation:
        return inlined(self._module, name)


def _puts_together(x: Instruction) -> bool:
    """Return whether slices that were copied into VMEM apart are used as one array."""
    return x.text("custom_call_target") == "ConcatBitcast"


def _flat(origin: _Origin) -> Iterator[bool]:
    if isinstance(origin, bool):
        yield origin
    else:
        for part in origin:
            yield from _flat(part)
