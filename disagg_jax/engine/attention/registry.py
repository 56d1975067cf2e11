"""The attention kernels by name, and which of them a device gets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from disagg_jax.engine.attention.cudnn import CudnnAttention
from disagg_jax.engine.attention.kernel import AttentionKernel, KernelDevice
from disagg_jax.engine.attention.mosaic_gpu import MosaicGpuAttention
from disagg_jax.engine.attention.pallas_tpu import PallasTpuAttention
from disagg_jax.engine.attention.xla import XlaAttention
from models.config import ModelConfig
from models.named import find_named

KernelType: TypeAlias = type[AttentionKernel]

AUTO = "auto"
KERNELS: Mapping[str, KernelType] = {
    kind.name: kind
    for kind in (XlaAttention, PallasTpuAttention, MosaicGpuAttention, CudnnAttention)
}
# What `AUTO` is for models in bfloat16, and why; plain XLA else. float32 is the exact
# mode, for which plain XLA is the reference.
_FAST: Mapping[str, tuple[KernelType, str]] = {
    "gpu": (XlaAttention, "other kernels have not run on one yet"),
    "tpu": (PallasTpuAttention, "by compiled programs, never run on a chip"),
}


class ChosenKernel(NamedTuple):
    """A kernel, and why it was chosen."""

    kernel: AttentionKernel
    reason: str

    def __str__(self) -> str:
        return f"attention {self.kernel.name} ({self.reason})"


def choose_kernel(
    name: str,
    device: KernelDevice,
    config: ModelConfig,
    block_tokens: int | None = None,
) -> ChosenKernel:
    """Return the kernel of that name for a model on devices like this one.

    Args:
      name: a key of `KERNELS`, `AUTO`, or what `find_named` finds, such as
        `my_module:MyKernel`.
      block_tokens: in a KV block; by default those of the kernel.

    Raises:
      ValueError: if there is none of that name, or it cannot serve the model.
    """
    if name == AUTO:
        return _fast_kernel(device, config, block_tokens)
    kernel = _named(name).on(device)
    problem = kernel.problem(config, block_tokens or kernel.block_tokens)
    if problem:
        of = f"{name} on a {device.platform}, for {config.name} in {config.dtype}"
        raise ValueError(f"attention: {of}: {problem}")
    return ChosenKernel(kernel, "as asked")


def _fast_kernel(
    device: KernelDevice, config: ModelConfig, block_tokens: int | None
) -> ChosenKernel:
    """Return the kernel that a device gets if none is asked for."""
    platform = device.platform
    reason = f"auto on a {platform}"
    if platform in _FAST and config.dtype == "bfloat16":
        kind, why = _FAST[platform]
        kernel = kind.on(device)
        if not kernel.problem(config, block_tokens or kernel.block_tokens):
            return ChosenKernel(kernel, f"{reason}: {why}")
    return ChosenKernel(XlaAttention.on(device), reason)


def _named(name: str) -> KernelType:
    return find_named(
        name,
        KERNELS,
        kind="attention kernel",
        what="a subclass of AttentionKernel that lacks nothing",
        is_one=_is_kernel,
    )


def _is_kernel(found: Any) -> bool:
    is_class = isinstance(found, type) and issubclass(found, AttentionKernel)
    return is_class and not inspect.isabstract(found)
