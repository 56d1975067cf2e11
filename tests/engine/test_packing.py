"""The packed vector of a step against a plain restatement, token by token."""

import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.engine import sampling
from disagg_jax.engine.attention.packing import Fields, fields_of, pack
from disagg_jax.programs import StepShape
from disagg_jax.request import Sampling
from disagg_jax.work import Slice
from tests.engine.harness import make_request

BLOCK, POOL, SCRATCH = 4, 40, 40
MEMORY = KVMemory(num_blocks=POOL, block_tokens=BLOCK, max_context=100)


@st.composite
def batches(draw, kind: str):
    """Slices of up to 5 requests whose blocks are scattered over the pool.

    In a mixed one decodes come last.
    """
    free = draw(st.permutations(range(POOL)))
    slices = []
    requests = draw(st.integers(1, 5))
    chunks = {"prefill": requests, "decode": 0}.get(kind)
    chunks = draw(st.integers(0, requests)) if chunks is None else chunks
    for id in range(requests):
        size = draw(st.integers(1, 11))
        start, count = (0, size) if id < chunks else (2 * size, 1)
        if kind == "mixed" and id < chunks:
            start = draw(st.integers(0, 12))
        n = -(-(start + count) // BLOCK)
        blocks, free = tuple(free[:n]), free[n:]
        tokens = tuple(
            draw(st.lists(st.integers(0, 63), min_size=count, max_size=count))
        )
        params = draw(
            st.builds(
                Sampling,
                temperature=st.sampled_from([0.0, 0.7]),
                top_k=st.integers(0, 9),
                top_p=st.floats(0.25, 1.0, width=32),
                seed=st.integers(0, 2**31 - 1),
            )
        )
        prompt = draw(st.integers(1, start + count))
        request = make_request(id, prompt, 50, sampling=params)
        slices.append(Slice(request, start, count, True, blocks, tokens))
    return slices


def slot(part: Slice, position: int) -> int:
    return part.blocks[position // BLOCK] * BLOCK + position % BLOCK


def owners(slices, extent: int) -> tuple[list[int], list[int]]:
    """For each leading block of the pool: its row, and where in the request it is."""
    owner, start = [-1] * extent, [0] * extent
    for row, part in enumerate(slices):
        for i, block in enumerate(part.blocks):
            owner[block], start[block] = row, i * BLOCK
    return owner, start


@given(batches("prefill"), st.integers(0, 9), st.integers(0, 3))
def test_prefill(slices, more_tokens, more_rows):
    total = sum(part.count for part in slices)
    shape = StepShape.prefill(total + more_tokens, len(slices) + more_rows)
    packed = pack(shape, slices, MEMORY)
    assert packed.dtype == np.int32 and packed.shape == (fields_of(shape).size,)
    fields = {
        name: array.tolist() for name, array in fields_of(shape).split(packed).items()
    }
    tokens = [
        (part.tokens[i], i, row, slot(part, i))
        for row, part in enumerate(slices)
        for i in range(part.count)
    ]
    tokens += [(0, 0, -1, SCRATCH * BLOCK)] * more_tokens
    got = zip(
        fields["token"], fields["position"], fields["row"], fields["slot"], strict=True
    )
    assert list(got) == tokens
    ends = itertools.accumulate(part.count for part in slices)
    assert fields["last"] == [end - 1 for end in ends] + [0] * more_rows


@given(batches("decode"), st.integers(0, 3))
def test_decode(slices, more_rows):
    extent = 1 + max(max(part.blocks) for part in slices)
    shape = StepShape.decode(len(slices) + more_rows, extent)
    packed = pack(shape, slices, MEMORY)
    assert packed.dtype == np.int32 and packed.shape == (fields_of(shape).size,)
    fields = {
        name: array.tolist() for name, array in fields_of(shape).split(packed).items()
    }
    rows = [(p.tokens[0], p.start, slot(p, p.start)) for p in slices]
    rows += [(0, 0, SCRATCH * BLOCK)] * more_rows
    got = zip(fields["token"], fields["position"], fields["slot"], strict=True)
    assert list(got) == rows
    assert (fields["owner"], fields["start"]) == owners(slices, extent)


@given(batches("mixed"), st.integers(1, 6), st.lists(st.integers(0, 3), min_size=4))
def test_mixed(slices, decodes, more):
    chunks, last = list(slices), []
    while chunks and chunks[-1].is_decode and len(last) < decodes:
        last.insert(0, chunks.pop())
    extent = 1 + max((max(part.blocks) for part in last), default=-1) + more[0]
    context = sum(len(part.blocks) for part in chunks) + more[1]
    tokens = [(p.tokens[0], p.start, -1, slot(p, p.start)) for p in last]
    ends = list(range(len(last)))
    for row, part in enumerate(chunks):
        for i, token in enumerate(part.tokens):
            position = part.start + i
            tokens.append((token, position, row, slot(part, position)))
        ends.insert(row, len(tokens) - 1)
    shape = StepShape.mixed(
        len(tokens) + more[2], len(slices) + more[3], context, decodes, extent
    )
    packed = pack(shape, slices, MEMORY)
    assert packed.dtype == np.int32 and packed.shape == (fields_of(shape).size,)
    fields = {
        name: array.tolist() for name, array in fields_of(shape).split(packed).items()
    }
    got = zip(
        *(fields[name] for name in ("token", "position", "row", "slot")), strict=True
    )
    assert list(got) == tokens + [(0, 0, -1, SCRATCH * BLOCK)] * more[2]
    assert fields["last"] == ends + [0] * more[3]
    got = zip(
        *(fields[f"chunk_{name}"] for name in ("block", "owner", "start")), strict=True
    )
    blocks = [
        (block, row, i * BLOCK)
        for row, part in enumerate(chunks)
        for i, block in enumerate(part.blocks)
    ]
    assert list(got) == blocks + [(SCRATCH, -1, 0)] * more[1]
    assert (fields["owner"], fields["start"]) == owners(last, extent)


@given(batches("decode"), st.integers(0, 3))
def test_sampling_parameters(slices, more_rows):
    packed = sampling.pack(slices, len(slices) + more_rows)
    floats = packed.view(np.float32)
    for row, part in enumerate(slices):
        params = part.request.sampling
        assert floats[0, row] == np.float32(params.temperature)
        assert floats[1, row] == np.float32(params.top_p)
        generated = part.start + 1 - part.request.prompt_tokens
        assert packed[2:, row].tolist() == [params.top_k, params.seed, generated]
    assert not packed[:, len(slices) :].any()


def test_fields_split_host_and_device_vectors_alike():
    fields = Fields({"a": 2, "b": 0, "c": 3})
    host = np.arange(5, dtype=np.int32)
    for vector in (host, jnp.asarray(host)):
        parts = {name: part.tolist() for name, part in fields.split(vector).items()}
        assert parts == {"a": [0, 1], "b": [], "c": [2, 3, 4]}
    fields.split(host)["c"][:] = 7
    assert host.tolist() == [0, 1, 7, 7, 7]
