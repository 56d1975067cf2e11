"""Reading and checking Chrome traces, for the tests of all that makes them."""

import collections
import json

# What an event of each phase must have, beside "ph" and "pid".
KEYS = {
    "M": {"name", "args"},
    "X": {"name", "args", "tid", "ts", "dur"},
    "i": {"name", "args", "tid", "ts", "s"},
    "s": {"name", "cat", "tid", "ts", "id"},
    "f": {"name", "cat", "tid", "ts", "id", "bp"},
}


def nanoseconds(us: float) -> int:
    """As Perfetto reads a time: multiplied and cut off."""
    return int(us * 1000)


def check_trace(trace) -> None:
    """The format, and that no two slices of a lane overlap."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    events = trace["traceEvents"]
    for event in events:
        assert event.keys() - {"ph", "pid"} - {"tid"} == KEYS[event["ph"]] - {"tid"}
        assert "tid" in event or event["name"].startswith("process_")
        for key in ("pid", "tid"):
            assert isinstance(event.get(key, 0), int)
        for key in ("ts", "dur"):
            assert isinstance(event.get(key, 0.0), float | int)
            assert event.get(key, 0) >= 0
    timed = [event["ts"] for event in events if event["ph"] != "M"]
    assert timed == sorted(timed)
    names = _names(trace)
    assert all((e["pid"], e["tid"]) in names for e in events if e["ph"] != "M")
    assert len({tid for _, tid in names}) == len(names)  # Perfetto joins equal ones
    _check_overlaps(events)
    _check_arrows(events)


def _check_overlaps(events) -> None:
    free_ns = collections.defaultdict(int)
    for event in events:
        if event["ph"] == "X":
            lane, start_ns = event["tid"], nanoseconds(event["ts"])
            assert start_ns >= free_ns[lane]
            free_ns[lane] = start_ns + nanoseconds(event["dur"])


def _check_arrows(events) -> None:
    """From a transfer that begins to a slice of a request that is there then."""
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    assert ends.keys() == starts.keys()
    assert len(ends) == sum(e["ph"] == "f" for e in events)
    moved = {
        e["args"]["transfer"]: e for e in events if "transfer" in e.get("args", {})
    }
    for id, start in starts.items():
        assert (moved[id]["tid"], moved[id]["ts"]) == (start["tid"], start["ts"])
        ts = ends[id]["ts"]
        assert ts == start["ts"]
        assert any(
            e["ph"] == "X"
            and e["tid"] == ends[id]["tid"]
            and e["ts"] <= ts <= e["ts"] + e["dur"]
            for e in events
        )


def _names(trace) -> dict[tuple[int, int], tuple[str, str]]:
    """(process, lane) by pid and tid."""
    meta = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    processes = {
        e["pid"]: e["args"]["name"] for e in meta if e["name"] == "process_name"
    }
    return {
        (e["pid"], e["tid"]): (processes[e["pid"]], e["args"]["name"])
        for e in meta
        if e["name"] == "thread_name"
    }


def lane_names(trace) -> dict[str, list[str]]:
    """Of each process its lanes, from top to bottom."""
    found = collections.defaultdict(list)
    for (_, _), (process, lane) in sorted(_names(trace).items()):
        found[process].append(lane)
    return dict(found)


def _of(trace, process: str, phase: str):
    names = _names(trace)
    for event in trace["traceEvents"]:
        if event["ph"] == phase:
            owner, lane = names[event["pid"], event["tid"]]
            if owner == process:
                yield lane, event


def slices(trace, process: str) -> list[tuple]:
    """(lane, name, start in seconds, end, args) of a process in the order of time."""
    return [
        (
            lane,
            event["name"],
            nanoseconds(event["ts"]) / 1e9,
            (nanoseconds(event["ts"]) + nanoseconds(event["dur"])) / 1e9,
            event["args"],
        )
        for lane, event in _of(trace, process, "X")
    ]


def by_lane(trace, process: str) -> dict[str, list[tuple]]:
    """The slices of a process as {lane: [(name, start_s, end_s)]}."""
    found = collections.defaultdict(list)
    for lane, name, start_s, end_s, _ in slices(trace, process):
        found[lane].append((name, start_s, end_s))
    return dict(found)


def instants(trace, process: str) -> list[tuple]:
    """(lane, name, seconds) of a process in the order of time."""
    return [
        (lane, event["name"], nanoseconds(event["ts"]) / 1e9)
        for lane, event in _of(trace, process, "i")
    ]
