"""Measures how long a prompt stalls requests that are decoding, on this machine.

    python -m experiments.stalls
    python -m experiments.stalls --model=m32 --prompts=64,128,256

A few requests decode; then a prompt arrives. Colocated, the device computes the prompt
in one step, for which the decodes wait (vLLM V0), or in chunks beside the decodes
(Sarathi-Serve, vLLM V1). Disaggregated, another device computes the prompt; only its KV
comes in. Every program runs and is timed alone, and its time counts on its instance's
own device. Writes stalls.txt and .png.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import jax

from experiments.benchmarks.stall import Stall, StallScenario, measure
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import Flags, integers
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ProgressLines
from experiments.report.colours import system_colours
from experiments.report.draw import draw
from experiments.report.panel import XY, Panel, curves
from experiments.report.table import numbers
from experiments.runs.folder import commit, plain, run_folder, write_text
from models import transformer
from models.checkpoint import Weights
from models.config import ModelConfig, get_engine_config

FLAGS = Flags()
_MODEL = FLAGS.string("model", "tiny", ENGINE_MODEL)
_PROMPTS = FLAGS.list("prompts", ["64", "128", "256", "512"], "Tokens of a prompt.")
_DECODES = FLAGS.integer("decodes", 8, "Requests that decode.", lower_bound=1)
_CHUNK = FLAGS.integer("chunk", 64, "Tokens of a step with a chunk.", lower_bound=2)
_REPEATS = FLAGS.integer("repeats", 5, "Runs behind a median.", lower_bound=1)
_OUT = FLAGS.string("out", "runs/stalls", "Folder.")

_AROUND = 0.25  # of the prompt's time, shown before and after it


# -- what is shown ---------------------------------------------------------------------


def table(found: Sequence[Stall]) -> str:
    """Return a row for each system and prompt."""
    head = ("system", "prompt", "gap between tokens", "longest gap", "times", "TTFT")
    rows = [
        (
            stall.system,
            f"{stall.prompt} tokens",
            f"{stall.gap_s * 1e3:.2f} ms",
            f"{stall.longest_s * 1e3:.2f} ms",
            f"{stall.times:.1f}",
            f"{stall.ttft_s * 1e3:.2f} ms",
        )
        for stall in found
    ]
    return "\n".join(numbers([head, *rows]))


def panels(found: Sequence[Stall]) -> list[Panel]:
    """Draw one request's gaps as the longest prompt arrives, and the longest gaps."""
    names = list(dict.fromkeys(stall.system for stall in found))
    longest = max(stall.prompt for stall in found)
    by_name = {s.system: s for s in found if s.prompt == longest}
    lasts_s = max(stall.ttft_s for stall in by_name.values())
    colours = system_colours(names)

    def gaps(stall: Stall) -> list[XY]:
        """Return both ends of each gap, so that it is as long as the request waits."""
        return [
            (at_s * 1e3, gap_s * 1e3)
            for end_s, gap_s in stall.gaps
            if -_AROUND * lasts_s < end_s - gap_s and end_s < (1 + _AROUND) * lasts_s
            for at_s in (end_s - gap_s, end_s)
        ]

    def times(name: str) -> list[XY]:
        return [(float(s.prompt), s.times) for s in found if s.system == name]

    return [
        Panel(
            title=f"a prompt of {longest} tokens arrives at 0",
            x="time (ms)",
            y="gap that a decoding request is in (ms)",
            series=curves({n: gaps(by_name[n]) for n in names}, colours=colours),
            log_y=True,
        ),
        Panel(
            title="the longest gap of a decoding request",
            x="prompt that arrives (tokens)",
            y="longest gap over the ordinary one",
            series=curves({name: times(name) for name in names}, colours=colours),
            x_ticks=sorted({float(stall.prompt) for stall in found}),
            line=1.0,
            log_x=True,
            log_y=True,
        ),
    ]


def run(
    config: ModelConfig,
    params: Weights,
    scenario: StallScenario,
    out: pathlib.Path,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[str, list[Stall]]:
    """Measure, and write stalls.txt and .png; return the table too.

    Raises:
      ValueError, OSError: on bad input, before any work.
    """
    asked = {"model": config.name, "scene": plain(scenario)}
    with run_folder(out, asked, "stalls.txt", replace=True):
        found = measure(config, params, scenario, progress)
        kind = jax.devices()[0].device_kind
        title = f"{config.name} on {kind}: {scenario.decodes} requests decode, a "
        title += f"prompt comes; medians of {scenario.repeats} runs, prompts of seed 0"
        text = table(found)
        head = f"# python -m experiments.stalls   commit {commit()}\n# {title}\n"
        write_text(out / "stalls.txt", f"{head}{text}\n")
        draw(panels(found), title, out / "stalls.png")
    return text, found


@command(FLAGS)
def main() -> None:
    host_devices.one_thread_each()
    host_devices.provide(2)
    out = pathlib.Path(_OUT.value)
    scenario = StallScenario(
        decodes=_DECODES.value,
        prompts=tuple(integers("prompts", _PROMPTS.value)),
        chunk=_CHUNK.value,
        repeats=_REPEATS.value,
    )
    config = get_engine_config(_MODEL.value)
    params = transformer.init_params(config, 0)
    text, _ = run(config, params, scenario, out, ProgressLines())
    print(f"{text}\n\n{out}/stalls.png")


if __name__ == "__main__":
    main()
