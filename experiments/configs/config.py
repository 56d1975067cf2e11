"""The config of an experiment: typed and nested."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.errors import require
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.criteria import MLPERF_SLOS, NAMES
from disagg_jax.scheduling import SYSTEMS, find_system, get_system
from disagg_jax.scheduling.routing import get_router
from disagg_jax.scheduling.system import System
from disagg_jax.scheduling.tuning import has_rule
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.workload.requests import Arrivals
from disagg_jax.workload.traces import Ties, TooLong, Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """The options of a `disagg_jax.workload.Workload`."""

    source: str = "random"  # prompts: random | human_eval | trace
    trace: str = ""  # source=trace: its path; `workload.traces.formats` has the formats
    trace_scale: float = 1.0  # source=trace: factor on its lengths, to fit the model
    trace_unit: Unit = "auto"  # source=trace: of its times, if its format does not say
    trace_rows: int = 0  # source=trace: rows to read, from the first on; 0: all
    # source=trace: rows in one tick of a coarse clock are spread over it; keep them
    # where they really came at one time.
    ties: Ties = "spread"
    # source=trace: rows over memory.max_context are left out (drop), or prompt and
    # output are cut to half of it each (clip).
    too_long: TooLong = "drop"
    num_requests: int = 100  # in each run
    arrivals: Arrivals = Arrivals()  # also of a trace without times
    prompt_tokens: str = "uniform:32:256"  # source=random; see `lengths.parse_lengths`
    output_tokens: str = "uniform:16:48"  # source=random | human_eval
    ignore_eos: bool = True  # generate all output_tokens: the same work for all systems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """The SLO: seconds, or multiples of a step's time alone on this machine.

    The multiples ask the same question on any machine. Every output has the resolved
    seconds.
    """

    ttft_s: float = 0.0  # 0: `ttft_scale` times the prefill of the longest prompt alone
    tpot_s: float = 0.0  # 0: `tpot_scale` times a decode step with all rows and blocks
    ttft_scale: float = 5.0
    tpot_scale: float = 1.5
    preset: str = ""  # in place of the scales: a name of `criteria.MLPERF_SLOS`

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "ttft_scale", "tpot_scale"):
            value = getattr(self, name)
            require(value >= 0, f"slo.{name}: expected >= 0", value)

    @property
    def explicit(self) -> bool:
        """Return whether the targets are named seconds, not multiples of a step."""
        return bool(self.ttft_s or self.tpot_s or self.preset)

    def resolve(self, prefill_s: float, decode_s: float) -> SLO:
        """Return the SLO in seconds, given the durations that the scales multiply."""
        if self.preset:
            preset = MLPERF_SLOS[self.preset]
            ttft_s, tpot_s = preset.ttft_s, preset.tpot_s
        else:
            ttft_s, tpot_s = self.ttft_scale * prefill_s, self.tpot_scale * decode_s
        return SLO(ttft_s=self.ttft_s or ttft_s, tpot_s=self.tpot_s or tpot_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """KV memory, the same on each device whatever its instance's role."""

    tokens_per_device: int = 4096  # an instance with tp devices holds tp times as many
    block_tokens: int = 0  # tokens in a block; 0: what suits the device (64 on a CPU)
    max_context: int = 512  # longest prompt + output, in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All options that decide a run's result."""

    model: str = "tiny"  # a preset of models.config; auto: what the weights are of
    # random | trained (models/trained) | smollm2 | the path of a .gguf file, a
    # Hugging Face folder or a checkpoint (experiments.convert_checkpoint)
    weights: str = "random"
    systems: Mapping[str, System]  # by the name used in tables and pictures
    workload: WorkloadConfig = WorkloadConfig()
    slo: Targets = Targets()
    memory: Memory = Memory()
    criterion: str = "distserve"  # what is good: a name of `criteria.for_slo`
    search: SearchPlan = SearchPlan()  # its target: of distserve and mooncake
    # Requests/s per device; empty: search for the goodput.
    rates: tuple[float, ...] = ()
    # Step sizes in tokens, with each of which every system that has a step size runs.
    # Empty: it runs once, with the size that its paper would choose for the SLO
    # (`tune`).
    step_tokens: tuple[int, ...] = ()
    tune: bool = True  # False: step sizes stay as the policies have them
    # > 0: beside `slo`, the tight target, a relaxed one. It is the tight one times the
    # smallest factor >= 1 that makes TPOT this many times the smallest full step with a
    # prompt, or a part of one, beside decodes, on the slowest system. So every system
    # has a step that meets it. An `slo` in seconds stays alone.
    relaxed: float = 0.0
    num_seeds: int = 5  # runs of each point, at most; intervals are across them
    # > 0: look at so many runs first, then at twice as many, up to `num_seeds`, and
    # stop when every system is resolved; see `looks`.
    first_seeds: int = 0
    seed: int = 0  # the runs use seed, seed + 1, ...; weights use seed
    clock: str = "virtual"  # virtual | wall
    # Virtual clock: table (medians taken first), live, or modelled (`cost`, no tokens).
    durations: str = "table"
    # Timed runs of each program, at most: they end when medians are steady; see
    # `calibration.step_times`.
    timing_repeats: int = 16
    # Whether programs run at every point. Otherwise the durations alone make the
    # timelines, if they are known before and no token ends a request. Programs then run
    # at each system's highest passing rate, for the first `executed_requests` of the
    # first seed, which must give the timelines of the durations.
    execute_all: bool = False
    executed_requests: int = 100
    # Whether the same systems are also simulated on GPUs, by targets that follow from
    # the same rules; see `sweep.hardware`.
    hardware_table: bool = False
    cost: LinearCost = LinearCost(step_base_s=1e-3)
    prefill_router: str = "shortest_queue"  # picks the instance of a prompt
    decode_router: str = "least_loaded"  # picks the instance that pulls KV
    # The kernel: auto, by the device, or what `engine.attention.choose_kernel` finds.
    attention: str = "auto"
    layer_groups: int = 1  # programs that the layers of a pipeline stage are cut into
    # Virtual clock: a preset of sim.hardware.link or a .json file, whose time
    # transfers take.
    link: str = ""
    # Whether KV leaves while the rest of its prompt is computed, a part by each
    # program.
    streams: bool = False

    def check_values(self) -> None:
        """Raise a ValueError on values that no run could have.

        Not at construction: one override at a time may pass through such a state.
        """
        require_one_of("clock", self.clock, ("virtual", "wall"))
        require_one_of("durations", self.durations, ("table", "live", "modelled"))
        require_one_of(
            "workload.source", self.workload.source, ("random", "human_eval", "trace")
        )
        require_one_of("criterion", self.criterion, NAMES)
        if self.link:
            get_link(self.link)
            if self.clock != "virtual":
                raise ValueError(
                    f"link: expected clock=virtual, got clock={self.clock}, where KV "
                    "takes the link that is there"
                )
        if self.slo.preset:
            require_one_of("slo.preset", self.slo.preset, MLPERF_SLOS)
        if self.workload.source == "trace" and not self.workload.trace:
            raise ValueError("workload.trace: expected the path of a trace, got none")
        for router in (self.prefill_router, self.decode_router):
            get_router(router)
        if not self.systems:
            raise ValueError("systems: expected at least one, got none")
        require(self.num_seeds >= 1, "num_seeds: expected >= 1", self.num_seeds)
        for name, least in (
            ("first_seeds", 0),
            ("relaxed", 0),
            ("executed_requests", 1),
            ("timing_repeats", 1),
        ):
            value = getattr(self, name)
            require(value >= least, f"{name}: expected >= {least}", value)
        n = self.workload.num_requests
        require(n >= 1, "workload.num_requests: expected >= 1", n)
        for rate in self.rates:
            finite = 0 < rate < math.inf
            require(finite, "rates: expected > 0 requests/s, and finite", rate)
        for name, system in self.systems.items():
            deployment = Deployment.parse(system.deployment)
            for spec in deployment.instances:
                if spec.role not in system.policies:
                    raise ValueError(
                        f"systems.{name}: deployment '{system.deployment}' has "
                        f"{spec.role} instances, but the system has policies for "
                        f"{', '.join(system.policies)} only"
                    )

    @property
    def executed(self) -> str:
        """Where programs run: "all" points, or "passing"; see `execute_all`."""
        known = self.clock == "virtual" and self.durations != "live"
        passing = known and self.workload.ignore_eos and not self.execute_all
        return "passing" if passing else "all"

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the names of the targets that systems are judged by; "" of one."""
        alone = not self.relaxed or self.slo.explicit
        return ("",) if alone else ("tight", "relaxed")

    @property
    def listed_systems(self) -> tuple[str, ...]:
        """Return the names that `get_system` finds, of listed systems and of own ones.

        Others are those of a placement search, and one system with several step sizes.
        """
        return tuple(
            name
            for name in self.systems
            if find_system(name, SYSTEMS) in SYSTEMS
            or (":" in name and "@" not in name)
        )

    @property
    def has_hardware_table(self) -> bool:
        """Return whether the question can be asked of other hardware, and is to be."""
        scaled = self.criterion == "distserve" and not self.slo.explicit
        return self.hardware_table and scaled and len(self.listed_systems) > 1

    @property
    def seeds(self) -> range:
        """Return the seeds of the runs of each point, at most."""
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def looks(self) -> tuple[int, ...]:
        """Return the numbers of seeds after which a run looks whether it may stop.

        With `first_seeds` = 4 and `num_seeds` = 16 these are 4, 8 and 16. Intervals are
        corrected for their number; see `metrics.look_confidence`.
        """
        looks = [self.first_seeds or self.num_seeds]
        while looks[-1] < self.num_seeds:
            looks.append(2 * looks[-1])
        return (*looks[:-1], self.num_seeds)

    def with_placements(self, found: Mapping[str, Any]) -> Config:
        """Return the systems and, beside them, each answer of a placement search.

        An answer is named by its algorithm, like placed_high. It has the parameters of
        the system of the same name here, where there is one.

        Args:
          found: the placement.json of `experiments.placement_search`.

        Raises:
          ValueError: if it is another file, or of another model.
        """
        try:
            model = found["flags"]["model"]
            answers = {
                f"placed_{name}": (answer["system"], answer["deployment"])
                for name, answer in found.items()
                if isinstance(answer, Mapping) and "deployment" in answer
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                "--placement: expected what experiments.placement_search wrote, got "
                f"something without {error}"
            ) from error
        if model != self.model:
            raise ValueError(
                f"--placement: expected one of {self.model}, got one of {model}"
            )
        placed = {
            name: dataclasses.replace(
                self.systems.get(find_system(system, self.systems))
                or System.of(system, deployment),
                deployment=deployment,
            )
            for name, (system, deployment) in answers.items()
        }
        return dataclasses.replace(self, systems={**self.systems, **placed})

    def with_systems(self, names: Sequence[str]) -> Config:
        """Return the config with these systems only.

        One that the config has keeps its deployment and parameters. Another is found by
        `get_system`. It gets the instances of the config's first system that has the
        same roles, or else those of its first system, in roles of its own. A listed
        one is also kept within the largest step and the most rows of the config's
        systems, so that it is compared at their size and shares their programs.

        Raises:
          ValueError: on an unknown name, or roles that these instances cannot have.
        """
        known = [*self.systems, *SYSTEMS]
        found = [find_system(name, known) for name in names]
        systems = {n: self.systems.get(n) or self._new_system(n) for n in found}
        return dataclasses.replace(self, systems=systems)

    def _new_system(self, name: str) -> System:
        policies = get_system(name)
        deployment = self._instances_for(name, set(policies))
        system = System(deployment=deployment, policies=policies)
        if name not in SYSTEMS:
            return system
        ours = [p for s in self.systems.values() for p in s.policies.values()]
        limits = [policy.limits for policy in ours]
        return system.within(
            tokens=max(limit.prefill_tokens for limit in limits),
            rows=max(max(n.prefill_rows, n.decode_rows) for n in limits),
        )

    def _instances_for(self, name: str, roles: set[Role]) -> str:
        for system in self.systems.values():
            if set(system.policies) == roles:
                return system.deployment
        first = Deployment.parse(next(iter(self.systems.values())).deployment)
        try:
            return str(first.in_roles(roles))
        except ValueError as error:
            raise ValueError(f"systems: {name}: {error}") from error

    def by_step_tokens(self) -> Config:
        """Return a system for each of `step_tokens`, named like sarathi@128.

        Raises:
          ValueError: if a policy cannot have such a size.
        """
        systems: dict[str, System] = {}
        for name, system in self.systems.items():
            sized = any(has_rule(policy) for policy in system.policies.values())
            for size in self.step_tokens if sized else ():
                systems[f"{name}@{size}"] = system.resized(size)
            if not sized or not self.step_tokens:
                systems[name] = system
        return dataclasses.replace(self, systems=systems)


def require_one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got '{value}'")
