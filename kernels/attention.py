"""Attention, causal or full, forward; attention_backward.py is its backward.

    s = scale q k^T, masked to j <= i if causal
    out = softmax(s) v                          q, k, v, out (B, N, H, D); also qkv packed as (B, N, 3, H, D)

Online softmax: for a block of queries, over blocks of keys, with the running maximum m of s log2(e),

    p = 2^(s log2(e) - m),  l = sum_j p,  out = sum_j p v / l,  lse = m + log2(l)

s, m, l and the sum of p v are fp32, p enters its product in the inputs' dtype. exp2 is the machine's exponential, and
log2(e) rides in the scale. Saved for backward: q, k, v, out and lse, fp32 (B, H, N), in base 2. Blocks that the mask
does not cut run in a loop of their own, without it. No atomics: every run gives the same bits.

FLOPs: 4 B H N^2 D, half of it if causal. Bytes: 4 B N H D elements and 4 B H N. On an H200, 790 TFLOP/s and 4.3 TB/s,
the products in 16 bits outweigh them from N of about 370, if causal 730: attention is bound by products and
exponentials.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .attention_backward import attention_backward
from .attention_heads import (
    HEAD_COUNTS,
    add_product,
    head_of,
    heads_in_group,
    is_aligned,
    load_tile,
    outer_dots,
    scale_tile,
    store_tile,
    tile_and_head,
    view_args,
    zero_tile,
)
from .choose import MAX_HEAD_DIM, takes_head_dim, warp_specialised
from .device import check_device
from .launching import blocks, launch
from .primitives import LOG2E
from .registration import differentiable, operation


@triton.jit(do_not_specialize=HEAD_COUNTS)
def attention_forward_kernel(
    q, q_tail, q_strides, k, k_tail, k_strides, v, v_tail, v_strides, out, out_strides, lse,
    scale_log2, N, H, HEADS, GROUP,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILES = tl.cdiv(N, BLOCK_M)
    i_m, i_bh = tile_and_head(TILES, HEADS, GROUP)
    i_b, i_h = i_bh // H, i_bh % H
    start_m = (TILES - 1 - i_m) * BLOCK_M  # the last queries see the most keys: first
    o_m = start_m + tl.arange(0, BLOCK_M)
    q = head_of(q, q_tail, q_strides, i_b, i_h)
    k = head_of(k, k_tail, k_strides, i_b, i_h)
    v = head_of(v, v_tail, v_strides, i_b, i_h)
    b_q = load_tile(q, start_m, N, BLOCK_M, D)
    b_out = zero_tile(BLOCK_M, D)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    start_n, stop_n = 0, (start_m if IS_CAUSAL else N) // BLOCK_N * BLOCK_N
    for IS_MASKED in tl.static_range(2):
        for i_n in range(start_n, stop_n, BLOCK_N):
            b_k = load_tile(k, i_n, N, BLOCK_N, D)
            b_s = outer_dots(b_q, b_k)  # [BLOCK_M, BLOCK_N]
            if IS_MASKED:
                o_n = i_n + tl.arange(0, BLOCK_N)
                b_s = tl.where(o_n[None, :] <= o_m[:, None] if IS_CAUSAL else o_n[None, :] < N, b_s, float("-inf"))
            # Key 0 is in the first block of every query: the maximum is finite from there on.
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
            b_alpha = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
            b_out = scale_tile(b_out, b_alpha[:, None])
            b_v = load_tile(v, i_n, N, BLOCK_N, D)
            b_out = add_product(b_out, b_p.to(b_v[0].dtype), b_v)
            b_max = b_new
        start_n, stop_n = stop_n, start_m + BLOCK_M if IS_CAUSAL else N
    out = head_of(out, None, out_strides, i_b, i_h)
    store_tile(out, start_m, scale_tile(b_out, 1.0 / b_sum[:, None]), N, BLOCK_M, D)
    tl.store(lse + i_bh.to(tl.int64) * N + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


def attention_forward(q, k, v, causal: bool, scale: float, out, lse) -> None:
    """Fill out (B, N, H, D) contiguous, lse fp32 (B, H, N) in base 2, from views with a contiguous last dimension."""
    B, N, H, D = q.shape
    if not out.numel():
        return
    if warp_specialised(q, k, v):
        from .attention_hopper_forward import attention_forward_hopper

        return attention_forward_hopper(q, k, v, causal, scale, out, lse)
    tile = tiles.attention_tile(tiles.ATTENTION_FORWARD, q, all(map(is_aligned, (q, k, v))))
    tiles.require("attention_forward_kernel", tile, q, 2 * tile.BLOCK_N * D)
    launch(
        attention_forward_kernel, (blocks(N, tile.BLOCK_M) * B * H,),
        **view_args("q", q, tile.BLOCK_M, tile.tma),
        **view_args("k", k, tile.BLOCK_N, tile.tma),
        **view_args("v", v, tile.BLOCK_N, tile.tma),
        out=out, out_strides=out.stride()[:3], lse=lse,
        scale_log2=scale * LOG2E.value, N=N, H=H, HEADS=B * H, GROUP=heads_in_group(q, tile),
        D=D, IS_CAUSAL=causal, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward_outputs(q, *_):
    """Of q (B, N, H, D), or of a packed (B, N, 3, H, D)."""
    B, N, *_, H, D = q.shape
    return q.new_empty((B, N, H, D)), q.new_empty((B, H, N), dtype=torch.float32)


@operation(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)", _forward_outputs
)
def attention_op(q, k, v, causal: bool, scale: float, out, lse) -> None:
    attention_forward(_rows(q), _rows(k), _rows(v), causal, scale, out, lse)


@operation("attention_packed(Tensor qkv, bool causal, float scale) -> (Tensor, Tensor)", _forward_outputs)
def attention_packed_op(qkv, causal: bool, scale: float, out, lse) -> None:
    attention_forward(*_rows(qkv).unbind(2), causal, scale, out, lse)


@operation(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dout, q, *_: tuple(q.new_empty(q.shape) for _ in range(3)),
)
def attention_backward_op(dout, q, k, v, out, lse, causal: bool, scale: float, dq, dk, dv) -> None:
    attention_backward(_rows(dout), _rows(q), _rows(k), _rows(v), out, lse, dq, dk, dv, causal, scale)


@operation(
    "attention_packed_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, bool causal, float scale) -> Tensor",
    lambda dout, qkv, *_: qkv.new_empty(qkv.shape),
)
def attention_packed_backward_op(dout, qkv, out, lse, causal: bool, scale: float, dqkv) -> None:
    attention_backward(_rows(dout), *_rows(qkv).unbind(2), out, lse, *dqkv.unbind(2), causal, scale)


@differentiable
class Attention(torch.autograd.Function):
    """q, k, v (B, N, H, D), causal, scale -> out, lse."""

    @staticmethod
    def forward(q, k, v, causal, scale):
        return attention_op(q, k, v, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *qkv, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*qkv, *outputs)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        return *attention_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


@differentiable
class AttentionPacked(torch.autograd.Function):
    """qkv (B, N, 3, H, D), causal, scale -> out, lse."""

    @staticmethod
    def forward(qkv, causal, scale):
        return attention_packed_op(qkv, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        qkv, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(qkv, *outputs)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        return attention_packed_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


def _scale(name: str, x: torch.Tensor, scale: float | None) -> float:
    """The scale, after what the kernels ask of x (..., D). Raises ValueError."""
    D = x.shape[-1]
    if x.dtype not in tiles.FLOATS:
        checks.refuse("attention", name, x.dtype, "fp32, fp16 or bf16")
    if not takes_head_dim(D):
        checks.refuse("attention", name, f"head dim {D}", f"a multiple of 16 up to {MAX_HEAD_DIM}")
    scale = D**-0.5 if scale is None else float(scale)
    # The maximum of s is scale times that of q k^T only for a positive scale.
    if not 0 < scale < float("inf"):
        checks.refuse("attention", "scale", scale, "a positive number")
    return scale


def attention(q, k, v, causal: bool, scale: float | None = None) -> torch.Tensor:
    """softmax(scale q k^T) v of views (B, N, H, D), scale 1/sqrt(D) by default -> (B, N, H, D) contiguous.

    Any strides; only a last dimension that is not contiguous costs a copy. Differentiable in q, k and v.
    Raises ValueError for another rank or dtype, a head dim that is no multiple of 16 up to 128, shapes or dtypes that
    differ, or a scale that is not positive."""
    checks.attention(q, k, v)
    scale = _scale("q", q, scale)
    check_device("attention", q, k, v)
    return Attention(q, k, v, causal, scale)[0]


def attention_packed(qkv, causal: bool, scale: float | None = None) -> torch.Tensor:
    """The same of one packed view (B, N, 3, H, D) -> (B, N, H, D); its gradient is one packed tensor too."""
    checks.attention_packed(qkv)
    scale = _scale("qkv", qkv, scale)
    check_device("attention", qkv)
    return AttentionPacked(qkv, causal, scale)[0]
