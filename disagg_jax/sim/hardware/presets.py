"""Devices with the source of each constant.

"spec" below means the maker's data sheet. "measured" means read from published kernel
timings: (aic) those of NVIDIA's aiconfigurator (github.com/ai-dynamo/aiconfigurator),
the others those of it or of Vidur (github.com/microsoft/vidur, data/profiling). For the
TPUs and the CPU we found no measured efficiency. Theirs are assumed, each with its
reason, and results from them are bounds with a guess rather than predictions.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.hardware.device import AllReduce, EfficiencyCurve, Hardware
from disagg_jax.sim.hardware.link import LinkSpec, get_link
from disagg_jax.sim.hardware.numbers import expect_numbers
from models.files import read_json

# t0 where nothing was measured: roughly the launches of a stage where the host's other
# work is hidden. Engines differ far more. DistServe's prefill constants are 12-43 ms
# (its simulator's fits), and vLLM of 2023 needs 20-40 ms: Splitwise's table
# (perf_model.csv) has Llama-2-70B decodes at 43-45 ms with tp = 4 as with tp = 8.
_STEP_S = 1e-3

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
    hop=get_link("nvlink-a100"),
    step_s=_STEP_S,  # assumed
    tile_rows=128,  # Sarathi (arXiv 2308.16369): tiles of 128 rows
)
# The same device, and twice with the next pipeline stage on another node.
_A100S = (
    _A100,
    dataclasses.replace(_A100, name="a100-80g-100gb", hop=get_link("100gb")),
    dataclasses.replace(_A100, name="a100-80g-200gb", hop=get_link("200gb")),
)
# We have no published efficiencies of an A6000. The A100's, of the same generation, are
# assumed. Sarathi's step times on it are kept for comparison, so not used.
_A6000 = dataclasses.replace(
    _A100,
    name="a6000",
    peak_flops=154.8e12,  # datasheet: 309.7 TFLOPS of fp16 with sparsity, half dense
    hbm_bytes_s=768e9,  # datasheet: 48 GB GDDR6, 384 bits
    memory_bytes=48 * 2**30,  # datasheet, read as for the A100
    all_reduce={},  # none is known
    hop=get_link("pcie4"),
)
_H100 = Hardware(
    name="h100",
    peak_flops=989e12,  # spec: SXM, bf16, dense
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
    hop=get_link("nvlink-h100"),
    step_s=_STEP_S,  # assumed
    tile_rows=128,  # as the A100
)
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


_RING = (2, 4, 8, 16)  # tensor parallel sizes of a ring of TPU chips


def _tpu(
    name: str,
    *,
    peak_flops: float,
    hbm_bytes_s: float,
    memory_bytes: float,
    ici: LinkSpec,
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
        step_s=_STEP_S,  # assumed
        tile_rows=8,  # a bf16 operand enters the MXU in groups of 8 rows
    )


_V5E = _tpu(
    "tpu-v5e",
    peak_flops=197e12,  # spec (scaling book; Google Cloud, docs/v5e), bf16
    hbm_bytes_s=0.819e12,  # Google Cloud, docs/v5e; scaling book: 0.81-0.82
    memory_bytes=16e9,  # spec
    ici=get_link("ici-v5e"),
)
_V5P = _tpu(
    "tpu-v5p",
    peak_flops=459e12,  # Google Cloud, docs/v5p, bf16
    hbm_bytes_s=2.765e12,  # Google Cloud, docs/v5p
    memory_bytes=95e9,  # Google Cloud, docs/v5p: 95 GB (later pages: GiB)
    ici=get_link("ici-v5p"),
)
_V6E = _tpu(
    "tpu-v6e",
    peak_flops=918e12,  # Google Cloud, docs/v6e, bf16
    hbm_bytes_s=1.64e12,  # Google Cloud, docs/v6e, 2025 (later pages: 1600 GB/s)
    memory_bytes=32e9,  # Google Cloud, docs/v6e
    ici=get_link("ici-v6e"),
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
    {x.name: x for x in (*_A100S, _A6000, _H100, _H200, _V5E, _V5P, _V6E, _CPU)}
)
# The fields of a device file that may differ from the preset it is like.
_NUMBERS = ("peak_flops", "hbm_bytes_s", "memory_bytes", "step_s")


def get_hardware(name: str) -> Hardware:
    """Return the preset of that name, or the device that a file describes.

    Args:
      name: of a preset, or the path of a .json file with `like`, a preset, and the
        numbers that differ from it (peak_flops, hbm_bytes_s, memory_bytes, step_s).
        The device reaches the same shares of its peaks as the preset.

    Raises:
      ValueError: naming the presets, if none has that name, or the fault of the file.
      FileNotFoundError: if there is no such file.
    """
    if not name.endswith(".json"):
        expected = f"hardware: expected one of {sorted(HARDWARE)} or a .json file"
        require(name in HARDWARE, expected, name)
        return HARDWARE[name]
    path = pathlib.Path(name)
    where, fields = f"hardware: {path}", read_json(path)
    expected = f"'like', a preset, and some of the numbers {list(_NUMBERS)}"
    named = isinstance(fields.get("like"), str)
    require(named, f"{where}: expected {expected}", sorted(fields))
    preset = get_hardware(fields.pop("like"))
    expect_numbers(where, fields, _NUMBERS, expected)
    return dataclasses.replace(preset, name=path.stem, **fields)
