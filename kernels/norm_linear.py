"""The products at the two ends of a block's attention: into it through the norm, out of it onto the residual stream.

    norm_linear     : y = norm(x) @ weight^T + bias            x (..., d), weight (out, d) -> (..., out)
    linear_residual : y = residual + a @ weight^T + bias       a (..., in), weight (out, in) -> (..., out)

T tokens. FLOPs: 2 T d out forward, 4 T d out backward, for either. Bytes in 16 bits, weights apart:

    norm_linear      forward: the norm 4 d, the product 2 (d + out)
                     backward: dn = dy @ weight 2 (out + d); the norm's dx, with n written again, 8 d (10 d with dres);
                     dweight = dy^T @ n 2 (out + d)
    linear_residual  forward: 2 in + 2 out and the residual, 2 out, or 6 out where addmm copies it first
                     backward: two products, 4 (out + in); the residual's gradient is dy itself

Saved for backward: x, a, the weights, and 4 bytes a token of statistics (8 centred). n is not saved: the backward pass
over x that makes dx writes it again (kernels/rows.py). Products accumulate in fp32 in the vendor's library; n is
rounded to x's dtype before its product, as eager PyTorch does. Deterministic where the library is.
"""

import torch

from . import rows
from .primitives import check_device


def normed_product_backward(dy, x, gain, weight, stats, dres=None):
    """dy [M, out], x, dres [M, d] -> dx (dres added), dgain, dweight of y = norm(x) @ weight^T."""
    dx, dgain, n = rows.norm_backward(dy @ weight, x, gain, stats, dres, write_n=True)
    return dx, dgain, dy.t() @ n


@torch.library.custom_op("igpt::norm_linear", mutates_args=())
def norm_linear_op(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("norm_linear", x, gain, weight, bias)
    n, stats = rows.norm_forward(rows.as_rows(x), gain, eps, centred)
    y = n @ weight.t() if bias is None else torch.addmm(bias, n, weight.t())
    return y.view(*x.shape[:-1], -1), stats


@norm_linear_op.register_fake
def _(x, gain, weight, bias, eps, centred):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty((1 + centred, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("igpt::norm_linear_backward", mutates_args=())
def norm_linear_backward_op(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("norm_linear_backward", dy, x, gain, weight)
    dy = rows.as_rows(dy)
    dx, dgain, dweight = normed_product_backward(dy, rows.as_rows(x), gain, weight, stats)
    return dx.view(x.shape), dgain, dweight, rows.column_sums(dy, bias)


@norm_linear_backward_op.register_fake
def _(dy, x, gain, weight, bias, stats):
    return x.new_empty(x.shape), gain.new_empty(gain.shape), weight.new_empty(weight.shape), dy.new_empty(
        0 if bias is None else bias.shape
    )


def _norm_linear_setup(ctx, inputs, output):
    x, gain, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, gain, weight, bias, output[1])
    ctx.has_bias = bias is not None


def _norm_linear_backward(ctx, dy, _):
    dx, dgain, dweight, dbias = norm_linear_backward_op(dy, *ctx.saved_tensors)
    return dx, dgain, dweight, dbias if ctx.has_bias else None, None, None


norm_linear_op.register_autograd(_norm_linear_backward, setup_context=_norm_linear_setup)


@torch.library.custom_op("igpt::linear_residual", mutates_args=())
def linear_residual_op(
    a: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    check_device("linear_residual", a, weight, residual, bias)
    residual = residual.reshape(-1, weight.shape[0])
    residual = residual if bias is None else residual + bias
    return torch.addmm(residual, rows.as_rows(a), weight.t()).view(*a.shape[:-1], -1)


@linear_residual_op.register_fake
def _(a, weight, residual, bias):
    return a.new_empty(residual.shape)


@torch.library.custom_op("igpt::linear_residual_backward", mutates_args=())
def linear_residual_backward_op(
    dy: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_device("linear_residual_backward", dy, a, weight)
    dy = rows.as_rows(dy)
    return (dy @ weight).view(a.shape), dy.t() @ rows.as_rows(a), rows.column_sums(dy, bias)


@linear_residual_backward_op.register_fake
def _(dy, a, weight, bias):
    return a.new_empty(a.shape), weight.new_empty(weight.shape), dy.new_empty(0 if bias is None else bias.shape)


def _linear_residual_setup(ctx, inputs, output):
    a, weight, _, bias = inputs
    ctx.save_for_backward(a, weight, bias)
    ctx.has_bias = bias is not None


def _linear_residual_backward(ctx, dy):
    da, dweight, dbias = linear_residual_backward_op(dy, *ctx.saved_tensors)
    return da, dweight, dy, dbias if ctx.has_bias else None


linear_residual_op.register_autograd(_linear_residual_backward, setup_context=_linear_residual_setup)


def norm_linear(x, norm_weight, weight, bias=None, eps: float = 1e-5, centred: bool = False):
    """norm(x) @ weight^T + bias: (..., d) -> (..., out). Differentiable in x, norm_weight, weight and bias.

    Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    rows.check_norm("norm_linear", x, norm_weight)
    rows.check_operand("norm_linear", "weight", weight, x.dtype, (None, x.shape[-1]))
    rows.check_operand("norm_linear", "bias", bias, x.dtype, weight.shape[:1])
    return norm_linear_op(x, norm_weight, weight, bias, eps, centred)[0]


def linear_residual(a, weight, residual, bias=None):
    """residual + a @ weight^T + bias: (..., in) -> (..., out). Differentiable in all four.

    Raises ValueError naming the argument for a wrong shape or dtype: all are in a's dtype."""
    rows.check_operand("linear_residual", "weight", weight, a.dtype, (None, a.shape[-1]))
    rows.check_operand("linear_residual", "residual", residual, a.dtype, (*a.shape[:-1], weight.shape[0]))
    rows.check_operand("linear_residual", "bias", bias, a.dtype, weight.shape[:1])
    return linear_residual_op(a, weight, residual, bias)
