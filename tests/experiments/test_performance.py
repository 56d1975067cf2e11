"""The bounds are those worked out by hand, and the command prints every part."""

import dataclasses
import gzip
import json
import os

import jax.numpy as jnp
import pytest

from disagg_jax.programs import StepShape
from disagg_jax.work import StepLoad
from experiments import performance
from experiments.benchmarks.dense_baseline import dense_step
from experiments.benchmarks.engines import bare_engine
from experiments.benchmarks.peaks import Peaks, StepBound
from experiments.cli import host_devices
from experiments.performance import StepOptions, StepTime
from models import transformer
from models.config import ModelConfig, get_config
from models.transformer import forward
from tests.commands import run_command
from tests.deadlines import After

TINY = dataclasses.replace(get_config("tiny"), layers=1)
SMALL = StepOptions(
    config=TINY,
    batches=[1, 2],
    context=32,
    prompts=[16],
    block_tokens=16,
    handoff_mib=1,
    repeats=1,
)
# 2 layers of 4 * (2 * 2 + 2 * 1) * 2 + 3 * 4 * 8 = 144 weights, a table of 4 * 10.
SHAPE = ModelConfig(
    name="hand",
    layers=2,
    embed=4,
    q_heads=2,
    kv_heads=1,
    head_dim=2,
    mlp=8,
    vocab_size=10,
    tie_embeddings=True,
    norm_eps=1e-5,
    max_length=64,
    dtype="float32",
)


def bound(load, *, bytes_s=1.0, flops=1.0):
    return StepBound.of(SHAPE, load, Peaks(bytes_s=bytes_s, flops=flops))


def test_a_decode_step_moves_the_weights_and_the_context_that_is_there():
    """3 requests with 50 tokens together.

    Weights 2 * 144 + 40 = 328, of 4 bytes; KV 2 * 1 * 2 * 4 = 16 bytes a layer and
    token. FLOPs: 2 for each weight and request.
    """
    found = bound(StepLoad((), 3, 50), bytes_s=2.0, flops=1e9)
    assert found.size_bytes == 328 * 4 + 2 * 16 * 50 == 2912
    assert found.flops == 2 * 328 * 3 == 1968
    assert found.seconds == pytest.approx(2912 / 2)


def test_a_prefill_step_computes_causal_attention_and_one_row_of_logits():
    """A prompt of 6 tokens.

    Layers 2 * 288 * 6, logits 2 * 40, attention 4 * (2 * 2) * 6 * 6 / 2 in 2 layers.
    """
    found = bound(StepLoad(((0, 6),), 0, 0), bytes_s=1e9, flops=4.0)
    assert found.flops == 3456 + 80 + 576 == 4112
    assert found.size_bytes == 328 * 4
    assert found.seconds == pytest.approx(4112 / 4)


def test_a_row_says_shares_of_the_peaks_of_the_bound_and_of_the_others():
    """2 requests in 4 s: 0.5 tok/s, moving 60 bytes of the 80 that 20 B/s allow."""
    step = StepTime(
        kind="decode",
        size=2,
        seconds=4.0,
        dense_s=6.0,
        bound=StepBound(size_bytes=60.0, flops=10.0, seconds=3.0),
    )
    row = step.row(Peaks(bytes_s=20.0, flops=5.0), peer_tok_s=0.25)
    cells = dict(zip(performance._HEAD, row, strict=True))
    assert cells["tok/s"] == "0.5"
    assert cells["memory"] == "0.75"  # 60 / 4 / 20
    assert cells["compute"] == "0.50"  # 10 / 4 / 5
    assert cells["bound"] == "0.75"  # 3 / 4
    assert cells["over dense"] == "1.50"  # 6 / 4
    assert cells["over peer"] == "2.00"  # 0.5 / 0.25


def test_every_row_of_a_decode_attends_to_all_of_the_context():
    assert performance.step_loads(SMALL) == {
        StepShape.decode(1, 2): StepLoad((), 1, 32),
        StepShape.decode(2, 4): StepLoad((), 2, 64),
        StepShape.prefill(16, 1): StepLoad(((0, 16),), 0, 0),
    }


def test_without_prompts_there_are_decodes_alone():
    options = dataclasses.replace(SMALL, prompts=[])
    kinds = {shape.kind for shape in performance.step_loads(options)}
    assert kinds == {"decode"}


def test_the_report_has_every_part(capsys):
    report = performance.run(SMALL)
    assert report == capsys.readouterr().out
    names = ["memory bandwidth", "matmul", "decode 1", "decode 2", "prefill 16"]
    names += ["B1 step", "B2 step", "TP1->TP1 1 MiB", "load average"]
    assert all(name in report for name in names)


def test_a_report_whose_time_is_spent_has_one_round_and_says_what_it_lacks(capsys):
    options = dataclasses.replace(SMALL, repeats=4)
    report = performance.run(options, deadline=After(0))
    assert report == capsys.readouterr().out
    assert all(name in report for name in ("matmul", "decode 2", "prefill 16"))
    assert "B1 step" not in report
    missing = "3 of 4 rounds, host, handoff"
    assert f"left out, as --minutes were spent: {missing}\n" in report


def test_the_dense_cache_decodes_what_the_oracle_does():
    """Token after token, so that the last one sees all that was written."""
    params = transformer.init_params(TINY, 0)
    tokens = [5, 9, 200, 17, 3]
    shape = (2, TINY.kv_heads, 8, TINY.head_dim)
    cache = [(jnp.zeros(shape), jnp.zeros(shape))]
    for position, token in enumerate(tokens):
        at = jnp.full(2, position)
        # The second row is always a token ahead of the first: rows differ.
        both = jnp.array([token, (token + 1) % TINY.vocab_size])
        cache, out = dense_step(TINY, params, cache, both, at)
    for row in range(2):
        logits = forward(TINY, params, jnp.array(tokens) + row)
        assert out[row] == logits[-1].argmax()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches: expected numbers >= 1"),
        ({"prompts": [0]}, "prompts: expected numbers >= 1"),
        ({"repeats": 0}, "repeats: expected numbers >= 1"),
        ({"handoff_mib": -1}, "handoff_mib: expected >= 0, got -1"),
        ({"context": 40}, "context: expected a multiple of block_tokens=16, got 40"),
        ({"prompts": [10**9]}, "tiny: expected at most"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_cores_that_are_not_there_are_refused():
    before = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match=f"expected 1 to {len(before)}, got 0"):
        host_devices.pin(0)
    with pytest.raises(ValueError, match="cores: expected"):
        host_devices.pin(len(before) + 1)
    assert os.sched_getaffinity(0) == before


def test_a_bad_flag_ends_the_command_with_one_line():
    done = run_command("performance", "--batches=x")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: batches: expected integers, got ['x']"


def test_a_trace_has_a_span_for_each_step_and_programs_inside_it(tmp_path):
    options = dataclasses.replace(SMALL, trace=tmp_path)
    engine = bare_engine(TINY, list(performance.step_loads(options)), 16)
    performance.trace_steps(options, engine, tmp_path)

    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    for step in ("decode 1", "decode 2", "prefill 16"):
        assert spans[step]["dur"] > 0
    assert any("Execute" in name for name in spans)
