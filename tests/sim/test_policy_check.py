"""Every listed policy keeps the rules of plans; policies that break one are caught."""

import dataclasses
from typing import ClassVar

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.request import Request, Status
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Chunk, Plan, StepLimits
from disagg_jax.scheduling.preemption import decode_all
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.simdistserve import PrefillThenDecode, RoundRobinDecode
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.policy_check import check_run, check_system

# A system that is listed is tested with no further line.
LISTED = {
    **SYSTEMS,
    "simdistserve": {
        Role.PREFILL: PrefillOnly(),
        Role.DECODE: RoundRobinDecode(),
        Role.COLOCATED: PrefillThenDecode(),
    },
}


@st.composite
def small(draw, policy):
    """The policy with small parameters of its own kinds, so that its limits matter."""
    values = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = draw(small(value))
        elif isinstance(value, int):
            values[field.name] = draw(st.integers(1, 12))
        else:
            values[field.name] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    try:
        return dataclasses.replace(policy, **values)
    except ValueError:  # decodes alone could exceed the step
        assume(False)


def asked(id, prompt, output=8, arrival_s=0.0):
    return Request(id=id, arrival_s=arrival_s, prompt_tokens=prompt, max_tokens=output)


@st.composite
def requests(draw):
    tokens, times = st.integers(1, 8), st.integers(0, 12).map(float)
    count = draw(st.integers(1, 8))
    return [asked(i, draw(tokens), draw(tokens), draw(times)) for i in range(count)]


@pytest.mark.parametrize("system", LISTED)
@given(st.data())
def test_every_listed_policy_keeps_the_rules_of_plans(system, data):
    """Limits, conservation, and no idle instance with work; see `policy_check`."""
    policies = LISTED[system]
    if data.draw(st.booleans()):
        policies = {role: data.draw(small(each)) for role, each in policies.items()}
    # 3 blocks are 6 tokens: some requests never fit, most cause preemption. DistServe's
    # own simulator knows no memory.
    blocks = 10**6 if system == "simdistserve" else data.draw(st.integers(3, 9))
    memory = KVMemory(num_blocks=blocks, block_tokens=2, max_context=14)
    streams = Role.PREFILL in policies and data.draw(st.booleans())
    done = check_run(policies, memory, data.draw(requests()), streams=streams)
    event(f"preempted: {any(timeline.preemptions for timeline in done)}")
    event(f"all finished: {all(t.status is Status.FINISHED for t in done)}")


# ---- policies that break a rule ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Breaks(PrefillFirst):
    """Plans as vLLM does, but for what `spoil` changes."""

    def plan(self, instance):
        return self.spoil(instance, PrefillFirst.plan(self, instance))


class Idles(Breaks):
    def spoil(self, instance, plan):
        return Plan() if len(instance.running) == 1 else plan


class WaitsForTwo(Breaks):
    def spoil(self, instance, plan):
        return Plan() if len(plan.chunks) == 1 and not instance.resident else plan


class Twice(Breaks):
    def spoil(self, instance, plan):
        return dataclasses.replace(plan, chunks=[*plan.chunks] * 2)


class TooMany(Breaks):
    limits: ClassVar = StepLimits(prefill_tokens=999, prefill_rows=1, decode_rows=9)

    def spoil(self, instance, plan):
        return plan


class BeyondThePrompt(Breaks):
    def spoil(self, instance, plan):
        longer = [Chunk(c.request, c.tokens + 1, c.reserve + 1) for c in plan.chunks]
        return dataclasses.replace(plan, chunks=longer)


class MoreThanMemory(Breaks):
    def spoil(self, instance, plan):
        return Plan([Chunk.whole(r) for r in instance.waiting]) if plan.chunks else plan


class BeginsAgain(Breaks):
    """Computes one token of a prompt, and drops it."""

    limits: ClassVar = StepLimits.of_chunks(99, 9)

    def spoil(self, instance, plan):
        if instance.partial:
            return Plan(preempt=instance.partial)
        return Plan([Chunk.up_to(chunk.request, 1) for chunk in plan.chunks[:1]])


IDLE = "expected a step or a pull|requests wait, but nothing can be planned"
BROKEN = {
    Idles: IDLE,
    WaitsForTwo: IDLE,
    Twice: "expected each prompt once in a step",
    TooMany: "prefill_rows=1, got",
    BeyondThePrompt: "expected a chunk of 1 to",
    MoreThanMemory: "needs .* more KV blocks",
}


@pytest.mark.parametrize("policy", BROKEN)
def test_a_policy_that_breaks_a_rule_is_caught(policy):
    with pytest.raises(RuntimeError, match=BROKEN[policy]):
        check_system({Role.COLOCATED: policy()})


def test_a_decode_side_that_pulls_nothing_is_caught():
    class PullsNothing(DecodeOnly):
        def admits_pull(self, instance, request):
            return False

    system = {Role.PREFILL: PrefillOnly(), Role.DECODE: PullsNothing()}
    with pytest.raises(RuntimeError, match="KV of 1 waits, and all memory is free"):
        check_system(system)


class FirstStopsDecoding(Breaks):
    def spoil(self, instance, plan):
        return Plan() if instance.id == 0 and instance.running else plan


class FirstNeverBegins(Breaks):
    def spoil(self, instance, plan):
        return Plan() if instance.id == 0 else plan


@pytest.mark.parametrize(
    ("policy", "idle"),
    [  # a prompt of 8 tokens takes 1 + 8 / 4 s
        (FirstStopsDecoding(), "instance 0 .* at 3.0 s: 1 requests have begun"),
        (FirstNeverBegins(), "instance 0 .* 0.0 s: 1 requests wait, and all memory is"),
    ],
)
def test_an_instance_that_idles_while_the_other_works_is_caught(policy, idle):
    memory = KVMemory(num_blocks=99, block_tokens=4, max_context=40)
    with pytest.raises(RuntimeError, match=idle):
        check_run({Role.COLOCATED: policy}, memory, [asked(0, 8), asked(1, 8)])


def test_a_run_without_an_end_is_caught():
    memory = KVMemory(num_blocks=99, block_tokens=4, max_context=40)
    with pytest.raises(RuntimeError, match="expected the run to end: no request makes"):
        check_run({Role.COLOCATED: BeginsAgain()}, memory, [asked(0, 2)])


def test_a_policy_without_prompts_of_others_passes():
    """The check asks for no more than the rules: one prompt at a time is fine."""

    @dataclasses.dataclass(frozen=True)
    class OneByOne:
        limits: ClassVar = StepLimits(prefill_tokens=1, prefill_rows=1, decode_rows=1)

        def plan(self, instance):
            if instance.waiting and not instance.resident:
                return Plan([Chunk.whole(instance.waiting[0])])
            return decode_all(instance)

    check_system({Role.COLOCATED: OneByOne()})
