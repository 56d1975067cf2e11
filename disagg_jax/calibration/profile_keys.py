"""The keys of an engine's work in a profile, and an engine's durations from one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from disagg_jax.deployment import Parallelism
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.engine import Engine
from disagg_jax.programs import StepShape
from disagg_jax.sim.cost.measured import CalibratedCost, CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_from_json
from disagg_jax.work import Step, Task
from models.config import ModelConfig


class StepKey(NamedTuple):
    """The properties that decide how long a step takes."""

    layout: Parallelism
    program: StepShape


class TransferKey(NamedTuple):
    """The properties that decide how long a transfer takes."""

    src: Parallelism
    dst: Parallelism
    blocks: int  # padding included


class EngineWork(NamedTuple):
    """Work for one engine."""

    engine: Engine
    work: Task


# Run work alone; return the seconds of each part, see `Engine.part_keys`.
TimeParts = Callable[[Engine, Task], Sequence[float]]


def key_of(engine: Engine, work: Task) -> StepKey | TransferKey:
    """Return the key of `work`: work with equal keys takes equally long alone."""
    at = [spec.parallelism for spec in engine.deployment.instances]
    if isinstance(work, Step):
        shape = engine.instances[work.instance].step_shape(work.slices)
        return StepKey(at[work.instance], shape)
    buckets = engine.instances[work.src].buckets
    size = buckets.transfer_size(len(work.src_blocks))
    return TransferKey(at[work.src], at[work.dst], size)


def device_name() -> str:
    """Return the kind of device that JAX uses on this machine."""
    return jax.devices()[0].device_kind


def read_profile(
    path: str, model: ModelConfig, attention: str = XlaAttention.name
) -> CalibratedProfile:
    """Return the profile in a file, if it is of `model` on this machine's devices.

    Args:
      attention: the name of the attention kernel. A profile without one is of plain
        XLA, as all were before there were others.

    Raises:
      ValueError: if the file is no profile, or of another model, device or kernel.
    """
    try:
        profile = profile_from_json(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--profile: expected what experiments.calibrate wrote, got '{path}': "
            f"{error}"
        ) from error
    here = {
        "model": model.name,
        "dtype": model.dtype,
        "device": device_name(),
        "attention": attention,
    }
    said = {"attention": XlaAttention.name, **profile.provenance}
    for key, value in here.items():
        if said[key] != value:
            raise ValueError(
                f"--profile: expected one of {key} {value}, got '{path}' of {key} "
                f"{said[key]}"
            )
    return profile


def cost_of(profile: CalibratedProfile, engine: Engine) -> CalibratedCost:
    """Return the durations of an engine's deployment.

    Raises:
      ValueError: on a layout, a pair of layouts or a block size without measurement.
    """
    buckets = [instance.buckets for instance in engine.instances]
    memory = [instance.programs.memory for instance in engine.instances]
    return profile.cost(engine.deployment, buckets, memory)
