"""From a config to served requests: an engine for each system, and its runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from disagg_jax.control.backend import Backend, Executor, Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.deployment import (
    Deployment,
    InstanceSpec,
    KVMemory,
    Role,
    cut_layers,
)
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine, StepTotals
from disagg_jax.engine.executor import (
    EngineExecutor,
    Timing,
    TimingExecutor,
    full_slices,
    load_slices,
    outcome,
    table_timing,
)
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Alone, Criterion, IdleMachine, for_slo
from disagg_jax.request import Request, Timeline
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.scheduling.tuning import TuningInputs, has_rule, tune
from disagg_jax.sim.clock import VirtualBackend, busy_shares
from disagg_jax.sim.cost.linear import CostExecutor, LinearCost
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.work import Step, StepLoad, Task
from experiments.configs.config import Config, System
from experiments.sweep.request_source import RequestSource
from experiments.sweep.weights import Model
from sharding.mesh import Device

Progress = Callable[[str], None]


def instance_memory(
    config: Config, deployment: Deployment, layers: int
) -> list[KVMemory]:
    """The KV pool of each instance: a device holds equally much in every system.

    With pipeline stages that is a block's KV of fewer layers, and so of more blocks;
    the stage with the most layers decides how many.

    Args:
      layers: of the model.
    """

    def blocks(spec: InstanceSpec) -> int:
        most = len(cut_layers(range(layers), spec.pp)[0])
        return config.memory.blocks_per_device * spec.tp * layers // most

    return [
        KVMemory(
            num_blocks=blocks(spec),
            block_tokens=config.memory.block_tokens,
            max_context=config.memory.max_context,
        )
        for spec in deployment.instances
    ]


def devices_needed(config: Config) -> int:
    """Devices that the largest deployment takes; see `Server`."""
    return max(
        _devices(config, Deployment.parse(system.deployment))
        for system in config.systems.values()
    )


def _devices_for(config: Config, deployment: Deployment) -> list[Device]:
    """The devices there are; on the virtual clock one may stand for several.

    Programs run one at a time there, so what an instance takes on a device of its own
    can be measured on one that others have too. KV that moves from a device to itself
    is not copied: name a link for what it would take.
    """
    devices = jax.devices()
    needed = _devices(config, deployment)
    alone = all(spec.tp == 1 for spec in deployment.instances)
    if config.clock == "virtual" and alone and len(devices) < needed:
        return (devices * needed)[:needed]
    return devices


def _devices(config: Config, deployment: Deployment) -> int:
    if config.clock == "wall":
        return deployment.devices
    return sum(spec.devices for spec in set(deployment.instances))


# -- runs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of one run."""

    timelines: list[Timeline]
    log: EventLog
    # Of an executed run: by kind of step, what was computed and what was padding.
    totals: Mapping[str, StepTotals] | None = None
    # On the virtual clock: see `busy_shares`.
    busy: Sequence[tuple[float, ...]] | None = None


class Server:
    """One system: its engine, and runs of it.

    On the virtual clock, where programs run one at a time, equal instances are on the
    same devices, each with its own KV pool.
    """

    def __init__(
        self,
        config: Config,
        system: System,
        model: Model,
        shared: dict[Any, PlacedModel],
    ):
        self.config, self.system, self.policies = config, system, system.policies
        self.deployment = Deployment.parse(system.deployment)
        self.memory = instance_memory(config, self.deployment, model.config.layers)
        buckets = [
            Buckets.for_limits(system.policies[spec.role].limits, memory)
            for spec, memory in zip(self.deployment.instances, self.memory, strict=True)
        ]
        self.engine = Engine(
            model.config,
            model.params,
            self.deployment,
            _devices_for(config, self.deployment),
            self.memory,
            buckets,
            layer_groups=config.layer_groups,
            models=shared,
            share_devices=config.clock == "virtual",
        )

    def prepare(self, progress: Progress) -> None:
        """Compiles every program."""
        progress(f"compiling for {self.deployment}")
        self.engine.compile(sampled=False)

    def run(
        self,
        requests: Sequence[Request],
        step_times: Mapping[str, float],
        around: Callable[[Executor], Executor] = lambda executor: executor,
    ) -> Run:
        """Serves `requests` from an idle state to the end.

        Args:
          around: what the virtual clock is to run instead of the engine's executor.
        """
        self.engine.check(requests)
        log = EventLog()
        with self.engine.serving():
            backend = self._backend(step_times, around)
            timelines = serve(self.new_controller(), backend, requests, observer=log)
        return Run(timelines, log, dict(self.engine.totals), self._busy(backend))

    def simulate(
        self, requests: Sequence[Request], step_times: Mapping[str, float]
    ) -> Run:
        """The same timelines without running a program; see `Config.executed`."""
        lengths = [dataclasses.replace(r, prompt=None) for r in requests]
        executor = TimingExecutor(self.engine, self._timing(step_times))
        log = EventLog()
        backend = VirtualBackend(executor)
        timelines = serve(self.new_controller(), backend, lengths, observer=log)
        return Run(timelines, log, busy=self._busy(backend))

    def _busy(self, backend: Backend) -> list[tuple[float, ...]] | None:
        if not isinstance(backend, VirtualBackend):
            return None
        return busy_shares(self.deployment, backend.busy_s, backend.now_s())

    def new_controller(self) -> Controller:
        return Controller(
            self.deployment, self.policies, self.memory, streams=self.config.streams
        )

    @property
    def _cost(self) -> LinearCost:
        stages = tuple(spec.pp for spec in self.deployment.instances)
        return dataclasses.replace(self.config.cost, pp=stages)

    def _backend(
        self,
        step_times: Mapping[str, float],
        around: Callable[[Executor], Executor],
    ) -> Backend:
        if self.config.clock == "wall":
            return WallBackend(self.engine)
        executor = EngineExecutor(
            self.engine,
            self._timing(step_times),
            warm_up=self.config.durations == "live",
        )
        return VirtualBackend(around(executor))

    def _timing(self, step_times: Mapping[str, float]) -> Timing:
        timing = self._own_timing(step_times)
        if not self.config.link:
            return timing
        link = get_link(self.config.link)

        def over_link(work: Task, parts_s: Sequence[float]) -> Outcome:
            if isinstance(work, Step):
                return timing(work, parts_s)
            lanes = self.deployment.lanes(work.src, work.dst)
            sizes = self.engine.part_bytes(work)
            return outcome(work, [link.transfer_s(size, lanes) for size in sizes])

        return over_link

    def _own_timing(self, step_times: Mapping[str, float]) -> Timing:
        match self.config.durations:
            case "table":
                return table_timing(self.engine, step_times)
            case "live":
                return outcome
            case _:
                model = CostExecutor(self._cost)
                return lambda work, _: model.run(work)

    # -- what one step takes, for SLOs, tuning and where to start a search -----------

    def step_s(
        self, instance: int, load: StepLoad, step_times: Mapping[str, float]
    ) -> float:
        """Seconds of a step that finds its blocks at the front of the pool."""
        slices = load_slices(load, self.memory[instance])
        return self._known_s(Step.of(0, instance, slices), step_times)

    def prefill_s(self, tokens: int, step_times: Mapping[str, float]) -> float:
        """Seconds to prefill a prompt alone, in as few steps as it takes."""
        i = self.deployment.of(Role.PREFILL, Role.COLOCATED)[0]
        most = self.engine.instances[i].buckets.most_prompt_tokens
        return sum(
            self.step_s(
                i, StepLoad(((start, min(most, tokens - start)),), 0, 0), step_times
            )
            for start in range(0, tokens, most)
        )

    def decode_s(self, step_times: Mapping[str, float]) -> tuple[float, int]:
        """Seconds of the largest decode step, and its rows."""
        i = self.deployment.of(Role.DECODE, Role.COLOCATED)[0]
        instance = self.engine.instances[i]
        buckets = instance.buckets
        shape = buckets.decode_shape(buckets.decode_rows[-1], buckets.pool_blocks[-1])
        slices = full_slices(shape, instance.model.memory)
        return self._known_s(Step.of(0, i, slices), step_times), shape.rows

    def idle(self, step_times: Mapping[str, float]) -> IdleMachine:
        """This system with one request at a time, less any transfer.

        The decode steps of a request are those at its mean context.
        """
        decode = self.deployment.of(Role.DECODE, Role.COLOCATED)[0]

        def alone(request: Request) -> Alone:
            context = request.prompt_tokens + max(1, request.max_tokens // 2)
            return Alone(
                ttft_s=self.prefill_s(request.prompt_tokens, step_times),
                tpot_s=self.step_s(decode, StepLoad((), 1, context), step_times),
            )

        return alone

    def tune(
        self, slo: SLO, source: RequestSource, step_times: Mapping[str, float]
    ) -> list[str]:
        """Gives each policy the step size its paper would choose; says which and why.

        The sizes to choose from are those that programs were compiled for.
        """
        requests = source(1.0, 0)
        policies, said = dict(self.policies), list[str]()
        for role, policy in self.policies.items():
            if not (found := self.deployment.of(role)) or not has_rule(policy):
                continue
            i = found[0]
            profile = TuningInputs(
                step_s=lambda load, i=i: self.step_s(i, load, step_times),
                sizes=self.engine.instances[i].buckets.prompt_sizes,
                prompt_tokens=_mean(r.prompt_tokens for r in requests),
                output_tokens=_mean(r.max_tokens for r in requests),
                kv_tokens=self.memory[i].num_blocks * self.memory[i].block_tokens,
            )
            tuned = tune(policy, profile, slo.tpot_s)
            policies[role] = tuned.policy
            said.append(f"{role.value} {tuned.choice}")
        self.policies = policies
        return said

    def _known_s(self, step: Step, step_times: Mapping[str, float]) -> float:
        if self.config.durations == "modelled":
            return sum(self._cost.stages_s(step.instance, step.load))
        return sum(step_times[key] for key in self.engine.part_keys(step))


def _mean(tokens: Iterable[int]) -> int:
    return round(statistics.fmean(tokens))


def check_modelled(config: Config) -> None:
    """Raises ValueError if measured durations would be contention, not speed.

    Tensor-parallel host devices share the cores, so what a program takes there says
    nothing about devices of its own.
    """
    shared = jax.default_backend() == "cpu" and config.clock == "virtual"
    if not shared or config.durations == "modelled":
        return
    for name, system in config.systems.items():
        if any(s.tp > 1 for s in Deployment.parse(system.deployment).instances):
            raise ValueError(
                f"systems.{name}: with tp > 1 on host devices, which share the cores, "
                "durations must be modelled: expected durations=modelled, got "
                f"durations={config.durations}"
            )


def resolve_slo(
    config: Config,
    server: Server,
    source: RequestSource,
    step_times: Mapping[str, float],
) -> SLO:
    """The SLO in seconds; see `Targets`."""
    return config.slo.resolve(
        server.prefill_s(source.longest_prompt(), step_times),
        server.decode_s(step_times)[0],
    )


def resolve_criteria(
    config: Config,
    slo: SLO,
    server: Server,
    source: RequestSource,
    step_times: Mapping[str, float],
) -> dict[str, Criterion]:
    """Every criterion by name, with the SLO's seconds.

    Args:
      server: the one that slowdowns refer to, whatever system is judged.
    """
    return for_slo(
        slo,
        target=config.search.target,
        prompt_tokens=source.longest_prompt(),
        idle=server.idle(step_times),
    )
