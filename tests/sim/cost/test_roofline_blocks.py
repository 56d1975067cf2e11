"""Step times of experts, latent attention, windows and replicas, by hand."""

import dataclasses

import pytest

from disagg_jax.deployment import Parallelism
from disagg_jax.sim.cost.roofline import RooflineCost
from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.hardware.device import (
    AllReduce,
    AllToAll,
    EfficiencyCurve,
    Hardware,
)
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.work import StepLoad
from models.blocks import (
    Attention,
    Block,
    DenseMLP,
    ExpertMLP,
    LatentAttention,
    LinearAttention,
)
from models.model_config import Widths, of_blocks

DEVICE = Hardware(
    name="toy",
    peak_flops=100.0,
    peak_flops_by_bits={8: 200.0},
    hbm_bytes_s=50.0,
    memory_bytes=1e4,
    gemm_mfu=EfficiencyCurve.constant(0.5),  # 50 FLOP/s, 100 with 8 bits
    weight_mbu=0.8,  # 40 byte/s
    attention_mfu=EfficiencyCurve.constant(0.5),  # 50 FLOP/s
    kv_mbu=0.4,  # 20 byte/s
    kv_startup_s=0.0,
    all_reduce={2: AllReduce(0.25, 8.0)},
    all_to_all={2: AllToAll(0.5, 4.0), 4: AllToAll(0.5, 4.0)},
    hop=LinkSpec(name="hop", latency_s=0.5, bandwidth_bytes_s=32.0, efficiency=0.5),
    step_s=0.0,
    tile_rows=4,
)
# Weights: 4 * 2 * (2*2 + 2*1) = 48. A token's KV: 2 * 1 * 2 = 4 values.
ATTENTION = Attention(embed=4, q_heads=2, kv_heads=1, head_dim=2)
# An expert has 2 * 4 * 3 = 24 weights, the shared one 2 * 4 * 1 = 8, the router 16.
EXPERTS = ExpertMLP(embed=4, width=3, experts=4, active=2, shared_width=1, matrices=2)
# Weights: query 4*2*2 = 16, latent 4*4 = 16, expansion 3*2*3 = 18, output 2*2*4 = 16:
# 66. A token's KV: 3 + 1 = 4 values.
LATENT = LatentAttention(
    embed=4, heads=2, q_rank=None, kv_rank=3, nope_dim=1, rope_dim=1, value_dim=2
)
DENSE = DenseMLP(embed=4, width=3, matrices=2)  # 24 weights
# Experts are kept and computed in 8 bits, all other weights in 16.
WIDTHS = Widths(
    weight=2,
    table=2,
    kv=1,
    activation=2,
    expert_weight=1,
    expert_matmul_bits=8,
)


def cost(*blocks, factors=None, widths=WIDTHS):
    model = of_blocks(
        "toy", blocks, vocab_size=10, max_length=64, widths=widths, norm_eps=1e-5
    )
    return RooflineCost(model=model, hardware=DEVICE, factors=factors)


def terms(blocks, parallelism, load, widths=WIDTHS):
    (found,) = cost(*blocks, widths=widths).instance(parallelism).terms(load)
    return found


MIXTURE = (Block(count=2, attention=ATTENTION, mlp=EXPERTS),)
ONE = Parallelism()


@pytest.mark.parametrize(
    ("decodes", "linear_s", "experts_s"),
    [
        # 2 * (48 + 8 + 16) = 144 weights of 2 bytes stream in 7.2 s, the table's 80
        # bytes in 2. One token needs 2 of 4 experts: 2 layers * 2 * 24 bytes / 40.
        (1, 7.2 + 2, 2.4),
        # Three need 4 (1 - 1/8) = 3.5 of them: 4.2 s to stream. They compute for
        # 2 layers * 3 * 2 experts * 2 * 24 FLOPs / 100 = 5.76 s.
        # The others: 2*144*3/50 = 17.28 s, and 2*40*3/50 = 4.8.
        (3, 17.28 + 4.8, 5.76),
    ],
)
def test_experts_that_a_batch_needs_are_streamed_or_computed(
    decodes, linear_s, experts_s
):
    found = terms(MIXTURE, ONE, StepLoad((), decodes, 6))
    assert found.linear_s == pytest.approx(linear_s)
    assert found.experts_s == pytest.approx(experts_s)
    # 2 layers * 4 bytes * 6 tokens at 20 byte/s.
    assert found.kv_s == pytest.approx(2.4)
    assert (found.layers, found.expert_layers, found.kv_layers) == (2, 2, 2)
    assert found.sequences == decodes


def test_experts_are_spread_over_all_devices_whatever_ep_is():
    load = StepLoad((), 1, 6)
    alone = terms(MIXTURE, ONE, load).experts_s
    for text in ("tp2", "tp2ep2", "tp1dp2", "tp1dp2ep2"):
        found = terms(MIXTURE, Parallelism.parse(text), load)
        assert found.experts_s == pytest.approx(alone / 2), text


def test_replicas_keep_their_own_dense_weights_and_send_tokens_to_experts():
    # Three decodes: two on the fullest replica. 2*144*2/50 = 11.52 s, logits 3.2 s.
    found = terms(MIXTURE, Parallelism(dp=2, ep=2), StepLoad((), 3, 6))
    assert found.linear_s == pytest.approx(11.52 + 3.2)
    assert found.kv_s == pytest.approx(2.4 / 2)  # each replica reads its half
    # To the experts and back in two layers: a token has 2, at most one of them on the
    # other device. 2 rows * 8 bytes: .5 + 1/2 * 16/4 = 2.5 s.
    assert (found.reduce_s, found.exchange_s) == (0, pytest.approx(2 * 2 * 2.5))
    # Tensor parallelism reduces twice a layer instead: 3 rows * 8 bytes = 24 bytes,
    # .25 + 2 * 1/2 * 24/8 = 3.25 s.
    found = terms(MIXTURE, Parallelism(tp=2), StepLoad((), 3, 6))
    assert (found.reduce_s, found.exchange_s) == (pytest.approx(2 * 2 * 3.25), 0)
    # Both: a reduction after attention, then the experts. 2 rows are 16 bytes: 2.25 s;
    # of a token's 2 experts both may be elsewhere: .5 + 3/4 * 32/4 = 6.5 s.
    found = terms(MIXTURE, Parallelism(tp=2, dp=2, ep=4), StepLoad((), 3, 6))
    assert found.reduce_s == pytest.approx(2 * 2.25)
    assert found.exchange_s == pytest.approx(2 * 2 * 6.5)


def test_prompts_of_a_step_are_spread_over_the_replicas():
    load = StepLoad(((0, 4), (0, 4)), 0, 0)
    alone = terms(MIXTURE, ONE, load).attention_s
    assert alone == pytest.approx(2 * 2 * 16 * 4 * 2 / 50)  # 2 layers, 16 FLOPs a pair
    assert terms(MIXTURE, Parallelism(dp=2), load).attention_s == alone / 2


def test_experts_expanded_to_16_bits_and_scaled_activations_count_apart():
    load = StepLoad((), 1, 6)
    plain = terms(MIXTURE, ONE, load)
    assert (plain.expanded_s, plain.scaled_layers) == (0, 0)
    # Half a byte streams in half the time; 16 bits compute at half the rate: 3.84 s.
    narrow = dataclasses.replace(
        WIDTHS, expert_weight=0.5, expert_matmul_bits=16, block_scaled=True
    )
    found = terms(MIXTURE, ONE, load, narrow)
    assert (found.experts_s, found.scaled_layers) == (0, 2)
    assert found.expanded_s == pytest.approx(2 * 1.92)


def test_latent_kv_is_not_split_by_tensor_parallelism():
    blocks = (Block(count=1, attention=LATENT, mlp=DENSE),)
    load = StepLoad((), 1, 6)
    # A decode and a latent: 2 heads * 2 * (4 + 3) = 28 FLOPs at 50 FLOP/s a device,
    # more than 4 bytes at 20 byte/s = .2 s. With 2 devices .28, with heads to spare .2.
    assert terms(blocks, ONE, load).kv_s == pytest.approx(6 * 0.56)
    assert terms(blocks, Parallelism(tp=2), load).kv_s == pytest.approx(6 * 0.28)
    fast = dataclasses.replace(DEVICE, peak_flops=1e6)
    wide = dataclasses.replace(cost(*blocks), hardware=fast)
    for tp in (1, 2):
        (found,) = wide.instance(Parallelism(tp=tp)).terms(load)
        assert found.kv_s == pytest.approx(6 * 0.2)
    # A prompt of 4 expands keys: 2 heads * 2 * (2 + 2) = 16 FLOPs a pair, 8 pairs.
    (found,) = cost(*blocks).instance(ONE).terms(StepLoad(((0, 4),), 0, 0))
    assert found.attention_s == pytest.approx(16 * 8 / 50)
    # Each device keeps all of a latent: the room is that beside the smaller weights.
    one, two = (wide.kv_tokens(Parallelism(tp=tp)) for tp in (1, 2))
    assert one == (9000 - 2 * (66 + 24) - 2 * 80) // 4
    assert two == (9000 - (66 + 24) - 80) // 4


def test_a_window_limits_what_is_read_and_what_a_prompt_attends_to():
    windowed = dataclasses.replace(ATTENTION, window=3)
    blocks = (
        Block(count=1, attention=ATTENTION, mlp=DENSE),
        Block(count=1, attention=windowed, mlp=DENSE),
    )
    instance = cost(*blocks).instance(ONE)
    # 4 bytes a token at 20 byte/s. Two decodes read at most 6 tokens of the second.
    for context, seen in ((4, 4), (6, 6), (20, 6)):
        load = StepLoad((), 2, context)
        (found,) = instance.terms(load)
        assert found.kv_s == pytest.approx((context + seen) * 0.2)
        assert instance.stages_s(load) == pytest.approx([instance.decode_s(2, context)])
    # 8 tokens attend to 4 on average, with the window to 3: 16 FLOPs a pair.
    (found,) = instance.terms(StepLoad(((0, 8),), 0, 0))
    assert found.attention_s == pytest.approx(16 * 8 * (4 + 3) / 50)
    # One token after 8 reads them again, or the 3 of the window, where computing takes
    # next to no time.
    fast = dataclasses.replace(DEVICE, peak_flops=1e6)
    quick = dataclasses.replace(cost(*blocks), hardware=fast).instance(ONE)
    (found,) = quick.terms(StepLoad(((8, 1),), 0, 0))
    assert found.attention_s == pytest.approx((8 + 3) * 0.2)
    # The window keeps no more KV with the context: 4 bytes a token in one layer.
    room = 9000 - 2 * 2 * (48 + 24) - 2 * 80
    assert cost(*blocks).kv_tokens(ONE) == room // 4


def test_a_state_is_read_and_written_whatever_the_context():
    linear = LinearAttention(
        embed=4, key_heads=1, value_heads=2, key_dim=2, value_dim=2, kernel=2
    )
    blocks = (
        Block(count=1, attention=ATTENTION, mlp=DENSE),
        Block(count=3, attention=linear, mlp=DENSE),
    )
    # A state of 2 * 2 * 2 values and 8 inputs of the convolution: 16 values of 4 bytes,
    # twice, at 20 byte/s: 6.4 s for each decode in three layers.
    for context in (10, 30):
        found = terms(blocks, ONE, StepLoad((), 2, context))
        assert found.kv_s == pytest.approx(context * 0.2 + 2 * 3 * 6.4)
        assert found.kv_layers == 1


def test_a_stage_has_its_share_of_each_kind_of_layer():
    blocks = (
        Block(count=1, attention=ATTENTION, mlp=DENSE),
        Block(count=4, attention=ATTENTION, mlp=EXPERTS),
    )
    first, last = cost(*blocks).instance(Parallelism(pp=2)).terms(StepLoad((), 1, 6))
    assert (first.layers, last.layers) == (3, 2)
    assert (first.expert_layers, last.expert_layers) == (2, 2)


def test_factors_multiply_terms_and_add_seconds():
    load = StepLoad(((0, 4),), 3, 6)
    names = [field.name for field in dataclasses.fields(EngineFactors)]
    (found,) = cost(*MIXTURE).instance(ONE).terms(load)
    plain = EngineFactors()
    for i, name in enumerate(names):
        changed = dataclasses.replace(plain, **{name: getattr(plain, name) + 2})
        amount = 1 if name == "step_s" else found[i]  # a step has no term of its own
        more = changed.time_s(found) - plain.time_s(found)
        assert more == pytest.approx(2 * amount), name
        instance = cost(*MIXTURE, factors=changed).instance(ONE)
        assert instance.stages_s(load) == (changed.time_s(found),)
        decodes = StepLoad((), 3, 6)
        assert instance.stages_s(decodes) == pytest.approx([instance.decode_s(3, 6)])


def test_without_overheads_only_factors_are_left():
    names = [field.name for field in dataclasses.fields(EngineFactors)]
    found = EngineFactors(**dict.fromkeys(names, 0.5)).without_overheads()
    for name in names:
        assert getattr(found, name) == (0.0 if name.endswith("_s") else 0.5), name


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("tp1dp3", r"toy: expected tp x dp in \[2, 4\], to reach experts, got 3"),
        ("tp1dp8ep8", r"toy: expected ep to divide 4 experts, got 8"),
        ("tp4", "toy: expected tp to fit 2 query heads and 1 kv heads, got 4"),
    ],
)
def test_parallelism_that_a_mixture_cannot_have(text, error):
    with pytest.raises(ValueError, match=error):
        cost(*MIXTURE).instance(Parallelism.parse(text))


def test_a_dense_model_has_no_experts_to_spread():
    blocks = (Block(count=1, attention=ATTENTION, mlp=DENSE),)
    with pytest.raises(ValueError, match="toy: expected ep = 1, as it has no experts"):
        cost(*blocks).instance(Parallelism(tp=2, ep=2))
