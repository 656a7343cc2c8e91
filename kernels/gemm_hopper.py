"""The products of gemm.py whose epilogues take long, warp-specialised for Hopper, in Gluon: quick-gelu and its
derivative, whose two operations of the special function unit an element would else run with no product in flight.

    "gelu"      : z = row * (a @ b^T),  y = quick_gelu(z)
    "gelu_grad" : du = (a @ b) * quick_gelu'(u),  y = row * du,  partials = sum(du * u)

One persistent program a multiprocessor. A producer, one warp, copies blocks of a and b into a ring by TMA. Two
consumers own 64 rows each of a tile of 128 x 256, and at its end leave it in shared memory, rounded to the operands'
dtype, in pieces of 64 x 128. A fourth partition does the rest with a piece while they go on with the next tile:

    z goes out from the piece    y is made in registers    y takes the piece's place and goes out

z is rounded before y is made of it, as eager PyTorch does; gemm.py rounds only what it writes.

A tile's products take 16 K cycles, its 65536 operations of the special function unit 4096: half of the products' at
K = 512, the smallest preset's. Cost, order of tiles and partial sums: as in gemm.py.
Deterministic. Needs what `fits` asks for, and no bias; gemm.py does all else.
Compiled only: no GPU has run this yet, so the rows of tiles.PRODUCT_HOPPER are off.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tiles

ROWS, PIECE, STEP = 64, 128, 64  # rows of a consumer, columns of a piece, columns of a and b in a step
TILE_M, TILE_N = 2 * ROWS, 2 * PIECE
GROUP_M = 8
CONSUMER_REGISTERS, FINISHER_REGISTERS, PRODUCER_REGISTERS = 176, 128, 24


@gluon.jit
def tile_at(t, TILES_M, TILES_N, GROUP_M: gl.constexpr):
    """(tile of rows, tile of columns): groups of GROUP_M tiles of rows, all columns of a group before the next."""
    group = t // (GROUP_M * TILES_N)
    size = gl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    r = t - group * GROUP_M * TILES_N
    return group * GROUP_M + r % size, r // size


@gluon.jit
def producer(
    a_desc, b_desc, a_ring, b_ring, bars, TILES_M, TILES_N, STEPS,
    IS_KN: gl.constexpr, ROWS: gl.constexpr, PIECE: gl.constexpr, STEP: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    full, empty, _, _ = bars
    done = 0  # steps so far
    for t in range(gl.program_id(0), TILES_M * TILES_N, gl.num_programs(0)):
        i_m, i_n = tile_at(t, TILES_M, TILES_N, GROUP_M)
        for i_k in range(STEPS):
            slot = done % STAGES
            mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * (ROWS + PIECE) * STEP * 2)
            for half in gl.static_range(2):
                o_m, o_n = (i_m * 2 + half) * ROWS, (i_n * 2 + half) * PIECE
                tma.async_copy_global_to_shared(
                    a_desc, [o_m, i_k * STEP], full.index(slot), a_ring.index(slot * 2 + half)
                )
                if IS_KN:
                    tma.async_copy_global_to_shared(
                        b_desc, [i_k * STEP, o_n], full.index(slot), b_ring.index(slot * 2 + half)
                    )
                else:
                    tma.async_copy_global_to_shared(
                        b_desc, [o_n, i_k * STEP], full.index(slot), b_ring.index(slot * 2 + half)
                    )
            done += 1


@gluon.jit
def operands(c: gl.constexpr, a_ring, b_ring, slot, IS_KN: gl.constexpr):
    """a of one consumer and the two halves of b."""
    a, b, b2 = a_ring.index(slot * 2 + c), b_ring.index(slot * 2), b_ring.index(slot * 2 + 1)
    if not IS_KN:
        b, b2 = b.permute((1, 0)), b2.permute((1, 0))
    return a, b, b2


@gluon.jit
def consumer(
    c: gl.constexpr, p_row, a_ring, b_ring, staged, bars, TILES_M, TILES_N, STEPS,
    IS_KN: gl.constexpr, SCALES: gl.constexpr, ROWS: gl.constexpr, PIECE: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    full, empty, staged_full, staged_empty = bars
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    dtype: gl.constexpr = staged.dtype
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    done = 0  # steps so far
    tile = 0
    for t in range(gl.program_id(0), TILES_M * TILES_N, gl.num_programs(0)):
        i_m, _ = tile_at(t, TILES_M, TILES_N, GROUP_M)
        if SCALES:
            scale = gl.load(p_row + (i_m * 2 + c) * ROWS + o_row)[:, None]
        left = warpgroup_mma_init(gl.zeros([ROWS, PIECE], gl.float32, LAYOUT))
        right = warpgroup_mma_init(gl.zeros([ROWS, PIECE], gl.float32, LAYOUT))
        for i_k in range(STEPS):
            slot = done % STAGES
            mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            a, b, b2 = operands(c, a_ring, b_ring, slot, IS_KN)
            left = warpgroup_mma(a, b, left, is_async=True)
            right = warpgroup_mma(a, b2, right, is_async=True)
            left, right = warpgroup_mma_wait(2, deps=[left, right])  # this step stays in flight, the last is over
            left, right = warpgroup_mma_init(left), warpgroup_mma_init(right)
            mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=i_k > 0)
            done += 1
        left, right = warpgroup_mma_wait(0, deps=[left, right])
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1)
        if SCALES:
            left, right = left * scale, right * scale
        mbarrier.wait(staged_empty.index(c * 2), (tile & 1) ^ 1)
        staged.index(c * 2).store(left.to(dtype))
        fence_async_shared()
        mbarrier.arrive(staged_full.index(c * 2), count=1)
        mbarrier.wait(staged_empty.index(c * 2 + 1), (tile & 1) ^ 1)
        staged.index(c * 2 + 1).store(right.to(dtype))
        fence_async_shared()
        mbarrier.arrive(staged_full.index(c * 2 + 1), count=1)
        tile += 1


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp2(-1.4426950408889634 * x))


@gluon.jit
def finisher(
    y_desc, z_desc, p_row, p_u, p_partials, staged, bars, M, N, TILES_M, TILES_N,
    IS_GRAD: gl.constexpr, HAS_Z: gl.constexpr, HAS_ROW: gl.constexpr, ROWS: gl.constexpr, PIECE: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    _, _, staged_full, staged_empty = bars
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = staged.dtype
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o_col = gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))
    tile = 0
    for t in range(gl.program_id(0), TILES_M * TILES_N, gl.num_programs(0)):
        i_m, i_n = tile_at(t, TILES_M, TILES_N, GROUP_M)
        for place in gl.static_range(4):
            o_m, o_n = (i_m * 2 + place // 2) * ROWS, (i_n * 2 + place % 2) * PIECE
            piece = staged.index(place)
            if IS_GRAD:
                u = gl.load(p_u + (o_m + o_row)[:, None].to(gl.int64) * N + (o_n + o_col)[None, :]).to(gl.float32)
            mbarrier.wait(staged_full.index(place), tile & 1)
            if HAS_Z:
                tma.async_copy_shared_to_global(z_desc, [o_m, o_n], piece)
                # Passed already: its loop keeps the store above the arithmetic that it is to run under.
                mbarrier.wait(staged_full.index(place), tile & 1)
            y = piece.load(LAYOUT).to(gl.float32)
            if IS_GRAD:
                s = sigmoid(1.702 * u)
                y = y * (s * (1.0 + 1.702 * u * (1.0 - s)))
                gl.store(p_partials + (i_n * 2 + place % 2).to(gl.int64) * M + o_m + o_row, gl.sum(y * u, 1))
                if HAS_ROW:
                    y = y * gl.load(p_row + o_m + o_row)[:, None]
            else:
                y = y * sigmoid(1.702 * y)
            tma.store_wait(0)  # for z, and for the y of the piece before, which is free now
            mbarrier.arrive(staged_empty.index((place + 3) % 4), count=1, pred=tile * 4 + place > 0)
            piece.store(y.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [o_m, o_n], piece)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["TILES_M", "TILES_N", "STEPS"])
def product_hopper_kernel(
    a_desc, b_desc, y_desc, z_desc, row, u, partials, M, N, TILES_M, TILES_N, STEPS,
    IS_KN: gl.constexpr, IS_GRAD: gl.constexpr, HAS_Z: gl.constexpr, HAS_ROW: gl.constexpr,
    ROWS: gl.constexpr, PIECE: gl.constexpr, STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, FINISHER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = a_desc.dtype
    B_ROWS: gl.constexpr = STEP if IS_KN else PIECE
    B_COLS: gl.constexpr = PIECE if IS_KN else STEP
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, STEP], a_desc.layout)
    b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, B_ROWS, B_COLS], b_desc.layout)
    staged = gl.allocate_shared_memory(dtype, [4, ROWS, PIECE], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    staged_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    staged_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both consumers release a step
    for place in gl.static_range(4):
        mbarrier.init(staged_full.index(place), count=1)
        mbarrier.init(staged_empty.index(place), count=1)

    bars = (full, empty, staged_full, staged_empty)
    SCALES: gl.constexpr = HAS_ROW and not IS_GRAD
    gl.warp_specialize(
        [
            (consumer, (
                0, row, a_ring, b_ring, staged, bars, TILES_M, TILES_N, STEPS,
                IS_KN, SCALES, ROWS, PIECE, GROUP_M, STAGES,
            )),
            (consumer, (
                1, row, a_ring, b_ring, staged, bars, TILES_M, TILES_N, STEPS,
                IS_KN, SCALES, ROWS, PIECE, GROUP_M, STAGES,
            )),
            (finisher, (
                y_desc, z_desc, row, u, partials, staged, bars, M, N, TILES_M, TILES_N,
                IS_GRAD, HAS_Z, HAS_ROW, ROWS, PIECE, GROUP_M,
            )),
            (producer, (
                a_desc, b_desc, a_ring, b_ring, bars, TILES_M, TILES_N, STEPS,
                IS_KN, ROWS, PIECE, STEP, GROUP_M, STAGES,
            )),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, FINISHER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def fits(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and M % TILE_M == N % TILE_N == K % STEP == 0 < M


def product(a, b, is_kn: bool, epilogue: str, row, u, z, partials, tile: tiles.Tile):
    """As gemm.product, of contiguous matrices that fit; epilogue "gelu" or "gelu_grad". Raises ValueError if not."""
    (M, K), N = a.shape, b.shape[is_kn]
    if not fits(M, N, K, a.dtype):
        raise ValueError(
            f"product_hopper: got {a.dtype} M {M}, N {N}, K {K}, expected fp16 or bf16 and multiples of {TILE_M}, "
            f"{TILE_N} and {STEP}"
        )
    tiles.require("product_hopper_kernel", tile, a, (TILE_M + TILE_N) * STEP, stages=2)  # one is in flight
    y = torch.empty((M, N), dtype=a.dtype, device=a.device)

    def matrix(t, *block):
        dtype = gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
        return TensorDescriptor.from_tensor(t, list(block), gl.NVMMASharedLayout.get_default_for(list(block), dtype))

    y_desc = matrix(y, ROWS, PIECE)
    TILES = M // TILE_M, N // TILE_N
    product_hopper_kernel[(min(TILES[0] * TILES[1], tiles.multiprocessors(a.device)),)](
        matrix(a, ROWS, STEP), matrix(b, *((STEP, PIECE) if is_kn else (PIECE, STEP))), y_desc,
        y_desc if z is None else matrix(z, ROWS, PIECE), row, u, partials, M, N, *TILES, K // STEP,
        IS_KN=is_kn, IS_GRAD=epilogue == "gelu_grad", HAS_Z=z is not None, HAS_ROW=row is not None,
        ROWS=ROWS, PIECE=PIECE, STEP=STEP, GROUP_M=GROUP_M, STAGES=tile.num_stages,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, FINISHER_REGISTERS=FINISHER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
    )  # fmt: skip
    return y
