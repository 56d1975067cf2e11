"""What this machine has, and how an experiment is done on it.

    python -m experiments.machine

The notebooks ask it first, so that each runs on a laptop, one accelerator or many, and
says what was chosen. --set takes what it prints.
"""

from __future__ import annotations

import dataclasses

import jax

from experiments.cli import host_devices
from experiments.cli.command import command

HOST_DEVICES = 8  # that a host without accelerators is split into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Here:
    """Devices, and what suits them."""

    backend: str  # as JAX calls it: cpu, gpu, tpu
    kind: str  # of a device
    devices: int
    model: str  # a preset of models.config
    weights: str  # see `Config.weights`
    clock: str  # see `Config.clock`
    why: str  # of the clock

    @property
    def accelerated(self) -> bool:
        return self.backend != "cpu"

    @property
    def overrides(self) -> list[str]:
        """For `config.override`, and for --set."""
        return [
            f"{name}={getattr(self, name)}" for name in ("model", "weights", "clock")
        ]

    @property
    def found(self) -> str:
        """The devices alone."""
        return f"{self.devices} devices ({self.backend}: {self.kind})"

    def __str__(self) -> str:
        return (
            f"{self.found}\n"
            f"model {self.model} with {self.weights} weights, {self.clock} clock: "
            f"{self.why}"
        )


def choose(backend: str, kind: str, devices: int) -> Here:
    """What suits `devices` devices of a kind."""
    if backend == "cpu":
        clock = "virtual"
        why = (
            "host devices share the cores, so each program runs and is timed alone, "
            "and its time stands on the timeline of its own device"
        )
    elif devices == 1:
        clock = "virtual"
        why = (
            "one chip stands for several in turn: each program runs and is timed "
            "alone, and its time stands on the timeline of its own device. KV that "
            "stays on the chip is not copied: name a link for what it would take"
        )
    else:
        clock, why = "wall", f"prefill and decode run on {devices} real devices"
    on_cpu = backend == "cpu"
    return Here(
        backend=backend,
        kind=kind,
        devices=devices,
        model="tiny" if on_cpu else "qwen3-0.6b",
        weights="trained" if on_cpu else "random",
        clock=clock,
        why=why,
    )


def look() -> Here:
    """Splits a bare host into devices, and looks at what there is.

    Call it before anything else asks JAX for devices.
    """
    host_devices.one_thread_each()
    host_devices.provide(HOST_DEVICES)
    devices = jax.devices()
    return choose(devices[0].platform, devices[0].device_kind, len(devices))


@command()
def main() -> None:
    here = look()
    print(here)
    print(" ".join(f"--set {change}" for change in here.overrides))


if __name__ == "__main__":
    main()
