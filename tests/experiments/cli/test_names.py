"""--help lists the names that a flag takes, in every command that has the flag."""

import importlib

import pytest

from disagg_jax.sim.hardware import HARDWARE, LINKS
from experiments.__main__ import COMMANDS
from models.config import PRESETS

# The engine's commands read no config.json, and run dense models alone.
ENGINE_MODELS = [name for name, model in PRESETS.items() if model.is_dense]
KNOWN = {"model": PRESETS, "hardware": HARDWARE, "link": LINKS}


@pytest.mark.parametrize("name", [n for group in COMMANDS.values() for n in group])
def test_help_lists_the_names(name):
    module = importlib.import_module(f"experiments.{name}")
    flags = module.FLAGS.values if hasattr(module, "FLAGS") else {}
    for flag, known in KNOWN.items():
        if flag in flags:
            text = flags[flag].help
            if flag == "model" and "config.json" not in text:
                known = ENGINE_MODELS
            missing = [one for one in known if one not in text]
            assert missing == [], f"--{flag}"
