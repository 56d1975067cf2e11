"""A host is split into the devices that a deployment needs, or the error says how."""

import types

import jax
import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.engine.devices import find_devices
from tests.commands import run_code

FIND = """
from disagg_jax.engine.devices import *
import jax
print(len(find_devices(Deployment.parse("3xcolocated:tp2"))))
"""


def test_a_fresh_process_splits_its_host():
    assert run_code(FIND).stdout == "6\n"


def test_devices_that_are_there_are_kept():
    found = run_code("import jax\njax.config.update('jax_num_cpu_devices', 7)" + FIND)
    assert found.stdout == "7\n", found.stderr


def test_it_is_too_late_when_jax_has_started():
    """JAX cannot split the host twice."""
    done = run_code("import jax\njax.devices()" + FIND)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ValueError: deployment: expected 6 devices for '3x")
    assert "got 1 of kind cpu; jax.config.update('jax_num_cpu_devices', 6)" in message


def test_accelerators_are_not_split(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert find_devices(Deployment.parse("colocated:tp1")) == [gpu]
    with pytest.raises(ValueError, match="got 1 of kind gpu; name a smaller deployme"):
        find_devices(Deployment.parse("prefill:tp1,decode:tp1"))
