"""vLLM V1: schedules worked out by hand, and where they are Sarathi-Serve's."""

from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.policy_check import check_run
from disagg_jax.work import Arrived
from tests.serving import (
    Run,
    assert_all_free,
    make_controller,
    make_request,
    with_prompt,
)

BUDGET, SEQS = 8, 4  # tokens and requests; blocks have 4 tokens
VLLM = {Role.COLOCATED: RunningFirst(max_batched_tokens=BUDGET, max_seqs=SEQS)}


SARATHI = {Role.COLOCATED: SarathiServe(token_budget=BUDGET, max_seqs=SEQS)}


def schedule(*lengths, blocks, policies=VLLM):
    """The tokens of each request in each step; (prompt, output) of each are given."""
    controller = make_controller(blocks=blocks, policies=policies)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, 0.0, *both)) for i, both in enumerate(lengths)))
    run.finish()
    assert_all_free(controller)
    return [{part.request.id: part.count for part in s.slices} for s in run.steps]


def test_one_budget_for_decodes_and_pieces_of_prompts():
    # 5 + 3 tokens; then a decode, the other 6, and the one token that is left.
    assert schedule((5, 3), (9, 2), (2, 1), blocks=100) == [
        {0: 5, 1: 3},
        {0: 1, 1: 6, 2: 1},
        {0: 1, 1: 1, 2: 1},
    ]


def test_a_begun_prompt_holds_the_blocks_of_its_chunks_only():
    # 0 takes a second block for its fifth token, and is gone when 1 needs its fourth.
    # Sarathi-Serve keeps all four for 1, which must make room then.
    lengths = (4, 2), (16, 1)
    assert schedule(*lengths, blocks=5) == [{0: 4, 1: 4}, {0: 1, 1: 7}, {1: 5}]
    theirs = schedule(*lengths, blocks=5, policies=SARATHI)
    assert theirs == [{0: 4, 1: 4}, {0: 1}, {1: 8}, {1: 8}]


def test_a_begun_prompt_without_a_block_is_computed_again():
    # 1 is admitted with 3 blocks free, which it will need, but takes one for one token.
    # In the third step 0 takes the last block for its ninth token, so 1 makes room, and
    # has too few blocks until 0 ends.
    assert schedule((7, 4), (12, 2), blocks=5) == [
        {0: 7, 1: 1},
        {0: 1, 1: 7},
        {0: 1},
        {0: 1},
        {1: 8},
        {1: 4},
        {1: 1},
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(1, 20), st.integers(1, 6)),
        min_size=1,
        max_size=8,
    )
)
def test_with_memory_enough_its_steps_are_those_of_sarathi_serve(drawn):
    requests = [
        make_request(i, float(at), prompt, out)
        for i, (at, prompt, out) in enumerate(sorted(drawn))
    ]
    memory = KVMemory(num_blocks=1000, block_tokens=4, max_context=100)
    ours, theirs = (check_run(p, memory, requests) for p in (VLLM, SARATHI))
    assert [t.token_s for t in ours] == [t.token_s for t in theirs]
