"""From a config to engines, and to what serves requests on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from disagg_jax.control.backend import Outcome
from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role, cut_layers
from disagg_jax.engine.attention.registry import choose_kernel
from disagg_jax.engine.engine import Engine, Progress
from disagg_jax.engine.executor import DurationRule, as_measured, from_table
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.served_deployment import (
    ServedDeployment,
    devices_for,
    devices_needed,
)
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics.attainment import SLO
from disagg_jax.programs.buckets import Buckets
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.routing import get_router
from disagg_jax.scheduling.system import System
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.hardware.link import LinkSpec, get_link
from disagg_jax.work import Step, Task
from experiments.configs.config import Config
from experiments.sweep.request_source import RequestSource
from models import load
from models.config import ModelConfig

# -- engines ---------------------------------------------------------------------------


def load_model(config: Config) -> load.Model:
    """Load the model of `config`; see `models.load.load_model` for the errors."""
    return load.load_model(config.model, config.weights, seed=config.seed)


def most_devices(config: Config) -> int:
    """Return the devices that the largest deployment takes."""
    return max(
        devices_needed(
            Deployment.parse(system.deployment), shared=config.clock == "virtual"
        )
        for system in config.systems.values()
    )


def check_modelled(config: Config) -> None:
    """Raise ValueError if measured durations would be contention, not speed.

    Tensor-parallel host devices share the cores, so a program's time there does not
    tell what it would take on devices of its own.
    """
    shared = jax.default_backend() == "cpu" and config.clock == "virtual"
    if not shared or config.durations == "modelled":
        return
    for name, system in config.systems.items():
        if any(
            s.parallelism.tp > 1 for s in Deployment.parse(system.deployment).instances
        ):
            raise ValueError(
                f"systems.{name}: with tp > 1 on host devices, which share the cores, "
                "durations must be modelled: expected durations=modelled, got "
                f"durations={config.durations}"
            )


def instance_memory(
    config: Config, deployment: Deployment, model: ModelConfig
) -> list[KVMemory]:
    """Return the KV pool of each instance: devices hold equally much in every system.

    Whole blocks only: a device holds at least one.

    With pipeline stages a block's KV has fewer layers, so a device holds more blocks;
    the stage with the most layers decides how many.

    Raises:
      ValueError: if there is no such attention kernel, or it cannot serve the model.
    """
    asked = config.memory.block_tokens
    chosen = choose_kernel(config.attention, jax.devices()[0], model, asked or None)
    size, layers = asked or chosen.kernel.block_tokens, model.layers

    def blocks(spec: InstanceSpec) -> int:
        most = len(cut_layers(range(layers), spec.parallelism.pp)[0])
        tokens = config.memory.tokens_per_device * spec.parallelism.tp * layers // most
        return max(1, tokens // size)

    return [
        KVMemory(
            num_blocks=blocks(spec),
            block_tokens=size,
            max_context=config.memory.max_context,
        )
        for spec in deployment.instances
    ]


def build_engine(
    config: Config, system: System, model: load.Model, shared: dict[Any, PlacedModel]
) -> Engine:
    """Return the engine of a system; nothing is compiled.

    On the virtual clock, where programs run one at a time, equal instances are on the
    same devices, each with its own KV pool.

    Args:
      shared: weights and programs; see `Engine.models`.
    """
    deployment = Deployment.parse(system.deployment)
    memory = instance_memory(config, deployment, model.config)
    virtual = config.clock == "virtual"
    return Engine(
        model.config,
        model.params,
        deployment,
        devices_for(deployment, shared=virtual),
        memory,
        [
            Buckets.for_limits(system.policies[spec.role].limits, pool)
            for spec, pool in zip(deployment.instances, memory, strict=True)
        ],
        attention=config.attention,
        layer_groups=config.layer_groups,
        models=shared,
        share_devices=virtual,
    )


def build_engines(
    config: Config, model: load.Model, shared: dict[Any, PlacedModel] | None = None
) -> dict[str, Engine]:
    """Return the engine of each system; they share weights and programs."""
    shared = {} if shared is None else shared
    return {
        name: build_engine(config, system, model, shared)
        for name, system in config.systems.items()
    }


def compile_engines(engines: Mapping[str, Engine], progress: Progress) -> None:
    """Compile every program that greedy requests can need."""
    for engine in engines.values():
        progress(f"compiling for {engine.deployment}, {engine.programs.attention}")
        engine.compile(sampled=False)


# -- durations and clocks --------------------------------------------------------------


def known_timing(
    config: Config, engine: Engine, step_times: Mapping[str, float]
) -> DurationRule:
    """Return the durations that are known before a run: modelled, or from a table."""
    if config.durations != "modelled":
        return from_table(engine, step_times)
    stages = tuple(spec.parallelism.pp for spec in engine.deployment.instances)
    model = CostExecutor(dataclasses.replace(config.cost, pp=stages))
    return lambda work, _: model.run(work)


def serve_with(
    config: Config,
    engine: Engine,
    policies: Mapping[Role, Policy],
    step_times: Mapping[str, float],
) -> ServedDeployment:
    """Return what serves requests with `policies`, by the clock that a config names."""
    live, timing = config.durations == "live", None
    if config.clock == "virtual":
        timing = as_measured if live else known_timing(config, engine, step_times)
        if config.link:
            timing = _over_link(timing, engine, get_link(config.link))
    return ServedDeployment(
        engine=engine,
        policies=policies,
        prefill_router=get_router(config.prefill_router),
        decode_router=get_router(config.decode_router),
        streams=config.streams,
        timing=timing,
        warm_up=live,
    )


def _over_link(timing: DurationRule, engine: Engine, link: LinkSpec) -> DurationRule:
    """Return `timing` with the link's durations for transfers."""

    def over_link(work: Task, parts_s: Sequence[float]) -> Outcome:
        if isinstance(work, Step):
            return timing(work, parts_s)
        lanes = engine.deployment.lanes(work.src, work.dst)
        sizes = engine.part_bytes(work)
        return as_measured(work, [link.transfer_s(size, lanes) for size in sizes])

    return over_link


def step_durations(
    config: Config, engines: Mapping[str, Engine], step_times: Mapping[str, float]
) -> dict[str, StepDurations]:
    """Return what single steps of each system take."""
    return {
        name: StepDurations(engine, known_timing(config, engine, step_times))
        for name, engine in engines.items()
    }


# -- targets ---------------------------------------------------------------------------


def tune_systems(
    config: Config,
    durations: Mapping[str, StepDurations],
    slo: SLO,
    source: RequestSource,
) -> dict[str, tuple[Mapping[Role, Policy], list[str]]]:
    """Return each system's policies with tuned step sizes, and the reasons."""
    requests = source(1.0)
    return {
        name: durations[name].tuned(system.policies, slo.tpot_s, requests)
        for name, system in config.systems.items()
    }


def resolve_slo(config: Config, durations: StepDurations, source: RequestSource) -> SLO:
    """Return the (tight) SLO in seconds; see `Targets`."""
    prefill_s = durations.prefill_s(source.longest_prompt())
    return config.slo.resolve(prefill_s, durations.decode_s()[0])
