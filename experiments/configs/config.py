"""What an experiment is: typed, nested, and overridable from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import MLPERF_SLOS, NAMES
from disagg_jax.scheduling import find_system, get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.tuning import has_rule, resized
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.workload.lengths import (
    FixedLengths,
    Lengths,
    LognormalLengths,
    UniformLengths,
)
from disagg_jax.workload.requests import Arrivals
from disagg_jax.workload.traces import Ties, TooLong, Unit
from experiments.configs import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of the systems. Every point runs `num_requests`."""

    source: str = "random"  # prompts: random | human_eval | trace
    trace: str = (
        ""  # source=trace: its path; see `disagg_jax.workload.traces` for the formats
    )
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
    prompt_tokens: str = "uniform:32:256"  # source=random; see `parse_lengths`
    output_tokens: str = "uniform:16:48"  # source=random | human_eval
    ignore_eos: bool = True  # generate all output_tokens: the same work for all systems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """The SLO: seconds, or multiples of what one step takes on this machine alone.

    The multiples ask the same question on any machine; the resolved seconds are in
    every output.
    """

    ttft_s: float = 0.0  # 0: `ttft_scale` times the prefill of the longest prompt alone
    tpot_s: float = 0.0  # 0: `tpot_scale` times a decode step with all rows and blocks
    ttft_scale: float = 5.0
    tpot_scale: float = 1.5
    preset: str = ""  # in place of the scales: a name of `criteria.MLPERF_SLOS`

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "ttft_scale", "tpot_scale"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"slo.{name}: expected >= 0, got {value}")

    def resolve(self, prefill_s: float, decode_s: float) -> SLO:
        """The SLO in seconds, given the durations that the scales refer to."""
        if self.preset:
            preset = MLPERF_SLOS[self.preset]
            ttft_s, tpot_s = preset.ttft_s, preset.tpot_s
        else:
            ttft_s, tpot_s = self.ttft_scale * prefill_s, self.tpot_scale * decode_s
        return SLO(ttft_s=self.ttft_s or ttft_s, tpot_s=self.tpot_s or tpot_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One of the systems compared: a scheduling system on a deployment."""

    deployment: str  # such as 2xcolocated:tp1 or prefill:tp2,decode:tp1
    policies: Mapping[Role, Policy]  # by role; see `disagg_jax.scheduling.SYSTEMS`

    @classmethod
    def of(
        cls, system: str, deployment: str, **changes: Mapping[str, object]
    ) -> System:
        """`system` with its policies' parameters changed: `prefill={"max_seqs": 8}`."""
        policies = {
            role: dataclasses.replace(
                typing.cast(Any, policy), **changes.get(role.value, {})
            )
            for role, policy in get_system(system).items()
        }
        return cls(deployment=deployment, policies=policies)

    def resized(self, step_tokens: int) -> System:
        """The same with steps of that size, where a policy's paper tunes it."""
        policies = {
            role: resized(policy, step_tokens) if has_rule(policy) else policy
            for role, policy in self.policies.items()
        }
        return dataclasses.replace(self, policies=policies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """KV memory. A device has so many blocks whatever its instance's role."""

    blocks_per_device: int = 256  # an instance with tp devices has tp times as many
    block_tokens: int = 16  # tokens in a block
    max_context: int = 512  # longest prompt + output, in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's result."""

    model: str = "tiny"  # a preset of models.config; auto: what the weights are of
    # random | trained (experiments.train_tiny) | smollm2 | the path of a .gguf file, a
    # Hugging Face folder or a checkpoint (experiments.convert_checkpoint)
    weights: str = "random"
    systems: Mapping[str, System]  # by the name used in tables and pictures
    workload: Workload = Workload()
    slo: Targets = Targets()
    memory: Memory = Memory()
    criterion: str = "distserve"  # what is good: a name of `criteria.for_slo`
    search: SearchPlan = SearchPlan()  # its target: of distserve and mooncake
    rates: tuple[
        float, ...
    ] = ()  # requests/s per device; empty: search for the goodput
    # Step sizes, in tokens: every system that has one runs with each of these. Empty:
    # it runs once, with the size that its paper would choose for the SLO, if `tune`.
    step_tokens: tuple[int, ...] = ()
    tune: bool = True  # False: step sizes stay as the policies have them
    num_seeds: int = 5  # runs of each point; intervals are across them
    seed: int = 0  # the runs use seed, seed + 1, ...; weights use seed
    clock: str = "virtual"  # virtual | wall
    # Virtual clock: table (medians taken first), live, or modelled (`cost`, no tokens).
    durations: str = "table"
    timing_repeats: int = 9  # runs of each program behind a median
    # Whether programs run at every point. Otherwise, where their durations are known
    # before and no token ends a request, only at each system's highest passing rate:
    # elsewhere the durations alone make the timelines, which are equal (compared where
    # both were done).
    execute_all: bool = False
    cost: LinearCost = LinearCost(step_base_s=1e-3)
    layer_groups: int = 1  # programs that the layers of a pipeline stage are cut into
    # Virtual clock: a preset of sim.link, whose time transfers take instead of theirs.
    link: str = ""
    # Whether KV leaves, in so many parts as there are programs, while the rest of its
    # prompt is computed.
    streams: bool = False

    def check(
        self,
        base: Config | None = None,
        elsewhere: Mapping[str, tuple[options.Need, ...]] = {},
    ) -> None:
        """Raises ValueError on values that no run could have, or without effect.

        Not at construction: one override at a time may pass through such a state.

        Args:
          base, elsewhere: see `options.check`; by default a config of defaults.
        """
        _expect_one_of("clock", self.clock, ("virtual", "wall"))
        _expect_one_of("durations", self.durations, ("table", "live", "modelled"))
        _expect_one_of(
            "workload.source", self.workload.source, ("random", "human_eval", "trace")
        )
        _expect_one_of("criterion", self.criterion, NAMES)
        if self.link:
            get_link(self.link)
            if self.clock != "virtual":
                raise ValueError(
                    f"link: expected clock=virtual, got clock={self.clock}, where KV "
                    "takes the link that is there"
                )
        if self.slo.preset:
            _expect_one_of("slo.preset", self.slo.preset, MLPERF_SLOS)
        if self.workload.source == "trace" and not self.workload.trace:
            raise ValueError("workload.trace: expected the path of a trace, got none")
        if not self.systems:
            raise ValueError("systems: expected at least one, got none")
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds: expected >= 1, got {self.num_seeds}")
        if (n := self.workload.num_requests) < 1:
            raise ValueError(f"workload.num_requests: expected >= 1, got {n}")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"rates: expected > 0 requests/s, and finite, got {rate}"
                )
        for name, system in self.systems.items():
            deployment = Deployment.parse(system.deployment)
            for spec in deployment.instances:
                if spec.role not in system.policies:
                    raise ValueError(
                        f"systems.{name}: deployment '{system.deployment}' has "
                        f"{spec.role} instances, but the system has policies for "
                        f"{', '.join(system.policies)} only"
                    )
        options.check(self, base or Config(systems=self.systems), elsewhere)

    @property
    def executed(self) -> str:
        """all, or passing; see `execute_all`."""
        known = self.clock == "virtual" and self.durations != "live"
        passing = known and self.workload.ignore_eos and not self.execute_all
        return "passing" if passing else "all"

    def with_placements(self, found: Mapping[str, Any]) -> Config:
        """The systems, and beside them each answer of a placement search.

        An answer is called by its algorithm, placed_high. It has the parameters of the
        system of the same name here, where there is one.

        Args:
          found: what `experiments.placement_search` wrote.

        Raises:
          ValueError: if that is something else, or of another model.
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

    def by_step_tokens(self) -> Config:
        """A system for each of `step_tokens`, named like sarathi@128.

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


def _expect_one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got '{value}'")


def parse_lengths(text: str) -> Lengths:
    """`fixed:N`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA:HIGH`, in tokens."""
    kind, *numbers = text.split(":")
    try:
        match kind, [float(number) for number in numbers]:
            case "fixed", [tokens]:
                return FixedLengths(tokens=int(tokens))
            case "uniform", [low, high]:
                return UniformLengths(low=int(low), high=int(high))
            case "lognormal", [median, sigma, high]:
                return LognormalLengths(median=median, sigma=sigma, high=int(high))
            case _:
                pass
    except (ValueError, OverflowError) as error:  # int(inf) overflows
        raise ValueError(f"lengths '{text}': {error}") from error
    raise ValueError(
        "lengths: expected fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:HIGH, "
        f"got '{text}'"
    )


# -- overrides ------------------------------------------------------------------------


def override(
    config: Config,
    assignments: Iterable[str],
    elsewhere: Mapping[str, tuple[options.Need, ...]] = {},
) -> Config:
    """`config` with `key=value` assignments applied, keys dotted, types checked.

    A key goes through fields and mappings: `workload.num_requests=50`,
    `systems.vllm_v0.policies.colocated.max_seqs=8`.

    Args:
      elsewhere: options that do not matter to the command; see `options.read_by`.

    Raises:
      ValueError: naming the keys there are, the type that was expected, or what would
        give an option an effect. What `config` itself has without effect may stay.
    """
    base = config
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set: expected key=value, got '{assignment}'")
        config = _assign(config, key, key.split("."), text)
    config.check(base, elsewhere)
    return config


def _assign(node: Any, key: str, path: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, Mapping):
        known = {str(k): k for k in node}
        name = find_system(name, known)
        child = node[known[name]] if name in known else None
    else:
        known = {field.name: field.name for field in dataclasses.fields(node)}
        child = getattr(node, name, None)
    if name not in known:
        raise ValueError(
            f"--set {key}: no '{name}' here; expected one of {', '.join(known)}"
        )
    if rest and not (dataclasses.is_dataclass(child) or isinstance(child, Mapping)):
        raise ValueError(f"--set {key}: '{name}' has no parts")
    if rest:
        value = _assign(child, key, rest, text)
    elif dataclasses.is_dataclass(child) or isinstance(child, Mapping):
        raise ValueError(f"--set {key}: '{name}' has parts; name one of them")
    else:
        value = _parse(key, typing.get_type_hints(type(node))[name], text)
    if isinstance(node, Mapping):
        return {**node, known[name]: value}
    return dataclasses.replace(node, **{name: value})


def _parse(key: str, kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(key, item, part) for part in text.split(",") if part)
    if typing.get_origin(kind) is typing.Literal:
        _expect_one_of(f"--set {key}", text, typing.get_args(kind))
        return text
    if isinstance(kind, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            value = kind(text)
        except ValueError:
            pass
        else:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--set {key}: expected a finite number, got '{text}'")
            return value
    raise ValueError(f"--set {key}: expected {kind.__name__}, got '{text}'")


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON data, the types of its parts included."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {
                field.name: plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
            }
            return {"type": type(value).__name__, **fields}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return json.loads(json.dumps(plain(config)))
