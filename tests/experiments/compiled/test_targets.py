"""Devices that are not there."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.compiled import targets
from experiments.compiled.targets import CompileTarget
from experiments.compiled.traffic import traffic

TPU = pytest.param("v6e:2x2", marks=pytest.mark.tpu_aot)
GPU = pytest.param("h100:4", marks=pytest.mark.gpu_aot)


@pytest.mark.parametrize("text", ["", "v6e", "h100", "h100:0", "h100:2x2", "cpu:4"])
def test_another_target_is_refused_with_those_that_there_are(text):
    with pytest.raises(ValueError, match=r"v6e .*\(v6e:2x4\), or .*h100.*\(h100:8\)"):
        CompileTarget.parse(text)


@pytest.mark.parametrize(
    ("text", "extra"), [("v5e:2x4", "tpu"), ("h200:8", "compile-cuda")]
)
def test_a_missing_wheel_is_an_error_with_the_command(monkeypatch, text, extra):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert targets.missing_wheel(text) == extra
    with pytest.raises(ValueError) as caught:
        CompileTarget.parse(text)
    said = str(caught.value)
    assert said.endswith(f"pip install -e '.[{extra}]'") and "\n" not in said


@pytest.mark.parametrize("target", [TPU, GPU], indirect=True)
def test_a_matmul_is_compiled_for_devices_that_are_not_there(target):
    assert len(target.devices) == 4
    assert target.devices[0].platform != jax.devices()[0].platform == "cpu"
    mesh = Mesh(np.array(target.devices[:2]), ("tensor",))

    def spec(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    program = jax.jit(jnp.matmul).lower(
        spec((512, 4096)), spec((4096, 8192), None, "tensor")
    )
    found = traffic(program.compile())
    assert found.flops == 2 * 512 * 4096 * 4096  # of one of two devices
    needed = 2 * (512 * 4096 + 4096 * 4096 + 512 * 4096)
    assert found.size_bytes == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("target", [TPU], indirect=True)
def test_a_program_keeps_what_a_kernel_states(target):
    mesh = Mesh(np.array(target.devices[:1]), ("tensor",))
    x = jax.ShapeDtypeStruct(
        (1024, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def run(x):
        block = pl.BlockSpec((128, 128), lambda i: (i, 0))
        call = pl.pallas_call(
            double,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=8,
            in_specs=[block],
            out_specs=block,
            name="double",
            cost_estimate=pl.CostEstimate(flops=5, bytes_accessed=7, transcendentals=0),
        )
        return call(x)

    found = traffic(jax.jit(run).lower(x).compile())
    assert (found.size_bytes, found.flops, found.unstated_kernels) == (7, 5, ())


@pytest.mark.tpu_aot
@pytest.mark.parametrize("target", ["v6e:2x2"], indirect=True)
def test_a_variable_that_is_set_keeps_its_value(target, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "elsewhere")
    CompileTarget.parse(target.name)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "elsewhere"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


@pytest.mark.tpu_aot
@pytest.mark.parametrize("target", ["v6e:2x2"], indirect=True)
def test_a_topology_that_there_is_not_is_an_error(target):
    with pytest.raises(ValueError, match="expected a topology of v6e, got 'v6e:3x7'"):
        CompileTarget.parse("v6e:3x7")
