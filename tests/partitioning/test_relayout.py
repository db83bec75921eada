"""Copies of weights and cache are found, and reading them is not taken for one."""

from pathlib import Path

from jaxserve.partitioning.cost import Where
from jaxserve.partitioning.relayout import relayouts

# One layer reads argument 0, a stack of weights, in the way that is filled in.
PROGRAM = (Path(__file__).parent / "hlo" / "stack.hlo").read_text()
SLICE = "dynamic-slice(%q, %i, %zero, %zero), dynamic_slice_sizes={1,1024,512}"
CALL = "fusion(%w, %n), kind=kLoop, calls=%turn"


def found(line: str, inside: str = "") -> list[tuple[str, int, Where]]:
    text = PROGRAM.replace("LINE", line).replace("INSIDE", inside)
    return [(one.name, one.argument, one.where) for one in relayouts(text, least_bytes=2**20 - 1)]


def test_a_copy_of_what_was_computed_does_not_count():
    assert found("%no = s32[] constant(1)") == []


def test_weights_turned_around_count_wherever_they_go():
    near = "%k = bf16[4,1024,512]{1,2,0:T(8,128)(2,1)S(1)} copy(%w)"
    assert found(near) == [("k", 0, Where.LAYER)]
    assert found(near.replace("copy", "transpose")) == [("k", 0, Where.LAYER)]


def test_bringing_weights_into_fast_memory_is_reading_them():
    assert found("%k = bf16[4,1024,512]{2,1,0:T(8,128)(2,1)S(1)} copy(%w)") == []
    assert (
        found(
            f"%k = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)S(1)}} {CALL}",
            f"ROOT %s = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)S(1)}} {SLICE}",
        )
        == []
    )


def test_a_layer_copied_out_of_the_stack_counts():
    assert found(
        f"%k = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {CALL}",
        f"ROOT %s = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {SLICE}",
    ) == [("k", 0, Where.LAYER)]


def test_a_layer_cut_out_to_be_gathered_does_not_count():
    line = f"%k = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {CALL}"
    inside = f"ROOT %s = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {SLICE}"
    gathered = (
        "%b = bf16[1024,512]{1,0:T(8,128)(2,1)} bitcast(%k)\n"
        "  %g = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%b), dimensions={0}"
    )
    assert found(f"{line}\n  {gathered}", inside) == []
    used = "%u = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} negate(%k)"
    assert found(f"{line}\n  {gathered}\n  {used}", inside) == [("k", 0, Where.LAYER)]
    # The same where the gather goes on beside other work.
    body = (
        "%p = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} parameter(0)\n"
        '  ROOT %c = u32[] custom-call(%p), custom_call_target="AsyncCollectiveStart"'
    )
    begun = "%b = u32[] fusion(%k), kind=kCustom, calls=%begin"
    text = PROGRAM.replace("LINE", f"{line}\n  {begun}").replace("INSIDE", inside)
    assert relayouts(f"%begin (p: bf16[1,1024,512]) -> u32[] {{\n  {body}\n}}\n\n{text}") == []


def test_a_turn_within_a_fusion_counts():
    assert found(
        f"%k = bf16[1,512,1024]{{2,1,0:T(8,128)(2,1)S(1)}} {CALL}",
        f"%s = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {SLICE}\n"
        "  ROOT %r = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} transpose(%s), dimensions={0,2,1}",
    ) == [("k", 0, Where.LAYER)]


def test_a_product_is_no_copy():
    assert (
        found(
            f"%k = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {CALL}",
            f"%s = bf16[1,1024,512]{{2,1,0:T(8,128)(2,1)}} {SLICE}\n"
            "  ROOT %r = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} multiply(%s, %s)",
        )
        == []
    )


def test_an_update_in_place_is_no_copy_and_a_copy_after_it_is_one():
    inside = (
        "%u = bf16[1,8,512]{2,1,0} constant({...})\n"
        "  ROOT %r = bf16[4,1024,512]{2,1,0:T(8,128)(2,1)} "
        "dynamic-update-slice(%q, %u, %i, %zero, %zero)"
    )
    call = f"%k = bf16[4,1024,512]{{2,1,0:T(8,128)(2,1)}} {CALL}"
    assert found(call, inside) == []
    after = "%l = bf16[4,1024,512]{2,0,1:T(8,128)(2,1)} copy(%k)"
    assert found(f"{call}\n  {after}", inside) == [("l", 0, Where.LAYER)]


def test_small_copies_do_not_count():
    line = "%k = bf16[4,1024,512]{1,2,0:T(8,128)(2,1)} copy(%w)"
    text = PROGRAM.replace("LINE", line).replace("INSIDE", "")
    assert len(relayouts(text, least_bytes=4 * 2**20 - 1)) == 1
    assert relayouts(text, least_bytes=4 * 2**20) == []
