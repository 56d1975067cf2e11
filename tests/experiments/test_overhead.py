"""Every part of the report runs, and says what it claims to say."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from disagg_jax.engine.executor import run_alone
from disagg_jax.work import Step
from experiments import overhead
from experiments.benchmarks.attention import AttentionShape
from experiments.benchmarks.engines import NamedShape
from experiments.benchmarks.handoff import (
    handoff_engine,
    plain_device_put,
    scattered_transfer,
)
from experiments.benchmarks.no_op_programs import NoOpGroup, host_step_us
from experiments.benchmarks.timing import Figure, interleaved, table, values_in_turn
from experiments.cli.flags import integers, writable
from experiments.overhead import OverheadOptions
from models.config import get_config
from tests.commands import run_command
from tests.deadlines import After

TINY = dataclasses.replace(get_config("tiny"), layers=1)  # quick to compile
SMALL = OverheadOptions(
    config=TINY,
    batches=[2],
    handoff_mib=[1],
    repeats=1,
    prompt=16,
    output=4,
    prefill_tokens=32,
    attention=AttentionShape(rows=2, tokens=[64], block_tokens=16, q_heads=8),
    named=NamedShape(
        config=TINY, requests=4, prompt=8, output=6, batch=2, prefill_rows=2
    ),
)


def figure(**changes) -> Figure:
    fields = {"part": "p", "name": "n", "unit": "us", "bound_name": "b"}
    return Figure(**{**fields, "measured": 90.0, "bound": 100.0, **changes})


# -- figures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "aim", "met"),
    [("more", 0.9, True), ("more", 0.91, False), ("less", 0.9, True)]
    + [("less", 0.89, False), ("more", None, None)],
)
def test_an_aim_is_a_bound_of_the_ratio(better, aim, met):
    assert figure(better=better, aim=aim).met is met


def test_the_printed_ratio_is_that_of_the_printed_numbers():
    values = [(1234.5678, 1937.0), (0.01234, 5.5), (97.06, 116.0), (3e6, 1e6)]
    figures = [figure(measured=a, bound=b) for a, b in values]
    for line in table(figures).splitlines()[1:]:
        _, _, measured, bound, _, ratio, *_ = line.split()
        # Four digits are printed of each number, and two decimals of the ratio.
        computed = float(measured) / float(bound)
        assert float(ratio) == pytest.approx(computed, rel=2e-3, abs=0.006)


def test_medians_leave_the_warm_up_round_out():
    order = []

    def measure(name, values):
        def next_value():
            order.append(name)
            return values.pop(0)

        return next_value

    measures = {"a": measure("a", [99, 1, 5, 3]), "b": measure("b", [0, 7, 7, 8])}
    assert interleaved(3, measures) == {"a": 3, "b": 7}
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize(("asked", "rounds"), [(0, 1), (1, 2), (9, 3)])
def test_one_round_is_always_taken_after_the_warm_up(asked, rounds):
    said, values = [], iter(range(9))
    found = values_in_turn(
        3, {"a": lambda: next(values)}, lambda *s: said.append(s), After(asked).passed
    )
    assert found == {"a": [1, 2, 3][:rounds]}
    assert said == [("rounds", i, 4, "") for i in range(1 + rounds)]


# -- parts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (
            "host",
            ["B2 step", "B2 - pack", "B2 - put, dispatch", "B2 - readback"]
            + ["B2 controller", "B2 whole loop"],
        ),
        ("decode", ["B2 whole loop"]),
        ("prefill", ["4 x 8 whole loop"]),
        ("attention", ["B2 over 64 tokens"]),
        (
            "handoff",
            [
                f"{pair} 1 MiB"
                for pair in ("TP4->TP4", "TP4->TP2", "TP2->TP4", "TP1->TP4")
                for _ in ("copy", "three copies", "device_put")
            ],
        ),
        (
            "m32",
            ["throughput", "TTFT P50", "TPOT P50", "bare decode step"],
        ),
    ],
)
def test_a_part_measures_what_it_lists(part, names, capsys):
    figures = overhead.run([part], SMALL)
    assert [f.name for f in figures] == names
    for found in figures:
        assert 0 < found.measured < math.inf and 0 < found.bound < math.inf
    printed = capsys.readouterr().out
    assert "load average" in printed
    assert all(name in printed for name in names)


def test_parts_that_there_was_no_time_for_are_named(capsys):
    said = []
    figures = overhead.run(
        ["decode", "host", "m32"], SMALL, lambda *step: said.append(step), After(1)
    )
    assert {figure.part for figure in figures} == {"decode"}
    assert said == [("parts on 2 devices", 0, 3, "now decode")]
    printed = capsys.readouterr().out
    assert printed.endswith("left out, as --minutes were spent: host, m32\n\n")


def arguments(program) -> list:
    leaves = jax.tree.leaves(program.args_info)
    return [(leaf.shape, leaf.dtype, leaf.donated) for leaf in leaves]


def test_no_op_programs_take_and_return_the_same_but_do_no_work():
    deployment, shape, requests = overhead._full_batch(SMALL, 2)
    engine = deployment.engine
    no_ops = NoOpGroup.replace(engine, engine.instances[0].buckets.step_shapes)
    real, stub = (group.program(shape) for group in (no_ops.real, no_ops))
    assert arguments(stub) == arguments(real)
    assert stub.out_tree == real.out_tree
    assert stub.cost_analysis().get("flops", 0) == 0 < real.cost_analysis()["flops"]
    timelines = deployment.run(requests).timelines
    assert [t.tokens for t in timelines] == [[0] * SMALL.output] * 2
    step_us = host_step_us(engine, no_ops, shape, steps=1)
    assert step_us.pop("step") == pytest.approx(sum(step_us.values()))


def test_a_full_batch_is_one_prefill_step_and_then_decodes_of_the_listed_shape():
    deployment, shape, requests = overhead._full_batch(SMALL, 2)
    steps = []
    deployment.run(requests, observer=lambda now_s, events, works: steps.extend(works))
    (instance,) = deployment.engine.instances
    assert all(isinstance(step, Step) for step in steps)
    shapes = [instance.step_shape(step.slices) for step in steps]
    assert shapes == [instance.buckets.prefill[0]] + [shape] * (SMALL.output - 1)


@pytest.mark.parametrize("src_tp, dst_tp", [(4, 4), (4, 2), (1, 4)])
def test_both_sides_of_a_hand_off_do_the_same_work(src_tp, dst_tp):
    engine = handoff_engine(TINY, src_tp, dst_tp, [4], block_tokens=4)
    src, dst = engine.instances
    transfer = scattered_transfer(engine, 4)
    rng = np.random.default_rng(0)
    for run in (
        lambda: run_alone(engine, transfer),
        plain_device_put(engine, transfer.src_blocks),
    ):
        shape, sharding = src.cache[0][0].shape, src.programs.stages[0].kv_sharding
        sent = rng.normal(size=(2, *shape)).astype(np.float32)  # k, v of the one layer
        src.cache[0] = tuple(jax.device_put(part, sharding) for part in sent)
        run()
        for part, want in zip(dst.cache[0], sent, strict=True):
            assert part.sharding == dst.programs.stages[0].kv_sharding
            np.testing.assert_array_equal(np.asarray(part)[:4], want[:4])


# -- command line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (["host", "speed"], {}, "expected some of .*, got 'speed'"),
        ([], {}, "expected some of .*, got none"),
        (["host"], {"batches": [0]}, r"batches: expected numbers >= 1, got \[0\]"),
        (["host"], {"repeats": 0}, "repeats: expected numbers >= 1"),
        (["handoff"], {"handoff_mib": []}, "handoff_mib: expected numbers >= 1"),
        (["decode"], {"batches": [16], "prompt": 1000, "output": 100}, "1100 tokens"),
    ],
)
def test_bad_options_are_refused_before_any_work(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        overhead.run(parts, dataclasses.replace(SMALL, **changes))


def test_a_part_that_lacks_devices_is_refused(monkeypatch):
    monkeypatch.setattr(overhead.jax, "devices", lambda: [None] * 4)
    with pytest.raises(ValueError, match="handoff needs 8 devices, got 4"):
        overhead.run(["handoff"], SMALL)


def test_parts_share_a_process_if_they_need_as_many_devices():
    assert overhead._by_devices(list(overhead.PARTS)) == [
        ["host", "decode", "prefill", "attention", "m32"],
        ["handoff"],
    ]


def test_bad_flags_are_one_clear_error():
    done = run_command("overhead", "--model=gpt")
    assert done.returncode == 1
    assert "error: model: expected one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_json_holds_every_figure_and_its_ratio():
    found = json.loads(overhead.to_json([figure(aim=0.9).to_json()]))
    assert found["figures"][0]["ratio"] == 0.9
    assert found["figures"][0]["met"] is True
    assert len(found["load_average"]) == 3


@pytest.mark.parametrize("path", ["/", "/no/such/folder/file.json"])
def test_an_unwritable_file_is_refused(path):
    with pytest.raises(ValueError, match=f"out: expected .*, got '{path}'"):
        writable(path)


def test_numbers_are_parsed_or_named():
    assert integers("batches", ["16", "64"]) == [16, 64]
    with pytest.raises(ValueError, match="batches: expected integers, got"):
        integers("batches", ["16", "many"])
