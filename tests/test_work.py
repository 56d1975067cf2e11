"""What a step's duration depends on."""

import pytest

from disagg_jax.work import StepLoad


@pytest.mark.parametrize(
    ("chunks", "tokens", "squares"),
    [
        ((), 0, 0),
        (((0, 3), (0, 4)), 7, 25),
        (((2, 3),), 3, 21),  # 25 - 4
        (((0, 2), (2, 3)), 5, 25),  # the chunks of a prompt of 5
    ],
)
def test_tokens_and_squares_of_prompt_parts(chunks, tokens, squares):
    load = StepLoad(chunks, 1, 9)
    assert (load.prompt_tokens, load.prompt_squares) == (tokens, squares)


def test_equal_steps_in_one_have_the_chunks_and_the_context_of_all():
    load = StepLoad(((0, 3), (2, 4)), 2, 9).times(3)
    assert load == StepLoad(((0, 3), (2, 4)) * 3, 6, 27)
