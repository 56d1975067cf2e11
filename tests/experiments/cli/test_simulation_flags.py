"""The flags of a simulation: what they name, and what they replace."""

import json

import pytest

from experiments.cli.flags import Flags
from experiments.cli.simulation_flags import SimulationFlags

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
