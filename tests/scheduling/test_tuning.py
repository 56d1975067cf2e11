"""Step sizes of policies from step times that are known by arithmetic."""

import dataclasses
import math
from typing import ClassVar

import pytest

from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import StepLimits
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.tuning import (
    StepSize,
    TuningInputs,
    capped,
    has_rule,
    limited,
    replicated,
    resized,
    tile_multiples,
    tune,
)
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import StepLoad

# Seconds: 10 ms a step, 0.1 ms a prompt token, 0.2 ms a decode.
COST = LinearCost(step_base_s=0.01, prefill_token_s=1e-4, decode_token_s=2e-4)


def linear(load, cost=COST):
    return cost.stages_s(0, load)[0]


def profile(step_s=linear, sizes=(128, 256, 512, 1024), **changes):
    fields = {"prompt_tokens": 300, "output_tokens": 101, "kv_tokens": 10**6}
    return TuningInputs(step_s=step_s, sizes=sizes, **(fields | changes))


# ---- the steps that are timed --------------------------------------------------------


def test_a_mixed_step_has_tokens_as_the_requests_do():
    # 300 prompt tokens and 100 decode steps: a quarter of 512 tokens are decodes, each
    # with 300 + 101 // 2 tokens; 384 prompt tokens are a prompt and the end of another.
    load = profile().mixed(512, max_seqs=200, max_chunks=8)
    assert load == StepLoad(((0, 300), (216, 84)), 128, 128 * 350)


def test_a_system_of_one_prompt_at_a_time_has_a_long_one_in_a_step():
    load = profile().mixed(512, max_seqs=200, max_chunks=1)
    assert load == StepLoad(((0, 384),), 128, 128 * 350)


@pytest.mark.parametrize(
    ("size", "max_seqs", "max_chunks", "chunks"),
    [
        (512, 200, 2, ((0, 300), (216, 84))),  # as many as may be
        (512, 200, 1, ((0, 384),)),
        (1024, 200, 3, ((0, 300), (0, 300), (76, 224))),
        (1024, 200, 2, ((0, 300), (0, 524))),
        (800, 200, 2, ((0, 300), (0, 300))),  # no part of a third
    ],
)
def test_prompts_beyond_the_chunks_of_a_step_make_its_last_one_longer(
    size, max_seqs, max_chunks, chunks
):
    load = profile().mixed(size, max_seqs, max_chunks)
    assert load.chunks == chunks
    assert load.prompt_tokens + load.decodes == size


@pytest.mark.parametrize(("size", "decodes"), [(128, 51), (129, 51), (130, 52)])
def test_decodes_of_a_step_are_rounded_down(size, decodes):
    # 300 prompt tokens, 200 decode steps: 40 %, so 51.2, 51.6 and 52 of them.
    assert profile(output_tokens=201).decodes(size, 200) == decodes


@pytest.mark.parametrize(
    ("max_seqs", "kv_tokens", "decodes"),
    [(16, 10**6, 16), (200, 7 * 350 + 349, 7), (200, 349, 0)],
)
def test_limit_and_memory_leave_more_of_a_step_to_prompts(max_seqs, kv_tokens, decodes):
    load = profile(kv_tokens=kv_tokens).mixed(512, max_seqs, 8)
    assert load.decodes == decodes
    assert load.prompt_tokens == 512 - decodes


def test_requests_of_one_token_never_decode():
    assert profile(output_tokens=1).mixed(512, 200, 8).decodes == 0


# ---- each system's rule --------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpot_s", "size"),
    # A quarter of n tokens decode: 10 ms + n (0.75 x 0.1 + 0.25 x 0.2 ms) is 26 ms for
    # 128, 42 for 256, 74 for 512, 138 for 1024.
    [(0.0739, 256), (0.0741, 512), (1.0, 1024)],
)
@pytest.mark.parametrize(
    ("policy", "parameter"),
    [
        (SarathiServe(max_seqs=256), "token_budget"),
        (RunningFirst(), "max_batched_tokens"),
    ],
)
def test_the_largest_step_within_the_target_is_taken(policy, parameter, tpot_s, size):
    tuned = tune(policy, profile(), tpot_s)
    assert tuned.policy == dataclasses.replace(policy, **{parameter: size})
    assert tuned.choice.parameter == parameter
    assert f" of {tpot_s * 1e3:.3g} ms" in tuned.choice.reason


def test_a_step_that_takes_just_the_target_is_within_it():
    def step_s(load):
        return (load.prompt_tokens + load.decodes) / 1024  # exact in binary

    asked = profile(step_s)
    for policy in (SarathiServe(max_seqs=100), SplitFuse(max_seqs=100)):
        reason = tune(policy, asked, 0.5).choice.reason
        assert "slower" not in reason
    assert tune(SarathiServe(max_seqs=100), asked, 0.5).choice.value == 512
    assert tune(SarathiServe(max_seqs=100), asked, 0.49).choice.value == 256


@pytest.mark.parametrize("policy", [Sarathi(), SarathiServe(), SplitFuse()])
def test_where_no_step_is_fast_enough_the_smallest_is_taken(policy):
    tuned = tune(policy, profile(), tpot_s=0.02)
    assert tuned.choice.value == 128
    assert "of 20 ms, and all others are slower" in tuned.choice.reason


def test_splitfuse_takes_the_step_where_throughput_levels_off():
    # n / (10 ms + 0.1 n ms): 5.6, 7.2, 8.4 and 9.1 tokens/ms; 90 % of 9.1 is 8.2.
    assert tune(SplitFuse(), profile(), 1.0).choice.value == 512
    # Of the steps within 50 ms, 128 and 256, the latter by 7.2 to 5.6.
    tuned = tune(SplitFuse(), profile(), 0.05)
    assert tuned.policy == SplitFuse(token_budget=256, max_seqs=256)


def test_the_prefill_side_takes_the_prompt_that_saturates_whatever_the_target():
    for tpot_s in (0.001, 1.0):
        tuned = tune(PrefillOnly(), profile(), tpot_s)
        assert tuned.policy == PrefillOnly(token_budget=512)
        assert "8366 tokens/s" in tuned.choice.reason


def test_the_prefill_side_is_asked_for_one_prompt_of_each_length():
    loads = []

    def step_s(load):
        loads.append(load)
        return 1.0

    tune(PrefillOnly(), profile(step_s), 1.0)
    assert loads == [StepLoad(((0, n),), 0, 0) for n in (128, 256, 512, 1024)]


def test_sarathi_takes_the_chunk_with_the_highest_throughput():
    # One prompt of 300 tokens and at most 16 decodes, each step 10 ms and 3.2 ms for
    # the decodes: chunks of 112, 112 and 76 in 3 steps make 348 tokens in 30 + 9.6 + 30
    # ms, 5.0 a ms; 240 and 60 make 332 in 56.4 ms, 5.9; one of 300 makes 316 in 43.2
    # ms, 7.3, and larger ones the same.
    assert tune(Sarathi(max_seqs=16), profile(), 1.0).choice.value == 512
    # 256 tokens take 10 + 24 + 3.2 ms, and 512 take 62.8.
    assert tune(Sarathi(max_seqs=16), profile(), 0.06).choice.value == 256


@pytest.mark.parametrize(
    ("max_seqs", "prompt", "output", "expected"),
    [
        # 2/7 of the tokens decode, at most 100: chunks of 92, 183, 412 and 924 tokens,
        # 11, 6, 3 and 2 for a prompt of 1000. With 36, 73, 100 and 100 decodes in each
        # that is 1396, 1438, 1300 and 1200 tokens in 510, 460, 430 and 420 ms: 2.74,
        # 3.13, 3.02 and 2.86 a ms, of which 90 % are 2.81.
        (100, 1000, 401, 256),
        # One decode: chunks of 127, 255, 511 and 1023 in 8, 4, 2 and 1: 2.10, 2.28,
        # 2.39 and 2.44 tokens a ms, of which 90 % are 2.20.
        (1, 1000, 401, 256),
        # Prompts of 900: chunks 89, 178, 412 and 924 in 11, 6, 3 and 1, with 39, 78,
        # 100 and 100 decodes: 2.83, 3.26, 3.08 and 2.70, of which 90 % are 2.93.
        (100, 900, 401, 256),
    ],
)
def test_every_chunk_of_sarathi_has_its_decodes(max_seqs, prompt, output, expected):
    cost = LinearCost(step_base_s=0.01, prefill_token_s=4e-4)
    asked = profile(
        lambda load: linear(load, cost), prompt_tokens=prompt, output_tokens=output
    )
    assert tune(Sarathi(max_seqs=max_seqs), asked, 10.0).choice.value == expected


def test_sarathi_goes_through_all_of_a_prompt():
    loads = []

    def step_s(load):
        loads.append(load)
        return 1.0

    tune(Sarathi(max_seqs=16), profile(step_s, sizes=(128,)), 2.0)
    chunks = [load.chunks for load in loads[1:]]  # the first is timed for the target
    assert chunks == [((0, 112),), ((112, 112),), ((224, 76),)]
    # Each beside 16 decodes with 300 + 101 // 2 tokens.
    assert {(load.decodes, load.context) for load in loads} == {(16, 16 * 350)}


def test_a_step_that_is_always_free_is_the_smallest():
    for policies in SYSTEMS.values():
        for policy in policies.values():
            choice = tune(policy, profile(lambda load: 0.0), math.inf).choice
            if choice is not None and choice.reason != "the default":
                largest = isinstance(policy, SarathiServe | RunningFirst | NoEvict)
                expected = 1024 if largest else 128
                assert choice.value == expected


@pytest.mark.parametrize(
    ("policy", "chunks"),
    [
        (Sarathi(max_seqs=16), ((0, 496),)),  # one prompt at a time, so a long one
        (SarathiServe(max_seqs=16), ((0, 300), (104, 196))),
        (SplitFuse(max_seqs=16), ((0, 300), (104, 196))),
        (RunningFirst(max_seqs=16), ((0, 300), (104, 196))),
    ],
)
def test_the_step_within_the_target_has_as_many_prompts_as_a_system_takes(
    policy, chunks
):
    loads = []

    def step_s(load):
        loads.append(load)
        return 1.0

    tune(policy, profile(step_s, sizes=(512,)), 2.0)
    assert loads[0] == StepLoad(chunks, 16, 16 * 350)


def test_a_size_whose_prompt_is_free_has_the_highest_throughput():
    def step_s(load):
        return 0.0 if load.prompt_tokens <= 256 else 1.0

    assert tune(PrefillOnly(), profile(step_s), 1.0).choice.value == 128
    dearer = profile(lambda load: 1.0 - step_s(load))  # free from 257 tokens on
    assert tune(PrefillOnly(), dearer, 1.0).choice.value == 512


@pytest.mark.parametrize(
    "policy",
    [Sarathi(max_seqs=16), SarathiServe(max_seqs=256), SplitFuse(), PrefillOnly()],
)
@pytest.mark.parametrize("tpot_s", [0.02, 0.06, 0.08, 1.0])
def test_the_order_of_the_sizes_does_not_matter(policy, tpot_s):
    choices = {
        tune(policy, profile(sizes=sizes), tpot_s).choice
        for sizes in ((128, 256, 512, 1024), (1024, 128, 512, 256))
    }
    assert len(choices) == 1


def test_only_the_papers_with_a_rule_for_the_step_size_have_one():
    named = {type(p) for policies in SYSTEMS.values() for p in policies.values()}
    without = {kind for kind in named if not has_rule(kind())}
    assert without == {Orca, PrefillFirst, DecodeOnly}


def test_orca_and_vllm_v0_have_defaults():
    for policy in (Orca(), PrefillFirst()):
        tuned = tune(policy, profile(), 0.05)
        assert tuned.policy == policy
        assert tuned.choice.reason == "the default"


def test_what_only_decodes_stays_as_it_is():
    tuned = tune(DecodeOnly(), profile(), 0.05, size=7)
    assert (tuned.policy, tuned.choice) == (DecodeOnly(), None)


@dataclasses.dataclass(frozen=True)
class Declares:
    """A policy of one's own with a step size, a rule of its own, and no `max_seqs`."""

    step_size: ClassVar[StepSize] = StepSize(
        "chunk", lambda policy, inputs, tpot_s: (inputs.prompt_tokens, "a prompt")
    )
    chunk: int = 64
    limits: ClassVar[StepLimits] = StepLimits.of_chunks(64, 8)


@dataclasses.dataclass(frozen=True)
class DeclaresNone:
    limits: ClassVar[StepLimits] = StepLimits.of_chunks(64, 8)


def test_an_own_policy_is_tuned_by_the_rule_that_it_declares():
    tuned = tune(Declares(), profile(), 0.05)
    assert tuned.policy == Declares(chunk=300)
    assert tuned.note == "chunk = 300: a prompt"
    assert resized(Declares(), 7) == Declares(chunk=7)
    assert has_rule(Declares())


def test_a_policy_that_declares_no_step_size_is_not_tuned_and_says_so():
    tuned = tune(DeclaresNone(), profile(), 0.05, size=7)
    assert (tuned.policy, tuned.choice) == (DeclaresNone(), None)
    assert tuned.note == "not tuned: DeclaresNone declares no step size"
    assert tune(DecodeOnly(), profile(), 0.05).note == ""  # nothing to tune


def test_a_step_size_that_is_no_field_is_refused():
    class Wrong(Declares):
        step_size = StepSize("budget")

    with pytest.raises(ValueError, match="Wrong.step_size: .* of its fields, got 'bu"):
        tune(Wrong(), profile(), 0.05)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SarathiServe(), SarathiServe(token_budget=64, max_seqs=64)),
        (SplitFuse(), SplitFuse(token_budget=64, max_seqs=64)),
        (RunningFirst(), RunningFirst(max_batched_tokens=64, max_seqs=64)),
        (Sarathi(max_seqs=16), Sarathi(chunk_tokens=64, max_seqs=16)),
        (PrefillFirst(), PrefillFirst(max_batched_tokens=64)),
        (Orca(), Orca(max_batched_tokens=64)),
        # Its decodes come beside the prompts, not out of their tokens.
        (Orca(max_seqs=100), Orca(max_seqs=100, max_batched_tokens=64)),
        (PrefillOnly(), PrefillOnly(token_budget=64)),
    ],
)
def test_a_given_size_is_taken_and_the_step_has_room_for_all_decodes(policy, expected):
    tuned = tune(policy, profile(), 0.05, size=64)
    assert tuned.policy == expected
    assert str(tuned.choice).endswith("= 64: given")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SarathiServe(), SarathiServe(token_budget=64, max_seqs=16)),
        (SplitFuse(), SplitFuse(token_budget=64, max_seqs=16)),
        (RunningFirst(max_seqs=4), RunningFirst(max_batched_tokens=64, max_seqs=4)),
        (PrefillOnly(token_budget=8), PrefillOnly(token_budget=8, max_seqs=16)),
        (DecodeOnly(), DecodeOnly(max_seqs=16)),
        (Declares(), Declares()),  # has no max_seqs
        (DeclaresNone(), DeclaresNone()),
    ],
)
def test_a_policy_within_other_sizes_keeps_what_is_smaller(policy, expected):
    assert capped(policy, tokens=64, rows=16) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (PrefillFirst(), PrefillFirst(max_batched_tokens=1024, max_seqs=2000)),
        # Decodes share the step, so they are no more than its tokens.
        (RunningFirst(), RunningFirst(max_batched_tokens=1024, max_seqs=1024)),
        (SarathiServe(), SarathiServe(token_budget=1024, max_seqs=1024)),
        (PrefillOnly(), PrefillOnly(token_budget=1024, max_seqs=2000)),
        (DecodeOnly(watermark=0.5), DecodeOnly(max_seqs=2000, watermark=0.5)),
        (Declares(), Declares(chunk=1024)),  # has no max_seqs
        (DeclaresNone(), DeclaresNone()),
    ],
)
def test_a_policy_gets_other_limits_where_it_has_such(policy, expected):
    assert limited(policy, tokens=1024, rows=2000) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SarathiServe(), SarathiServe(token_budget=1536, max_seqs=384)),
        (DecodeOnly(), DecodeOnly(max_seqs=768)),
        (Declares(chunk=7), Declares(chunk=21)),
        (DeclaresNone(), DeclaresNone()),
    ],
)
def test_replicas_have_their_limits_together(policy, expected):
    assert replicated(policy, 3) == expected


def test_the_largest_size_to_choose_need_not_be_a_tile():
    assert tile_multiples(128, most=600) == (128, 256, 384, 512, 600)
    assert tile_multiples(128, most=512) == (128, 256, 384, 512)
    assert tile_multiples(128, most=8192) == (*tile_multiples(128), 8192)


def test_rows_are_no_more_than_the_tokens_of_a_capped_step():
    assert capped(RunningFirst(), tokens=64, rows=100).max_seqs == 64


def test_profiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="sizes: expected at least one"):
        profile(sizes=())
    for name in ("prompt_tokens", "output_tokens", "kv_tokens"):
        with pytest.raises(ValueError, match="expected tokens >= 1, got 0"):
            profile(**{name: 0})


def test_sizes_are_tile_multiples():
    assert tile_multiples(64)[:3] == (64, 128, 192)
    sizes = tile_multiples()
    assert all(size % 128 == 0 for size in sizes)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (128, 4096)
