"""Devices with the source of each constant.

"spec" below means the maker's data sheet; those of Blackwell as glennklockwood.com,
verda.com and docs.vultr.com (inference cookbook) quote them. "measured" means read from
published kernel timings: (aic) those of NVIDIA's aiconfigurator
(github.com/ai-dynamo/aiconfigurator), the others those of it or of Vidur
(github.com/microsoft/vidur, data/profiling), or of the named source. For the TPUs and
the CPU we found no measured efficiency. Theirs are assumed, each with its reason, and
results from them are bounds with a guess rather than predictions. For the H200 and the
Blackwell GPUs the shares that an H100 reaches are assumed, for the L40S the A100's.

Peaks are dense. Those of narrower operands are FP8's and FP4's: nothing here computes
in integers, in which an A100 and the TPUs are faster than in bf16.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.hardware.device import (
    AllReduce,
    AllToAll,
    EfficiencyCurve,
    Hardware,
)
from disagg_jax.sim.hardware.link import LinkSpec, get_link
from disagg_jax.sim.hardware.numbers import expect_numbers
from models.files import read_json

# t0 where nothing was measured: roughly the launches of a stage where the host's other
# work is hidden. Engines differ far more. DistServe's prefill constants are 12-43 ms
# (its simulator's fits), and vLLM of 2023 needs 20-40 ms: Splitwise's table
# (perf_model.csv) has Llama-2-70B decodes at 43-45 ms with tp = 4 as with tp = 8.
_STEP_S = 1e-3

# Between nodes of 8 H100s, each with a NIC of 400 Gb/s.
# All-reduce: over two nodes (github.com/dstackai/dstack, its page on Nebius; NCCL) it
# takes 38 us for 64 kB, 82 us for 1 MB, 205 us for 16 MB and 472 us for 64 MB. Used is
# the line through the first and the last, which is up to half below those between.
# All-to-all: DeepEP (github.com/deepseek-ai/DeepEP, docs/legacy.md: 128 tokens, H800s)
# takes 118 and 195 us for 7.6 and 14.7 MB over 16 devices, 155 and 273 us over 32, 173
# and 314 us over 64. On the lines through them, with alphas of 36, 29 and 22 us, the
# bytes that leave the node take 44-46 GB/s of a NIC's 50.
_NODES = (16, 32, 64)  # devices of two, four and eight nodes
_NODES_REDUCE = AllReduce(37e-6, 289e9)
_NODES_ALPHA_S, _NIC_BYTES_S = 29e-6, 45e9


def _over_nodes(node: Hardware, nic: LinkSpec) -> Hardware:
    """Return the devices of one node in several nodes, with a NIC for each device.

    Assumed: other NICs scale the bandwidth, which is at most that inside a node, and an
    all-reduce over more nodes takes as long as over two.
    """
    scale = nic.bandwidth_bytes_s / get_link("400gb").bandwidth_bytes_s
    bus_bytes_s = min(scale * _NODES_REDUCE.bus_bytes_s, node.all_reduce[8].bus_bytes_s)
    reduce = AllReduce(_NODES_REDUCE.alpha_s, bus_bytes_s)
    exchanges: dict[int, AllToAll] = {}
    for devices in _NODES:
        # Of the bytes for others, (devices - 8) / (devices - 1) are for other nodes.
        nic_bytes_s = scale * _NIC_BYTES_S * (devices - 1) / (devices - 8)
        bytes_s = min(nic_bytes_s, node.all_to_all[8].bytes_s)
        exchanges[devices] = AllToAll(_NODES_ALPHA_S, bytes_s)
    return dataclasses.replace(
        node,
        between=nic,
        all_reduce={**node.all_reduce, **dict.fromkeys(_NODES, reduce)},
        all_to_all={**node.all_to_all, **exchanges},
    )


# An all-to-all over NVLink, on a GB200 NVL72 (github.com/NVIDIA/TensorRT-LLM, tech blog
# 18): by devices, the line through 1 and 2048 tokens of 115 kB, mean of dispatch (19 us
# for one token) and combine (31 us).
_EXCHANGES = {
    8: AllToAll(25e-6, 703e9),
    16: AllToAll(25e-6, 686e9),
    32: AllToAll(26e-6, 657e9),
    64: AllToAll(30e-6, 650e9),
}


def _exchanges(bytes_s: float) -> dict[int, AllToAll]:
    """Return all-to-alls inside a node; their alpha is assumed to be the GB200's."""
    return dict.fromkeys((2, 4, 8), AllToAll(_EXCHANGES[8].alpha_s, bytes_s))


_A100 = Hardware(
    name="a100-80g",
    peak_flops=312e12,  # spec: bf16 and fp16, dense
    hbm_bytes_s=2.039e12,  # spec: SXM, 80 GB
    memory_bytes=80 * 2**30,  # DistServe's capacities fit 80 GiB (tests)
    # measured (aic), rows 128 ... 4096
    gemm_mfu=EfficiencyCurve(
        ((128, 0.47), (256, 0.67), (512, 0.73), (1024, 0.83), (4096, 0.88))
    ),
    weight_mbu=0.685,  # measured (aic), m <= 64: .67-.70
    # measured, 512 ... 8k tokens
    attention_mfu=EfficiencyCurve(
        ((512, 0.24), (1024, 0.36), (2048, 0.46), (4096, 0.52), (8192, 0.55))
    ),
    # measured: MBU .49 / .68 / .75 where a layer's kernel reads 64-256 MB / .25-1 GB /
    # 1-4 GB. The time at each bin's geometric middle (128, 512, 2048 MB) lies on
    # 47.4 us + bytes / (0.779 W) to 0.2 %. Below 64 MB the line is extrapolated.
    kv_mbu=0.779,
    kv_startup_s=47.4e-6,
    # measured: alpha of vLLM's custom all-reduce, captured; bandwidth at about 1 GB
    all_reduce={
        2: AllReduce(5e-6, 199e9),
        3: AllReduce(5e-6, 210e9),  # assumed: between 2 and 4; OPT-175B runs on 3
        4: AllReduce(5e-6, 221e9),
        8: AllReduce(6e-6, 228e9),
    },
    all_to_all=_exchanges(200e9),  # assumed: the H100's share of NVLink
    hop=get_link("nvlink-a100"),
    step_s=_STEP_S,  # assumed
    tile_rows=128,  # Sarathi (arXiv 2308.16369): tiles of 128 rows
)
# The same device, and twice with the next pipeline stage on another node.
_A100S = (
    _over_nodes(_A100, get_link("200gb")),  # DGX A100 datasheet
    *(
        dataclasses.replace(
            _over_nodes(_A100, nic), name=f"a100-80g-{nic.name}", hop=nic
        )
        for nic in (get_link("100gb"), get_link("200gb"))
    ),
)
# We have no published efficiencies of an L40S. Its tensor cores take the same
# instructions as the A100's, whose shares are assumed.
_L40S = _over_nodes(
    dataclasses.replace(
        _A100,
        name="l40s",
        peak_flops=362.05e12,  # datasheet: bf16, dense
        peak_flops_by_bits={8: 733e12},  # datasheet: FP8, dense
        hbm_bytes_s=864e9,  # datasheet: 48 GB GDDR6
        memory_bytes=46068 * 2**20,  # of 48 GB, without the part for ECC (aic)
        # assumed: a ring at what PCIe 4.0 is assumed to reach, and aic's latency of it
        all_reduce=dict.fromkeys((2, 4, 8), AllReduce(10e-6, 25.6e9)),
        all_to_all=_exchanges(25.6e9),  # assumed likewise
        hop=get_link("pcie4"),
    ),
    get_link("200gb"),  # assumed (aic)
)
# Nor of an A6000. The A100's, of the same generation, are assumed. Sarathi's step times
# on it are kept for comparison, so not used.
_A6000 = dataclasses.replace(
    _A100,
    name="a6000",
    peak_flops=154.8e12,  # datasheet: 309.7 TFLOPS of fp16 with sparsity, half dense
    hbm_bytes_s=768e9,  # datasheet: 48 GB GDDR6, 384 bits
    memory_bytes=48 * 2**30,  # datasheet, read as for the A100
    all_reduce={},  # none is known
    all_to_all={},
    hop=get_link("pcie4"),
)
_H100_NODE = Hardware(
    name="h100",
    peak_flops=989e12,  # spec: SXM, bf16, dense
    peak_flops_by_bits={8: 1979e12},  # spec: SXM, FP8, dense
    hbm_bytes_s=3.35e12,  # spec: SXM
    memory_bytes=80 * 2**30,  # spec: 80 GB, read as for the A100
    # measured (aic), rows 128 ... 4096
    gemm_mfu=EfficiencyCurve(
        ((128, 0.34), (256, 0.63), (512, 0.80), (1024, 0.86), (4096, 0.85))
    ),
    weight_mbu=0.825,  # measured (aic), m <= 64: .81-.84
    # measured, 512 ... 8k tokens
    attention_mfu=EfficiencyCurve(
        ((512, 0.15), (1024, 0.25), (2048, 0.37), (4096, 0.49), (8192, 0.55))
    ),
    # measured as for the A100: MBU .48 / .77 / .90, on 39.6 us + bytes / (0.958 W)
    kv_mbu=0.958,
    kv_startup_s=39.6e-6,
    # measured as for the A100
    all_reduce={
        2: AllReduce(4e-6, 332e9),
        4: AllReduce(5e-6, 355e9),
        8: AllReduce(5e-6, 362e9),
    },
    # measured on an H20, whose NVLink is the same (DeepEP, issue 138): 344 GB/s, with
    # the eighth that stays on the device
    all_to_all=_exchanges(300e9),
    hop=get_link("nvlink-h100"),
    step_s=_STEP_S,  # assumed
    tile_rows=128,  # as the A100
)
_H100 = _over_nodes(_H100_NODE, get_link("400gb"))  # DGX H100 datasheet
# An H100 with more and faster memory. We have no published timings of one kernel on it:
# the H100's shares of the peaks are assumed. So is its line of decode attention, though
# a start of 39.6 us weighs more where the bytes take less time.
_H200 = dataclasses.replace(
    _H100,
    name="h200",
    peak_flops=989e12,  # spec: SXM, bf16, dense (printed: 1,979 with sparsity)
    hbm_bytes_s=4.8e12,  # spec: HBM3e
    memory_bytes=141 * 2**30,  # spec: 141 GB, read as for the A100
)
# Blackwell, in nodes of 8 devices and in racks of 72: one NVLink joins all of them.
_B200_NODE = dataclasses.replace(
    _H100_NODE,
    name="b200",
    peak_flops=2250e12,  # spec: HGX, bf16, dense
    peak_flops_by_bits={8: 4500e12, 4: 9000e12},  # spec: HGX, FP8 and FP4, dense
    hbm_bytes_s=8e12,  # spec (verda.com: 7.7 TB/s)
    memory_bytes=180 * 2**30,  # spec: 1,440 GB for 8, read as for the A100
    # assumed: the H100's alphas, and its shares of an NVLink of twice the bandwidth
    all_reduce={
        2: AllReduce(4e-6, 664e9),
        4: AllReduce(5e-6, 710e9),
        8: AllReduce(5e-6, 724e9),
    },
    all_to_all=_exchanges(_EXCHANGES[8].bytes_s),  # measured on a GB200
    hop=get_link("nvlink5"),
)
_B300_NODE = dataclasses.replace(
    _B200_NODE,
    name="b300",
    # spec, for 8 devices: 72 PFLOPS of FP8 with sparsity, half dense, and 105 of FP4,
    # dense (verda.com: 112)
    peak_flops_by_bits={8: 4500e12, 4: 13125e12},
    memory_bytes=270 * 2**30,  # spec, without the part for ECC; read as for the A100
)
_GB200 = dataclasses.replace(
    _B200_NODE,
    name="gb200",
    # spec, for 72 devices: 360 PFLOPS of bf16, 720 of FP8 and 1,440 of FP4 with
    # sparsity, half dense; 13.4 TB of memory and 576 TB/s
    peak_flops=2500e12,
    peak_flops_by_bits={8: 5000e12, 4: 10000e12},
    memory_bytes=186 * 2**30,
    # Up to 8 assumed as for the B200. Above, the bandwidth of 72 devices at 1 GB
    # (github.com/coreweave/nccl-tests, pull request 43: 681-724 GB/s), and about the
    # time of one token over 8 devices of two trays in a fused kernel: 10.9 us with the
    # norm that follows (github.com/lightseekorg/tokenspeed, pull request 860).
    all_reduce={
        **_B200_NODE.all_reduce,
        **dict.fromkeys((16, 32, 64, 72), AllReduce(10e-6, 700e9)),
    },
    # measured; 72 assumed as 64
    all_to_all={**_B200_NODE.all_to_all, **_EXCHANGES, 72: _EXCHANGES[64]},
    between=get_link("400gb"),  # a ConnectX-7 for each device (MLPerf systems)
    node_devices=72,
)
_GB300 = dataclasses.replace(
    _GB200,
    name="gb300",
    # spec, for 72 devices: 1,080 PFLOPS of FP4, dense; bf16 and FP8 as the GB200; 20 TB
    # of memory and 576 TB/s
    peak_flops_by_bits={8: 5000e12, 4: 15000e12},
    memory_bytes=279 * 2**30,
    between=get_link("800gb"),  # a ConnectX-8 for each device
)
_GPUS = (
    *(*_A100S, _A6000, _L40S, _H100, _H200),
    _over_nodes(_B200_NODE, get_link("400gb")),  # ConnectX-7 (MLPerf systems)
    _over_nodes(_B300_NODE, get_link("800gb")),  # spec: 1.6 TB/s both ways for 8
    _GB200,
    _GB300,
)


_RING = (2, 4, 8, 16)  # tensor parallel sizes of a ring of TPU chips


def _tpu(
    name: str,
    *,
    peak_flops: float,
    hbm_bytes_s: float,
    memory_bytes: float,
    ici: LinkSpec,
    pod: int,
) -> Hardware:
    """Describe a TPU chip; the shares of its peaks are assumed.

    A ring of chips sends both ways, so its bus bandwidth is two links, with one hop's
    latency for each chip (the scaling book's all-reduce, on one axis of the torus). An
    axis of the 2-D torus (v5e, v6e) has up to 16 chips, one of the 3-D torus (v5p) 24.
    """
    ring_bytes_s = 2 * ici.efficiency * ici.bandwidth_bytes_s
    return Hardware(
        name=name,
        peak_flops=peak_flops,
        hbm_bytes_s=hbm_bytes_s,
        memory_bytes=memory_bytes,
        # assumed: 40 % is the scaling book's guess for prefill; it measured none
        gemm_mfu=EfficiencyCurve.constant(0.4),
        attention_mfu=EfficiencyCurve.constant(0.4),
        # assumed: between the A100's .69 and the H100's .83
        weight_mbu=0.8,
        kv_mbu=0.8,
        kv_startup_s=0.0,  # assumed: one compiled program has no launch per layer
        all_reduce={tp: AllReduce(tp * ici.latency_s, ring_bytes_s) for tp in _RING},
        hop=ici,
        node_devices=pod,
        step_s=_STEP_S,  # assumed
        tile_rows=8,  # a bf16 operand enters the MXU in groups of 8 rows
    )


_V5E = _tpu(
    "tpu-v5e",
    peak_flops=197e12,  # spec (scaling book; Google Cloud, docs/v5e), bf16
    hbm_bytes_s=0.819e12,  # Google Cloud, docs/v5e; scaling book: 0.81-0.82
    memory_bytes=16e9,  # spec
    ici=get_link("ici-v5e"),
    pod=256,  # Google Cloud, docs/v5e
)
_V5P = _tpu(
    "tpu-v5p",
    peak_flops=459e12,  # Google Cloud, docs/v5p, bf16
    hbm_bytes_s=2.765e12,  # Google Cloud, docs/v5p
    memory_bytes=95e9,  # Google Cloud, docs/v5p: 95 GB (later pages: GiB)
    ici=get_link("ici-v5p"),
    pod=8960,  # Google Cloud, docs/v5p
)
_V6E = _tpu(
    "tpu-v6e",
    peak_flops=918e12,  # Google Cloud, docs/v6e, bf16
    hbm_bytes_s=1.64e12,  # Google Cloud, docs/v6e, 2025 (later pages: 1600 GB/s)
    memory_bytes=32e9,  # Google Cloud, docs/v6e
    ici=get_link("ici-v6e"),
    pod=256,  # Google Cloud, docs/v6e
)
_CPU = Hardware(
    # Two cores of a server, for examples: no particular machine, and every number is
    # assumed. Devices share nothing, unlike JAX's host devices, which share the cores.
    name="cpu",
    peak_flops=192e9,  # 2 cores x 3 GHz x 32 float32 FLOPs (AVX2, two FMA units)
    hbm_bytes_s=20e9,  # one DDR4 channel, about
    memory_bytes=8e9,
    gemm_mfu=EfficiencyCurve.constant(0.5),
    weight_mbu=0.5,
    attention_mfu=EfficiencyCurve.constant(0.25),
    kv_mbu=0.5,
    kv_startup_s=0.0,
    all_reduce={tp: AllReduce(50e-6, 5e9) for tp in (2, 4, 8)},
    hop=get_link("memory"),
    step_s=_STEP_S,
    tile_rows=1,
)
HARDWARE: Mapping[str, Hardware] = types.MappingProxyType(
    {x.name: x for x in (*_GPUS, _V5E, _V5P, _V6E, _CPU)}
)
# Names of systems in AIConfigurator and InferenceX, where they differ from a preset's.
_ALIASES = {
    "a100_sxm": "a100-80g",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
}
# The fields of a device file that may differ from the preset it is like.
_NUMBERS = ("peak_flops", "hbm_bytes_s", "memory_bytes", "step_s")


def get_hardware(name: str) -> Hardware:
    """Return the preset of that name, or the device that a file describes.

    Args:
      name: of a preset, such as "h100", also as AIConfigurator calls it ("h100_sxm");
        or the path of a .json file with `like`, a preset, and the numbers that differ
        from it (peak_flops, hbm_bytes_s, memory_bytes, step_s) or, by bits,
        peak_flops_by_bits ({"8": 2e15}). A narrower peak that is not given keeps its
        ratio to peak_flops, and the device reaches the same shares of its peaks as the
        preset.

    Raises:
      ValueError: naming the presets, if none has that name, or the fault of the file.
      FileNotFoundError: if there is no such file.
    """
    if not name.endswith(".json"):
        preset = _ALIASES.get(name, name)
        expected = f"hardware: expected one of {sorted(HARDWARE)} or a .json file"
        require(preset in HARDWARE, expected, name)
        return HARDWARE[preset]
    path = pathlib.Path(name)
    where, fields = f"hardware: {path}", read_json(path)
    expected = (
        f"'like', a preset, and some of the numbers {list(_NUMBERS)} and "
        "'peak_flops_by_bits'"
    )
    named = isinstance(fields.get("like"), str)
    require(named, f"{where}: expected {expected}", sorted(fields))
    preset = get_hardware(fields.pop("like"))
    narrow = fields.pop("peak_flops_by_bits", {})
    expect_numbers(where, fields, _NUMBERS, expected)
    where, bits = f"{where}: peak_flops_by_bits", ("8", "4")
    require(isinstance(narrow, dict), f"{where}: expected an object", narrow)
    expect_numbers(where, narrow, bits, f"numbers by bits {list(bits)}")
    scale = fields.get("peak_flops", preset.peak_flops) / preset.peak_flops
    peaks = {bits: scale * peak for bits, peak in preset.peak_flops_by_bits.items()}
    peaks |= {int(bits): peak for bits, peak in narrow.items()}
    return dataclasses.replace(
        preset, name=path.stem, peak_flops_by_bits=peaks, **fields
    )
