"""The flags of commands that simulate a model on devices: what is simulated."""

from __future__ import annotations

import dataclasses

from disagg_jax.sim import Simulation
from disagg_jax.sim.hardware import Hardware, get_hardware
from experiments.cli.flags import Flags, expect_used
from experiments.cli.names import DEVICE, ENGINE, LINK, MODEL, PROFILE
from experiments.configs.named_simulations import COSTS, SIMULATIONS, get_simulation


class SimulationFlags:
    """Flags for a model, devices, an engine, a link and routers, of a command."""

    def __init__(self, own: Flags):
        self._model = own.string("model", "llama-3-8b", MODEL)
        self._hardware = own.string("hardware", "a100-80g", DEVICE)
        self._cost = own.string(
            "cost",
            "roofline",
            f"Step times: {', '.join(COSTS)}; {PROFILE}, or module:attribute.",
        )
        self._config = own.enum(
            "config",
            None,
            sorted(SIMULATIONS),
            "A simulation, instead of a model, hardware and cost model.",
        )
        self._engine = own.string(
            "engine",
            None,
            "Whose overheads and limits the instances of a roofline have; by default "
            f"none. {ENGINE}",
        )
        self._link = own.string(
            "link",
            None,
            "A link of each device that takes all KV, instead of the hardware's or the "
            f"simulation's. {LINK}",
        )
        self._prefill_router = own.string(
            "prefill_router", None, "Picks the instance of a prompt; see get_router."
        )
        self._decode_router = own.string(
            "decode_router", None, "Picks the instance that pulls KV; see get_router."
        )

    @property
    def config(self) -> str | None:
        """Return the name of the simulation that replaces the other flags."""
        return self._config.value

    @property
    def hardware(self) -> Hardware | None:
        """Return the device, if the flags name one."""
        return None if self.config else get_hardware(self._hardware.value)

    def read(self, max_context: int | None = None) -> Simulation:
        """Return the simulation that the flags name.

        Args:
          max_context: of a request, in tokens, instead of the simulation's.

        Raises:
          ValueError: on an unknown name, a flag without effect beside --config, or an
            engine where the cost model is no roofline.
        """
        replaced = (self._model, self._hardware, self._cost)
        got = f"--config={self.config}"
        expect_used(self.config is None, *replaced, expected="no --config", got=got)
        if self.config:
            simulation = get_simulation(self.config, self._engine.value)
        else:
            model, hardware, cost = (flag.value for flag in replaced)
            simulation = Simulation.of(
                model, hardware, cost=cost, costs=COSTS, engine=self._engine.value
            )
        changes = {
            "max_context": max_context,
            "prefill_router": self._prefill_router.value,
            "decode_router": self._decode_router.value,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        simulation = dataclasses.replace(simulation, **given)
        link = self._link.value
        return simulation if link is None else simulation.over(link)
