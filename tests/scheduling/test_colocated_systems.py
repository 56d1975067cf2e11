"""The colocated systems side by side: one situation, and what each runs next."""

import dataclasses

import pytest

from disagg_jax.deployment import Role
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.work import Arrived
from tests.instances import ROWS, case, make_instance, planned
from tests.serving import Run, make_controller, with_prompt

# Steps of 8 tokens, blocks of 4, at most 4 requests.
POLICIES = {
    "orca": Orca(max_batched_tokens=8, max_seqs=4),
    "vllm_v0": PrefillFirst(max_batched_tokens=8, max_seqs=4),
    "vllm_v1": RunningFirst(max_batched_tokens=8, max_seqs=4),
    "tensorrt_llm": NoEvict(max_batched_tokens=8, max_seqs=4),
    "sarathi": Sarathi(chunk_tokens=8, max_seqs=4),
    "sarathi_serve": SarathiServe(token_budget=8, max_seqs=4),
    "splitfuse": SplitFuse(token_budget=8, max_seqs=4),
}

# name -> (places, {system: what it runs, or (what it runs, whom it preempts)})
SITUATIONS = {
    "a long prompt comes while others decode": (
        {"running": {0: 2, 1: 2}, "waiting": {2: 20}},
        {
            "orca": {0: 1, 1: 1, 2: 20},
            "vllm_v0": {2: 20},
            "sarathi": {0: 1, 1: 1, 2: 6},
            "vllm_v1": {0: 1, 1: 1, 2: 6},
            "tensorrt_llm": {0: 1, 1: 1, 2: 6},
            "sarathi_serve": {0: 1, 1: 1, 2: 6},
            "splitfuse": {0: 1, 1: 1, 2: 6},
        },
    ),
    "short prompts come while one decodes": (
        {"running": {0: 2}, "waiting": {1: 3, 2: 3}},
        {
            "orca": {0: 1, 1: 3, 2: 3},
            "vllm_v0": {1: 3, 2: 3},
            "sarathi": {0: 1, 1: 3},
            "vllm_v1": {0: 1, 1: 3, 2: 3},
            "tensorrt_llm": {0: 1, 1: 3, 2: 3},
            "sarathi_serve": {0: 1, 1: 3, 2: 3},
            "splitfuse": {0: 1, 1: 3, 2: 3},
        },
    ),
    "the second prompt does not fit into the step": (
        {"running": {0: 2}, "waiting": {1: 3, 2: 9}},
        {
            "orca": {0: 1, 1: 3},
            "vllm_v0": {1: 3},
            "sarathi": {0: 1, 1: 3},
            "vllm_v1": {0: 1, 1: 3, 2: 4},
            "tensorrt_llm": {0: 1, 1: 3, 2: 4},
            "sarathi_serve": {0: 1, 1: 3, 2: 4},
            "splitfuse": {0: 1, 1: 3, 2: 4},
        },
    ),
    "a prompt was begun": (
        {"running": {0: 2}, "partial": {1: (9, 4)}, "waiting": {2: 3}},
        {
            "sarathi": {0: 1, 1: 5},
            "vllm_v1": {0: 1, 1: 5, 2: 2},
            "tensorrt_llm": {0: 1, 1: 5, 2: 2},
            "sarathi_serve": {0: 1, 1: 5, 2: 2},
            "splitfuse": {0: 1, 1: 5, 2: 2},
        },
    ),
    "two prompts were begun": (
        {"partial": {0: (9, 4), 1: (9, 4)}},
        {
            "sarathi": {0: 5},
            "vllm_v1": {0: 5, 1: 3},
            "tensorrt_llm": {0: 5, 1: 3},
            "sarathi_serve": {0: 5, 1: 3},
            "splitfuse": {0: 5, 1: 3},
        },
    ),
    "blocks for the prompt, not for its output": (
        {"running": {0: 2}, "waiting": {1: 4}, "free": 2, "out": 9},
        {
            "orca": {0: 1},
            "vllm_v0": {1: 4},
            "sarathi": {0: 1},
            "vllm_v1": {0: 1, 1: 4},
            "tensorrt_llm": {0: 1},
            "sarathi_serve": {0: 1, 1: 4},
            "splitfuse": {0: 1, 1: 4},
        },
    ),
    "just the blocks for the prompt and its output": (
        # 4 + 8 tokens are cached in the end: the KV of the ninth is never needed.
        {"running": {0: 2}, "waiting": {1: 4}, "free": 3, "out": 9},
        {
            "orca": {0: 1, 1: 4},
            "vllm_v0": {1: 4},
            "sarathi": {0: 1, 1: 4},
            "vllm_v1": {0: 1, 1: 4},
            "tensorrt_llm": {0: 1, 1: 4},
            "sarathi_serve": {0: 1, 1: 4},
            "splitfuse": {0: 1, 1: 4},
        },
    ),
    "just the blocks for the prompt": (
        {"running": {0: 2}, "waiting": {1: 8}, "free": 2},
        {
            "orca": {0: 1, 1: 8},
            "vllm_v0": {1: 8},
            "sarathi": {0: 1, 1: 7},
            "vllm_v1": {0: 1, 1: 7},
            "tensorrt_llm": {0: 1, 1: 7},
            "sarathi_serve": {0: 1, 1: 7},
            "splitfuse": {0: 1, 1: 7},
        },
    ),
    "blocks for a part of the prompt only": (
        {"running": {0: 2}, "waiting": {1: 20}, "free": 4},
        dict.fromkeys(POLICIES, {0: 1}),
    ),
    "decodes take the block that a prompt would need": (
        {"running": {0: 5}, "waiting": {1: 4}, "free": 1},
        {
            "vllm_v0": {1: 4},
            "vllm_v1": {0: 1},
            "sarathi_serve": {0: 1},
            "splitfuse": {0: 1},
        },
    ),
    "a block for one of two decodes": (
        {"running": {0: 5, 1: 5}, "waiting": {2: 3}, "free": 1, "out": 9},
        {
            "vllm_v0": {2: 3},
            "vllm_v1": ({0: 1}, [1]),
            "sarathi_serve": ({0: 1}, [1]),
            "splitfuse": {0: 1},
        },
    ),
    "no block for any decode": (
        {"running": {0: 5, 1: 5}, "free": 0, "out": 9},
        {
            "vllm_v0": ({0: 1}, [1]),
            "vllm_v1": ({0: 1}, [1]),
            "sarathi_serve": ({0: 1}, [1]),
            "splitfuse": ({}, [1]),
        },
    ),
    "who makes room frees the block that a prompt would need too": (
        {"running": {0: 5, 1: 8}, "waiting": {2: 3}, "free": 0, "out": 9},
        {
            "vllm_v0": ({0: 1}, [1]),
            "vllm_v1": ({0: 1}, [1]),
            "sarathi_serve": ({0: 1}, [1]),
            "splitfuse": {1: 1},
        },
    ),
    "a prompt that was begun came last": (
        {"running": {0: 5}, "partial": {1: (9, 8)}, "free": 0, "out": 9},
        {
            "vllm_v1": ({0: 1}, [1]),
            "sarathi_serve": ({0: 1}, [1]),
            "splitfuse": ({}, [0]),
        },
    ),
    "who makes room for a decode does not for a prompt that was begun before": (
        {"running": {1: 5, 2: 2}, "partial": {0: (13, 4)}, "free": 0, "out": 9},
        # vLLM: in order of arrival, and 8 tokens of the prompt need two blocks more.
        {"sarathi_serve": ({0: 7, 1: 1}, [2]), "vllm_v1": ({0: 8}, [2, 1])},
    ),
    "a prompt was begun before a request that decodes": (
        {"partial": {0: (13, 4)}, "running": {1: 2}, "out": 9},
        {
            "vllm_v1": {0: 8},
            "sarathi_serve": {0: 7, 1: 1},
            "splitfuse": {0: 7, 1: 1},
        },
    ),
    "the rest of a begun prompt needs a block, and none is free": (
        # make_instance gives it the blocks of its cached tokens only.
        {"running": {0: 2}, "partial": {1: (9, 8)}, "free": 0, "out": 9},
        {"vllm_v1": ({0: 1}, [1]), "splitfuse": {0: 1}},
    ),
    "a prompt that comes last makes room for one that was begun": (
        {"partial": {0: (9, 8), 1: (9, 4)}, "waiting": {2: 1}, "free": 0, "out": 9},
        {"vllm_v1": ({0: 1}, [1])},
    ),
    "as many decode as a step may have": (
        {"running": {0: 2, 1: 2, 2: 2, 3: 2}, "waiting": {4: 1}},
        dict.fromkeys(POLICIES, {0: 1, 1: 1, 2: 1, 3: 1}),
    ),
    "room for one more request": (
        {"running": {0: 2, 1: 2, 2: 2}, "waiting": {3: 1, 4: 1}},
        {
            "orca": {0: 1, 1: 1, 2: 1, 3: 1},
            "vllm_v0": {3: 1},
            "sarathi": {0: 1, 1: 1, 2: 1, 3: 1},
            "vllm_v1": {0: 1, 1: 1, 2: 1, 3: 1},
            "tensorrt_llm": {0: 1, 1: 1, 2: 1, 3: 1},
            "sarathi_serve": {0: 1, 1: 1, 2: 1, 3: 1},
            "splitfuse": {0: 1, 1: 1, 2: 1, 3: 1},
        },
    ),
    "nothing to do": ({}, dict.fromkeys(POLICIES, {})),
}


@pytest.mark.parametrize(
    ("places", "system", "expected"),
    [
        pytest.param(places, system, expected, id=f"{name}: {system}")
        for name, (places, systems) in SITUATIONS.items()
        for system, expected in systems.items()
    ],
)
def test_what_each_system_runs_next(places, system, expected):
    slices, preempted = expected if isinstance(expected, tuple) else (expected, [])
    instance = make_instance(**places)
    assert planned(POLICIES[system], instance) == (slices, preempted)


WATERMARK = [
    case(  # 1 + 9 blocks, 5 of them in reserve: 4 can be given away, no fifth
        "admission leaves the watermark free",
        {0: 1, 1: 16},
        waiting={1: 16, 2: 1},
        running={0: 2},
        free=9,
    ),
    case("an empty instance admits one below it", {0: 36}, waiting={0: 36}, free=10),
    case("but no second", {0: 36}, waiting={0: 36, 1: 1}, free=10),
]


@pytest.mark.parametrize(ROWS, WATERMARK)
def test_watermark_of_sarathi_serve(places, limits, expected, preempt):
    policy = SarathiServe(token_budget=64, max_seqs=4, watermark=0.5)
    assert planned(policy, make_instance(**places)) == (expected, preempt)


@pytest.mark.parametrize(ROWS, WATERMARK)
def test_watermark_of_vllm_v1(places, limits, expected, preempt):
    policy = RunningFirst(max_batched_tokens=64, max_seqs=4, watermark=0.5)
    assert planned(policy, make_instance(**places)) == (expected, preempt)


def test_vllm_v1_admits_up_to_the_last_block_and_sarathi_serve_does_not():
    # One of 100 blocks is the share that Sarathi-Serve leaves free.
    places = {"running": {0: 2}, "waiting": {1: 4 * 99}, "free": 99}
    vllm = RunningFirst(max_batched_tokens=8, max_seqs=4)
    assert planned(vllm, make_instance(**places)) == ({0: 1, 1: 7}, [])
    assert planned(POLICIES["sarathi_serve"], make_instance(**places)) == ({0: 1}, [])


def test_reservations():
    """What a request of 6 + 9 tokens gets with a first chunk of 4: blocks for how many.

    Orca, SARATHI and TensorRT-LLM hold its longest case; Sarathi-Serve its prompt;
    SplitFuse and vLLM V1 what the chunk needs.
    """
    expected = {"orca": 14, "vllm_v0": 6, "sarathi": 14, "sarathi_serve": 6}
    expected |= {"splitfuse": 4, "vllm_v1": 4, "tensorrt_llm": 14}
    sizes = {"sarathi": "chunk_tokens", "vllm_v1": "max_batched_tokens"}
    sizes |= {"tensorrt_llm": "max_batched_tokens"}
    for system, reserve in expected.items():
        policy = dict(POLICIES)[system]
        if system not in ("orca", "vllm_v0"):
            name = sizes.get(system, "token_budget")
            policy = dataclasses.replace(policy, **{name: 4})
        (chunk,) = policy.plan(make_instance(waiting={0: 6}, out=9)).chunks
        assert (system, chunk.reserve) == (system, reserve)


@pytest.mark.parametrize(
    ("places", "lasts"),
    [
        ({"running": {0: 5, 1: 5}, "free": 2}, True),
        ({"running": {0: 5, 1: 5}, "free": 1}, False),  # 1 sits out
        ({"running": dict.fromkeys(range(5), 2)}, False),  # one more than a step has
        ({"running": {0: 2}, "waiting": {1: 3}}, False),
    ],
)
def test_a_step_of_splitfuse_is_repeated_while_all_that_run_decode(places, lasts):
    plan = POLICIES["splitfuse"].plan(make_instance(**places, out=9))
    assert (plan.repeats > 1) == lasts


def test_only_splitfuse_sends_its_victim_to_the_back():
    full = {"running": {0: 5, 1: 5}, "free": 0, "out": 9}
    plans = {name: p.plan(make_instance(**full)) for name, p in POLICIES.items()}
    backs = {name for name, plan in plans.items() if plan.preempt and plan.to_back}
    assert backs == {"splitfuse"}


@pytest.mark.parametrize(
    ("system", "queue"),
    [
        ("vllm_v0", [1, 2]),
        ("vllm_v1", [1, 2]),
        ("sarathi_serve", [1, 2]),
        ("splitfuse", [2, 1]),
    ],
)
def test_where_a_victim_queues(system, queue):
    # Prompts 0 and 1 fill the 2 blocks and the step, 2 waits. To go on, 0 needs the
    # block of 1.
    policies = {Role.COLOCATED: POLICIES[system]}
    controller = make_controller(blocks=2, policies=policies)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=4)) for i in range(3)))
    run.turn()
    (instance,) = controller.instances
    assert [s.id for s in instance.stepping] == [0]
    assert [s.id for s in instance.waiting] == queue


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("sarathi", {"chunk_tokens": 3}, "Sarathi.chunk_tokens: .* max_seqs .4.*got 3"),
        (
            "sarathi_serve",
            {"token_budget": 3},
            "SarathiServe.token_budget: expected >= max_seqs .4.*got 3",
        ),
        (
            "splitfuse",
            {"token_budget": 3},
            "SplitFuse.token_budget: expected >= max_seqs .4.*got 3",
        ),
        (
            "vllm_v1",
            {"max_batched_tokens": 3},
            "RunningFirst.max_batched_tokens: expected >= max_seqs .4.*got 3",
        ),
        ("vllm_v1", {"watermark": 2.0}, "watermark: expected in .0, 1., got 2"),
        ("orca", {"max_seqs": 0}, "Orca.max_seqs: expected >= 1, got 0"),
        ("orca", {"max_batched_tokens": 0}, "max_batched_tokens: expected >= 1"),
        ("splitfuse", {"max_seqs": 0}, "SplitFuse.max_seqs: expected >= 1, got 0"),
        ("sarathi_serve", {"watermark": 2.0}, "watermark: expected in .0, 1., got 2"),
    ],
)
def test_impossible_parameters_are_refused(system, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POLICIES[system], **changes)


def test_steps_stay_within_the_limits_a_system_states():
    """What an engine compiles programs for; with all queues longer than the limits."""
    crowd = {
        "running": {0: 2, 1: 2},
        "waiting": {id: 5 for id in range(2, 30)},
        "out": 3,
    }
    for name in POLICIES:
        policy = POLICIES[name]
        plan, limits = policy.plan(make_instance(**crowd)), policy.limits
        assert sum(c.tokens for c in plan.chunks) <= limits.prefill_tokens
        assert 0 < len(plan.chunks) <= limits.prefill_rows
        assert len(plan.decodes) <= limits.decode_rows
        assert limits.mixed or not plan.decodes
        whole = all(c.tokens == c.request.num_tokens for c in plan.chunks)
        assert whole or limits.splits
        total = sum(c.tokens for c in plan.chunks) + len(plan.decodes)
        assert total <= limits.prefill_tokens or not limits.splits


def test_every_colocated_system_is_compared_here():
    systems = {n for n, roles in SYSTEMS.items() if Role.COLOCATED in roles}
    assert systems == set(POLICIES)
