"""Text in, text out: with the reference's tokens, on every deployment."""

import dataclasses

import jax
import pytest

from disagg_jax import metrics
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine import LLM, Piece
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Sampling
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from models.load import Model
from tests.engine.harness import MODELS, make_request, until_stop

CONFIG = MODELS["divided"]
PROMPTS = ["Once", "the other one", "a"]


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of a vocabulary of 64: a character's code, modulo 64."""

    eos_tokens: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 64 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(64 + id) for id in ids)


class Pairs(Letters):
    """A character takes two tokens."""

    def decode(self, ids: list[int]) -> str:
        whole = super().decode(ids[1::2])
        return whole + "\ufffd" if len(ids) % 2 else whole


def make(world, *args, eos: tuple[int, ...] = (), **options) -> LLM:
    model = Model(CONFIG, world.params(CONFIG), Letters(eos))
    return LLM(model, *args, progress=lambda text: None, **options)


@pytest.fixture(scope="module", params=["prefill:tp1,decode:tp1", "2xcolocated:tp1"])
def llm(world, request) -> LLM:
    return make(world, request.param)


@pytest.fixture(scope="module")
def apart(world) -> LLM:
    return make(world)


def reference(world, prompt: str, max_tokens: int) -> list[int]:
    tokens = tuple(Letters().encode(prompt))
    return world.reference(CONFIG, make_request(0, tokens, max_tokens))


def test_each_prompt_gets_the_tokens_of_the_reference(world, llm):
    lengths = [12, 5, 20]
    found = llm.generate(PROMPTS, max_tokens=lengths)
    assert [one.prompt for one in found] == PROMPTS
    for one, length in zip(found, lengths, strict=True):
        assert one.tokens == reference(world, one.prompt, length)
        assert one.text == Letters().decode(one.tokens)
        stages_s = dataclasses.astuple(one.stages)
        assert sum(stages_s) == pytest.approx(metrics.e2e_s(one.timeline))
    moved = [one.timeline.transfer_bytes > 0 for one in found]
    split = bool(llm.served.deployment.of(Role.PREFILL))
    assert moved == [split] * 3


def test_a_text_ends_with_an_end_token_and_without_its_text(world, apart):
    tokens = reference(world, "Once", 20)
    end = tokens[7]
    ends = make(world, eos=(63, end) if end != 63 else (63,))
    (one,) = ends.generate("Once", max_tokens=20)
    assert one.tokens == until_stop(
        make_request(0, 1, 1, stop_tokens=frozenset({63, end})), tokens
    )
    assert len(one.tokens) <= 8
    assert one.text == Letters().decode(one.tokens[:-1])
    # The same prompt goes on where that token is no end.
    assert len(apart.generate("Once", max_tokens=20)[0].tokens) == 20


def test_each_prompt_has_its_own_sampling(world, llm):
    rules = [Sampling(temperature=5.0, seed=seed) for seed in (0, 1, 0)]
    a, b, c, greedy = llm.generate(
        ["Once"] * 4, [*rules, Sampling(temperature=0.0)], max_tokens=8
    )
    assert a.tokens == c.tokens != b.tokens
    assert greedy.tokens == reference(world, "Once", 8)


def test_pieces_come_as_the_tokens_do(llm):
    pieces: list[Piece] = []
    found = llm.generate(PROMPTS, max_tokens=[3, 1, 9], on_piece=pieces.append)
    for i, one in enumerate(found):
        mine = [piece for piece in pieces if piece.index == i]
        assert [piece.text for piece in mine] == list(one.text)
        assert [piece.is_last for piece in mine] == [False] * (len(mine) - 1) + [True]
    # The long one is not told after the short ones have ended.
    assert [p.index for p in pieces].index(2) < len(pieces) - 9


def test_a_character_is_told_when_it_is_whole(apart, monkeypatch):
    monkeypatch.setattr(apart, "tokenizer", Pairs())
    pieces: list[Piece] = []
    (one,) = apart.generate("Once", max_tokens=5, on_piece=pieces.append)
    assert one.text == Pairs().decode(one.tokens)
    assert [piece.text for piece in pieces] == [*one.text]
    assert one.text.index("\ufffd") == 2  # the fifth token has no second half


def test_a_call_compiles_what_it_needs_and_once(world):
    lines: list[str] = []
    model = Model(CONFIG, world.params(CONFIG), Letters())
    llm = LLM(model, progress=lines.append)
    assert lines == ["attention xla (auto on a cpu)"]
    lines.clear()
    llm.generate(PROMPTS, max_tokens=4)
    names = ["prefill_T64_R4", "decode_B4_P16", "gather_1", "insert_1"]
    assert lines == [f"compiling {name} ({i} of 4)" for i, name in enumerate(names, 1)]
    llm.generate("another", max_tokens=9)
    assert len(lines) == 4
    llm.generate("another", Sampling(temperature=1.0), max_tokens=2)
    draws = ["compiling draw_R4 (1 of 2)", "compiling draw_R4 (2 of 2)"]
    assert lines[4:] == draws


def test_what_is_given_is_used(world):
    pool = KVMemory(num_blocks=8, block_tokens=4, max_context=32)
    prefill = Buckets(
        prefill=(StepShape.prefill(32, 2),),
        decode_rows=(),
        pool_blocks=(),
        transfer_blocks=(8,),
    )
    decode = Buckets(
        prefill=(), decode_rows=(2,), pool_blocks=(8,), transfer_blocks=(8,)
    )
    llm = make(
        world,
        system={
            Role.PREFILL: PrefillOnly(token_budget=32, max_seqs=2),
            Role.DECODE: DecodeOnly(max_seqs=2),
        },
        memory=[pool, pool],
        buckets=[prefill, decode],
        devices=jax.devices()[4:6],
    )
    assert llm.max_context == 32
    found = llm.generate(PROMPTS, max_tokens=10)  # more than the pool holds at once
    for one in found:
        assert one.tokens == reference(world, one.prompt, 10)
    caches = [instance.cache for instance in llm.served.engine.instances]
    places = [{array.device for array in jax.tree.leaves(cache)} for cache in caches]
    assert places == [{device} for device in jax.devices()[4:6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deployment": "9xcolocated:tp1"}, "expected 9 devices for .*, got 8 of kind"),
        ({"system": "vllm_v0"}, "system: expected a policy for the prefill instances"),
        ({"system": "none"}, "system: expected one of .*, got 'none'"),
        (
            {"max_context": 9, "memory": [KVMemory(num_blocks=9, max_context=9)] * 2},
            "max_context: expected none beside memory, which says it, got 9",
        ),
        ({"max_context": 65}, "max_context: expected at most the 64 tokens of model"),
    ],
)
def test_what_cannot_be_made_is_refused(world, options, message):
    with pytest.raises(ValueError, match=message):
        make(world, **options)


def test_what_the_engine_does_not_run_is_refused_before_weights_are_looked_for():
    with pytest.raises(ValueError, match="engine: expected no dp .*, got tp1dp2"):
        LLM("nowhere", "colocated:tp1dp2")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "request 0: expected a prompt of at least one token"),
        (["a", "b" * 60], {"max_tokens": 5}, "request 1: expected at most 64 tokens"),
        (
            ["a", "b"],
            {"max_tokens": [5]},
            "max_tokens: .* each of the 2 prompts, got 1",
        ),
        (["a"], {"sampling": []}, "sampling: expected one, .* the 1 prompts"),
        ("a", {"max_tokens": 0}, "request 0: expected max_tokens >= 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_work(
    world, prompts, options, message
):
    lines: list[str] = []
    llm = LLM(Model(CONFIG, world.params(CONFIG), Letters()), progress=lines.append)
    lines.clear()
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, **options)
    assert lines == []


def test_no_prompts_are_no_work(apart):
    assert apart.generate([]) == []
