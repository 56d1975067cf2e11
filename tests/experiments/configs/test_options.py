"""An option that cannot matter is refused, and so is a flag; one that can is not."""

import contextlib
import dataclasses
import json
from typing import ClassVar

import pytest
from absl import flags

from experiments.cli.flags import expect_once, expect_used
from experiments.configs import options
from experiments.configs.config import Config, WorkloadConfig
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import check
from experiments.configs.override import override
from experiments.papers import FIGURES
from experiments.papers.figure import Lab
from tests.commands import run_code

TRACE = ["workload.source=trace", "workload.trace=FILE.csv"]
CHUNK = "systems.sarathi.policies.colocated.chunk_tokens=64"


def fields_of(kind, prefix=""):
    """The dotted keys of a dataclass and the dataclasses that are its defaults."""
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default):
            yield from fields_of(type(field.default), f"{key}.")
        else:
            yield key


def has_row(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: i + 1]) in options.CONFIG for i in range(len(parts)))


def test_every_field_of_a_config_says_when_it_matters():
    """A new field belongs into `options.CONFIG`: with what it needs, or as ALWAYS."""
    keys = set(fields_of(Config))
    assert not {key for key in keys if not has_row(key)}
    # And no row is about a field that is gone.
    known = {key[:end] for key in keys for end in range(len(key) + 1)}
    assert not options.CONFIG.keys() - known
    # Whatever has a part in the table is named part by part, or new ones hide there.
    assert "workload" not in options.CONFIG and "search" not in options.CONFIG


@pytest.mark.parametrize("name", CONFIGS)
def test_a_named_config_sets_nothing_that_has_no_effect(name):
    check(get_config(name))


def test_arrivals_matter_beside_a_trace_without_times_only(tmp_path):
    def change(header):
        (tmp_path / "t.csv").write_text(f"{header}\n1,2,3\n2,3,4\n")
        source = ["workload.source=trace", f"workload.trace={tmp_path / 't.csv'}"]
        override(get_config("tiny"), [*source, "workload.arrivals.kind=fixed"])

    change("x,num_prefill_tokens,num_decode_tokens")
    with pytest.raises(ValueError, match="expected .* or a trace without times, got"):
        change("arrival_s,prompt_tokens,output_tokens")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The workload: a trace has lengths and arrivals of its own, HumanEval prompts.
        (["workload.trace=x"], "workload.trace: expected workload.source=trace, got "),
        (["workload.trace_scale=0.5"], "expected workload.source=trace, got"),
        ([*TRACE, "workload.prompt_tokens=fixed:9"], "expected workload.source=random"),
        ([*TRACE, "workload.output_tokens=fixed:9"], "source=random or human_eval, "),
        (
            ["workload.source=human_eval", "workload.prompt_tokens=fixed:9"],
            "got workload.source=human_eval, where workload.prompt_tokens=fixed:9 has",
        ),
        (["workload.source=human_eval", "workload.trace=x"], "source=trace, got"),
        # Durations.
        (["cost.step_base_s=2"], "cost.step_base_s: expected durations=modelled, got "),
        (["cost.decode_token_s=1", "durations=live"], "got durations=live, where"),
        (["cost.pp=2,2"], "cost.pp: expected durations=modelled"),
        (["durations=modelled", "cost.pp=2,2"], "stages that each deployment says"),
        (["timing_repeats=3", "durations=modelled"], "durations=table or live, got"),
        (["durations=live", "clock=wall"], "durations: expected clock=virtual, got"),
        (["durations=modelled", "clock=wall"], "where durations=modelled has no"),
        (["execute_all=true", "clock=wall"], "execute_all: expected clock=virtual"),
        (
            ["execute_all=true", "durations=live"],
            "expected durations=table or modelled",
        ),
        (["execute_all=true", "workload.ignore_eos=false"], "got workload.ignore_eos="),
        (["layer_groups=2", "durations=modelled"], "or live or a link, got durations="),
        # Links, where a formula has its own.
        (
            ["durations=modelled", "link=25gb", "cost.transfer_base_s=1"],
            "cost.transfer_base_s: expected no link, got link=25gb",
        ),
        (
            ["durations=modelled", "cost.transfer_parts=2"],
            "expected streams=true, got streams=false",
        ),
        # Targets.
        (
            ["slo.ttft_s=1", "slo.ttft_scale=2"],
            "ttft_scale: expected no slo.ttft_s",
        ),
        (["slo.tpot_s=1", "slo.tpot_scale=2"], "got slo.tpot_s=1.0, where"),
        (["slo.preset=llama2-70b", "slo.tpot_scale=2"], "expected no slo.preset, got"),
        (
            ["slo.preset=llama2-70b", "slo.ttft_s=1", "slo.tpot_s=1"],
            "slo.preset: expected no slo.ttft_s or no slo.tpot_s, got slo.ttft_s=1.0",
        ),
        # The search, and step sizes.
        (["rates=1,2", "search.growth=2"], "search.growth: expected no rates, got "),
        (["rates=1", "search.max_rates=5"], "got rates=1.0, where search.max_rates=5"),
        (["step_tokens=64", "tune=false"], "tune: expected no step_tokens, got step_"),
        (["step_tokens=64", CHUNK], "chunk_tokens: expected no step_tokens, got"),
    ],
)
def test_an_option_without_effect_says_what_would_give_it_one(changes, message):
    with pytest.raises(ValueError) as error:
        override(get_config("tiny"), changes)
    assert message in str(error.value)
    assert str(error.value).endswith("has no effect")


@pytest.mark.parametrize(
    "changes",
    [
        [*TRACE, "workload.trace_scale=0.5"],
        ["workload.source=human_eval", "workload.output_tokens=fixed:9"],
        ["workload.source=human_eval", "workload.arrivals.kind=fixed"],
        ["durations=modelled", "cost.step_base_s=2", "cost.transfer_token_s=1"],
        ["durations=modelled", "streams=true", "cost.transfer_parts=2"],
        ["durations=modelled", "link=25gb", "layer_groups=2"],
        # The SLO is a multiple of medians, whatever clock the requests are served on.
        ["durations=live", "timing_repeats=3"],
        ["clock=wall", "timing_repeats=3", "layer_groups=2"],
        ["execute_all=true", "durations=modelled"],
        ["slo.ttft_s=1", "slo.tpot_scale=2"],
        ["slo.preset=llama2-70b", "slo.ttft_s=1"],
        # What systems are ranked by, whatever rates they ran at.
        ["rates=1,2", "search.target=0.5", "search.tolerance=0.2"],
        ["search.growth=2", "search.max_rates=5"],
        ["tune=false", CHUNK],
        ["step_tokens=64", "systems.vllm_v0.policies.colocated.max_batched_tokens=64"],
        ["step_tokens=64", "systems.sarathi.policies.colocated.max_seqs=4"],
        # With one layer group a chunk leaves while the next is computed.
        ["streams=true", "link=25gb"],
        ["seed=3", "num_seeds=2", "memory.max_context=256", "criterion=mlperf"],
        # An option's default is never refused.
        ["workload.trace=", "cost.step_base_s=0.001", "clock=wall", "durations=table"],
        [*TRACE, "workload.prompt_tokens=uniform:32:256"],
    ],
)
def test_an_option_that_matters_is_taken(changes):
    override(get_config("tiny"), changes)


@pytest.mark.parametrize(
    "change",
    ["trace_scale=2", "trace_rows=9", "trace_unit=ms", "ties=keep", "too_long=clip"],
)
def test_what_is_about_a_trace_needs_one(change):
    override(get_config("tiny"), [*TRACE, f"workload.{change}"])
    for other in ([], ["workload.source=human_eval"]):
        with pytest.raises(ValueError, match="expected workload.source=trace, got wor"):
            override(get_config("tiny"), [*other, f"workload.{change}"])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (["cost.transfer_base_s=1"], "a system of prefill and decode instances"),
        (["cost.transfer_token_s=1"], "a system of prefill and decode instances"),
        (["cost.transfer_parts=2"], "a system of prefill and decode instances"),
        (["streams=true"], "a system of prefill and decode instances"),
        (["link=25gb"], "a system of prefill and decode instances"),
    ],
)
def test_what_is_about_transfers_needs_a_system_that_has_them(changes, missing):
    """One of several is enough; a colocated one alone is not."""
    config = override(get_config("tiny"), ["durations=modelled"])
    streams = ["streams=true"] if "parts" in changes[0] else []
    override(config, [*streams, *changes])
    only = dataclasses.replace(config, systems={"vllm_v0": config.systems["vllm_v0"]})
    with pytest.raises(ValueError, match=f"expected {missing}, got 2xcolocated:tp1"):
        override(only, changes)


@pytest.mark.parametrize("key", ["transfer_base_s", "transfer_token_s"])
def test_a_link_is_in_place_of_the_formula_of_transfers(key):
    changes = ["durations=modelled", "link=25gb", f"cost.{key}=1"]
    with pytest.raises(ValueError, match="expected no link, got link=25gb"):
        override(get_config("tiny"), changes)
    parts = ["streams=true", "cost.transfer_parts=2", *changes[:2]]
    with pytest.raises(ValueError, match="transfer_parts: expected no link"):
        override(get_config("tiny"), parts)


def test_a_value_that_a_config_begins_with_was_not_set():
    """Whatever the default; nor is the default set, whatever the config begins with."""
    config = override(get_config("tiny"), ["durations=modelled", "cost.step_base_s=2"])
    table = dataclasses.replace(config, durations="table")
    override(table, ["seed=1"])  # 2 stays, without effect
    override(table, ["cost.step_base_s=0.001"])  # the default of the field
    with pytest.raises(ValueError, match="cost.step_base_s=3.0 has no effect"):
        override(table, ["cost.step_base_s=3"])


def test_a_command_says_what_it_does_not_read():
    """Of a whole part too; and what it reads is as before."""
    elsewhere = options.read_by("a command", not_by="another", keys=["slo", "rates"])
    override(get_config("tiny"), ["num_seeds=2"], elsewhere)
    for change in ("slo.ttft_s=1", "rates=1"):
        key = change.partition("=")[0]
        message = f"^{key}: expected a command, got another, where {key}=1.0 has no eff"
        with pytest.raises(ValueError, match=message):
            override(get_config("tiny"), [change], elsewhere)


def test_all_that_would_give_an_option_an_effect_is_named():
    """Either of two values, or another option; and all that is there instead."""
    changes = ["durations=modelled", "layer_groups=2"]
    with pytest.raises(ValueError) as error:
        override(get_config("tiny"), changes)
    assert str(error.value) == (
        "layer_groups: expected durations=table or live or a link, got "
        "durations=modelled and no link, where layer_groups=2 has no effect"
    )


def test_values_are_shown_as_they_are_typed():
    assert options.shown((1.0, 2.5)) == "1.0,2.5"
    assert options.shown([True, "a"]) == "true,a"


def test_arrivals_are_not_refused_where_the_trace_cannot_be_read():
    """What is wrong with the file is said by what reads it."""
    override(get_config("tiny"), [*TRACE, "workload.arrivals.kind=fixed"])


def test_step_sizes_need_one_system_that_has_them():
    override(get_config("tiny"), ["step_tokens=64"])  # vllm has none


def test_what_a_named_config_sets_may_lose_its_effect():
    """The user did not set it, and asks for something else."""
    config = override(get_config("smoke"), ["durations=modelled"])
    assert config.timing_repeats == 5
    override(config, ["clock=virtual"])
    random = override(get_config("azure_trace"), ["workload.source=random"])
    assert random.workload.trace_scale == 0.125
    # But it may not be changed then.
    with pytest.raises(ValueError, match="timing_repeats=3 has no effect"):
        override(get_config("smoke"), ["durations=modelled", "timing_repeats=3"])
    with pytest.raises(ValueError, match="workload.trace=other.csv has no effect"):
        override(random, ["workload.trace=other.csv"])


def test_a_config_made_in_python_is_compared_with_the_defaults():
    config = get_config("tiny")
    made = dataclasses.replace(config, workload=WorkloadConfig(trace="x.csv"))
    with pytest.raises(ValueError, match="expected workload.source=trace"):
        check(made)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vllm_v0", "streams=true", "streams: expected a system of prefill and decode"),
        ("vllm_v0", "link=25gb", "instances, got 2xcolocated:tp1, where link=25gb has"),
        (
            "vllm_v0",
            "step_tokens=64",
            "whose paper chooses a step size, got vllm_v0, where",
        ),
        ("vllm_v0", "tune=false", "tune: expected a system whose paper chooses"),
    ],
)
def test_an_option_may_have_no_effect_on_the_systems(name, change, message):
    config = get_config("tiny")
    only = dataclasses.replace(config, systems={name: config.systems[name]})
    with pytest.raises(ValueError) as error:
        override(only, [change])
    assert message in str(error.value)


def test_parameters_of_a_role_need_an_instance_of_it():
    config = get_config("tiny")
    vllm, apart = (config.systems[name] for name in ("vllm_v0", "disaggregated"))
    both = dataclasses.replace(vllm, policies={**vllm.policies, **apart.policies})
    config = dataclasses.replace(config, systems={"vllm_v0": both})
    override(config, ["systems.vllm_v0.policies.colocated.max_seqs=3"])
    with pytest.raises(ValueError, match="decode instances, got 2xcolocated:tp1"):
        override(config, ["systems.vllm_v0.policies.decode.max_seqs=3"])


# -- flags -----------------------------------------------------------------------------


@pytest.fixture
def given():
    """A parsed command line of three flags."""
    values = flags.FlagValues()
    holders = [
        flags.DEFINE_string("trace", None, "", flag_values=values),
        flags.DEFINE_list("sizes", ["1", "2"], "", flag_values=values),
        flags.DEFINE_bool("whole", False, "", flag_values=values),
    ]

    def parse(*arguments):
        values(["command", *arguments])
        return holders

    return parse


def test_a_flag_without_effect_says_what_would_give_it_one(given):
    why = {"expected": "--map=targets", "got": "--map=lengths"}
    holders = given("--sizes=4", "--whole")
    expect_used(True, *holders, **why)
    with pytest.raises(ValueError) as error:
        expect_used(False, *holders, **why)
    assert str(error.value) == (
        "--sizes: expected --map=targets, got --map=lengths, where --sizes=4 has no "
        "effect"
    )
    with pytest.raises(ValueError, match="--whole=true has no effect"):
        expect_used(False, holders[2], **why)
    expect_used(False, holders[0], **why)


def test_a_flag_that_is_not_set_or_is_its_default_is_not_refused(given):
    expect_used(False, *given("--sizes=1,2", "--nowhole"), expected="a", got="b")


def test_a_flag_and_the_option_that_it_is_short_for_are_not_both_set(given):
    trace, sizes, _ = given("--trace=x")
    expect_once(sizes, "workload.sizes", ["workload.sizes=3"])
    expect_once(trace, "workload.trace", ["workload.trace_scale=3", "seed=1"])
    with pytest.raises(ValueError, match="--trace: expected no --set of it, got work"):
        expect_once(trace, "workload.trace", ["seed=1", "workload.trace=y"])


# By module, so that each is imported once: a command line, and what it says.
REFUSED = {
    "simulate": {
        "--trace=x --config=opt13b_a100 --deployment=colocated:tp1 --out=/dev/null/x "
        "--streamed_groups=2": "--streamed_groups: expected prefill and decode instan",
    },
    "compare_systems": {
        "--map=lengths --ttfts=1": "--ttfts: expected --map=targets or both, got --map",
        "--map=lengths --tpots=1": "--tpots: expected --map=targets or both",
        "--map=lengths --workload=sharegpt": "--workload: expected --map=targets or",
        "--map=lengths --trace=x": "--trace: expected --map=targets or both",
        "--map=targets --prompts=9": "--prompts: expected --map=lengths or both",
        "--map=targets --outputs=9": "--outputs: expected --map=lengths or both",
        "--map=targets --sigma=1": "--sigma: expected --map=lengths or both",
        "--map=targets --slo=1,1": "--slo: expected --map=lengths or both",
        "--workload=sharegpt --trace=x": "--workload: expected no --trace, got --trace",
        "--rate=2": "--rate: expected --map=targets with one --ttfts and one --tpots",
        "--map=targets --max_devices=9": "--max_devices: expected --map=targets with",
        "--map=targets --ttfts=1 --tpots=1 --max_devices=9": "--max_devices: expected "
        "a --trace or a --rate, got neither",
        "--map=targets --config=opt13b_a100 --max_tokens=99": "--max_tokens: expected "
        "a map of lengths, a trace, or no --config, got --map=targets and --config=",
    },
    "placement_search": {
        "--trace=x --workload=longbench": "--workload: expected no --trace, got --trac",
        "--max_tokens=99": "--max_tokens: expected a --trace, got none",
        "--trace_rows=9": "--trace_rows: expected a --trace, got none",
        "--system=orca --systems=sarathi": "--systems: expected no --system, got --sys",
        "--algorithm=high --margin=0.2": "--margin: expected --algorithm=low, joint or",
        "--exhaustive --margin=0.2": "--margin: expected no --exhaustive, got --exhaus",
    },
    "goodput_sweep": {
        "--seed=3 --set seed=4": "--seed: expected no --set of it, got seed=4, where",
        "--step_tokens=8 --set step_tokens=4": "--step_tokens: expected no --set of it",
        "--step_times=x --set timing_repeats=4": "timing_repeats: expected no --step_",
        "--step_times=x --set durations=modelled": "--step_times: expected durations=",
        "--set workload.trace=x": "workload.trace: expected workload.source=trace, got",
    },
    "accuracy": {
        "--requests=20 --set workload.num_requests=10": "--requests: expected no --set",
        "--seeds=2 --set num_seeds=1": "--seeds: expected no --set of it, got num_seed",
        "--set rates=1": "rates: expected experiments.goodput_sweep, got experiments.a",
        "--set durations=modelled": "where durations=modelled has no effect",
        "--set step_tokens=64": "where step_tokens=64 has no effect",
        "--set clock=wall --set tune=false": "where tune=false has no effect",
        "--set streams=true": "streams and link: expected none, as the simulator's",
        "--config=tiny_streams --set streams=false": "got streams=False and link=25gb",
    },
    "calibrate": {
        "--set slo.ttft_s=1": "got experiments.calibrate, where slo.ttft_s=1.0 has no",
        "--set clock=wall": "where clock=wall has no effect",
        "--set num_seeds=3": "where num_seeds=3 has no effect",
        "--model=kv --set model=m32": "--model: expected no --set of it, got model=m32",
        "--requests=20 --set workload.num_requests=9": "--requests: expected no --set",
        "--show=x --rounds=5": "--rounds: expected no --show, got --show=x, where",
        "--show=x --set seed=5": "--set: expected no --show, got --show=x, where",
    },
    "reproduce": {
        "--list --seeds=3": "--seeds: expected no --list, got --list, where --seeds=3",
        "--figure=fig2 --num_requests=9": "--num_requests: expected --all or --figure=",
        "--figure=sarathi_table4 --seeds=3": "--seeds: expected --all or --figure=",
        "--figure=fig8a --search_times=x": "--search_times: expected --all or --figure="
        "fig12, got --figure=fig8a, where --search_times=x has no effect",
        "--figure=fig2 --engine=vllm": "--engine: expected --all or --figure=",
        "--figure=fig99 --seeds=3": "--figure: expected one of [",
    },
    "overhead": {
        "--parts=m32 --model=kv": "--model: expected --parts with host or decode or ",
        "--parts=prefill --batches=4": "--batches: expected --parts with host or deco",
        "--parts=host,m32 --handoff_mib=4": "--parts with handoff, got --parts=host,m3",
    },
}
# What all of a module's command lines need.
REQUIRED = {
    "placement_search": "--model=opt-13b --devices=2 --slo=1,1",
    "accuracy": "--profile=x",
}

RUN = """
import importlib, json, sys
module = importlib.import_module(f"experiments.{sys.argv[1]}")
for line in json.loads(sys.argv[2]):
    try:
        module.main(["command", *line.split()])
    except SystemExit as end:
        print(json.dumps(end.code or "it ran"))
"""


@pytest.mark.jax
@pytest.mark.parametrize("module", REFUSED)
def test_a_command_refuses_a_flag_that_has_no_effect(module, tmp_path):
    required = REQUIRED.get(module, "")
    lines = [f"--out={tmp_path}/out {required} {line}" for line in REFUSED[module]]
    done = run_code(RUN, module, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for line, got, message in zip(
        REFUSED[module], said, REFUSED[module].values(), strict=True
    ):
        assert got.startswith("error: ") and message in got, line
    assert not (tmp_path / "out").exists()


class _Done(Exception):
    """A figure has asked for its runs."""


class _Watched(Lab):
    """Notes what a figure reads, up to its runs."""

    seen: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        if name in ("num_requests", "seeds", "search_times", "engine"):
            _Watched.seen.add(name)
        return super().__getattribute__(name)

    def map(self, task, items):
        del task, items
        _Watched.seen.add("workers")
        raise _Done


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_reads_of_its_lab(name):
    lab = _Watched(num_requests=8, seeds=2)
    _Watched.seen.clear()
    with contextlib.suppress(_Done):
        FIGURES[name].make(lab)
    # It copies its lab, and so reads all of it.
    copied = {"search_times", "engine"} if name == "goodput_n" else set()
    assert {*FIGURES[name].reads, *copied} == _Watched.seen
