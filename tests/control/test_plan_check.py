"""Plans that no policy may make are refused by the controller, with names."""

import dataclasses

import pytest

from disagg_jax.deployment import Role
from disagg_jax.scheduling.interface import Chunk, Plan, StepLimits
from disagg_jax.work import Arrived
from tests.instances import state
from tests.serving import Run, make_controller, make_request, with_prompt

WHOLE = StepLimits(prefill_tokens=64, prefill_rows=4, decode_rows=4)
SPLITS = dataclasses.replace(WHOLE, prefill_tokens=8, mixed=True, splits=True)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Prefills one prompt after the other until `running` decode; then the script."""

    script: object  # (instance) -> Plan
    limits: StepLimits
    running: int

    def plan(self, instance):
        if len(instance.running) >= self.running:
            return self.script(instance)
        return Plan([Chunk.whole(instance.waiting[0])])


def serve(script, limits=WHOLE, running=0, prompts=(5,) * 6, blocks=1000):
    """Serves `prompts` by such a policy until its script has planned a step."""
    policies = {Role.COLOCATED: Scripted(script, limits, running)}
    run = Run(make_controller(policies=policies, blocks=blocks))
    arrived = [with_prompt(i, prompt=n, out=9) for i, n in enumerate(prompts)]
    run.turn(*map(Arrived, arrived))
    for _ in range(running):
        run.turn()
    return run


def whole(count):
    return lambda instance: Plan([Chunk.whole(r) for r in listed(instance)[:count]])


def first_of(tokens, reserve=5):
    return lambda instance: Plan([Chunk(instance.waiting[0], tokens, reserve)])


def beside(instance):
    return Plan([Chunk.whole(instance.waiting[0])], instance.running)


def listed(instance):
    return list(instance.waiting)


# (script, options, what is wrong with it)
REFUSED = {
    "None": (lambda i: None, {}, "expected a Plan, got NoneType"),
    "prompts": (lambda i: listed(i), {}, "expected a Plan, got list"),
    "rows": (
        lambda i: Plan([Chunk.whole(r) for r in listed(i)]),
        {},
        "prefill_rows=4, got 6 prompts",
    ),
    "one row too many": (whole(5), {}, "prefill_rows=4, got 5 prompts"),
    "tokens": (
        lambda i: Plan([Chunk.whole(r) for r in listed(i)[:2]]),
        {"prompts": (40, 25)},
        "prefill_tokens=64, got 65 tokens of 2 prompts",
    ),
    "tokens beside decodes": (
        lambda i: Plan([Chunk(i.waiting[0], 7, 7)], i.running),
        {"limits": SPLITS, "running": 2, "prompts": (5, 5, 9)},
        "prefill_tokens=8, got 9 tokens, decodes included",
    ),
    "a long prompt where prompts are split": (
        lambda i: Plan([Chunk.whole(i.waiting[0])]),
        {"limits": SPLITS, "prompts": (9,)},
        "prefill_tokens=8, got 9 tokens",
    ),
    "decode rows": (
        lambda i: Plan(decodes=i.running),
        {"limits": dataclasses.replace(WHOLE, decode_rows=1), "running": 2},
        "decode_rows=1, got 2 requests that decode",
    ),
    "mixed": (beside, {"running": 1}, "mixed=False, got 1 prompts beside 1 decodes"),
    "a part": (first_of(4), {}, "splits=False, got 4 of the 5 tokens of request 0"),
    "a prompt twice": (
        lambda i: Plan([Chunk.whole(i.waiting[0])] * 2),
        {},
        r"expected each prompt once in a step, got requests \[0, 0\]",
    ),
    "a decode twice": (
        lambda i: Plan(decodes=[i.running[0]] * 2),
        {"running": 2},
        r"expected each request to decode once, got requests \[0, 0\]",
    ),
    "a decode that waits": (
        lambda i: Plan(decodes=[i.running[0], i.waiting[0]]),
        {"running": 1},
        r"expected to decode requests that run here, got \[1\] too",
    ),
    "a prompt that runs": (
        lambda i: Plan([Chunk.whole(i.running[0])]),
        {"running": 1},
        "request 0: expected one that waits here or is computed in part",
    ),
    "a prompt of nobody": (
        lambda i: Plan([Chunk.whole(state(77, 5))]),
        {},
        "request 77: expected one that waits here",
    ),
    "no token": (first_of(0), {}, "request 0: expected a chunk of 1 to 5 tokens"),
    "a token too many": (first_of(6), {}, "expected a chunk of 1 to 5 tokens, got 6"),
    "too little reserved": (first_of(5, 4), {}, "expected to reserve 5 to 5 tokens"),
    "too much reserved": (first_of(5, 6), {}, "or its limit of 13, got 6"),
    "more blocks than are free": (whole(4), {"blocks": 5}, "needs 2 more KV blocks"),
    "a victim that waits": (
        lambda i: Plan(preempt=[i.waiting[0]]),
        {},
        r"expected to preempt running or partial .* got requests \[0\]",
    ),
    "a victim twice": (
        lambda i: Plan(preempt=[i.running[0]] * 2),
        {"running": 1},
        r"each once, got requests \[0, 0\]",
    ),
    "a victim that decodes": (
        lambda i: Plan(decodes=i.running, preempt=[i.running[0]]),
        {"running": 2},
        "that are not in the step",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_outside_what_a_policy_may_ask_for(case):
    script, options, wrong = REFUSED[case]
    with pytest.raises(RuntimeError, match=wrong) as raised:
        serve(script, **options)
    said = str(raised.value)
    assert said.startswith("the plan of Scripted for instance 0 (colocated:tp1): ")
    assert len(said) < 250  # names and numbers, and no state of anything


@pytest.mark.parametrize(
    ("script", "options", "loads"),
    [
        (whole(4), {}, (((0, 5),) * 4, 0)),
        (first_of(5, 5 + 9 - 1), {}, (((0, 5),), 0)),  # blocks for its longest case
        (whole(1), {"prompts": (65,)}, (((0, 65),), 0)),  # one longer prompt
        (whole(2), {"prompts": (40, 24)}, (((0, 40), (0, 24)), 0)),
        (
            lambda i: Plan([Chunk(i.waiting[0], 6, 6)], i.running),
            {"limits": SPLITS, "running": 2, "prompts": (5, 5, 9)},
            (((0, 6),), 2),
        ),
        (beside, {"limits": SPLITS, "running": 1}, (((0, 5),), 1)),
        # In another order than they run, and not all of them.
        (lambda i: Plan(decodes=[i.running[2], i.running[0]]), {"running": 3}, ((), 2)),
    ],
)
def test_a_plan_at_the_limits_is_carried_out(script, options, loads):
    load = serve(script, **options).steps[-1].load
    assert (load.chunks, load.decodes) == loads


def test_a_router_must_pick_an_instance_that_is_up():
    controller = make_controller(
        "2xcolocated:tp1", prefill_router=lambda request, instances: None
    )
    with pytest.raises(RuntimeError, match="instances that are up for request 3.*None"):
        controller.step(0.0, [Arrived(make_request(3))])
