"""The packed vector of a step against a plain restatement, token by token."""

import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.engine import sampling
from disagg_jax.engine.attention.packing import Fields, fields_of, pack
from disagg_jax.engine.attention.paged import UNSEEN
from disagg_jax.programs import StepShape
from disagg_jax.request import Sampling
from disagg_jax.work import Slice
from tests.engine.harness import make_request

POOL, SCRATCH = 120, 120


@st.composite
def batches(draw, kind: str):
    """Slices of up to 5 requests, with blocks of `memory` that lie scattered.

    In a mixed one decodes come last.
    """
    block = draw(st.sampled_from([1, 4, 16, 64]))
    memory = KVMemory(num_blocks=POOL, block_tokens=block, max_context=300)
    free = draw(st.permutations(range(POOL)))
    slices = []
    requests = draw(st.integers(1, 5))
    chunks = {"prefill": requests, "decode": 0}.get(kind)
    chunks = draw(st.integers(0, requests)) if chunks is None else chunks
    for id in range(requests):
        size = draw(st.integers(1, 11) | st.integers(max(1, block - 1), 2 * block + 1))
        start, count = (0, size) if id < chunks else (2 * size, 1)
        if kind == "mixed" and id < chunks:
            start = draw(st.integers(0, 12) | st.integers(0, block))
        n = memory.blocks_for(start + count)
        blocks, free = tuple(free[:n]), free[n:]
        tokens = tuple(range(200 * id, 200 * id + count))
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
    return memory, slices


def slot(part: Slice, position: int, block: int) -> int:
    return part.blocks[position // block] * block + position % block


def entries(slices, block: int, padding: int) -> list[tuple[int, int, int]]:
    """Each block that a decode attends to: its row, and where in the request it is."""
    found = [
        (id, row, i * block)
        for row, part in enumerate(slices)
        for i, id in enumerate(part.blocks)
    ]
    return found + [(SCRATCH, max(0, len(slices) - 1), UNSEEN)] * padding


def packed_fields(shape: StepShape, slices, memory: KVMemory) -> dict[str, list[int]]:
    """The fields of the packed vector."""
    fields = fields_of(shape, memory.block_tokens)
    packed = pack(shape, slices, memory)
    assert packed.dtype == np.int32 and packed.shape == (fields.size,)
    return {name: array.tolist() for name, array in fields.split(packed).items()}


def assert_written(fields, chunks, first: int, block: int) -> None:
    """Each token goes to its slot, in blocks that are written whole and once.

    Args:
      first: the first token of the chunks.
    """
    ids, tokens = fields["write_block"], fields["write_token"]
    assert len(tokens) == len(ids) * block
    goes = [
        (id, [token if token >= 0 else None for token in tokens[i : i + block]])
        for i, id in zip(range(0, len(tokens), block), ids, strict=True)
    ]
    want, at = [], first
    for part in chunks:
        slots = {slot(part, part.start + i, block): at + i for i in range(part.count)}
        for id in part.blocks[part.start // block :]:
            want.append((id, [slots.get(id * block + i) for i in range(block)]))
        at += part.count
    assert goes == want + [(SCRATCH, [None] * block)] * (len(goes) - len(want))


@given(batches("prefill"), st.integers(0, 9), st.integers(0, 3))
def test_prefill(batch, more_tokens, more_rows):
    memory, slices = batch
    total = sum(part.count for part in slices)
    shape = StepShape.prefill(total + more_tokens, len(slices) + more_rows)
    fields = packed_fields(shape, slices, memory)
    tokens = [
        (part.tokens[i], i, row)
        for row, part in enumerate(slices)
        for i in range(part.count)
    ]
    tokens += [(0, 0, -1)] * more_tokens
    got = zip(fields["token"], fields["position"], fields["row"], strict=True)
    assert list(got) == tokens
    assert_written(fields, slices, 0, memory.block_tokens)
    ends = itertools.accumulate(part.count for part in slices)
    assert fields["last"] == [end - 1 for end in ends] + [0] * more_rows


@given(batches("decode"), st.integers(0, 3), st.integers(0, 3))
def test_decode(batch, more_rows, more_blocks):
    memory, slices = batch
    block = memory.block_tokens
    attended = sum(len(part.blocks) for part in slices)
    shape = StepShape.decode(len(slices) + more_rows, attended + more_blocks)
    fields = packed_fields(shape, slices, memory)
    rows = [(p.tokens[0], p.start, slot(p, p.start, block)) for p in slices]
    rows += [(0, 0, SCRATCH * block)] * more_rows
    got = zip(fields["token"], fields["position"], fields["slot"], strict=True)
    assert list(got) == rows
    got = zip(fields["block"], fields["owner"], fields["start"], strict=True)
    assert list(got) == entries(slices, block, more_blocks)


@given(batches("mixed"), st.integers(1, 6), st.lists(st.integers(0, 3), min_size=4))
def test_mixed(batch, decodes, more):
    memory, slices = batch
    block = memory.block_tokens
    chunks, last = list(slices), []
    while chunks and chunks[-1].is_decode and len(last) < decodes:
        last.insert(0, chunks.pop())
    attended = sum(len(part.blocks) for part in last)
    context = sum(len(part.blocks) for part in chunks) + more[1]
    tokens = [(p.tokens[0], p.start, -1) for p in last]
    ends = list(range(len(last)))
    for row, part in enumerate(chunks):
        for i, token in enumerate(part.tokens):
            tokens.append((token, part.start + i, row))
        ends.insert(row, len(tokens) - 1)
    shape = StepShape.mixed(
        len(tokens) + more[2],
        len(slices) + more[3],
        context,
        decodes,
        attended + more[0],
    )
    fields = packed_fields(shape, slices, memory)
    got = zip(*(fields[name] for name in ("token", "position", "row")), strict=True)
    assert list(got) == tokens + [(0, 0, -1)] * more[2]
    assert fields["last"] == ends + [0] * more[3]
    assert_written(fields, chunks, len(last), block)
    slots = [slot(part, part.start, block) for part in last]
    assert fields["slot"] == slots + [SCRATCH * block] * (decodes - len(last))
    got = zip(
        *(fields[f"chunk_{name}"] for name in ("block", "owner", "start")), strict=True
    )
    blocks = [
        (id, row, i * block)
        for row, part in enumerate(chunks)
        for i, id in enumerate(part.blocks)
    ]
    assert list(got) == blocks + [(SCRATCH, -1, 0)] * more[1]
    got = zip(fields["block"], fields["owner"], fields["start"], strict=True)
    assert list(got) == entries(last, block, more[0])


def test_chunks_that_all_cross_an_edge_have_room():
    """Of all steps with so many tokens and rows they write the most blocks."""
    memory = KVMemory(num_blocks=POOL, block_tokens=16, max_context=300)
    slices = [
        Slice(make_request(row, 1, 1), 15, 2, True, (2 * row, 2 * row + 1), (7, 8))
        for row in range(5)
    ]
    shape = StepShape.mixed(10, 5, context=30, decodes=3, blocks=0)
    fields = packed_fields(shape, slices, memory)
    assert fields["write_block"] == list(range(10))
    assert_written(fields, slices, 0, 16)


@given(batches("decode"), st.integers(0, 3))
def test_sampling_parameters(batch, more_rows):
    _, slices = batch
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
