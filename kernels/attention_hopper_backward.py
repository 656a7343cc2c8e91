"""Attention backward on sm_90, warp-specialised, in Gluon: dq, dk, dv as in attention_backward.py.

One kernel, launched twice. A consumer owns 64 rows, of queries (for dq) or of keys (for dk and dv), and blocks of 64
of the other side stream past. With a, b the owned tiles and x, y the streamed ones, a step is, for both,

    S = a x^T      dP = b y^T      p = 2^(S - lse)      ds = p (dP - delta)      acc_x += ds x      acc_y += p y

    owns queries: a, b = q, dout    x, y = k, v       acc_x = dq
    owns keys:    a, b = k, v       x, y = q, dout    acc_x = dk, acc_y = dv

p and ds are made with the owned rows first, which is how the tensor cores want their left operand: neither passes
through shared memory. In time:

    tensor cores    S      dP             acc_y += p y           acc_x += ds x
    a consumer             p, under dP    ds, under the above                     ... and again

and the gaps are the other consumer's. The first launch also makes delta = rowsum(dout out): its rows of out come first
through the ring, the halves of a pair for either consumer. It leaves lse and delta to the second, whose ring brings
them with the queries: read from shared memory where they are used, they hold no registers, of which the accumulators
of D = 128 leave none.

Owned rows have two places where registers allow it: gradients leave by one while the next tile has begun in the other.
Blocks that a mask cuts come first. Of the diagonal's two, one is wholly masked for one of the consumers, which skips
it, and the other one has the triangle to mask; then each has seen one more. A length that 128 does not divide costs
what the next multiple does: queries past it have an lse of infinity, p = 0, and keys past it are masked.

14 B H N^2 D FLOPs, half of it if causal. Each sum belongs to one consumer and runs in a fixed order: deterministic.
attention_hopper.fits says what it takes; attention_backward.py does the rest.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma_wait

from . import tiles
from .attention_heads import heads_in_group
from .attention_hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    SIZES,
    add_products,
    allocate_ring,
    chunks_of,
    claim,
    copy,
    describe,
    describe_flat,
    issue_dots,
    place_of,
    product_layout,
    release,
    require,
    row_dots,
    store_through,
    tile_of,
    view,
    wait_filled,
    zero_rows,
)
from .device import multiprocessors
from .launching import launch
from .primitives import LOG2E


@gluon.jit
def blocks_of(i, TILES, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr):
    """(first, stride, count): tile i's streamed blocks are first, first + stride, ..., those that a mask cuts first."""
    if not IS_CAUSAL:
        first, stride, count = 2 * TILES - 1, -1, 2 * TILES
    elif OWNS_KEYS:
        # Always that many; the maximum keeps the compiler from holding a part of the sum, 2 TILES - 2, in a register
        # from tile to tile: the gradients of D = 128 leave none.
        first, stride, count = 2 * i, 1, gl.maximum(2 * (TILES - i), 2)
    else:
        count = 2 * (i + 1)
        first, stride = count - 1, -1
    return first, stride, count


@gluon.jit
def producer(
    own_descs, descs, out, statistics_desc, own, ring, statistics_ring, sizes,
    D: gl.constexpr, IS_CAUSAL: gl.constexpr, OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    H, WORK, TILES, HEADS = sizes[1:5]
    ROWS: gl.constexpr = descs[0].block_shape[1]
    PAIR_BYTES: gl.constexpr = 2 * ROWS * D * 2
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i, i_bh = tile_of(t, sizes, not OWNS_KEYS)
        i_b, column = i_bh // H, i_bh % H * D
        for c in gl.static_range(2):
            claim(own[c], tile, PAIR_BYTES)
            copy(own_descs, [i_b, (2 * i + c) * ROWS, column], own[c], tile)
        if not OWNS_KEYS:
            claim(ring, step, PAIR_BYTES)
            for c in gl.static_range(2):
                copy(out, [i_b, (2 * i + c) * ROWS, column], ring, step, c * len(out))
            step += 1
        first, stride, count = blocks_of(i, TILES, IS_CAUSAL, OWNS_KEYS)
        for j in range(count):
            row = (first + j * stride) * ROWS
            claim(ring, step, PAIR_BYTES + (2 * ROWS * 4 if OWNS_KEYS else 0))
            copy(descs, [i_b, row, column], ring, step)
            if OWNS_KEYS:
                for k in gl.static_range(2):
                    at = [(k * HEADS + i_bh) * (2 * TILES * ROWS) + row]
                    copy([statistics_desc], at, statistics_ring, step, k)
            step += 1
        tile += 1


@gluon.jit
def own_statistics(c: gl.constexpr, dout, ring, step, p_lse, p_statistics, o_own, i_bh, sizes, IS_RAGGED: gl.constexpr):
    """lse and delta of a consumer's queries, [ROWS] each, also left for the keys' launch: infinity and 0 past N."""
    N, TILES, HEADS = sizes[0], sizes[3], sizes[4]
    CHUNKS: gl.constexpr = len(dout)
    ROWS: gl.constexpr = dout[0].shape[0]
    head = i_bh.to(gl.int64)
    if IS_RAGGED:
        lse = gl.load(p_lse + head * N + o_own, mask=o_own < N, other=float("inf"))
    else:
        lse = gl.load(p_lse + head * N + o_own)
    wait_filled(ring, step)
    delta = row_dots(dout, view(ring, step)[c * CHUNKS : (c + 1) * CHUNKS])
    release(ring, step)
    gl.store(p_statistics + head * (2 * TILES * ROWS) + o_own, lse)
    gl.store(p_statistics + (HEADS + head) * (2 * TILES * ROWS) + o_own, delta)
    return lse, delta


@gluon.jit
def add_pair(a, b, acc_x, acc_y, lse, delta, seen, ring, step, statistics_ring, scale_log2, OWNS_KEYS: gl.constexpr):
    """The accumulators after a streamed pair, of which the positions `seen` count, or all if that is None."""
    CHUNKS: gl.constexpr = len(a)
    dtype: gl.constexpr = a[0].dtype
    wait_filled(ring, step)
    pair = view(ring, step)
    x, y = pair[:CHUNKS], pair[CHUNKS:]
    s = issue_dots(a, x)
    dp = issue_dots(b, y)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    if OWNS_KEYS:
        lse = row_of(0, statistics_ring, step)
    p = gl.exp2(s * scale_log2 - lse)
    if seen is not None:
        p = gl.where(seen, p, 0.0)
    b_p = []
    if OWNS_KEYS:
        acc_y, b_p = add_products(acc_y, p.to(dtype), y)
        dp = warpgroup_mma_wait(CHUNKS, deps=[dp])
        delta = row_of(1, statistics_ring, step)
    else:
        # Passed long ago: its loop holds the exponentials above the wait for dP, which ptxas else puts first, and then
        # nothing runs under that product.
        wait_filled(ring, step)
        dp = warpgroup_mma_wait(0, deps=[dp])
    acc_x, b_ds = add_products(acc_x, (p * (dp - delta)).to(dtype), x)
    done = warpgroup_mma_wait(0, deps=acc_x + acc_y + b_ds + b_p)
    release(ring, step)
    return done[:CHUNKS], done[CHUNKS : CHUNKS + len(acc_y)]


@gluon.jit
def row_of(k: gl.constexpr, statistics_ring, step):
    """lse (0) or delta (1) of a streamed pair's queries: [1, ROWS]."""
    place, _ = place_of(statistics_ring, step)
    statistic = statistics_ring[0][k]
    return statistic.index(place).load(gl.SliceLayout(0, product_layout(statistic.shape[1])))[None, :]


@gluon.jit
def consumer(
    c: gl.constexpr, grads, p_lse, p_statistics, own, ring, statistics_ring, scale, scale_log2, sizes,
    D: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_RAGGED: gl.constexpr, OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    N, H, WORK, TILES = sizes[:4]
    ROWS: gl.constexpr = grads[0].block_shape[1]
    CHUNKS: gl.constexpr = len(ring[0]) // 2
    PLACES: gl.constexpr = own[1].shape[0]
    HAS_MASK: gl.constexpr = IS_CAUSAL or IS_RAGGED
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(ROWS)))
    o_col = gl.arange(0, ROWS, gl.SliceLayout(0, product_layout(ROWS)))
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i, i_bh = tile_of(t, sizes, not OWNS_KEYS)
        o_own = (2 * i + c) * ROWS + o_row
        owned = view(own, tile)
        a, b = owned[:CHUNKS], owned[CHUNKS:]
        wait_filled(own, tile)
        acc_x, acc_y, lse, delta = zero_rows(a), [], None, None
        if OWNS_KEYS:
            acc_y = zero_rows(b)
        else:
            lse, delta = own_statistics(c, b, ring, step, p_lse, p_statistics, o_own, i_bh, sizes, IS_RAGGED)
            lse, delta = lse[:, None], delta[:, None]
            step += 1
        first, stride, count = blocks_of(i, TILES, IS_CAUSAL, OWNS_KEYS)
        start, stop = 0, 2
        if IS_CAUSAL:
            if c == (1 if OWNS_KEYS else 0):
                # Once it is filled, the release counts for this round, whatever the other consumer has yet to read.
                wait_filled(ring, step)
                release(ring, step)
                start = 1
            stop = start + 1
        for IS_WHOLE in gl.static_range(0 if HAS_MASK else 1, 2):
            if IS_WHOLE:
                start = stop if HAS_MASK else 0
                stop = count
                if PLACES == 2:
                    # The last tile's gradients have left their place by now, which the next tile's rows may take.
                    tma.store_wait(0)
                    release(own, tile - 1, tile > 0)
            for j in range(start, stop):
                o_streamed = (first + j * stride) * ROWS + o_col
                if IS_WHOLE:
                    seen = None
                elif OWNS_KEYS:
                    seen = o_row[:, None] <= o_col[None, :]  # of the diagonal's block
                elif IS_CAUSAL:
                    seen = o_streamed[None, :] <= o_own[:, None]
                else:
                    seen = o_streamed[None, :] < N
                acc_x, acc_y = add_pair(
                    a, b, acc_x, acc_y, lse, delta, seen, ring, step + j, statistics_ring, scale_log2, OWNS_KEYS
                )
        step += count

        # The owned tiles have been read for the last time: their place takes the gradients on their way out.
        acc_x = [x * scale for x in acc_x]
        store_through(own, tile, acc_x + acc_y, grads, [i_bh // H, (2 * i + c) * ROWS, i_bh % H * D])
        if PLACES == 1:
            tma.store_wait(0)
            release(own, tile)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def attention_hopper_backward_kernel(
    a_desc, a_tail, b_desc, b_tail, x_desc, x_tail, y_desc, y_tail, da_desc, da_tail, db_desc, db_tail,
    out_desc, out_tail, statistics_desc, p_lse, p_statistics, scale, scale_log2,
    N, H, WORK, TILES, HEADS, GROUP,
    D: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, IS_RAGGED: gl.constexpr, OWNS_KEYS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    own_descs = chunks_of(a_desc, a_tail) + chunks_of(b_desc, b_tail)
    descs = chunks_of(x_desc, x_tail) + chunks_of(y_desc, y_tail)
    own = allocate_ring(own_descs, PLACES, 1), allocate_ring(own_descs, PLACES, 1)  # of either consumer
    ring = allocate_ring(descs, STAGES, 2)
    statistics_ring = ring
    grads = chunks_of(da_desc, da_tail)
    if OWNS_KEYS:
        grads = grads + chunks_of(db_desc, db_tail)
        shape: gl.constexpr = [STAGES, statistics_desc.block_shape[0]]
        lse = gl.allocate_shared_memory(gl.float32, shape, statistics_desc.layout)
        delta = gl.allocate_shared_memory(gl.float32, shape, statistics_desc.layout)
        statistics_ring = [lse, delta], ring[1], ring[2]
    out = chunks_of(out_desc, out_tail)
    sizes = N, H, WORK, TILES, HEADS, GROUP
    gl.warp_specialize(
        [
            (consumer, (
                0, grads, p_lse, p_statistics, own[0], ring, statistics_ring, scale, scale_log2, sizes,
                D, IS_CAUSAL, IS_RAGGED, OWNS_KEYS,
            )),
            (consumer, (
                1, grads, p_lse, p_statistics, own[1], ring, statistics_ring, scale, scale_log2, sizes,
                D, IS_CAUSAL, IS_RAGGED, OWNS_KEYS,
            )),
            (producer, (
                own_descs, descs, out, statistics_desc, own, ring, statistics_ring, sizes, D, IS_CAUSAL, OWNS_KEYS
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_backward_hopper(dout, q, k, v, out, lse, dq, dk, dv, causal: bool, scale: float) -> None:
    """Fill dq, dk, dv, views (B, N, H, D) like the others; lse (base 2) fp32 (B, H, N).

    Raises ValueError if the tensors do not fit."""
    require(scale, dout=dout, q=q, k=k, v=v, out=out, dq=dq, dk=dk, dv=dv)
    B, N, H, D = q.shape
    tile = tiles.ATTENTION_HOPPER_BACKWARD[D]
    tiles.require("attention_hopper_backward_kernel", tile, q, 2 * tile.BLOCK_N * D)
    # lse and delta of every row of every tile: a block of them starts at 16 bytes, as a copy by TMA must.
    TILES = triton.cdiv(N, tile.BLOCK_M)
    statistics = torch.empty((2, B, H, TILES * tile.BLOCK_M), dtype=torch.float32, device=q.device)

    def run(owned, streamed, grads, **arguments) -> None:
        views = zip(("a", "b", "x", "y", "da", "db", "out"), (*owned, *streamed, *grads, out))
        launch(
            attention_hopper_backward_kernel, (min(multiprocessors(q.device), TILES * B * H),),
            **{key: value for name, t in views for key, value in describe(name, t, ROWS).items()}, **arguments,
            scale=scale, scale_log2=scale * LOG2E.value,
            N=N, H=H, WORK=TILES * B * H, TILES=TILES, HEADS=B * H, GROUP=heads_in_group(q, tile),
            D=D, STAGES=tile.num_stages, IS_CAUSAL=causal,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
        )  # fmt: skip

    run(
        (q, dout), (k, v), (dq, dq), statistics_desc=None, p_lse=lse, p_statistics=statistics, PLACES=2,
        IS_RAGGED=N % tile.BLOCK_M != 0, OWNS_KEYS=False,
    )  # fmt: skip
    # With two places a tile's rows come while the last tile's gradients leave; two accumulators of 128 columns leave no
    # registers to tell them apart.
    places = 1 if D == 128 else 2
    run(
        (k, v), (q, dout), (dk, dv), statistics_desc=describe_flat(statistics), p_lse=None, p_statistics=None,
        PLACES=places, IS_RAGGED=False, OWNS_KEYS=True,
    )  # fmt: skip
