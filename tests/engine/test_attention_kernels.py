"""The attention kernels by name, and an engine with a kernel of one's own."""

import dataclasses
from typing import NamedTuple

import jax
import pytest

from disagg_jax.engine.attention import (
    KERNELS,
    AttentionKernel,
    XlaAttention,
    choose_kernel,
)
from models.config import get_config
from tests.engine.harness import (
    MODELS,
    assert_reference,
    mixed_requests,
    serve_virtual,
)

LLAMA = get_config("llama-3-8b")


class Device(NamedTuple):
    """One that is not here."""

    platform: str
    compute_capability: str = ""


class Doubled(XlaAttention):
    """A kernel whose decodes are twice what they should be."""

    name = "doubled"

    def problem(self, config, block_tokens):
        return "" if config.head_dim < 128 else "expected heads below 128"

    def decodes(self, *args):
        return super().decodes(*args) * 2


class Unfinished(AttentionKernel):
    name = "unfinished"


HERE = __name__


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_the_name_it_is_found_by(name):
    assert KERNELS[name].name == name


def test_auto_says_what_it_picked_and_why():
    chosen = choose_kernel("auto", jax.devices()[0], LLAMA)
    assert chosen.kernel == XlaAttention("cpu")
    assert str(chosen) == "attention xla (auto on a cpu)"


@pytest.mark.parametrize(
    "platform, dtype, block_tokens, name",
    [
        ("tpu", "bfloat16", None, "pallas_tpu"),
        ("tpu", "bfloat16", 24, "xla"),  # it has a problem with them
        ("tpu", "float32", None, "xla"),
        ("gpu", "bfloat16", None, "xla"),
        ("cpu", "bfloat16", None, "xla"),
    ],
)
def test_auto_takes_a_fast_kernel_where_it_can(platform, dtype, block_tokens, name):
    config = dataclasses.replace(LLAMA, dtype=dtype)
    chosen = choose_kernel("auto", Device(platform), config, block_tokens)
    assert chosen.kernel.name == name and chosen.kernel.platform == platform


def test_kernels_for_tpus_refuse_a_gpu():
    with pytest.raises(ValueError, match="on a gpu, .* expected TPUs, or CPUs"):
        choose_kernel("pallas_tpu", Device("gpu"), LLAMA)


@pytest.mark.parametrize(
    "name, capability, fits",
    [
        ("mosaic_gpu", "8.0", False),
        ("mosaic_gpu", "9.0", True),
        ("mosaic_gpu", "10.0", False),  # its instructions are Hopper's alone
        ("cudnn", "7.5", False),
        ("cudnn", "8.0", True),
        ("cudnn", "10.0", True),
    ],
)
def test_kernels_are_for_gpus_of_some_generations(name, capability, fits):
    gpu = Device("gpu", capability)
    if fits:
        chosen = choose_kernel(name, gpu, LLAMA)
        assert chosen.kernel.compute_capability == capability
        return
    with pytest.raises(ValueError, match=f"expected a GPU of .*, got {capability}"):
        choose_kernel(name, gpu, LLAMA)


def test_a_kernel_of_ones_own_is_found_by_its_module():
    chosen = choose_kernel(f"{HERE}:Doubled", Device("gpu"), get_config("tiny"))
    assert chosen.kernel == Doubled("gpu")


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", "attention kernel: expected one of .*'xla'.* got 'flash'"),
        (f"{HERE}:Unfinished", "a subclass of AttentionKernel that lacks nothing"),
        (f"{HERE}:LLAMA", "a subclass of AttentionKernel that lacks nothing"),
        (f"{HERE}:Doubled", "on a tpu, for llama-3-8b in float32: expected heads"),
    ],
)
def test_what_cannot_be_used_is_refused(name, message):
    config = dataclasses.replace(LLAMA, dtype="float32")
    with pytest.raises(ValueError, match=message):
        choose_kernel(name, Device("tpu"), config)


def test_an_engine_attends_with_the_kernel_that_is_asked_for(world):
    """Tokens are others with twice the decodes."""
    config = MODELS["divided"]
    requests = mixed_requests(world, config)
    same, other = (
        world.engine("colocated:tp2", config, attention=name)
        for name in ("xla", f"{HERE}:Doubled")
    )
    assert_reference(world, config, serve_virtual(same, requests))
    with pytest.raises(AssertionError, match="request"):
        assert_reference(world, config, serve_virtual(other, requests))


def test_programs_are_keyed_by_their_kernel(world):
    """Plain XLA's have the keys that they had before there were others."""
    names = [
        str(world.engine("colocated:tp2", attention=name).instances[0].programs)
        for name in ("auto", "xla", f"{HERE}:Doubled")
    ]
    assert names == ["tp2", "tp2", "tp2@doubled"]
