"""FLOPs of the products in a program, from shapes alone: one method for all targets.

A multiply and an add are two. Matmuls count, in each form that they take (`dot`, a
TPU's `convolution`, a call of cuBLAS), and sums of products that are written as a
multiply and a reduce. Other element-wise work does not: it is not what a peak is about.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from experiments.compiled.hlo import Computation, Instruction, Module, arrays

_MOVES = ("bitcast", "convert", "copy", "reshape", "transpose")  # between product, sum
Made: TypeAlias = tuple[Computation, Instruction]  # an instruction, and where it is
_WINDOW = {"size": 1, "stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}  # and what if none


def instruction_flops(
    module: Module,
    where: Computation,
    x: Instruction,
    given: Sequence[Made] = (),
) -> float:
    """Return the FLOPs of one instruction of `where`, without those that it calls.

    Args:
      given: what made each parameter of `where`, if that is a fusion.
    """
    match x.opcode:
        case "dot":
            lhs = where.operands(x)[0].array
            contracted = [lhs.dims[i] for i in x.ints("lhs_contracting_dims")]
            return 2.0 * x.array.elements * math.prod(contracted)
        case "convolution":
            return _convolution_flops(where, x)
        case "custom-call" if x.text("custom_call_target").startswith("__cublas$"):
            return _cublas_flops(where, x)
        case "reduce" if _sums(module, x) and _is_product(where, x, given):
            return 2.0 * where.operands(x)[0].array.elements
        case _:
            return 0.0


def _sums(module: Module, reduce: Instruction) -> bool:
    return module.computations[reduce.called("to_apply")[0]].root.opcode == "add"


def _is_product(where: Computation, reduce: Instruction, given: Sequence[Made]) -> bool:
    """Return whether what is summed was multiplied just before.

    The multiply may be in a fusion of its own, as XLA for GPUs has it for some matmuls
    of one row.
    """
    x = where.operands(reduce)[0]
    while True:
        if x.opcode in _MOVES:
            x = where.operands(x)[0]
        elif x.opcode == "parameter" and given:
            (where, x), given = given[int(x.literal)], ()
        else:
            return x.opcode == "multiply"


def _cublas_flops(where: Computation, call: Instruction) -> float:
    config = json.loads(call.attributes.partition("backend_config=")[2])
    numbers = config["gemm_backend_config"]["dot_dimension_numbers"]
    lhs = where.operands(call)[0].array
    contracted = [lhs.dims[int(i)] for i in numbers["lhs_contracting_dimensions"]]
    # What follows the product in the result is workspace.
    return 2.0 * next(arrays(call.shape)).elements * math.prod(contracted)


def _convolution_flops(where: Computation, x: Instruction) -> float:
    """Count the taps that fall on an element of the input, as XLA does.

    On a TPU a batched matmul is a convolution whose batch is a spatial dimension, with
    strides and dilations that leave one tap for each element.
    """
    lhs, rhs = (operand.array for operand in where.operands(x))
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", x.text("dim_labels"))
    if labels is None:
        raise ValueError(f"{x.name}: expected dim_labels, got {x.attributes[:80]}")
    of_lhs, of_rhs, of_out = labels.groups()
    sizes = {label: lhs.dims[i] for i, label in enumerate(of_lhs)}
    kernel = {label: rhs.dims[i] for i, label in enumerate(of_rhs)}
    result = {label: x.array.dims[i] for i, label in enumerate(of_out)}
    taps = math.prod(
        _valid_taps(sizes[str(i)], result[str(i)], *window)
        for i, window in enumerate(_windows(x.attributes, len(sizes) - 2))
    )
    # A kernel's input features are those of one group already.
    groups = max(1, *x.ints("batch_group_count"), 1)
    return 2.0 * result["b"] * result["f"] * kernel["i"] * taps / groups


def _windows(attributes: str, dims: int) -> list[tuple[int, ...]]:
    """Return (size, stride, lhs_dilate, rhs_dilate, low padding) of each dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    columns = [
        [int(n) for n in fields[name].split("x")]
        if name in fields
        else [default] * dims
        for name, default in _WINDOW.items()
    ]
    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * dims
    return list(zip(*columns, [int(pad.split("_")[0]) for pad in pads], strict=True))


@functools.cache
def _valid_taps(
    size: int, results: int, taps: int, stride: int, dilate: int, spread: int, low: int
) -> int:
    """Count the pairs of a result and a tap that meet an element, in one dimension."""
    at = np.arange(results) * stride - low
    last = (size - 1) * dilate
    total = 0
    for tap in range(taps):
        places = at + tap * spread
        total += int(((places >= 0) & (places <= last) & (places % dilate == 0)).sum())
    return total
