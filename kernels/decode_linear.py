"""One decoding step's products: few rows against every weight, at the speed the weights arrive from memory.

    y = act(norm(x) @ weight^T + bias)                decode_norm_linear     (B, K), (O, K) -> (B, O)
    y = residual + a @ weight^T + bias                decode_linear_residual

A program owns BLOCK_N output features and all of K for BLOCK_M pictures; the rows of a small batch are padded to the 16
that a matrix instruction takes, whose cost is nothing beside the weights' bytes. The residual stream x is fp32 or the
weights' dtype; products take operands in the weights' dtype and accumulate in fp32, as do norm, bias, activation and
residual. int8 weights carry one fp32 scale an output channel, are exact in bf16 and are scaled after the sum.

The released norm folds: rstd * ((x * gain) @ weight^T), sum(x^2) from the same loop over x. The centred one, and fp16
whose range x * gain might leave, take their statistics in loops over x beforehand. gain None: already in the weight.

Floor: O K bytes of weights (2 O K in 16 bits) once; each program reads x again from L2. No gradients.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device
from .launching import launch
from .primitives import quick_gelu
from .registration import operation


@triton.jit
def load_x(x, o_b, o_k, B, K):
    m = (o_b < B)[:, None] & (o_k < K)[None, :]
    return tl.load(x + o_b[:, None].to(tl.int64) * K + o_k[None, :], mask=m, other=0.0)


@triton.jit
def statistics(x, o_b, B, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, IS_CENTRED: tl.constexpr):
    """mean (0 unless centred) and rstd of whole rows, [BLOCK_M] each."""
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    if IS_CENTRED:
        for i_k in range(0, K, BLOCK_K):
            b_mean += tl.sum(load_x(x, o_b, i_k + tl.arange(0, BLOCK_K), B, K).to(tl.float32), 1)
        b_mean /= K
    b_var = tl.zeros([BLOCK_M], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = load_x(x, o_b, o_k, B, K).to(tl.float32) - b_mean[:, None]
        b_var += tl.sum(tl.where((o_k < K)[None, :], b_x * b_x, 0.0), 1)
    return b_mean, tl.rsqrt(b_var / K + eps)


@triton.jit
def linear_kernel(
    x, gain, weight, scale, bias, residual, y, B, O, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr, IS_FOLDED: tl.constexpr, HAS_GAIN: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_NORM and not IS_FOLDED:
        b_mean, b_rstd = statistics(x, o_b, B, K, eps, BLOCK_M, BLOCK_K, IS_CENTRED)
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_w = (o_o < O)[:, None] & (o_k < K)[None, :]
        b_w = tl.load(weight + o_o[:, None].to(tl.int64) * K + o_k[None, :], mask=m_w, other=0)  # [BLOCK_N, BLOCK_K]
        b_x = load_x(x, o_b, o_k, B, K)  # [BLOCK_M, BLOCK_K]
        if HAS_NORM:
            b_x = b_x.to(tl.float32)
            if IS_FOLDED:
                b_squares += tl.sum(b_x * b_x, 1)
            else:
                b_x = (b_x - b_mean[:, None]) * b_rstd[:, None]
            if HAS_GAIN:
                b_x *= tl.load(gain + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
        b_y = tl.dot(b_x.to(OPERAND), b_w.to(OPERAND).T, b_y, input_precision=PRECISION)
    if IS_FOLDED:
        b_y *= tl.rsqrt(b_squares / K + eps)[:, None]
    if HAS_SCALE:
        b_y *= tl.load(scale + o_o, mask=o_o < O, other=0.0)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)[None, :]
    if HAS_GELU:
        b_y = quick_gelu(b_y)
    o_y = o_b[:, None].to(tl.int64) * O + o_o[None, :]
    m_y = (o_b < B)[:, None] & (o_o < O)[None, :]
    if HAS_RESIDUAL:
        b_y += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_y)


OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@operation(
    "decode_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, str norm, Tensor? gain, "
    "float eps, bool gelu, ScalarType dtype) -> Tensor",
    lambda x, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
)
def decode_linear_op(x, weight, scale, bias, residual, norm: str, gain, eps: float, gelu: bool, dtype, y) -> None:
    """y (B, O) in `dtype`. norm: "" (none), "rms" or "layer"."""
    (B, K), O = x.shape, weight.shape[0]
    operand = torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype
    tile = tiles.decode_linear_tile(arch(x.device), operand.itemsize, B)
    launch(
        linear_kernel, (triton.cdiv(O, tile.BLOCK_N), triton.cdiv(B, tile.BLOCK_M)),
        x=x.contiguous(), gain=gain, weight=weight.contiguous(), scale=scale, bias=bias,
        residual=None if residual is None else residual.contiguous(), y=y, B=B, O=O, K=K, eps=eps,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, OPERAND=OPERANDS[operand],
        HAS_NORM=norm != "", IS_CENTRED=norm == "layer", IS_FOLDED=norm == "rms" and operand != torch.float16,
        HAS_GAIN=gain is not None, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_GELU=gelu, PRECISION="ieee" if operand == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def check(name: str, x, weight, scale, vectors: dict) -> None:
    if x.dim() != 2 or x.dtype not in OPERANDS:
        raise ValueError(f"{name}: x: got {x.dtype} {tuple(x.shape)}, expected fp32, fp16 or bf16 (B, K)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype not in (*OPERANDS, torch.int8):
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"{name}: weight: got {got}, expected floats or int8 (O, {x.shape[1]})")
    if (scale is None) == (weight.dtype == torch.int8):
        raise ValueError(f"{name}: scale: got {'None' if scale is None else 'one'} for {weight.dtype} weights")
    checks.operand(name, "scale", scale, (weight.shape[0],), torch.float32)
    for argument, (vector, size) in vectors.items():
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name}: {argument}: got {tuple(vector.shape)}, expected ({size},)")


def decode_norm_linear(
    x, norm_weight, weight, bias=None, *, scale=None, eps: float = 1e-5, centred: bool = False, gelu: bool = False,
    dtype: torch.dtype | None = None,
):  # fmt: skip
    """norm(x) @ weight^T + bias, then quick_gelu if `gelu`: x (B, K), weight (O, K) -> (B, O).

    norm_weight (K) may be None (folded into the weight). int8 weights need `scale` (O) fp32. dtype: of the result;
    default the weights', bf16 for int8. Raises ValueError for operands that don't fit."""
    vectors = {"norm_weight": (norm_weight, x.shape[-1]), "bias": (bias, len(weight))}
    check("decode_norm_linear", x, weight, scale, vectors)
    dtype = dtype or (torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype)
    norm = "layer" if centred else "rms"
    check_device("decode_linear", x, weight)
    return decode_linear_op(x, weight, scale, bias, None, norm, norm_weight, eps, gelu, dtype)


def decode_linear_residual(a, weight, residual, bias=None, *, scale=None):
    """residual + a @ weight^T + bias: a (B, K), weight (O, K), residual (B, O) -> (B, O) in the residual's dtype.

    int8 weights need `scale` (O) fp32. Raises ValueError for operands that don't fit."""
    check("decode_linear_residual", a, weight, scale, {"bias": (bias, len(weight))})
    checks.operand("decode_linear_residual", "residual", residual, (a.shape[0], len(weight)), residual.dtype)
    check_device("decode_linear", a, weight)
    return decode_linear_op(a, weight, scale, bias, residual, "", None, 0.0, False, residual.dtype)
