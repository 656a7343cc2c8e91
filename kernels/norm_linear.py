"""The product at the head of attention, behind its norm and the residual connection's sum.

    s = x + add                                        (x itself without `add`)
    y = norm(s) @ weight^T + bias                      x, add, s (..., d), weight (out, d) -> (..., out)

A row kernel and the vendor's product (kernels/norm.py; folding the norm into a product of our own gained nothing:
docs/tried.md). s goes on to the next residual connection, and its gradient comes back here, where the kernel that makes
ds adds it: autograd would add the two in a pass of its own, 6 d bytes a token.

Saved for backward: s, the weights, and 4 bytes a token of statistics (8 centred). n = norm(s) is not saved: the pass
over s that makes ds writes it again for dweight = dy^T @ n. Products accumulate in fp32 in the vendor's library; n is
rounded to x's dtype before its product, as eager PyTorch does. Deterministic where the library is.
"""

import torch

from . import checks, tiles
from .device import check_device
from .norm import norm_backward_op, norm_op
from .quantize import linear, linear_backward
from .registration import differentiable
from .rows import as_rows


@differentiable
class NormLinear(torch.autograd.Function):
    """x, add (..., d), gain, weight, bias, eps, centred, fp8 -> y (..., out), s (..., d), the norm's statistics."""

    @staticmethod
    def forward(x, add, gain, weight, bias, eps, centred, fp8):
        n, stats, s = norm_op(x, add, gain, eps, centred)
        return linear(n, weight, bias, fp8), x.view_as(x) if add is None else s, stats

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, add, gain, weight, bias, *_, ctx.fp8 = inputs
        _, s, stats = outputs
        ctx.save_for_backward(x if add is None else s, gain, weight, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.has_add, ctx.has_bias = add is not None, bias is not None

    @staticmethod
    def backward(ctx, dy, dres, _):
        if dy is None:
            return dres, dres if ctx.has_add else None, *[None] * 6
        s, gain, weight, stats = ctx.saved_tensors
        dy = as_rows(dy)
        ds, dgain, n = norm_backward_op(linear_backward(dy, weight, ctx.fp8), s, gain, stats, dres, True)
        dbias = dy.sum(0) if ctx.has_bias else None
        return ds, ds if ctx.has_add else None, dgain, dy.t() @ n, dbias, None, None, None


def norm_linear(
    x, norm_weight, weight, bias=None, eps: float = 1e-5, centred: bool = False, add=None, through: bool = False,
    fp8: bool = False,
):  # fmt: skip
    """norm(x + add) @ weight^T + bias: (..., d) -> (..., out). Differentiable in all of them.

    through: return (y, x + add), for the next residual connection: its gradient then costs no pass of its own. fp8: the
    product, and backward's with the weight, in 8 bits (kernels/fp8.py).
    Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    checks.norm_linear(x, add, norm_weight, weight, bias, x.dtype)
    tiles.check_kernel_rows("norm_linear", x)
    check_device("norm_linear", x, add, norm_weight, weight, bias)
    if fp8:
        checks.fp8("norm_linear", x, weight)
    y, s, _ = NormLinear(x, add, norm_weight, weight, bias, eps, centred, fp8)
    return (y, s) if through else y
