"""The text of an optimised HLO module as data: computations, instructions, shapes.

Only what an account of traffic needs is read. The text is that of
`Compiled.as_text()`, seen from jax 0.10 for TPUs, GPUs and CPUs; operands may be
printed with their shapes or without.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

HBM = 0  # memory space of arrays whose layout names none
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of other types the digits in the name

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_LAYOUT = re.compile(r"(?P<order>[\d,]*)(?::(?P<rest>.*))?$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_METADATA = re.compile(r", metadata=\{(?:[^{}\"]|\"[^\"]*\")*\}")
_CLOSING = {"(": ")", "{": "}", "[": "]"}


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """An array and how it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...] = ()  # of the most minor dimensions, which are padded to it
    space: int = HBM

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def size_bytes(self) -> int:
        """Bytes in memory, the padding to whole tiles included."""
        sizes = [self.dims[i] for i in reversed(self.minor_to_major)]
        for i, tile in zip(range(1, len(sizes) + 1), reversed(self.tile), strict=False):
            sizes[-i] = -(-sizes[-i] // tile) * tile
        return -(-math.prod(sizes) * self._bits // 8)

    @property
    def _bits(self) -> int:
        found = re.search(r"\d+", self.dtype)
        return _BITS.get(self.dtype) or (int(found[0]) if found else 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Shape: TypeAlias = "ArrayShape | tuple[Shape, ...]"


def arrays(shape: Shape) -> Iterator[ArrayShape]:
    """Yield the arrays of a shape, those of a tuple in order."""
    if isinstance(shape, ArrayShape):
        yield shape
    else:
        for part in shape:
            yield from arrays(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; its attributes stay text until they are asked for."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses: of a constant its value
    attributes: str  # without metadata
    op_name: str  # where the program's author wrote it, as JAX says

    @property
    def array(self) -> ArrayShape:
        """The shape, of an instruction that has one array.

        Raises:
          ValueError: if it is a tuple.
        """
        if isinstance(self.shape, ArrayShape):
            return self.shape
        raise ValueError(f"{self.name}: expected one array, got {len(self.shape)}")

    def ints(self, key: str) -> tuple[int, ...]:
        """Return the integers of the attribute `key={1,2}` or `key=1`; () if none."""
        found = re.search(rf"\b{key}=\{{?([\d,]*)", self.attributes)
        return tuple(map(int, filter(None, found[1].split(",")))) if found else ()

    def text(self, key: str) -> str:
        """Return the word or the quoted text of an attribute; empty if none."""
        found = re.search(rf"\b{key}=(?:\"([^\"]*)\"|([\w.\->]+))", self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def called(self, *keys: str) -> tuple[str, ...]:
        """Return the computations that the attributes `keys` name, in their order."""
        names: list[str] = []
        for key in keys:
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if found:
                names += [each.strip(" %") for each in found[1].strip("{}").split(",")]
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in an order in which operands come before their users."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters by number."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return tuple(sorted(found, key=lambda x: int(x.literal)))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions whose results are the operands."""
        return [self.instructions[name] for name in instruction.operands]


def asynchronous(
    computation: Computation,
) -> dict[str, tuple[Instruction, Instruction]]:
    """Return, by the name of each `-start`, the op that it begins, and its `-done`.

    `copy-start` and `copy-done` together are a `copy` with the result of the latter.
    """
    begun = computation.instructions
    return {
        x.operands[0]: (
            dataclasses.replace(
                begun[x.operands[0]],
                opcode=x.opcode.removesuffix("-done"),
                shape=x.shape,
            ),
            x,
        )
        for x in begun.values()
        if x.opcode.endswith("-done")
    }


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: the entry computation and those that it calls."""

    computations: Mapping[str, Computation]
    entry: Computation

    @classmethod
    def parse(cls, text: str) -> Module:
        """Read `Compiled.as_text()`.

        Raises:
          ValueError: if there is no entry computation in it.
        """
        computations: dict[str, Computation] = {}
        entry = None
        lines = iter(text.splitlines())
        for line in lines:
            # `%name (parameters) -> shape {`, and nothing else begins so.
            if line[:1].isspace() or not line.endswith("{") or " -> " not in line:
                continue
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            body = itertools.takewhile(lambda x: not x.startswith("}"), lines)
            computations[name] = _computation(name, body)
            if line.startswith("ENTRY "):
                entry = computations[name]
        if entry is None:
            raise ValueError(
                f"HLO text: expected an ENTRY computation in {text[:60]!r}"
            )
        return cls(computations, entry)


def _computation(name: str, lines: Iterator[str]) -> Computation:
    found: dict[str, Instruction] = {}
    root = None
    for line in lines:
        match = _INSTRUCTION.match(_COMMENT.sub("", line))
        if match is None:
            continue
        instruction = _instruction(match[2], match[3])
        found[instruction.name] = instruction
        if match[1]:
            root = instruction
    if root is None:
        raise ValueError(f"HLO text: expected a ROOT in computation {name}")
    return Computation(name, found, root)


def _instruction(name: str, text: str) -> Instruction:
    """Read `shape opcode(operands), attributes`."""
    shape, end = _shape(text, 0)
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"HLO text: expected an opcode after the shape of {name}")
    close = _closing(text, opcode.end() - 1)
    literal, tail = text[opcode.end() : close], text[close + 1 :]
    has_operands = opcode[1] not in ("parameter", "constant", "iota")
    op_name = re.search(r'op_name="([^"]*)"', tail)
    return Instruction(
        name=name,
        opcode=opcode[1],
        shape=shape,
        operands=tuple(_operands(literal)) if has_operands else (),
        literal=literal,
        attributes=_METADATA.sub("", tail),
        op_name=op_name[1] if op_name else "",
    )


def _operands(text: str) -> Iterator[str]:
    """Yield the names of `%a, %b`, or of `f32[2]{0} a, f32[] b`."""
    depth, start = 0, 0
    for i, char in enumerate(text + ","):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            words = text[start:i].split()
            if words:
                yield words[-1].lstrip("%")
            start = i + 1


def _closing(text: str, start: int) -> int:
    """Return where the bracket at `start` is closed."""
    opens, depth, quoted = text[start], 0, False
    for i in range(start, len(text)):
        char = text[i]
        if char == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (char == opens) - (char == _CLOSING[opens])
            if depth == 0:
                return i
    raise ValueError(f"HLO text: expected {_CLOSING[opens]} in {text[start:][:60]!r}")


def _shape(text: str, start: int) -> tuple[Shape, int]:
    """Read the shape at `start`; return where it ends too."""
    if text[start] == "(":
        parts: list[Shape] = []
        end = start + 1
        while text[end] != ")":
            if text[end] in ", ":
                end += 1
                continue
            part, end = _shape(text, end)
            parts.append(part)
        return tuple(parts), end + 1
    match = _ARRAY.match(text, start)
    if match is None:
        raise ValueError(f"HLO text: expected a shape in {text[start:][:60]!r}")
    return _array(match[1], match[2], match[3] or ""), match.end()


@functools.cache
def _array(dtype: str, dims: str, layout: str) -> ArrayShape:
    sizes = tuple(int(x.lstrip("<=")) for x in dims.split(",") if x)
    match = _LAYOUT.match(layout)
    order, rest = (match["order"], match["rest"] or "") if match else ("", "")
    space = re.search(r"S\((\d+)\)", rest)
    # Further tiles, as the (2,1) of T(8,128)(2,1), cut the first one and pad nothing.
    tile = re.search(r"T\(([\d,]*)\)", rest)
    minor_to_major = tuple(int(x) for x in order.split(",") if x)
    return ArrayShape(
        dtype=dtype,
        dims=sizes,
        minor_to_major=minor_to_major or tuple(reversed(range(len(sizes)))),
        tile=tuple(int(x) for x in tile[1].split(",")) if tile else (),
        space=int(space[1]) if space else HBM,
    )
