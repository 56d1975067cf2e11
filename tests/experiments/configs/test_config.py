"""Configs and their overrides from the command line."""

import dataclasses
import itertools
import json
import math
import sys
import types

import pytest

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import SLO
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from experiments.configs.config import (
    Config,
    System,
    Targets,
)
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import check
from experiments.configs.override import override
from experiments.runs.folder import plain


@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_config_is_valid_json(name):
    content = plain(override(get_config(name), []))
    assert json.loads(json.dumps(content)) == content
    assert content["type"] == "Config"


def test_both_systems_of_the_main_job_have_equally_many_devices_and_limits():
    policies = [system.policies for system in get_config("tiny").systems.values()]
    limits = [policy.limits for by_role in policies for policy in by_role.values()]
    assert {limit.decode_rows for limit in limits} == {16, 0}  # 0: never decodes


@pytest.mark.parametrize("system", ["vllm_v0", "vllm"])
def test_an_override_reaches_through_mappings_into_a_policy(system):
    config = override(
        get_config("tiny"),
        [
            f"systems.{system}.policies.colocated.max_seqs=3",
            "workload.arrivals.kind=gamma",
            "workload.arrivals.burstiness=0.5",
            "rates=1,2.5",
            "workload.ignore_eos=false",
        ],
    )
    policy = config.systems["vllm_v0"].policies[Role.COLOCATED]
    assert isinstance(policy, PrefillFirst)
    assert policy.max_seqs == 3
    assert config.workload.arrivals.burstiness == 0.5
    assert config.rates == (1.0, 2.5)
    assert config.workload.ignore_eos is False
    # All else is as it was.
    assert (
        config.systems["disaggregated"] == get_config("tiny").systems["disaggregated"]
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("num_seeds", "expected key=value, got 'num_seeds'"),
        ("num_seeds=x", "--set num_seeds: expected int, got 'x'"),
        ("workload.ignore_eos=1", "expected bool, got '1'"),
        ("speed=1", "no 'speed' here; expected one of model, weights"),
        ("workload=1", "'workload' has parts"),
        ("model.size=1", "'model' has no parts"),
        ("rates=1,-2", "rates: expected > 0 requests/s, and finite, got"),
        ("num_seeds=0", "num_seeds: expected >= 1, got 0"),
        ("clock=sundial", "clock: expected one of virtual, wall, got 'sundial'"),
        ("workload.num_requests=0", "workload.num_requests: expected >= 1, got 0"),
        ("workload.arrivals.kind=odd", "expected one of poisson, gamma, fixed"),
        ("systems.vllm_v0.policies.colocated.max_seqs=0", "max_seqs: expected >= 1"),
        ("systems.vllm_v0.deployment=prefill:tp1,decode:tp1", "has prefill instances"),
        ("workload.source=trace", "workload.trace: expected the path of a trace"),
        ("slo.ttft_s=-1", "slo.ttft_s: expected >= 0, got -1.0"),
        ("criterion=best", "expected one of distserve, sarathi_serve, vidur_search"),
        ("slo.preset=gpt-2", "slo.preset: expected one of llama2-70b, "),
        ("search.target=1.5", "target: expected in (0, 1], got 1.5"),
    ],
)
def test_a_bad_override_says_what_was_expected_and_what_came(assignment, message):
    with pytest.raises(ValueError) as error:
        override(get_config("tiny"), [assignment])
    assert message in str(error.value)


def test_an_unknown_config_names_the_known_ones():
    with pytest.raises(ValueError, match="expected one of.*smoke.*got 'nope'"):
        get_config("nope")


def test_a_preset_is_the_slo_where_no_seconds_are_given():
    targets = override(get_config("tiny"), ["slo.preset=llama3.1-8b"]).slo
    assert targets.resolve(9.0, 9.0) == SLO(ttft_s=2.0, tpot_s=0.1)
    targets = dataclasses.replace(targets, tpot_s=0.05)
    assert targets.resolve(9.0, 9.0) == SLO(ttft_s=2.0, tpot_s=0.05)


def test_scales_multiply_the_steps_of_this_machine():
    targets = get_config("tiny").slo
    assert targets.resolve(0.5, 0.25) == SLO(ttft_s=2.5, tpot_s=0.375)


@pytest.mark.parametrize(
    ("changes", "executed"),
    [
        ([], "passing"),
        (["durations=modelled"], "passing"),
        # A program's tokens decide when a request ends, or its time when a step does.
        (["workload.ignore_eos=false"], "all"),
        (["durations=modelled", "workload.ignore_eos=false"], "all"),
        (["durations=live"], "all"),
        (["clock=wall"], "all"),
        (["execute_all=true"], "all"),
    ],
)
def test_programs_run_everywhere_where_durations_alone_do_not_say_the_end(
    changes, executed
):
    assert override(get_config("tiny"), changes).executed == executed


@pytest.mark.parametrize(
    "assignment",
    ["num_seeds=1", "workload.num_requests=1", "rates=0.001", "slo.ttft_scale=0"],
)
def test_the_least_there_may_be_is_taken(assignment):
    override(get_config("tiny"), [assignment])


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "ttft_scale", "tpot_scale"])
@pytest.mark.parametrize("value", [-1e-9, float("nan")])
def test_targets_below_zero_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"slo.{name}: expected >= 0, got"):
        Targets(**{name: value})


@pytest.mark.parametrize(
    "assignment", ["rates=0", "num_seeds=-1", "workload.num_requests=-3"]
)
def test_less_than_the_least_is_refused(assignment):
    with pytest.raises(ValueError, match="expected >"):
        override(get_config("tiny"), [assignment])


def test_seconds_go_before_a_preset_and_a_preset_before_scales():
    targets = Targets(ttft_s=1.0, ttft_scale=7.0, tpot_scale=3.0)
    assert targets.resolve(0.5, 0.25) == SLO(ttft_s=1.0, tpot_s=0.75)
    both = Targets(tpot_s=2.0, preset="mixtral-8x7b", ttft_scale=7.0)
    assert both.resolve(0.5, 0.25) == SLO(ttft_s=2.0, tpot_s=2.0)


def test_a_system_has_its_policies_defaults_but_for_what_is_changed():
    deployment = "prefill:tp1,decode:tp1"
    system = System.of("disaggregated", deployment, prefill={"token_budget": 33})
    assert system.deployment == deployment
    assert system.policies == {
        Role.PREFILL: PrefillOnly(token_budget=33),
        Role.DECODE: DecodeOnly(),
    }


def test_a_step_size_is_one_of_the_policy_and_caps_what_decodes_in_it():
    system = System.of("sarathi_serve", "2xcolocated:tp1", colocated={"max_seqs": 16})
    assert system.resized(8).policies[Role.COLOCATED] == SarathiServe(
        token_budget=8, max_seqs=8, watermark=0.01
    )
    assert system.resized(64).policies[Role.COLOCATED].limits.decode_rows == 16
    # vLLM's paper has no rule, so its step stays.
    vllm = System.of("vllm_v0", "2xcolocated:tp1")
    assert vllm.resized(8) == vllm


def test_a_placement_has_the_parameters_of_its_system_or_the_defaults():
    config = get_config("tiny")
    only = dataclasses.replace(config, systems={"vllm_v0": config.systems["vllm_v0"]})
    answer = {"system": "disaggregated", "deployment": "prefill:tp1,2xdecode:tp1"}
    found = {"flags": {"model": "tiny"}, "low": answer, "wall_s": 3.0}
    placed = only.with_placements(found).systems
    assert list(placed) == ["vllm_v0", "placed_low"]
    assert placed["placed_low"] == System.of("disaggregated", answer["deployment"])
    named = config.with_placements(found).systems["placed_low"]
    assert named.policies == config.systems["disaggregated"].policies
    assert named.deployment == answer["deployment"]


def test_a_placement_replaces_the_system_that_has_its_name():
    config = get_config("tiny")
    old = dataclasses.replace(
        config, systems={"placed_low": System.of("vllm", "colocated:tp1")}
    )
    answer = {"system": "disaggregated", "deployment": "prefill:tp1,decode:tp1"}
    found = {"flags": {"model": "tiny"}, "low": answer, "skipped": {"tp8": "no room"}}
    placed = old.with_placements(found).systems
    assert {name: system.deployment for name, system in placed.items()} == {
        "placed_low": answer["deployment"]
    }


OWN = {Role.COLOCATED: SarathiServe(max_seqs=8)}


def test_systems_are_chosen_by_name_and_own_ones_get_a_deployment(monkeypatch):
    monkeypatch.setitem(sys.modules, "a.mine", types.SimpleNamespace(own=OWN))
    monkeypatch.setitem(sys.modules, "a", types.SimpleNamespace(mine=None))
    monkeypatch.setattr(sys.modules["a"], "mine", sys.modules["a.mine"])
    config = get_config("tiny")
    chosen = config.with_systems(["a.mine:own", "vllm", "disaggregated_chunked"])
    assert list(chosen.systems) == ["a.mine:own", "vllm_v0", "disaggregated_chunked"]
    assert chosen.systems["vllm_v0"] == config.systems["vllm_v0"]
    own = chosen.systems["a.mine:own"]
    assert own == System(deployment="2xcolocated:tp1", policies=OWN)
    apart = chosen.systems["disaggregated_chunked"]
    assert apart.deployment == "prefill:tp1,decode:tp1"
    # Its name has a dot, as keys have.
    key = "systems.a.mine:own.policies.colocated.max_seqs"
    changed = override(chosen, [f"{key}=4"]).systems["a.mine:own"]
    assert changed.policies == {Role.COLOCATED: SarathiServe(max_seqs=4)}


@pytest.mark.parametrize("config", CONFIGS)
def test_any_two_listed_systems_can_take_part(config):
    """On equal devices, within the sizes that the config's systems have."""
    base = get_config(config)
    parsed = [Deployment.parse(s.deployment) for s in base.systems.values()]
    limits = [p.limits for s in base.systems.values() for p in s.policies.values()]
    tokens = max(limit.prefill_tokens for limit in limits)
    rows = max(limit.decode_rows for limit in limits)
    for pair in itertools.combinations(SYSTEMS, 2):
        chosen = base.with_systems(pair)
        check(chosen, chosen)
        assert tuple(chosen.systems) == pair
        for name, system in chosen.systems.items():
            deployment = Deployment.parse(system.deployment)
            assert deployment.devices == parsed[0].devices
            assert {spec.role for spec in deployment.instances} == set(SYSTEMS[name])
            for policy in system.policies.values():
                assert policy.limits.prefill_tokens <= tokens
                assert policy.limits.decode_rows <= rows


def test_a_new_system_has_the_instances_of_one_alike_or_of_the_first():
    apart = get_config("tiny_streams")
    wide = override(
        apart, ["systems.disaggregated.deployment=prefill:tp2,2xdecode:tp1"]
    )
    chosen = wide.with_systems(["orca", "disaggregated_chunked", "vllm"])
    assert {name: s.deployment for name, s in chosen.systems.items()} == {
        "orca": "colocated:tp2,2xcolocated:tp1",
        "disaggregated_chunked": "prefill:tp1,decode:tp1",
        "vllm_v0": "colocated:tp2,2xcolocated:tp1",
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_setting_is_of_the_system_that_was_just_named(name):
    chosen = get_config("smoke").with_systems([name])
    fitting, other = "3xcolocated:tp1", "prefill:tp1,2xdecode:tp1"
    if Role.COLOCATED not in SYSTEMS[name]:
        fitting, other = other, fitting
    role = next(iter(SYSTEMS[name]))
    changed = override(
        chosen,
        [
            f"systems.{name}.deployment={fitting}",
            f"systems.{name}.policies.{role}.max_seqs=5",
        ],
    ).systems[name]
    assert changed.deployment == fitting and changed.policies[role].max_seqs == 5
    expected = f"systems.{name}: deployment '{other}' has .* instances, but the system "
    with pytest.raises(ValueError, match=f"{expected}has policies for {role}"):
        override(chosen, [f"systems.{name}.deployment={other}"])


def test_an_unknown_system_or_one_without_instances_is_refused(monkeypatch):
    config = get_config("tiny")
    with pytest.raises(ValueError, match="system: expected one of .* got 'vllmm'"):
        config.with_systems(["vllmm"])
    lone = override(
        config.with_systems(["vllm_v0"]), ["systems.vllm_v0.deployment=colocated:tp4"]
    )
    expected = "systems: disaggregated: expected instances for both prefill and decode"
    with pytest.raises(ValueError, match=f"{expected}, got 'colocated:tp4'"):
        lone.with_systems(["disaggregated"])
    half = types.SimpleNamespace(half={Role.PREFILL: PrefillOnly()})
    monkeypatch.setitem(sys.modules, "mine", half)
    expected = "systems: mine:half: expected policies for colocated, or for prefill and"
    with pytest.raises(ValueError, match=f"{expected} decode, got ..prefill"):
        config.with_systems(["mine:half"])
    with pytest.raises(ValueError, match="no 'orca' here; expected one of vllm_v0"):
        override(lone, ["systems.orca.deployment=colocated:tp1"])


def test_a_router_is_one_that_is_found():
    config = get_config("tiny")
    found = override(config, ["prefill_router=least_loaded"])
    assert found.prefill_router == "least_loaded"
    with pytest.raises(ValueError, match="router: expected one of .* got 'random'"):
        override(config, ["prefill_router=random"])
    with pytest.raises(ValueError, match="decode_router: .* several decode instances"):
        override(config, ["decode_router=shortest_queue"])


def test_a_value_is_all_behind_the_first_sign():
    config = override(get_config("tiny"), ["weights=/models/a=b"])
    assert config.weights == "/models/a=b"


@pytest.mark.parametrize("text", ["true", "True", "false", "FALSE"])
def test_true_and_false_are_read_in_any_case(text):
    config = override(get_config("tiny"), [f"workload.ignore_eos={text}"])
    assert config.workload.ignore_eos is (text.lower() == "true")


def test_a_list_has_what_is_between_its_commas_and_may_be_empty():
    changed = override(get_config("smoke"), ["rates=3,,4,"])
    assert changed.rates == (3.0, 4.0)
    assert override(changed, ["rates="]).rates == ()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("slo.ttft_scale=inf", "slo.ttft_scale: expected a finite number, got 'inf'"),
        ("rates=1,nan", "--set rates: expected a finite number, got 'nan'"),
        ("workload.ties=mixed", "--set workload.ties: expected one of "),
        ("workload.too_long=cut", "expected one of drop, clip, got 'cut'"),
        ("search.max_rates=2.5", "--set search.max_rates: expected int, got '2.5'"),
        ("durations=measured", "durations: expected one of table, live, modelled"),
        ("workload.source=file", "expected one of random, human_eval, trace, got"),
    ],
)
def test_a_value_of_another_kind_is_refused(assignment, message):
    with pytest.raises(ValueError) as error:
        override(get_config("tiny"), [assignment])
    assert message in str(error.value)


@pytest.mark.parametrize("rate", [math.inf, math.nan, 0.0, -1.0])
def test_a_rate_made_in_python_is_checked_too(rate):
    made = dataclasses.replace(get_config("tiny"), rates=(1.0, rate))
    with pytest.raises(ValueError, match="rates: expected > 0 requests/s, and finite"):
        check(made)


def test_a_config_has_a_system():
    with pytest.raises(ValueError, match="systems: expected at least one, got none"):
        check(dataclasses.replace(get_config("tiny"), systems={}))


def test_the_defaults_are_those_that_the_documents_name():
    """Another default moves every number that was published without a flag."""
    config = Config(systems=get_config("tiny").systems)
    assert (config.slo.ttft_scale, config.slo.tpot_scale) == (5.0, 1.5)
    assert (config.slo.ttft_s, config.slo.tpot_s, config.slo.preset) == (0, 0, "")
    memory = config.memory
    assert (memory.tokens_per_device, memory.block_tokens) == (4096, 0)
    assert memory.max_context == 512
    workload = config.workload
    assert (workload.num_requests, workload.source) == (100, "random")
    assert (workload.prompt_tokens, workload.output_tokens) == (
        *("uniform:32:256", "uniform:16:48"),
    )
    assert (workload.ties, workload.too_long) == ("spread", "drop")
    assert (workload.ignore_eos, workload.trace_scale) == (True, 1.0)
    assert (config.num_seeds, config.seed, config.timing_repeats) == (5, 0, 16)
    assert (config.criterion, config.clock, config.durations) == (
        *("distserve", "virtual", "table"),
    )
    assert (config.tune, config.execute_all, config.streams) == (True, False, False)
    assert (config.layer_groups, config.link, config.rates) == (1, "", ())


def test_the_record_of_a_config_has_every_value_and_type():
    config = override(get_config("tiny"), ["rates=1,2.5", "seed=7"])
    content = plain(config)
    assert content["rates"] == [1.0, 2.5] and content["seed"] == 7
    assert content["cost"] == {
        "type": "LinearCost",
        **{"step_base_s": 1e-3, "prefill_token_s": 0.0, "decode_token_s": 0.0},
        **{"context_token_s": 0.0, "transfer_base_s": 0.0, "transfer_token_s": 0.0},
        **{"transfer_parts": 1, "pp": []},
    }
    decode = content["systems"]["disaggregated"]["policies"]["decode"]
    assert decode == {"type": "DecodeOnly", "max_seqs": 16, "watermark": 0.01}
    # All of them, so that two configs with equal records are equal.
    assert content.keys() == {"type", *(f.name for f in dataclasses.fields(Config))}


@pytest.mark.parametrize(
    ("first", "most", "looks"),
    [
        (0, 5, (5,)),
        (4, 16, (4, 8, 16)),
        (3, 10, (3, 6, 10)),
        (4, 2, (2,)),
        (4, 4, (4,)),
    ],
)
def test_looks_double_the_seeds_up_to_all(first, most, looks):
    changes = [f"first_seeds={first}", f"num_seeds={most}"]
    assert override(get_config("tiny"), changes).looks == looks


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ([], ("tight", "relaxed")),
        (["slo.tpot_scale=2"], ("tight", "relaxed")),
        (["relaxed=0"], ("",)),
        (["slo.tpot_s=0.01"], ("",)),
        (["slo.ttft_s=0.01"], ("",)),
        (["slo.preset=llama3.1-8b"], ("",)),
    ],
)
def test_an_slo_in_seconds_is_the_only_target(changes, targets):
    assert override(get_config("tiny"), changes).targets == targets


def test_a_relaxed_target_beside_an_slo_in_seconds_has_no_effect():
    with pytest.raises(ValueError, match="relaxed: expected an slo in multiples of a"):
        override(get_config("tiny"), ["relaxed=2", "slo.tpot_s=0.01"])


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("smoke", ["slo.tpot_s=0.01"], "an slo in multiples of a step"),
        ("smoke", ["criterion=mooncake"], "criterion=distserve"),
        ("tiny_streams", [], ""),  # two systems that are listed
    ],
)
def test_a_hardware_table_needs_a_question_that_scales(name, changes, expected):
    asked = ["hardware_table=true", *changes]
    if not expected:
        assert override(get_config(name), asked).has_hardware_table
        return
    with pytest.raises(ValueError, match=f"hardware_table: expected {expected}"):
        override(get_config(name), asked)


def test_systems_with_sizes_or_places_of_this_machine_are_not_listed():
    config = get_config("smoke")
    (vllm, apart) = config.systems.values()
    names = ("vllm", "vllm_v0@64", "placed_low", "my_module:mine", "my_module:mine@64")
    systems = {name: vllm for name in names} | {"disaggregated": apart}
    config = dataclasses.replace(config, systems=systems)
    assert config.listed_systems == ("vllm", "my_module:mine", "disaggregated")
    alone = dataclasses.replace(config, systems={"vllm_v0": vllm})
    with pytest.raises(ValueError, match="expected two or more systems"):
        override(alone, ["hardware_table=true"])
    # One that a named config has may stay without effect.
    asked = dataclasses.replace(get_config("tiny"), criterion="mooncake")
    assert not asked.has_hardware_table


@pytest.mark.parametrize(
    "assignment", ["first_seeds=-1", "relaxed=-1", "executed_requests=0"]
)
def test_less_than_nothing_is_refused(assignment):
    name = assignment.partition("=")[0]
    with pytest.raises(ValueError, match=f"{name}: expected >= "):
        override(get_config("tiny"), [assignment])


def test_a_link_may_be_a_file(tmp_path):
    path = tmp_path / "mine.json"
    asked = [f"link={path}"]
    with pytest.raises(FileNotFoundError, match="mine.json"):
        override(get_config("smoke"), asked)
    path.write_text('{"latency_s": 0, "gbit": 10}')
    with pytest.raises(ValueError, match="link: .*mine.json: expected the numbers"):
        override(get_config("smoke"), asked)
    path.write_text('{"latency_s": 0, "bandwidth_bytes_s": 1e9, "efficiency": 1}')
    assert override(get_config("smoke"), asked).link == str(path)
