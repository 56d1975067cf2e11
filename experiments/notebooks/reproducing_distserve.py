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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main/experiments/notebooks/reproducing_distserve.ipynb)
#
# # Reproducing DistServe
#
# DistServe (Zhong et al., OSDI'24) in its own simulator's rules and in ours: the
# placement search, its figures over the paper's points, what one engine for both sides
# changes, and what the number of requests does. About a minute on a laptop.

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
# Everything is simulated, in one process for each core. On a laptop this reads
# `8 devices (cpu: cpu)`; accelerators, if any, are not used.

# %%
from experiments import machine

print(machine.look().found)

# %% [markdown]
# ## The smallest useful call: three requests
#
# DistServe's simulator, simdistserve, through the ordinary controller: its rules are
# policies, its released A100 coefficients a cost model. TTFT and TPOT of every request of
# its golden files are equal to 1e-6 ms (`tests/experiments/test_simulate.py`).
#
# ```
# python -m experiments.simulate --trace=runs/notebooks/distserve/three.csv \
#     --config=simdistserve_opt13b --deployment=prefill:tp1,decode:tp1 --out=runs/three
# ```

# %%
import pathlib

from disagg_jax.deployment import Deployment
from experiments.configs.named_simulations import get_simulation, trace_requests
from experiments.simulated.files import write_requests

out = pathlib.Path("runs/notebooks/distserve")
out.mkdir(parents=True, exist_ok=True)
three = out / "three.csv"
three.write_text(
    "arrival_s,prompt_tokens,output_tokens\n0,512,64\n0.01,512,64\n1,128,4\n"
)
split = Deployment.parse("prefill:tp1,decode:tp1")
simulation = get_simulation("simdistserve_opt13b")
done = simulation.build(split).run(trace_requests(str(three), simulation))
write_requests(out / "requests.csv", done.timelines, extra_tokens=1)
print((out / "requests.csv").read_text())

# %% [markdown]
# The second request waits for the first one's prompt (`prefill_queue_s`); the third finds
# everything idle.
#
# ## The placement search
#
# How many devices for each phase, cut how? DistServe's Algorithm 1 (*high* affinity: any
# prefill instance may feed any decode instance) and Algorithm 2 (*low*: a pair shares a
# node), for OPT-13B on 8 A100s and the paper's chatbot targets.
#
# ```
# python -m experiments.placement_search --model=opt-13b --devices=8 --slo=0.25,0.1 \
#     --num_requests=300 --out=runs/placement
# ```

# %%
from disagg_jax.search.placement import PlacementProblem
from disagg_jax.search.rates import SearchPlan
from experiments import placement_search
from experiments.configs.named_simulations import placement_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.papers.distserve.published import SLOS

problem = PlacementProblem.of(
    placement_simulation("opt-13b", "a100"),
    8,
    workload=get_workload("sharegpt"),
    slo=SLOS["chat 13B"],
    plan=SearchPlan(target=0.9, growth=1.25, tolerance=0.05, max_rates=30),
    rate_rps=None,
    num_requests=300,
    seeds=(0,),
    margin=0.1,
)
report, _ = placement_search.run(problem, ("high", "low"), out=out)
print(report)

# %% [markdown]
# `experiments.goodput_sweep --placement=runs/placement/placement.json` runs such an
# answer on the real engine.
#
# ## The figures, over the paper's points
#
# Hollow markers are the paper's points, read from its drawings; curves are ours, bands
# 95 % intervals over seeds. `python -m experiments.reproduce --all` makes all of them
# with five seeds and the paper's numbers of requests
# (`experiments/reports/reproduction.md`); here are three with three seeds and fewer
# requests.
#
# ```
# python -m experiments.reproduce --figure=fig8a --seeds=3 --num_requests=200
# ```

# %%
from IPython.display import Image, Markdown, display

from experiments import reproduce
from experiments.papers.figure import Lab


def show(figure: str, lab: Lab) -> Markdown:
    """Shows the picture; returns the claims without the runs behind them."""
    reproduce.run([figure], lab, out / figure, f"--figure={figure}")
    display(Image(filename=out / figure / "figures" / f"{figure}.png"))
    lines = (out / figure / "reproduction.md").read_text().splitlines()
    rows = [line.strip("|").split("|")[:4] for line in lines if line.startswith("|")]
    return Markdown("\n".join("|".join(["", *row, ""]) for row in rows))


few = Lab(seeds=3, num_requests=200)
show("fig8a", few)

# %% [markdown]
# ## What one engine for both sides changes
#
# DistServe's released profile has one set of step times for itself and a slower one for
# vLLM. The blog's toy example (512 prompt and 64 output tokens) with the engines as they
# were shipped, and with one engine for both: what is left of the ratio then is
# disaggregation, the rest was a faster engine.

# %%
toy = show("toy", few)
display(toy)

# %% [markdown]
# ## What N does
#
# The paper's runs have 100 to 300 requests. A system over its capacity needs time to
# build a queue: short runs end before it hurts, and flatter whoever is over capacity.
# Here N is 200 and 600; `--figure=goodput_n` alone goes from 100 to 3000.

# %%
show("goodput_n", few)

# %% [markdown]
# Two things that hold here on any machine, as nothing was timed: with one engine for
# both sides disaggregation still wins the toy, and by less than as shipped.

# %%
import re

pattern = r"engine (as shipped|\w+'s for both).*?\| - \| ([\d.]+)x"
ratios = {engine: float(ratio) for engine, ratio in re.findall(pattern, str(toy.data))}
print(ratios)
assert 1 < ratios["vLLM's for both"] < ratios["as shipped"]
assert 1 < ratios["DistServe's for both"] < ratios["as shipped"]
