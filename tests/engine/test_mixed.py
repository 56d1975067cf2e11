"""Mixed steps: chunks of prompts and decodes in one forward pass.

Slices are made by hand here, as a policy could, so that every mix comes up; the tokens
are those of the one-device, no-cache reference.
"""

import dataclasses

import jax
import numpy as np
import pytest

from disagg_jax.calibration.step_times import measure_step_times
from disagg_jax.control.run import StepTotals
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.programs import StepShape
from disagg_jax.request import Request, Sampling
from disagg_jax.work import Slice, Step
from tests.engine.harness import (
    FAMILIES,
    MIXED,
    MODELS,
    POOL,
    make_request,
    serve_virtual,
)

CONFIG = MODELS["divided"]
(SHAPE,) = MIXED.mixed
SPARE = 1  # blocks that each request reserves and never uses


@dataclasses.dataclass
class Hand:
    """A request between steps."""

    request: Request
    blocks: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    context: int = 0

    @property
    def known(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.tokens)

    @property
    def left(self) -> int:
        """Known tokens to compute; 0 if the request is done."""
        done = len(self.tokens) == self.request.max_tokens
        return 0 if done else len(self.known) - self.context

    def slice(self, count: int) -> Slice:
        start, end = self.context, self.context + count
        samples, tokens = end == len(self.known), self.known[start:end]
        blocks = self.blocks[: POOL.blocks_for(end)]
        return Slice(self.request, start, count, samples, blocks, tokens)


def deal(requests, seed=0) -> list[Hand]:
    """Scattered blocks for each request at its longest, and `SPARE` more."""
    free = np.random.default_rng(seed).permutation(POOL.num_blocks).tolist()
    hands = []
    for request in requests:
        n = POOL.blocks_for(request.prompt_tokens + request.max_tokens) + SPARE
        hands.append(Hand(request, tuple(free[:n])))
        free = free[n:]
        assert len(hands[-1].blocks) == n
    return hands


def start(engine: Engine, requests, seed=0) -> list[Hand]:
    """Blocks for each request, in a pool of huge numbers and, where unused, NaN."""
    hands = deal(requests, seed)
    used = {block for hand in hands for block in hand.blocks[:-SPARE]}
    unused = sorted(set(range(POOL.num_blocks)) - used)
    (instance,) = engine.instances
    spoilt = np.full(instance.cache[0][0].shape, 1e30, "f4")
    spoilt[unused] = np.nan
    instance.cache[:] = jax.tree.map(
        lambda part: jax.device_put(spoilt, part.sharding), instance.cache
    )
    return hands


def run(engine: Engine, counts: list[tuple[Hand, int]]) -> None:
    """One step of so many tokens of each request."""
    slices = [hand.slice(count) for hand, count in counts]
    _, (tokens, _) = run_alone(engine, Step.of(0, 0, slices))
    for hand, count in counts:
        hand.context += count
    sampling = [hand for hand, _ in counts if hand.context == len(hand.known)]
    for hand, token in zip(sampling, tokens, strict=True):
        hand.tokens.append(token)


def plan(hands: list[Hand], chunk: int) -> list[tuple[Hand, int]]:
    """Chunks of two prompts, then all decodes."""
    prompts = [hand for hand in hands if hand.left > 1 or hand.left and not hand.tokens]
    decodes = [hand for hand in hands if hand.left == 1 and hand.tokens]
    # The second is a token shorter, so that the two are seldom alike.
    sizes = (chunk, max(1, chunk - 1))
    parts = [
        (hand, min(hand.left, size)) for hand, size in zip(prompts, sizes, strict=False)
    ]
    return parts + [(hand, 1) for hand in decodes]


def serve_by_hand(engine: Engine, hands: list[Hand], chunk: int) -> list[list[int]]:
    """Tokens of each request, of which two are prefilled at a time."""
    with engine.serving():
        while counts := plan(hands, chunk):
            run(engine, counts)
    return [hand.tokens for hand in hands]


def reference(world, config, requests):
    return [world.reference(config, request) for request in requests]


REQUESTS = [
    make_request(0, (0,), 7),  # id 0, and a prompt of one token, which is 0
    make_request(1, 12, 4),  # exactly three blocks
    make_request(2, (5, 0, 0, 9, 0, 11, 0), 3),
    make_request(3, 9, 2),
]


@pytest.mark.parametrize(
    "model, tp",
    [
        ("divided", 1),
        pytest.param("divided", 2, marks=pytest.mark.slow),
        pytest.param("divided", 4, marks=pytest.mark.slow),
        pytest.param("repeated", 2, marks=pytest.mark.slow),
        ("repeated", 4),
        ("padded", 2),
        pytest.param("padded", 4, marks=pytest.mark.slow),
        ("opt", 4),
        pytest.param("qwen3", 1, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_reference(world, model, tp):
    """Chunks of a token, a block, no whole blocks, whole prompts; in a spoilt pool."""
    config = (MODELS | FAMILIES)[model]
    engine = world.engine(f"colocated:tp{tp}", config, MIXED)
    for chunk in (1, 4, 5, 7, 16):
        hands = start(engine, REQUESTS, seed=chunk)
        tokens = serve_by_hand(engine, hands, chunk)
        assert tokens == reference(world, config, REQUESTS), chunk
        assert engine.totals["mixed"].steps >= 2


def test_kv_as_a_tpu_keeps_it(tiled_world):
    """What pads a head is as spoilt as the rest of the pool, and never read."""
    config = MODELS["padded"]
    engine = tiled_world.engine("colocated:tp2", config, MIXED)
    assert engine.instances[0].cache[0][0].shape[-1] == 128
    tokens = serve_by_hand(engine, start(engine, REQUESTS), chunk=5)
    assert tokens == reference(tiled_world, config, REQUESTS)


def test_the_plan_makes_every_mix():
    """Without it the test above would say less than it seems to."""
    kinds = set()
    for chunk in (1, 4, 5, 7, 16):
        hands = deal(REQUESTS)
        while counts := plan(hands, chunk):
            slices = [hand.slice(count) for hand, count in counts]
            decodes = sum(bool(hand.tokens) for hand, _ in counts)
            chunks = len(slices) - decodes
            kinds.add((min(chunks, 2), min(decodes, 1)))
            kinds |= {(part.start % 4 > 0, part.samples) for part in slices[:chunks]}
            for hand, count in counts:
                hand.context += count
                if hand.context == len(hand.known):
                    hand.tokens.append(1)
    mixes = {(chunks, decodes) for chunks in range(3) for decodes in range(2)}
    assert kinds == mixes - {(0, 0)} | {
        (unaligned, samples) for unaligned in (False, True) for samples in (False, True)
    }


def test_layer_groups(world):
    config = MODELS["padded"]
    engine = world.engine("colocated:tp2", config, MIXED, layer_groups=2)
    tokens = serve_by_hand(engine, start(engine, REQUESTS), chunk=5)
    assert tokens == reference(world, config, REQUESTS)


def test_the_smallest_shape_that_fits_is_as_good_as_any(world):
    """A part of the pool, few blocks of chunks, and chunks without decodes."""
    small = StepShape.mixed(tokens=8, rows=8, context=5, decodes=4, blocks=10)
    buckets = dataclasses.replace(MIXED, mixed=(small, SHAPE))
    engine = world.engine("colocated:tp1", buckets=buckets)
    hands = start(engine, REQUESTS)
    shapes = set()
    with engine.serving():
        while counts := plan(hands, chunk=5):
            slices = [hand.slice(count) for hand, count in counts]
            shapes.add(engine.instances[0].step_shape(slices))
            run(engine, counts)
    assert [hand.tokens for hand in hands] == reference(world, CONFIG, REQUESTS)
    assert {small, SHAPE} < shapes


def test_an_instance_that_never_decodes(world):
    """Chunked prefill on a prefill instance: no decode part, no blocks of the pool."""
    shape = SHAPE._replace(decodes=0, blocks=0)
    buckets = dataclasses.replace(MIXED, mixed=(shape,), decode_rows=(), pool_blocks=())
    engine = world.engine("colocated:tp1", buckets=buckets)
    requests = [dataclasses.replace(request, max_tokens=1) for request in REQUESTS]
    for chunk in (1, 5):
        tokens = serve_by_hand(engine, start(engine, requests), chunk)
        assert tokens == reference(world, CONFIG, requests)


def test_tokens_come_for_sampling_slices_in_their_order(world):
    engine = world.engine("colocated:tp1", buckets=MIXED)
    decode, partial, whole, last = hands = start(engine, REQUESTS)
    run(engine, [(decode, 1)])
    run(engine, [(last, 8), (decode, 1)])
    slices = [partial.slice(6), last.slice(1), whole.slice(7), decode.slice(1)]
    assert [part.samples for part in slices] == [False, True, True, True]
    _, (tokens, _) = run_alone(engine, Step.of(0, 0, slices))
    want = reference(world, CONFIG, [hand.request for hand in hands])
    assert tokens == (want[3][0], want[2][0], want[0][2])


def test_decodes_and_single_tokens_of_prompts_beyond_the_decode_rows(world):
    """A chunk of one token looks like a decode, of which there are 4 already."""
    engine = world.engine("colocated:tp1", buckets=MIXED)
    requests = [make_request(i, 3, 5) for i in range(5)]
    hands = start(engine, requests)
    run(engine, [(hand, 3) for hand in hands[:4]])
    for _ in range(3):
        run(engine, [(hands[4], 1), *((hand, 1) for hand in hands[:4])])
    tokens = [hand.tokens for hand in hands]
    want = reference(world, CONFIG, requests)
    assert tokens == [*(part[:4] for part in want[:4]), want[4][:1]]


@pytest.mark.parametrize("chunk", [3, 16])
def test_recompute_in_chunks(world, chunk):
    """Prompt and generated tokens, in other blocks, beside a request that goes on."""
    engine = world.engine("colocated:tp1", buckets=MIXED)
    requests = [make_request(1, 6, 12), make_request(2, 5, 14)]
    hands = start(engine, requests)
    for _ in range(9):
        run(engine, plan(hands, chunk))
    lost = hands[0]
    assert 5 < len(lost.tokens) < 10
    *used, spare = lost.blocks
    lost.context, lost.blocks = 0, (*used[::-1], spare)
    tokens = serve_by_hand(engine, hands, chunk)
    assert tokens == reference(world, CONFIG, requests)


def test_a_seed_gives_the_tokens_of_unmixed_steps(world):
    """A greedy request beside them, and a partial chunk that draws nothing."""
    hot = Sampling(temperature=1.0, seed=11)
    requests = [
        dataclasses.replace(request, sampling=sampling)
        for request, sampling in zip(
            REQUESTS,
            (hot, Sampling(temperature=0.8, top_k=8, seed=3), Sampling(), hot),
            strict=True,
        )
    ]
    unmixed = serve_virtual(world.engine("colocated:tp1", sampled=True), requests)
    engine = world.engine("colocated:tp1", buckets=MIXED, sampled=True)
    for chunk in (1, 5):
        tokens = serve_by_hand(engine, start(engine, requests), chunk)
        assert tokens == [unmixed[i].tokens for i in range(4)]
    assert tokens != reference(world, CONFIG, requests)


def test_totals_say_how_much_was_padding(world):
    """By kind, from the beginning of each run."""
    engine = world.engine("colocated:tp1", buckets=MIXED)
    for _ in range(2):
        first, second = start(engine, [make_request(1, 6, 3), make_request(2, 5, 3)])
        with engine.serving():
            run(engine, [(first, 6)])
            run(engine, [(second, 5), (first, 1)])
            run(engine, [(second, 1), (first, 1)])
        assert engine.totals == {
            "mixed": StepTotals(steps=2, tokens=6 + 6, width=2 * 68),
            "decode": StepTotals(steps=1, tokens=2, width=4),
        }


def test_step_times_cover_mixed_steps(world):
    engine = world.engine("colocated:tp1", buckets=MIXED)
    table = measure_step_times([engine], repeats=1).seconds
    assert set(table) == {"tp1/mixed_T68_C16_P16", "tp1/decode_B4_P16"}


def test_a_step_beyond_the_listed_shapes_is_an_error(world):
    engine = world.engine("colocated:tp1", buckets=MIXED)
    hands = [Hand(make_request(i, 40, 1), tuple(range(16))) for i in range(2)]
    with pytest.raises(ValueError, match="mixed: expected at most .*got .*tokens=69"):
        run(engine, [(hands[0], 35), (hands[1], 34)])


def test_the_pool_stays_where_it_is(world):
    engine = world.engine("colocated:tp1", buckets=MIXED)

    def pointers():
        cache = jax.tree.leaves(engine.instances[0].cache)
        return [part.unsafe_buffer_pointer() for part in cache]

    hands = start(engine, REQUESTS)
    run(engine, plan(hands, chunk=5))  # only then is the pool no array of numpy's
    before = pointers()
    serve_by_hand(engine, hands, chunk=5)
    assert pointers() == before
