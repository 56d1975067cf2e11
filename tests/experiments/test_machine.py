"""What is chosen for a machine."""

import pytest

from experiments import machine
from experiments.configs.named import get_config
from experiments.configs.options import check
from experiments.configs.override import override
from models.config import PRESETS


@pytest.mark.parametrize(
    ("backend", "devices", "model", "clock"),
    [
        ("cpu", 8, "tiny", "virtual"),
        ("gpu", 1, "qwen3-0.6b", "virtual"),
        ("tpu", 4, "qwen3-0.6b", "wall"),
    ],
)
def test_choice(backend, devices, model, clock):
    chosen = machine.choose(backend, "some kind", devices)
    assert (chosen.model, chosen.clock) == (model, clock)
    assert chosen.accelerated == (backend != "cpu")
    assert chosen.model in PRESETS
    config = override(get_config("five_minutes"), chosen.overrides)
    check(config)
    assert (config.model, config.clock) == (model, clock)
    assert f"{devices} devices ({backend}: some kind)" in str(chosen)


def test_look_describes_this_process():
    found = machine.look()
    assert found.backend == "cpu"
    assert found.devices >= machine.HOST_DEVICES
