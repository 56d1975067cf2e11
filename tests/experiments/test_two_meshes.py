"""Prefill and decode on meshes of their own."""

import dataclasses

import pytest

from experiments import two_meshes
from experiments.benchmarks.handoff import Rate
from experiments.two_meshes import Cut
from models.config import get_config
from tests.commands import run_command

MIB = 2**20


@pytest.mark.parametrize(
    ("devices", "prefill", "decode", "expected"),
    [
        (8, None, None, "prefill:tp4,decode:tp2"),
        (4, None, None, "prefill:tp2,decode:tp1"),
        (2, None, None, "prefill:tp1,decode:tp1"),
        (3, None, None, "prefill:tp2,decode:tp1"),
        (8, 1, None, "prefill:tp1,decode:tp1"),
        (8, None, 4, "prefill:tp4,decode:tp4"),
        (8, 2, 6, "prefill:tp2,decode:tp6"),
    ],
)
def test_cuts(devices, prefill, decode, expected):
    assert str(Cut.of(devices, prefill, decode)) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1, None, None), "devices: expected two or more, got 1"),
        ((4, 3, 2), r"expected at most 4 devices together, got \(3, 2\)"),
        ((4, None, 4), r"expected at most 4 devices together, got \(1, 4\)"),
    ],
)
def test_bad_cuts(asked, message):
    with pytest.raises(ValueError, match=message):
        Cut.of(*asked)


@pytest.fixture(scope="module")
def meshes():
    return two_meshes.build(get_config("tiny"), Cut(prefill=4, decode=2))


def test_the_meshes_share_no_device_and_cut_the_heads(meshes):
    text = two_meshes.layout(meshes.engine)
    rows = {line.split()[0]: line for line in text.splitlines()[1:]}
    used = [
        {device.id for device in instance.programs.stages[0].mesh.devices.flat}
        for instance in meshes.engine.instances
    ]
    assert [len(ids) for ids in used] == [4, 2]
    assert not used[0] & used[1]
    assert "{'tensor': 4}" in rows["mesh"] and "{'tensor': 2}" in rows["mesh"]
    assert rows["layers.0.attention.wq"].count("(-, tensor, -)") == 2
    assert not any(name.startswith("layers.1.") for name in rows)
    assert rows["KV"].count("(-, tensor, -, -)") == 2


def test_tokens_are_those_of_one_device_and_a_wrong_one_is_seen(meshes, monkeypatch):
    config = get_config("tiny")
    tokens = two_meshes.check_tokens(config, meshes)
    assert tokens.equal == tokens.total == 4 * 16
    # 3 blocks of each request's 48 prompt tokens.
    assert tokens.moved_bytes == 4 * 48 * config.kv_bytes_per_token
    right = type(meshes).run

    def wrong(self, requests):
        run = right(self, requests)
        if self is meshes:
            run.timelines[0].tokens[3] += 1
        return run

    monkeypatch.setattr(type(meshes), "run", wrong)
    assert two_meshes.check_tokens(config, meshes).equal == tokens.total - 1


def test_the_bound_is_the_links_or_a_copy():
    cut = Cut(prefill=4, decode=2)
    rate = Rate("tp4->tp2", "whole", 900 * 10**6, 0.004, 0.1)
    assert two_meshes.bound_s(rate, cut, None) == 0.1
    link = two_meshes.link_between("NVIDIA H100 80GB HBM3")
    # 450 GB/s on each of two links.
    assert two_meshes.bound_s(rate, cut, link) == pytest.approx(0.001)
    assert two_meshes.link_between("TPU v5 lite") is None
    assert two_meshes.link_between("NVIDIA GB200").name == "nvlink5"
    row = two_meshes.handoff_table([rate], cut, link).splitlines()[1].split()
    assert row == ["whole", "858", "4.00", "225.00", "900.00", "25%"]


def test_the_command(tmp_path):
    done = run_command(
        *("two_meshes", "--prefill=2", "--decode=1"),
        *("--mib=1", "--repeats=1", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert "64 of 64 tokens as on one device" in done.stdout
    assert "prefill:tp2,decode:tp1" in (tmp_path / "two_meshes.txt").read_text()
    assert (tmp_path / "two_meshes.png").stat().st_size > 1000


def test_bad_sizes(tmp_path):
    config, cut = get_config("tiny"), Cut(prefill=1, decode=1)
    with pytest.raises(ValueError, match="mib: expected sizes >= 1, got"):
        two_meshes.run(config, cut, tmp_path, mib=[0])


def test_tokens_that_differ_are_an_error_in_float32_only(tmp_path, monkeypatch):
    config, cut = get_config("tiny"), Cut(prefill=1, decode=1)
    wrong = two_meshes.Tokens(equal=3, total=4, moved_bytes=0, exact=True)
    monkeypatch.setattr(two_meshes, "check_tokens", lambda *_: wrong)
    with pytest.raises(ValueError, match="tokens: expected those of one device, got"):
        two_meshes.run(config, cut, tmp_path, mib=[1], repeats=1)
    half = dataclasses.replace(wrong, exact=False)
    monkeypatch.setattr(two_meshes, "check_tokens", lambda *_: half)
    shown = two_meshes.run(config, cut, tmp_path, mib=[1], repeats=1)
    assert "3 of 4 tokens" in str(shown)
