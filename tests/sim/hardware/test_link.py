"""Links against ideal transfer times."""

import dataclasses
import json

import pytest

from disagg_jax.sim.hardware.link import LINKS, LinkSpec, get_link
from models.lookup import find_model

NAMES = ("nvlink-a100", "nvlink-h100", "pcie5", "400gb", "100gb", "25gb")


@pytest.mark.parametrize(
    ("model", "tokens", "expected_ms"),
    [
        # Ideal one-way ms: bytes of KV over the bandwidth of the wire.
        ("opt-66b", 512, ("4.0", "2.7", "18.9", "24.2", "96.6", "387")),
        ("opt-175b", 2048, ("32.2", "21.5", "151", "193", "773", "3092")),
        ("llama-2-70b", 2048, ("2.2", "1.5", "10.5", "13.4", "53.7", "215")),
        ("llama-3-8b", 2048, ("0.9", "0.6", "4.2", "5.4", "21.5", "86")),
        ("opt-13b", 512, ("1.4", "0.9", "6.6", "8.4", "33.6", "134")),
    ],
)
def test_ideal_times_of_a_requests_kv(model, tokens, expected_ms):
    size_bytes = tokens * find_model(model).kv_bytes_per_token
    for name, text in zip(NAMES, expected_ms, strict=True):
        ms = 1000 * get_link(name).ideal().transfer_s(size_bytes)
        digits = len(text.partition(".")[2])
        assert f"{ms:.{digits}f}" == text, name


def test_latency_efficiency_and_lanes():
    link = dataclasses.replace(
        get_link("25gb"), latency_s=0.5, bandwidth_bytes_s=100.0, efficiency=0.5
    )
    assert link.transfer_s(0) == 0.5
    assert link.transfer_s(100) == 2.5  # .5 + 100 / (.5 * 100)
    assert link.transfer_s(100, lanes=4) == 1.0
    assert link.ideal().transfer_s(100, lanes=2) == 0.5


@pytest.mark.parametrize("name", LINKS)
def test_presets_are_slower_than_their_bound(name):
    link = get_link(name)
    assert link.transfer_s(1e6) > link.ideal().transfer_s(1e6) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_s": -1e-6}, "latency_s: expected >= 0, got -1e-06"),
        ({"bandwidth_bytes_s": 0.0}, "bandwidth_bytes_s: expected > 0, got 0.0"),
        ({"efficiency": 1.2}, r"efficiency: expected in \(0, 1\], got 1.2"),
        ({"efficiency": 0.0}, r"efficiency: expected in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_links_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(get_link("pcie5"), **change)


def test_bad_transfers_are_refused():
    with pytest.raises(ValueError, match="size_bytes: expected >= 0, got -1"):
        get_link("pcie5").transfer_s(-1)
    with pytest.raises(ValueError, match="lanes: expected >= 1, got 0"):
        get_link("pcie5").transfer_s(1, lanes=0)
    with pytest.raises(ValueError, match="link: .*'pcie5'.*, got 'pcie6'"):
        get_link("pcie6")


OWN = {"latency_s": 1e-5, "bandwidth_bytes_s": 1.25e9, "efficiency": 0.9}


def write(tmp_path, content):
    path = tmp_path / "office.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_link_of_ones_own_is_a_file(tmp_path):
    found = get_link(write(tmp_path, OWN))
    assert found == LinkSpec(name="office", **OWN)
    # 10 us + 9e9 bytes / (0.9 * 1.25e9 bytes/s)
    assert found.transfer_s(9e9) == pytest.approx(8.00001, abs=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"latency_s": 1e-5}, r"expected the numbers \['latency_s', .*, got \['lat"),
        (OWN | {"mtu": 9000}, r"expected the numbers \['latency_s', 'bandwidth_by"),
        (OWN | {"latency_s": "5us"}, "latency_s: expected a finite number, got '5us'"),
        (OWN | {"latency_s": True}, "latency_s: expected a finite number, got True"),
        (OWN | {"efficiency": 2}, r"efficiency: expected in \(0, 1\], got 2"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_the_fault_of_a_link_file_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"office.json: {message}"):
        get_link(write(tmp_path, content))


def test_a_link_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        get_link("nowhere.json")
