"""Bytes, FLOPs and copies of programs, of which the answer is known by hand.

Texts are as XLA prints them, in part shortened; M below is 2**20.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.engine.attention.kernel import KernelCost
from experiments.compiled.traffic import traffic

M = 2**20


def entry(body: str, *others: str) -> str:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return "\n\n".join([*others, f"ENTRY %main () -> () {{\n{lines}\n}}\n"])


def sizes(text: str, **kwargs) -> tuple[float, float]:
    found = traffic(text, **kwargs)
    read = sum(op.read_bytes for op in found.ops)
    return read, sum(op.written_bytes for op in found.ops)


# -- bytes -----------------------------------------------------------------------------


def test_an_op_reads_its_operands_and_writes_its_result():
    text = entry("""
        %a = f32[1024,1024]{1,0} parameter(0)
        %b = f32[1024]{0} parameter(1)
        %c = f32[1024,1024]{1,0} bitcast(%a)
        ROOT %d = bf16[1024,1024]{1,0} add(%c, %b)
    """)
    assert sizes(text) == (4 * M + 4096, 2 * M)


def test_what_is_not_in_hbm_is_not_counted():
    text = entry("""
        %a = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)
        ROOT %b = f32[1024,1024]{1,0:T(8,128)} negate(%a)
    """)
    assert sizes(text) == (0, 4 * M)


PREFETCH = """
    %w = bf16[1024,1024]{1,0} parameter(0)
    %x = bf16[8,1024]{1,0:S(1)} parameter(1)
    %s = ((bf16[1024,1024]{1,0}), bf16[512,1024]{1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%w), slice={[0:512], [0:1024]}
    %t = ((bf16[1024,1024]{1,0}), bf16[512,1024]{1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%w), slice={[512:1024], [0:1024]}
    %u = bf16[512,1024]{1,0:S(1)} slice-done(%s)
    %v = bf16[512,1024]{1,0:S(1)} slice-done(%t)
    %y = bf16[1024,1024]{1,0:S(1)} custom-call(%u, %v), \
custom_call_target="ConcatBitcast"
    ROOT %z = bf16[8,1024]{1,0:S(1)} dot(%x, %y), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
"""


def test_weights_that_are_prefetched_count_once():
    found = traffic(entry(PREFETCH))
    assert found.size_bytes == 2 * M
    assert found.flops == 2 * 8 * M
    assert not found.unstated_kernels


def test_a_prefetch_for_the_next_run_is_not_counted_beside_that_of_this_one():
    again = """
    %n = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%w)
    %m = bf16[1024,1024]{1,0:S(1)} copy-done(%n)
    ROOT"""
    text = entry(PREFETCH.replace("ROOT", again))
    assert traffic(text).size_bytes == 2 * M
    # But if it is the program's result.
    result = text.replace("ROOT %z", "%z").replace("%m =", "ROOT %m =")
    assert traffic(result).size_bytes == 4 * M


def test_an_asynchronous_copy_counts_once():
    text = entry("""
        %a = f32[1024,1024]{1,0} parameter(0)
        %s = (f32[1024,1024]{0,1}, f32[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%a)
        ROOT %d = f32[1024,1024]{0,1} copy-done(%s)
    """)
    assert sizes(text) == (4 * M, 4 * M)


def test_an_asynchronous_call_counts_what_it_calls():
    inner = """%inner (p: f32[1024,1024]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  ROOT %n = f32[1024,1024]{1,0} negate(%p)
}"""
    text = entry(
        """
        %a = f32[1024,1024]{1,0} parameter(0)
        %s = ((f32[1024,1024]{1,0}), f32[1024,1024]{1,0}, u32[]) async-start(%a), \
calls=%inner
        ROOT %d = f32[1024,1024]{1,0} async-done(%s)
        """,
        inner,
    )
    assert sizes(text) == (4 * M, 4 * M)


POOL = "bf16[513,8,128,128]{3,2,1,0}"
VMEM = "bf16[513,8,128,128]{3,2,1,0:S(1)}"
BLOCK_BYTES = 8 * 128 * 128 * 2
GATHER = f"""%taken (p: {POOL}, i: s32[16]) -> bf16[16,8,128,128] {{
  %p = {POOL} parameter(0)
  %i = s32[16]{{0}} parameter(1)
  %c = f32[513,8,128,128]{{3,2,1,0}} convert(%p)
  %g = f32[16,8,128,128]{{3,2,1,0}} gather(%c, %i), offset_dims={{1,2,3}}, \
collapsed_slice_dims={{0}}, start_index_map={{0}}, index_vector_dim=1
  ROOT %r = bf16[16,8,128,128]{{3,2,1,0}} convert(%g)
}}"""


def test_a_gather_reads_what_it_takes():
    text = entry(
        f"""
        %pool = {POOL} parameter(0)
        %ids = s32[16]{{0}} parameter(1)
        ROOT %g = bf16[16,8,128,128]{{3,2,1,0:S(1)}} fusion(%pool, %ids), \
kind=kCustom, calls=%taken
        """,
        GATHER,
    )
    assert sizes(text) == (16 * BLOCK_BYTES + 64, 0)


SCATTER = f"""%put (p: {POOL}, i: s32[16], x: bf16[16,8,128,128]) -> {POOL} {{
  %p = {POOL} parameter(0)
  %i = s32[16]{{0}} parameter(1)
  %x = bf16[16,8,128,128]{{3,2,1,0}} parameter(2)
  %b = {POOL} bitcast(%p)
  ROOT %s = {POOL} scatter(%b, %i, %x), to_apply=%second
}}"""
PUT = f"""
    %pool = {POOL} parameter(0)
    %ids = s32[16]{{0}} parameter(1)
    %x = bf16[16,8,128,128]{{3,2,1,0}} parameter(2)
    ROOT %s = {POOL} fusion(%pool, %ids, %x), kind=kCustom, calls=%put
"""


def test_a_scatter_in_place_writes_its_updates():
    assert sizes(entry(PUT, SCATTER)) == (16 * BLOCK_BYTES + 64, 16 * BLOCK_BYTES)
    alone = PUT.replace("fusion(", "scatter(").replace("calls=%put", "to_apply=%second")
    assert sizes(entry(alone)) == sizes(entry(PUT, SCATTER))


def test_a_fusion_may_reduce_several_arrays_at_once():
    """Its root has several results without a tuple, such as a largest and its place."""
    most = """
most (p: f32[], i: s32[], q: f32[], j: s32[]) -> (f32[], s32[]) {
  %p = f32[] parameter(0)
  %i = s32[] parameter(1)
  %q = f32[] parameter(2)
  %j = s32[] parameter(3)
  %m = f32[] maximum(%p, %q)
  %n = s32[] maximum(%i, %j)
  ROOT %t = (f32[], s32[]) tuple(%m, %n)
}"""
    fused = """
fused (p: f32[1024,1024], i: s32[1024,1024]) -> (f32[1024], s32[1024]) {
  %p = f32[1024,1024]{1,0} parameter(0)
  %i = s32[1024,1024]{1,0} parameter(1)
  %low = f32[] constant(-inf)
  %zero = s32[] constant(0)
  ROOT %r = (f32[1024]{0}, s32[1024]{0}) reduce(%p, %i, %low, %zero), dimensions={1}, \
to_apply=%most
}"""
    text = entry(
        """
        %a = f32[1024,1024]{1,0} parameter(0)
        %b = s32[1024,1024]{1,0} parameter(1)
        ROOT %f = (f32[1024]{0}, s32[1024]{0}) fusion(%a, %b), kind=kInput, calls=fused
        """,
        most,
        fused,
    )
    assert sizes(text) == (8 * M, 2 * 4096)


def test_an_update_of_an_array_that_the_fusion_makes_writes_all_of_it():
    made = SCATTER.replace(f"%b = {POOL} bitcast", f"%b = {POOL} negate")
    read, written = sizes(entry(PUT, made))
    assert (read, written) == ((513 + 16) * BLOCK_BYTES + 64, 513 * BLOCK_BYTES)


def test_a_fusion_of_fusions_reads_what_the_inner_ones_take():
    outer = f"""%outer (p: {POOL}, i: s32[16]) -> f32[] {{
  %p = {POOL} parameter(0)
  %i = s32[16]{{0}} parameter(1)
  %f = bf16[16,8,128,128]{{3,2,1,0}} fusion(%p, %i), kind=kLoop, calls=%taken
  %z = bf16[] constant(0)
  ROOT %r = bf16[]{{:S(1)}} reduce(%f, %z), dimensions={{0,1,2,3}}, to_apply=%add
}}"""
    add = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}"""
    text = entry(
        f"""
        %pool = {POOL} parameter(0)
        %ids = s32[16]{{0}} parameter(1)
        ROOT %r = bf16[]{{:S(1)}} fusion(%pool, %ids), kind=kLoop, calls=%outer
        """,
        add,
        GATHER,
        outer,
    )
    assert sizes(text) == (16 * BLOCK_BYTES + 64, 0)


# -- loops and branches ----------------------------------------------------------------

LOOP = """%body (s: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %s = (s32[]{:S(6)}, f32[1024,1024]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%s), index=0
  %k = s32[]{:S(6)} copy(%i)
  %one = s32[]{:S(6)} constant(1)
  %j = s32[]{:S(6)} add(%k, %one)
  %x = f32[1024,1024]{1,0} get-tuple-element(%s), index=1
  %y = f32[1024,1024]{1,0} negate(%x)
  ROOT %t = (s32[]{:S(6)}, f32[1024,1024]{1,0}) tuple(%j, %y)
}

%test (s: (s32[], f32[1024,1024])) -> pred[] {
  %s = (s32[]{:S(6)}, f32[1024,1024]{1,0}) parameter(0)
  %n = s32[]{:S(6)} constant(32)
  %i = s32[]{:S(6)} get-tuple-element(%s), index=0
  ROOT %c = pred[]{:S(6)} compare(%i, %n), direction=LT
}"""
ROUNDS = """
    %x = f32[1024,1024]{1,0} parameter(0)
    %zero = s32[]{:S(6)} constant(0)
    %i = s32[]{:S(6)} copy(%zero)
    %t = (s32[]{:S(6)}, f32[1024,1024]{1,0}) tuple(%i, %x)
    ROOT %w = (s32[]{:S(6)}, f32[1024,1024]{1,0}) while(%t), condition=%test, \
body=%body
"""


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("constant(32)", "constant(32)", 32),
        ("direction=LT", "direction=LE", 33),
        ("constant(0)", "constant(2)", 30),
        ("constant(1)", "constant(5)", 7),
        (
            "body=%body",
            'body=%body, backend_config={"known_trip_count":{"n":"3"}}',
            3,
        ),
    ],
)
def test_a_loop_counts_its_rounds(old, new, trips):
    text = entry(ROUNDS, LOOP)
    assert old in text
    assert sizes(text.replace(old, new)) == (trips * 4 * M, trips * 4 * M)


def test_a_loop_of_unknown_rounds_counts_once_and_is_named():
    found = traffic(entry(ROUNDS.replace("constant(0)", "parameter(1)"), LOOP))
    assert found.unknown_loops == ("w",)
    assert found.size_bytes == 8 * M
    assert "trips unknown: w" in str(found)


def test_of_branches_the_one_that_moves_most_counts():
    branch = """%{name} (p: f32[{n},1024]) -> f32[] {{
  %p.{name} = f32[{n},1024]{{1,0}} parameter(0)
  ROOT %n.{name} = f32[{n},1024]{{1,0:S(1)}} negate(%p.{name})
}}"""
    text = entry(
        """
        %which = s32[]{:S(6)} parameter(0)
        %a = f32[1024,1024]{1,0} parameter(1)
        %b = f32[2048,1024]{1,0} parameter(2)
        ROOT %c = f32[]{:S(1)} conditional(%which, %a, %b), \
branch_computations={%one, %two}
        """,
        branch.format(name="one", n=1024),
        branch.format(name="two", n=2048),
    )
    assert sizes(text) == (8 * M, 0)


# -- kernels ---------------------------------------------------------------------------

KERNEL = """
    %x = f32[1024,1024]{1,0} parameter(0)
    ROOT %k = f32[1024,1024]{1,0} custom-call(%x), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/attend/pallas_call" stack_frame_id=1}, \
backend_config={"custom_call_config":{}}
"""


def test_a_kernel_counts_what_it_states():
    stated = 'cost_estimate":{"flops":"5","bytes_accessed":"7"'
    text = entry(KERNEL.replace('call_config":{', f'call_config":{{"{stated}}}'))
    found = traffic(text)
    assert (found.size_bytes, found.flops, found.unstated_kernels) == (7, 5, ())


def test_a_kernel_counts_what_is_stated_for_its_name():
    cost = {"attend": KernelCost(size_bytes=3, flops=4)}
    found = traffic(entry(KERNEL), kernels=cost)
    assert (found.size_bytes, found.flops, found.unstated_kernels) == (3, 4, ())


def test_a_kernel_that_states_nothing_counts_its_arrays_and_is_named():
    found = traffic(entry(KERNEL))
    assert (found.size_bytes, found.unstated_kernels) == (8 * M, ("attend",))
    assert "kernel without a cost: attend" in str(found)


def test_a_call_of_cublas_is_a_matmul_and_its_workspace_is_left_out():
    text = entry("""
        %x = bf16[64,1024]{1,0} parameter(0)
        %w = bf16[1024,512]{1,0} parameter(1)
        ROOT %g = (bf16[64,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
    """)
    found = traffic(text)
    assert found.flops == 2 * 64 * 512 * 1024
    assert found.size_bytes == 2 * (64 * 1024 + 1024 * 512 + 64 * 512)
    assert not found.unstated_kernels


# -- places ----------------------------------------------------------------------------


def test_what_xla_adds_has_the_place_of_its_user_or_else_of_what_it_uses():
    named = PREFETCH.replace(
        "rhs_contracting_dims={0}",
        'rhs_contracting_dims={0}, metadata={op_name="jit(run)/layer_3/mlp/dot"}',
    )
    out = """
    %s2 = (bf16[8,1024]{1,0}, bf16[8,1024]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%z)
    %o = bf16[8,1024]{1,0} copy-done(%s2)
    ROOT %r = (bf16[8,1024]{1,0}) tuple(%o)
"""
    found = traffic(entry(named.replace("ROOT ", "") + out))
    places = {op.name: op.op_name for op in found.ops}
    assert places == dict.fromkeys(
        ("s", "t", "y", "z", "s2"), "jit(run)/layer_3/mlp/dot"
    )


# -- cycles ----------------------------------------------------------------------------


def test_cycles_are_those_of_matmuls_in_every_round():
    """XLA's are far too many for other ops."""
    dots = LOOP.replace(
        "negate(%x)",
        'dot(%x, %x), lhs_contracting_dims={1}, backend_config={"window_config":'
        '{"estimated_cycles":"70"}}',
    )
    assert sum(op.matmul_cycles for op in traffic(entry(ROUNDS, dots)).ops) == 32 * 70
    others = dots.replace("dot(%x, %x)", "multiply(%x, %x)")
    assert not any(op.matmul_cycles for op in traffic(entry(ROUNDS, others)).ops)


# -- FLOPs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "labels", "window", "flops"),
    [
        # A plain matmul [64,1024] x [1024,512].
        (("64,1024", "1024,512", "64,512"), "bf_io->bf", "", 2 * 64 * 512 * 1024),
        # Its batch of 8 as a spatial dimension: dilated, so that one tap of 8 counts.
        (
            ("8,64,1024", "8,1024,512", "8,64,512"),
            "0bf_0io->0bf",
            "window={size=8 stride=7 lhs_dilate=8}, ",
            8 * 2 * 64 * 512 * 1024,
        ),
        # As XLA writes [16,16] x [16,8,4]: 3 of 4 taps fall on padding.
        (
            ("16,16,1", "16,8,4", "16,8,4"),
            "bf0_io0->bf0",
            "window={size=4 pad=3_3 rhs_reversal=1}, ",
            2 * 16 * 16 * 8 * 4,
        ),
    ],
)
def test_flops_of_a_matmul_that_is_a_convolution(shapes, labels, window, flops):
    lhs, rhs, out = (f"bf16[{shape}]" for shape in shapes)
    text = entry(f"""
        %x = {lhs} parameter(0)
        %w = {rhs} parameter(1)
        ROOT %y = {out} convolution(%x, %w), {window}dim_labels={labels}
    """)
    assert traffic(text).flops == flops


def compiled(f, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*args).compile()


def test_flops_of_a_compiled_matmul_are_those_of_xla():
    program = compiled(
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (4, 8, 16), (4, 16, 32)
    )
    assert traffic(program).flops == 2 * 4 * 8 * 16 * 32
    assert traffic(program).flops == program.cost_analysis()["flops"]


def test_a_compiled_loop_counts_all_its_rounds():
    def f(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ w), x)

    program = compiled(f, (64, 64), (64, 64))
    found = traffic(program)
    assert found.flops == 7 * 2 * 64**3
    assert not found.unknown_loops
    # At least the weights and the state of each round.
    assert found.size_bytes >= 7 * 3 * 4 * 64 * 64


def test_loops_in_loops_multiply():
    def f(x, w):
        def five(y):
            return jax.lax.fori_loop(0, 5, lambda _, z: jnp.sin(z @ w), y)

        return jax.lax.fori_loop(0, 3, lambda _, y: five(y), x)

    assert traffic(compiled(f, (64, 64), (64, 64))).flops == 3 * 5 * 2 * 64**3


def test_a_multiply_and_a_sum_are_a_product():
    def f(q, k):
        return (q[:, None] * k).sum(-1)

    found = traffic(compiled(f, (8, 128), (8, 32, 128)))
    assert found.flops == 2 * 8 * 32 * 128
    assert traffic(compiled(lambda k: k.sum(-1), (8, 32, 128))).flops == 0


@pytest.mark.parametrize(("op", "flops"), [("multiply", 2 * M), ("add", 0)])
def test_a_product_may_be_multiplied_and_summed_in_two_fusions(op, flops):
    fusions = f"""%made (a: f32[1024,1024], b: f32[1024,1024]) -> f32[1024,1024] {{
  %a = f32[1024,1024]{{1,0}} parameter(0)
  %b = f32[1024,1024]{{1,0}} parameter(1)
  %n = f32[1024,1024]{{1,0}} negate(%a)
  %m = f32[1024,1024]{{1,0}} {op}(%n, %b)
  ROOT %t = (f32[1024,1024]{{1,0}}, f32[1024,1024]{{1,0}}) tuple(%n, %m)
}}

%plus (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}}

%summed (p: f32[1048576]) -> f32[1024] {{
  %p = f32[1048576]{{0}} parameter(0)
  %q = f32[1024,1024]{{1,0}} bitcast(%p)
  %zero = f32[] constant(0)
  ROOT %r = f32[1024]{{0}} reduce(%q, %zero), dimensions={{1}}, to_apply=%plus
}}"""
    text = entry(
        """
        %a = f32[1024,1024]{1,0} parameter(0)
        %b = f32[1024,1024]{1,0} parameter(1)
        %f = (f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) fusion(%a, %b), kind=kLoop, \
calls=%made
        %g = f32[1024,1024]{1,0} get-tuple-element(%f), index=1
        %h = f32[1048576]{0} bitcast(%g)
        ROOT %s = f32[1024]{0} fusion(%h), kind=kInput, calls=%summed
        """,
        fusions,
    )
    assert traffic(text).flops == flops


def test_a_compiled_gather_or_scatter_of_a_few_rows_leaves_the_rest_alone():
    ids = jax.ShapeDtypeStruct((4,), np.int32)
    pool = jax.ShapeDtypeStruct((1000, 256), jnp.float32)
    rows = jax.ShapeDtypeStruct((4, 256), jnp.float32)

    def take(pool, ids):
        return pool.at[ids].get(mode="promise_in_bounds")

    def put(pool, ids, rows):
        return pool.at[ids].set(rows, mode="promise_in_bounds")

    taken = traffic(jax.jit(take).lower(pool, ids).compile(), pool=pool.shape)
    jitted = jax.jit(put, donate_argnums=0)
    written = traffic(jitted.lower(pool, ids, rows).compile(), pool=pool.shape)
    # Four of 1000 rows are read and written, perhaps once more in another layout.
    for found in (taken, written):
        assert 2 * 4 * 256 * 4 <= found.size_bytes < 4 * 4 * 256 * 4
        assert not found.pool_copies
    # A pool that is not donated is copied first.
    kept = traffic(jax.jit(put).lower(pool, ids, rows).compile(), pool=pool.shape)
    assert len(kept.pool_copies) == 1
    assert kept.size_bytes > 2 * 1000 * 256 * 4


# -- copies of the pool ----------------------------------------------------------------


def copies(body: str, *others: str) -> list[str]:
    text = entry(body, *others)
    return [op.name for op in traffic(text, pool=(513, 8, 128, 128)).pool_copies]


def test_a_copy_of_the_pool_is_listed():
    body = f"""
        %pool = {POOL} parameter(0)
        %same = bf16[1026,4,128,128]{{3,2,1,0}} bitcast(%pool)
        %other = bf16[1026,4,128,128]{{3,2,0,1}} copy(%same)
        ROOT %back = {POOL} bitcast(%other)
    """
    assert copies(body) == ["other"]
    # Not one of another array, or of one that is as large by chance.
    assert copies(body.replace(POOL, "bf16[513,8,128,64]{3,2,1,0}")) == []
    assert copies(body.replace("bitcast(%pool)", "negate(%pool)")) == []
    # Nor into VMEM.
    assert copies(body.replace("{3,2,0,1}", "{3,2,0,1:S(1)}")) == []


def test_an_asynchronous_copy_of_the_pool_is_listed():
    body = f"""
        %pool = {POOL} parameter(0)
        %start = ({POOL}, {POOL}, u32[]{{:S(2)}}) copy-start(%pool)
        ROOT %done = {POOL} copy-done(%start)
    """
    assert copies(body) == ["start"]
    in_vmem = body.replace(f"({POOL},", f"({VMEM},").replace(
        f"done = {POOL}", f"done = {VMEM}"
    )
    assert copies(in_vmem) == []


def test_a_pool_that_comes_back_from_vmem_is_listed():
    half = "bf16[257,8,128,128]{3,2,1,0:S(1)}"
    body = f"""
        %pool = {POOL} parameter(0)
        %s = (({POOL}), {half}, u32[]{{:S(2)}}) slice-start(%pool), slice={{[0:257]}}
        %t = (({POOL}), {half}, u32[]{{:S(2)}}) slice-start(%pool), slice={{[256:513]}}
        %u = {half} slice-done(%s)
        %v = {half} slice-done(%t)
        %w = {VMEM} custom-call(%u, %v), custom_call_target="ConcatBitcast"
        %start = ({POOL}, {VMEM}, u32[]{{:S(2)}}) copy-start(%w)
        ROOT %done = {POOL} copy-done(%start)
    """
    assert copies(body) == ["start"]


def test_a_fusion_that_takes_half_the_pool_is_listed_and_one_that_takes_less_is_not():
    body = f"""
        %pool = {POOL} parameter(0)
        %ids = s32[16]{{0}} parameter(1)
        ROOT %g = bf16[16,8,128,128]{{3,2,1,0}} fusion(%pool, %ids), \
kind=kCustom, calls=%taken
    """
    assert copies(body, GATHER) == []
    more = [text.replace("[16,", "[260,") for text in (body, GATHER)]
    assert copies(*more) == ["g"]


def test_an_update_in_place_is_no_copy_and_one_of_a_copy_is():
    assert copies(PUT, SCATTER) == []
    made = SCATTER.replace(f"%b = {POOL} bitcast", f"%b = {POOL} copy")
    assert copies(PUT, made) == ["s"]


def test_a_copy_in_a_loop_is_listed():
    loop = LOOP.replace("f32[1024,1024]{1,0}", POOL).replace("negate(%x)", "copy(%x)")
    rounds = ROUNDS.replace("f32[1024,1024]{1,0}", POOL)
    assert copies(rounds, loop) == ["y"]
    assert copies(rounds, loop.replace("copy(%x)", "negate(%x)")) == []


def test_what_is_printed_names_the_copies():
    body = f"""
        %pool = {POOL} parameter(0)
        ROOT %other = bf16[513,8,128,128]{{3,2,0,1}} copy(%pool)
    """
    found = traffic(entry(body), pool=(513, 8, 128, 128))
    assert "copies the pool" in str(found) and "other" in str(found)
    assert found.largest(1) == list(found.pool_copies)
