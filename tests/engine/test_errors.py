"""What a user can get wrong is said before any work, with expected and got."""

import dataclasses

import jax
import pytest

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.engine import Engine
from disagg_jax.request import Request, Sampling
from tests.engine.harness import BUCKETS, MODELS, POOL, make_config, make_request

CONFIG = MODELS["divided"]


def make_engine(world, deployment, config=CONFIG, memory=None, buckets=None, **options):
    parsed = Deployment.parse(deployment)
    n = len(parsed.instances)
    return Engine(
        config,
        world.params(config),
        parsed,
        jax.devices(),
        [POOL] * n if memory is None else memory,
        [BUCKETS] * n if buckets is None else buckets,
        **options,
    )


@pytest.mark.parametrize(
    "deployment, needs",
    [
        ("colocated:tp9", "9 = 9"),
        ("prefill:tp4,decode:tp8", r"4\+8 = 12"),
        ("5xprefill:tp1,2xdecode:tp2", r"1\+1\+1\+1\+1\+2\+2 = 9"),
    ],
)
def test_more_devices_than_there_are(world, deployment, needs):
    message = f"deployment needs {needs} devices, got 8 cpu devices"
    with pytest.raises(ValueError, match=message):
        make_engine(world, deployment)


@pytest.mark.parametrize(
    "field, size, axis", [("mlp", 66, "mlp"), ("vocab_size", 62, "vocab")]
)
def test_a_dimension_that_does_not_divide(world, field, size, axis):
    config = make_config("uneven", **{field: size})
    message = f"'{axis}' of size {size} cannot be sharded over 4 devices"
    with pytest.raises(ValueError, match=message):
        make_engine(world, "prefill:tp1,decode:tp4", config)


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_layer_groups_out_of_range(world, groups):
    message = f"layer_groups: expected 1 to 2, .* stages of divided, got {groups}"
    with pytest.raises(ValueError, match=message):
        make_engine(world, "colocated:tp1", layer_groups=groups)


def test_one_pool_and_one_bucket_set_for_each_instance(world):
    for options in ({"memory": [POOL]}, {"memory": [POOL] * 3}):
        with pytest.raises(ValueError, match="memory: expected one .* 2 instances"):
            make_engine(world, "prefill:tp1,decode:tp1", **options)
    with pytest.raises(ValueError, match="buckets: expected one .* 1 instances, got 2"):
        make_engine(world, "colocated:tp1", buckets=[BUCKETS] * 2)


def test_a_context_longer_than_the_model_was_made_for(world):
    memory = KVMemory(num_blocks=16, block_tokens=4, max_context=65)
    with pytest.raises(
        ValueError, match="at most the 64 tokens of model divided, got 65"
    ):
        make_engine(world, "colocated:tp1", memory=[memory])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": (1, 64, 2)}, r"token ids in \[0, 64\), got 64"),
        ({"prompt": (1, -1, 2)}, r"token ids in \[0, 64\), got -1"),
        ({"prompt": None}, "expected token ids, got lengths only"),
        ({"sampling": Sampling(temperature=1.0, top_k=2**31)}, "got 2147483648"),
    ],
)
def test_a_request_that_no_step_can_take(world, change, message):
    engine = world.engine("colocated:tp1")
    good = make_request(0, 3, 2, sampling=Sampling(temperature=1.0, top_k=2**31 - 1))
    engine.check([good])
    bad = dataclasses.replace(make_request(17, 3, 2), **change)
    assert isinstance(bad, Request)
    with pytest.raises(ValueError, match=f"request 17: expected .*{message}|{message}"):
        engine.check([good, bad])


def test_models_are_shared_between_equal_engines_only(world):
    """Another number of layer groups, or another model, needs other programs."""
    models = {}
    engines = [
        make_engine(world, "colocated:tp1", models=models),
        make_engine(world, "colocated:tp1", models=models),
        make_engine(world, "colocated:tp1", models=models, layer_groups=2),
        make_engine(world, "colocated:tp1", MODELS["repeated"], models=models),
    ]
    first, same, grouped, other = (engine.instances[0].model for engine in engines)
    assert first is same
    assert tuple(len(model.programs.groups) for model in (first, grouped)) == (1, 2)
    assert other.programs.config is MODELS["repeated"]
    assert len(models) == 3
