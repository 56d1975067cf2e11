"""What a compiled program moves through a device's memory, and what it computes.

    print(traffic(compiled))                     # bytes, FLOPs, the ops that move most
    traffic(compiled, pool=(4097, 8, 16, 128)).pool_copies

Bytes are the operands that an op reads from HBM and the results that it writes there.
An array in another memory space (VMEM on a TPU) is not in HBM, so weights that are
prefetched count once: when they are read. Ops in a loop count as often as it goes
round, and an operand of which an op takes a part (a gather, an update in place) counts
for that part; see `uses.py`. How often a matmul reads an operand again, because it does
not fit on chip, is not in the text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from disagg_jax.engine.attention.kernel import KernelCost
from experiments.compiled.copies import pool_copies
from experiments.compiled.flops import Made, instruction_flops
from experiments.compiled.hlo import (
    HBM,
    Computation,
    Instruction,
    Module,
    Shape,
    arrays,
    asynchronous,
)
from experiments.compiled.trips import loop_trips
from experiments.compiled.uses import fusion_uses, inlined, results, single_uses

_FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "domain", "add-dependency"),
}
# Custom calls that move nothing: an allocation, slices that lie side by side already,
# and a promise.
_NO_KERNELS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


class CompiledProgram(Protocol):
    """What `jax.jit(...).lower(...).compile()` returns."""

    def as_text(self) -> str | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTraffic:
    """One op of the program, all its rounds together."""

    name: str
    opcode: str
    shape: str  # of the first array of the result
    op_name: str  # where it was written, as JAX says; see `_places`
    times: int
    read_bytes: float
    written_bytes: float
    flops: float
    matmul_cycles: float  # XLA's estimate for a matmul on a TPU; 0 of other ops

    @property
    def size_bytes(self) -> float:
        return self.read_bytes + self.written_bytes

    def __str__(self) -> str:
        return (
            f"{self.size_bytes / 1e6:10.2f} MB {self.flops / 1e9:10.3f} GFLOP "
            f"x{self.times:<4} {self.opcode:16} {self.shape:28} {self.name}  "
            f"[{self.op_name}]"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramTraffic:
    """The account of a program on one device."""

    ops: tuple[OpTraffic, ...]  # in the program's order
    pool_copies: tuple[OpTraffic, ...]  # see `copies.py`
    unknown_loops: tuple[str, ...]  # counted as if they went round once
    unstated_kernels: tuple[str, ...]  # counted by their operands and results

    @property
    def size_bytes(self) -> float:
        """Bytes that are read from and written to HBM."""
        return sum(op.size_bytes for op in self.ops)

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.ops)

    def largest(self, count: int) -> list[OpTraffic]:
        """Return the ops that move most."""
        return sorted(self.ops, key=lambda op: -op.size_bytes)[:count]

    def __str__(self) -> str:
        notes = [
            *(f"counted once, trips unknown: {name}" for name in self.unknown_loops),
            *(f"kernel without a cost: {name}" for name in self.unstated_kernels),
            *(f"copies the pool: {op}" for op in self.pool_copies),
        ]
        total = f"{self.size_bytes / 1e9:.4f} GB, {self.flops / 1e9:.2f} GFLOP"
        return "\n".join([total, *notes, *map(str, self.largest(12))])


def traffic(
    program: CompiledProgram | str,
    pool: Sequence[int] | None = None,
    kernels: Mapping[str, KernelCost] | None = None,
) -> ProgramTraffic:
    """Account for a compiled program, or for its text.

    Args:
      pool: the shape of one array of the KV pool on a device; copies of arguments of
        this shape are listed.
      kernels: what one call of a kernel costs, by its name in the program (`pallas_call
        (name=...)`), where the kernel itself does not state it (`cost_estimate`, which
        a TPU's program keeps).
    """
    text = program if isinstance(program, str) else program.as_text()
    module = Module.parse(text or "")
    count = _Count(module, kernels or {})
    ops = tuple(count.run(module.entry, 1))
    copies = pool_copies(module, pool) if pool else set[str]()
    return ProgramTraffic(
        ops=ops,
        pool_copies=tuple(op for op in ops if op.name in copies),
        unknown_loops=tuple(count.unknown_loops),
        unstated_kernels=tuple(dict.fromkeys(count.unstated_kernels)),
    )


class _Count:
    """A walk over the computations that a program runs."""

    def __init__(self, module: Module, kernels: Mapping[str, KernelCost]):
        self._module, self._kernels = module, kernels
        self.unknown_loops: list[str] = []
        self.unstated_kernels: list[str] = []

    def run(self, computation: Computation, times: int) -> Iterator[OpTraffic]:
        """Yield the ops of a computation that runs `times` times, and those below."""
        places, pairs = _places(computation), asynchronous(computation)
        used = {computation.root.name}.union(
            *(x.operands for x in computation.instructions.values())
        )
        for each in computation.instructions.values():
            x, end = pairs.get(each.name, (each, each))
            # On a TPU the last op of a program prefetches weights for its next run,
            # which then need not do so (`cross_program_prefetch_index`).
            if each.opcode.endswith(("-done", "-update")) or end.name not in used:
                continue
            x = dataclasses.replace(x, op_name=places[x.name])
            match x.opcode:
                case _ if x.opcode in _FREE:
                    continue
                case "while":
                    trips = loop_trips(self._module, computation, x)
                    if trips is None:
                        self.unknown_loops.append(x.name)
                    yield from self._called(x, "body", times * (trips or 1))
                case "call":
                    yield from self._called(x, "to_apply", times)
                case "async":
                    yield from self._called(x, "calls", times)
                case "conditional":
                    yield from self._longest_branch(x, times)
                case _:
                    yield self._op(computation, x, times)

    def _called(self, x: Instruction, key: str, times: int) -> Iterator[OpTraffic]:
        (name,) = x.called(key)
        return self.run(self._module.computations[name], times)

    def _longest_branch(self, x: Instruction, times: int) -> Iterator[OpTraffic]:
        """Yield the ops of the branch that moves most."""
        keys = "branch_computations", "true_computation", "false_computation"
        branches = [
            list(self.run(self._module.computations[name], times))
            for name in x.called(*keys)
        ]
        yield from max(branches, key=lambda ops: sum(op.size_bytes for op in ops))

    def _op(self, computation: Computation, x: Instruction, times: int) -> OpTraffic:
        if x.opcode == "custom-call":
            cost = self._kernel(computation, x)
            if cost is not None:
                return _op_traffic(x, times, cost.size_bytes, 0.0, cost.flops, 0)
        operands = computation.operands(x)
        if x.opcode == "fusion":
            where = self._fused(x.called("calls")[0])
            inside, uses = list(where.instructions.values()), fusion_uses(where)
            given = [self._made(computation, operand) for operand in operands]
        else:
            where, inside, uses = computation, [x], single_uses(computation, x)
            given = []
        flops = sum(
            instruction_flops(self._module, where, each, given) for each in inside
        )
        estimate = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
        is_matmul = any(each.opcode in ("dot", "convolution") for each in inside)
        cycles = int(estimate[1]) if estimate and is_matmul else 0
        read = sum(
            share * hbm_bytes(operand.shape)
            for share, operand in zip(uses.reads, operands, strict=True)
        )
        written = sum(
            share * hbm_bytes(array)
            for share, array in zip(uses.writes, arrays(x.shape), strict=True)
        )
        return _op_traffic(x, times, read, written, flops, cycles)

    def _made(self, computation: Computation, x: Instruction) -> Made:
        """Return the instruction that made an array, in a fusion where it was one."""
        index = 0
        while x.opcode in ("bitcast", "get-tuple-element"):
            index = x.ints("index")[0] if x.opcode != "bitcast" else index
            x = computation.operands(x)[0]
        if x.opcode != "fusion":
            return computation, x
        fused = self._fused(x.called("calls")[0])
        return fused, results(fused)[index]

    def _kernel(self, computation: Computation, x: Instruction) -> KernelCost | None:
        """Return what a custom call costs, if that is stated; note it if not."""
        target, name = x.text("custom_call_target"), _kernel_name(x)
        if target in _NO_KERNELS:
            return KernelCost(size_bytes=0, flops=0)
        if target.startswith("__cublas$"):
            # The second array of the result is workspace.
            size_bytes = sum(hbm_bytes(y.shape) for y in computation.operands(x))
            size_bytes += hbm_bytes(next(arrays(x.shape)))
            flops = instruction_flops(self._module, computation, x)
            return KernelCost(size_bytes=size_bytes, flops=flops)
        if name in self._kernels:
            return self._kernels[name]
        stated = re.search(r'"cost_estimate":\{([^}]*)\}', x.attributes)
        if stated:
            numbers = dict(re.findall(r'"(\w+)":"?(\d+)', stated[1]))
            return KernelCost(
                size_bytes=float(numbers["bytes_accessed"]),
                flops=float(numbers["flops"]),
            )
        self.unstated_kernels.append(name)
        return None

    @functools.cache  # noqa: B019 (the walk is short-lived)
    def _fused(self, name: str) -> Computation:
        return inlined(self._module, name)


def _places(computation: Computation) -> dict[str, str]:
    """Return where each instruction was written, such as "jit(run)/layer_0/mlp/mul".

    One that XLA added has no place, nor has an argument. It has that of what first uses
    it, such as the matmul whose weights are prefetched; or if that has none, as where a
    copy makes a result of the program, that of what it uses.
    """
    instructions = computation.instructions.values()
    places = {x.name: x.op_name if "/" in x.op_name else "" for x in instructions}
    for x in reversed(instructions):
        for operand in x.operands:
            if not x.opcode == "tuple":
                places[operand] = places[operand] or places[x.name]
    for x in instructions:
        used = [places[operand] for operand in x.operands]
        places[x.name] = places[x.name] or next(filter(None, used), "")
    return places


def hbm_bytes(shape: Shape) -> int:
    """Return the bytes of those arrays of a shape that are in HBM."""
    return sum(x.size_bytes for x in arrays(shape) if x.space == HBM)


def _kernel_name(x: Instruction) -> str:
    """Return the name of a Pallas kernel, or the target of another custom call."""
    *path, last = x.op_name.split("/")
    is_kernel = last in ("pallas_call", "mpmd_map") and path  # `plgpu.kernel` makes one
    return path[-1] if is_kernel else x.text("custom_call_target")


def _op_traffic(
    x: Instruction, times: int, read: float, written: float, flops: float, cycles: int
) -> OpTraffic:
    return OpTraffic(
        name=x.name,
        opcode=x.opcode,
        shape=str(next(arrays(x.shape), "()")),
        op_name=x.op_name,
        times=times,
        read_bytes=times * read,
        written_bytes=times * written,
        flops=times * flops,
        matmul_cycles=times * cycles,
    )
