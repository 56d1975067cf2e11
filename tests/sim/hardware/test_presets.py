"""The presets' collectives against published times, and their names."""

import pytest

from disagg_jax.sim.hardware.presets import HARDWARE, get_hardware

SYSTEMS = (
    *("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm"),
    *("gb200", "gb300", "l40s"),
)
TOKEN_VALUES = 8 * 7168  # a token of DeepSeek-V3 goes to 8 experts


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_names_of_published_rows_are_known(system):
    name = "a100-80g" if system == "a100_sxm" else system.removesuffix("_sxm")
    hardware = get_hardware(system)
    assert hardware is HARDWARE[name]
    assert hardware.between is not None


@pytest.mark.parametrize(
    ("devices", "published_us"),
    # TensorRT-LLM's tech blog 18, GB200 NVL72, bf16, means of dispatch and combine for
    # 1, 32, 128, 512 and 2048 tokens
    [
        (8, (25.0, 25.5, 34.9, 90.6, 317.2)),
        (16, (24.8, 27.2, 37.3, 97.7, 345.9)),
        (32, (25.6, 27.9, 39.5, 106.1, 371.6)),
        (64, (30.2, 29.6, 43.1, 111.2, 385.7)),
    ],
)
def test_all_to_all_of_a_rack(devices, published_us):
    exchange = get_hardware("gb200").all_to_all[devices]
    for tokens, us in zip((1, 32, 128, 512, 2048), published_us, strict=True):
        time_s = exchange.time_s(devices, tokens * 2 * TOKEN_VALUES)
        # The line is above the points in the middle, where start and transfer overlap.
        assert 1e6 * time_s == pytest.approx(us, rel=0.27)


@pytest.mark.parametrize(
    ("devices", "dispatch_us", "combine_us"),
    # DeepEP's low-latency kernels, 128 tokens, FP8 there and bf16 back
    [(16, 118, 195), (32, 155, 273), (64, 173, 314)],
)
def test_all_to_all_of_several_nodes(devices, dispatch_us, combine_us):
    exchange = get_hardware("h100").all_to_all[devices]
    scales = 1 + 4 / 128  # FP8 with a float32 for 128 values
    for size, published_us in ((scales, dispatch_us), (2, combine_us)):
        time_s = exchange.time_s(devices, 128 * size * TOKEN_VALUES)
        assert 1e6 * time_s == pytest.approx(published_us, rel=0.07)


@pytest.mark.parametrize(
    ("name", "devices", "published_gb_s"),
    # DeepEP's bandwidths count what stays on the device; with NICs of 400 Gb/s
    [("b200", 8, 733), ("b200", 16, 90), ("h100", 16, 86), ("h100", 32, 61)],
)
def test_bandwidth_of_an_all_to_all(name, devices, published_gb_s):
    exchange = get_hardware(name).all_to_all[devices]
    ours = exchange.bytes_s * devices / (devices - 1)
    assert ours == pytest.approx(1e9 * published_gb_s, rel=0.1)


def test_all_reduce_of_two_nodes():
    # dstack's page on Nebius, 16 H100s: the line goes through 64 kB and 64 MB
    reduce = get_hardware("h100").all_reduce[16]
    for size_bytes, published_us in ((2**16, 37.7), (2**26, 472.4)):
        ours_us = 1e6 * reduce.time_s(16, size_bytes)
        assert ours_us == pytest.approx(published_us, rel=0.02)


@pytest.mark.parametrize("name", HARDWARE)
def test_more_devices_take_no_less_time(name):
    hardware = HARDWARE[name]
    for collective in (hardware.all_reduce, hardware.all_to_all):
        for size_bytes in (0, 1e6, 1e9):
            sizes = sorted(collective)
            times_s = [collective[n].time_s(n, size_bytes) for n in sizes]
            assert times_s == sorted(times_s)


def test_between_nodes_the_slower_wire_bounds():
    bus = {
        name: {n: reduce.bus_bytes_s for n, reduce in HARDWARE[name].all_reduce.items()}
        for name in ("l40s", "b200", "b300")
    }
    assert bus["l40s"][16] == bus["l40s"][8]  # PCIe inside a node
    assert bus["b200"][16] < bus["b200"][8]  # the NICs
    assert bus["b300"][16] == 2 * bus["b200"][16]


@pytest.mark.parametrize("name", ["gb200", "gb300"])
def test_a_rack_is_one_node(name):
    hardware = get_hardware(name)
    assert hardware.node_devices == max(hardware.all_reduce) == 72
    assert hardware.all_reduce.keys() == hardware.all_to_all.keys()
