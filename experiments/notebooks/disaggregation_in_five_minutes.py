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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main/experiments/notebooks/disaggregation_in_five_minutes.ipynb)
#
# # Disaggregation in five minutes
#
# Why prefill and decode hurt each other, and what happens to latency and goodput when
# they get devices of their own: measured on the machine that runs this notebook.

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
# A laptop is split into 8 host devices. On GPUs and TPUs the devices are what they are.
# On a laptop the first line reads
#
# ```
# 8 devices (cpu: cpu)
# ```
#
# With one chip, or with host devices that share the cores, the clock is *virtual*:
# every program really runs and its tokens are real, but it runs alone, and the time it
# took is placed on the timeline of the device it belongs to. That is honest because a
# program alone on a device takes the same time whichever of several equal devices it
# is. It would not be for programs that use several host devices at once; those are
# refused.

# %%
from experiments import machine

here = machine.look()
print(here)

# %% [markdown]
# ## The smallest useful call: one prompt beside eight decodes
#
# A decode step makes one token for each running request: short, and bound by memory. A
# prompt is computed in one step: long, and bound by arithmetic. Eight requests decode
# when a prompt arrives, in four systems: *vLLM*'s first scheduler computes the prompt
# while the decodes wait; *Sarathi-Serve* and today's *vLLM* cut it into chunks;
# *disaggregated*, another device computes it.
#
# The same from a shell:
#
# ```
# python -m experiments.stalls --prompts=64,256,512 --repeats=3
# ```

# %%
import pathlib

from IPython.display import Image

from experiments import stalls
from models import transformer
from models.config import get_config

runs = pathlib.Path("runs/notebooks")
model = get_config(here.model)
table, stalled = stalls.run(
    model,
    transformer.init_params(model, 0),
    stalls.StallScenario(prompts=(64, 256, 512), repeats=3),
    runs / "stalls",
)
print(table)

# %%
Image(filename=runs / "stalls" / "stalls.png")

# %% [markdown]
# Left: each decoding request stops for as long as vLLM takes for the prompt. Chunks
# make the stop shorter and the prompt slower. On a device of its own the prompt costs
# the decodes next to nothing. Right: the longer the prompt, the longer vLLM's stop.
#
# The next cell fails if that is not what this machine measured.

# %%
longest = {stall.system: stall for stall in stalled if stall.prompt == 512}
assert longest["disaggregated"].longest_s < longest["vllm_v0"].longest_s
assert longest["sarathi_serve"].ttft_s > longest["vllm_v0"].ttft_s
print(f"longest gap: {longest['vllm_v0'].times:.1f} times the ordinary one with vLLM,")
print(f"{longest['disaggregated'].times:.1f} times with a device for each phase")

# %% [markdown]
# ## Goodput: how many requests a second are served in time
#
# One prompt is an anecdote. So: the same random requests for both systems, two devices
# each, more and more of them a second. *Goodput* is the rate at which 90 % of the
# requests still meet both targets: time to the first token (TTFT) and time per token
# after it (TPOT). Disaggregation gains nothing for free: its prompts have one device
# instead of two, and KV has to move.
#
# The same from a shell, into `runs/five_minutes`:
#
# ```
# python -m experiments.goodput_sweep --config=five_minutes
# ```

# %%
from experiments import goodput_sweep
from experiments.configs.named import get_config as get_experiment
from experiments.configs.override import override

config = override(get_experiment("five_minutes"), here.overrides)
out = runs / "five_minutes"
print(goodput_sweep.run(config, out, None))

# %%
Image(filename=out / "attainment.png")

# %% [markdown]
# Left: the share of requests in time falls as the rate rises; the diamonds are the
# goodputs, the bands 95 % intervals over seeds. Dotted and dashed lines say which
# target is missed. Right: where a request's time goes.
#
# ## One request's five stages
#
# Prefill queue, prefill, transfer, decode queue, decode. The ticks are tokens: with
# vLLM they pause when another request's prompt comes in.
#
# The same from a shell:
#
# ```
# python -m experiments.one_request --run=runs/five_minutes
# ```

# %%
from experiments import one_request

request = one_request.find(out)
one_request.plot(request, one_request.said(out), out / "one_request.png")
print(one_request.table(request))
Image(filename=out / "one_request.png")

# %% [markdown]
# ## What to take home, and what not
#
# The interval says how far the comparison can be trusted; with 100 requests and three
# seeds it is wide, and a small model on a laptop is no data centre. The main job,
# `python -m experiments.goodput_sweep`, compares seven systems with more runs.
# *Reproducing DistServe* has the published figures, *Will disaggregation help me?*
# takes your model, hardware, targets and trace. Whether it helps depends on them: often
# it does not.

# %%
import json

ratios = json.loads((out / "summary.json").read_text())["ratios"]
for name, ratio in ratios.items():
    mean, low, high = (ratio[key] for key in ("mean", "low", "high"))
    print(f"goodput {name}: {mean:.2f} [{low:.2f}, {high:.2f}]")
