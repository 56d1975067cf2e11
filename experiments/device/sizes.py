"""The devices there are, and the sizes that they have room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.memory_check import memory_bytes
from disagg_jax.errors import require
from models.config import ModelConfig, get_engine_config

_GIB = 2**30
_MODELS = (("llama-3-8b", 36 * _GIB), ("qwen3-0.6b", 8 * _GIB))  # and what each needs
_SMALLEST = "tiny"
_POOL_SHARE = 0.75  # of what the weights leave free, for a measured pool
_HOST_BYTES = 2**31  # where a device does not say what it has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of this machine."""

    platform: str  # as JAX calls it: cpu, gpu, tpu
    kind: str
    count: int
    memory_bytes: int | None  # of one; None if it does not say
    compute_capability: str = ""  # of a GPU

    @classmethod
    def look(cls) -> Devices:
        """Ask JAX, which starts it."""
        devices = jax.devices()
        first = devices[0]
        return cls(
            platform=first.platform,
            kind=first.device_kind,
            count=len(devices),
            memory_bytes=memory_bytes(first),
            compute_capability=getattr(first, "compute_capability", ""),
        )

    @property
    def room_bytes(self) -> int:
        """Return the memory of a device; something small if it does not say."""
        return self.memory_bytes or _HOST_BYTES

    def __str__(self) -> str:
        known = self.memory_bytes
        each = "" if known is None else f", {known / _GIB:.0f} GiB for JAX on each"
        return f"{self.count} x {self.kind} ({self.platform}){each}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSizes:
    """What is run: with the devices it is all that decides the result."""

    devices: Devices
    model: str
    dtype: str
    attention: str = AUTO
    batches: Sequence[int]  # requests in a decode step
    contexts: Sequence[int]  # tokens that each of them attends to
    prompts: Sequence[int]  # tokens of a prefill step
    handoff_mib: Sequence[int]
    max_context: int  # of a served request: prompt and output
    max_seqs: int  # requests in a step, where they are served
    repeats: int  # rounds behind a median, at most

    @classmethod
    def of(
        cls,
        devices: Devices,
        model: str | None = None,
        attention: str = AUTO,
        *,
        batches: Sequence[int] = (),
        contexts: Sequence[int] = (),
        prompts: Sequence[int] = (),
    ) -> DeviceSizes:
        """Return what is asked for, and for the rest what suits the devices.

        Raises:
          ValueError: on an unknown model or kernel, or one that cannot serve the model;
            on sizes that are no numbers >= 1, or longer than the model's context.
        """
        on_host = devices.platform == "cpu"
        model = model or _largest(devices)
        config = get_engine_config(model)
        small = config.name == _SMALLEST
        asked = [*batches, *contexts, *prompts]
        limit, longest = config.max_length, max([*contexts, *prompts, 1])
        choose_kernel(attention, devices, config)  # raises
        require(min(asked, default=1) >= 1, "sizes: expected numbers >= 1", asked)
        require(longest <= limit, f"sizes: expected at most {limit} tokens", longest)

        def within(sizes: Sequence[int]) -> list[int]:
            return [n for n in sizes if n <= limit]

        return cls(
            devices=devices,
            model=model,
            dtype=config.dtype,
            attention=attention,
            batches=batches or ((1, 4) if on_host else (1, 16, 64, 256)),
            contexts=contexts or within((64, 128) if small else (512, 2048, 8192)),
            prompts=prompts
            or within((64, 128) if small else (128, 256, 512, 1024, 2048, 4096)),
            handoff_mib=(1,) if on_host else (16, 128, 1024),
            max_context=min(limit, 128 if small else 2048),
            max_seqs=4 if on_host else 16,
            repeats=3 if on_host else 5,
        )

    @property
    def config(self) -> ModelConfig:
        """Return the model."""
        return get_engine_config(self.model)

    def batches_at(self, context: int) -> list[int]:
        """Return the batches whose KV a device has room for beside the weights."""
        config, room_bytes = self.config, self.devices.room_bytes
        pool_bytes = _POOL_SHARE * (room_bytes - weight_bytes(config))
        most = pool_bytes / (context * config.kv_bytes_per_token)
        return [n for n in self.batches if n <= most]


def weight_bytes(config: ModelConfig, element_bytes: int | None = None) -> int:
    """Return the bytes of a model's weights, by default in its dtype."""
    return config.num_params * (element_bytes or config.dtype_bytes)


def _largest(devices: Devices) -> str:
    if devices.platform == "cpu":
        return _SMALLEST
    fitting = (name for name, need in _MODELS if devices.room_bytes >= need)
    return next(fitting, _SMALLEST)
