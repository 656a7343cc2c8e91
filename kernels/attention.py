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

from . import tiles
from .attention_backward import attention_backward
from .heads import (
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
from .interpreter import INTERPRETED
from .primitives import LOG2E, check_device

MAX_HEAD_DIM = 128  # wider accumulators would not fit the registers


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


def attention_forward(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, N, H, D) contiguous, lse fp32 (B, H, N) in base 2."""
    B, N, H, D = q.shape
    if tiles.arch(q.device) == "sm_90" and not INTERPRETED:
        from . import attention_hopper, hopper  # Gluon is imported only where it runs

        if hopper.fits(q, k, v):
            return attention_hopper.attention_forward_hopper(q, k, v, causal, scale)
    out = torch.empty((B, N, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    if out.numel():
        tile = tiles.attention_tile(tiles.ATTENTION_FORWARD, q, all(map(is_aligned, (q, k, v))))
        tiles.require("attention_forward_kernel", tile, q, 2 * tile.BLOCK_N * D)
        attention_forward_kernel[(triton.cdiv(N, tile.BLOCK_M) * B * H,)](
            **view_args("q", q, tile.BLOCK_M, tile.tma),
            **view_args("k", k, tile.BLOCK_N, tile.tma),
            **view_args("v", v, tile.BLOCK_N, tile.tma),
            out=out, out_strides=out.stride()[:3], lse=lse,
            scale_log2=scale * LOG2E.value, N=N, H=H, HEADS=B * H, GROUP=heads_in_group(q),
            D=D, IS_CAUSAL=causal, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("igpt::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("attention", q, k, v)
    return attention_forward(_rows(q), _rows(k), _rows(v), causal, scale)


@attention_op.register_fake
def _(q, k, v, causal, scale):
    B, N, H, D = q.shape
    return q.new_empty((B, N, H, D)), q.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op("igpt::attention_backward", mutates_args=())
def attention_backward_op(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("attention_backward", dout, q, k, v)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    attention_backward(_rows(dout), _rows(q), _rows(k), _rows(v), out, lse, dq, dk, dv, causal, scale)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, causal, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@torch.library.custom_op("igpt::attention_packed", mutates_args=())
def attention_packed_op(qkv: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("attention_packed", qkv)
    return attention_forward(*_rows(qkv).unbind(2), causal, scale)


@attention_packed_op.register_fake
def _(qkv, causal, scale):
    B, N, _, H, D = qkv.shape
    return qkv.new_empty((B, N, H, D)), qkv.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op("igpt::attention_packed_backward", mutates_args=())
def attention_packed_backward_op(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    check_device("attention_packed_backward", dout, qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    attention_backward(_rows(dout), *_rows(qkv).unbind(2), out, lse, *dqkv.unbind(2), causal, scale)
    return dqkv


@attention_packed_backward_op.register_fake
def _(dout, qkv, out, lse, causal, scale):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    *qkv, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    return *attention_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


def _packed_backward(ctx, dout, _):
    return attention_packed_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


attention_op.register_autograd(_backward, setup_context=_setup)
attention_packed_op.register_autograd(_packed_backward, setup_context=_setup)


def _check(name: str, x: torch.Tensor, scale: float | None) -> float:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: got {x.dtype}, expected fp32, fp16 or bf16")
    D = x.shape[-1]
    if D % 16 or not 0 < D <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: got head dim {D}, expected a multiple of 16 up to {MAX_HEAD_DIM}")
    scale = D**-0.5 if scale is None else float(scale)
    # The maximum of s is scale times that of q k^T only for a positive scale.
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, expected a positive number")
    return scale


def attention(q, k, v, causal: bool, scale: float | None = None) -> torch.Tensor:
    """softmax(scale q k^T) v of views (B, N, H, D), scale 1/sqrt(D) by default -> (B, N, H, D) contiguous.

    Any strides; only a last dimension that is not contiguous costs a copy. Differentiable in q, k and v.
    Raises ValueError for another rank or dtype, a head dim that is no multiple of 16 up to 128, shapes or dtypes that
    differ, or a scale that is not positive."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, N, H, D)")
        if x.dtype != q.dtype or x.shape != q.shape:
            raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected q's {q.dtype} {tuple(q.shape)}")
    return attention_op(q, k, v, causal, _check("q", q, scale))[0]


def attention_packed(qkv, causal: bool, scale: float | None = None) -> torch.Tensor:
    """The same of one packed view (B, N, 3, H, D) -> (B, N, H, D); its gradient is one packed tensor too."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected (B, N, 3, H, D)")
    return attention_packed_op(qkv, causal, _check("qkv", qkv, scale))[0]
