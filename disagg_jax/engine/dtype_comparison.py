"""How far a dtype of the engine is from its float32: logits, and greedy tokens.

Both compute the same positions: the other dtype goes on with the tokens that float32
chose, whatever it would choose. So one close choice does not make all that comes after
it incomparable.

The rule (`error_bound`) is in units of a position's spread: the standard deviation of
its float32 logits over the vocabulary. A rounding to nearest has a root mean square of
eps / sqrt(12), and roundings are independent. In a layer about 20 reach the residual
stream, of 7 matrices and of activations: 1.3 eps of it. Another 8, of what queries and
keys are made of, change scores, and so the weights of values by as much as scores of a
size of 4 change: 3.3 eps. Together they are within 4 eps a layer, and those of L layers
within 4 eps sqrt(L). That holds for the root mean square of all errors. Errors have
long tails, where attention is between two keys: one logit may be 8 times as wrong. So
may be the difference of two, which is what turns a greedy choice.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from disagg_jax.control.backend import Outcome
from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import as_measured, run_alone
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.errors import require
from disagg_jax.programs import needed_buckets
from disagg_jax.request import Request
from disagg_jax.scheduling import DISAGGREGATED, get_system
from disagg_jax.work import Task, Transfer
from models.checkpoint import Weights
from models.config import ModelConfig
from models.load import cast
from sharding.mesh import Device

_EPS_A_LAYER, TAIL = 4.0, 8.0  # see the top


class Output(NamedTuple):
    """What was computed for a request at its generated positions."""

    tokens_T: np.ndarray  # the likeliest
    logits_TV: np.ndarray  # float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DtypeComparison:
    """The generated positions of all requests, one after the other, in both dtypes.

    Attributes:
      rms_T, worst_T: a position's errors: root mean square, and largest; in its spread.
      margin_T: from its likeliest float32 logit to the second, in its spread.
      agrees_T: whether its greedy tokens are equal.
      spread_T: standard deviation of its float32 logits, see the top.
    """

    config: ModelConfig  # with the dtype that is compared with float32
    rms_T: np.ndarray
    worst_T: np.ndarray
    margin_T: np.ndarray
    agrees_T: np.ndarray
    spread_T: np.ndarray

    @classmethod
    def of(
        cls, config: ModelConfig, exact: Sequence[Output], other: Sequence[Output]
    ) -> DtypeComparison:
        """Compare float32 outputs with those of `config`, along the same tokens."""
        tokens_T, logits_TV = map(np.concatenate, zip(*exact, strict=True))
        got_T, got_TV = map(np.concatenate, zip(*other, strict=True))
        spread_T = logits_TV.std(axis=1)
        error_TV = np.abs(got_TV - logits_TV) / spread_T[:, None]
        second_T, best_T = np.partition(logits_TV, -2, axis=1)[:, -2:].T
        return cls(
            config=config,
            rms_T=np.sqrt(np.square(error_TV).mean(axis=1)),
            worst_T=error_TV.max(axis=1),
            margin_T=(best_T - second_T) / spread_T,
            agrees_T=tokens_T == got_T,
            spread_T=spread_T,
        )

    @property
    def rms(self) -> float:
        """Root mean square of all errors."""
        return float(np.sqrt(np.square(self.rms_T).mean()))

    @property
    def worst(self) -> float:
        """The largest error of a logit."""
        return float(self.worst_T.max())

    @property
    def agreeing(self) -> float:
        """Share of positions with equal greedy tokens."""
        return float(self.agrees_T.mean())

    @property
    def margins(self) -> list[float]:
        """The float32 margin of each choice that is another one, falling."""
        return np.sort(self.margin_T[~self.agrees_T])[::-1].tolist()

    @property
    def holds(self) -> bool:
        """Whether errors and other choices are within the rule at the top."""
        bound = error_bound(self.config)
        worst = max(self.worst, *self.margins, 0.0)
        # Written so that NaN is outside.
        return self.rms <= bound and worst <= TAIL * bound

    def __str__(self) -> str:
        bound, margins = error_bound(self.config), self.margins
        others = f"; margins of the others at most {margins[0]:.4f}" if margins else ""
        return (
            f"{self.config.name} {self.config.dtype} against float32, "
            f"{len(self.agrees_T)} positions, in spreads of a position's logits (mean "
            f"{self.spread_T.mean():.3g}): rms error {self.rms:.4f} of at most "
            f"{bound:.4f}, largest {self.worst:.4f} of at most {TAIL * bound:.4f}; "
            f"{self.agreeing:.1%} greedy tokens agree, the median margin is "
            f"{np.median(self.margin_T):.4f}{others}"
        )


def error_bound(config: ModelConfig) -> float:
    """Return the most that the root mean square of errors may be; see the top."""
    eps = float(jnp.finfo(config.dtype).eps)
    return _EPS_A_LAYER * eps * math.sqrt(config.layers)


def compare_dtypes(
    config: ModelConfig,
    params: Weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    devices: Sequence[Device],
    *,
    deployment: str = "prefill:tp1,decode:tp1",
    dtype: str = "bfloat16",
    attention: str = AUTO,
) -> DtypeComparison:
    """Generate `max_tokens` greedy tokens for each prompt, in float32 and in `dtype`.

    Both are the engine's own programs on the same devices. Their weights and caches are
    not there at the same time. All logits are kept on the host.

    Args:
      params: of `config`; cast to both dtypes, so that rounding them is an error too.
      devices: as many as the deployment has; one may stand for several.
      attention: the kernel in `dtype`; float32 has plain XLA. See `choose_kernel`.

    Raises:
      ValueError: as `Engine` does, or if `dtype` is unknown or float32.
    """
    require(dtype != "float32", "dtype: expected another one than float32", dtype)
    requests = [
        Request(
            id=i,
            arrival_s=0.0,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            prompt=tuple(prompt),
        )
        for i, prompt in enumerate(prompts)
    ]

    def outputs(
        config: ModelConfig,
        attention: str,
        tokens: Mapping[int, Sequence[int]] | None = None,
    ) -> list[Output]:
        parsed, weights = Deployment.parse(deployment), cast(params, config)
        served = _serve(config, weights, parsed, devices, attention, requests)
        del weights  # the engine has its own
        return greedy_outputs(served, requests, tokens)

    exact = outputs(dataclasses.replace(config, dtype="float32"), XlaAttention.name)
    gc.collect()  # an engine is in a cycle, and has the memory that the next one needs
    follow = {i: output.tokens_T.tolist() for i, output in enumerate(exact)}
    config = dataclasses.replace(config, dtype=dtype)
    return DtypeComparison.of(config, exact, outputs(config, attention, follow))


def _serve(
    config: ModelConfig,
    weights: Weights,
    deployment: Deployment,
    devices: Sequence[Device],
    attention: str,
    requests: Sequence[Request],
) -> ServedDeployment:
    """Return a compiled engine whose pools hold all `requests`."""
    policies = {**get_system("vllm_v0"), **get_system(DISAGGREGATED)}
    kernel = choose_kernel(attention, devices[0].platform, config).kernel
    lengths = [request.prompt_tokens + request.max_tokens for request in requests]
    pool = KVMemory(num_blocks=1, block_tokens=kernel.block_tokens, max_context=1)
    blocks = sum(map(pool.blocks_for, lengths))
    # Twice as many, since a policy may keep a share of the pool free.
    pool = dataclasses.replace(pool, num_blocks=2 * blocks, max_context=max(lengths))
    roles = [spec.role for spec in deployment.instances]
    buckets = [needed_buckets(policies[role].limits, pool, requests) for role in roles]
    memory = [pool] * len(roles)
    engine = Engine(
        config, weights, deployment, devices, memory, buckets, attention=attention
    )
    engine.compile(sampled=False)
    return ServedDeployment(engine=engine, policies=policies)


def greedy_outputs(
    served: ServedDeployment,
    requests: Sequence[Request],
    tokens: Mapping[int, Sequence[int]] | None = None,
) -> list[Output]:
    """Serve `requests` on the virtual clock and return the output of each.

    Args:
      requests: which no token ends early.
      tokens: that each request goes on with, by id; by default its likeliest.
    """
    recorder = _Recorder(served.engine, tokens)
    dataclasses.replace(served, timing=as_measured, around=lambda _: recorder).run(
        requests
    )
    return [recorder.output(request) for request in requests]


class _Recorder:
    """An `Executor` that keeps logits, and may choose tokens. All parts take 1 s."""

    def __init__(self, engine: Engine, tokens: Mapping[int, Sequence[int]] | None):
        self._engine, self._tokens = engine, tokens
        # By request and the index of the token.
        self._found: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def run(self, work: Task) -> Outcome:
        """Run `work` and return its result."""
        timed = as_measured(work, [1.0] * len(self._engine.part_keys(work)))
        if isinstance(work, Transfer):
            _, (_, size) = run_alone(self._engine, work)
            return dataclasses.replace(timed, bytes=size)
        instance, slices = self._engine.instances[work.instance], tuple(work.slices)
        shape, packed = instance.pack(slices)
        with jax.transfer_guard_host_to_device("allow"):
            out = instance.model.step(shape, instance.cache, packed)
        likeliest, logits = jax.device_get(out)
        tokens: list[int] = []
        for i, part in enumerate(slices):
            if part.samples:
                id, n, token = part.request.id, part.sample_index, int(likeliest[i])
                self._found[id, n] = token, logits[i]
                tokens.append(token if self._tokens is None else self._tokens[id][n])
        return dataclasses.replace(timed, tokens=tuple(tokens))

    def output(self, request: Request) -> Output:
        """Return what was found for `request`."""
        found = [self._found[request.id, n] for n in range(request.max_tokens)]
        tokens, logits = zip(*found, strict=True)
        return Output(np.array(tokens), np.stack(logits))
