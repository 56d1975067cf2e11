"""The flag of commands that choose an attention kernel."""

from __future__ import annotations

from absl import flags

from disagg_jax.engine.attention.registry import AUTO, KERNELS
from experiments.cli.flags import Flags


def attention_flag(own: Flags) -> flags.FlagHolder[str]:
    """Define `--attention` of a command; see `choose_kernel`."""
    names = ", ".join(KERNELS)
    about = f"The kernel: auto, by the device; {names}; or module:Class."
    return own.string("attention", AUTO, about)
