"""The needs of options: setting an option that cannot matter is an error.

`CONFIG` has a row for each field of a config, with the needs of that option; a field
without a row fails a test. `check` finds options that were set without their needs.
Commands check their flags by `cli.flags.expect_used`.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.scheduling.tuning import has_rule, resized
from disagg_jax.workload.traces import has_times
from experiments.configs.config import Config


@dataclasses.dataclass(frozen=True)
class Need:
    """A condition without which an option has no effect, in a user's words."""

    expected: str
    met: Callable[[Config], bool]
    got: Callable[[Config], str]


def no_effect(name: str, value: object, *, expected: str, got: str) -> ValueError:
    """Return the error about an option that cannot matter, with what it needs."""
    setting = f"{name}={shown(value)}"
    return ValueError(
        f"{name}: expected {expected}, got {got}, where {setting} has no effect"
    )


def shown(value: object) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(shown, value))
    return str(value)


def check(
    config: Config,
    base: Config | None = None,
    elsewhere: Mapping[str, tuple[Need, ...]] = {},
) -> None:
    """Check the values of `config`, and the effect of the options that were set.

    An option counts as set if it differs from `base`, where a config starts, and from
    the default of its field.

    Args:
      base: by default a config of defaults.
      elsewhere: more needs, by key, of the command that asks.

    Raises:
      ValueError: on a value that no run could have, or on the first option without
        effect; says what would make it matter.
    """
    config.check_values()
    base = base or Config(systems=config.systems)
    for path, value in changed(config, base):
        keys = [".".join(path[: i + 1]) for i in range(len(path))]
        rows = [table.get(key, ()) for table in (elsewhere, CONFIG) for key in keys]
        for need in [*itertools.chain(*rows), *_policy_needs(config, path)]:
            if not need.met(config):
                name, got = keys[-1], need.got(config)
                raise no_effect(name, value, expected=need.expected, got=got)


def changed(
    node: Any, base: Any, default: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each leaf that differs from `base` and its default."""
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            parts = (getattr(node, field.name), getattr(base, field.name, None))
            usual = getattr(default, field.name, field.default)
            yield from changed(*parts, usual, (*path, field.name))
    elif isinstance(node, Mapping):
        for key, part in node.items():
            before = base.get(key) if isinstance(base, Mapping) else None
            yield from changed(part, before, None, (*path, str(key)))
    elif node not in (base, default):
        yield path, node


# -- what options need -----------------------------------------------------------------


def _is(key: str, *values: object) -> Need:
    """Return the need that an option has one of these values."""
    read = operator.attrgetter(key)
    return Need(
        f"{key}={' or '.join(map(shown, values))}",
        lambda config: read(config) in values,
        lambda config: f"{key}={shown(read(config))}",
    )


def _without(key: str) -> Need:
    """Return the need that an option has no value."""
    read = operator.attrgetter(key)
    return Need(
        f"no {key}",
        lambda config: not read(config),
        lambda config: f"{key}={shown(read(config))}",
    )


def _either(*needs: Need) -> Need:
    """Return the need that at least one of several is met."""
    return Need(
        " or ".join(need.expected for need in needs),
        lambda config: any(need.met(config) for need in needs),
        lambda config: " and ".join(need.got(config) for need in needs),
    )


def read_by(
    command: str, *, not_by: str, keys: Collection[str]
) -> dict[str, tuple[Need, ...]]:
    """Return needs of options that `command` reads and `not_by` does not."""
    return dict.fromkeys(keys, (Need(command, lambda _: False, lambda _: not_by),))


def _has_prefill(config: Config) -> bool:
    deployments = [Deployment.parse(s.deployment) for s in config.systems.values()]
    return any(deployment.of(Role.PREFILL) for deployment in deployments)


def _several(config: Config, *roles: Role) -> bool:
    deployments = [Deployment.parse(s.deployment) for s in config.systems.values()]
    return any(len(deployment.of(*roles)) > 1 for deployment in deployments)


def _has_step_size(config: Config) -> bool:
    systems = config.systems.values()
    return any(has_rule(policy) for s in systems for policy in s.policies.values())


def _is_untimed(config: Config) -> bool:
    try:
        return not has_times(config.workload.trace)
    except (OSError, ValueError):
        return True  # what is wrong with the file is said where it is read


_VIRTUAL = _is("clock", "virtual")
_TRACE = _is("workload.source", "trace")
_MODELLED = _is("durations", "modelled")
_MEASURED = _is("durations", "table", "live")
_SEARCH = _without("rates")
_APART = Need(
    "a system of prefill and decode instances",
    _has_prefill,
    lambda config: ", ".join(s.deployment for s in config.systems.values()),
)
_SEVERAL_ENTRIES = Need(
    "a system with several instances that a request can go to",
    lambda config: _several(config, Role.PREFILL, Role.COLOCATED),
    lambda config: ", ".join(s.deployment for s in config.systems.values()),
)
_SEVERAL_DECODES = Need(
    "a system with several decode instances",
    lambda config: _several(config, Role.DECODE),
    lambda config: ", ".join(s.deployment for s in config.systems.values()),
)
_STEP_SIZE = Need(
    "a system whose paper chooses a step size",
    _has_step_size,
    lambda config: ", ".join(config.systems),
)
_DEPLOYED_STAGES = Need(
    "the stages that each deployment says", lambda _: False, lambda _: "others"
)
_UNTIMED = Need(
    "a trace without times",
    _is_untimed,
    lambda config: f"trace {config.workload.trace}",
)
_SCALED = Need(
    "an slo in multiples of a step",
    lambda config: not config.slo.explicit,
    lambda config: f"slo {config.slo}",
)
_LISTED = Need(
    "two or more systems that are listed, or module:attribute",
    lambda config: len(config.listed_systems) > 1,
    lambda config: ", ".join(config.systems),
)
_DURATIONS_ALONE = Need(
    "durations that are known before, and no token that ends a request",
    lambda config: config.executed == "passing",
    lambda _: "runs that execute all programs",
)
_LINK = Need("a link", lambda config: config.link != "", lambda _: "no link")
ALWAYS: tuple[Need, ...] = ()

# By key. A row of a part holds for all that is in it.
CONFIG: Mapping[str, tuple[Need, ...]] = {
    # The parameters of systems: see `_policy_needs`. Systems are ranked by every
    # criterion, whatever rates are tried.
    **dict.fromkeys(
        (
            *("model", "weights", "systems", "memory", "num_seeds", "seed", "clock"),
            *("first_seeds", "attention"),
            *("workload.source", "workload.num_requests", "workload.ignore_eos"),
            *("slo.ttft_s", "slo.tpot_s", "criterion", "rates"),
            *("search.target", "search.tolerance"),
        ),
        ALWAYS,
    ),
    **dict.fromkeys(
        (
            *("workload.trace", "workload.trace_scale", "workload.trace_unit"),
            *("workload.trace_rows", "workload.ties", "workload.too_long"),
        ),
        (_TRACE,),
    ),
    # A trace has lengths of its own, and mostly arrivals; HumanEval has prompts.
    "workload.arrivals": (
        _either(_is("workload.source", "random", "human_eval"), _UNTIMED),
    ),
    "workload.prompt_tokens": (_is("workload.source", "random"),),
    "workload.output_tokens": (_is("workload.source", "random", "human_eval"),),
    "slo.ttft_scale": (_without("slo.ttft_s"), _without("slo.preset")),
    "slo.tpot_scale": (_without("slo.tpot_s"), _without("slo.preset")),
    "slo.preset": (_either(_without("slo.ttft_s"), _without("slo.tpot_s")),),
    "relaxed": (_SCALED,),
    "hardware_table": (_SCALED, _is("criterion", "distserve"), _LISTED),
    "search.growth": (_SEARCH,),
    "search.max_rates": (_SEARCH,),
    "step_tokens": (_STEP_SIZE,),
    "tune": (_without("step_tokens"), _STEP_SIZE),
    "durations": (_VIRTUAL,),
    # The SLO and the step sizes follow from medians, also where durations are live.
    "timing_repeats": (_MEASURED,),
    # See `Config.executed`.
    "execute_all": (
        _VIRTUAL,
        _is("durations", "table", "modelled"),
        _is("workload.ignore_eos", True),
    ),
    "prefill_router": (_SEVERAL_ENTRIES,),
    "decode_router": (_SEVERAL_DECODES,),
    "executed_requests": (_DURATIONS_ALONE,),
    "cost": (_MODELLED,),
    "cost.transfer_base_s": (_APART, _without("link")),
    "cost.transfer_token_s": (_APART, _without("link")),
    "cost.transfer_parts": (_APART, _without("link"), _is("streams", True)),
    "cost.pp": (_DEPLOYED_STAGES,),
    # A formula does not see the programs, but each part of a transfer takes the link.
    "layer_groups": (_either(_MEASURED, _LINK),),
    "link": (_APART,),  # and the virtual clock, whoever names it: see `Config.check`
    # With one layer group too: a prompt's decode instance is chosen when it begins.
    "streams": (_APART,),
}


_HUGE = 10**12  # more tokens than any step has


def _policy_needs(config: Config, path: tuple[str, ...]) -> Iterator[Need]:
    """Yield the needs of a policy's parameter; none for another path."""
    if path[0] != "systems" or path[2] != "policies":
        return
    _, name, _, role, parameter = path[:5]
    system = config.systems[name]
    yield Need(
        f"{role} instances",
        lambda _: bool(Deployment.parse(system.deployment).of(Role(role))),
        lambda _: system.deployment,
    )
    policy = system.policies[Role(role)]
    if has_rule(policy) and getattr(resized(policy, _HUGE), parameter) == _HUGE:
        yield _without("step_tokens")
