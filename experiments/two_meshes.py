"""Cuts the devices of this machine into a prefill mesh and a decode mesh.

    python -m experiments.two_meshes
    python -m experiments.two_meshes --model=llama-3-8b --prefill=4 --decode=2

Shows how weights and KV are laid out on the two meshes, whose tensor parallelism may
differ; serves requests on them and compares the tokens with those of one device; and
measures the hand-off of KV from one mesh to the other. The hand-off's bound is the link
between the devices, if it is known, and for host devices a copy in the host's memory.
Writes two_meshes.txt and .png.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import NamedSharding

from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.errors import require
from disagg_jax.programs import StepShape
from disagg_jax.sim.hardware.link import LinkSpec, get_link
from experiments import machine
from experiments.benchmarks.engines import burst, burst_deployment
from experiments.benchmarks.handoff import Rate, rates
from experiments.benchmarks.timing import keep_freed_memory
from experiments.cli.command import command
from experiments.cli.flags import Flags, integers
from experiments.cli.names import ENGINE_MODEL
from experiments.report.draw import draw
from experiments.report.panel import XY, Panel, Series, curves
from experiments.report.table import align, numbers
from experiments.runs.folder import commit, run_folder, write_text
from models.config import ModelConfig, get_engine_config
from sharding.mesh import Device

FLAGS = Flags()
_MODEL = FLAGS.string(
    "model", None, f"By default what suits the devices. {ENGINE_MODEL}"
)
_PREFILL = FLAGS.integer(
    "prefill", None, "Devices that prefill; default: two thirds.", lower_bound=1
)
_DECODE = FLAGS.integer(
    "decode", None, "Devices that decode; default: the rest.", lower_bound=1
)
_MIB = FLAGS.list("mib", ["1", "4", "16"], "Sizes of a hand-off.")
_REPEATS = FLAGS.integer("repeats", 5, "Rounds behind a median.", lower_bound=1)
_OUT = FLAGS.string("out", "runs/two_meshes", "Folder.")

_BLOCK = 16  # tokens in a block
_REQUESTS, _PROMPT, _OUTPUT = 4, 48, 16  # that are served; tokens
# The link between two devices of one host, by what JAX calls the device.
_LINKS = {
    "A100": "nvlink-a100",
    **dict.fromkeys(("H100", "H200"), "nvlink-h100"),
    **dict.fromkeys(("B200", "B300"), "nvlink5"),  # also in GB200 and GB300
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Devices for each phase.

    Raises:
      ValueError: unless there are that many.
    """

    prefill: int
    decode: int

    @classmethod
    def of(cls, devices: int, prefill: int | None, decode: int | None) -> Cut:
        """Return the given numbers, or powers of two: decode at most half of prefill.

        More devices bring the arithmetic that prompts need. Decodes are bound by memory
        and by the all-reduces that more devices need.
        """
        require(devices >= 2, "devices: expected two or more", devices)
        p = _power_of_two(devices - (decode or 1)) if prefill is None else prefill
        d = _power_of_two(min(devices - p, p // 2)) if decode is None else decode
        enough = f"prefill, decode: expected at most {devices} devices together"
        require(p + d <= devices, enough, (p, d))
        return cls(prefill=p, decode=d)

    def __str__(self) -> str:
        return f"prefill:tp{self.prefill},decode:tp{self.decode}"


def _power_of_two(most: int) -> int:
    """Return the largest power of two up to `most`; 1 at least."""
    return 1 << (max(1, most).bit_length() - 1)


def build(
    config: ModelConfig,
    cut: Cut | str,
    attention: str = AUTO,
    block_tokens: int = _BLOCK,
    *,
    virtual: bool = False,
) -> ServedDeployment:
    """Build the two meshes of a cut, or a deployment, for a few short requests.

    Args:
      attention: the kernel; see `choose_kernel`.
      virtual: whether a device may stand for several.
    """
    prefill = StepShape.prefill(_REQUESTS * _PROMPT, _REQUESTS)
    context = _PROMPT + _OUTPUT
    return burst_deployment(
        config,
        prefill,
        str(cut),
        context=context,
        block_tokens=block_tokens,
        attention=attention,
        virtual=virtual,
    )[0]


# -- what lies where -------------------------------------------------------------------


def layout(engine: Engine) -> str:
    """Show the meshes, and how weights and KV are laid out on them."""
    head = ("", *(str(spec.role) for spec in engine.deployment.instances))
    meshes = [instance.programs.stages[0].mesh for instance in engine.instances]
    rows = [
        ("devices", *(", ".join(map(_id, mesh.devices.flat)) for mesh in meshes)),
        ("mesh", *(str(dict(mesh.shape)) for mesh in meshes)),
    ]
    trees = [dict(_leaves(i.model.params[0])) for i in engine.instances]
    for path in trees[0]:
        rows.append((path, *(_placed(tree[path]) for tree in trees)))
    rows.append(("KV pool", *(_placed(i.cache[0][0]) for i in engine.instances)))
    return "\n".join(align([head, *rows]))


def _id(device: Device) -> str:
    return str(device.id)


def _leaves(params: Mapping[str, object]) -> list[tuple[str, jax.Array]]:
    """Return the arrays of the first layer, and the arrays outside all layers."""
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    layers, first = "layers.", "layers.0."
    return [
        (name, leaf)
        for name, leaf in found
        if name.startswith(first) or not name.startswith(layers)
    ]


def _placed(array: jax.Array) -> str:
    """Return shape and mesh axes, as in float32[264, 128] (tensor, -)."""
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    axes = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    shown = ", ".join("-" if axis is None else str(axis) for axis in axes)
    return f"{array.dtype}{list(array.shape)} ({shown})"


# -- tokens ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The number of tokens that are equal to those of one device."""

    equal: int
    total: int
    moved_bytes: int  # of KV, from mesh to mesh
    exact: bool  # whether they have to be equal: float32

    def __str__(self) -> str:
        return (
            f"{self.equal} of {self.total} tokens as on one device; "
            f"{self.moved_bytes / 1e6:.2f} MB of KV moved"
        )


def check_tokens(
    config: ModelConfig, meshes: ServedDeployment, attention: str = AUTO
) -> Tokens:
    """Serve requests on the two meshes and on one device, and compare the tokens.

    In half precision, sums in another order can turn a close choice.
    """
    requests = burst(config, _REQUESTS, _PROMPT, _OUTPUT)
    split = meshes.run(requests).timelines
    block_tokens = meshes.engine.memory[0].block_tokens
    single = build(config, "colocated:tp1", attention, block_tokens)
    alone = single.run(requests).timelines
    pairs = [
        pair
        for ours, theirs in zip(split, alone, strict=True)
        for pair in zip(ours.tokens, theirs.tokens, strict=True)
    ]
    return Tokens(
        equal=sum(ours == theirs for ours, theirs in pairs),
        total=len(pairs),
        moved_bytes=sum(timeline.transfer_bytes for timeline in split),
        exact=config.dtype == "float32",
    )


# -- the hand-off ----------------------------------------------------------------------


def link_between(kind: str) -> LinkSpec | None:
    """Return the link between two devices of a host; None if it is not known."""
    for name, link in _LINKS.items():
        if name in kind:
            return get_link(link)
    return None


def bound_s(rate: Rate, cut: Cut, link: LinkSpec | None) -> float:
    """Return the least seconds of a hand-off: its bytes over the links there are.

    For host devices it is a copy of as many bytes in the host's memory.
    """
    if link is None:
        return rate.copy_s
    return link.ideal().transfer_s(rate.size_bytes, min(cut.prefill, cut.decode))


def handoff_table(found: Sequence[Rate], cut: Cut, link: LinkSpec | None) -> str:
    """Return a row for each way and size, beside the bound."""
    rows = [
        (
            rate.way,
            f"{rate.size_bytes / 2**20:.3g}",
            f"{rate.seconds * 1e3:.2f}",
            f"{rate.size_bytes / rate.seconds / 1e9:.2f}",
            f"{rate.size_bytes / bound_s(rate, cut, link) / 1e9:.2f}",
            f"{bound_s(rate, cut, link) / rate.seconds:.0%}",
        )
        for rate in found
    ]
    head = ("way", "MiB", "ms", "GB/s", "bound, GB/s", "of the bound")
    return "\n".join(numbers([head, *rows]))


def panel(found: Sequence[Rate], cut: Cut, link: LinkSpec | None) -> Panel:
    """Draw bandwidth over size, and the bound."""
    ways = list(dict.fromkeys(rate.way for rate in found))

    def points(way: str, seconds: Callable[[Rate], float]) -> list[XY]:
        return [
            (rate.size_bytes / 2**20, rate.size_bytes / seconds(rate) / 1e9)
            for rate in found
            if rate.way == way
        ]

    bound = Series(
        label=link.name if link else "a copy in the host's memory",
        points=points(ways[0], lambda rate: bound_s(rate, cut, link)),
        colour=6,
        style="dashed",
    )
    return Panel(
        title=f"{cut}: KV from mesh to mesh, insert included",
        x="KV of a hand-off (MiB)",
        y="bandwidth (GB/s)",
        series=[*curves({w: points(w, lambda r: r.seconds) for w in ways}), bound],
        x_ticks=sorted({x for x, _ in bound.points}),
        log_x=True,
        log_y=True,
    )


@dataclasses.dataclass(frozen=True)
class Shown:
    """The results, as text."""

    layout: str
    tokens: Tokens
    handoff: str

    def __str__(self) -> str:
        return f"{self.layout}\n\n{self.tokens}\n\n{self.handoff}"


def run(
    config: ModelConfig,
    cut: Cut,
    out: pathlib.Path,
    mib: Sequence[int] = (1, 4, 16),
    repeats: int = 5,
) -> Shown:
    """Do all of it, and write two_meshes.txt and .png.

    Raises:
      ValueError, OSError: on bad input, before any work; ValueError too if tokens
        differ that must be equal.
    """
    require(len(mib) > 0 and min(mib) >= 1, "mib: expected sizes >= 1", list(mib))
    asked = {"model": config.name, "cut": str(cut), "mib": mib, "repeats": repeats}
    pairs, sizes = [(cut.prefill, cut.decode)], [n * 2**20 for n in mib]
    with run_folder(out, asked, "two_meshes.txt", replace=True):
        keep_freed_memory()  # else each hand-off and copy waits for new pages
        meshes = build(config, cut)
        tokens = check_tokens(config, meshes)
        equal = tokens.equal == tokens.total or not tokens.exact
        require(equal, "tokens: expected those of one device", str(tokens))
        kind = jax.devices()[0].device_kind
        link = link_between(kind)
        found = rates(config, pairs, sizes, _BLOCK, None, repeats)
        shown = Shown(layout(meshes.engine), tokens, handoff_table(found, cut, link))
        title = f"{config.name} {config.dtype} on {kind}, {cut}; {repeats} repeats"
        head = f"# python -m experiments.two_meshes   commit {commit()}\n# {title}\n"
        write_text(out / "two_meshes.txt", f"{head}{shown}\n")
        draw([panel(found, cut, link)], title, out / "two_meshes.png")
        return shown


@command(FLAGS)
def main() -> None:
    found = machine.look()
    out = pathlib.Path(_OUT.value)
    cut = Cut.of(found.devices, _PREFILL.value, _DECODE.value)
    config = get_engine_config(_MODEL.value or found.model)
    shown = run(config, cut, out, integers("mib", _MIB.value), _REPEATS.value)
    print(f"{found.found}\n\n{shown}\n\n{out}/two_meshes.png")


if __name__ == "__main__":
    main()
