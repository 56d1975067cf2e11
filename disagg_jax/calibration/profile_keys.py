"""The keys of an engine's work in a profile, and an engine's durations from one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from disagg_jax.deployment import Deployment, Role
from disagg_jax.engine.batch import DecodeShape, MixedShape, StepShape
from disagg_jax.engine.engine import Engine
from disagg_jax.sim.cost.measured import CalibratedCost, CalibratedProfile, Layout
from disagg_jax.sim.cost.measured_profile import profile_from_json
from disagg_jax.sim.programs import Program, ProgramList
from disagg_jax.work import Step, Task
from models.config import ModelConfig


def program_of(shape: StepShape) -> Program:
    """What a cost model sees of one of the engine's shapes."""
    if isinstance(shape, DecodeShape):
        rows = shape.rows
        return Program("decode", rows, rows, 0, rows, shape.blocks)
    if isinstance(shape, MixedShape):
        sizes = (shape.context, shape.decodes, shape.blocks)
        return Program("mixed", shape.tokens, shape.rows, *sizes)
    return Program("prefill", shape.tokens, shape.rows)


def program_list(engine: Engine, instance: int) -> ProgramList:
    """What an instance has programs for."""
    found = engine.instances[instance]
    programs = tuple(program_of(shape) for shape in found.buckets.step_shapes)
    return ProgramList(programs, found.model.memory.block_tokens)


def layouts(deployment: Deployment) -> list[Layout]:
    """(tp, pp) of each instance."""
    return [(spec.tp, spec.pp) for spec in deployment.instances]


class StepKey(NamedTuple):
    """The properties that decide how long a step takes."""

    layout: Layout
    program: Program


class TransferKey(NamedTuple):
    """The properties that decide how long a transfer takes."""

    src: Layout
    dst: Layout
    blocks: int  # padding included


class EngineWork(NamedTuple):
    """Work for one engine."""

    engine: Engine
    work: Task


# Run work alone; return the seconds of each part, see `Engine.part_keys`.
TimeParts = Callable[[Engine, Task], Sequence[float]]


def key_of(engine: Engine, work: Task) -> StepKey | TransferKey:
    """Return the key of `work`: work with equal keys takes equally long alone."""
    at = layouts(engine.deployment)
    if isinstance(work, Step):
        shape = engine.instances[work.instance].step_shape(work.slices)
        return StepKey(at[work.instance], program_of(shape))
    buckets = engine.instances[work.src].buckets
    size = buckets.transfer_size(len(work.src_blocks))
    return TransferKey(at[work.src], at[work.dst], size)


def device_name() -> str:
    """Return the kind of device that JAX uses on this machine."""
    return jax.devices()[0].device_kind


def read_profile(path: str, model: ModelConfig) -> CalibratedProfile:
    """Return the profile in a file, if it is of `model` on this machine's devices.

    Raises:
      ValueError: if the file is no profile, or of another model or device.
    """
    try:
        profile = profile_from_json(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--profile: expected what experiments.calibrate wrote, got '{path}': "
            f"{error}"
        ) from error
    here = {"model": model.name, "dtype": model.dtype, "device": device_name()}
    for key, value in here.items():
        if profile.provenance[key] != value:
            raise ValueError(
                f"--profile: expected one of {key} {value}, got '{path}' of {key} "
                f"{profile.provenance[key]}"
            )
    return profile


def cost_of(profile: CalibratedProfile, engine: Engine) -> CalibratedCost:
    """Return the durations of an engine's deployment.

    Raises:
      ValueError: on a layout, a pair of layouts or a block size without measurement.
    """
    each = range(len(engine.instances))
    sources = engine.deployment.of(Role.PREFILL)
    sizes = engine.instances[sources[0]].buckets.transfer_blocks if sources else ()
    lists = [program_list(engine, i) for i in each]
    return profile.cost(engine.deployment, lists, sizes)
