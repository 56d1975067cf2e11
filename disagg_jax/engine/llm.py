"""Text from prompts, in a call: a model, a deployment, and defaults for the rest."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

from disagg_jax import metrics
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.devices import find_devices
from disagg_jax.engine.engine import Engine, Progress
from disagg_jax.engine.memory_check import default_memory, memory_bytes
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.errors import require
from disagg_jax.programs import Buckets, needed_buckets
from disagg_jax.request import GREEDY, Request, Sampling, Status, Timeline
from disagg_jax.scheduling import DISAGGREGATED, get_system
from disagg_jax.scheduling.interface import Policy
from models.config import ModelConfig
from models.load import Model, load_model
from models.text_stream import TextStream
from models.tokenizer import Tokenizer
from sharding.mesh import Device
from sharding.rules import RULES

T = TypeVar("T")
_NO_SHAPES = Buckets(prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=())


class Piece(NamedTuple):
    """The next piece of a text, which ends with no part of a character."""

    index: int  # of its prompt
    text: str  # may be empty in the last piece
    is_last: bool


OnPiece = Callable[[Piece], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The text that was generated for one prompt."""

    prompt: str
    text: str  # continues the prompt; without a token that ended it
    timeline: Timeline  # all stamps, on a clock that began when the call's work did

    @property
    def tokens(self) -> list[int]:
        """Return the generated token ids, with the one that ended the text."""
        return self.timeline.tokens

    @property
    def stages(self) -> metrics.Stages:
        """Return the five stages of its time, in seconds."""
        return metrics.stages_s(self.timeline)


class LLM:
    """A model on a deployment in this process, which generates text by the wall clock.

    Programs are compiled when a call of `generate` needs them: about one for a prefill
    step, one for a decode step and two for the transfer between them.

    Args:
      weights: what `models.load.load_model` takes: tiny (comes with this package),
        smollm2, a GGUF file, a Hugging Face folder, a checkpoint; or a loaded model.
      deployment: the instances, such as 2xcolocated:tp1.
      system: a name of `scheduling.SYSTEMS`, or a policy for each role. By default
        prefill and decode instances are `disaggregated`, colocated ones `vllm_v0`.
      max_context: the longest prompt and output together, in tokens; by default the
        model's, or what the KV memory has room for.
      attention: the attention kernel; see `choose_kernel`.
      memory: the KV pool of each instance; by default see `default_memory`.
      buckets: the shapes that each instance has programs for; by default those that a
        call needs, see `needed_buckets`.
      dtype: float32 or bfloat16, of weights, activations and KV; by default that of
        the weights. Those of a loaded model are as they are.
      devices: to place the instances on, in order; by default those of this machine,
        whose host is split into enough if JAX has not started yet.
      progress: told what is done while one waits; by default a line to stderr each.

    Attributes:
      config, tokenizer: the model's.
      served: the engine and its policies, for runs of one's own.

    Raises:
      ValueError: if the deployment needs more devices, or more of their memory, or
        another system, or has dp or ep, or there is no such attention kernel; before
        weights are placed.
      FileNotFoundError: if there are no such weights; says how to get them.
    """

    def __init__(
        self,
        weights: str | pathlib.Path | Model = "tiny",
        deployment: str = "prefill:tp1,decode:tp1",
        *,
        system: str | Mapping[Role, Policy] | None = None,
        max_context: int | None = None,
        attention: str = AUTO,
        memory: Sequence[KVMemory] | None = None,
        buckets: Sequence[Buckets] | None = None,
        dtype: str | None = None,
        devices: Sequence[Device] | None = None,
        progress: Progress | None = None,
    ):
        instances = Deployment.parse(deployment)
        instances.require_tp_pp_only("engine")
        policies = _policies(system, instances)
        if memory is not None:
            expected = "max_context: expected none beside memory, which says it"
            require(max_context is None, expected, max_context)
        if isinstance(weights, Model):
            expected = "dtype: expected none beside a loaded model, which has one"
            require(dtype is None, expected, dtype)
        devices = find_devices(instances) if devices is None else devices
        self._progress, self._listed = progress or _to_stderr, buckets
        if not isinstance(weights, Model):
            self._progress(f"loading {weights}")
            weights = load_model("auto", str(weights), dtype=dtype)
        self.config, self.tokenizer = weights.config, weights.tokenizer
        if memory is None:
            memory = _memory(self.config, instances, devices, max_context, attention)
        listed = buckets or [_NO_SHAPES] * len(memory)
        params = weights.params
        engine = Engine(
            self.config,
            params,
            instances,
            devices,
            memory,
            listed,
            attention=attention,
        )
        self._progress(str(engine.programs.attention))
        self.served = ServedDeployment(engine=engine, policies=policies)

    @property
    def max_context(self) -> int:
        """Return the longest prompt and output together, in tokens."""
        return min(pool.max_context for pool in self.served.memory)

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        max_tokens: int | Sequence[int] = 64,
        on_piece: OnPiece = lambda piece: None,
    ) -> list[Generation]:
        """Generate a text for each prompt, all at the same time.

        Args:
          sampling: of all prompts, or one for each.
          max_tokens: to generate at most, of all prompts or for each. The model's end
            token ends a text before.
          on_piece: called with each piece of a text as soon as it is whole. It is part
            of the loop that serves: it must not use JAX, and its time delays tokens.

        Returns:
          A result for each prompt, in their order.

        Raises:
          ValueError: on a prompt that cannot be served, before any work.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n = len(prompts)
        each = zip(
            prompts,
            _for_each("sampling", sampling, Sampling, n),
            _for_each("max_tokens", max_tokens, int, n),
            strict=True,
        )
        requests = [self._request(i, *what) for i, what in enumerate(each)]
        if not requests:
            return []
        self._compile(requests)
        texts = _Texts(requests, self.tokenizer, on_piece)
        run = self.served.run(requests, followers=texts.follow)
        return [
            Generation(prompt=prompt, text=text, timeline=timeline)
            for prompt, text, timeline in zip(
                prompts, texts.whole, run.timelines, strict=True
            )
        ]

    def _request(
        self, id: int, prompt: str, sampling: Sampling, max_tokens: int
    ) -> Request:
        tokens = tuple(self.tokenizer.encode(prompt))
        request = Request(
            id=id,
            arrival_s=0.0,
            prompt_tokens=len(tokens),
            max_tokens=max_tokens,
            prompt=tokens,
            sampling=sampling,
            stop_tokens=frozenset(self.tokenizer.eos_tokens),
        )
        for pool in self.served.memory:
            if reason := pool.rejection_reason(len(tokens), max_tokens):
                raise ValueError(f"request {id}: {reason}")
        return request

    def _compile(self, requests: Sequence[Request]) -> None:
        """Compile the programs that `requests` need, unless done before."""
        engine, policies = self.served.engine, self.served.policies
        engine.check(requests)
        if self._listed is None:
            each = zip(engine.deployment.instances, engine.memory, strict=True)
            engine.list_shapes(
                [
                    needed_buckets(policies[spec.role].limits, pool, requests)
                    for spec, pool in each
                ]
            )
        sampled = any(request.sampling.temperature for request in requests)
        engine.compile(sampled=sampled, progress=self._progress)


class _Texts:
    """The texts of a run, as far as their tokens have come.

    Attributes:
      whole: the text of each request, by its id.
    """

    def __init__(
        self, requests: Sequence[Request], tokenizer: Tokenizer, on_piece: OnPiece
    ):
        self.whole = [""] * len(requests)
        self._streams = [TextStream(tokenizer, r.prompt or ()) for r in requests]
        self._seen = [0] * len(requests)
        self._on_piece = on_piece

    def follow(
        self, now_s: float, timelines: Sequence[Timeline], ended: Sequence[Timeline]
    ) -> tuple[()]:
        """Take the tokens of a turn; see `control.loop.Followers`: nobody follows."""
        for timeline in timelines:
            if len(timeline.tokens) > self._seen[timeline.request.id]:
                self._take(timeline)
        return ()

    def _take(self, timeline: Timeline) -> None:
        id, tokens = timeline.request.id, timeline.tokens
        stream, new = self._streams[id], tokens[self._seen[id] :]
        self._seen[id] = len(tokens)
        text = stream.add([t for t in new if not timeline.request.stops_at(t)])
        if is_last := timeline.status is Status.FINISHED:
            text += stream.rest()
        if text or is_last:
            self.whole[id] += text
            self._on_piece(Piece(id, text, is_last))


def _policies(
    system: str | Mapping[Role, Policy] | None, deployment: Deployment
) -> Mapping[Role, Policy]:
    """Return a policy for each role of the deployment."""
    if system is None:
        return {**get_system("vllm_v0"), **get_system(DISAGGREGATED)}
    policies = get_system(system) if isinstance(system, str) else system
    for spec in deployment.instances:
        expected = f"system: expected a policy for the {spec.role} instances of "
        expected += f"'{deployment}'"
        require(spec.role in policies, expected, sorted(policies))
    return policies


def _memory(
    config: ModelConfig,
    deployment: Deployment,
    devices: Sequence[Device],
    max_context: int | None,
    attention: str,
) -> list[KVMemory]:
    """Return the default KV pool of each instance."""
    limit_bytes = memory_bytes(devices[0])
    return [
        default_memory(
            config,
            spec,
            RULES[spec.role],
            devices,
            limit_bytes,
            max_context,
            attention=attention,
        )
        for spec in deployment.instances
    ]


def _for_each(name: str, value: T | Sequence[T], kind: type[T], n: int) -> Sequence[T]:
    """Return a value for each of `n` prompts: the one there is, or the n-th."""
    if isinstance(value, kind):
        return [value] * n
    values = cast(Sequence[T], value)
    expected = f"{name}: expected one, or one for each of the {n} prompts"
    require(len(values) == n, expected, len(values))
    return values


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
