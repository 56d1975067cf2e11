"""What the tests of the engine share: small models, one pool, a way to serve.

Compiling is what these tests wait for, so everything here is one size: a program that
one test has compiled serves all others.
"""

import dataclasses
import math

import jax
import numpy as np

from disagg_jax.control.backend import Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import EngineExecutor, as_measured
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Request, Status
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.work import Arrived, Down
from models import transformer
from models.checkpoint import Weights
from models.config import ModelConfig


def make_config(name: str, **fields) -> ModelConfig:
    """A model as small as can be sharded 4 ways."""
    defaults = dict(
        vocab_size=64,
        layers=2,
        embed=32,
        q_heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=64,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_length=64,
        dtype="float32",
    )
    return ModelConfig(name=name, **{**defaults, **fields})


# By what tensor parallelism of 2 and 4 does to their kv heads.
MODELS = {
    config.name: config
    for config in (
        make_config("divided", q_heads=8, kv_heads=4),
        make_config("repeated", q_heads=4, kv_heads=2),  # at 4
        make_config("padded", q_heads=6, kv_heads=3),  # at 2 and 4
    )
}
# The other families, with heads that tensor parallelism must pad, and repeat at 4.
FAMILIES = {
    config.name: config
    for config in (
        make_config(
            "opt",
            q_heads=6,
            kv_heads=6,
            norm="layer",
            positions="learned",
            mlp_kind="relu",
            biases=True,
            tie_embeddings=True,
        ),
        make_config("qwen3", head_dim=16, qk_norm=True),
        make_config("scaled", rope_divisors=(1, 1.5, 4, 8), rope_attention_factor=1.2),
    )
}

# The pool holds one request of the longest context and nothing beside it.
POOL = KVMemory(num_blocks=16, block_tokens=4, max_context=64)
BUCKETS = Buckets(
    prefill=(StepShape.prefill(64, 4),),
    decode_rows=(4,),
    pool_blocks=(16,),
    transfer_blocks=(16,),
)
# Chunks of prompts beside decodes: as much as the longest prompt beside 4 of them.
MIXED = dataclasses.replace(
    BUCKETS,
    prefill=(),
    mixed=(StepShape.mixed(tokens=68, rows=8, context=16, decodes=4, blocks=16),),
)
POLICIES = {
    Role.COLOCATED: PrefillFirst(max_batched_tokens=64, max_seqs=4),
    Role.PREFILL: PrefillOnly(token_budget=64, max_seqs=4),
    Role.DECODE: DecodeOnly(max_seqs=4),
}


def one_second(work, parts_s) -> Outcome:
    """A `DurationRule` by which each stage, and all KV together, takes a second."""
    return as_measured(work, [1.0] * len(parts_s))


class World:
    """Weights, programs and reference outputs, each made once."""

    def __init__(self, weights: dict[ModelConfig, Weights] | None = None):
        self._params = dict(weights or {})
        self._references, self._engines = {}, {}
        self.models = {}

    def params(self, config: ModelConfig) -> Weights:
        if config not in self._params:
            self._params[config] = random_params(config)
        return self._params[config]

    def reference(self, config: ModelConfig, request: Request) -> list[int]:
        """What `request` should get: one device, no cache, one request at a time."""
        key = config, request.prompt, request.max_tokens
        if key not in self._references:
            self._references[key] = transformer.greedy(
                config, self.params(config), request.prompt, request.max_tokens
            )
        return until_stop(request, self._references[key])

    def engine(
        self,
        deployment: str,
        config: ModelConfig = MODELS["divided"],
        buckets: Buckets = BUCKETS,
        pool: KVMemory = POOL,
        devices: list[jax.Device] | None = None,
        sampled: bool = False,
        **options,
    ) -> Engine:
        """A compiled engine, its pools full of what was served by it before.

        Decode instances are on devices 4 to 7 and others on 0 to 3. Instances of one
        side share them, unless `devices` says otherwise, so that few programs are
        needed.
        """
        key = (deployment, config, buckets, pool, str(devices), str(options))
        if key in self._engines:
            engine = self._engines[key]
            engine.compile(sampled=sampled)
            return engine
        parsed = Deployment.parse(deployment)
        roles = [spec.role for spec in parsed.instances]
        engine = self._engines[key] = Engine(
            config,
            self.params(config),
            parsed,
            devices or _devices(parsed),
            [pool] * len(roles),
            [_only(role, buckets) for role in roles],
            models=self.models,
            **options,
        )
        engine.compile(sampled=sampled)
        return engine


def _only(role: Role, buckets: Buckets) -> Buckets:
    """The shapes that an instance of `role` needs."""
    if role is Role.PREFILL:
        return dataclasses.replace(buckets, decode_rows=(), pool_blocks=())
    if role is Role.DECODE:
        return dataclasses.replace(buckets, prefill=(), mixed=())
    return buckets


def _devices(deployment: Deployment) -> list[jax.Device]:
    """Devices in the order in which instances take them."""
    taken = []
    for spec in deployment.instances:
        start = 4 if spec.role is Role.DECODE else 0
        taken += jax.devices()[start : start + spec.devices]
    return taken


def random_params(config: ModelConfig) -> transformer.Params:
    """Weights of the scale of `init_params`, whose random bits take long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        if name.startswith("b"):
            return (rng.normal(size=leaf.shape) * 0.05).astype(leaf.dtype)
        fan_in = leaf.shape[0]
        if name in ("wo", "embed", "positions"):
            fan_in = math.prod(leaf.shape) // leaf.shape[-1 if name == "wo" else 0]
        gain = 4.0 if name == "wq" else 1.0
        noise = rng.normal(size=leaf.shape) * gain * fan_in**-0.5
        return noise.astype(leaf.dtype)

    shapes = transformer.param_shapes(config)
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def until_stop(request: Request, tokens: list[int]) -> list[int]:
    """`tokens` up to and with the first that ends `request`."""
    for n, token in enumerate(tokens):
        if request.stops_at(token):
            return tokens[: n + 1]
    return tokens


def make_controller(engine: Engine, policies=POLICIES, **options) -> Controller:
    memory = [instance.programs.memory for instance in engine.instances]
    return Controller(engine.deployment, policies, memory, **options)


def serve_virtual(engine: Engine, requests, timing=one_second, policies=POLICIES):
    """Serves `requests`; checks the accounts; returns the timelines by request id."""
    controller = make_controller(engine, policies)
    with engine.serving():
        backend = VirtualBackend(EngineExecutor(engine, timing))
        timelines = serve(controller, backend, requests)
    assert_drained(controller)
    return {timeline.request.id: timeline for timeline in timelines}


def drive(engine: Engine, backend, requests, at_turn=None):
    """Serves `requests`, which all arrive at once, with events injected at turns."""
    at_turn = dict(at_turn or {})
    controller = make_controller(engine)
    with engine.serving():
        events = [Arrived(request) for request in requests]
        turn = 0
        while events or controller.in_flight or at_turn:
            for event in events:
                if isinstance(event, Down):
                    backend.drop(event.instance)
            for work in controller.step(backend.now_s(), events):
                backend.submit(work)
            turn += 1
            events = list(backend.wait(float("inf"))) if controller.in_flight else []
            # What is injected comes after the turn's completions.
            events += at_turn.pop(turn, [])
    assert_drained(controller)
    return {timeline.request.id: timeline for timeline in controller.timelines}


def assert_drained(controller: Controller) -> None:
    for instance in controller.instances:
        assert instance.blocks.free == instance.blocks.memory.num_blocks
        assert not instance.blocks.held_by


def assert_reference(world: World, config: ModelConfig, timelines) -> None:
    """Every request finished with the tokens of the reference."""
    assert timelines
    for timeline in timelines.values():
        assert timeline.status is Status.FINISHED
        expected = world.reference(config, timeline.request)
        assert timeline.tokens == expected, f"request {timeline.request.id}"


def make_request(id: int, prompt: int | tuple[int, ...], out: int, **fields) -> Request:
    """A request with a random prompt of that many tokens, or with that prompt."""
    if isinstance(prompt, int):
        rng = np.random.default_rng(id)
        prompt = tuple(rng.integers(0, 64, prompt).tolist())
    defaults = dict(arrival_s=0.0, prompt_tokens=len(prompt), max_tokens=out)
    return Request(id=id, prompt=prompt, **{**defaults, **fields})


def with_middle_token(world: World, config: ModelConfig, request: Request) -> int:
    """A token that the reference generates for the first time near the middle."""
    tokens = world.reference(config, request)
    new = [i for i, token in enumerate(tokens[:-1]) if token not in tokens[:i]]
    return tokens[min(new, key=lambda i: abs(i - len(tokens) // 2))]


def mixed_requests(world: World, config: ModelConfig) -> list[Request]:
    """Ten requests for four places: lengths, ends and edges of every kind."""
    eos = make_request(6, 30, 20)
    stop = make_request(7, 16, 16)
    ignored = make_request(9, 21, 18)
    return [
        make_request(0, (0,), 10),  # id 0, and a prompt of one token, which is 0
        make_request(1, 4, 9),  # exactly a block
        make_request(2, 8, 1),  # only the token that prefill makes
        make_request(3, 40, 24),  # up to the last token of the context
        make_request(4, 13, 12),
        make_request(5, (5, 0, 0, 9, 0, 11, 0), 12),
        dataclasses.replace(eos, eos_token=with_middle_token(world, config, eos)),
        dataclasses.replace(
            stop, stop_tokens=frozenset({with_middle_token(world, config, stop)})
        ),
        make_request(8, 5, 7),
        dataclasses.replace(
            ignored,
            eos_token=with_middle_token(world, config, ignored),
            ignore_eos=True,
        ),
    ]
