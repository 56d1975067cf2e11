"""The flags of a simulation: what they name, and what they replace."""

import json

import pytest

from disagg_jax.sim.engines import get_engine
from experiments.cli.flags import Flags
from experiments.cli.simulation_flags import SimulationFlags
from experiments.configs.named_simulations import SIMULATIONS, get_simulation

ONE_GB = {"latency_s": 0.0, "bandwidth_bytes_s": 1e9, "efficiency": 1.0}


def read(*words):
    flags = Flags()
    given = SimulationFlags(flags)
    flags.values(["command", *words])
    return given.read()


@pytest.mark.parametrize("words", [("--hardware=h100",), ("--config=llama3_8b_h100",)])
def test_a_link_takes_all_kv_inside_nodes_and_between_them(words, tmp_path):
    """The second simulation has 8 devices a node, and 400 Gb/s between nodes."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ONE_GB))
    simulation = read(*words, f"--link={path}")
    network = simulation.build("12xprefill:tp1,decode:tp1").cost.network
    for source in (0, 11):
        link, lanes, wire = network._route(source, 12)
        assert (link.name, link.transfer_s(1e9), lanes) == ("mine", 1.0, 1)
        assert wire == (-2, 12)  # one link of each device, as inside a node


def test_a_link_that_nobody_knows():
    with pytest.raises(ValueError, match=r"link: expected one of \['100gb', .* or a "):
        read("--link=11gb")


@pytest.mark.parametrize("words", [("--hardware=h100",), ("--config=llama3_8b_h100",)])
def test_an_engine_gives_overheads_and_policies(words):
    plain, simulation = read(*words), read(*words, "--engine=vllm")
    assert simulation.cost.name == "roofline/h100/vllm"
    assert simulation.policies == get_engine("vllm").policies
    same = ("model", "inside", "between", "max_context")
    assert all(getattr(simulation, n) == getattr(plain, n) for n in same)


@pytest.mark.parametrize(
    "words",
    [
        ("--config=opt13b_a100",),
        ("--config=simdistserve_opt66b",),
        ("--model=opt-13b", "--cost=fitted/vllm"),
    ],
)
def test_an_engine_is_refused_where_it_has_no_effect(words):
    with pytest.raises(ValueError, match="engine: expected the cost model roofline"):
        read(*words, "--engine=vllm")


@pytest.mark.parametrize("name", SIMULATIONS)
def test_every_named_simulation_takes_an_engine_or_refuses_it(name):
    is_roofline = get_simulation(name).cost.name.startswith("roofline")
    if not is_roofline:
        with pytest.raises(ValueError, match="engine: expected the cost model"):
            get_simulation(name, "vllm")
    else:
        assert get_simulation(name, "vllm").engine == get_engine("vllm")
