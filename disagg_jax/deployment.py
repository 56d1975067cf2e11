"""A deployment: its instances, their roles, parallelism and KV memory."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import re
from collections.abc import Collection

from disagg_jax.errors import require

_SYNTAX = (
    "'[N x]ROLE:tpK[ppL][dpM][epN]' items joined by commas, like "
    "2xprefill:tp1,1xdecode:tp2pp2"
)
_PARALLELISM = r"tp(\d+)(?:pp(\d+))?(?:dp(\d+))?(?:ep(\d+))?"
_ITEM = re.compile(rf"(?:([1-9]\d*)x)?(prefill|decode|colocated):({_PARALLELISM})")


class Role(enum.StrEnum):
    """The part of serving that an instance does."""

    PREFILL = "prefill"  # computes prompts and hands their KV over
    DECODE = "decode"  # pulls KV, then generates
    COLOCATED = "colocated"  # both


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Parallelism:
    """How a model's weights and work are spread over the devices of an instance.

    Attributes:
      tp: tensor parallelism: devices that share a token's work in a stage.
      pp: pipeline parallelism: stages.
      dp: attention replicas in a stage, each on tp devices and with its own tokens.
      ep: expert parallelism: groups of the tp * dp devices of a stage that the experts
        of a mixture are spread over. The devices of a group share each of its experts.

    Raises:
      ValueError: unless all are at least 1, and ep divides tp * dp.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: expected >= 1", value)
        expected = f"ep: expected to divide the {self.stage_devices} devices of a stage"
        require(self.stage_devices % self.ep == 0, expected, self.ep)

    @classmethod
    def parse(cls, text: str) -> Parallelism:
        """Read `tp2`, `tp2pp2`, `tp1dp8ep8`, ...

        Raises:
          ValueError: on another text, or numbers that do not fit together.
        """
        match = re.fullmatch(_PARALLELISM, text)
        if match is None:
            raise ValueError(
                "parallelism: expected 'tpK[ppL][dpM][epN]', like tp2pp2 or tp1dp8ep8; "
                f"got '{text}'"
            )
        return cls(*(int(number or 1) for number in match.groups()))

    @property
    def stage_devices(self) -> int:
        """Return the devices of one stage."""
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        """Return the devices of all stages together."""
        return self.stage_devices * self.pp

    def require_tp_pp_only(self, who: str) -> None:
        """Raise a ValueError that names `who` unless dp and ep are 1."""
        require(self.dp == self.ep == 1, f"{who}: expected no dp and no ep", self)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        more = {"pp": self.pp, "dp": self.dp, "ep": self.ep}
        named = (f"{name}{value}" for name, value in more.items() if value > 1)
        return f"tp{self.tp}{''.join(named)}"

    __repr__ = __str__  # errors name several


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceSpec:
    """One copy of the weights on its own devices."""

    role: Role
    parallelism: Parallelism = Parallelism()

    @property
    def devices(self) -> int:
        """Devices of all stages together."""
        return self.parallelism.devices

    def __str__(self) -> str:
        """Return its item in the text that `Deployment.parse` reads."""
        return f"{self.role}:{self.parallelism}"


class RequestLimit(enum.StrEnum):
    """A limit of an instance that a request may exceed."""

    CONTEXT = "context"  # the longest prompt + output of one request
    KV_MEMORY = "KV memory"  # the blocks of the pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVMemory:
    """The KV memory of an instance."""

    num_blocks: int  # KV blocks in the pool
    block_tokens: int = 16  # tokens in a block
    max_context: int  # longest prompt + output of one request, in tokens

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_tokens", "max_context"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: expected >= 1", value)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def exceeded(self, prompt_tokens: int, max_tokens: int) -> RequestLimit | None:
        """Return the limit that a request exceeds, even alone; None if it fits."""
        tokens = prompt_tokens + max_tokens
        if tokens > self.max_context:
            return RequestLimit.CONTEXT
        blocks = self.blocks_for(tokens - 1)  # the last token's KV is never needed
        return RequestLimit.KV_MEMORY if blocks > self.num_blocks else None

    def rejection_reason(self, prompt_tokens: int, max_tokens: int) -> str:
        """Return why a request could not be served even alone; '' if it could."""
        limit = self.exceeded(prompt_tokens, max_tokens)
        if limit is None:
            return ""
        request = f"{prompt_tokens} prompt + {max_tokens} output tokens"
        if limit is RequestLimit.CONTEXT:
            return f"expected at most {self.max_context} tokens, got {request}"
        blocks = self.blocks_for(prompt_tokens + max_tokens - 1)
        return f"has {self.num_blocks} KV blocks, got {request} = {blocks} blocks"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """The instances that serve together, in device order.

    Several instances of a role are its replicas. Prefill and decode instances need each
    other; colocated instances stand alone.

    Raises:
      ValueError: on a deployment that cannot serve a request from end to end.
    """

    instances: tuple[InstanceSpec, ...]

    def __post_init__(self) -> None:
        if not self.instances:
            raise ValueError("deployment: expected at least one instance, got none")
        prefill, decode = self.of(Role.PREFILL), self.of(Role.DECODE)
        if bool(prefill) != bool(decode):
            raise ValueError(
                "deployment: prefill and decode instances need each other, got "
                f"{len(prefill)} prefill and {len(decode)} decode in '{self}'"
            )

    @classmethod
    def parse(cls, text: str) -> Deployment:
        """Read `prefill:tp2,decode:tp1`, `2xprefill:tp1,1xdecode:tp1dp8ep8`, ..."""
        instances: list[InstanceSpec] = []
        for item in text.replace(" ", "").split(","):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise ValueError(f"deployment: expected {_SYNTAX}; got '{item}'")
            count, role, parallelism = match.group(1, 2, 3)
            spec = InstanceSpec(
                role=Role(role), parallelism=Parallelism.parse(parallelism)
            )
            instances += [spec] * int(count or 1)
        return cls(tuple(instances))

    def of(self, *roles: Role) -> tuple[int, ...]:
        """Return the indices of the instances with one of `roles`."""
        return tuple(i for i, spec in enumerate(self.instances) if spec.role in roles)

    def in_roles(self, roles: Collection[Role]) -> Deployment:
        """Return the same instances for a system that has policies for `roles`.

        They are colocated, or else half of them prefill and the others decode.

        Raises:
          ValueError: on roles that cannot serve a request, or too few instances.
        """
        apart, count = Role.COLOCATED not in roles, len(self.instances)
        if apart:
            expected = "expected policies for colocated, or for prefill and decode"
            pair = set(roles) == {Role.PREFILL, Role.DECODE}
            require(pair, expected, sorted(map(str, roles)))
            expected = "expected instances for both prefill and decode"
            require(count > 1, expected, str(self))

        def role(i: int) -> Role:
            if apart:
                return Role.PREFILL if i < count // 2 else Role.DECODE
            return Role.COLOCATED

        moved = [
            dataclasses.replace(spec, role=role(i))
            for i, spec in enumerate(self.instances)
        ]
        return Deployment(tuple(moved))

    def require_tp_pp_only(self, who: str) -> None:
        """Raise a ValueError that names `who` if an instance has dp or ep above 1."""
        for spec in self.instances:
            spec.parallelism.require_tp_pp_only(who)

    def require_each(self, name: str, values: Collection[object]) -> None:
        """Raise a ValueError that says `name` unless `values` has one an instance."""
        n = len(self.instances)
        expected = f"{name}: expected one for each of the {n} instances"
        require(len(values) == n, expected, len(values))

    @property
    def devices(self) -> int:
        """Devices of all instances together."""
        return sum(spec.devices for spec in self.instances)

    def lanes(self, src: int, dst: int) -> int:
        """Return the parallel wires of a transfer: the devices of its smaller side."""
        return min(self.instances[i].devices for i in (src, dst))

    def __str__(self) -> str:
        """Return the text that `parse` reads, with equal neighbours counted."""
        items: list[str] = []
        i = 0
        while i < len(self.instances):
            spec, count = self.instances[i], 1
            while self.instances[i + count : i + count + 1] == (spec,):
                count += 1
            prefix = f"{count}x" if count > 1 else ""
            items.append(f"{prefix}{spec}")
            i += count
        return ",".join(items)


def cut_layers(layers: range, parts: int) -> list[range]:
    """Cut consecutive layers into even `parts`; the first may have one layer more.

    Raises:
      ValueError: if a part would have no layer.
    """
    if not 1 <= parts <= len(layers):
        raise ValueError(f"expected 1 to {len(layers)} parts of {layers}, got {parts}")
    whole, more = divmod(len(layers), parts)
    starts = [layers.start + i * whole + min(i, more) for i in range(parts + 1)]
    return [range(*bounds) for bounds in itertools.pairwise(starts)]
