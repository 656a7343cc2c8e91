"""compiled/rings.py: the loop that raced on an H200, compiled as the suite compiles, and small ttgir of every kind."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import rows
from bench.compiled import rings
from bench.compiled.cases import CompileCase, meta
from igpt.kernels.launching import launch
from tests.test_compile import child


@triton.jit
def squares_beside_product(
    x, weight, out, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SQUARES: tl.constexpr
):
    """The head as it was: the tile of x is multiplied asynchronously and, through registers, summed."""
    b_logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    for i_k in range(0, d, BLOCK_K):
        b_x = x.load([0, i_k])
        b_w = weight.load([0, i_k])
        b_logits = tl.dot(b_x, b_w.T, b_logits)
        if HAS_SQUARES:
            b_wide = b_x.to(tl.float32)
            b_squares += tl.sum(b_wide * b_wide, 1)
    tl.store(out + tl.arange(0, BLOCK_M), tl.max(b_logits, 1) + b_squares)


def run_head(has_squares: bool) -> None:
    x, w = (TensorDescriptor.from_tensor(meta(rows, 512), [rows, 64]) for rows in (128, 256))
    launch(
        squares_beside_product, (1,), x=x, weight=w, out=meta(128, dtype=torch.float32), d=512, HAS_SQUARES=has_squares,
        BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3,
    )  # fmt: skip


def cases():
    yield CompileCase("with squares", lambda: run_head(True), archs=("sm_90",))
    yield CompileCase("without", lambda: run_head(False), archs=("sm_90",))


def test_the_old_heads_loop_is_red_and_without_its_squares_green(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = child("-m", "bench.compiled", "--cases", "tests.test_rings", "--out", str(out))
    assert done.returncode == 1, done.stderr[-2000:]
    found = {r.case: r for r in rows.read(out)}
    old, new = found["with squares"], found["without"]
    assert not old.ok and old.note == "b_x: 2 places, 2 loads ahead, 1 being read: written while a product reads it"
    assert new.ok and new.rings.split("; ") == [
        f"b_{x}: 3 places, 2 loads ahead, 1 being read" for x in "xw"
    ], new.rings  # fmt: skip


def module(body: str, warps: int = 4) -> str:
    return f"""
module attributes {{"ttg.num-warps" = {warps} : i32, ttg.target = "cuda:90"}} {{
  tt.func public @kernel(%p: !tt.ptr<bf16> loc("p"(#loc)), %K: i32 loc(unknown)) attributes {{noinline = false}} {{
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %true = arith.constant true
    %cst = arith.constant dense<0.000000e+00> : tensor<64x64xf32, #mma>
    {body}
    tt.return
  }}
}}
"""


def place(name: str, ring: str, index: str) -> str:
    return f"{name} = ttg.memdesc_index {ring}[{index}] : !ttg.memdesc<4x64x64xbf16> -> !ttg.memdesc<64x64xbf16>"


def dot(a: str, b: str) -> str:
    return f"%dot = ttng.warp_group_dot {a}, {b}, %acc {{isAsync = true}} : a * b -> tensor<64x64xf32, #mma>"


def load(at: str) -> str:
    return f"""%token = ttg.async_copy_global_to_local %p, {at} mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
      %group = ttg.async_commit_group tokens %token"""


def loop(places: int, pendings: int, warps: int = 4, index: str = "%next") -> str:
    """One load ahead of a product with its left tile in a ring, whose places follow each other."""
    return module(
        f"""%ring = ttg.local_alloc : () -> !ttg.memdesc<{places}x64x64xbf16, #shared, #smem, mutable>
    %last = arith.constant {places} : i32
    {place("%first", "%ring", "%c0_i32")}
    {load("%first")}
    %out:2 = scf.for %k = %c0_i32 to %K step %c1_i32 iter_args(%acc = %cst, %i = %c0_i32) -> (tensor<f32>, i32) : i32 {{
      {place("%a", "%ring", "%i")}
      {dot("%a", "%a")}
      %done:2 = ttng.warp_group_dot_wait %dot, %a {{pendings = {pendings} : i32}} : tensor<64x64xf32, #mma>
      %more = arith.addi %i, %c1_i32 : i32
      %next = arith.remsi %more, %last : i32
      {place("%free", "%ring", index)}
      {load("%free")}
      scf.yield %done#0, %next : tensor<64x64xf32, #mma>, i32
    }}
    %end = ttng.warp_group_dot_wait %out#0 {{pendings = 0 : i32}} : tensor<64x64xf32, #mma>""",
        warps,
    )


@pytest.mark.parametrize("places, pendings, is_red", [(2, 1, False), (1, 0, False), (1, 1, True), (2, 2, True),
                                                      (3, 2, False)])  # fmt: skip
def test_a_ring_has_a_place_for_each_load_ahead_and_each_product_in_flight(places, pendings, is_red):
    (ring,), found = rings.read(loop(places, pendings))
    assert (ring.places, ring.ahead, ring.flying) == (places, 1, pendings)
    assert found == ([f"{ring}: written while a product reads it"] if is_red else [])


def test_a_place_that_no_integer_tells_is_a_finding():
    (found,) = rings.read(loop(2, 1, index="%k"))[1]
    assert "can't be followed" in found and "a place or phase of ring" in found


BAR, BEFORE, AFTER = "bar.sync \t0;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"


@pytest.mark.parametrize("body, words", [
    (f"{BEFORE} {AFTER} {BAR} cp.async.cg.shared.global cp.async.commit_group;", None),
    (f"{BEFORE} {AFTER} cp.async.cg.shared.global cp.async.commit_group; {BAR}", "without a barrier of the block"),
    (f"{BAR} {BEFORE} {BAR} {AFTER} cp.async.cg.shared.global cp.async.commit_group;", "without a barrier of the"),
    (f"{BEFORE} {BEFORE} {AFTER} {BAR} cp.async.cg.shared.global cp.async.commit_group;", "no loop of the PTX"),
])  # fmt: skip
def test_a_wait_of_one_of_two_warpgroups_needs_a_barrier_before_the_place_is_filled(body, words):
    ptx = f"$L__BB0_1:\n{body}\n@%p1 bra \t$L__BB0_1;\nwgmma.wait_group.sync.aligned 0;\n{BAR}\nst.shared.b32"
    found = rings.read(loop(2, 1, warps=8), ptx)[1]
    assert any(words in line for line in found) if words else found == []
    assert rings.read(loop(2, 1), ptx)[1] == []  # 4 warps are one warpgroup
    if not words:
        (line,) = rings.read(loop(2, 1, warps=8), ptx.replace(f"0;\n{BAR}", "0;"))[1]
        assert "after a wait for products" in line


TAKEN = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1}}, [%r2];\n{}\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"
LEFT = "cp.async.bulk.wait_group.read 0;\n{}\nstmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {{%r1}};"
GIVEN = "st.shared.b32 [%r2], %r1;\n{}\ncp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd1, {{%r3}}], [%r2]"
FENCE, OF_WARPS, OF_LANES = "fence.proxy.async.shared::cta;", "bar.sync 2, 128;", "bar.warp.sync -1;"


@pytest.mark.parametrize("ptx, between, words", [
    (TAKEN, OF_WARPS, None),
    (TAKEN, OF_LANES, "a place is released without a barrier"),
    (LEFT, "barrier.sync 2, 128;", None),
    (LEFT, FENCE, "a place that a bulk store read is written without a barrier"),
    (GIVEN, f"{FENCE} {OF_WARPS}", None),
    (GIVEN, OF_WARPS, "without a fence and a barrier"),
    (GIVEN, FENCE, "without a fence and a barrier"),
    (GIVEN, f"{OF_WARPS} {FENCE}", "without a fence and a barrier"),
])  # fmt: skip
def test_what_one_thread_hands_over_the_others_have_done_with(ptx, between, words):
    found = rings.read(loop(2, 1), ptx.format(between))[1]
    assert any(words in line for line in found) if words else found == []


def partitions(release: str, count: int = 2, rounds: int = 9) -> str:
    """Two consumers and a producer around a ring of 2 places."""
    types = "!ttg.memdesc<2x64x64xbf16>, !ttg.memdesc<2x1xi64>, !ttg.memdesc<2x1xi64>, i32"
    bar = "!ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>"
    mark = "%mark = ttg.memdesc_index %{}[%i] : " + bar
    step = """%one = arith.constant 1 : i32
      %two = arith.constant 2 : i32
      %zero = arith.constant 0 : i32
      scf.for %k = %zero to %n step %one : i32 {
        %i = arith.remsi %k, %two : i32
        %round = arith.divsi %k, %two : i32
        %parity = arith.remsi %round, %two : i32
        """
    consumer = f"""{step}%full_i = ttg.memdesc_index %full[%i] : {bar}
        ttng.wait_barrier %full_i, %parity, %true : !ttg.memdesc<1xi64>
        {place("%a", "%ring", "%i")}
        {mark.format("empty")}
        {dot("%a", "%a")}
        {release}
      }}
      ttg.warp_return"""
    inits = "\n    ".join(
        f"%{name}_{i} = ttg.memdesc_index %{name}[%c{i}_i32] : {bar}\n    ttng.init_barrier %{name}_{i}, {n} : bar"
        for name, n in (("full", 1), ("empty", count)) for i in (0, 1)
    )  # fmt: skip
    arguments = (
        "%ring: !ttg.memdesc<2x64x64xbf16>, %full: !ttg.memdesc<2x1xi64>, %empty: !ttg.memdesc<2x1xi64>, %n: i32"
    )
    return module(f"""%ring = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %full = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %empty = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %n = arith.constant {rounds} : i32
    {inits}
    ttg.warp_specialize(%ring, %full, %empty, %n) attributes {{requestedRegisters = array<i32: 240, 24>}}
    default {{
      {consumer.replace("warp_return", "warp_yield")}
    }}
    partition0({arguments}) num_warps(4) {{
      {consumer}
    }}
    partition1({arguments}) num_warps(1) {{
      {step}{mark.format("empty")}
        %other = arith.xori %parity, %one : i32
        ttng.wait_barrier %mark, %other, %true : !ttg.memdesc<1xi64>
        %full_i = ttg.memdesc_index %full[%i] : {bar}
        ttng.barrier_expect %full_i, 8192, %true : !ttg.memdesc<1xi64>
        {place("%a", "%ring", "%i")}
        ttng.async_tma_copy_global_to_local %p[%k] %a, %full_i, %true : bar -> !ttg.memdesc<64x64xbf16, #smem>
      }}
      ttg.warp_return
    }} : ({types}) -> ()""")


WAIT = "%w = ttng.warp_group_dot_wait %dot {{pendings = {} : i32}} : tensor<64x64xf32, #mma>"
ARRIVE = "ttng.arrive_barrier %mark, 1, %true : !ttg.memdesc<1xi64>"


@pytest.mark.parametrize("release, count, words", [
    (f"{WAIT.format(0)}\n        {ARRIVE}", 2, None),
    (f"{WAIT.format(1)}\n        {ARRIVE}", 2, "ring: 2 places, 2 loads ahead, 2 being read: written while a product"),
    (f"{ARRIVE}\n        {WAIT.format(0)}", 2, "written while a product reads it"),
    (f"{WAIT.format(0)}\n        {ARRIVE}", 1, "partitions that wait for each other"),
])  # fmt: skip
def test_a_partition_releases_a_place_after_the_wait_for_its_product(release, count, words):
    (ring,), found = rings.read(partitions(release, count))
    assert found == [] if words is None else any(words in line for line in found), found
    assert ring.places == 2


def test_a_launch_that_never_fills_a_place_twice_shows_nothing():
    (found,) = rings.read(partitions(f"{WAIT.format(0)}\n        {ARRIVE}", rounds=2))[1]
    assert found == "ring: the launch is too small to fill a place twice"


def blackwell(has_wait: bool) -> str:
    """A product announces its end to an mbarrier that the next round waits for."""
    wait = "ttng.wait_barrier %old, %phase deps %a : !ttg.memdesc<1xi64>" if has_wait else ""
    return module(f"""%ring = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %old = ttg.local_alloc : () -> !ttg.memdesc<1xi64, #shared, #smem, mutable>
    %acc = ttng.tmem_alloc : () -> !ttg.memdesc<64x64xf32, #tmem, #ttng.tensor_memory, mutable>
    ttng.init_barrier %old, 1 : !ttg.memdesc<1xi64>
    %out:2 = scf.for %k = %c0_i32 to %K step %c1_i32 iter_args(%i = %c0_i32, %phase = %c0_i32) -> (i32, i32) : i32 {{
      {place("%a", "%ring", "%i")}
      {load("%a")}
      ttng.tc_gen5_mma %a, %a, %acc, %true, %true, %old[%true] {{is_async}} : a, b, c, !ttg.memdesc<1xi64>
      {wait}
      %other = arith.xori %phase, %c1_i32 : i32
      %next = arith.xori %i, %c1_i32 : i32
      scf.yield %next, %other : i32, i32
    }}""")


def test_blackwells_products_are_waited_for_by_mbarriers():
    assert rings.read(blackwell(True))[1] == []
    (found,) = rings.read(blackwell(False))[1]
    assert "written while a product reads it" in found
