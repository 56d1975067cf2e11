"""Closed-loop clients: the next request comes when the last one has ended."""

import dataclasses

import pytest

from disagg_jax.request import Status
from disagg_jax.workload.closed_loop import ClosedLoop
from tests.serving import make_request
from tests.sim.test_simulated_deployment import simulated


def run(clients, requests, spans=True):
    system = dataclasses.replace(simulated("colocated:tp1"), spans=spans)
    loop = ClosedLoop(requests, clients)
    return system.run(loop.first(), followers=loop).timelines


def test_one_client_has_one_request_at_a_time():
    # Every step takes 1 s: a prompt, then a decode for each token but the first.
    timelines = run(1, [make_request(i, prompt=4, out=3) for i in range(3)])
    assert [t.request.arrival_s for t in timelines] == [0, 3, 6]
    assert [t.end_s for t in timelines] == [3, 6, 9]


def test_a_client_goes_on_while_the_other_waits():
    # 0 and 1 are prefilled together until 1 and decode until 2, when 0 ends. 2 comes
    # then, behind the step that starts at 2; it is prefilled from 3 to 4, while 1
    # stalls, and both get their last token at 5.
    lengths = (2, 4, 2)
    requests = [make_request(i, prompt=4, out=n) for i, n in enumerate(lengths)]
    timelines = run(2, requests)
    assert [t.request.arrival_s for t in timelines] == [0, 0, 2]
    assert [t.token_s for t in timelines] == [[1, 2], [1, 2, 3, 5], [4, 5]]


def test_all_are_sent_and_never_more_than_the_clients():
    n, clients = 40, 7
    requests = [make_request(i, prompt=1 + i % 5, out=1 + i % 9) for i in range(n)]
    timelines = run(clients, requests)
    assert [t.request.id for t in timelines] == list(range(n))
    assert all(t.status is Status.FINISHED for t in timelines)
    for one in timelines:
        at_once = sum(
            t.request.arrival_s <= one.request.arrival_s < t.end_s for t in timelines
        )
        assert at_once <= clients
    # A request that ends within a span of decodes is followed at that instant.
    assert timelines == run(clients, requests, spans=False)


def test_a_refused_request_is_followed_at_once():
    requests = [make_request(0, prompt=4000), make_request(1, prompt=4, out=1)]
    first, second = run(1, requests)
    assert first.status is Status.REFUSED
    assert second.request.arrival_s == 0 and second.end_s == 1


def test_no_client_is_refused():
    with pytest.raises(ValueError, match="clients: expected >= 1, got 0"):
        ClosedLoop([], 0)
