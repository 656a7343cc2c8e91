"""Rows rounded to 8 bits, each by a power of two of its own: what kernels/fp8.py multiplies.

    scale = the least 2^n with max |x| <= 448 * 2^n              n >= -126; NaN for a row that is not finite
    q = x / scale, rounded to e4m3                               x (M, K) of any strides -> q (M, K), scale fp32 (M, 1)

Two passes over a block of rows: the largest magnitude, then the rounding, which finds the rows in L2. Magnitudes are
compared as integers, the bits of their fp32, whose order is theirs and in which inf and NaN are the largest. Reads 2
bytes an element and writes 1; no FLOPs of products. A transposed matrix (a weight's columns) is read along its memory
and written along the rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device
from .fp8 import E4M3, product
from .launching import blocks, launch
from .registration import operation

EXPONENT = tl.constexpr(0x7F800000)  # of the bits of fp32; also inf
BELOW_448 = tl.constexpr(0x1FFFFF)  # 2^23 less the mantissa of 448 = 1.75 * 2^8, less 1: carries what is above it
EIGHT = tl.constexpr(8 << 23)
LEAST = tl.constexpr(9 << 23)  # 2^-118, whose scale is the least normal number
INVERSE = tl.constexpr(254 << 23)  # less the bits of a power of two: those of its inverse


@triton.jit
def load_tile(x, o_m, o_k, M, K, stride_m, stride_k):
    """fp32 [BLOCK_M, BLOCK_K], 0 outside of x."""
    p = x + o_m[:, None].to(tl.int64) * stride_m + o_k[None, :].to(tl.int64) * stride_k
    return tl.load(p, mask=(o_m < M)[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def quantize_rows_kernel(
    x, q, scale, M, K, stride_m, stride_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_top = tl.zeros([BLOCK_M], tl.int32)
    for i_k in range(0, K, BLOCK_K):
        b_x = load_tile(x, o_m, i_k + tl.arange(0, BLOCK_K), M, K, stride_m, stride_k)
        b_top = tl.maximum(b_top, tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    b_exponent = ((tl.maximum(b_top, LEAST) + BELOW_448) & EXPONENT) - EIGHT
    b_nan = tl.where(b_top < EXPONENT, 0.0, float("nan"))
    b_inverse = (-b_exponent + INVERSE).to(tl.float32, bitcast=True) + b_nan
    tl.store(scale + o_m, b_exponent.to(tl.float32, bitcast=True) + b_nan, mask=o_m < M)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_q = load_tile(x, o_m, o_k, M, K, stride_m, stride_k) * b_inverse[:, None]
        p = q + o_m[:, None].to(tl.int64) * K + o_k[None, :]
        tl.store(p, b_q.to(q.dtype.element_ty), mask=(o_m < M)[:, None] & (o_k < K)[None, :])


def _outputs(x):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((len(x), 1), dtype=torch.float32)


@operation("quantize_rows(Tensor x) -> (Tensor, Tensor)", _outputs)
def quantize_rows_op(x, q, scale) -> None:
    """x (M, K) -> q (M, K) in e4m3, scale fp32 (M, 1)."""
    M, K = x.shape
    tile = tiles.quantize_tile(arch(x.device), x.stride(1) == 1)
    if M:
        launch(
            quantize_rows_kernel, (blocks(M, tile.BLOCK_M),),
            x=x, q=q, scale=scale, M=M, K=K, stride_m=x.stride(0), stride_k=x.stride(1),
            BLOCK_M=tile.BLOCK_M, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def quantize_rows(x):
    """fp32, bf16 or fp16 (M, K), of any strides -> e4m3 (M, K) and fp32 (M, 1): x is about their product. Not
    differentiable.

    A row with an inf or a NaN has the scale NaN. Raises ValueError for another shape or dtype, on AMD's GPUs and on
    Nvidia's before sm_89."""
    checks.quantize_rows(x)
    check_device("quantize_rows", x)
    checks.fp8_device("quantize_rows", x.device)
    return quantize_rows_op(x)


def linear(x, weight, bias, fp8: bool):
    """x @ weight^T + bias by the vendor, in x's dtype or in 8 bits (kernels/fp8.py)."""
    return product(x, weight, bias, quantize_rows_op) if fp8 else F.linear(x, weight, bias)


def linear_backward(dy, weight, fp8: bool):
    """dy @ weight, the gradient of x, in the same way."""
    return product(dy, weight.t(), None, quantize_rows_op) if fp8 else dy @ weight
