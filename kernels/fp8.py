"""Products in 8 bits: both operands rounded to e4m3, each row by a scale of its own, and multiplied by the vendor.

    y = (q_x q_w^T) * scale_x scale_w^T            x (T, k), w (n, k): q in e4m3, scales fp32 (T, 1), (n, 1)

Scales are powers of two: dividing by them is exact, and e4m3 keeps 3 bits of mantissa whatever the scale, down to 2^-13
of a row's largest at least. They are made of the tensor at hand: there is no state to warm up, save or resume.

Of a layer's three products two are in 8 bits: y = x @ w^T, and dx = dy @ w, whose w is rounded by columns. The weight's
gradient dw = dy^T @ x sums over all tokens, would need both operands rounded a second time, by columns, and what it
loses is never averaged away; it keeps its dtype. Weights are the caller's own, as ever; nothing is kept in 8 bits.

A block multiplies 16 d numbers a token in 8 bits, forward and backward, and rounding each reads 2 bytes and writes 1:
48 d bytes, against 2/3 of 72 d^2 FLOPs at another pace. On an H200 that eats what S gains (d = 512) and leaves L (1536)
most of it, by arithmetic alone: bench/gpu_todo.md.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

E4M3 = torch.float8_e4m3fn


def product(x, weight, bias, quantize):
    """x @ weight^T + bias in 8 bits: bf16 (..., k), (n, k) -> (..., n); quantize(rows) -> (e4m3, scale)."""
    (a, scale_a), (b, scale_b) = quantize(x.reshape(-1, x.shape[-1])), quantize(weight)
    # Sums of so few bits lose nothing to the tensor cores' own accumulators.
    y = torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), bias, out_dtype=x.dtype, use_fast_accum=True)
    return y.view(*x.shape[:-1], len(weight))


class Linear(Function):
    """The same with its gradients: x, weight, bias, quantize -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, quantize):
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.quantize = bias is not None, quantize
        return product(x, weight, bias, quantize)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, dbias = dy.reshape(-1, dy.shape[-1]), None
        if ctx.has_bias:
            dbias = rows.sum(0)
        return product(dy, weight.t(), None, ctx.quantize), rows.t() @ x.reshape(-1, x.shape[-1]), dbias, None
