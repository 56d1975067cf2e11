"""Drawing tokens: the right distribution, and the same tokens wherever they are drawn.

The seeds are fixed, so nothing here is left to chance.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from disagg_jax.engine import sampling
from disagg_jax.request import Sampling
from disagg_jax.work import Slice
from tests.engine.harness import (
    MODELS,
    assert_reference,
    make_request,
    serve_virtual,
)

CONFIG = MODELS["divided"]
VOCAB, ROWS = 12, 4096
LOGITS = np.random.default_rng(5).normal(0, 1.5, VOCAB).astype(np.float32)


def reference_probs(params: Sampling, logits=LOGITS) -> np.ndarray:
    """What remains, in the order of its definition: temperature, top-k, then top-p."""
    if params.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    keep = params.top_k or len(probs)
    probs[order[keep:]] = 0
    probs /= probs.sum()
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += probs[token]
        if reached >= params.top_p:
            break
    only = np.zeros_like(probs)
    only[kept] = probs[kept]
    return only / only.sum()


def make_slice(params: Sampling, index: int) -> Slice:
    """The step that generates token `index`."""
    request = make_request(0, (0,), 1 << 20, sampling=params)
    return Slice(request, index, 1, True, (0,), (0,))


@pytest.fixture(scope="module")
def draw():
    """draw(params of each row, index of each row) -> tokens, padded to ROWS."""
    program = jax.jit(sampling.draw)
    logits = jnp.tile(jnp.asarray(LOGITS), (ROWS, 1))

    def run(params, indices):
        slices = [make_slice(p, i) for p, i in zip(params, indices, strict=True)]
        tokens = program(logits, jnp.asarray(sampling.pack(slices, ROWS)))
        return np.asarray(tokens)

    return run


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.4, top_k=6, top_p=0.8),
    Sampling(temperature=1.0, top_k=VOCAB + 100),
]


def assert_distributed(tokens: np.ndarray, params: Sampling) -> None:
    probs = reference_probs(params)
    observed = np.bincount(tokens, minlength=VOCAB)
    assert not observed[probs == 0].any()
    support = probs > 0
    expected = probs[support] * len(tokens)
    p_value = scipy.stats.chisquare(observed[support], expected).pvalue
    assert p_value > 1e-3, (observed, probs * len(tokens))


@pytest.mark.parametrize("params", CASES, ids=str)
def test_tokens_of_one_request_are_distributed_as_defined(draw, params):
    assert_distributed(draw([params] * ROWS, range(1, ROWS + 1)), params)


@pytest.mark.parametrize("params", CASES, ids=str)
def test_first_tokens_of_many_seeds_are_distributed_as_defined(draw, params):
    """A benchmark gives its requests the seeds 0, 1, 2, ..."""
    params = [dataclasses.replace(params, seed=seed) for seed in range(ROWS)]
    assert_distributed(draw(params, [1] * ROWS), params[0])


def test_successive_tokens_are_independent(draw):
    """The pairs (token n, token n + 1) of a request: chi-square of independence."""
    params = Sampling(temperature=1.0, top_k=4, seed=3)
    tokens = draw([params] * ROWS, range(1, ROWS + 1))
    _, ranks = np.unique(tokens, return_inverse=True)
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (ranks[:-1], ranks[1:]), 1)
    assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-3


def test_rows_do_not_look_at_each_other(draw):
    """Every row with parameters of its own draws what it draws among equals."""
    alone = [draw([params] * ROWS, range(1, ROWS + 1)) for params in CASES]
    mixed = draw(
        [CASES[i % len(CASES)] for i in range(ROWS)],
        range(1, ROWS + 1),
    )
    want = [alone[i % len(CASES)][i] for i in range(ROWS)]
    assert mixed.tolist() == want


@pytest.mark.parametrize(
    "params",
    [
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=50.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-30),
        Sampling(temperature=1e-46),  # 0 as a float32
        Sampling(temperature=1.0, top_p=1e-46),
    ],
    ids=str,
)
def test_limits_that_leave_only_the_likeliest(draw, params):
    assert set(draw([params] * ROWS, range(1, ROWS + 1))) == {LOGITS.argmax()}


def test_greedy_rows_beside_sampled_ones_break_ties_like_greedy_steps():
    """The first of equal logits, as argmax does in a step without sampled rows."""
    logits = jnp.array([[0.0, 5.0, 1.0, 5.0]] * 64)
    slices = [make_slice(Sampling(seed=seed), 1) for seed in range(64)]
    tokens = sampling.draw(logits, jnp.asarray(sampling.pack(slices, 64)))
    assert set(tokens.tolist()) == {1}


def test_top_p_of_1_keeps_the_unlikeliest_token(draw):
    """At a huge temperature all tokens are equally likely, rounding or not."""
    tokens = draw([Sampling(temperature=1e6)] * ROWS, range(1, ROWS + 1))
    counts = np.bincount(tokens, minlength=VOCAB)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_draws_stay_in_a_large_vocabulary():
    """Sums over 50,000 equal probabilities: rounding never leads past the end."""
    vocab, rows = 49_152, 64
    slices = [make_slice(Sampling(temperature=1.0, seed=i), 1) for i in range(rows)]
    logits = jnp.zeros((rows, vocab))
    packed = jnp.asarray(sampling.pack(slices, rows))
    tokens = np.asarray(jax.jit(sampling.draw)(logits, packed))
    assert 0 <= tokens.min() and tokens.max() < vocab
    assert scipy.stats.kstest(tokens / vocab, "uniform").pvalue > 1e-3


# -- in the engine --------------------------------------------------------------------


def sampled_requests():
    """Like and unlike parameters side by side, greedy ones among them."""
    hot = Sampling(temperature=1.0, seed=11)
    parameters = [
        hot,
        Sampling(),
        dataclasses.replace(hot, seed=12),
        Sampling(temperature=0.8, top_k=8, seed=2**31 - 1),
        Sampling(temperature=1.3, top_p=0.9, seed=4),
        Sampling(),
        hot,
        Sampling(temperature=1.0, top_k=1, seed=5),
        Sampling(temperature=1e-5, seed=6),
    ]
    return [
        make_request(i, 6 if p == hot else 4 + i, 18, sampling=p)
        for i, p in enumerate(parameters)
    ]


@pytest.fixture(scope="module")
def alone(world):
    """Tokens of each request when it is the only one."""
    engine = world.engine("colocated:tp1", sampled=True)
    return {
        request.id: serve_virtual(engine, [request])[request.id].tokens
        for request in sampled_requests()
    }


@pytest.mark.parametrize(
    "deployment", ["colocated:tp1", "prefill:tp1,decode:tp1", "prefill:tp1,decode:tp2"]
)
def test_a_seed_gives_the_same_tokens_everywhere(world, alone, deployment):
    """Among others, on other meshes, and recomputed after a preemption."""
    engine = world.engine(deployment, sampled=True)
    timelines = serve_virtual(engine, sampled_requests())
    assert {id: timeline.tokens for id, timeline in timelines.items()} == alone
    again = [t for t in timelines.values() if t.request.sampling.temperature >= 0.8]
    assert sum(timeline.preemptions for timeline in again) > 0


def test_greedy_and_nearly_greedy_requests_beside_sampled_ones(world, alone):
    requests = sampled_requests()
    for id in (1, 5, 7, 8):
        assert alone[id] == world.reference(CONFIG, requests[id])


def test_sampled_requests_differ_from_greedy_and_by_seed(world, alone):
    prompt = sampled_requests()[0].prompt
    requests = [
        make_request(seed, prompt, 18, sampling=Sampling(temperature=1.0, seed=seed))
        for seed in range(8)
    ]
    engine = world.engine("colocated:tp1", sampled=True)
    outputs = [tuple(t.tokens) for t in serve_virtual(engine, requests).values()]
    assert len({*outputs, tuple(world.reference(CONFIG, requests[0]))}) == 9


def test_a_sampled_step_without_its_program_is_refused(world):
    """`compile(sampled=False)` is for greedy requests only."""
    engine = world.engine("colocated:tp2")
    with pytest.raises(ValueError, match="draw.*no such program was compiled"):
        serve_virtual(engine, sampled_requests()[:1])
    request = sampled_requests()[1]
    assert_reference(world, CONFIG, serve_virtual(engine, [request]))


def test_greedy_is_the_first_of_the_likeliest():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 30, (64, 100)).astype(np.float32)  # with many ties
    logits[0], logits[1] = -np.inf, np.inf
    logits[2, :99], logits[2, 99] = -np.inf, -1e30
    tokens = sampling.greedy(jnp.asarray(logits))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_greedy_of_rows_with_nan_is_a_token_and_other_rows_keep_theirs():
    logits = np.eye(4, 12, k=5, dtype=np.float32)
    logits[1], logits[2, 3] = np.nan, np.nan
    tokens = np.asarray(sampling.greedy(jnp.asarray(logits)))
    assert ((0 <= tokens) & (tokens < 12)).all()
    assert (tokens[0], tokens[3]) == (5, 8)
