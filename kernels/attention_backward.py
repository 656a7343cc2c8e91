"""Attention, backward: dq, dk, dv of attention.py's out, for views of any strides.

    p = 2^(s log2(e) - lse)      dv = p^T dout      dp = dout v^T      delta = rowsum(dout out)
    ds = p (dp - delta)          dq = scale ds k    dk = scale ds^T q

p is made again from q, k and lse rather than kept: N^2 elements of traffic against one product. Two kernels: one over
blocks of queries for dq, which also writes delta (fp32, (B, H, N)), then one over blocks of keys for dk and dv; seven
products in all, 14 B H N^2 D FLOPs, half of it if causal. Each sum belongs to one program and runs in a fixed order,
in fp32: no atomics, and every run gives the same bits. p and ds enter their products in the inputs' dtype.

Queries past N read q, dout, lse and delta as zero, so that they add p dout = 0 and ds = 0. Keys past N only touch
gradients past N where the product sums over queries; where it sums over keys (dq) they are masked.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .attention_heads import (
    HEAD_COUNTS,
    add_product,
    head_of,
    heads_in_group,
    is_aligned,
    load_tile,
    outer_dots,
    row_dots,
    scale_tile,
    store_tile,
    tile_and_head,
    view_args,
    zero_tile,
)
from .choose import warp_specialised
from .launching import blocks, launch
from .primitives import LOG2E


@triton.jit(do_not_specialize=HEAD_COUNTS)
def attention_dq_kernel(
    q, q_tail, q_strides, k, k_tail, k_strides, v, v_tail, v_strides,
    out, out_tail, out_strides, dout, dout_tail, dout_strides, lse, delta, dq, dq_strides,
    scale, scale_log2, N, H, HEADS, GROUP,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILES = tl.cdiv(N, BLOCK_M)
    i_m, i_bh = tile_and_head(TILES, HEADS, GROUP)
    i_b, i_h = i_bh // H, i_bh % H
    start_m = (TILES - 1 - i_m) * BLOCK_M  # the last queries see the most keys: first
    o_m = start_m + tl.arange(0, BLOCK_M)
    o_row = i_bh.to(tl.int64) * N + o_m
    q = head_of(q, q_tail, q_strides, i_b, i_h)
    k = head_of(k, k_tail, k_strides, i_b, i_h)
    v = head_of(v, v_tail, v_strides, i_b, i_h)
    out = head_of(out, out_tail, out_strides, i_b, i_h)
    dout = head_of(dout, dout_tail, dout_strides, i_b, i_h)
    b_dout = load_tile(dout, start_m, N, BLOCK_M, D)
    b_out = load_tile(out, start_m, N, BLOCK_M, D)
    b_delta = row_dots(b_dout, b_out)  # [BLOCK_M]
    tl.store(delta + o_row, b_delta, mask=o_m < N)
    b_lse = tl.load(lse + o_row, mask=o_m < N, other=0.0)
    b_q = load_tile(q, start_m, N, BLOCK_M, D)
    b_dq = zero_tile(BLOCK_M, D)
    start_n, stop_n = 0, (start_m if IS_CAUSAL else N) // BLOCK_N * BLOCK_N
    for IS_MASKED in tl.static_range(2):
        for i_n in range(start_n, stop_n, BLOCK_N):
            b_k = load_tile(k, i_n, N, BLOCK_N, D)
            b_v = load_tile(v, i_n, N, BLOCK_N, D)
            b_p = tl.exp2(outer_dots(b_q, b_k) * scale_log2 - b_lse[:, None])  # [BLOCK_M, BLOCK_N]
            if IS_MASKED:
                o_n = i_n + tl.arange(0, BLOCK_N)
                b_p = tl.where(o_n[None, :] <= o_m[:, None] if IS_CAUSAL else o_n[None, :] < N, b_p, 0.0)
            b_ds = b_p * (outer_dots(b_dout, b_v) - b_delta[:, None])
            b_dq = add_product(b_dq, b_ds.to(b_k[0].dtype), b_k)
        start_n, stop_n = stop_n, start_m + BLOCK_M if IS_CAUSAL else N
    dq = head_of(dq, None, dq_strides, i_b, i_h)
    store_tile(dq, start_m, scale_tile(b_dq, scale), N, BLOCK_M, D)


@triton.jit(do_not_specialize=HEAD_COUNTS)
def attention_dkdv_kernel(
    q, q_tail, q_strides, k, k_tail, k_strides, v, v_tail, v_strides, dout, dout_tail, dout_strides,
    lse, delta, dk, dk_strides, dv, dv_strides,
    scale, scale_log2, N, H, HEADS, GROUP,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_n, i_bh = tile_and_head(tl.cdiv(N, BLOCK_N), HEADS, GROUP)  # the first keys are seen by the most queries
    i_b, i_h = i_bh // H, i_bh % H
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    lse += i_bh.to(tl.int64) * N
    delta += i_bh.to(tl.int64) * N
    q = head_of(q, q_tail, q_strides, i_b, i_h)
    k = head_of(k, k_tail, k_strides, i_b, i_h)
    v = head_of(v, v_tail, v_strides, i_b, i_h)
    dout = head_of(dout, dout_tail, dout_strides, i_b, i_h)
    b_k = load_tile(k, start_n, N, BLOCK_N, D)
    b_v = load_tile(v, start_n, N, BLOCK_N, D)
    b_dk, b_dv = zero_tile(BLOCK_N, D), zero_tile(BLOCK_N, D)
    start_m, stop_m = 0, 0
    if IS_CAUSAL:
        start_m, stop_m = start_n, start_n + max(BLOCK_M, BLOCK_N)
    for IS_WHOLE in tl.static_range(2):
        for i_m in range(start_m, stop_m, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            b_q = load_tile(q, i_m, N, BLOCK_M, D)
            b_dout = load_tile(dout, i_m, N, BLOCK_M, D)
            b_lse = tl.load(lse + o_m, mask=o_m < N, other=0.0)
            b_delta = tl.load(delta + o_m, mask=o_m < N, other=0.0)
            b_p = tl.exp2(outer_dots(b_k, b_q) * scale_log2 - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
            if not IS_WHOLE:
                b_p = tl.where(o_n[:, None] <= o_m[None, :], b_p, 0.0)
            b_dv = add_product(b_dv, b_p.to(b_dout[0].dtype), b_dout)
            b_ds = b_p * (outer_dots(b_v, b_dout) - b_delta[None, :])
            b_dk = add_product(b_dk, b_ds.to(b_q[0].dtype), b_q)
        start_m, stop_m = stop_m, N
    dk = head_of(dk, None, dk_strides, i_b, i_h)
    store_tile(dk, start_n, scale_tile(b_dk, scale), N, BLOCK_N, D)
    dv = head_of(dv, None, dv_strides, i_b, i_h)
    store_tile(dv, start_n, b_dv, N, BLOCK_N, D)


def attention_backward(dout, q, k, v, out, lse, dq, dk, dv, causal: bool, scale: float) -> None:
    """Fill dq, dk, dv. All are views (B, N, H, D) with a contiguous last dimension, lse fp32 (B, H, N) in base 2."""
    if not q.numel():
        return
    aligned = all(map(is_aligned, (dout, q, k, v)))
    if warp_specialised(dout, q, k, v, out, dq, dk, dv):
        from .attention_hopper_backward import attention_backward_hopper

        return attention_backward_hopper(dout, q, k, v, out, lse, dq, dk, dv, causal, scale)
    delta = torch.empty_like(lse)
    tile = tiles.attention_tile(tiles.ATTENTION_DQ, q, aligned)
    tiles.require("attention_dq_kernel", tile, q, 2 * tile.BLOCK_N * q.shape[3])
    launch(
        attention_dq_kernel, (blocks(q.shape[1], tile.BLOCK_M) * lse.shape[0] * lse.shape[1],),
        **_views(dout, q, k, v, tile), **view_args("out", out, tile.BLOCK_M, tile.tma),
        lse=lse, delta=delta, dq=dq, dq_strides=dq.stride()[:3], **_shape(q, scale, tile),
        IS_CAUSAL=causal, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = tiles.attention_tile(tiles.ATTENTION_DKDV, q, aligned)
    tiles.require("attention_dkdv_kernel", tile, q, 2 * tile.BLOCK_M * q.shape[3])
    launch(
        attention_dkdv_kernel, (blocks(q.shape[1], tile.BLOCK_N) * lse.shape[0] * lse.shape[1],),
        **_views(dout, q, k, v, tile),
        lse=lse, delta=delta, dk=dk, dk_strides=dk.stride()[:3], dv=dv, dv_strides=dv.stride()[:3],
        **_shape(q, scale, tile), IS_CAUSAL=causal, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _views(dout, q, k, v, tile: tiles.Tile) -> dict:
    """Queries and dout in tiles of BLOCK_M rows, keys and values of BLOCK_N."""
    views = ("q", q, tile.BLOCK_M), ("k", k, tile.BLOCK_N), ("v", v, tile.BLOCK_N), ("dout", dout, tile.BLOCK_M)
    return {name: value for view in views for name, value in view_args(*view, tile.tma).items()}


def _shape(q, scale: float, tile: tiles.Tile) -> dict:
    B, N, H, D = q.shape
    scales = {"scale": scale, "scale_log2": scale * LOG2E.value}
    return scales | {"N": N, "H": H, "HEADS": B * H, "GROUP": heads_in_group(q, tile), "D": D}
