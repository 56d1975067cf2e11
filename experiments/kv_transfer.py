"""Measures how much of a KV transfer a request sees: whole, by layer groups, by chunks.

    python -m experiments.kv_transfer
    python -m experiments.kv_transfer --link=25gb
    python -m experiments.kv_transfer --model=llama-3-8b --pairs=1:1 --prompts=512,4096

First come the bandwidths of each way to move KV between two meshes, over a copy's. Then
requests are served alone, on a prefill and a decode side. KV leaves when the whole
prompt is computed (whole), when a group of layers is (groups), when a chunk of the
prompt is (chunks), or both (chunks, groups). A request sees the time from its first
token until the KV has arrived. DistServe's authors say that this can be less than a
decode step, which is the line in the picture.

Every program runs alone and is timed; the controller puts the times on the timeline of
each side's own devices. Gathers count on the link, as if they took nothing from the
steps beside them. --link replaces the copy between devices by a wire's time. Writes
kv_transfer.txt and .png.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence

import jax

from disagg_jax.errors import require
from disagg_jax.sim.hardware.link import LinkSpec, get_link
from experiments.benchmarks.handoff import Rate, rates
from experiments.benchmarks.timing import keep_freed_memory
from experiments.benchmarks.transfers import (
    BLOCK,
    OUTPUT_TOKENS,
    Seen,
    modes,
    parse_sides,
    serve_alone,
)
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import Flags
from experiments.cli.names import ENGINE_MODEL, LINK
from experiments.cli.progress import ProgressLines
from experiments.report.draw import draw
from experiments.report.panel import XY, Panel, curves
from experiments.report.table import numbers
from experiments.runs.folder import commit, run_folder, write_text
from models import transformer
from models.config import ModelConfig, get_engine_config

FLAGS = Flags()
_MODEL = FLAGS.string("model", "kv", ENGINE_MODEL)
_PAIRS = FLAGS.list(
    "pairs", ["4:4", "4:2", "2:4", "1:4"], "Tensor parallelism of the two meshes."
)
_MIB = FLAGS.list("mib", ["1", "16", "64"], "Sizes of a transfer.")
_PROMPTS = FLAGS.list("prompts", ["128", "512", "2048"], "Tokens of a prompt.")
_DEPLOYMENTS = FLAGS.list(
    "deployments", ["tp1:tp1", "tp1pp2:tp1"], "PREFILL:DECODE sides that serve."
)
_GROUPS = FLAGS.integer(
    "layer_groups", 4, "Programs of a stage's layers where KV leaves by groups."
)
_CHUNKS = FLAGS.integer("chunks", 4, "Chunks of a prompt where KV leaves by them.")
_LINK = FLAGS.string(
    "link", None, f"A wire instead of the copy between devices. {LINK}"
)
_REPEATS = FLAGS.integer("repeats", 5, "Rounds behind a median.")
_OUT = FLAGS.string("out", "runs/kv_transfer", "Folder.")

# -- what is shown ---------------------------------------------------------------------


def rate_table(found: Sequence[Rate]) -> list[str]:
    head = ("meshes", "way", "MiB", "ms", "GB/s", "of a copy")
    rows = [
        (
            rate.pair,
            rate.way,
            f"{rate.size_bytes / 2**20:.3g}",
            f"{rate.seconds * 1e3:.2f}",
            f"{rate.size_bytes / rate.seconds / 1e9:.2f}",
            f"{rate.copy_s / rate.seconds:.2f}",
        )
        for rate in found
    ]
    return numbers([head, *rows], labels=2)


def seen_table(found: Sequence[Seen]) -> list[str]:
    head = (
        *("sides", "mode", "prompt", "MiB", "gather", "move", "insert", "TTFT"),
        *("visible", "decode step", "visible/step", "2nd token"),
    )
    rows = [
        (
            seen.deployment,
            seen.mode,
            str(seen.prompt),
            f"{seen.size_bytes / 2**20:.3g}",
            *(f"{phase_s * 1e3:.2f}" for phase_s in seen.phases),
            f"{seen.ttft_s * 1e3:.1f}",
            f"{seen.visible_s * 1e3:.2f}",
            f"{seen.decode_s * 1e3:.2f}",
            f"{seen.visible_s / seen.decode_s:.2f}",
            f"{seen.second_s * 1e3:.2f}",
        )
        for seen in found
    ]
    return numbers([head, *rows], labels=2)


def panels(found: Sequence[Seen]) -> list[Panel]:
    """Draw the transfer time that is seen, in decode steps, over prompt length."""
    deployments = dict.fromkeys(seen.deployment for seen in found)
    names = dict.fromkeys(seen.mode for seen in found)

    def points(*of: str) -> list[XY]:
        return [
            (float(seen.prompt), seen.visible_s / seen.decode_s)
            for seen in found
            if (seen.deployment, seen.mode) == of
        ]

    return [
        Panel(
            title=f"prefill:decode = {deployment}",
            x="prompt (tokens)",
            y="KV transfer that is seen (decode steps)",
            series=curves({name: points(deployment, name) for name in names}),
            line=1.0,
            x_ticks=sorted({float(seen.prompt) for seen in found}),
            log_x=True,
            log_y=True,
        )
        for deployment in deployments
    ]


# -- command line ----------------------------------------------------------------------


def parse_pair(text: str) -> tuple[int, int]:
    """Read '4:2'.

    Raises:
      ValueError: on anything else.
    """
    try:
        src, dst = (int(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"pairs: expected SRC_TP:DST_TP, got '{text}'") from None
    return src, dst


def measure(
    config: ModelConfig, link: LinkSpec | None
) -> tuple[list[Rate], list[Seen]]:
    """Measure everything that the flags ask for.

    Raises:
      ValueError: on prompts or deployments that do not fit, before any work.
    """
    pairs = [parse_pair(text) for text in _PAIRS.value]
    sizes = [int(text) * 2**20 for text in _MIB.value]
    prompts = [int(text) for text in _PROMPTS.value]
    groups, repeats, progress = _GROUPS.value, _REPEATS.value, ProgressLines()
    longest, most = max(prompts, default=0), config.max_length - OUTPUT_TOKENS
    require(
        longest <= most,
        f"prompts: expected at most {most} tokens for {config.name}",
        longest,
    )
    for text in _DEPLOYMENTS.value:
        parse_sides(text)
    found_rates: list[Rate] = []
    if pairs:
        progress("bandwidths")
        found_rates = rates(config, pairs, sizes, BLOCK, groups, repeats)
    params = transformer.init_params(config, 0)
    seen: list[Seen] = []
    cases = itertools.product(
        _DEPLOYMENTS.value, prompts, modes(_CHUNKS.value, groups).items()
    )
    for sides, prompt, (name, mode) in cases:
        progress(f"{sides}, {prompt} tokens, {name}")
        seen.append(
            serve_alone(config, params, sides, name, mode, prompt, link, repeats)
        )
    return found_rates, seen


@command(FLAGS)
def main() -> None:
    host_devices.one_thread_each()
    keep_freed_memory()
    host_devices.provide(8)
    config = get_engine_config(_MODEL.value)
    link = get_link(_LINK.value) if _LINK.value else None
    out = pathlib.Path(_OUT.value)
    with run_folder(out, FLAGS.asked(), "kv_transfer.txt", replace=True):
        found_rates, seen = measure(config, link)
        wire = f"the wire {link.name}" if link else "the copy between devices"
        lines = [
            f"# python -m experiments.kv_transfer   commit {commit()}",
            f"# {config.name} {config.dtype} on {jax.devices()[0].device_kind}, "
            f"medians of {_REPEATS.value} rounds",
            "# Bandwidth, insert included, over a host copy of as many bytes. Host "
            "devices share the cores: with tp > 1 this is contention, not speed.",
            *rate_table(found_rates),
            "",
            f"# Requests served alone; move is {wire}; times in ms",
            *seen_table(seen),
        ]
        text = "\n".join(lines) + "\n"
        write_text(out / "kv_transfer.txt", text)
        device = jax.devices()[0].device_kind
        title = f"{config.name} {config.dtype} on {device}, {wire}; medians of "
        title += f"{_REPEATS.value} rounds; the line is one decode step"
        draw(panels(seen), title, out / "kv_transfer.png")
    print(f"{text}\n{out}/kv_transfer.png")


if __name__ == "__main__":
    main()
