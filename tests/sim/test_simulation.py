"""A simulation by names: its model, devices, system, cost model and routers."""

import json
import sys

import pytest

from disagg_jax.deployment import InstanceSpec, Parallelism, Role
from disagg_jax.metrics import ttft_s
from disagg_jax.request import Request
from disagg_jax.scheduling import SYSTEMS, get_router, get_system
from disagg_jax.scheduling.routing import least_loaded, shortest_queue
from disagg_jax.sim import DeviceCost, Simulation
from disagg_jax.sim.device_cost import get_cost, roofline
from disagg_jax.sim.engines import engine_names, get_engine
from disagg_jax.sim.hardware import HARDWARE, get_hardware
from disagg_jax.work import StepLoad
from models.config import PRESETS
from models.lookup import find_model

ONE = InstanceSpec(role=Role.COLOCATED)


class Unit:
    """A second for each step."""

    def stages_s(self, load):
        return (1.0,)

    def decode_s(self, decodes, context):
        return 1.0


def unit(model, hardware):
    name = f"{model.name} on {hardware.name}"
    return DeviceCost(name=name, instance=lambda _: Unit(), kv_tokens=lambda _: 4096)


def last(request, instances):
    return instances[len(instances) - 1]


@pytest.fixture
def here(monkeypatch):
    """This module, as a user's own: `mine:NAME`."""
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])


def requests(*prompts):
    return [
        Request(id=i, arrival_s=0.0, prompt_tokens=tokens, max_tokens=2)
        for i, tokens in enumerate(prompts)
    ]


def test_every_system_is_simulated_by_its_name():
    for name, policies in SYSTEMS.items():
        simulation = Simulation.of("opt-13b", "a100-80g", system=name)
        assert simulation.policies == policies
        apart = Role.COLOCATED not in policies
        deployment = "prefill:tp1,decode:tp1" if apart else "colocated:tp1"
        run = simulation.build(deployment).run(requests(100, 200))
        assert [len(timeline.token_s) for timeline in run.timelines] == [2, 2]


@pytest.mark.parametrize("name", HARDWARE)
def test_kv_moves_over_the_devices_own_link(name):
    simulation = Simulation.of("opt-125m", name)
    assert simulation.inside == get_hardware(name).hop.name
    assert simulation.cost.name == f"roofline/{name}"
    simulation.build("prefill:tp1,decode:tp1")
    assert Simulation.of("opt-125m", name, inside=None).inside is None


def test_a_model_is_a_hugging_face_config(tmp_path):
    config = {
        "model_type": "llama",
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found, preset = (
        Simulation.of(model, "h100") for model in (str(path), "llama-3-8b")
    )
    assert found.kv_tokens(ONE) == preset.kv_tokens(ONE)
    load = StepLoad(((0, 512),), 8, 8000)
    steps_s = [
        s.cost_of(ONE).instance(Parallelism(1, 1)).stages_s(load)
        for s in (found, preset)
    ]
    assert steps_s[0] == steps_s[1]


def test_a_cost_model_of_ones_own_makes_the_times(here):
    simulation = Simulation.of("opt-13b", "h100", cost="mine:unit", system="vllm_v0")
    assert simulation.cost.name == "opt-13b on h100"
    assert simulation.memory_of(ONE).num_blocks == 4096 // 16
    (done,) = simulation.build("colocated:tp1").run(requests(100)).timelines
    assert (ttft_s(done), done.token_s) == (1.0, [1.0, 2.0])


def test_costs_that_are_passed_in_have_names_too():
    simulation = Simulation.of("opt-13b", "h100", cost="unit", costs={"unit": unit})
    assert simulation.cost.name == "opt-13b on h100"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost": "linear"}, r"cost model: expected one of \['roofline'\] or package"),
        ({"cost": "mine:ONE"}, "cost model: expected a function .* at 'mine:ONE', got"),
        (
            {"cost": "mine:last"},
            "cost model: expected a DeviceCost of 'mine:last', got",
        ),
        (
            {"system": "sarathy"},
            "system: expected one of .*'sarathi_serve'.*, got 'sar",
        ),
        ({"system": "mine:last"}, "system: expected a mapping of roles to policies at"),
        ({"prefill_router": "first"}, r"router: .*'least_loaded'.*, got 'first'"),
        ({"decode_router": "mine:ONE"}, "router: expected a function of a request and"),
        ({"inside": "wire"}, "link: expected one of"),
    ],
)
def test_an_unknown_name_is_one_clear_error(here, monkeypatch, fields, message):
    monkeypatch.setattr(sys.modules[__name__], "last", lambda *_: 3, raising=True)
    with pytest.raises(ValueError, match=message):
        Simulation.of("opt-13b", "h100", **fields)


def test_routers_are_found_by_name(here):
    assert get_router("shortest_queue") is shortest_queue
    assert get_router("least_loaded") is least_loaded
    assert get_router("mine:last") is last
    assert get_router("mine", {"mine": least_loaded}) is least_loaded


@pytest.mark.parametrize(
    ("side", "deployment", "busy"),
    [
        ("prefill_router", "3xcolocated:tp1", [0, 0, 1]),
        ("prefill_router", "2xprefill:tp1,decode:tp1", [0, 1, 1]),
        ("decode_router", "prefill:tp1,2xdecode:tp1", [1, 0, 1]),
    ],
)
def test_a_router_of_ones_own_picks_the_instances(here, side, deployment, busy):
    simulated = Simulation.of("opt-13b", "h100", **{side: "mine:last"}).build(
        deployment
    )
    run = simulated.run(requests(64, 64, 64))
    shares = run.busy_shares(simulated.deployment)
    assert [share > 0 for (share,) in shares] == [bool(b) for b in busy]


def test_systems_of_ones_own_are_passed_in_or_named(here, monkeypatch):
    own = {Role.COLOCATED: SYSTEMS["orca"][Role.COLOCATED]}
    monkeypatch.setattr(sys.modules[__name__], "system", own, raising=False)
    assert get_system("mine:system") is own
    assert get_system("own", {"own": own}) is own
    changed = get_system("mine:system", colocated={"max_seqs": 3})
    assert changed[Role.COLOCATED].max_seqs == 3


def test_a_cost_model_gets_the_model_and_the_hardware():
    cost = get_cost("unit", find_model("tiny"), HARDWARE["cpu"], {"unit": unit})
    assert cost.name == "tiny on cpu"
    assert PRESETS["tiny"] == find_model("tiny")


# -- engines ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", engine_names())
def test_an_engine_serves_by_its_policies_and_its_limits(name):
    engine = get_engine(name)
    simulation = Simulation.of("llama-3-8b", "h100", engine=name)
    assert simulation.engine == engine
    assert simulation.cost.name == f"roofline/h100/{name}"
    colocated = simulation.policies[Role.COLOCATED]
    assert type(colocated) is type(SYSTEMS[engine.system][Role.COLOCATED])
    rows = min(engine.max_seqs, engine.token_budget)
    assert colocated.limits.decode_rows == rows
    assert simulation.policies[Role.PREFILL].token_budget == engine.token_budget
    assert simulation.policies[Role.DECODE].max_seqs == engine.max_seqs


def test_a_named_system_has_the_limits_of_the_engine():
    engine = get_engine("vllm")
    simulation = Simulation.of("opt-13b", "h100", engine="vllm", system="sarathi_serve")
    (policy,) = simulation.policies.values()
    limits = engine.token_budget, engine.max_seqs
    assert (policy.token_budget, policy.max_seqs) == limits
    # Policies that are given as such are left as they are.
    given = SYSTEMS["sarathi_serve"]
    simulation = Simulation.of("opt-13b", "h100", engine="vllm", policies=given)
    assert simulation.policies == given


def test_an_engines_limits_are_those_of_each_attention_replica():
    deployment = "prefill:tp1dp2,decode:tp1dp4ep4"
    plain = Simulation.of("mixtral-8x7b", "h200")
    assert plain.build(deployment).policies == plain.policies
    simulation = Simulation.of("mixtral-8x7b", "h200", engine="vllm")
    built = simulation.build(deployment).policies
    of_one = simulation.policies
    budget = of_one[Role.PREFILL].token_budget
    assert built[Role.PREFILL].token_budget == 2 * budget
    assert built[Role.DECODE].max_seqs == 4 * of_one[Role.DECODE].max_seqs
    assert built[Role.COLOCATED] == of_one[Role.COLOCATED]  # it has no instance


def test_instances_of_a_role_with_an_engine_have_equally_many_replicas():
    unlike = "colocated:tp1dp4,colocated:tp4"
    Simulation.of("mixtral-8x7b", "h200").build(unlike)
    simulation = Simulation.of("mixtral-8x7b", "h200", engine="vllm")
    with pytest.raises(ValueError, match="dp: with an engine expected colocated inst"):
        simulation.build(unlike)


def test_each_cost_model_says_once_how_far_it_was_checked():
    model, engine = find_model("opt-13b"), get_engine("vllm")
    unlike = [roofline(model, HARDWARE[name], engine) for name in ("h100", "a100-80g")]
    simulation = Simulation(model=model, cost=unlike[0], prefill_cost=unlike[1])
    lines = simulation.checked.splitlines()
    assert len(lines) == 2 and all("engine vllm: not checked for" in x for x in lines)
    plain = [roofline(model, HARDWARE[name]) for name in ("h100", "a100-80g")]
    simulation = Simulation(model=model, cost=plain[0], colocated_cost=plain[1])
    assert simulation.checked == "engine none: not checked"
    of_ones_own = get_cost("unit", model, HARDWARE["cpu"], {"unit": unit})
    assert Simulation(model=model, cost=of_ones_own).checked == ""


def test_a_cost_model_without_overheads_takes_no_engine(here):
    with pytest.raises(ValueError, match="engine: expected the cost model roofline"):
        Simulation.of("opt-13b", "h100", cost="mine:unit", engine="vllm")
