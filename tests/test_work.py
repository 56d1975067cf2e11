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
