"""The MLP's wide products with quick-gelu made in their epilogue, on sm_90, warp-specialised, in Gluon.

    forward     u = x @ w_fc^T + b_fc,  h = quick_gelu(u)                x (M, K), w_fc (N, K), u and h (M, N)
    backward    du = (dz @ w_proj) * quick_gelu'(u),  h again            dz (M, K), w_proj (K, N), u, du and h (M, N)

One persistent program a multiprocessor: a producer, one warp, and two consumers, warpgroups with a tile of 64 x 256
each, 128 accumulators a thread, which they finish in registers: what passes through shared memory has 16 bits and is on
its way in or out by TMA. They play ping-pong on one ring: theirs are the halves of a band of 128 rows, and both read
each block of the weights, the second at least LEAD steps behind the first. So the first finishes its tile under the
last LEAD steps of the second, and the second its own under the first LEAD of the first's next:

    first     | products .................... | epilogue | products ....
    second       epilogue | products .................... | epilogue | ...
                     LEAD                           LEAD

`order` holds the second back at the beginning of a tile; the ring holds the first back, its places ahead at most.

    s = sigmoid(1.702 u) = 0.5 + 0.5 tanh(0.851 u)        quick_gelu = u s        quick_gelu' = s + 1.702 u (s - s^2)

by one tanh.approx.f32, whose relative error PTX bounds by 2^-11. Where s is nearly 0 or 1 that error would count as
often as u is large, so the tanh is stretched by as much and s saturated to [0, 1], in the instruction that makes it of
the tanh. s is off by at most 4.9e-4, an eighth of bf16's step below 1 and one of fp16's, and by 1e-6 in the tails. u is
rounded before h is made of it, as it is on its way through memory: h has the same bits forward and backward.

Cost: 2 M N K FLOPs, M N tanh, one launch; M K + N K elements and 2 M N more forward, 3 M N backward with h. iGPT-S, M,
L at 32,768 tokens: 70 / 278 / 626 us of products at 989 TFLOP/s; of bytes, at 4.3 TB/s, 71 / 142 / 215 us forward and
102 / 205 / 309 backward.

Why not a ring for each, with tiles of 128 x 128 or 64 x 256: they would copy 32 or 40 KB for 512 cycles of products,
where this copies 48 KB for 1024. The kernel that stood here before (218 / 566 / 1076 us on an H200; accumulators
through shared memory) had the same blocks, and each 64 of K more, from M to L, cost it 0.65 us: 43 bytes a cycle. At
that rate this ring takes 1143 cycles, theirs 1523 or 1905 for as much. And wgmma reads 80 of shared memory's 128 bytes
a cycle with 256 columns, 96 with 128.

A prediction, not a measurement. An epilogue is 1024 cycles of the special function unit under 1020 instructions, 1536
backward: about 1500 cycles, and 2000. Stepped through in time with 43 bytes a cycle, 1000 cycles of latency and LEAD 2,
the tensor cores work 85 / 87 / 88% of it forward, 70 / 79 / 82% backward, where u comes the same way: 91 / 354 / 773
and 110 / 392 / 829 us a call, at 1.7 GHz if the power allows. To beat, as measured there: cuBLAS and the elementwise
pass, about 180 / 560 / 1120.

A candidate: only tests call it, and `make gpu`, which times it against those. Deterministic.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import checks, tiles
from .attention_hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    allocate_ring,
    claim,
    copy,
    layout_of,
    product_layout,
    release,
    store_through,
    tile_of,
    view,
    wait_filled,
)
from .device import arch, multiprocessors
from .launching import launch
from .primitives import QUICK_GELU

BANDS = 16  # of rows in a group: what all programs read at a time is then about as much of x as of the weights
# Columns, steps of a tile, all tiles, tiles of a band, bands, bands a group: to tile_of a band is a head.
SIZES = ["N", "STEPS", "WORK", "TILES", "HEADS", "GROUP"]


@gluon.jit
def producer(a_desc, b_desc, u_desc, ring, own, sizes, IS_GRAD: gl.constexpr):
    _, STEPS, WORK = sizes[:3]
    ROWS: gl.constexpr = a_desc.block_shape[1]
    STEP: gl.constexpr = a_desc.block_shape[2]
    COLUMNS: gl.constexpr = b_desc.block_shape[2 if IS_GRAD else 1]
    WIDTH: gl.constexpr = u_desc.block_shape[2]
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i_n, band = tile_of(t, sizes, False)
        row, column = band * 2 * ROWS, i_n * COLUMNS
        for k in range(STEPS):
            claim(ring, step, (2 * ROWS + COLUMNS) * STEP * 2)
            for c in gl.static_range(2):
                copy([a_desc], [0, row + c * ROWS, k * STEP], ring, step, c)
            copy([b_desc], [0, k * STEP, column] if IS_GRAD else [0, column, k * STEP], ring, step, 2)
            step += 1
        if IS_GRAD:
            # Last, when both consumers have long been past the tile before, whose gradients left from here.
            for c in gl.static_range(2):
                claim(own[c], tile, ROWS * COLUMNS * 2)
                for j in gl.static_range(COLUMNS // WIDTH):
                    copy([u_desc], [0, row + c * ROWS, column + j * WIDTH], own[c], tile, j)
        tile += 1


@gluon.jit
def issue_product(c: gl.constexpr, acc, ring, step, use_acc, IS_GRAD: gl.constexpr):
    """acc with a step's product of a consumer, in flight."""
    wait_filled(ring, step)
    tile = view(ring, step)
    if IS_GRAD:
        b = tile[2]
    else:
        b = tile[2].permute((1, 0))
    return warpgroup_mma(tile[c], b, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def add_steps(c: gl.constexpr, acc, ring, first, last, IS_GRAD: gl.constexpr):
    """acc with the products of steps first to last - 1, of which the last one is in flight; one before them was."""
    for step in range(first, last):
        acc = issue_product(c, acc, ring, step, True, IS_GRAD)
        acc = warpgroup_mma_wait(1, deps=[acc])
        release(ring, step - 1)
    return acc


@gluon.jit
def halves(x):
    """Its columns, left and right: nothing moves between registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(x.reshape([M, 2, N]).permute((0, 2, 1)))
    return [gl.convert_layout(half, product_layout(N), assert_trivial=True) for half in (left, right)]


@gluon.jit
def sigmoid(x):
    """sigmoid(2 x), in [0, 1], from one tanh: 0.5 + 0.5 (1 + 2^-11) tanh(x), saturated. NaN gives 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; tanh.approx.f32 t, $1; fma.rn.sat.f32 $0, t, 0f3F001000, 0f3F000000; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def finish(
    acc, p_bias, own, first_desc, h_desc, tile, row, column, N, SLOPE: gl.constexpr, IS_GRAD: gl.constexpr
):  # fmt: skip
    """Make of accumulators what is asked for, a chunk of columns at a time: u or du, and h, or h alone."""
    WIDTH: gl.constexpr = h_desc.block_shape[2] if first_desc is None else first_desc.block_shape[2]
    CHUNKS: gl.constexpr = acc.shape[1] // WIDTH
    LAYOUT: gl.constexpr = product_layout(WIDTH)
    dtype: gl.constexpr = own[0][0].dtype
    left, right = halves(acc)
    chunks = halves(left) + halves(right)
    if IS_GRAD:
        wait_filled(own, tile)
    for j in gl.static_range(CHUNKS):
        at = [0, row, column + j * WIDTH]
        place = view(own, 0)[j]
        x = chunks[j]
        if not IS_GRAD:
            if p_bias is not None:
                o_n = column + j * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
                x += gl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)[None, :]
            if first_desc is None:
                place.store(x.to(dtype))
            else:
                put(own, j, x, first_desc, at)
        # Forward, u is rounded by the way: by itself that is a conversion as slow as the tanh.
        u = place.load(LAYOUT).to(gl.float32)
        s = sigmoid(u * (0.5 * SLOPE))
        if IS_GRAD:
            x *= s + u * SLOPE * (s - s * s)
            put(own, j, x, first_desc, at)
        if first_desc is None:
            put(own, j, u * s, h_desc, at)
        elif h_desc is not None:
            tma.store_wait(1)  # the chunk of h before this one has left, u or du of this one may be leaving
            put(own, CHUNKS, u * s, h_desc, at)


@gluon.jit
def put(own, j: gl.constexpr, chunk, desc, at):
    """Write a chunk to memory, rounded, through place j, which is busy until tma.store_wait."""
    store_through((own[0][j : j + 1], own[1], own[2]), 0, [chunk], [desc], at)


@gluon.jit
def consumer(
    c: gl.constexpr, p_bias, ring, own, order, first_desc, h_desc, sizes,
    LEAD: gl.constexpr, SLOPE: gl.constexpr, IS_GRAD: gl.constexpr,
):  # fmt: skip
    N, STEPS, WORK = sizes[:3]
    ROWS: gl.constexpr = ring[0][0].shape[2]
    COLUMNS: gl.constexpr = ring[0][2].shape[3 if IS_GRAD else 2]
    zero = gl.full([ROWS, COLUMNS], 0.0, gl.float32, product_layout(COLUMNS))
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i_n, band = tile_of(t, sizes, False)
        if c == 1:
            mbarrier.wait(order, tile & 1)
        acc = issue_product(c, zero, ring, step, False, IS_GRAD)
        acc = warpgroup_mma_wait(1, deps=[acc])
        acc = add_steps(c, acc, ring, step + 1, step + 1 + LEAD, IS_GRAD)
        if c == 0:
            mbarrier.arrive(order, count=1)
        # The last tile's output has left its place by now, which the next tile's may take.
        tma.store_wait(0)
        if IS_GRAD:
            release(own, tile - 1, tile > 0)
        acc = add_steps(c, acc, ring, step + 1 + LEAD, step + STEPS, IS_GRAD)
        acc = warpgroup_mma_wait(0, deps=[acc])
        step += STEPS
        release(ring, step - 1)
        row = (2 * band + c) * ROWS
        finish(acc, p_bias, own, first_desc, h_desc, tile, row, i_n * COLUMNS, N, SLOPE, IS_GRAD)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def gelu_hopper_kernel(
    a_desc, b_desc, u_desc, first_desc, h_desc, p_bias, N, STEPS, WORK, TILES, HEADS, GROUP,
    STAGES: gl.constexpr, LEAD: gl.constexpr, SLOPE: gl.constexpr, IS_GRAD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """first: what is written besides h, u forward and du backward."""
    ring = allocate_ring([a_desc, a_desc, b_desc], STAGES, 2)
    COLUMNS: gl.constexpr = b_desc.block_shape[2 if IS_GRAD else 1]
    # A tile of a consumer in chunks, and one more chunk for h where it is not the only thing written.
    out_desc = h_desc if first_desc is None else first_desc
    CHUNKS: gl.constexpr = COLUMNS // out_desc.block_shape[2] + (h_desc is not None and first_desc is not None)
    chunks = [out_desc]
    for _ in gl.static_range(1, CHUNKS):
        chunks = chunks + [out_desc]
    own = allocate_ring(chunks, 1, 1), allocate_ring(chunks, 1, 1)  # of either consumer
    order = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(order.index(0), count=1)
    sizes = N, STEPS, WORK, TILES, HEADS, GROUP
    gl.warp_specialize(
        [
            (consumer, (
                0, p_bias, ring, own[0], order.index(0), first_desc, h_desc, sizes, LEAD, SLOPE, IS_GRAD,
            )),
            (consumer, (
                1, p_bias, ring, own[1], order.index(0), first_desc, h_desc, sizes, LEAD, SLOPE, IS_GRAD,
            )),
            (producer, (a_desc, b_desc, out_desc if u_desc is None else u_desc, ring, own, sizes, IS_GRAD)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def fits(*tensors: torch.Tensor | None) -> bool:
    """Whether TMA and the tensor cores take these: fp16 or bf16, on sm_90, rows that start at 16 bytes."""
    return all(
        arch(t.device) == "sm_90"
        and t.dtype in (torch.float16, torch.bfloat16)
        and t.stride(-1) == 1
        and (t.dim() == 1 or (t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0))
        and t.data_ptr() % 16 == 0
        for t in tensors
        if t is not None
    )


def require(name: str, tile: tiles.Tile, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError for what does not fit, the first tensor being (M, K)."""
    given = {key: t for key, t in tensors.items() if t is not None}
    first = next(iter(given.values()))
    for key, t in given.items():
        if not fits(t) or t.dtype != first.dtype or not t.numel():
            got = f"{checks.said(t)}, strides {t.stride()}, on {arch(t.device)}"
            checks.refuse(name, key, got, "fp16 or bf16 like the others, not empty, rows at 16 bytes, on sm_90")
    # The ring keeps consumers within its places of each other: where a tile fills them, `order` is never a phase ahead.
    if first.shape[1] <= (least := (tile.num_stages - 1) * tile.BLOCK_K):
        checks.refuse(name, next(iter(given)), checks.said(first), f"more than {least} columns, to fill the ring")


def matrix(t: torch.Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    if t is None:
        return None
    strides = [t.shape[0] * t.stride(0), *t.stride()]
    return TensorDescriptor(t, [1, *t.shape], strides, [1, rows, columns], layout_of(t.dtype, rows, columns))


def run(a, b, bias, u, first, h, is_grad: bool, tile: tiles.Tile) -> None:
    (M, K), N = a.shape, b.shape[is_grad]
    written = [t for t in (first, h) if t is not None]
    held = 2 * ROWS * (tile.BLOCK_N + (ROWS if len(written) == 2 else 0))
    step = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K
    tiles.require("gelu_hopper_kernel", tile, a, step, stages=2, held=held)
    bands, columns = triton.cdiv(M, tile.BLOCK_M), triton.cdiv(N, tile.BLOCK_N)
    launch(
        gelu_hopper_kernel, (min(multiprocessors(a.device), bands * columns),),
        a_desc=matrix(a, ROWS, tile.BLOCK_K),
        b_desc=matrix(b, *((tile.BLOCK_K, tile.BLOCK_N) if is_grad else (tile.BLOCK_N, tile.BLOCK_K))),
        u_desc=matrix(u, ROWS, ROWS), first_desc=matrix(first, ROWS, ROWS), h_desc=matrix(h, ROWS, ROWS), p_bias=bias,
        N=N, STEPS=triton.cdiv(K, tile.BLOCK_K), WORK=bands * columns, TILES=columns, HEADS=bands, GROUP=BANDS,
        STAGES=tile.num_stages, LEAD=tile.num_stages // 3, SLOPE=QUICK_GELU.value, IS_GRAD=is_grad,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
    )  # fmt: skip


def gelu_forward_hopper(x, w_fc, b_fc, u, h, tile: tiles.Tile = tiles.GELU_HOPPER[0]) -> None:
    """Fill u = x w_fc^T + b_fc and h = quick_gelu(u), (M, N), from x (M, K), w_fc (N, K) and b_fc (N,) or None; h
    alone where u is None.

    Raises ValueError if shapes differ, tensors are not fp16 or bf16 with rows at 16 bytes, x has fewer columns than the
    ring holds, the machine is not sm_90, or the tile does not fit it."""
    (M, K), N = x.shape, w_fc.shape[0]
    name = "gelu_forward_hopper"
    checks.operand(name, "w_fc", w_fc, (N, K))
    checks.operand(name, "b_fc", b_fc, (N,))
    checks.operand(name, "u", u, (M, N))
    checks.operand(name, "h", h, (M, N))
    require(name, tile, x=x, w_fc=w_fc, b_fc=b_fc, u=u, h=h)
    run(x, w_fc, b_fc, None, u, h, False, tile)


def gelu_backward_hopper(dz, w_proj, u, du, h, tile: tiles.Tile = tiles.GELU_HOPPER[0]) -> None:
    """Fill du = (dz w_proj) quick_gelu'(u) and, unless it is None, h = quick_gelu(u), (M, N) like u, from dz (M, K) and
    w_proj (K, N).

    Raises ValueError as gelu_forward_hopper does."""
    (M, K), N = dz.shape, w_proj.shape[1]
    name = "gelu_backward_hopper"
    checks.operand(name, "w_proj", w_proj, (K, N))
    checks.operand(name, "u", u, (M, N))
    checks.operand(name, "du", du, (M, N))
    checks.operand(name, "h", h, (M, N))
    require(name, tile, dz=dz, w_proj=w_proj, u=u, du=du, h=h)
    run(dz, w_proj, None, u, du, h, True, tile)
