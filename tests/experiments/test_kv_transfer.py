"""What is measured of KV transfers, and what a request sees of them."""

import dataclasses

import pytest

from disagg_jax.deployment import Role
from disagg_jax.sim.hardware.link import LinkSpec
from experiments import kv_transfer
from experiments.benchmarks.handoff import rates
from experiments.benchmarks.transfers import BLOCK, Mode, modes, serve_alone
from models import transformer
from models.config import get_config
from tests.commands import run_command

SMALL = dataclasses.replace(
    get_config("kv"),
    name="small kv",
    layers=4,
    embed=32,
    q_heads=4,
    kv_heads=4,
    head_dim=8,
)
# So slow that nothing else counts: a block of the model's KV takes a second.
SLOW = LinkSpec(
    name="slow",
    latency_s=0.0,
    bandwidth_bytes_s=float(BLOCK * SMALL.kv_bytes_per_token),
    efficiency=1.0,
)
PROMPT = 8 * BLOCK


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(SMALL, 0)


def seen(params, mode: Mode, deployment="tp1:tp1", link=SLOW):
    return serve_alone(SMALL, params, deployment, "mode", mode, PROMPT, link, 1)


@pytest.mark.parametrize(
    ("name", "deployment", "visible_s"),
    [
        # 8 blocks on a wire of a block a second. Computing takes some ms.
        ("whole", "tp1:tp1", 8.0),
        # Streams hardly begin before the prompt is computed, so all is seen.
        ("groups", "tp1:tp1", 8.0),
        ("chunks, groups", "tp1pp2:tp1", 8.0),
    ],
)
def test_a_slow_link_is_seen_whatever_leaves_when(params, name, deployment, visible_s):
    found = seen(params, modes(4, 2)[name], deployment)
    assert found.visible_s == pytest.approx(visible_s, abs=0.5)
    assert found.phases.move_s == pytest.approx(8.0)
    assert found.size_bytes == PROMPT * SMALL.kv_bytes_per_token
    assert found.second_s == pytest.approx(found.visible_s + found.decode_s)


def test_of_a_fast_link_the_last_part_is_seen(params):
    """With parts that are there long before the next, only the last one's time."""
    fast = dataclasses.replace(SLOW, bandwidth_bytes_s=1e15)
    whole = seen(params, Mode(streams=False), link=fast)
    assert whole.visible_s == pytest.approx(sum(whole.phases))
    assert whole.phases.move_s < 1e-9
    parts = seen(params, Mode(chunks=4), link=fast)
    # Gather and insert of the last of four chunks, if the steps are the slower part.
    assert 0 < parts.visible_s < sum(parts.phases)


def test_chunks_are_whole_blocks_and_cover_the_prompt():
    mode = Mode(chunks=3)
    assert mode.chunk_tokens(100) == 48
    assert mode.buckets(100).transfer_blocks == (3, 7)
    assert mode.policies(100)[Role.PREFILL].token_budget == 48


def test_rates_are_of_equal_bytes_and_of_every_way():
    found = rates(SMALL, [(2, 1)], [2**16], BLOCK, layer_groups=2, repeats=1)
    assert [rate.way for rate in found] == ["plain device_put", "whole", "groups"]
    assert {rate.pair for rate in found} == {"tp2->tp1"}
    (size,) = {rate.size_bytes for rate in found}
    assert size == 2**16
    assert all(rate.seconds > 0 and rate.copy_s > 0 for rate in found)
    lines = kv_transfer.rate_table(found)
    assert len(lines) == 4 and "of a copy" in lines[0]


def test_tables_and_panels_have_every_row(params):
    found = [seen(params, Mode(streams=False))]
    assert len(kv_transfer.seen_table(found)) == 2
    (panel,) = kv_transfer.panels(found)
    assert panel.line == 1.0
    ((x, y),) = panel.series[0].points
    assert x == PROMPT and y == found[0].visible_s / found[0].decode_s


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--prompts=5000", "expected at most 4092 tokens for kv, got 5000"),
        ("--pairs=4-2", "pairs: expected SRC_TP:DST_TP, got '4-2'"),
        ("--deployments=tp1", "deployments: expected PREFILL:DECODE, got 'tp1'"),
        ("--model=none", "none"),
    ],
)
def test_bad_input_is_one_line(flag, message, tmp_path):
    done = run_command("kv_transfer", flag, f"--out={tmp_path}")
    assert done.returncode and message in done.stderr
    assert "Traceback" not in done.stderr
