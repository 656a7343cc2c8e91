"""One decoding step's products for few pictures: matrix times vector, at the speed the weights arrive from memory.

    y = act(norm(x) @ weight^T + bias)                decode_norm_linear     (B, K), (O, K) -> (B, O)
    y = residual + a @ weight^T + bias                decode_linear_residual

A program owns BLOCK_N output features and holds all K columns of their weights in registers, fetched before it waits
for what the earlier kernels wrote (kernels/decode_chain.py); then it takes one picture after another. Weights are read
once, whatever B, and 1 byte each in int8, with one fp32 scale an output channel; x and the partial sums come from L2.
Products and sums are fp32, in one order for every B: a lane's columns of each chunk, then lanes and warps in a tree, so
that errors don't grow with K as those of one long sum do.

The norm folds: rstd (x @ weight^T), with sum(x^2) of the program's own copy of x; its gain is in the weight. The
centred norm subtracts the mean from that copy first. What attention left as parts (kernels/decode_attention.py) every
program joins for itself.

Floor: O K bytes of weights (2 O K in 16 bits). No gradients.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .decode_chain import launch_chained, release, wait
from .device import check_device
from .primitives import quick_gelu
from .registration import operation


@triton.jit
def load_weights(weight, o_o, O: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows o_o in chunks of columns: a tuple of [BLOCK_N, BLOCK_K]. No other program reads them: first out of L2."""
    p = weight + o_o[:, None].to(tl.int64) * K
    chunks = ()
    for i_k in tl.static_range(0, K, BLOCK_K):
        o_k = (i_k + tl.arange(0, BLOCK_K))[None, :]
        if O % BLOCK_N == 0 and K % BLOCK_K == 0:
            b_w = tl.load(p + o_k, eviction_policy="evict_first")
        else:
            b_w = tl.load(p + o_k, mask=(o_o < O)[:, None] & (o_k < K), other=0, eviction_policy="evict_first")
        chunks = chunks + (b_w,)
    return chunks


@triton.jit
def load_joined(partial, maxima, sums, o_k, K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr):
    """Columns of attention's output from the parts [SPLITS, K] of a picture's splits of keys."""
    o_s, m = tl.arange(0, SPLITS)[:, None], (o_k < K)[None, :]
    o_h = o_s * HEADS + (o_k // (K // HEADS))[None, :]
    b_max = tl.load(maxima + o_h, mask=m, other=0.0)
    b_fade = tl.exp2(b_max - tl.max(b_max, 0)[None, :])
    b_sum = tl.sum(tl.load(sums + o_h, mask=m, other=1.0) * b_fade, 0)
    return tl.sum(tl.load(partial + o_s * K + o_k[None, :], mask=m, other=0.0) * b_fade, 0) / b_sum


@triton.jit
def linear_kernel(
    x, maxima, sums, weight, scale, bias, residual, y, B, eps,
    O: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_GELU: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, IS_EARLY: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    release(IS_EARLY, IS_CHAINED)
    o_o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_o = o_o < O
    b_w = load_weights(weight, o_o, O, K, BLOCK_N, BLOCK_K)
    if scale is not None:
        b_scale = tl.load(scale + o_o, mask=m_o, other=0.0)
    if bias is not None:
        b_bias = tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)
    wait(IS_EARLY, IS_CHAINED)
    for i_b in tl.range(0, B, num_stages=STAGES):
        if residual is not None:
            b_residual = tl.load(residual + i_b * O + o_o, mask=m_o, other=0.0).to(tl.float32)
        if IS_CENTRED:
            b_total = tl.zeros([BLOCK_K], tl.float32)
            for i_k in tl.static_range(0, K, BLOCK_K):
                o_k = i_k + tl.arange(0, BLOCK_K)
                b_total += tl.load(x + i_b * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            mean = tl.sum(b_total, 0) / K
        for i_k in tl.static_range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            if SPLITS > 0:
                i_part = i_b * SPLITS
                b_x = load_joined(x + i_part * K, maxima + i_part * HEADS, sums + i_part * HEADS, o_k, K, HEADS, SPLITS)
            else:
                b_x = tl.load(x + i_b * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            if IS_CENTRED:
                b_x = tl.where(o_k < K, b_x - mean, 0.0)
            b_wx = b_w[i_k // BLOCK_K].to(tl.float32) * b_x[None, :]
            if i_k == 0:
                b_y, b_squares = b_wx, b_x * b_x
            else:
                b_y, b_squares = b_y + b_wx, b_squares + b_x * b_x
        b_sum = tl.sum(b_y, 1)
        if HAS_NORM:
            b_sum *= tl.rsqrt(tl.sum(b_squares, 0) / K + eps)
        if scale is not None:
            b_sum *= b_scale
        if bias is not None:
            b_sum += b_bias
        if HAS_GELU:
            b_sum = quick_gelu(b_sum)
        if residual is not None:
            b_sum += b_residual
        tl.store(y + i_b * O + o_o, b_sum.to(y.dtype.element_ty), mask=m_o)


@operation(
    "decode_linear(Tensor x, Tensor? maxima, Tensor? sums, Tensor weight, Tensor? scale, Tensor? bias, "
    "Tensor? residual, str norm, float eps, bool gelu, ScalarType dtype) -> Tensor",
    lambda x, maxima, sums, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
)
def decode_linear_op(x, maxima, sums, weight, scale, bias, residual, norm: str, eps, gelu: bool, dtype, y) -> None:
    """y (B, O) in `dtype` of x (B, K), or of attention's parts (B, splits, H, D) with their maxima and sums (B, splits,
    H). norm: "" (none), "rms" or "layer"."""
    O, K = weight.shape
    splits, heads = maxima.shape[1:] if maxima is not None else (0, 1)
    tile = tiles.decode_linear_tile("join" if splits else "gelu" if gelu else "norm" if norm else "add", K)
    launch_chained(
        x.device, linear_kernel, (triton.cdiv(O, tile.BLOCK_N),),
        x=x.contiguous(), maxima=maxima, sums=sums, weight=weight.contiguous(),
        scale=scale if scale is None else scale.contiguous(), bias=bias if bias is None else bias.contiguous(),
        residual=None if residual is None else residual.contiguous(), y=y, B=x.shape[0], eps=eps,
        O=O, K=K, HEADS=heads, SPLITS=splits, HAS_NORM=norm != "", IS_CENTRED=norm == "layer", HAS_GELU=gelu,
        BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, STAGES=tile.num_stages, IS_EARLY=tile.early,
        num_warps=tile.num_warps,
    )  # fmt: skip


def check(name: str, K: int, weight, scale, bias) -> None:
    if weight.dim() != 2 or weight.shape[1] != K or weight.dtype not in (*tiles.FLOATS, torch.int8):
        checks.refuse(name, "weight", checks.said(weight), f"fp32, fp16, bf16 or int8 (any, {K})")
    if K > tiles.MAX_COLUMNS:
        checks.refuse(name, "weight", f"{K} columns", f"at most {tiles.MAX_COLUMNS}: a program holds them in registers")
    if (scale is None) == (weight.dtype == torch.int8):
        checks.refuse(name, "scale", scale if scale is None else checks.said(scale), "one for int8 weights, else None")
    checks.operand(name, "scale", scale, (len(weight),), torch.float32)
    checks.operand(name, "bias", bias, (len(weight),))


def decode_norm_linear(
    x, weight, bias=None, *, scale=None, eps: float = 1e-5, centred: bool = False, gelu: bool = False,
    dtype: torch.dtype | None = None,
):  # fmt: skip
    """norm(x) @ weight^T + bias, then quick_gelu if `gelu`: x (B, K), weight (O, K) -> (B, O). The norm's gain is the
    weight's business.

    int8 weights need `scale` (O) fp32. dtype: of the result; default the weights', bf16 for int8. Raises ValueError for
    operands that don't fit."""
    if x.dim() != 2 or x.dtype not in tiles.FLOATS:
        checks.refuse("decode_norm_linear", "x", checks.said(x), "fp32, fp16 or bf16 (B, K)")
    check("decode_norm_linear", x.shape[1], weight, scale, bias)
    dtype = dtype or (torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype)
    check_device("decode_norm_linear", x, weight)
    return decode_linear_op(x, None, None, weight, scale, bias, None, "layer" if centred else "rms", eps, gelu, dtype)


def decode_linear_residual(a, weight, residual, bias=None, *, scale=None):
    """residual + a @ weight^T + bias: weight (O, K), residual (B, O) -> (B, O) in the residual's dtype. a: (B, K), or
    the three tensors of `decode_attention_parts`.

    int8 weights need `scale` (O) fp32. Raises ValueError for operands that don't fit."""
    x, maxima, sums = a if isinstance(a, tuple) else (a, None, None)
    if x.dim() != (2 if maxima is None else 4) or x.dtype not in tiles.FLOATS:
        checks.refuse("decode_linear_residual", "a", checks.said(x), "floats (B, K), or attention's parts")
    check("decode_linear_residual", x.shape[1] if maxima is None else x[0, 0].numel(), weight, scale, bias)
    checks.operand("decode_linear_residual", "residual", residual, (len(x), len(weight)))
    check_device("decode_linear_residual", x, weight, residual)
    return decode_linear_op(x, maxima, sums, weight, scale, bias, residual, "", 0.0, False, residual.dtype)
