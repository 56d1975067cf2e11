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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main/experiments/notebooks/on_a_tpu_slice_or_multi_gpu_host.ipynb)
#
# # On a TPU slice or a multi-GPU host
#
# Prefill and decode on meshes of their own, cut from the devices that are there, with
# unequal tensor parallelism; the tokens held against one device; and the hand-off of KV
# over the real interconnect, beside its bound.

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
# On a TPU v5e-8 or a host with eight GPUs this reads `8 devices (tpu: TPU v5 lite)` or
# `8 devices (gpu: NVIDIA H100 ...)`. In Colab choose a TPU with *Runtime > Change runtime
# type*. A host without accelerators is split into `8 devices (cpu: cpu)`: what is shown
# is then as correct, but host devices share the cores, so it says nothing about speed.
# With a single chip there is no second mesh: the notebook
# *Disaggregation in five minutes* says what can be measured on one.

# %%
from experiments import machine

here = machine.look()
print(here.found)

# %% [markdown]
# ## The smallest useful call: two meshes
#
# A deployment says who has how many devices. Each side has its own mesh, its own copy of
# the weights in its own sharding, its own KV pool, and its own compiled programs. Here
# prefill has twice as many devices as decode, or as near as that can be had: prompts are
# bound by arithmetic, decodes by memory and by the latency of all-reduces.
#
# All of this notebook from a shell: `python -m experiments.two_meshes`, or with
# `--model=llama-3-8b --prefill=4 --decode=2`.

# %%
from experiments import two_meshes
from experiments.two_meshes import Cut
from models.config import get_config

cut = Cut.of(here.devices, prefill=None, decode=None)
model = get_config(here.model)
meshes = two_meshes.build(model, cut)
print(cut)

# %% [markdown]
# What lies where: shapes, and for each dimension the mesh axis it is cut over. The first
# layer stands for all.

# %%
print(two_meshes.layout(meshes.engine))

# %% [markdown]
# ## Tokens
#
# Four requests are served on the two meshes and on one device: prompts are computed on
# the first mesh, their KV is gathered there, moved by `jax.device_put`, inserted into the
# blocks that the second mesh reserved for it, and decoded there. In float32 every token
# must be that of one device.

# %%
tokens = two_meshes.check_tokens(model, meshes)
print(tokens)
assert tokens.equal == tokens.total or not tokens.exact

# %% [markdown]
# ## The hand-off beside its bound
#
# *whole* is the engine's: gather, one `device_put`, insert. *plain device_put* is what
# indexing, `jax.device_put` and `.at[].set` take. The bound is the link between the
# devices where it is known (its specified bandwidth, times the smaller number of devices),
# and a copy in the host's memory for host devices.

# %%
import pathlib

from IPython.display import Image

out = pathlib.Path("runs/notebooks/two_meshes")
shown = two_meshes.run(model, cut, out, mib=(1, 4, 16), repeats=5)
print(shown.handoff)

# %%
Image(filename=out / "two_meshes.png")

# %% [markdown]
# ## A model of a real size
#
# Llama-3-8B's shape with random weights in bfloat16, and hand-offs as large as those of
# long prompts: 128 KiB a token. For accelerators only, with at least 40 GiB a device; this
# cell is not run where the notebook is tested.

# %% tags=["skip-execution"]
assert here.accelerated, f"for accelerators, not for {here.found}"
large = out / "llama-3-8b"
print(two_meshes.run(get_config("llama-3-8b"), cut, large, mib=(16, 64, 256)))
Image(filename=large / "two_meshes.png")

# %% [markdown]
# ## Goodput on real devices
#
# With several accelerators the main job runs on the clock on the wall: both phases really
# at the same time. For accelerators only, for the same reason.

# %% tags=["skip-execution"]
from experiments import goodput_sweep
from experiments.configs.named import get_config as get_experiment
from experiments.configs.override import override

assert here.accelerated, f"for accelerators, not for {here.found}"
config = override(get_experiment("five_minutes"), here.overrides)
print(goodput_sweep.run(config, out / "five_minutes", None))
Image(filename=out / "five_minutes" / "attainment.png")
