"""bfloat16 through the whole engine: logits and greedy tokens near float32's.

Tokens need not be equal: partial sums of tensor parallelism travel as bfloat16. The
rule is that of `dtype_comparison`. The reference is one device without a cache.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.deployment import Role
from disagg_jax.engine import LLM, dtype_comparison
from disagg_jax.engine.attention import kv_cache
from disagg_jax.engine.dtype_comparison import (
    DtypeComparison,
    Output,
    compare_dtypes,
    greedy_outputs,
    nudge,
)
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.programs import StepShape
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from models import transformer
from models.config import get_config
from models.gguf import load_gguf
from models.load import load_model
from tests.engine.harness import (
    BUCKETS,
    FAMILIES,
    MODELS,
    POLICIES,
    World,
    make_config,
    make_request,
)

DEEP = make_config("deep", layers=4, q_heads=8, kv_heads=4)
CONFIGS = {**MODELS, **FAMILIES, "deep": DEEP}
# No token ends a request. They are more than the pool holds: some are preempted.
REQUESTS = [
    make_request(i, *lengths)
    for i, lengths in enumerate([(1, 10), (4, 9), (8, 1), (40, 24), (13, 12), (30, 20)])
]


def half(config):
    """The same model in bfloat16: `random_params` rounds the same numbers."""
    return dataclasses.replace(config, dtype="bfloat16")


def reference_outputs(world, config, params) -> list[Output]:
    """What float32 computes along its tokens, on one device and without a cache."""
    outputs = []
    for request in REQUESTS:
        tokens = world.reference(config, request)
        known = np.zeros(64, np.int32)
        known[: request.prompt_tokens + len(tokens)] = [*request.prompt, *tokens]
        logits = transformer.forward(config, params, jnp.asarray(known))
        first = request.prompt_tokens - 1
        those = np.asarray(logits)[first : first + len(tokens)]
        outputs.append(Output(np.array(tokens), those))
    return outputs


def compare(
    world, config, deployment, policies=POLICIES, streams=False, **options
) -> DtypeComparison:
    engine = world.engine(deployment, half(config), **options)
    arrays = [i.cache for i in engine.instances]
    arrays += [i.model.params for i in engine.instances]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(arrays)} == {"bfloat16"}
    params = world.params(config)
    exact = reference_outputs(world, config, params)
    nudged = reference_outputs(world, config, nudge(params, "bfloat16"))
    served = ServedDeployment(engine=engine, policies=policies, streams=streams)
    follow = {r.id: o.tokens_T.tolist() for r, o in zip(REQUESTS, exact, strict=True)}
    found = greedy_outputs(served, REQUESTS, follow)
    return DtypeComparison.of(half(config), exact, nudged, found)


def check(found: DtypeComparison) -> None:
    """It is within the rule, and not float32."""
    assert len(found.agrees_T) == sum(request.max_tokens for request in REQUESTS)
    assert found.holds, str(found)
    assert found.rms > found.bound / 10, str(found)
    # Found: 0.96 to 1.
    assert found.agreeing > 0.9, str(found)


@pytest.mark.parametrize(
    "model, deployment, layer_groups",
    [
        pytest.param("divided", "colocated:tp1", 1, marks=pytest.mark.slow),
        pytest.param("divided", "prefill:tp1,decode:tp4", 1, marks=pytest.mark.slow),
        pytest.param("repeated", "prefill:tp4,decode:tp1", 1, marks=pytest.mark.slow),
        ("padded", "prefill:tp2,decode:tp4", 1),
        pytest.param("padded", "colocated:tp2", 2, marks=pytest.mark.slow),
        pytest.param("deep", "prefill:tp1pp3,decode:tp1pp2", 1, marks=pytest.mark.slow),
        pytest.param("deep", "prefill:tp2pp2,decode:tp1", 2, marks=pytest.mark.slow),
        ("opt", "prefill:tp1,decode:tp2", 1),
        pytest.param("qwen3", "prefill:tp2,decode:tp1", 1, marks=pytest.mark.slow),
        pytest.param("scaled", "colocated:tp4", 1, marks=pytest.mark.slow),
    ],
)
def test_layouts(world, model, deployment, layer_groups):
    check(compare(world, CONFIGS[model], deployment, layer_groups=layer_groups))


@pytest.mark.parametrize(
    "model, tp",
    [pytest.param("divided", 1, marks=pytest.mark.slow), ("padded", 2)],
)
def test_chunks_of_prompts_beside_decodes(world, model, tp):
    shape = StepShape.mixed(tokens=16, rows=8, context=16, decodes=4, blocks=16)
    buckets = dataclasses.replace(BUCKETS, prefill=(), mixed=(shape,))
    policies = {Role.COLOCATED: SarathiServe(token_budget=16, max_seqs=4)}
    check(
        compare(world, CONFIGS[model], f"colocated:tp{tp}", policies, buckets=buckets)
    )


def test_kv_that_leaves_while_it_is_computed(world):
    """That of the first stage."""
    deployment = "prefill:tp1pp2,decode:tp2"
    check(compare(world, CONFIGS["divided"], deployment, streams=True))


def test_kv_as_a_tpu_keeps_it(tiled_world):
    check(compare(tiled_world, CONFIGS["divided"], "prefill:tp1,decode:tp2"))


def test_a_cache_of_fewer_digits_is_outside_the_rule(world, monkeypatch):
    """Decodes whose keys and values have 3 digits of 8."""
    write = kv_cache.write_tokens

    def write_less(part, slot, x):
        return write(part, slot, x.astype(jnp.float8_e4m3fn).astype(x.dtype))

    monkeypatch.setattr(kv_cache, "write_tokens", write_less)
    fresh = World({MODELS["divided"]: world.params(MODELS["divided"])})
    assert not compare(fresh, MODELS["divided"], "colocated:tp1").holds


def test_figures_by_hand():
    """Logits 0 and 4 have a spread of 2, and another choice costs its margin."""
    logits = np.array([[0.0, 4.0], [4.0, 0.0], [0.0, 4.0]], "f4")
    exact = [Output(np.array([1, 0]), logits[:2]), Output(np.array([1]), logits[2:])]
    wrong = logits + np.array([[0.0, 0.0], [0.0, 0.2], [0.0, 0.0]], "f4")
    other = [Output(np.array([1, 1]), wrong[:2]), Output(np.array([1]), wrong[2:])]
    config = half(make_config("deep", layers=28))
    # 1/16 of a spread; 4 + 28 / 7 times its square is the variance allowed.
    nudged = [Output(o.tokens_T, o.logits_TV + 2 / 16) for o in exact]
    found = DtypeComparison.of(config, exact, nudged, other)
    np.testing.assert_allclose(found.spread_T, [2, 2, 2])
    np.testing.assert_allclose(found.rms_T, [0, 0.1 / 2**0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(found.rms, 0.1 / 6**0.5, rtol=1e-5)
    np.testing.assert_allclose(found.worst, 0.1, rtol=1e-5)
    np.testing.assert_allclose(found.agreeing, 2 / 3)
    assert found.margins == [2.0]
    np.testing.assert_allclose(found.bound, 8**0.5 / 16, rtol=1e-5)
    # 8 times that is 1.41: the margin is outside.
    assert not found.holds
    near = dataclasses.replace(found, margin_T=found.margin_T / 2)
    assert near.holds
    assert not dataclasses.replace(near, worst_T=near.worst_T * 15).holds
    assert not dataclasses.replace(near, rms_T=near.rms_T + 0.2).holds
    assert not dataclasses.replace(near, rms_T=near.rms_T * np.nan).holds


@pytest.mark.slow
def test_compare_dtypes():
    """A trained model from its checkpoint, on the engine that the function makes."""
    model = load_model("auto", "tiny")
    prompts = [model.tokenizer.encode(text) for text in ("def read(self):", "import ")]
    found = compare_dtypes(model.config, model.params, prompts, 16, jax.devices())
    assert found.config == half(model.config)
    assert found.holds and len(found.agrees_T) == 32, str(found)
    assert found.rms > found.bound / 10
    assert "tiny bfloat16 against float32, 32 positions" in str(found)


@pytest.mark.slow
def test_an_engine_is_gone_when_the_next_is_built(monkeypatch):
    config, serve, live = get_config("tiny"), dtype_comparison._serve, []

    def count(*args):
        shape = (config.vocab_size, config.embed)
        live.append(sum(array.shape == shape for array in jax.live_arrays()))
        return serve(*args)

    gc.collect()  # engines of other tests
    monkeypatch.setattr(dtype_comparison, "_serve", count)
    devices = jax.devices()[:1] * 2  # which stands for both
    params = load_model("auto", "tiny").params
    compare_dtypes(config, params, [[1, 2]], 1, devices)
    before = live[0]
    # The second is given nudged weights; the others restore the checkpoint's.
    assert live == [before, before + 1, before]


def test_float32_is_not_compared_with_itself():
    config = MODELS["divided"]
    with pytest.raises(ValueError, match="dtype: expected another one than float32"):
        compare_dtypes(config, {}, [[1]], 1, jax.devices(), dtype="float32")


def test_weights_are_loaded_in_a_dtype():
    llm = LLM("tiny", "colocated:tp1", dtype="bfloat16", progress=lambda text: None)
    (instance,) = llm.served.engine.instances
    arrays = jax.tree.leaves((instance.cache, instance.model.params))
    assert {leaf.dtype.name for leaf in arrays} == {"bfloat16"}
    assert llm.config == half(load_model("auto", "tiny").config)
    with pytest.raises(ValueError, match="dtype: expected one of .*, got 'float8'"):
        load_model("auto", "tiny", dtype="float8")
    with pytest.raises(ValueError, match="dtype: expected none beside a loaded model"):
        LLM(load_model("auto", "tiny"), dtype="bfloat16")


@pytest.mark.slow
def test_smollm2(smollm2_cases, smollm2_file):
    """Found, 6 prompts of 16 tokens: an rms error of 0.040, the largest 0.23.

    93 of 96 tokens agreed, the others had margins of 0.035 spreads and less.
    """
    config, params = load_gguf(smollm2_file)
    prompts = [case["prompt_ids"] for case in smollm2_cases[:2]]
    found = compare_dtypes(
        config, params, prompts, 6, jax.devices(), deployment="colocated:tp1"
    )
    assert found.holds, str(found)
    assert found.agreeing > 0.9, str(found)
