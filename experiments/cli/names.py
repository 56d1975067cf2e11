"""The names that flags of several commands take, for their --help."""

from __future__ import annotations

from disagg_jax.sim.engines import engine_names
from disagg_jax.sim.hardware import HARDWARE, LINKS
from models.config import PRESETS

_MODELS = ", ".join(sorted(PRESETS))
_DENSE = ", ".join(sorted(name for name in PRESETS if PRESETS[name].is_dense))
_FORMS = "its form is in experiments/README.md"

ENGINE_MODEL = f"One of {_DENSE}, or module:attribute."
MODEL = (
    f"One of {_MODELS}; a Hugging Face config.json or another .json file ({_FORMS}); "
    "or module:attribute."
)
DEVICE = f"One of {', '.join(sorted(HARDWARE))}; or a .json file ({_FORMS})."
LINK = f"One of {', '.join(sorted(LINKS))}; or a .json file ({_FORMS})."
ENGINE = (
    f"One of {', '.join(engine_names())}; or a .json file of experiments.fit_engine."
)
PROFILE = "a profile, the .json file of calibrate or of compile_check --profile"
