"""The main job's second table: its question for a model and GPUs that people rent.

The main job's answer holds for the engine on this machine. Here the same systems are
simulated with step times of a serving engine on GPUs. Targets and step sizes follow
from these times by the main job's rules. The step times of both sides stand beside
the answers, as far as they bear on them (`step_prices`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.deployment import InstanceSpec, Parallelism, Role
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import DistServe
from disagg_jax.progress import Progress, Stop
from disagg_jax.request import Request
from disagg_jax.scheduling import get_system
from disagg_jax.scheduling.tuning import (
    StepSeconds,
    TuningInputs,
    smallest_mixed_s,
    tile_multiples,
)
from disagg_jax.search.cells import compare
from disagg_jax.search.comparison import (
    KNOWN,
    ComparisonSpec,
    SystemResult,
    needed,
    tuning_inputs,
)
from disagg_jax.search.maps import slos_map
from disagg_jax.sim.device_cost import DeviceCost, roofline
from disagg_jax.sim.engines import get_engine
from disagg_jax.sim.hardware.presets import get_hardware
from disagg_jax.sim.simulation import Simulation
from disagg_jax.sim.workers import Mapper
from disagg_jax.work import StepLoad
from experiments.configs.config import Config
from experiments.configs.paper_workloads import get_workload
from experiments.sweep.step_prices import Device, this_machine
from experiments.sweep.summary import Judge, pairs
from experiments.sweep.targets import with_relaxed

_TILE = 128  # rows of a matmul's tile, at least: step sizes are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is simulated with a config's systems.

    The engine is the one whose profile was held against this model on this GPU. The
    main job has seconds for it: so runs may have fewer requests than the targets ask
    for, which the table says, and the outputs of the workload are short, as longer ones
    need longer runs.
    """

    model: str = "llama-3.1-8b"
    hardware: str = "h100"
    engine: str = "trtllm-1.0"
    devices: int = 4
    workload: str = "longbench"
    max_context: int = 2048  # of the workload's longest request
    num_requests: int = 200  # of a run, at least; more where the targets are long
    max_requests: int = 1000  # of a run, at most
    seeds: int = 3

    def spec(self, config: Config) -> ComparisonSpec:
        """Return the comparison of a config's systems, searched as the config says."""
        simulation = Simulation.of(
            self.model, self.hardware, engine=self.engine, max_context=self.max_context
        )
        tile = max(_TILE, get_hardware(self.hardware).tile_rows)
        engine = get_engine(self.engine)
        return ComparisonSpec(
            simulation=simulation,
            devices=self.devices,
            systems={
                name: engine.limit(get_system(name, KNOWN))
                for name in config.listed_systems
            },
            sizes=tile_multiples(tile, engine.token_budget),
            plan=config.search,
            num_requests=self.num_requests,
            max_requests=self.max_requests,
            looks=(self.seeds,),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instance:
    """The smallest instance that the model fits on, and what it serves."""

    question: Question
    spec: ComparisonSpec
    requests: Sequence[Request]
    inputs: TuningInputs
    layout: Parallelism

    @classmethod
    def of(cls, question: Question, spec: ComparisonSpec) -> _Instance:
        layout = Parallelism(spec.tensor_parallel()[0])
        instance = InstanceSpec(role=Role.COLOCATED, parallelism=layout)
        workload = get_workload(question.workload)
        return cls(
            question=question,
            spec=spec,
            requests=workload.requests(spec.max_requests, 1.0, spec.seeds[0]),
            inputs=tuning_inputs(spec, workload, instance),
            layout=layout,
        )

    def slos(self, config: Config, rows: int) -> dict[str, SLO]:
        """Return the SLO of each target, by the rules of `sweep.targets`.

        Args:
          rows: of a full decode step, each with the longest context.
        """
        longest = max(request.prompt_tokens for request in self.requests)
        context = rows * self.question.max_context
        step_s = self.inputs.step_s
        tight = config.slo.resolve(
            step_s(StepLoad(((0, longest),), 0, 0)),
            step_s(StepLoad((), rows, context)),
        )
        if config.targets == ("",):
            return {"": tight}
        smallest_s = {
            name: smallest_mixed_s((each, self.inputs) for each in policies.values())
            for name, policies in self.spec.systems.items()
        }
        return with_relaxed(config, tight, smallest_s)

    def device(self) -> Device:
        """Return the times of its steps."""
        step_s, question = self.inputs.step_s, self.question
        return Device(
            name=f"{question.model} on {question.hardware}",
            step_s=step_s,
            alone_s=lambda tokens: step_s(StepLoad(((0, tokens),), 0, 0)),
            context=self.inputs.context,
            overhead_s=lambda load: step_s(load) - self._bare(load),
        )

    @property
    def _bare(self) -> StepSeconds:
        """Return the seconds of steps without host work and launches."""
        engine = get_engine(self.question.engine)
        factors = engine.factors.without_overheads()
        cost: DeviceCost = roofline(
            self.spec.simulation.model,
            get_hardware(self.question.hardware),
            dataclasses.replace(engine, factors=factors),
        )
        instance = cost.instance(self.layout)
        return lambda load: sum(instance.stages_s(load))


def hardware_table(
    config: Config,
    durations: Mapping[str, StepDurations],
    requests: Sequence[Request],
    mapper: Mapper,
    progress: Progress,
    stop: Stop,
    question: Question | None = None,
) -> dict[str, Any] | None:
    """Return what `summary.json` says of a config's systems on hardware.

    Args:
      durations: of each system's steps on this machine.
      requests: on this machine.
      stop: whether the time is spent.

    Returns:
      None if the time did not suffice for every target.
    """
    question = question or Question()
    spec = question.spec(config)
    instance = _Instance.of(question, spec)
    _, rows = next(iter(durations.values())).decode_s()
    slos = instance.slos(config, rows)
    workload = get_workload(question.workload)
    maps = [
        slos_map([slo.ttft_s], [slo.tpot_s], workload, question.workload)
        for slo in slos.values()
    ]
    grids = compare(spec, maps, mapper, progress, stop)
    if not all(grids):
        return None
    cells = [next(iter(grid.values())) for grid in grids]
    return {
        **dataclasses.asdict(question),
        "checked": spec.simulation.checked,
        "prompt_tokens": instance.inputs.prompt_tokens,
        "output_tokens": instance.inputs.output_tokens,
        "decodes": rows,
        "here": {
            "prompt_tokens": _mean([r.prompt_tokens for r in requests]),
            "output_tokens": _mean([r.max_tokens for r in requests]),
        },
        "left_out": [n for n in config.systems if n not in config.listed_systems],
        "targets": {
            name: _summary(config, slo, found)
            for (name, slo), found in zip(slos.items(), cells, strict=True)
        },
        "prices": _prices(config, durations, requests, instance),
    }


def _mean(tokens: Sequence[int]) -> int:
    return round(statistics.fmean(tokens))


def _summary(
    config: Config, slo: SLO, results: Sequence[SystemResult]
) -> dict[str, Any]:
    """Return what was found by one target, in the form of `Sweep.run`."""
    systems = {one.system: _system(one) for one in results}
    judge = Judge(
        name=config.criterion,
        criterion=DistServe(slo=slo, target=config.search.target),
        tolerance=config.search.tolerance,
        independent=True,
        confidence=results[0].confidence,
    )
    return {
        "slo": dataclasses.asdict(slo),
        "criterion": config.criterion,
        "target": config.search.target,
        "requests": needed(results[0]),
        "choices": {one.system: list(one.parameters) for one in results},
        "systems": systems,
        "pairs": pairs(judge, systems),
    }


def _system(found: SystemResult) -> dict[str, Any]:
    return {
        "deployment": found.deployment,
        "goodput": {
            "goodput_rps_per_device": dataclasses.asdict(found.goodput),
            "per_seed_rps_per_device": list(found.per_seed_rps),
        },
    }


def _prices(
    config: Config,
    durations: Mapping[str, StepDurations],
    requests: Sequence[Request],
    instance: _Instance,
) -> dict[str, Any] | None:
    """Return what parts of prompts cost beside decodes, here and on the hardware."""
    here = this_machine(config, durations, requests)
    if here is None:
        return None
    device, shape = here
    return {
        **dataclasses.asdict(shape),
        "devices": [each.prices(shape) for each in (device, instance.device())],
    }
