"""Attention backward on Hopper, warp-specialised, in Gluon: dq, dk, dv as in attention_backward.py.

One kernel, launched twice. A program owns 128 rows, of queries (for dq) or of keys (for dk and dv), and streams blocks
of the other side past them. With a, b the owned tiles and x, y the streamed ones, a step is, for both,

    S = a x^T      dP = b y^T      p = 2^(S - lse)      ds = p (dP - delta)      acc_x += ds x      acc_y += p y

    owns queries: a, b = q, dout    x, y = k, v       acc_x = dq
    owns keys:    a, b = k, v       x, y = q, dout    acc_x = dk, acc_y = dv

p and ds are made with the owned rows first, which is how the tensor cores want their left operand: neither passes
through shared memory. A producer copies by TMA into a ring of pairs (x, y); two consumers own 64 rows each, and in

    issue S    issue dP    wait for S    p, under dP    issue p y    wait for dP    ds, under p y    issue ds x    wait

each has a product in flight under its exponentials, and its other gaps under the products of its neighbour. Owned rows
have two places where registers allow it: gradients leave by one while the next tile has begun in the other. Blocks run
from the diagonal on: the first is wholly masked for one of the consumers, which skips it; then each has one to mask.

Cost for B H heads, causal: 7 B H N^2 D FLOPs, two of the seven products made twice against the one-pass form; nothing
is summed in memory, so it is deterministic. At D = 64 a 64 x 64 step for dk and dv asks 512 cycles of products and 256
of exp2. lse and delta of streamed queries come through the ring too: read from shared memory where they are used, they
hold no registers, of which the accumulators at D = 128 leave none.

Needs what `hopper.fits` asks for; attention_backward.py does all else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import tiles
from .device import multiprocessors
from .heads import HEAD_COUNTS, heads_in_group
from .hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    TILE,
    chunks,
    describe,
    describe_flat,
    issue_dots,
    require,
    tile_of,
)
from .launching import launch
from .primitives import LOG2E


@gluon.jit
def blocks_of(i, N, BLOCK: gl.constexpr, TILE: gl.constexpr, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr):
    """(first, stride, count): tile i's streamed blocks are first, first + stride, ..., the diagonal's first."""
    if not IS_CAUSAL:
        first, stride, count = 0, 1, N // BLOCK
    elif OWNS_KEYS:
        first, stride, count = i * (TILE // BLOCK), 1, N // BLOCK - i * (TILE // BLOCK)
    else:
        first, stride, count = (i + 1) * (TILE // BLOCK) - 1, -1, (i + 1) * (TILE // BLOCK)
    return first, stride, count


@gluon.jit
def producer(
    descs, tails, rings, tail_rings, bars, N, H, TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    PLACES: gl.constexpr, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    a_desc, b_desc, x_desc, y_desc, lse_desc, delta_desc = descs
    a_tail, b_tail, x_tail, y_tail = tails
    a_own, b_own, x_ring, y_ring, lse_ring, delta_ring = rings
    a_own2, b_own2, x_ring2, y_ring2 = tail_rings
    own_full, own_empty, full, empty = bars
    ROWS: gl.constexpr = TILE // 2
    done = 0  # pairs of earlier tiles
    tile = 0
    for t in range(gl.program_id(0), TILES * HEADS, gl.num_programs(0)):
        i, i_b, i_h = tile_of(t, TILES, HEADS, GROUP, H)
        if OWNS_KEYS:
            i = TILES - 1 - i  # the first keys are seen by the most queries
        column = i_h * (D1 + D2)
        for c in gl.static_range(2):
            row = i_b * N + i * TILE + c * ROWS
            place = tile % PLACES * 2 + c
            mbarrier.wait(own_empty.index(place), (((tile + PLACES - 1) // PLACES) & 1) ^ 1)
            mbarrier.expect(own_full.index(place), 2 * ROWS * (D1 + D2) * 2)
            tma.async_copy_global_to_shared(a_desc, [row, column], own_full.index(place), a_own.index(place))
            tma.async_copy_global_to_shared(b_desc, [row, column], own_full.index(place), b_own.index(place))
            if D2 > 0:
                tma.async_copy_global_to_shared(a_tail, [row, column + D1], own_full.index(place), a_own2.index(place))
                tma.async_copy_global_to_shared(b_tail, [row, column + D1], own_full.index(place), b_own2.index(place))
        first, stride, count = blocks_of(i, N, BLOCK, TILE, IS_CAUSAL, OWNS_KEYS)
        for j in range(count):
            row = i_b * N + (first + j * stride) * BLOCK
            slot = (done + j) % STAGES
            mbarrier.wait(empty.index(slot), (((done + j) // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * (D1 + D2) * 2 + (2 * BLOCK * 4 if OWNS_KEYS else 0))
            tma.async_copy_global_to_shared(x_desc, [row, column], full.index(slot), x_ring.index(slot))
            tma.async_copy_global_to_shared(y_desc, [row, column], full.index(slot), y_ring.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(x_tail, [row, column + D1], full.index(slot), x_ring2.index(slot))
                tma.async_copy_global_to_shared(y_tail, [row, column + D1], full.index(slot), y_ring2.index(slot))
            if OWNS_KEYS:
                o_lse = (i_b * H + i_h) * N + (first + j * stride) * BLOCK
                tma.async_copy_global_to_shared(lse_desc, [o_lse], full.index(slot), lse_ring.index(slot))
                tma.async_copy_global_to_shared(delta_desc, [o_lse], full.index(slot), delta_ring.index(slot))
        done += count
        tile += 1


@gluon.jit
def consumer(
    c: gl.constexpr, out_descs, out_tails, p_lse, p_delta, rings, tail_rings, bars,
    scale, scale_log2, N, H, TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    PLACES: gl.constexpr, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    a_own, b_own, x_ring, y_ring, lse_ring, delta_ring = rings
    a_own2, b_own2, x_ring2, y_ring2 = tail_rings
    own_full, own_empty, full, empty = bars
    ROWS: gl.constexpr = TILE // 2
    D2_: gl.constexpr = D2 if D2 > 0 else 16
    CHUNKS: gl.constexpr = 2 if D2 > 0 else 1
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    ACC2_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2_, 16])
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    W2_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC2_LAYOUT, 2)
    dtype: gl.constexpr = a_own.dtype
    o_row = c * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    o_col = gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT))
    zero = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    done = 0  # pairs of earlier tiles
    tile = 0
    for t in range(gl.program_id(0), TILES * HEADS, gl.num_programs(0)):
        i, i_b, i_h = tile_of(t, TILES, HEADS, GROUP, H)
        if OWNS_KEYS:
            i = TILES - 1 - i
        head = (i_b.to(gl.int64) * H + i_h) * N
        o_own = i * TILE + o_row
        acc = gl.zeros([ROWS, D1], gl.float32, ACC_LAYOUT)
        acc2 = gl.zeros([ROWS, D2_], gl.float32, ACC2_LAYOUT)
        if OWNS_KEYS:
            acc_y = gl.zeros([ROWS, D1], gl.float32, ACC_LAYOUT)
            acc_y2 = gl.zeros([ROWS, D2_], gl.float32, ACC2_LAYOUT)
        else:
            lse = gl.load(p_lse + head + o_own)[:, None]
            delta = gl.load(p_delta + head + o_own)[:, None]
        place = tile % PLACES * 2 + c
        a, a2, b, b2 = a_own.index(place), a_own2.index(place), b_own.index(place), b_own2.index(place)
        mbarrier.wait(own_full.index(place), (tile // PLACES) & 1)
        first, stride, count = blocks_of(i, N, BLOCK, TILE, IS_CAUSAL, OWNS_KEYS)
        start = 0
        stop = 0
        if IS_CAUSAL:
            if c == (1 if OWNS_KEYS else 0):
                slot = done % STAGES
                # Once it is filled, the arrival counts for this round, whatever the other consumer has yet to read.
                mbarrier.wait(full.index(slot), (done // STAGES) & 1)
                mbarrier.arrive(empty.index(slot), count=1)
                start = 1
            stop = start + 1
        for IS_WHOLE in gl.static_range(0 if IS_CAUSAL else 1, 2):
            if IS_WHOLE:
                start = stop
                stop = count
                if PLACES == 2:
                    # The last tile's gradients have left their place by now, which the next tile's rows may take.
                    tma.store_wait(0)
                    mbarrier.arrive(own_empty.index(place ^ 2), count=1)
            for j in range(start, stop):
                slot = (done + j) % STAGES
                phase = ((done + j) // STAGES) & 1
                x, x2, y, y2 = x_ring.index(slot), x_ring2.index(slot), y_ring.index(slot), y_ring2.index(slot)
                mbarrier.wait(full.index(slot), phase)
                s = issue_dots(a, a2, x, x2, zero, D2)
                dp = issue_dots(b, b2, y, y2, zero, D2)
                s = warpgroup_mma_wait(CHUNKS, deps=[s])
                if OWNS_KEYS:
                    lse = lse_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))[None, :]
                p = gl.exp2(s * scale_log2 - lse)
                if not IS_WHOLE:
                    o_streamed = (first + j * stride) * BLOCK + o_col
                    if OWNS_KEYS:
                        p = gl.where(o_own[:, None] <= o_streamed[None, :], p, 0.0)
                    else:
                        p = gl.where(o_streamed[None, :] <= o_own[:, None], p, 0.0)
                if OWNS_KEYS:
                    w = gl.convert_layout(p.to(dtype), W_LAYOUT)
                    acc_y = warpgroup_mma(w, y, acc_y, is_async=True)
                    if D2 > 0:
                        w2 = gl.convert_layout(p.to(dtype), W2_LAYOUT)
                        acc_y2 = warpgroup_mma(w2, y2, acc_y2, is_async=True)
                    dp = warpgroup_mma_wait(CHUNKS, deps=[dp])
                    delta = delta_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))[None, :]
                else:
                    # Passed long ago: its loop holds the exponentials above the wait for dP, which ptxas else puts
                    # first, and then nothing runs under that product.
                    mbarrier.wait(full.index(slot), phase)
                    dp = warpgroup_mma_wait(0, deps=[dp])
                ds = (p * (dp - delta)).to(dtype)
                v = gl.convert_layout(ds, W_LAYOUT)
                acc = warpgroup_mma(v, x, acc, is_async=True)
                if D2 > 0:
                    v2 = gl.convert_layout(ds, W2_LAYOUT)
                    acc2 = warpgroup_mma(v2, x2, acc2, is_async=True)
                    acc2, v2 = warpgroup_mma_wait(0, deps=[acc2, v2])
                if OWNS_KEYS:
                    acc, acc_y, v, w = warpgroup_mma_wait(0, deps=[acc, acc_y, v, w])
                    if D2 > 0:
                        acc_y2, w2 = warpgroup_mma_wait(0, deps=[acc_y2, w2])
                else:
                    acc, v = warpgroup_mma_wait(0, deps=[acc, v])
                mbarrier.arrive(empty.index(slot), count=1)
        done += count

        # The owned tiles have been read for the last time: their place takes the gradients on their way out.
        row = i_b * N + i * TILE + c * ROWS
        column = i_h * (D1 + D2)
        a.store((acc * scale).to(dtype))
        if D2 > 0:
            a2.store((acc2 * scale).to(dtype))
        if OWNS_KEYS:
            b.store(acc_y.to(dtype))
            if D2 > 0:
                b2.store(acc_y2.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_descs[0], [row, column], a)
        if D2 > 0:
            tma.async_copy_shared_to_global(out_tails[0], [row, column + D1], a2)
        if OWNS_KEYS:
            tma.async_copy_shared_to_global(out_descs[1], [row, column], b)
            if D2 > 0:
                tma.async_copy_shared_to_global(out_tails[1], [row, column + D1], b2)
        if PLACES == 1:
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(place), count=1)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=HEAD_COUNTS)
def attention_hopper_backward_kernel(
    a_desc, b_desc, x_desc, y_desc, da_desc, db_desc, a_tail, b_tail, x_tail, y_tail, da_tail, db_tail,
    lse_desc, delta_desc, p_lse, p_delta, scale, scale_log2, N, H, TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    PLACES: gl.constexpr, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = a_desc.dtype
    a_own = gl.allocate_shared_memory(dtype, [2 * PLACES, TILE // 2, D1], a_desc.layout)
    b_own = gl.allocate_shared_memory(dtype, [2 * PLACES, TILE // 2, D1], b_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D1], x_desc.layout)
    y_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D1], y_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], delta_desc.layout)
    rings = (a_own, b_own, x_ring, y_ring, lse_ring, delta_ring)
    if D2 > 0:
        a_own2 = gl.allocate_shared_memory(dtype, [2 * PLACES, TILE // 2, D2], a_tail.layout)
        b_own2 = gl.allocate_shared_memory(dtype, [2 * PLACES, TILE // 2, D2], b_tail.layout)
        x_ring2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D2], x_tail.layout)
        y_ring2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D2], y_tail.layout)
        tail_rings = (a_own2, b_own2, x_ring2, y_ring2)
    else:
        tail_rings = (a_own, b_own, x_ring, y_ring)
    own_full = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    own_empty = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2 * PLACES):
        mbarrier.init(own_full.index(place), count=1)
        mbarrier.init(own_empty.index(place), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both consumers release a pair

    bars = (own_full, own_empty, full, empty)
    descs, tails = (a_desc, b_desc, x_desc, y_desc, lse_desc, delta_desc), (a_tail, b_tail, x_tail, y_tail)
    out_descs, out_tails = (da_desc, db_desc), (da_tail, db_tail)
    gl.warp_specialize(
        [
            (consumer, (
                0, out_descs, out_tails, p_lse, p_delta, rings, tail_rings, bars,
                scale, scale_log2, N, H, TILES, HEADS, GROUP, D1, D2, TILE, BLOCK, STAGES, PLACES, IS_CAUSAL, OWNS_KEYS,
            )),
            (consumer, (
                1, out_descs, out_tails, p_lse, p_delta, rings, tail_rings, bars,
                scale, scale_log2, N, H, TILES, HEADS, GROUP, D1, D2, TILE, BLOCK, STAGES, PLACES, IS_CAUSAL, OWNS_KEYS,
            )),
            (producer, (
                descs, tails, rings, tail_rings, bars, N, H, TILES, HEADS, GROUP,
                D1, D2, TILE, BLOCK, STAGES, PLACES, IS_CAUSAL, OWNS_KEYS,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_backward_hopper(dout, q, k, v, lse, delta, dq, dk, dv, causal: bool, scale: float) -> None:
    """Fill dq, dk, dv, views (B, N, H, D) like the others; lse (base 2) and delta = rowsum(dout out) fp32 (B, H, N).

    Raises ValueError if the tensors do not fit."""
    require(scale, dout=dout, q=q, k=k, v=v, dq=dq, dk=dk, dv=dv)
    tile = tiles.ATTENTION_HOPPER_BACKWARD[q.shape[3]]
    tiles.require("attention_hopper_backward_kernel", tile, q, 2 * tile.BLOCK_N * q.shape[3])
    _launch(tile, False, (q, dout), (k, v), (dq, dq), lse, delta, causal, scale)
    _launch(tile, True, (k, v), (q, dout), (dk, dv), lse, delta, causal, scale)


def _launch(tile, owns_keys: bool, owned, streamed, grads, lse, delta, causal: bool, scale: float) -> None:
    B, N, H, D = owned[0].shape
    D1, D2 = chunks(D)

    def six(width):
        rows = (*owned, TILE // 2), (*streamed, tile.BLOCK_N), (*grads, TILE // 2)
        return [describe(t, height, width) for *pair, height in rows for t in pair]

    # With two places a tile's rows come while the last tile's gradients leave; two accumulators of 128 columns leave
    # no registers to tell them apart.
    places = 1 if owns_keys and D == 128 else 2
    TILES = N // TILE
    launch(
        attention_hopper_backward_kernel, (min(multiprocessors(lse.device), TILES * B * H),),
        **dict(zip(("a_desc", "b_desc", "x_desc", "y_desc", "da_desc", "db_desc"), six(D1))),
        **dict(zip(("a_tail", "b_tail", "x_tail", "y_tail", "da_tail", "db_tail"), six(D2 or D1))),
        lse_desc=describe_flat(lse, tile.BLOCK_N), delta_desc=describe_flat(delta, tile.BLOCK_N), p_lse=lse,
        p_delta=delta, scale=scale, scale_log2=scale * LOG2E.value, N=N, H=H, TILES=TILES, HEADS=B * H,
        GROUP=heads_in_group(owned[0], tile),
        D1=D1, D2=D2, TILE=TILE, BLOCK=tile.BLOCK_N, STAGES=tile.num_stages, PLACES=places,
        IS_CAUSAL=causal, OWNS_KEYS=owns_keys,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
    )  # fmt: skip
