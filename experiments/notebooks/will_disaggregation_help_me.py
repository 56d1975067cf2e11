# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main/experiments/notebooks/will_disaggregation_help_me.ipynb)
#
# # Will disaggregation help me?
#
# Your model, hardware, latency targets and trace in; the system that serves the most
# requests in time, its margin and how sure that is out. Simulated, so it needs no
# accelerator: a minute or two on a laptop.

# %%
# @title On Colab: get the code. Elsewhere: find it.
import os
import pathlib
import subprocess
import sys

address = "https://github.com/disagg-jax/disagg-jax"
here = pathlib.Path.cwd()
places = [*(here, *here.parents), here / "disagg-jax"]
found = [at for at in places if (at / "experiments" / "here.py").exists()]
if "google.colab" in sys.modules:
    if not found:
        subprocess.run(["git", "clone", "--depth=1", address], check=True)
        found = [here / "disagg-jax"]
    install = [sys.executable, "-m", "pip", "install", "-qe", str(found[0])]
    subprocess.run(install, check=True)
if not found:
    raise SystemExit(
        "This notebook runs from a checkout of its project, and found none. "
        "In a terminal:\n\n"
        f"    git clone {address}\n    pip install -e ./disagg-jax\n\n"
        f"in {here}, then run this cell again; or open the notebook in the checkout."
    )
os.chdir(found[0])  # scripts and configs run from the checkout
if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())

# %% [markdown]
# ## What is here
#
# The simulator runs on the processor, one process for each core. On a laptop this reads
# `8 devices (cpu: cpu)`; accelerators, if any, are not used.

# %%
from experiments import machine

print(machine.look().found)

# %% [markdown]
# ## Your model
#
# A name that the simulator knows (`llama-3-8b`, `opt-66b`, ...), or a `.json` file: the
# `config.json` of a Hugging Face model, or these sizes. This one is Llama-3-8B's; change
# it to yours.

# %%
import json
import pathlib

out = pathlib.Path("runs/notebooks/will_it_help")
out.mkdir(parents=True, exist_ok=True)
sizes = {
    "layers": 32,
    "embed": 4096,
    "q_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp": 14336,
    "gated_mlp": True,
    "vocab": 128256,
    "tie_embeddings": False,
}
(out / "my-model.json").write_text(json.dumps(sizes))
model = "runs/notebooks/will_it_help/my-model.json"  # @param {type: "string"}

# %%
from models.lookup import find_model

model_config = find_model(model)
print(f"{model_config.name}: {model_config.num_params / 1e9:.2f} billion weights")
print(f"{model_config.kv_bytes_per_token / 1024:.0f} KiB of KV for each token")

# %% [markdown]
# ## Your hardware and targets
#
# A device that the simulator knows, or a `.json` file that says which one yours is like
# and what differs: `{"like": "h100", "hbm_bytes_s": 4.8e12, "memory_bytes": 141e9}`.
# Every system gets all devices, and the best way to cut them into instances.

# %%
hardware = "a100-80g"  # @param ["a100-80g", "h100", "tpu-v5e", "tpu-v5p", "tpu-v6e"] {allow-input: true}
devices = 4  # @param {type: "integer"}
ttft_s = 0.5  # @param {type: "number"}
tpot_s = 0.02  # @param {type: "number"}

# %%
from disagg_jax.metrics import SLO
from disagg_jax.sim.hardware.presets import get_hardware

device, targets = get_hardware(hardware), SLO(ttft_s=ttft_s, tpot_s=tpot_s)
print(f"{devices} x {device.name}: {device.peak_flops / 1e12:.0f} TFLOP/s and")
print(
    f"{device.hbm_bytes_s / 1e12:.2f} TB/s each, {device.memory_bytes / 2**30:.0f} GiB"
)

# %% [markdown]
# ## Your trace
#
# A CSV file with columns for arrival (`arrival_s`), prompt (`prompt_tokens`) and output
# (`output_tokens`), an Azure trace, or Mooncake's JSON lines. Its lengths and the
# pattern of its gaps are kept; the rate is what the search varies. This one is made up:
# bursts of requests with long prompts and short answers.

# %%
import csv

import numpy as np

rng = np.random.default_rng(0)
n = 2000
arrival_s = np.cumsum(rng.gamma(shape=0.8, scale=1.25, size=n))
prompt = np.clip(rng.lognormal(mean=6.8, sigma=0.7, size=n), 1, 4096)
output = np.clip(rng.lognormal(mean=4.2, sigma=0.6, size=n), 1, 1024)
with (out / "my-trace.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["arrival_s", "prompt_tokens", "output_tokens"])
    writer.writerows(
        zip(arrival_s, prompt.astype(int), output.astype(int), strict=True)
    )
trace = "runs/notebooks/will_it_help/my-trace.csv"  # @param {type: "string"}

# %%
from IPython.display import Image

from disagg_jax.workload import TraceWorkload
from disagg_jax.workload.traces import load_trace
from experiments import compare_systems
from experiments.comparison.report import plot_lengths

workload = TraceWorkload.fitting(load_trace(trace), 8192)
plot_lengths(workload, out / "lengths.png")
Image(filename=out / "lengths.png")

# %% [markdown]
# ## The answer
#
# Every system is searched for the highest rate at which 90 % of the requests meet both
# targets, with equal requests at equal seeds, each system with the step size that its own
# paper would choose. The same from a shell:
#
# ```
# python -m experiments.compare_systems --map=targets --ttfts=0.5 --tpots=0.02 \
#     --devices=4 --hardware=a100-80g --model=runs/notebooks/will_it_help/my-model.json \
#     --trace=runs/notebooks/will_it_help/my-trace.csv --out=runs/answer
# ```

# %%
from disagg_jax.scheduling.tuning import tile_multiples
from disagg_jax.search.comparison import ComparisonSpec
from disagg_jax.search.maps import slos_map
from disagg_jax.sim import Simulation
from experiments.comparison.report import answer

spec = ComparisonSpec(
    simulation=Simulation.of(model, hardware, max_context=8192),
    devices=devices,
    sizes=tile_multiples(max(128, device.tile_rows)),
)
cell = slos_map([ttft_s], [tpot_s], workload, pathlib.Path(trace).name)
report, (grid,) = compare_systems.run(spec, [cell], out=out)
(found,) = grid.values()
print(answer(found))

# %%
Image(filename=out / "maps.png")

# %% [markdown]
# Bars whose intervals overlap may still differ: systems are compared pairwise, seed by
# seed, on the same requests. That is the ratio in the sentence above. The whole report,
# with the parameters of each system and why it has them:

# %%
print(report)

# %%
assert {one.system for one in found} >= {"vllm_v0", "sarathi_serve", "disaggregated"}
assert all(one.rps >= 0 for one in found)

# %% [markdown]
# ## Where the answer flips
#
# The same question with twice the time per token: the tighter that target, the more it
# is worth to keep prompts away from decodes. From a shell, more values for `--ttfts`
# and `--tpots` give a map: in each cell stand the winner, its goodput, and disaggregated
# over the best colocated system (d/c); hatched cells have no clear winner.

# %%
looser = slos_map([ttft_s], [2 * tpot_s], workload, pathlib.Path(trace).name)
_, (grid,) = compare_systems.run(spec, [looser], out=out / "looser")
(found,) = grid.values()
print(answer(found))
Image(filename=out / "looser" / "maps.png")

# %% [markdown]
# ## How far to trust it
#
# Durations are a roofline's: peaks of the device times the share of them that published
# measurements reach (`disagg_jax/sim/hardware/presets.py`; for TPUs that share is
# assumed). Both sides have the same, so a ratio is safer than a rate. A few seeds of a
# few hundred requests see differences of ten percent, not of two: give
# `ComparisonSpec` more `num_requests` and `looks`. To hold the simulator against your own machine: `python -m experiments.calibrate` and
# `python -m experiments.accuracy`.
