"""Reading the text of optimised programs."""

import pytest

from experiments.compiled.hlo import Module, arrays

TEXT = """\
HloModule jit_f, entry_computation_layout={(bf16[8,3]{1,0})->f32[8]{0}}

FileNames
1 "f.py"

%fused (p.0: bf16[8,3]) -> f32[8] {
  %p.0 = bf16[8,3]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum = f32[8]{0:T(128)S(1)} custom-call(%p.0), custom_call_target="a(b", \
metadata={op_name="jit(f)/a/sum" stack_frame_id=1}, backend_config={"calls":"{%no}"}
}

ENTRY %main.3 (x.1: bf16[8,3], /*index=1*/y.1: s32[]) -> f32[8] {
  %x.1 = bf16[8,3]{1,0:T(8,128)(2,1)} parameter(0)
  %y.1 = s32[]{:T(128)S(6)} parameter(1)
  %start = ((bf16[8,3]{1,0}), f32[8]{0:S(1)}, u32[]{:S(2)}) async-start(%x.1), \
calls=%fused
  ROOT %done = f32[8]{0} fusion(%x.1, /*index=1*/%y.1), kind=kLoop, calls=%fused
}
"""


def test_a_module_has_its_computations_and_instructions():
    module = Module.parse(TEXT)
    assert list(module.computations) == ["fused", "main.3"]
    assert module.entry.root.operands == ("x.1", "y.1")
    assert module.entry.root.called("calls") == ("fused",)
    call = module.computations["fused"].root
    assert (call.opcode, call.op_name) == ("custom-call", "jit(f)/a/sum")
    assert call.text("custom_call_target") == "a(b"
    (x,) = module.entry.operands(module.entry.instructions["start"])
    assert x.array.dims == (8, 3)


def test_operands_may_be_printed_with_their_shapes_and_without_percent_signs():
    line = "ROOT %done = f32[8]{0} fusion(%x.1, /*index=1*/%y.1)"
    shapes = "ROOT done = f32[8]{0} fusion(bf16[8,3]{1,0:T(8,128)(2,1)} x.1, s32[] y.1)"
    assert line in TEXT
    module = Module.parse(TEXT.replace(line, shapes))
    assert module.entry.root.operands == ("x.1", "y.1")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("bf16[8,3]{1,0}", 48),
        ("bf16[8,3]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),  # padded to the tile
        ("bf16[8,3]{0,1:T(8,128)(2,1)}", 8 * 128 * 2),  # 3 to 8, 8 to 128
        ("f32[2,4,5]{2,0,1:T(4,128)}", 4 * 4 * 128 * 4),
        ("pred[3]{0}", 3),
        ("s4[3]{0:T(128)E(4)}", 64),
        ("f8e4m3fn[3]", 3),
        ("f32[]", 4),
        ("token[]", 0),
        ("(f32[2]{0}, (s8[3]{0}, u32[]{:S(2)}))", 8 + 3 + 4),
    ],
)
def test_bytes_of_shapes(text, size_bytes):
    entry = f"ENTRY %e () -> {text} {{\n  ROOT %a = {text} parameter(0)\n}}\n"
    root = Module.parse(entry).entry.root
    assert sum(array.size_bytes for array in arrays(root.shape)) == size_bytes


def test_memory_spaces():
    start = Module.parse(TEXT).entry.instructions["start"]
    assert [array.space for array in arrays(start.shape)] == [0, 1, 2]


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="expected an ENTRY computation"):
        Module.parse("HloModule jit_f\n")
