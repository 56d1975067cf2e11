"""How far a dtype of the engine is from its float32: logits, and greedy tokens.

Both compute the same positions: the other dtype goes on with the tokens that float32
chose, whatever it would choose. So one close choice does not make all that comes after
it incomparable.

Errors are in units of a position's spread: the standard deviation of its float32 logits
over the vocabulary. How much a model makes of a rounding depends on its depth and its
attention, so the rule measures it: float32 runs once more with nudged weights, each off
by up to half an eps of the other dtype, which no rounding to nearest exceeds. To a
product of matrices this is one rounding of its result. In the other dtype there are
four: of weights, operands and results, and of rotations, weights of values and sums on
the way. Roundings of the residual stream come on top: two a layer of all of it, where
the 7 products of a layer are a part that shrinks with depth. So the variance of errors
is at most 4 + layers / 7 times that of nudged weights. Errors have long tails, where
attention is between two keys: one logit may be 8 times as wrong. So may be the
difference of two, which is what turns a greedy choice.

Found: 0.9 to 1.3 times the nudge's root mean square, with random weights in 1 to 16
layers, and in SmolLM2. A bound in eps alone would have to allow for the worst model:
random ones have 1.8 eps a layer, SmolLM2's 30 layers together 5 to 7.
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
from jax.sharding import SingleDeviceSharding

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
from models import transformer
from models.checkpoint import Checkpoint, Weights
from models.config import ModelConfig
from models.load import cast
from sharding.mesh import Device

TAIL = 8.0  # see the top


class Output(NamedTuple):
    """What was computed for a request at its generated positions."""

    tokens_T: np.ndarray  # the likeliest
    logits_TV: np.ndarray  # float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DtypeComparison:
    """The generated positions of all requests, one after the other, in both dtypes.

    Attributes:
      bound: most that the root mean square of all errors may be, see the top.
      rms_T, worst_T: a position's errors: root mean square, and largest; in its spread.
      margin_T: from its likeliest float32 logit to the second, in its spread.
      agrees_T: whether its greedy tokens are equal.
      spread_T: standard deviation of its float32 logits, see the top.
    """

    config: ModelConfig  # with the dtype that is compared with float32
    bound: float
    rms_T: np.ndarray
    worst_T: np.ndarray
    margin_T: np.ndarray
    agrees_T: np.ndarray
    spread_T: np.ndarray

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        exact: Sequence[Output],
        nudged: Sequence[Output],
        other: Sequence[Output],
    ) -> DtypeComparison:
        """Compare float32 outputs with those of `config`, along the same tokens.

        Args:
          nudged: of float32 with the weights of `nudge`.
        """
        tokens_T, logits_TV = map(np.concatenate, zip(*exact, strict=True))
        _, nudged_TV = map(np.concatenate, zip(*nudged, strict=True))
        got_T, got_TV = map(np.concatenate, zip(*other, strict=True))
        spread_T = logits_TV.std(axis=1)
        nudge_TV = (nudged_TV - logits_TV) / spread_T[:, None]
        error_TV = np.abs(got_TV - logits_TV) / spread_T[:, None]
        second_T, best_T = np.partition(logits_TV, -2, axis=1)[:, -2:].T
        return cls(
            config=config,
            bound=math.sqrt((4 + config.layers / 7) * np.square(nudge_TV).mean()),
            rms_T=np.sqrt(np.square(error_TV).mean(axis=1)),
            worst_T=error_TV.max(axis=1),
            margin_T=(best_T - second_T) / spread_T,
            agrees_T=tokens_T == got_T,
            spread_T=spread_T,
        )

    @property
    def rms(self) -> float:
        """Return the root mean square of all errors."""
        return float(np.sqrt(np.square(self.rms_T).mean()))

    @property
    def worst(self) -> float:
        """Return the largest error of a logit."""
        return float(self.worst_T.max())

    @property
    def agreeing(self) -> float:
        """Return the share of positions with equal greedy tokens."""
        return float(self.agrees_T.mean())

    @property
    def margins(self) -> list[float]:
        """Return the float32 margin of each choice that differs, falling."""
        return np.sort(self.margin_T[~self.agrees_T])[::-1].tolist()

    @property
    def holds(self) -> bool:
        """Return whether errors and choices that differ are within the rule."""
        worst = max(self.worst, *self.margins, 0.0)
        # Written so that NaN is outside.
        return self.rms <= self.bound and worst <= TAIL * self.bound

    def __str__(self) -> str:
        bound, margins = self.bound, self.margins
        others = f"; margins of the others at most {margins[0]:.4f}" if margins else ""
        return (
            f"{self.config.name} {self.config.dtype} against float32, "
            f"{len(self.agrees_T)} positions, in spreads of a position's logits (mean "
            f"{self.spread_T.mean():.3g}): rms error {self.rms:.4f} of at most "
            f"{bound:.4f}, largest {self.worst:.4f} of at most {TAIL * bound:.4f}; "
            f"{self.agreeing:.1%} greedy tokens agree, the median margin is "
            f"{np.median(self.margin_T):.4f}{others}"
        )


def nudge(params: Weights, dtype: str) -> transformer.Params:
    """Return float32 weights, each off by a random part of half an eps of `dtype`."""
    if isinstance(params, Checkpoint):
        exact = dataclasses.replace(params.config, dtype="float32")
        weights = dataclasses.replace(params, config=exact)
        params = weights.restore(SingleDeviceSharding(jax.devices()[0]))
    leaves, tree = jax.tree.flatten(params)
    eps = float(jnp.finfo(dtype).eps)
    for i, leaf in enumerate(leaves):
        noise = jax.random.uniform(
            jax.random.key(i), leaf.shape, minval=-0.5, maxval=0.5
        )
        leaves[i] = leaf.astype(jnp.float32) * (1 + eps * noise)
    return jax.tree.unflatten(tree, leaves)


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

    Both are the engine's own programs on the same devices. Three engines, one of them
    with nudged weights, are built and dropped in turn. All logits are kept on the host.

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

    parsed = Deployment.parse(deployment)

    def outputs(
        config: ModelConfig,
        weights: Weights,
        attention: str = XlaAttention.name,
        tokens: Mapping[int, Sequence[int]] | None = None,
    ) -> list[Output]:
        gc.collect()  # the engine before: it is in a cycle, and its memory is needed
        served = _serve(config, weights, parsed, devices, attention, requests)
        return greedy_outputs(served, requests, tokens)

    single = dataclasses.replace(config, dtype="float32")
    config = dataclasses.replace(config, dtype=dtype)
    exact = outputs(single, cast(params, single))
    follow = {i: output.tokens_T.tolist() for i, output in enumerate(exact)}
    nudged = outputs(single, nudge(params, dtype), tokens=follow)
    other = outputs(config, cast(params, config), attention, follow)
    return DtypeComparison.of(config, exact, nudged, other)


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
    kernel = choose_kernel(attention, devices[0], config).kernel
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
    recorder = _LogitRecorder(served.engine, tokens)
    dataclasses.replace(served, timing=as_measured, around=lambda _: recorder).run(
        requests
    )
    return [recorder.output(request) for request in requests]


class _LogitRecorder:
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
