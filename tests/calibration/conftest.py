"""Engines and profiles that the calibration's tests share with the experiments'."""

from tests.experiments.conftest import exact, known, noisy, random_model

__all__ = ["exact", "known", "noisy", "random_model"]
