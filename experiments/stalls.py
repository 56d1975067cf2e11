"""What a prompt does to requests that are decoding: measured on this machine.

    python -m experiments.stalls
    python -m experiments.stalls --model=m32 --prompts=64,128,256

A few requests decode; then a prompt arrives. Colocated, the device computes the prompt
and the decodes wait, for all of it (vLLM) or beside one part of it after the other
(Sarathi-Serve). Disaggregated, another device computes it, and only its KV comes in.
Every program runs and is timed alone, and the times stand on the timeline of each
instance's own device. Writes stalls.txt and .png.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from disagg_jax import metrics
from disagg_jax.backend import serve
from disagg_jax.controller import Controller
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.batch import MixedShape, PrefillShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import EngineExecutor, Timing, outcome
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.weights import Weights
from disagg_jax.expect import expect
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_first import PrefillFirst
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.view import Policy
from disagg_jax.sim.clock import VirtualBackend
from experiments import host_devices
from experiments.checkout import commit
from experiments.columns import align
from experiments.figures.draw import draw
from experiments.figures.figure import Panel, Series
from experiments.flag_values import integers
from experiments.rigs import NO_STEPS
from models import transformer
from models.config import ModelConfig, get_config

_MODEL = flags.DEFINE_string(
    "model", "tiny", "A preset of models.config.", allow_override=True
)
_PROMPTS = flags.DEFINE_list(
    "prompts", ["64", "128", "256", "512"], "Tokens of a prompt.", allow_override=True
)
_DECODES = flags.DEFINE_integer("decodes", 8, "Requests that decode.", lower_bound=1)
_CHUNK = flags.DEFINE_integer(
    "chunk", 64, "Tokens of a step of Sarathi-Serve.", lower_bound=2
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Runs behind a median.", lower_bound=1, allow_override=True
)
_OUT = flags.DEFINE_string("out", "runs/stalls", "Folder.", allow_override=True)

_BLOCK = 16  # tokens in a block
_SHORT = 32  # tokens of the prompts of the requests that decode
_BEFORE, _TOKENS = 16, 64  # tokens they have when the prompt arrives, and in all
_WARM = 3  # runs before; the first is slow
_AROUND = 0.25  # of the prompt's time, shown before and after it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Requests that decode, and the prompts of which one arrives.

    Raises:
      ValueError: on what cannot be served.
    """

    decodes: int = 8
    prompts: tuple[int, ...] = (64, 128, 256, 512)  # tokens
    chunk: int = 64  # tokens of a mixed step, the decodes included
    repeats: int = 5

    def __post_init__(self) -> None:
        expect(self.decodes >= 1, "decodes: expected >= 1", self.decodes)
        shortest = min(self.prompts, default=0)
        expect(shortest >= 1, "prompts: expected tokens >= 1", list(self.prompts))
        more = f"chunk: expected more tokens than {self.decodes} decodes"
        expect(self.chunk > self.decodes, more, self.chunk)
        expect(self.repeats >= 1, "repeats: expected >= 1", self.repeats)

    @property
    def memory(self) -> KVMemory:
        """A pool that just holds them all."""
        longest = math.ceil((max(self.prompts) + 1) / _BLOCK) * _BLOCK
        each = math.ceil((_SHORT + _TOKENS) / _BLOCK)
        return KVMemory(
            num_blocks=self.decodes * each + longest // _BLOCK + 1,
            block_tokens=_BLOCK,
            max_context=max(longest, _SHORT + _TOKENS),
        )

    def requests(self, prompt: int, arrival_s: float, vocab: int) -> list[Request]:
        """Those that decode, and one with `prompt` tokens; ids from 0, it is last."""
        rng = np.random.default_rng(0)

        def request(id: int, tokens: int, at_s: float, output: int) -> Request:
            return Request(
                id=id,
                arrival_s=at_s,
                prompt_tokens=tokens,
                max_tokens=output,
                prompt=tuple(rng.integers(0, vocab, tokens).tolist()),
                ignore_eos=True,
            )

        decoding = [request(i, _SHORT, 0.0, _TOKENS) for i in range(self.decodes)]
        return [*decoding, request(self.decodes, prompt, arrival_s, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """A system with just the programs that a scene needs."""

    deployment: str
    policies: Mapping[Role, Policy]
    buckets: tuple[Buckets, ...]  # of each instance


def systems(scene: Scene) -> dict[str, Serving]:
    """Two colocated systems on one device, and disaggregation on two."""
    rows, memory = scene.decodes + 1, scene.memory
    blocks = tuple(sorted({memory.blocks_for(n) for n in (_SHORT, *scene.prompts)}))
    decodes = dataclasses.replace(
        NO_STEPS, decode_rows=(rows,), pool_blocks=(memory.num_blocks,)
    )
    sizes = sorted({*scene.prompts, scene.decodes * _SHORT})
    prefill = tuple(PrefillShape(n, min(rows, max(1, n // 8))) for n in sizes)
    chunks = MixedShape(
        tokens=scene.chunk,
        rows=rows,
        context=max(blocks) + scene.chunk // _BLOCK,
        decodes=rows,
        blocks=memory.num_blocks,
    )
    most = max(sizes)
    return {
        "vllm": Serving(
            deployment="colocated:tp1",
            policies={
                Role.COLOCATED: PrefillFirst(max_batched_tokens=most, max_seqs=rows)
            },
            buckets=(dataclasses.replace(decodes, prefill=prefill),),
        ),
        "sarathi_serve": Serving(
            deployment="colocated:tp1",
            policies={
                Role.COLOCATED: SarathiServe(token_budget=scene.chunk, max_seqs=rows)
            },
            buckets=(dataclasses.replace(decodes, mixed=(chunks,)),),
        ),
        "disaggregated": Serving(
            deployment="prefill:tp1,decode:tp1",
            policies={
                Role.PREFILL: PrefillOnly(token_budget=most, max_seqs=rows),
                Role.DECODE: DecodeOnly(max_seqs=rows),
            },
            buckets=(
                dataclasses.replace(NO_STEPS, prefill=prefill, transfer_blocks=blocks),
                dataclasses.replace(decodes, transfer_blocks=blocks),
            ),
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stall:
    """What one prompt did to the requests that were decoding; times in s."""

    system: str
    prompt: int  # tokens
    gap_s: float  # median between tokens while no prompt is there
    longest_s: float  # gap of the requests that decode; median over the repeats
    ttft_s: float  # of the prompt; median over the repeats
    # (end of a gap, gap) of one request that decodes, in the repeat with the median
    # longest gap; the prompt arrives at 0.
    gaps: tuple[tuple[float, float], ...]

    @property
    def times(self) -> float:
        """The longest gap over the ordinary one."""
        return self.longest_s / self.gap_s


def measure(
    config: ModelConfig,
    params: Weights,
    scene: Scene,
    progress: Callable[[str], None] = lambda text: None,
    timing: Timing = outcome,
) -> list[Stall]:
    """Every system at every prompt.

    Args:
      timing: what a program took; the default is what was measured.

    Raises:
      ValueError: if a prompt is longer than the model's context.
    """
    longest = scene.memory.max_context
    room = f"prompts: expected at most {config.max_length - 1} tokens for {config.name}"
    expect(longest <= config.max_length, room, longest - 1)
    found: list[Stall] = []
    shared: dict[Any, PlacedModel] = {}
    for name, serving in systems(scene).items():
        progress(f"{name}: {serving.deployment}")
        deployment = Deployment.parse(serving.deployment)
        count, devices = deployment.devices, jax.devices()
        engine = Engine(
            config,
            params,
            deployment,
            # Programs run one at a time here, so that one device can stand for two.
            devices if len(devices) >= count else devices * count,
            [scene.memory] * len(deployment.instances),
            serving.buckets,
            models=shared,
            share_devices=True,
        )
        engine.compile(sampled=False)
        found += _stalls(name, engine, serving.policies, scene, timing)
    return found


def _stalls(
    name: str,
    engine: Engine,
    policies: Mapping[Role, Policy],
    scene: Scene,
    timing: Timing,
) -> Iterable[Stall]:
    vocab = engine.instances[0].model.config.vocab_size
    memory = [instance.model.memory for instance in engine.instances]

    def run(prompt: int, arrival_s: float) -> list[Timeline]:
        controller = Controller(engine.deployment, policies, memory)
        backend = VirtualBackend(EngineExecutor(engine, timing))
        requests = scene.requests(prompt, arrival_s, vocab)
        with engine.serving():
            return serve(controller, backend, requests)

    # Long after the decodes: then none of them has seen it.
    *decoding, _ = min(
        (run(scene.prompts[0], 1e6) for _ in range(_WARM)),
        key=lambda timelines: metrics.e2e_s(timelines[0]),
    )
    arrival_s = max(timeline.token_s[_BEFORE] for timeline in decoding)
    gap_s = statistics.median(metrics.pooled_itl_s(decoding).tolist())
    for prompt in scene.prompts:
        runs = [run(prompt, arrival_s) for _ in range(scene.repeats)]
        runs.sort(key=lambda timelines: _longest_s(timelines, arrival_s))
        middle = runs[len(runs) // 2]
        yield Stall(
            system=name,
            prompt=prompt,
            gap_s=gap_s,
            longest_s=_longest_s(middle, arrival_s),
            ttft_s=statistics.median(metrics.ttft_s(run[-1]) for run in runs),
            gaps=tuple(
                (end - arrival_s, end - start)
                for start, end in itertools.pairwise(middle[0].token_s)
            ),
        )


def _longest_s(timelines: Sequence[Timeline], since_s: float) -> float:
    """Of the gaps that end after `since_s`, of all requests but the last."""
    return max(
        end - start
        for timeline in timelines[:-1]
        for start, end in itertools.pairwise(timeline.token_s)
        if end > since_s
    )


# -- what is shown ---------------------------------------------------------------------


def table(found: Sequence[Stall]) -> str:
    """A row for each system and prompt."""
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
    return "\n".join(align([head, *rows], right=range(1, len(head))))


def panels(found: Sequence[Stall]) -> list[Panel]:
    """One request's gaps as the longest prompt arrives, and the longest gap of all."""
    names = list(dict.fromkeys(stall.system for stall in found))
    longest = max(stall.prompt for stall in found)
    by_name = {s.system: s for s in found if s.prompt == longest}
    lasts_s = max(stall.ttft_s for stall in by_name.values())
    return [
        Panel(
            title=f"a prompt of {longest} tokens arrives at 0",
            x="time (ms)",
            y="gap between two tokens of a decoding request (ms)",
            series=[
                Series(
                    label=name,
                    points=[
                        (end_s * 1e3, gap_s * 1e3)
                        for end_s, gap_s in by_name[name].gaps
                        if -_AROUND * lasts_s < end_s < (1 + _AROUND) * lasts_s
                    ],
                    colour=i,
                )
                for i, name in enumerate(names)
            ],
            log_y=True,
        ),
        Panel(
            title="the longest gap of a decoding request",
            x="prompt that arrives (tokens)",
            y="longest gap over the ordinary one",
            series=[
                Series(
                    label=name,
                    points=[
                        (float(s.prompt), s.times) for s in found if s.system == name
                    ],
                    colour=i,
                )
                for i, name in enumerate(names)
            ],
            x_ticks=sorted({float(stall.prompt) for stall in found}),
            line=1.0,
            log_x=True,
            log_y=True,
        ),
    ]


def run(
    config: ModelConfig,
    params: Weights,
    scene: Scene,
    out: pathlib.Path,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[str, list[Stall]]:
    """Measures, and writes stalls.txt and .png; returns the table too.

    Raises:
      ValueError, OSError: on bad input, before any work.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = measure(config, params, scene, progress)
    kind = jax.devices()[0].device_kind
    title = f"{config.name} on {kind}: {scene.decodes} requests decode, a prompt comes"
    text = table(found)
    head = f"# python -m experiments.stalls   commit {commit()}\n# {title}\n"
    (out / "stalls.txt").write_text(f"{head}{text}\n")
    draw(panels(found), title, out / "stalls.png")
    return text, found


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    host_devices.one_thread_each()
    host_devices.provide(2)
    out = pathlib.Path(_OUT.value)
    try:
        scene = Scene(
            decodes=_DECODES.value,
            prompts=tuple(integers("prompts", _PROMPTS.value)),
            chunk=_CHUNK.value,
            repeats=_REPEATS.value,
        )
        config = get_config(_MODEL.value)
        params = transformer.init_params(config, 0)
        text, _ = run(config, params, scene, out, lambda t: print(t, file=sys.stderr))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{text}\n\n{out}/stalls.png")


if __name__ == "__main__":
    app.run(main)
