"""From an engine to a calibrated profile's terms, and from a profile to durations."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from disagg_jax.deployment import Deployment, Role
from disagg_jax.engine.batch import DecodeShape, MixedShape, StepShape
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import every_work
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
    """What decides how long a step takes."""

    layout: Layout
    program: Program


class TransferKey(NamedTuple):
    """What decides how long a transfer takes."""

    src: Layout
    dst: Layout
    blocks: int  # that it is padded to


class Probe(NamedTuple):
    """Work to be timed."""

    engine: Engine
    work: Task


# Runs work alone: seconds of each part, that is stage or transfer.
TimeParts = Callable[[Engine, Task], Sequence[float]]


def key_of(engine: Engine, work: Task) -> StepKey | TransferKey:
    """Work with equal keys takes equally long alone."""
    at = layouts(engine.deployment)
    if isinstance(work, Step):
        shape = engine.instances[work.instance].step_shape(work.slices)
        return StepKey(at[work.instance], program_of(shape))
    buckets = engine.instances[work.src].buckets
    size = buckets.transfer_size(len(work.src_blocks))
    return TransferKey(at[work.src], at[work.dst], size)


def device_name() -> str:
    """The kind of device that JAX uses here."""
    return jax.devices()[0].device_kind


def read_profile(path: str, model: ModelConfig) -> CalibratedProfile:
    """The profile in a file, if it is of that model on the devices that are here.

    Raises:
      ValueError: if it is of another, or no profile.
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
    """The durations of an engine's deployment.

    Raises:
      ValueError: on what was not measured.
    """
    each = range(len(engine.instances))
    sources = engine.deployment.of(Role.PREFILL)
    sizes = engine.instances[sources[0]].buckets.transfer_blocks if sources else ()
    lists = [program_list(engine, i) for i in each]
    return profile.cost(engine.deployment, lists, sizes)


def step_times_of(profile: CalibratedProfile, engine: Engine) -> dict[str, float]:
    """Seconds of every program of an engine, in place of `measure_step_times`.

    Raises:
      ValueError: on what was not measured.
    """
    cost_of(profile, engine)  # raises
    seconds: dict[str, float] = {}
    for work in every_work(engine):
        key = key_of(engine, work)
        if isinstance(key, StepKey):
            parts_s = profile.layouts[key.layout].stages_s(key.program)
        else:
            parts_s = (profile.transfers[key.src, key.dst].time_s(key.blocks),)
        seconds.update(zip(engine.part_keys(work), parts_s, strict=True))
    return seconds
