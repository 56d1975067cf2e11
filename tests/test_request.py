"""Requests refuse what cannot be served, and know when to stop."""

import math

import pytest

from disagg_jax.request import Request, Sampling, Timeline
from tests.serving import make_request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature: expected >= 0, got -0\.1"),
        ({"temperature": math.nan}, r"temperature: expected >= 0, got nan"),
        ({"top_k": -1}, r"top_k: expected >= 0 \(0 keeps all\), got -1"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, r"top_p: expected in \(0, 1\], got 1\.1"),
        ({"seed": -1}, r"seed: expected in \[0, 2\*\*31\), got -1"),
        ({"seed": 2**31}, r"seed: expected in \[0, 2\*\*31\), got 2147483648"),
    ],
)
def test_sampling_names_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_p": 1.0}, {"seed": 2**31 - 1}, {"top_k": 0}]
)
def test_sampling_allows_its_limits(fields):
    Sampling(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrival_s": -1.0}, r"request 7: expected .*arrival_s.*, got -1\.0"),
        ({"arrival_s": math.nan}, r"request 7: expected .*arrival_s.*, got nan"),
        ({"arrival_s": math.inf}, r"request 7: expected .*arrival_s.*, got inf"),
        (
            {"prompt_tokens": 0},
            r"request 7: expected a prompt of at least one .* got 0",
        ),
        ({"max_tokens": 0}, r"request 7: expected max_tokens >= 1, got 0"),
        ({"prompt": (1,)}, r"request 7: prompt_tokens is 2 but the prompt has 1 token"),
    ],
)
def test_request_names_itself_and_what_is_wrong(fields, message):
    valid = {"id": 7, "arrival_s": 0.0, "prompt_tokens": 2, "max_tokens": 1}
    with pytest.raises(ValueError, match=message):
        Request(**{**valid, **fields})


# Token 0 as end of sequence: it must not be taken for "none".
@pytest.mark.parametrize(
    ("fields", "token", "stops"),
    [
        ({}, 0, False),
        ({"eos_token": 0}, 0, True),
        ({"eos_token": 0}, 1, False),
        ({"eos_token": 0, "ignore_eos": True}, 0, False),
        ({"stop_tokens": frozenset({0, 2})}, 0, True),
        ({"stop_tokens": frozenset({0, 2})}, 1, False),
        ({"stop_tokens": frozenset({0}), "ignore_eos": True}, 0, True),
        ({"stop_tokens": frozenset({0}), "eos_token": 0, "ignore_eos": True}, 0, True),
    ],
)
def test_stop_tokens_stop_always_and_eos_unless_ignored(fields, token, stops):
    assert make_request(**fields).stops_at(token) is stops


def test_timelines_share_no_lists():
    one, other = (Timeline(request=make_request(i)) for i in range(2))
    one.token_s.append(1.0)
    one.tokens.append(1)
    assert (other.token_s, other.tokens) == ([], [])
