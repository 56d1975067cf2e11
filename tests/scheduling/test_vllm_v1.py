"""vLLM V1: schedules worked out by hand, and where they are Sarathi-Serve's."""

import functools

from hypothesis import given

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.policy_check import check_run
from tests.scheduling import small_steps
from tests.scheduling.small_steps import BUDGET, LOADS, SARATHI, SEQS, requests

VLLM = {Role.COLOCATED: RunningFirst(max_batched_tokens=BUDGET, max_seqs=SEQS)}
schedule = functools.partial(small_steps.schedule, policies=VLLM)


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


@given(LOADS)
def test_with_memory_enough_its_steps_are_those_of_sarathi_serve(drawn):
    memory = KVMemory(num_blocks=1000, block_tokens=4, max_context=100)
    ours, theirs = (check_run(p, memory, requests(drawn)) for p in (VLLM, SARATHI))
    assert [t.token_s for t in ours] == [t.token_s for t in theirs]
