"""Meshes cut from one list of devices, one for each instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# jaxlib has no type stubs, so pyright takes `jax.Device` for a variable.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]

TENSOR = "tensor"  # mesh axis of tensor parallelism


def make_mesh(devices: Sequence[Device]) -> Mesh:
    """Return a mesh [tensor] over `devices`.

    The axis is Auto: with Explicit axes the KV scatter raises ShardingTypeError, and
    every phase would need its own `jax.set_mesh` context.
    """
    return Mesh(np.array(devices), (TENSOR,), axis_types=(AxisType.Auto,))


def cut_meshes(devices: Sequence[Device], sizes: Sequence[int]) -> list[Mesh]:
    """Cut disjoint meshes of `sizes` devices each from `devices`, in order.

    Raises:
      ValueError: if there are not enough devices.
    """
    if sum(sizes) > len(devices):
        raise ValueError(
            f"the deployment needs {'+'.join(map(str, sizes))} = {sum(sizes)} devices, "
            f"got {len(devices)} {devices[0].platform if devices else 'usable'} devices"
        )
    ends = np.cumsum(sizes)
    return [
        make_mesh(devices[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    ]
