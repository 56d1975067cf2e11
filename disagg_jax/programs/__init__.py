"""The shapes that an engine compiles programs for, and how a step is rounded to one.

Engine and simulator round by the same code. This room imports no jax.
"""

from disagg_jax.programs.buckets import Buckets
from disagg_jax.programs.needed import needed_buckets
from disagg_jax.programs.shapes import KINDS, StepShape, split_decodes

__all__ = ["KINDS", "Buckets", "StepShape", "needed_buckets", "split_decodes"]
