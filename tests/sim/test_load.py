"""What a step's duration depends on: only loads that a step can have."""

import pytest

from disagg_jax.sim.load import StepLoad


@pytest.mark.parametrize(
    ("chunks", "decodes", "context"),
    [(((0, 1),), 0, 0), (((5, 3), (0, 2)), 2, 9), ((), 1, 1)],
)
def test_a_load_holds_what_it_was_given(chunks, decodes, context):
    load = StepLoad(chunks, decodes, context)
    assert (load.chunks, load.decodes, load.context) == (chunks, decodes, context)


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


@pytest.mark.parametrize(
    ("chunks", "decodes", "context", "message"),
    [
        ((), 0, 0, "expected a chunk or a decode, got neither"),
        (((0, 0),), 0, 0, r"chunks: expected .* got \(0, 0\)"),
        (((-1, 4),), 0, 0, r"chunks: expected .* got \(-1, 4\)"),
        ((), 3, 2, "got 3, 2"),  # each attends at least to itself
        (((0, 1),), 0, 5, "got 0, 5"),  # context that no one attends to
        ((), -1, 0, "got -1, 0"),
    ],
)
def test_what_no_step_computes_is_refused(chunks, decodes, context, message):
    with pytest.raises(ValueError, match=message):
        StepLoad(chunks, decodes, context)
