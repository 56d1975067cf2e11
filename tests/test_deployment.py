"""Deployments read what they write and say what is wrong with the rest."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import (
    Deployment,
    InstanceSpec,
    KVMemory,
    Parallelism,
    RequestLimit,
    Role,
    cut_layers,
)

APART = {Role.PREFILL, Role.DECODE}


def by_pairs(specs: list[InstanceSpec]) -> bool:
    roles = {spec.role for spec in specs}
    return (Role.PREFILL in roles) == (Role.DECODE in roles)


@st.composite
def parallelisms(draw: st.DrawFn) -> Parallelism:
    tp, pp = draw(st.integers(1, 16)), draw(st.integers(1, 4))
    dp = draw(st.integers(1, 8))
    fitting = [ep for ep in range(1, tp * dp + 1) if tp * dp % ep == 0]
    return Parallelism(tp, pp, dp, draw(st.sampled_from(fitting)))


SPECS = st.builds(InstanceSpec, role=st.sampled_from(Role), parallelism=parallelisms())
DEPLOYMENTS = (
    st.lists(SPECS, min_size=1, max_size=8).filter(by_pairs).map(tuple).map(Deployment)
)


@given(DEPLOYMENTS)
def test_parse_reads_what_str_writes(deployment: Deployment):
    assert Deployment.parse(str(deployment)) == deployment


@given(DEPLOYMENTS)
def test_every_instance_has_one_role(deployment: Deployment):
    found = [i for role in Role for i in deployment.of(role)]
    assert sorted(found) == list(range(len(deployment.instances)))
    assert deployment.of(*Role) == tuple(range(len(deployment.instances)))
    assert deployment.devices == sum(spec.devices for spec in deployment.instances)


@given(parallelisms())
def test_parallelism_reads_what_it_writes(parallelism: Parallelism):
    assert Parallelism.parse(str(parallelism)) == parallelism


@pytest.mark.parametrize(
    ("text", "numbers", "stage_devices", "devices"),
    [
        ("tp2", (2, 1, 1, 1), 2, 2),
        ("tp2pp3", (2, 3, 1, 1), 2, 6),
        ("tp1dp8ep8", (1, 1, 8, 8), 8, 8),
        ("tp4ep2", (4, 1, 1, 2), 4, 4),
        ("tp2pp3dp4ep8", (2, 3, 4, 8), 8, 24),
    ],
)
def test_parallelism_by_example(text, numbers, stage_devices, devices):
    parallelism = Parallelism(*numbers)
    assert (Parallelism.parse(text), str(parallelism)) == (parallelism, text)
    assert parallelism.stage_devices == stage_devices
    assert parallelism.devices == devices


@pytest.mark.parametrize("text", ["", "2", "pp2", "tp1ep2dp2", "tp2 pp2", "tp1sp2"])
def test_parallelism_has_its_parts_in_order(text: str):
    expected = re.escape("parallelism: expected 'tpK[ppL][dpM][epN]'")
    with pytest.raises(ValueError, match=f"{expected}, .*; got '{text}'"):
        Parallelism.parse(text)


@pytest.mark.parametrize("name", ["tp", "pp", "dp", "ep"])
def test_parallelism_is_at_least_1(name: str):
    with pytest.raises(ValueError, match=f"{name}: expected >= 1, got -1"):
        Parallelism(**{name: -1})


@pytest.mark.parametrize(("text", "got"), [("tp2dp2ep3", 3), ("tp4pp2ep8", 8)])
def test_experts_divide_over_a_stage(text: str, got: int):
    expected = f"ep: expected to divide the 4 devices of a stage, got {got}"
    with pytest.raises(ValueError, match=expected):
        Parallelism.parse(text)


@pytest.mark.parametrize("text", ["tp2dp2", "tp2ep2", "tp1pp2dp2ep2"])
def test_tp_and_pp_alone_can_be_required(text: str):
    Deployment.parse("prefill:tp2,decode:tp1pp2").require_tp_pp_only("engine")
    expected = f"engine: expected no dp and no ep, got {text}"
    with pytest.raises(ValueError, match=expected):
        Deployment.parse(f"prefill:tp2,decode:{text}").require_tp_pp_only("engine")


@pytest.mark.parametrize(
    ("text", "written", "devices"),
    [
        ("colocated:tp1", "colocated:tp1", 1),
        (" 2 x prefill:tp1, 1xdecode:tp2 ", "2xprefill:tp1,decode:tp2", 4),
        ("prefill:tp1,prefill:tp1,decode:tp1", "2xprefill:tp1,decode:tp1", 3),
        (
            "prefill:tp1,decode:tp1,prefill:tp1",  # device order is kept
            "prefill:tp1,decode:tp1,prefill:tp1",
            3,
        ),
        ("prefill:tp1pp1,2xdecode:tp2pp3", "prefill:tp1,2xdecode:tp2pp3", 13),
        ("colocated:tp2,10xcolocated:tp1", "colocated:tp2,10xcolocated:tp1", 12),
        ("prefill:tp8pp1ep8,decode:tp2pp2dp2", "prefill:tp8ep8,decode:tp2pp2dp2", 16),
    ],
)
def test_parse_accepts(text: str, written: str, devices: int):
    deployment = Deployment.parse(text)
    assert str(deployment) == written
    assert deployment.devices == devices


@pytest.mark.parametrize(
    ("src", "dst", "lanes"), [(0, 2, 1), (1, 2, 3), (2, 1, 3), (1, 3, 4), (1, 1, 4)]
)
def test_lanes_are_the_devices_of_the_smaller_end(src: int, dst: int, lanes: int):
    text = "prefill:tp1,prefill:tp2pp2,decode:tp1pp3,decode:tp8"
    assert Deployment.parse(text).lanes(src, dst) == lanes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "deployment: expected '[N x]ROLE:tpK[ppL][dpM][epN]' items"),
        ("prefill:tp1,", "; got ''"),
        ("verifier:tp1", "; got 'verifier:tp1'"),
        ("prefill", "; got 'prefill'"),
        ("prefill:tp1;decode:tp1", "; got 'prefill:tp1;decode:tp1'"),
        ("-1xcolocated:tp1", "; got '-1xcolocated:tp1'"),
        ("colocated:tp0", "tp: expected >= 1, got 0"),
        ("colocated:tp1pp0", "pp: expected >= 1, got 0"),
        ("colocated:tp2ep3", "ep: expected to divide the 2 devices of a stage, got 3"),
        ("colocated:pp2", "; got 'colocated:pp2'"),
        ("colocated:tp1ep2dp2", "; got 'colocated:tp1ep2dp2'"),
        ("0xcolocated:tp1", "; got '0xcolocated:tp1'"),
        ("colocated:tp1,0xcolocated:tp2", "; got '0xcolocated:tp2'"),
        ("2xprefill:tp1", "got 2 prefill and 0 decode in '2xprefill:tp1'"),
        ("colocated:tp1,decode:tp1", "got 0 prefill and 1 decode"),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Deployment.parse(text)


def test_a_deployment_has_instances():
    with pytest.raises(ValueError, match="expected at least one instance, got none"):
        Deployment(())


@pytest.mark.parametrize("name", ["num_blocks", "block_tokens", "max_context"])
def test_kv_memory_has_room(name: str):
    fields = {"num_blocks": 1, "block_tokens": 1, "max_context": 1}
    with pytest.raises(ValueError, match=f"{name}: expected >= 1, got 0"):
        KVMemory(**{**fields, name: 0})


@given(st.integers(0, 1000), st.integers(1, 40))
def test_blocks_for_is_the_least_that_holds(tokens: int, block_tokens: int):
    memory = KVMemory(num_blocks=1, block_tokens=block_tokens, max_context=1)
    blocks = memory.blocks_for(tokens)
    assert blocks * block_tokens >= tokens
    assert (blocks - 1) * block_tokens < tokens or blocks == 0


# 4 blocks of 4 tokens hold 16; the KV of the last token is never needed, so 17 fit.
@pytest.mark.parametrize(
    ("prompt", "out", "max_context", "reason"),
    [
        (10, 7, 17, ""),
        (16, 1, 17, ""),
        (1, 16, 17, ""),
        (10, 8, 18, "has 4 KV blocks, got 10 prompt + 8 output tokens = 5 blocks"),
        (17, 1, 18, "has 4 KV blocks, got 17 prompt + 1 output tokens = 5 blocks"),
        (10, 7, 16, "expected at most 16 tokens, got 10 prompt + 7 output tokens"),
    ],
)
def test_why_never(prompt: int, out: int, max_context: int, reason: str):
    memory = KVMemory(num_blocks=4, block_tokens=4, max_context=max_context)
    assert memory.rejection_reason(prompt, out) == reason
    limit = {"": None, "h": RequestLimit.KV_MEMORY, "e": RequestLimit.CONTEXT}
    assert memory.exceeded(prompt, out) is limit[reason[:1]]


@pytest.mark.parametrize(
    ("layers", "parts", "expected"),
    [
        (range(7), 3, [range(3), range(3, 5), range(5, 7)]),
        (range(3, 11), 3, [range(3, 6), range(6, 9), range(9, 11)]),
        (range(4), 2, [range(2), range(2, 4)]),
        (range(2, 4), 2, [range(2, 3), range(3, 4)]),
    ],
)
def test_the_first_stages_have_a_layer_more(layers, parts, expected):
    assert cut_layers(layers, parts) == expected


@pytest.mark.parametrize("parts", [0, 4])
def test_every_stage_has_a_layer(parts):
    with pytest.raises(ValueError, match=f"1 to 3 parts of range.3, 6., got {parts}"):
        cut_layers(range(3, 6), parts)


def test_lanes_are_the_devices_of_the_smaller_end_all_stages_together():
    deployment = Deployment.parse("prefill:tp2pp2,decode:tp3,decode:tp1pp6")
    assert deployment.lanes(0, 1) == deployment.lanes(1, 0) == 3
    assert deployment.lanes(0, 2) == deployment.lanes(2, 0) == 4


@pytest.mark.parametrize(
    ("roles", "text", "moved"),
    [
        ({Role.COLOCATED}, "prefill:tp2,decode:tp1", "colocated:tp2,colocated:tp1"),
        # It can do both, so it needs no others.
        (set(Role), "prefill:tp1,decode:tp1", "2xcolocated:tp1"),
        (APART, "2xcolocated:tp1", "prefill:tp1,decode:tp1"),
        (APART, "3xcolocated:tp1pp2", "prefill:tp1pp2,2xdecode:tp1pp2"),
    ],
)
def test_the_same_instances_take_other_roles(roles, text, moved):
    assert str(Deployment.parse(text).in_roles(roles)) == moved


def test_instances_cannot_take_roles_that_serve_nobody():
    both = "expected policies for colocated, or for prefill and decode, got"
    for roles in ({Role.PREFILL}, {Role.DECODE}, set()):
        with pytest.raises(ValueError, match=both):
            Deployment.parse("2xcolocated:tp1").in_roles(roles)
    alone = "expected instances for both prefill and decode, got 'colocated:tp4'"
    with pytest.raises(ValueError, match=alone):
        Deployment.parse("colocated:tp4").in_roles(APART)
