"""How much of each operand an instruction reads, and how much of its result it writes.

A fusion reads of an operand what its results need. If all that it does with the pool is
take a few blocks, it reads these; if it puts blocks into the pool it was given, it
writes these and nothing else: XLA copies an operand before an update that cannot be in
place, and that copy is an instruction of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from experiments.compiled.hlo import (
    ArrayShape,
    Computation,
    Instruction,
    Module,
    arrays,
)

UPDATES = ("dynamic-update-slice", "scatter")
_SLICES = ("slice", "dynamic-slice", "gather")  # of the first operand, they take a part
# Results whose elements each need as large a share of every operand.
_SHARES = ("reduce", "concatenate", "bitcast", "bitcast-convert", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class Uses:
    """Shares of arrays, from 0 to 1."""

    reads: tuple[float, ...]  # of each operand
    writes: tuple[float, ...]  # of each array of the result


def single_uses(computation: Computation, instruction: Instruction) -> Uses:
    """Return the uses of an instruction that is no fusion."""
    operands = computation.operands(instruction)
    reads = _reads(instruction, operands, 1.0, in_place=True)
    if instruction.opcode in UPDATES:
        return Uses(tuple(reads), (_updated(instruction, operands),))
    return Uses(tuple(reads), (1.0,) * len(list(arrays(instruction.shape))))


def fusion_uses(fused: Computation) -> Uses:
    """Return the uses of a fusion; `fused` is what it calls, see `inlined`."""
    needed: dict[str, float] = dict.fromkeys(fused.instructions, 0.0)
    in_place: set[str] = set()
    writes: list[float] = []
    for result in results(fused):
        update = _skip_bitcasts(fused, result)
        if updates_parameter(fused, update):
            in_place.add(update.name)
            writes.append(_updated(update, fused.operands(update)))
        else:
            writes += [1.0] * len(list(arrays(result.shape)))
        needed[result.name] = 1.0
    for x in reversed(fused.instructions.values()):
        if needed[x.name] == 0 or not x.operands:
            continue
        shares = _reads(
            x, fused.operands(x), needed[x.name], in_place=x.name in in_place
        )
        for name, share in zip(x.operands, shares, strict=True):
            needed[name] = min(1.0, needed[name] + share)
    return Uses(tuple(needed[x.name] for x in fused.parameters), tuple(writes))


def results(computation: Computation) -> list[Instruction]:
    """Return what a computation's root gives: itself, or the parts of a tuple."""
    root = computation.root
    return computation.operands(root) if root.opcode == "tuple" else [root]


def updates_parameter(fused: Computation, instruction: Instruction) -> bool:
    """Return whether an instruction updates an array that was given to the fusion."""
    if instruction.opcode not in UPDATES:
        return False
    target = _skip_bitcasts(fused, fused.operands(instruction)[0])
    return target.opcode == "parameter"


def inlined(module: Module, name: str) -> Computation:
    """Return a fused computation with those that it calls put in their places."""
    found: dict[str, Instruction] = {}

    def add(computation: Computation, prefix: str, given: Sequence[str] | None) -> str:
        """Add the instructions and return the name of the root."""
        names: dict[str, str] = {}
        for x in computation.instructions.values():
            operands = [names[operand] for operand in x.operands]
            if x.opcode == "parameter" and given is not None:
                names[x.name] = given[int(x.literal)]
            elif x.opcode == "fusion":
                inner = module.computations[x.called("calls")[0]]
                names[x.name] = add(inner, f"{prefix}{x.name}/", operands)
            elif (
                x.opcode == "get-tuple-element" and found[operands[0]].opcode == "tuple"
            ):
                names[x.name] = found[operands[0]].operands[x.ints("index")[0]]
            else:
                names[x.name] = prefix + x.name
                found[names[x.name]] = dataclasses.replace(
                    x, name=names[x.name], operands=tuple(operands)
                )
        return names[computation.root.name]

    root = add(module.computations[name], "", None)
    return Computation(name, found, found[root])


def _reads(
    x: Instruction, operands: Sequence[Instruction], share: float, *, in_place: bool
) -> Iterator[float]:
    """Yield the share of each operand that a share of the result needs.

    Args:
      in_place: whether an update's first operand becomes the result as it is.
    """
    result = sum(array.elements for array in arrays(x.shape))
    for i, operand in enumerate(operands):
        size = max(1, sum(array.elements for array in arrays(operand.shape)))
        if i == 0 and x.opcode in UPDATES:
            yield 0.0 if in_place else share
        elif x.opcode in _SHARES:
            yield share
        elif (x.opcode in _SLICES and i == 0) or x.opcode in ("broadcast", "pad"):
            yield min(1.0, share * result / size)
        else:
            yield share if size == result else 1.0


def _updated(update: Instruction, operands: Sequence[Instruction]) -> float:
    """Return the share of its array that an update writes."""
    last = operands[-1] if update.opcode == "scatter" else operands[1]
    return min(1.0, last.array.elements / max(1, _first(update).elements))


def _first(instruction: Instruction) -> ArrayShape:
    return next(arrays(instruction.shape))


def _skip_bitcasts(computation: Computation, x: Instruction) -> Instruction:
    while x.opcode == "bitcast":
        x = computation.operands(x)[0]
    return x
