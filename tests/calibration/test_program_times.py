"""A deployment by the table of its programs' times: the engine's timelines."""

import dataclasses
import pickle

import pytest

from disagg_jax.calibration.program_times import without_engine
from disagg_jax.calibration.works import every_work
from disagg_jax.engine.executor import from_table
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.workload import RandomWorkload, parse_lengths
from experiments.configs.config import System
from experiments.sweep.serving import build_engines
from tests.experiments.calibrating import CONFIG, make_model

WORKLOAD = RandomWorkload(
    prompt=parse_lengths("uniform:2:200"), output=parse_lengths("uniform:1:20")
)


def table(engine, streams=False):
    """Every program takes another time."""
    keys = {k for w in every_work(engine, streams=streams) for k in engine.part_keys(w)}
    return {key: (1 + i / 7) * 1e-3 for i, key in enumerate(sorted(keys))}


def last(request, instances):
    """Pick the last instance, as no router of ours does."""
    return instances[len(instances) - 1]


def stamps(run):
    return [
        dataclasses.replace(timeline, request=None) for timeline in run.timelines
    ], run.busy_s


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", CONFIG.systems)
def test_it_serves_as_the_engine_does_in_another_process_too(known, name, streams):
    """Pipeline stages, transfers and streams included."""
    engine = known[name]
    served = ServedDeployment(
        engine=engine,
        policies=CONFIG.systems[name].policies,
        streams=streams,
        timing=from_table(engine, table(engine, streams)),
        executed=False,
    )
    timed = pickle.loads(pickle.dumps(without_engine(served)))
    requests = WORKLOAD.requests(60, 60.0, seed=3)
    assert stamps(timed.run(requests)) == stamps(served.run(requests))


def test_it_keeps_the_routers():
    system = System.of("disaggregated", "2xprefill:tp1,2xdecode:tp1")
    config = dataclasses.replace(CONFIG, systems={"two": system})
    engine = build_engines(config, make_model())["two"]
    served = ServedDeployment(
        engine=engine,
        policies=system.policies,
        prefill_router=last,
        decode_router=last,
        timing=from_table(engine, table(engine)),
        executed=False,
    )
    timed = pickle.loads(pickle.dumps(without_engine(served)))
    shares = timed.run(WORKLOAD.requests(20, 60.0, seed=3)).busy_shares(
        engine.deployment
    )
    assert [share > 0 for (share,) in shares] == [False, True, False, True]


def test_on_the_wall_clock_there_is_no_such_table(known):
    policies = CONFIG.systems["orca"].policies
    served = ServedDeployment(engine=known["orca"], policies=policies)
    with pytest.raises(ValueError, match="expected that of a virtual clock"):
        without_engine(served)
