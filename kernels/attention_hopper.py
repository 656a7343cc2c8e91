"""Attention forward on Hopper, warp-specialised, in Gluon: out and lse as in attention.py.

One persistent program a multiprocessor holds three warpgroups. A producer, one warp, copies tiles into rings of shared
memory by TMA; two consumers own 64 query rows each and run, for every key block j, in this order:

    issue S = Q K_j^T      rescale O, round P, under S      issue O += P V_(j-1)      wait for S      softmax, under O

so that the tensor cores work through the softmax, and the two consumers interleave besides. Blocks run from the
diagonal down: the only masked block is the first, outside of the loop. Tiles go longest first, in groups of heads
whose keys and values fit L2 together. The rings run on from tile to tile, and queries have two places: a tile's output
leaves by one while the next tile has begun in the other.

Cost for B H heads, causal: 2 B H N^2 D FLOPs; bytes 4 B N H D elements once. At D = 64 a 64 x 128 tile asks 512 cycles
of products and 512 of exp2, so without this overlap the kernel could not pass half of the peak.

Deterministic. Needs what `hopper.fits` asks for; attention.py does all else.
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
from .hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, TILE, chunks, describe, issue_dots, require, tile_of
from .launching import launch
from .primitives import LOG2E


@gluon.jit
def producer(
    descs, tails, rings, tail_rings, bars, N, H, M_TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc = descs
    q_tail, k_tail, v_tail = tails
    q_ring, k_ring, v_ring = rings
    q_ring2, k_ring2, v_ring2 = tail_rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    Q_BYTES: gl.constexpr = (BLOCK // 2) * (D1 + D2) * 2
    KV_BYTES: gl.constexpr = BLOCK * (D1 + D2) * 2
    step = 0
    tile = 0
    for t in range(gl.program_id(0), M_TILES * HEADS, gl.num_programs(0)):
        i_m, i_b, i_h = tile_of(t, M_TILES, HEADS, GROUP, H)
        row = i_b * N
        for c in gl.static_range(2):
            place = (tile & 1) * 2 + c
            mbarrier.wait(q_empty.index(place), (((tile + 1) // 2) & 1) ^ 1)
            mbarrier.expect(q_full.index(place), Q_BYTES)
            o_q = row + i_m * BLOCK + c * (BLOCK // 2)
            tma.async_copy_global_to_shared(q_desc, [o_q, i_h * (D1 + D2)], q_full.index(place), q_ring.index(place))
            if D2 > 0:
                tma.async_copy_global_to_shared(
                    q_tail, [o_q, i_h * (D1 + D2) + D1], q_full.index(place), q_ring2.index(place)
                )
        blocks = i_m + 1 if IS_CAUSAL else M_TILES
        for j in range(blocks):
            o_k = row + (blocks - 1 - j) * BLOCK
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), KV_BYTES)
            tma.async_copy_global_to_shared(k_desc, [o_k, i_h * (D1 + D2)], k_full.index(slot), k_ring.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(
                    k_tail, [o_k, i_h * (D1 + D2) + D1], k_full.index(slot), k_ring2.index(slot)
                )
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), KV_BYTES)
            tma.async_copy_global_to_shared(v_desc, [o_k, i_h * (D1 + D2)], v_full.index(slot), v_ring.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(
                    v_tail, [o_k, i_h * (D1 + D2) + D1], v_full.index(slot), v_ring2.index(slot)
                )
            step += 1
        tile += 1


@gluon.jit
def consumer(
    c: gl.constexpr, out_desc, out_tail, p_lse, rings, tail_rings, bars, scale_log2, N, H, M_TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, v_ring = rings
    q_ring2, k_ring2, v_ring2 = tail_rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    ROWS: gl.constexpr = BLOCK // 2
    PV_GROUPS: gl.constexpr = 2 if D2 > 0 else 1
    D2_: gl.constexpr = D2 if D2 > 0 else 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    O2_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2_, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    P2_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O2_LAYOUT, 2)
    dtype: gl.constexpr = q_ring.dtype
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    o_col = gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT))
    zero = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    step = 0
    tile = 0
    for t in range(gl.program_id(0), M_TILES * HEADS, gl.num_programs(0)):
        i_m, i_b, i_h = tile_of(t, M_TILES, HEADS, GROUP, H)
        place = (tile & 1) * 2 + c
        q, q2 = q_ring.index(place), q_ring2.index(place)
        mbarrier.wait(q_full.index(place), (tile // 2) & 1)
        slot = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(k_full.index(slot), phase)
        s = issue_dots(q, q2, k_ring.index(slot), k_ring2.index(slot), zero, D2)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        # The last tile's output has left its place by now, which the next tile's queries may take.
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(place ^ 2), count=1)
        if IS_CAUSAL:
            o_q, o_k = i_m * BLOCK + c * ROWS + o_row, i_m * BLOCK + o_col
            s = gl.where(o_k[None, :] <= o_q[:, None], s, float("-inf"))
        m = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - m[:, None])
        l = gl.sum(p, 1)
        if D1 == 128:
            p = p.to(dtype)  # S, the output and p in fp32 would not fit the registers together
        alpha = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))  # of an output that is zero still
        o = gl.zeros([ROWS, D1], gl.float32, O_LAYOUT)
        o2 = gl.zeros([ROWS, D2_], gl.float32, O2_LAYOUT)
        blocks = i_m + 1 if IS_CAUSAL else M_TILES
        mbarrier.wait(v_full.index(slot), phase)
        for _ in range(1, blocks):
            next_slot = (step + 1) % STAGES
            next_phase = ((step + 1) // STAGES) & 1
            mbarrier.wait(k_full.index(next_slot), next_phase)
            s = issue_dots(q, q2, k_ring.index(next_slot), k_ring2.index(next_slot), zero, D2)
            # The last step's p and output are made ready under S.
            o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
            b_p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            if D2 > 0:
                o2 = o2 * gl.convert_layout(alpha, gl.SliceLayout(1, O2_LAYOUT))[:, None]
                b_p2 = gl.convert_layout(p.to(dtype), P2_LAYOUT)
            o = warpgroup_mma(b_p, v_ring.index(slot), o, is_async=True)
            if D2 > 0:
                o2 = warpgroup_mma(b_p2, v_ring2.index(slot), o2, is_async=True)
            s = warpgroup_mma_wait(PV_GROUPS, deps=[s])
            mbarrier.arrive(k_empty.index(next_slot), count=1)
            # The scale rides in the exponent's multiply-add; applied before the maximum it is a pass of its own.
            m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m - m_new)
            p = gl.exp2(s * scale_log2 - m_new[:, None])
            l = l * alpha + gl.sum(p, 1)
            if D1 == 128:
                p = p.to(dtype)
            m = m_new
            # This loop holds the exponentials above the wait for the output, which ptxas else puts first: they are
            # what the product is to run under.
            mbarrier.wait(v_full.index(next_slot), next_phase)
            if D2 > 0:
                o, o2, b_p, b_p2 = warpgroup_mma_wait(0, deps=[o, o2, b_p, b_p2])
            else:
                o, b_p = warpgroup_mma_wait(0, deps=[o, b_p])
            mbarrier.arrive(v_empty.index(slot), count=1)
            step += 1
            slot = next_slot
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
        o = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_ring.index(slot), o, is_async=True)
        if D2 > 0:
            o2 = o2 * gl.convert_layout(alpha, gl.SliceLayout(1, O2_LAYOUT))[:, None]
            o2 = warpgroup_mma(gl.convert_layout(p.to(dtype), P2_LAYOUT), v_ring2.index(slot), o2, is_async=True)
            o2 = warpgroup_mma_wait(0, deps=[o2])
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(v_empty.index(slot), count=1)
        step += 1

        # The query tile has been read for the last time: its place in shared memory takes the output on its way out,
        # while the next tile goes on with the other one.
        o_m = i_m * BLOCK + c * ROWS
        inverse = 1.0 / l
        q.store((o * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(dtype))
        if D2 > 0:
            q2.store((o2 * gl.convert_layout(inverse, gl.SliceLayout(1, O2_LAYOUT))[:, None]).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [i_b * N + o_m, i_h * (D1 + D2)], q)
        if D2 > 0:
            tma.async_copy_shared_to_global(out_tail, [i_b * N + o_m, i_h * (D1 + D2) + D1], q2)
        gl.store(p_lse + (i_b.to(gl.int64) * H + i_h) * N + o_m + o_row, m + gl.log2(l))
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=HEAD_COUNTS)
def attention_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, q_tail, k_tail, v_tail, out_tail, p_lse, scale_log2,
    N, H, M_TILES, HEADS, GROUP,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [4, BLOCK // 2, D1], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D1], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D1], v_desc.layout)
    if D2 > 0:
        q_ring2 = gl.allocate_shared_memory(dtype, [4, BLOCK // 2, D2], q_tail.layout)
        k_ring2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D2], k_tail.layout)
        v_ring2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D2], v_tail.layout)
    else:
        q_ring2, k_ring2, v_ring2 = q_ring, k_ring, v_ring
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(4):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        # Both consumers release a block.
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)

    rings, tail_rings = (q_ring, k_ring, v_ring), (q_ring2, k_ring2, v_ring2)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    descs, tails = (q_desc, k_desc, v_desc), (q_tail, k_tail, v_tail)
    gl.warp_specialize(
        [
            (consumer, (
                0, out_desc, out_tail, p_lse, rings, tail_rings, bars, scale_log2, N, H, M_TILES, HEADS, GROUP,
                D1, D2, BLOCK, STAGES, IS_CAUSAL,
            )),
            (consumer, (
                1, out_desc, out_tail, p_lse, rings, tail_rings, bars, scale_log2, N, H, M_TILES, HEADS, GROUP,
                D1, D2, BLOCK, STAGES, IS_CAUSAL,
            )),
            (producer, (
                descs, tails, rings, tail_rings, bars, N, H, M_TILES, HEADS, GROUP,
                D1, D2, BLOCK, STAGES, IS_CAUSAL,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_forward_hopper(q, k, v, causal: bool, scale: float, out, lse) -> None:
    """Fill out (B, N, H, D) contiguous, lse fp32 (B, H, N) in base 2. Raises ValueError if the tensors do not fit."""
    require(scale, q=q, k=k, v=v)
    B, N, H, D = q.shape
    tile = tiles.ATTENTION_HOPPER[D]
    tiles.require("attention_hopper_kernel", tile, q, 2 * tile.BLOCK_N * D, stages=2)  # the next values come first
    D1, D2 = chunks(D)

    def four(width):
        return [describe(t, rows, width) for t, rows in ((q, TILE // 2), (k, TILE), (v, TILE), (out, TILE // 2))]

    M_TILES = N // TILE
    launch(
        attention_hopper_kernel, (min(multiprocessors(q.device), M_TILES * B * H),),
        **dict(zip(("q_desc", "k_desc", "v_desc", "out_desc"), four(D1))),
        **dict(zip(("q_tail", "k_tail", "v_tail", "out_tail"), four(D2 or D1))),
        p_lse=lse, scale_log2=scale * LOG2E.value, N=N, H=H, M_TILES=M_TILES, HEADS=B * H,
        GROUP=heads_in_group(q, tile),
        D1=D1, D2=D2, BLOCK=TILE, STAGES=tile.num_stages, IS_CAUSAL=causal,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=tile.num_warps,
    )  # fmt: skip
