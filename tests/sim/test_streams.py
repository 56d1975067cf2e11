"""KV that leaves layer group by layer group while its prompt is computed."""

import dataclasses

import pytest

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.metrics import stages_s
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Done, Down, Transfer, Up
from tests.serving import make_request

PAIR = Deployment.parse("prefill:tp1,decode:tp1")
POLICIES = SYSTEMS["disaggregated"]


def simulated(deployment=PAIR, *, streams=True, blocks=100, policies=POLICIES, **cost):
    memory = KVMemory(num_blocks=blocks, block_tokens=4, max_context=100)
    return SimulatedDeployment(
        deployment=deployment,
        policies=policies,
        memory=(memory,) * len(deployment.instances),
        cost=LinearCost(**{"step_base_s": 0.0, **cost}),
        streams=streams,
    )


# A prompt of 8 tokens takes 8 s from 0 on, each decode step 1 s.
STEPS = {"prefill_token_s": 1.0, "decode_token_s": 1.0}


@pytest.mark.parametrize(
    ("token_s", "parts", "visible_s"),
    [
        # 4 s on the link. In one part all of it is seen, in four the last one only:
        # three of 1 s each, there at 2, 4 and 6, are sent before 8.
        (0.5, 1, 4.0),
        (0.5, 2, 2.0),
        (0.5, 4, 1.0),
        # 16 s on the link, which is the slower one: it begins at 8 / 4 and ends at 18.
        (2.0, 4, 10.0),
        (2.0, 1, 16.0),
    ],
)
def test_what_is_seen_of_a_transfer(token_s, parts, visible_s):
    run = simulated(transfer_token_s=token_s, transfer_parts=parts, **STEPS).run(
        [make_request(prompt=8, out=3)]
    )
    (timeline,) = run.timelines
    landed_s = 8.0 + visible_s
    assert timeline.token_s == [8.0, landed_s + 1, landed_s + 2]
    assert (timeline.transfer_start_s, timeline.transfer_end_s) == (8.0, landed_s)
    assert stages_s(timeline).transfer_s == visible_s
    assert run.busy_s[-3, 0, 1] == 8 * token_s  # the link's waits are not work


CHUNKED = {**SYSTEMS["disaggregated"], Role.PREFILL: PrefillChunked(token_budget=4)}


@pytest.mark.parametrize(
    ("prompt", "parts", "visible_s"),
    [
        # Steps of 4 tokens and 4 s each; a block of 4 tokens takes 2 s on the link. All
        # but the last chunk's have left before the first token.
        (8, 1, 2.0),
        (16, 1, 2.0),
        (16, 2, 1.0),  # half of the last one left too
        (9, 1, 1.5),  # the last chunk is one token, and waits for the one before
        (3, 1, 1.5),  # one chunk
    ],
)
def test_what_is_seen_of_a_transfer_by_chunks(prompt, parts, visible_s):
    built = simulated(transfer_token_s=0.5, transfer_parts=parts, **STEPS)
    built = dataclasses.replace(built, policies=CHUNKED)
    (timeline,) = built.run([make_request(prompt=prompt, out=3)]).timelines
    assert timeline.token_s[0] == prompt
    assert timeline.transfer_end_s - timeline.transfer_start_s == visible_s
    whole = dataclasses.replace(built, streams=False)
    (timeline,) = whole.run([make_request(prompt=prompt, out=3)]).timelines
    assert stages_s(timeline).transfer_s == prompt * 0.5


def test_what_is_not_full_yet_leaves_with_the_next_chunk():
    """Chunks of 6, 6 and 2 tokens are blocks 0; 1 and 2; and 3, which stays half."""
    built = simulated(transfer_token_s=1.0, **STEPS)
    prefill = PrefillChunked(token_budget=6)
    built = dataclasses.replace(built, policies={**CHUNKED, Role.PREFILL: prefill})
    sent = []

    def look(now_s, events, works):
        sent.extend(
            (work.start, work.context, tuple(work.src_blocks))
            for work in works
            if isinstance(work, Transfer)
        )

    (timeline,) = built.run([make_request(prompt=14, out=2)], observer=look).timelines
    assert sent == [(0, 4, (0,)), (4, 8, (1, 2)), (12, 2, (3,))]
    assert timeline.transfer_end_s == 12.0 + 8 + 2  # the link is busy from 12 on


def test_a_part_leaves_when_its_stage_is_done_and_not_by_its_share_of_the_time():
    """Stages of 1 s and 4 s; parts of 4 s go out as they come.

    The first prompt is on them from 0 to 1 and 1 to 5, the second from 1 to 2 and 5 to
    9. So parts come at 1, 2, 5 and 9, and the link ends them at 5, 9, 13 and 17.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cost(LinearCost):
        def stages_s(self, instance, load):
            return (1.0, 4.0) if instance == 0 else (0.0,)

    built = simulated(Deployment.parse("prefill:tp1pp2,decode:tp1"))
    policies = {**built.policies, Role.PREFILL: PrefillOnly(max_seqs=1)}
    cost = Cost(step_base_s=0.0, transfer_base_s=4.0, transfer_parts=2)
    built = dataclasses.replace(built, policies=policies, cost=cost)
    run = built.run([make_request(i, prompt=8, out=2) for i in range(2)])
    assert [t.transfer_end_s for t in run.timelines] == [13.0, 17.0]


def test_one_part_is_a_transfer_after_the_prompt():
    cost = {"transfer_token_s": 0.5, "transfer_base_s": 0.25, **STEPS}
    requests = [make_request(i, float(i), prompt=3 + i, out=4) for i in range(6)]
    runs = [
        simulated(streams=streams, **cost).run(requests) for streams in (False, True)
    ]
    assert [t.token_s for t in runs[0].timelines] == [
        t.token_s for t in runs[1].timelines
    ]


def test_parts_take_turns_on_a_link():
    # Two prefill instances send to one decode instance over one wire each (src, dst);
    # over the receiver's wire, parts of both are served as they come.
    deployment = Deployment.parse("2xprefill:tp1,decode:tp1")
    link = LinkSpec(name="toy", latency_s=0.0, bandwidth_bytes_s=1.0, efficiency=1.0)
    network = Network(
        deployment=deployment, kv_bytes_per_token=1, inside=link, layer_groups=2
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cost(LinearCost):
        def hop(self, transfer: Transfer):
            return network.hop(transfer)

    built = simulated(deployment)
    built = dataclasses.replace(built, cost=Cost(step_base_s=0.0, **STEPS))
    # Both prompts of 8 from 0 on: parts of 4 s each are there at 4, 4, 8 and 8; the
    # wire is busy from 4 to 20, in turns: the first request's end at 8 and 16, then 20.
    run = built.run([make_request(i, prompt=8, out=2) for i in range(2)])
    assert [t.transfer_end_s for t in run.timelines] == [16.0, 20.0]
    assert run.busy_s[-2, 2] == 16.0


def test_without_room_at_the_decode_side_the_kv_waits():
    # 3 blocks of 4: the first request needs 2 and later 3, the second, prefilled at 8,
    # needs 2.
    run = simulated(blocks=3, transfer_token_s=0.5, transfer_parts=4, **STEPS).run(
        [make_request(0, prompt=4, out=9), make_request(1, 1.0, prompt=4, out=2)]
    )
    first, second = run.timelines
    assert first.transfer_end_s == 4.0 + 0.5
    assert second.token_s[0] == 8.0
    assert second.transfer_start_s == first.end_s == 12.5


@pytest.mark.parametrize(
    "decode",
    [DecodeOnly(max_seqs=1), DecodeOnly(watermark=1.0)],
    ids=["max_seqs", "watermark"],
)
def test_a_stream_waits_for_the_decode_policy_as_a_pull_does(decode):
    # Blocks are free, but the policy takes no second request beside the first.
    policies = {**POLICIES, Role.DECODE: decode}
    cost = {"transfer_token_s": 0.5, "transfer_parts": 4, **STEPS}
    run = simulated(policies=policies, **cost).run(
        [make_request(0, prompt=4, out=9), make_request(1, 1.0, prompt=4, out=2)]
    )
    first, second = run.timelines
    assert first.transfer_end_s == 4.0 + 0.5
    assert second.token_s[0] == 8.0
    assert second.transfer_start_s == first.end_s == 12.5


def test_a_stream_does_not_overtake_kv_that_waits_to_be_pulled():
    # 6 blocks of 4: the first request needs 2 and later 3, the second, prefilled at 5,
    # needs 5. The third, computed from 5 to 5.75, needs one, but it is not its turn.
    run = simulated(blocks=6, prefill_token_s=0.25, decode_token_s=1.0).run(
        [
            make_request(0, prompt=4, out=9),
            make_request(1, 0.5, prompt=16, out=2),
            make_request(2, 2.0, prompt=3, out=2),
        ]
    )
    first, second, third = run.timelines
    assert (second.token_s[0], third.token_s[0]) == (5.0, 5.75)
    assert second.transfer_start_s == third.transfer_start_s == first.end_s == 9.0


def test_a_request_of_one_token_sends_nothing():
    run = simulated(transfer_token_s=0.5, transfer_parts=2, **STEPS).run(
        [make_request(prompt=8, out=1)]
    )
    (timeline,) = run.timelines
    assert timeline.end_s == 8.0 and timeline.transfer_bytes == 0
    assert not any(resource[0] < 0 for resource in run.busy_s)


# ---- over the wires of a network -----------------------------------------------------


def over_wires(deployment, *, bytes_s=1.0, policies=POLICIES, **network):
    """As `simulated`, a byte of KV a token; each link has `bytes_s`."""
    parsed = Deployment.parse(deployment)
    link = LinkSpec(
        name="toy",
        latency_s=0.0,
        bandwidth_bytes_s=bytes_s,
        efficiency=1.0,
    )
    wires = Network(deployment=parsed, kv_bytes_per_token=1, inside=link, **network)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cost(LinearCost):
        def hop(self, transfer: Transfer):
            return wires.hop(transfer)

    built = simulated(parsed, policies=policies)
    return dataclasses.replace(built, cost=Cost(step_base_s=0.0, **STEPS))


@pytest.mark.parametrize("sharing", ["fifo", "fair"])
@pytest.mark.parametrize(
    ("prompt", "groups", "policies", "bytes_s", "visible_s"),
    [
        (8, 1, POLICIES, 2.0, 4.0),
        (8, 4, POLICIES, 2.0, 1.0),
        (8, 4, POLICIES, 0.5, 10.0),  # the wire is slower: from 2 to 18
        (16, 1, CHUNKED, 2.0, 2.0),
        (16, 2, CHUNKED, 2.0, 1.0),
        (16, 2, CHUNKED, 0.5, 18.0),  # from 2 to 34
        (1000, 1, CHUNKED, 1e6, 4e-6),  # each chunk lands long before the next
        (8, 2, POLICIES, 1e9, 4e-9),
    ],
)
def test_a_request_alone_sees_as_much_whatever_the_sharing(
    sharing, prompt, groups, policies, bytes_s, visible_s
):
    built = over_wires(
        "prefill:tp1,decode:tp1",
        bytes_s=bytes_s,
        policies=policies,
        sharing=sharing,
        layer_groups=groups,
    )
    memory = KVMemory(num_blocks=1000, block_tokens=4, max_context=2000)
    built = dataclasses.replace(built, memory=(memory,) * 2)
    run = built.run([make_request(prompt=prompt, out=2)])
    (timeline,) = run.timelines
    assert timeline.transfer_start_s == prompt
    assert timeline.transfer_end_s == pytest.approx(prompt + visible_s, abs=1e-12)
    assert run.busy_s[-2, 1] == pytest.approx(prompt / bytes_s)


@pytest.mark.parametrize("sharing", ["fifo", "fair"])
def test_a_stream_is_told_from_its_first_byte_to_its_last(sharing):
    # Parts of 4 bytes that are there at 4 and 8: 4-8, 8-12.
    built = over_wires("prefill:tp1,decode:tp1", sharing=sharing, layer_groups=2)
    told = []

    def look(now_s, events, works):
        told.extend(e for e in events if isinstance(e, Done) and e.bytes)

    built.run([make_request(prompt=8, out=2)], observer=look)
    assert [(d.start_s, d.end_s, d.bytes) for d in told] == [(4.0, 12.0, 8)]


def test_parts_of_two_requests_share_a_fair_wire():
    # Prompts of 8 and 4, halves of 4 and 2 bytes, there at 4, 8 and at 2, 4. The second
    # one's: from 2 to 4 alone; from 4 on beside the other, at half speed, 2 bytes to 8.
    # Then what is left of the other, 2 and 4 bytes, alone from 8 to 14.
    built = over_wires("2xprefill:tp1,decode:tp1", sharing="fair", layer_groups=2)
    run = built.run(
        [make_request(0, prompt=8, out=2), make_request(1, prompt=4, out=2)]
    )
    assert [t.transfer_end_s for t in run.timelines] == [14.0, 8.0]
    assert run.busy_s[-2, 2] == 12.0


@pytest.mark.parametrize(
    ("sharing", "at_s", "landed_s"),
    # Prompts of 8 on 0 and 1, in parts of 4 bytes that are there at 4 and 8, for 2. The
    # wire is busy from 4 to 20, in turns or by halves, but 0 is lost.
    [
        # Before any part: 4-8, 8-12.
        ("fifo", 3.0, 12.0),
        ("fair", 3.0, 12.0),
        # In turns at 6: half a part of 0 has gone; 6-10, 10-14.
        ("fifo", 6.0, 14.0),
        # By halves 1 byte of 1 has gone, too: 6-9, 9-12. Then 0, which is computed once
        # more from 8 to 16, has a part, too: 1 byte is left, by halves to 14.
        ("fair", 6.0, 14.0),
        # At 8 a part of 0 has gone, or 2 bytes of each.
        ("fifo", 8.0, 16.0),
        ("fair", 8.0, 14.0),
    ],
)
def test_a_stream_whose_sender_is_lost_leaves_the_wire(sharing, at_s, landed_s):
    built = over_wires("2xprefill:tp1,decode:tp1", sharing=sharing, layer_groups=2)
    requests = [make_request(i, prompt=8, out=2) for i in range(2)]
    _, other = built.run(requests, [(at_s, Down(0))]).timelines
    assert other.transfer_end_s == landed_s


@pytest.mark.parametrize("sharing", ["fifo", "fair"])
def test_a_stream_whose_receiver_is_lost_goes_to_another_when_it_is_computed(sharing):
    # Parts of 4 bytes, there at 4 and 8. Instance 1 is lost at 5; the step goes on, and
    # then all 8 bytes go to instance 2.
    built = over_wires("prefill:tp1,2xdecode:tp1", sharing=sharing, layer_groups=2)
    run = built.run([make_request(prompt=8, out=2)], [(5.0, Down(1))])
    (timeline,) = run.timelines
    assert timeline.token_s[0] == 8.0
    assert (timeline.transfer_start_s, timeline.transfer_end_s) == (8.0, 16.0)
    assert run.busy_s == {(0,): 8.0, (-2, 2): 8.0, (2,): 1.0}


def test_a_loss_in_the_middle_of_a_pipeline_takes_its_steps_and_no_others():
    # Two prefill instances of two stages, prompts of 8 as steps of 4 and 4 s, in parts
    # of 4 bytes: there at 4 and 8. At 6 instance 0 is on its second stage.
    built = over_wires("2xprefill:tp1pp2,decode:tp1", bytes_s=4.0, layer_groups=2)
    cost = dataclasses.replace(built.cost, pp=(2, 2, 1))
    built = dataclasses.replace(built, cost=cost)
    requests = [make_request(i, prompt=8, out=2) for i in range(2)]
    run = built.run(requests, [(6.0, Down(0)), (6.5, Up(0))])
    first, second = run.timelines
    assert (second.token_s[0], second.transfer_end_s) == (8.0, 9.0)
    # Once more, on 1: its first stage is free, the second till 8; 6-10, 10-14.
    assert (first.token_s[0], first.transfer_end_s) == (14.0, 15.0)
    assert run.busy_s == {(1,): 8.0, (1, 1): 8.0, (-2, 2): 4.0, (2,): 2.0}


def test_networks_that_cannot_be():
    for change, message in (
        ({"layer_groups": 0}, "layer_groups: expected >= 1, got 0"),
        ({"node_devices": 0}, "node_devices: expected >= 1, got 0"),
        ({"sharing": "equal"}, "sharing: expected fifo or fair, got 'equal'"),
        ({"kv_bytes_per_token": -1}, "kv_bytes_per_token: expected >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Network(**{"deployment": PAIR, "kv_bytes_per_token": 1, **change})
