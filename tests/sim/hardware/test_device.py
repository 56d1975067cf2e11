"""Efficiency curves and devices: no device is faster with more work."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.sim.hardware.device import AllReduce, AllToAll, EfficiencyCurve
from disagg_jax.sim.hardware.presets import HARDWARE, get_hardware

A100 = get_hardware("a100-80g")


def test_a_curve_is_linear_between_its_points_and_constant_outside():
    curve = EfficiencyCurve(((100.0, 0.2), (200.0, 0.3), (600.0, 0.5)))
    assert [curve.at(x) for x in (1, 100, 200, 600, 9999)] == [0.2, 0.2, 0.3, 0.5, 0.5]
    assert curve.at(150) == pytest.approx(0.25)
    assert curve.at(500) == pytest.approx(0.45)
    assert EfficiencyCurve.constant(0.4).at(0.5) == 0.4


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "at least one point"),
        (((100.0, 0.5), (100.0, 0.6)), r"increasing sizes, got \(100.0, 100.0\)"),
        (((100.0, 1.1),), r"efficiency <= 1\), got \(100.0, 1.1\)"),
        (((0.0, 0.5),), r"size > 0, .* got \(0.0, 0.5\)"),
        # 128 rows would take 128/.2 = 640, 256 rows 256/.5 = 512
        (((128.0, 0.2), (256.0, 0.5)), "size / efficiency >= 640 at 256, got 512"),
    ],
)
def test_a_curve_that_no_device_has_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        EfficiencyCurve(points)


@given(
    st.sampled_from(sorted(HARDWARE)), st.integers(1, 10_000), st.integers(1, 10_000)
)
def test_more_work_takes_no_less_time(name, size, more):
    hardware = HARDWARE[name]
    for curve in (hardware.gemm_mfu, hardware.attention_mfu):
        less_time = size / curve.at(size)
        assert less_time <= (size + more) / curve.at(size + more) * (1 + 1e-12)
    assert size <= hardware.rows(size) <= hardware.rows(size + more)
    assert hardware.rows(size) < size + hardware.tile_rows


def test_rows_come_in_tiles_above_the_first():
    rows = [A100.rows(n) for n in (1, 100, 128, 129, 256, 257, 1000)]
    assert rows == [1, 100, 128, 256, 256, 384, 1024]


@pytest.mark.parametrize(
    ("name", "mbus"), [("a100-80g", (0.49, 0.68, 0.75)), ("h100", (0.48, 0.77, 0.90))]
)
def test_the_kv_line_goes_through_the_measured_bins(name, mbus):
    # aiconfigurator's tables: decode attention MBU where 64-256 MB, .25-1 GB, 1-4 GB
    # are read; taken at the bins' geometric middles.
    hardware = get_hardware(name)
    for size_bytes, mbu in zip((128e6, 512e6, 2048e6), mbus, strict=True):
        flow_s = size_bytes / (hardware.kv_mbu * hardware.hbm_bytes_s)
        ours = size_bytes / (hardware.hbm_bytes_s * (hardware.kv_startup_s + flow_s))
        assert ours == pytest.approx(mbu, rel=0.005)  # printed with two digits


def test_all_reduce_by_hand():
    # 5 us + 2 * 3/4 * 2e6 / 3e11 = 5 us + 10 us
    assert AllReduce(5e-6, 3e11).time_s(4, 2e6) == pytest.approx(15e-6)
    assert AllReduce(0.0, math.inf).time_s(4, 2e6) == 0


def test_all_to_all_by_hand():
    # 5 us + 3/4 * 4e6 / 3e11 = 5 us + 10 us: a quarter stays on the device
    assert AllToAll(5e-6, 3e11).time_s(4, 4e6) == pytest.approx(15e-6)
    assert AllToAll(0.0, math.inf).time_s(4, 4e6) == 0


def test_weights_of_a_precision_that_a_device_lacks_compute_in_16_bits():
    b200, h100 = get_hardware("b200"), get_hardware("h100")
    assert [b200.peak(bits) for bits in (16, 8, 4)] == [2250e12, 4500e12, 9000e12]
    assert [h100.peak(bits) for bits in (16, 8, 4)] == [989e12, 1979e12, 989e12]
    assert [A100.peak(bits) for bits in (16, 8, 4)] == [312e12] * 3
    with pytest.raises(ValueError, match=r"bits: expected 16, 8 or 4, got 6"):
        b200.peak(6)


@pytest.mark.parametrize("name", HARDWARE)
def test_half_the_bits_are_at_most_twice_as_fast(name):
    # A sparse peak among dense ones would be four times its wider neighbour; only
    # Blackwell Ultra computes FP4 three times as fast as FP8.
    hardware = HARDWARE[name]
    most = 3 if name in ("b300", "gb300") else 2
    for bits in hardware.peak_flops_by_bits:
        ratio = hardware.peak(bits) / hardware.peak(2 * bits)
        assert 1 <= ratio <= 1.03 * most  # 733 of 362 TFLOP/s: the L40S's datasheet


@pytest.mark.parametrize("name", HARDWARE)
def test_the_ideal_device_has_the_peaks_and_no_overhead(name):
    ideal = get_hardware(name).ideal()
    assert ideal.peak_flops == HARDWARE[name].peak_flops
    assert ideal.gemm_mfu.at(1) == ideal.attention_mfu.at(1) == 1
    assert ideal.weight_mbu == ideal.kv_mbu == 1
    assert ideal.step_s == ideal.kv_startup_s == 0
    assert ideal.rows(129) == 129
    assert ideal.peak_flops_by_bits == HARDWARE[name].peak_flops_by_bits
    assert ideal.all_reduce.keys() == HARDWARE[name].all_reduce.keys()
    assert ideal.all_to_all.keys() == HARDWARE[name].all_to_all.keys()
    assert all(r.time_s(2, 1e9) == 0 for r in ideal.all_reduce.values())
    assert all(e.time_s(2, 1e9) == 0 for e in ideal.all_to_all.values())
    assert ideal.hop.transfer_s(1e9) == 0


@pytest.mark.parametrize(
    ("name", "critical_rows"),
    # F s / (2 W): the rows at which compute takes as long as streaming the weights.
    # A100: the arithmetic intensity of 156 that DistServe states is for 2.0 TB/s;
    # v5e: 240 (scaling book).
    [
        *(("a100-80g", 153), ("h100", 295), ("h200", 206), ("tpu-v5e", 240.5)),
        *(("b200", 281), ("b300", 281), ("gb200", 312.5), ("l40s", 419)),
    ],
)
def test_the_ridge_of_the_roofline(name, critical_rows):
    hardware = get_hardware(name)
    ridge = hardware.peak_flops / hardware.hbm_bytes_s
    assert ridge == pytest.approx(critical_rows, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_flops": 0.0}, "a100-80g: peak_flops: expected > 0, got 0.0"),
        ({"memory_bytes": -1.0}, "memory_bytes: expected > 0, got -1.0"),
        ({"weight_mbu": 1.5}, r"weight_mbu: expected in \(0, 1\], got 1.5"),
        ({"kv_mbu": 0.0}, r"kv_mbu: expected in \(0, 1\], got 0.0"),
        ({"step_s": -1e-3}, "step_s: expected >= 0, got -0.001"),
        ({"tile_rows": 0}, "tile_rows: expected > 0, got 0"),
        ({"node_devices": 0}, "node_devices: expected > 0, got 0"),
        ({"peak_flops_by_bits": {8: 0.0}}, "expected FLOP/s > 0 by bits under 16, got"),
        ({"peak_flops_by_bits": {16: 1e9}}, r"by bits under 16, got \{16: 1000"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(A100, **change)


def test_bad_joins_and_names_are_refused():
    with pytest.raises(ValueError, match="alpha_s: expected >= 0, got -1.0"):
        AllReduce(-1.0, 1.0)
    with pytest.raises(ValueError, match="bus_bytes_s: expected > 0, got 0"):
        AllReduce(0.0, 0)
    with pytest.raises(ValueError, match="alpha_s: expected >= 0, got -1.0"):
        AllToAll(-1.0, 1.0)
    with pytest.raises(ValueError, match="bytes_s: expected > 0, got 0"):
        AllToAll(0.0, 0)
    with pytest.raises(ValueError, match="hardware: .*'h100'.*, got 'b100'"):
        get_hardware("b100")
