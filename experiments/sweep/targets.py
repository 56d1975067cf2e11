"""What systems are judged by: each target, and the systems as they are tuned for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.calibration.program_times import without_engine
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.engine.step_durations import StepDurations, UnloadedTable
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Criterion, for_slo
from experiments.configs.config import Config
from experiments.sweep.point import Serving
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    resolve_slo,
    serve_with,
    step_durations,
    tune_systems,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A target, and the systems by name with the step sizes that are best for it."""

    name: str  # "" of a single one
    slo: SLO
    criteria: Mapping[str, Criterion]  # by name
    served: Mapping[str, ServedDeployment]
    timed: Mapping[str, Serving]  # by the durations of programs alone
    choices: Mapping[str, Sequence[str]]  # of step sizes: which and why
    # The smallest full step with a prompt beside decodes, where no size meets TPOT.
    too_slow_s: Mapping[str, float]
    durations: StepDurations  # of the first system


def resolve_targets(
    config: Config,
    engines: Mapping[str, Engine],
    seconds: Mapping[str, float],
    source: RequestSource,
) -> list[Target]:
    """Return the targets that follow from the seconds of programs.

    Args:
      seconds: by program; empty where durations are modelled.
    """
    durations = step_durations(config, engines, seconds)
    first = next(iter(durations.values()))
    smallest = _smallest_mixed_s(config, durations, source)
    unloaded = first.unloaded(source.every())
    found: list[Target] = []
    for name, slo in resolve_slos(config, durations, source).items():
        policies = {name: each.policies for name, each in config.systems.items()}
        choices: dict[str, list[str]] = {}
        if config.tune and not config.step_tokens:
            tuned = tune_systems(config, durations, slo, source)
            policies = {system: each for system, (each, _) in tuned.items()}
            choices = {system: why for system, (_, why) in tuned.items() if why}
        served = {
            system: serve_with(config, engine, policies[system], seconds)
            for system, engine in engines.items()
        }
        found.append(
            Target(
                name=name,
                slo=slo,
                criteria=resolve_criteria(config, slo, unloaded, source),
                served=served,
                timed={system: _timed(config, each) for system, each in served.items()},
                choices=choices,
                too_slow_s={
                    system: smallest_s
                    for system, smallest_s in smallest.items()
                    if smallest_s > slo.tpot_s
                },
                durations=first,
            )
        )
    return found


def _timed(config: Config, served: ServedDeployment) -> Serving:
    """Return what makes the timelines of `served`, without programs where it can."""
    if config.executed == "all":
        return served
    if config.durations == "modelled":  # by the load of a step, which no table lists
        return dataclasses.replace(served, executed=False)
    return without_engine(served)


def resolve_slos(
    config: Config, durations: Mapping[str, StepDurations], source: RequestSource
) -> dict[str, SLO]:
    """Return the SLO of each target in seconds; see `Config.relaxed`."""
    tight = resolve_slo(config, next(iter(durations.values())), source)
    if config.targets == ("",):
        return {"": tight}
    return with_relaxed(config, tight, _smallest_mixed_s(config, durations, source))


def with_relaxed(
    config: Config, tight: SLO, smallest_mixed_s: Mapping[str, float]
) -> dict[str, SLO]:
    """Return the tight SLO and the relaxed one, by name; see `Config.relaxed`.

    Args:
      smallest_mixed_s: by system, its smallest full step with a prompt beside decodes.
    """
    scale = max(1.0, config.relaxed * max(smallest_mixed_s.values()) / tight.tpot_s)
    return dict(zip(config.targets, (tight, tight.scaled(scale)), strict=True))


def _smallest_mixed_s(
    config: Config, durations: Mapping[str, StepDurations], source: RequestSource
) -> dict[str, float]:
    requests = source(1.0)
    return {
        name: durations[name].smallest_mixed_s(system.policies, requests)
        for name, system in config.systems.items()
    }


def resolve_criteria(
    config: Config, slo: SLO, unloaded: UnloadedTable, source: RequestSource
) -> dict[str, Criterion]:
    """Return every criterion by name, with the SLO's seconds.

    Args:
      unloaded: of the system that slowdowns refer to, whatever system is judged.
    """
    return for_slo(
        slo,
        target=config.search.target,
        prompt_tokens=source.longest_prompt(),
        unloaded=unloaded,
    )
