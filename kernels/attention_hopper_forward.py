"""Attention forward on sm_90, warp-specialised, in Gluon: out and lse as in attention.py.

A consumer owns 64 queries and meets the keys in blocks of 128. A step of the loop, block j:

    tensor cores    S = Q K_j^T              O += P V_(j-1)
    a consumer      O alpha, P in 16 bits    softmax of S: m, alpha, P, l      ... and again
                    of block j-1

Its softmax runs under its own product, and what gaps are left are the other consumer's. At D = 64 a block asks 512
cycles of products and 512 of exp2: without the overlap the kernel could not pass half of the peak.

Blocks run from the last one down, so that only the first is masked, by the diagonal or the end of the keys; it stands
before the loop. Tiles go longest first, in groups of heads whose keys and values fit L2 together. Queries have two
places: a tile's output leaves by one while the next tile has begun in the other. A length that 128 does not divide
costs what the next multiple does. Deterministic. choose.takes_views says which views; attention.py does the rest.
"""

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
    issue_dots,
    named,
    product_layout,
    release,
    scale_rows,
    store_through,
    tile_of,
    view,
    wait_filled,
    zero_rows,
)
from .device import multiprocessors
from .launching import blocks, launch
from .primitives import LOG2E


@gluon.jit
def producer(descs, rings, sizes, D: gl.constexpr, IS_CAUSAL: gl.constexpr):
    q_desc, k_desc, v_desc = descs
    q_rings, k_ring, v_ring = rings
    H, WORK, TILES = sizes[1:4]
    ROWS: gl.constexpr = q_desc[0].block_shape[1]
    BLOCK: gl.constexpr = k_desc[0].block_shape[1]
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i_m, i_bh = tile_of(t, sizes, True)
        i_b, column = i_bh // H, i_bh % H * D
        for c in gl.static_range(2):
            claim(q_rings[c], tile, ROWS * D * 2)
            copy(q_desc, [i_b, i_m * BLOCK + c * ROWS, column], q_rings[c], tile)
        blocks = i_m + 1 if IS_CAUSAL else TILES
        for j in range(blocks):
            at = [i_b, (blocks - 1 - j) * BLOCK, column]
            claim(k_ring, step, BLOCK * D * 2)
            copy(k_desc, at, k_ring, step)
            claim(v_ring, step, BLOCK * D * 2)
            copy(v_desc, at, v_ring, step)
            step += 1
        tile += 1


@gluon.jit
def exponentials(s, m, scale_log2, dtype: gl.constexpr, D: gl.constexpr):
    """(p, its sums). The scale rides in the exponent's multiply-add; applied before the maximum it is one more pass."""
    p = gl.exp2(s * scale_log2 - m[:, None])
    l = gl.sum(p, 1)
    if D == 128:
        p = p.to(dtype)  # S, the output and p in fp32 would not fit the registers together
    return p, l


@gluon.jit
def masked(s, o_row, o_col, there, IS_CAUSAL: gl.constexpr, IS_RAGGED: gl.constexpr):
    """Scores of a row's last block, -inf at keys behind the query or, full, from the first that isn't there on."""
    if IS_CAUSAL:
        s = gl.where(o_col[None, :] <= o_row[:, None], s, float("-inf"))
    elif IS_RAGGED:
        s = gl.where(o_col[None, :] < there, s, float("-inf"))
    return s


@gluon.jit
def store_statistics(p_lse, lse, i_bh, o_m, N, IS_RAGGED: gl.constexpr):
    p_m = p_lse + i_bh.to(gl.int64) * N + o_m
    if IS_RAGGED:
        gl.store(p_m, lse, mask=o_m < N)
    else:
        gl.store(p_m, lse)


@gluon.jit
def consumer(
    c: gl.constexpr, out_desc, p_lse, rings, scale_log2, sizes,
    D: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_RAGGED: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, v_ring = rings
    N, H, WORK, TILES = sizes[:4]
    ROWS: gl.constexpr = out_desc[0].block_shape[1]
    BLOCK: gl.constexpr = 2 * ROWS
    dtype: gl.constexpr = out_desc[0].dtype
    o_row = c * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(BLOCK)))
    o_col = gl.arange(0, BLOCK, gl.SliceLayout(0, product_layout(BLOCK)))
    step = 0
    tile = 0
    for t in range(gl.program_id(0), WORK, gl.num_programs(0)):
        i_m, i_bh = tile_of(t, sizes, True)
        wait_filled(q_ring, tile)
        wait_filled(k_ring, step)
        q = view(q_ring, tile)
        s = issue_dots(q, view(k_ring, step))
        s = warpgroup_mma_wait(0, deps=[s])
        release(k_ring, step)
        # The last tile's output has left its place by now, which the next tile's queries may take.
        tma.store_wait(0)
        release(q_ring, tile - 1, tile > 0)
        s = masked(s, o_row, o_col, N - (TILES - 1) * BLOCK, IS_CAUSAL, IS_RAGGED)
        m = gl.max(s, 1) * scale_log2
        p, l = exponentials(s, m, scale_log2, dtype, D)
        alpha = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, product_layout(BLOCK)))  # of an output still zero
        o = zero_rows(view(v_ring, step))
        wait_filled(v_ring, step)
        for _ in range(1, i_m + 1 if IS_CAUSAL else TILES):
            wait_filled(k_ring, step + 1)
            s = issue_dots(q, view(k_ring, step + 1))
            # The last step's p and output are made ready under S.
            o, b_p = add_products(scale_rows(o, alpha), p.to(dtype), view(v_ring, step))
            s = warpgroup_mma_wait(len(o), deps=[s])
            release(k_ring, step + 1)
            m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m - m_new)
            p, l_new = exponentials(s, m_new, scale_log2, dtype, D)
            l = l * alpha + l_new
            m = m_new
            # This loop holds the exponentials above the wait for the output, which ptxas else puts first: they are
            # what the product is to run under.
            wait_filled(v_ring, step + 1)
            o = warpgroup_mma_wait(0, deps=o + b_p)[: len(o)]
            release(v_ring, step)
            step += 1
        o, _ = add_products(scale_rows(o, alpha), p.to(dtype), view(v_ring, step))
        o = [warpgroup_mma_wait(0, deps=[x]) for x in o]
        release(v_ring, step)
        step += 1

        # The query tile has been read for the last time: its place in shared memory takes the output on its way out,
        # while the next tile goes on with the other one.
        store_through(q_ring, tile, scale_rows(o, 1.0 / l), out_desc, [i_bh // H, i_m * BLOCK + c * ROWS, i_bh % H * D])
        store_statistics(p_lse, m + gl.log2(l), i_bh, i_m * BLOCK + o_row, N, IS_RAGGED)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def attention_hopper_forward_kernel(
    q_desc, q_tail, k_desc, k_tail, v_desc, v_tail, out_desc, out_tail, p_lse, scale_log2,
    N, H, WORK, TILES, HEADS, GROUP,
    D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_RAGGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    descs = chunks_of(q_desc, q_tail), chunks_of(k_desc, k_tail), chunks_of(v_desc, v_tail)
    q_rings = allocate_ring(descs[0], 2, 1), allocate_ring(descs[0], 2, 1)  # of either consumer
    k_ring, v_ring = allocate_ring(descs[1], STAGES, 2), allocate_ring(descs[2], STAGES, 2)
    out = chunks_of(out_desc, out_tail)
    sizes = N, H, WORK, TILES, HEADS, GROUP
    gl.warp_specialize(
        [
            (consumer, (0, out, p_lse, (q_rings[0], k_ring, v_ring), scale_log2, sizes, D, IS_CAUSAL, IS_RAGGED)),
            (consumer, (1, out, p_lse, (q_rings[1], k_ring, v_ring), scale_log2, sizes, D, IS_CAUSAL, IS_RAGGED)),
            (producer, (descs, (q_rings, k_ring, v_ring), sizes, D, IS_CAUSAL)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def attention_forward_hopper(q, k, v, causal: bool, scale: float, out, lse) -> None:
    """Fill out (B, N, H, D) contiguous, lse fp32 (B, H, N) in base 2, from views that fit."""
    B, N, H, D = q.shape
    tile = tiles.ATTENTION_HOPPER_FORWARD[D]
    # Two stages at least: the loop waits for the next block's values before it has read the last one's.
    tiles.require("attention_hopper_forward_kernel", tile, q, 2 * tile.BLOCK_N * D, stages=2)
    TILES = blocks(N, tile.BLOCK_M)
    launch(
        attention_hopper_forward_kernel, (min(multiprocessors(q.device), TILES * B * H),),
        **named(
            q=describe(q, ROWS), k=describe(k, tile.BLOCK_N), v=describe(v, tile.BLOCK_N), out=describe(out, ROWS)
        ),
        p_lse=lse, scale_log2=scale * LOG2E.value,
        N=N, H=H, WORK=TILES * B * H, TILES=TILES, HEADS=B * H, GROUP=heads_in_group(q, tile),
        D=D, STAGES=tile.num_stages, IS_CAUSAL=causal, IS_RAGGED=N % tile.BLOCK_M != 0,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
    )  # fmt: skip
