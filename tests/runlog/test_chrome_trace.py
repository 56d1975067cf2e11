"""Drawings of runs: all that is in the log, where it was, and as long as it took."""

import collections
import dataclasses
import json

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import e2e_s
from disagg_jax.request import Status
from disagg_jax.runlog.chrome_trace import chrome_trace
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Arrived, Cancelled, Done, Down, Straggle, Up
from tests.control.test_controller_properties import Case, cases, streamed_cases
from tests.control.test_spans import lasting_cases
from tests.drawings import by_lane, check_trace, instants, lane_names, slices
from tests.serving import SECOND, make_controller, make_request
from tests.sim.test_simulated_deployment import link, simulated

PAIR = "prefill:tp1,decode:tp1"
PREFILL = "0 prefill tp1 stage 0 device 0"
DECODE = "1 decode tp1 stage 0 device 0"


def draw(deployment, requests, interventions=(), cost=SECOND, **options):
    """The drawing of a small run in which every piece of work takes a second."""
    controller, log = make_controller(deployment, **options), EventLog()
    backend = VirtualBackend(CostExecutor(cost))
    timelines = serve(controller, backend, requests, interventions, log)
    trace = chrome_trace(Deployment.parse(deployment), log.lines, timelines)
    check_trace(trace)
    return trace


def simulate(run, requests, interventions=()):
    """The drawing of a simulated deployment's run."""
    log = EventLog()
    result = run.run(requests, interventions, log)
    trace = chrome_trace(run.deployment, log.lines, result.timelines)
    check_trace(trace)
    return trace


# ---- by hand -------------------------------------------------------------------------


def test_a_disaggregated_request():
    """A lane for each device, link and request, and an arrow."""
    trace = draw(PAIR, [make_request(5, 0.5, prompt=3, out=3)])
    assert lane_names(trace) == {
        "devices": [PREFILL, DECODE],
        "links": ["0 -> 1"],
        "requests": ["request 5"],
    }
    assert by_lane(trace, "devices") == {
        PREFILL: [("prefill", 0.5, 1.5)],
        DECODE: [("decode", 2.5, 3.5), ("decode", 3.5, 4.5)],
    }
    assert by_lane(trace, "links") == {"0 -> 1": [("transfer", 1.5, 2.5)]}
    assert by_lane(trace, "requests") == {
        "request 5": [
            ("prefill", 0.5, 1.5),
            ("transfer", 1.5, 2.5),
            ("decode", 2.5, 4.5),
        ]
    }
    assert instants(trace, "requests") == [("request 5", "first token", 1.5)]
    prefill, decode, _ = [args for *_, args in slices(trace, "devices")]
    assert prefill == {"step": 1, "requests": [5], "tokens": 3, "decodes": 0}
    assert decode == {"step": 3, "requests": [5], "tokens": 1, "decodes": 1}
    (transfer,) = [args for *_, args in slices(trace, "links")]
    assert transfer == {"transfer": 2, "request": 5, "tokens": 3, "bytes": 0}
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert [(e["ph"], e["id"], e["ts"]) for e in arrows] == [
        ("s", 2, 1.5e6),
        ("f", 2, 1.5e6),
    ]


def test_kinds_of_steps():
    # 8 tokens a step. The last chunk of request 1 is a single token, yet no decode.
    policies = {Role.COLOCATED: SarathiServe(token_budget=8, max_seqs=4)}
    requests = [make_request(0, prompt=5, out=3), make_request(1, prompt=4, out=1)]
    trace = draw("colocated:tp1", requests, policies=policies)
    found = [
        (name, args["requests"], args["tokens"], args["decodes"])
        for _, name, _, _, args in slices(trace, "devices")
    ]
    assert found == [
        ("chunk", [0, 1], 8, 0),
        ("mixed", [1, 0], 2, 1),
        ("decode", [0], 1, 1),
    ]


@pytest.mark.parametrize(
    ("parallelism", "stage_name", "devices"),
    [("tp2pp3", "tp2", 2), ("tp1pp3dp4ep2", "tp1dp4ep2", 4)],
)
def test_stages_of_a_pipeline_and_devices_of_a_stage(parallelism, stage_name, devices):
    # The table of test_stages_overlap_as_the_recurrence_says.
    run = simulated(
        f"colocated:{parallelism}",
        (1.0, 3.0, 2.0),
        policies={Role.COLOCATED: PrefillFirst(max_batched_tokens=4)},
    )
    trace = simulate(run, [make_request(i, prompt=4) for i in range(5)])
    expected = [
        [(0, 1), (1, 2), (2, 3), (6, 7), (9, 10)],
        [(1, 4), (4, 7), (7, 10), (10, 13), (13, 16)],
        [(4, 6), (7, 9), (10, 12), (13, 15), (16, 18)],
    ]
    assert by_lane(trace, "devices") == {
        f"0 colocated {stage_name} stage {stage} device {device}": [
            ("prefill", *times) for times in expected[stage]
        ]
        for stage in range(3)
        for device in range(devices)
    }


def test_transfers_at_once_have_lanes_of_their_own():
    # Two prompts, there at 1 s and at 2 s, of 4 bytes: 2 bytes a second are shared.
    wire = dataclasses.replace(link(), bandwidth_bytes_s=2.0)
    run = simulated(PAIR, bytes_per_token=1, inside=wire, sharing="fair")
    policies = {**run.policies, Role.PREFILL: PrefillOnly(max_seqs=1)}
    run = dataclasses.replace(run, policies=policies)
    trace = simulate(run, [make_request(i, prompt=4, out=2) for i in range(2)])
    # 0 has 2 bytes left at 2 s; both go at half speed until 4 s, then 1 alone.
    assert by_lane(trace, "links") == {
        "0 -> 1": [("transfer", 1, 4)],
        "0 -> 1 (2)": [("transfer", 2, 5)],
    }
    # Of 12 and 2 bytes: 2 bytes of 0 are gone at 2 s; 1 is done at 4 s, and then 0 has
    # 8 bytes left. Lanes are taken in the order of the starts all the same.
    requests = [make_request(i, prompt=n, out=2) for i, n in enumerate((12, 2))]
    assert by_lane(simulate(run, requests), "links") == {
        "0 -> 1": [("transfer", 1, 8)],
        "0 -> 1 (2)": [("transfer", 2, 4)],
    }


def test_transfers_in_turn_share_a_lane_and_point_to_requests_that_are_there():
    # Three prompts are there at 1 s, and their KV goes in turns of 1 s. Request 1 hangs
    # up while its own waits for the link; it goes all the same, to nobody.
    requests = [make_request(i, prompt=4, out=2) for i in range(3)]
    trace = draw(PAIR, requests, [(1.5, Cancelled(1))])
    assert by_lane(trace, "links") == {
        "0 -> 1": [("transfer", i, i + 1) for i in (1, 2, 3)]
    }
    events = trace["traceEvents"]
    moved = [args["request"] for *_, args in slices(trace, "links")]
    assert moved == [0, 1, 2]
    arrows = [event["ts"] for event in events if event["ph"] == "s"]
    assert arrows == [1e6, 3e6]
    # What a request says of itself is what it got.
    sizes = {lane: args for lane, *_, args in slices(trace, "requests")}
    assert sizes == {
        f"request {i}": {"prompt_tokens": 4, "output_tokens": n}
        for i, n in enumerate((2, 1, 2))
    }


def test_a_transfer_beside_its_prompt_names_the_step():
    run = simulated(PAIR, bytes_per_token=1, inside=link(), layer_groups=2)
    requests = [make_request(0, prompt=4, out=2)]
    for streams in (False, True):
        trace = simulate(dataclasses.replace(run, streams=streams), requests)
        ((lane, _, start_s, end_s, args),) = slices(trace, "links")
        # 4 bytes at one a second from 1 s on; or half of them from 0.5 s on.
        times = (0.5, 4.5) if streams else (1.0, 5.0)
        assert (lane, start_s, end_s) == ("0 -> 1", *times)
        assert args.get("while_step") == (1 if streams else None)
        assert (args["tokens"], args["bytes"]) == (4, 4)


def test_a_request_that_makes_room_and_one_that_hangs_up():
    # As in test_controller: 1 is preempted at 1 s and computed again from 4 s on.
    requests = [make_request(i, prompt=4, out=4) for i in range(2)]
    requests.append(make_request(2, 4.5, prompt=4, out=4))
    trace = draw("colocated:tp1", requests, [(4.75, Cancelled(2))], blocks=3)
    assert instants(trace, "requests") == [
        ("request 0", "first token", 1),
        ("request 1", "first token", 1),
        ("request 1", "KV dropped", 1),
        ("request 2", "cancelled", 4.75),
    ]
    assert by_lane(trace, "requests")["request 2"] == [("prefill queue", 4.5, 4.75)]
    again = [args["tokens"] for *_, args in slices(trace, "devices")]
    assert again == [8, 1, 1, 1, 5, 1, 1]


def test_an_instance_that_is_lost():
    interventions = [(1.5, Down(1)), (3.0, Up(1)), (4.5, Down(1)), (5.0, Up(1))]
    trace = draw(PAIR, [make_request(0, prompt=4, out=3)], interventions)
    assert by_lane(trace, "devices") == {
        PREFILL: [("prefill", 0, 1), ("prefill", 4.5, 5.5)],
        DECODE: [("decode (lost)", 4, 4.5), ("decode", 6.5, 7.5)],
    }
    assert instants(trace, "devices") == [
        (DECODE, "down", 1.5),
        (DECODE, "up", 3),
        (DECODE, "down", 4.5),
        (DECODE, "up", 5),
    ]
    assert instants(trace, "links") == [("0 -> 1", "transfer lost", 1.5)]
    assert by_lane(trace, "links") == {
        "0 -> 1": [("transfer", 3, 4), ("transfer", 5.5, 6.5)]
    }
    assert ("request 0", "KV dropped", 4.5) in instants(trace, "requests")


def test_of_a_step_that_is_lost_on_a_later_stage_only_the_first_is_known():
    run = simulated("colocated:tp1pp2", (1.0, 3.0))
    trace = simulate(run, [make_request(prompt=4)], [(2.0, Down(0)), (5.0, Up(0))])
    first, second = (f"0 colocated tp1 stage {i} device 0" for i in range(2))
    assert by_lane(trace, "devices") == {
        first: [("prefill (lost)", 0, 1), ("prefill", 5, 6)],
        second: [("prefill", 6, 9)],
    }


def test_a_straggler_is_named():
    run = simulated("colocated:tp1")
    trace = simulate(run, [make_request(out=2)], [(0.5, Straggle(0, 1.5))])
    assert [name for _, name, _ in instants(trace, "devices")] == ["slow x1.5"]
    assert [end_s for *_, end_s, _ in slices(trace, "devices")] == [1, 2.5]


def test_what_happens_to_an_instance_happens_to_all_its_devices():
    run = simulated("colocated:tp1,colocated:tp2pp2", (1.0,), (1.0, 1.0))
    changes = [(0.5, Straggle(1, 2.0)), (3.0, Down(1)), (4.0, Up(1))]
    trace = simulate(run, [make_request(0, 0.25, out=1)], changes)
    of_instance = [
        f"1 colocated tp2 stage {stage} device {device}"
        for stage in range(2)
        for device in range(2)
    ]
    assert sorted(instants(trace, "devices")) == sorted(
        (lane, name, at_s)
        for name, at_s in (("slow x2", 0.5), ("down", 3), ("up", 4))
        for lane in of_instance
    )


def test_a_request_that_is_refused():
    trace = draw("colocated:tp1", [make_request(prompt=50)], blocks=3)
    ((lane, name, at_s),) = instants(trace, "requests")
    assert (lane, at_s) == ("request 0", 0)
    assert name.startswith("refused instance 0: has 3 KV blocks")


def test_iterations_of_a_span_that_is_cut():
    # 0 decodes alone from 1 s on, 9 iterations at once. At 3.5 s a prompt comes: the
    # span ends at 4 s, and goes on behind it.
    requests = [make_request(0, prompt=4, out=10), make_request(1, 3.5, prompt=4)]
    trace = draw("colocated:tp1", requests, spans=True)
    (found,) = by_lane(trace, "devices").values()
    names = ["prefill", *["decode"] * 3, "prefill", *["decode"] * 6]
    assert found == [(name, i, i + 1) for i, name in enumerate(names)]
    iterations = [args.get("iteration") for *_, args in slices(trace, "devices")]
    assert iterations == [None, 0, 1, 2, None, 0, 1, 2, 3, 4, 5]


# ---- of any run ----------------------------------------------------------------------


def run_case(case: Case, spans: bool):
    """A random run: (its drawing, the turns of its log, timelines, busy seconds)."""
    requests = [dataclasses.replace(r, prompt=None) for r in case.requests]
    controller, log = case.controller(spans), EventLog()
    backend = VirtualBackend(CostExecutor(case.cost))
    timelines = serve(controller, backend, requests, case.interventions, log)
    trace = chrome_trace(case.deployment, log.lines, timelines)
    check_trace(trace)
    turns = [json.loads(line) for line in log.lines[1:]]
    return trace, turns, timelines, backend.busy_s


def told(turns, kind):
    return [event[1:] for turn in turns for event in turn["events"] if event[0] == kind]


def check_steps(trace, turns) -> None:
    """Each step of the log, once, as long as the log says."""
    logged = {w[1]: w[2:] for turn in turns for w in turn["works"] if w[0] == "Step"}
    done = {work: times for work, *times, _, _, _, _ in told(turns, "Done")}
    found = collections.defaultdict(list)
    for lane, name, *times, args in slices(trace, "devices"):
        instance, parts, *_ = logged[args["step"]]
        assert lane.startswith(f"{instance} ")
        assert args["requests"] == [request for request, _, _ in parts]
        assert args["tokens"] == sum(count for _, _, count in parts)
        assert name.endswith(" (lost)") == (args["step"] not in done)
        found[args["step"]].append(times)
    assert found.keys() == logged.keys()
    assert all(found[id] == [done[id]] for id in found.keys() & done.keys())


def check_transfers(trace, turns) -> None:
    logged = {
        w[1]: w[2:] for turn in turns for w in turn["works"] if w[0] == "Transfer"
    }
    done = {work: times for work, *times, _, _, _, _ in told(turns, "Done")}
    found = {}
    for lane, _, *times, args in slices(trace, "links"):
        request, src, dst, tokens, *_ = logged[args["transfer"]]
        assert lane.startswith(f"{src} -> {dst}")
        assert (args["request"], args["tokens"]) == (request, tokens)
        found[args["transfer"]] = times
    assert found == {id: done[id] for id in logged.keys() & done.keys()}
    assert len(logged) == len(found) + len(instants(trace, "links"))


def check_requests(trace, timelines) -> None:
    lanes = [f"request {timeline.request.id}" for timeline in timelines]
    assert lane_names(trace)["requests"] == lanes
    stages, marks = by_lane(trace, "requests"), instants(trace, "requests")
    for lane, timeline in zip(lanes, timelines, strict=True):
        if timeline.status is Status.FINISHED:
            spans = stages.get(lane, [])  # none if it took no time
            assert sum(end_s - start_s for _, start_s, end_s in spans) == e2e_s(
                timeline
            )
        seen = [(name, at_s) for where, name, at_s in marks if where == lane]
        assert [at for name, at in seen if name == "first token"] == timeline.token_s[
            :1
        ]
        assert [at for name, at in seen if name == "KV dropped"] == timeline.dropped_s
        ended = [(name.split()[0], at_s) for name, at_s in seen[-1:]]
        if timeline.status is not Status.FINISHED:
            assert ended == [(timeline.status, timeline.end_s)]


@given(st.one_of(cases(), streamed_cases()))
def test_everything_is_drawn_and_nothing_overlaps(case: Case):
    trace, turns, timelines, busy_s = run_case(case, spans=False)
    check_steps(trace, turns)
    check_transfers(trace, turns)
    check_requests(trace, timelines)
    drawn_s = collections.Counter()
    for lane, name, start_s, end_s, _ in slices(trace, "devices"):
        if not name.endswith(" (lost)"):
            drawn_s[int(lane.split()[0]),] += end_s - start_s
    assert drawn_s == {key: s for key, s in busy_s.items() if len(key) == 1}
    event(f"lost transfers: {bool(instants(trace, 'links'))}")
    event(f"transfers at once: {'(2)' in str(lane_names(trace).get('links'))}")


@given(lasting_cases())
def test_spans_are_drawn_as_the_steps_they_stand_for(case: Case):
    drawn = []
    for spans in (False, True):
        trace, turns, timelines, _ = run_case(case, spans)
        check_requests(trace, timelines)
        found = slices(trace, "devices")
        drawn.append(sorted((*at, sorted(args["requests"])) for *at, args in found))
    assert drawn[0] == drawn[1]
    event(
        f"cuts: {any(work[0] == 'TruncateSpan' for t in turns for work in t['works'])}"
    )


@pytest.mark.parametrize(
    "seconds", [1e-9, 1001e-9, 0.1 + 0.2, 1 / 3, 2 / 3, 98765.432109876]
)
def test_times_are_nanoseconds_as_perfetto_reads_them(seconds):
    """It cuts off: of 1.001 us it would make 1000 ns, and see an overlap."""
    (part,) = draw_step(0.0, seconds)
    assert int(part["dur"] * 1000) == round(seconds * 1e9)
    assert part["dur"] == pytest.approx(seconds * 1e6, rel=1e-15, abs=5e-4)


@pytest.mark.parametrize("spans", [False, True])
def test_times_that_are_no_short_decimals_do_not_overlap(spans):
    cost = LinearCost(step_base_s=1 / 3, prefill_token_s=1e-3 / 7, transfer_base_s=0.11)
    requests = [make_request(i, i / 9, prompt=5 + i, out=30) for i in range(40)]
    trace = draw(f"2x{PAIR}", requests, cost=cost, spans=spans)
    assert len(slices(trace, "devices")) > 50


def draw_step(start_s, end_s):
    log, request = EventLog(), make_request(0)
    controller = make_controller()
    for now_s, told in [(0.0, Arrived(request)), (end_s, Done(1, start_s, end_s))]:
        log(now_s, [told], controller.step(now_s, [told]))
    deployment = Deployment.parse("colocated:tp1")
    trace = chrome_trace(deployment, log.lines, controller.timelines)
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]


# ---- bad input -----------------------------------------------------------------------


def logged(requests=1):
    controller, log = make_controller(PAIR), EventLog()
    backend = VirtualBackend(CostExecutor(SECOND))
    asked = [make_request(i, out=2) for i in range(requests)]
    return serve(controller, backend, asked, observer=log), log.lines


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        ("colocated:tp1", "expected one of the 1 instances of the deployment, got 1"),
        ("prefill:tp1pp2,decode:tp1", "expected step 1 to pass 2 stages, got 1"),
    ],
)
def test_another_deployment_is_refused(deployment, message):
    timelines, lines = logged()
    with pytest.raises(ValueError, match=message):
        chrome_trace(Deployment.parse(deployment), lines, timelines)


def test_a_drawing_says_of_what_it_is_and_is_read_in_ms():
    timelines, lines = logged()
    deployment = Deployment.parse(PAIR)
    trace = chrome_trace(deployment, lines, timelines, {"seed": 3})
    assert trace["otherData"] == {"deployment": PAIR, "seed": 3}
    assert trace["displayTimeUnit"] == "ms"
    assert chrome_trace(deployment, lines, timelines)["otherData"] == {
        "deployment": PAIR
    }


def test_half_a_log_is_refused():
    timelines, lines = logged()
    with pytest.raises(
        ValueError, match=r"all work to end, but some does not, got \[2\]"
    ):
        chrome_trace(Deployment.parse(PAIR), lines[:3], timelines)


def test_requests_of_another_run_are_refused():
    (first, _), lines = logged(2)
    with pytest.raises(ValueError, match=r"but some are missing, got \[1\]"):
        chrome_trace(Deployment.parse(PAIR), lines, [first])
