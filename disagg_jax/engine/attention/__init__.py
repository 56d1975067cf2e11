"""Attention kernels: how KV lies in the cache, and how the tokens of a step attend.

kernel     AttentionKernel: what a stage asks of one; entries.py: the blocks of rows
registry   the kernels by name; which one a device gets
xla        plain XLA: prompts and chunks in gathered.py, decodes in paged.py
mosaic_gpu own kernels for Hopper, never run: mosaic_gpu_decodes.py, _prompts.py
cudnn      prompts by cuDNN, never run
step       a kernel on all devices of a stage
pallas_tpu Pallas kernels for TPUs: pallas_tpu_decodes.py and pallas_tpu_prompts.py
kv_cache   the paged cache: its layout, its writes, its transfers
packing    the slices of a step as one vector
"""

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kernel import AttentionKernel, KernelCost
from disagg_jax.engine.attention.registry import AUTO, KERNELS, choose_kernel
from disagg_jax.engine.attention.xla import XlaAttention

__all__ = [
    "AUTO",
    "KERNELS",
    "AttentionKernel",
    "Entries",
    "KernelCost",
    "XlaAttention",
    "choose_kernel",
]
