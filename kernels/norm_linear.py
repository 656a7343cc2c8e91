"""The products at the two ends of a block's attention: into it through the norm, out of it onto the residual stream.

    norm_linear     : y = norm(x) @ weight^T + bias            x (..., d), weight (out, d) -> (..., out)
    linear_residual : y = residual + a @ weight^T + bias       a (..., in), weight (out, in) -> (..., out)

T tokens. FLOPs: 2 T d out forward, 4 T d out backward, for either. Bytes in 16 bits, weights apart:

    norm_linear      forward: the norm 4 d, the product 2 (d + out)
                     backward: dn = dy @ weight 2 (out + d); the norm's dx, with n written again, 8 d (10 d with the
                     residual's gradient added, which autograd would do in a pass of 6 d);
                     dweight = dy^T @ n 2 (out + d)
    linear_residual  forward: 2 in + 2 out and the residual, 2 out, or 6 out where addmm copies it first
                     backward: two products, 4 (out + in); the residual's gradient is dy itself

A norm kernel, the vendor's products, the residual in addmm's beta. Folding the norm and the residual into products of
our own gained nothing (docs/tried.md).

Saved for backward: x, a, the weights, and 4 bytes a token of statistics (8 centred). n is not saved: the backward pass
over x that makes dx writes it again (kernels/rows.py). Products accumulate in fp32 in the vendor's library; n is
rounded to x's dtype before its product, as eager PyTorch does. Deterministic where the library is.
"""

import torch

from . import rows
from .primitives import check_device


@torch.library.custom_op("igpt::norm_linear", mutates_args=())
def norm_linear_op(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    eps: float, centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
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
    dy: torch.Tensor, dres: torch.Tensor | None, x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("norm_linear_backward", dy, dres, x, gain, weight)
    dy, dres = rows.as_rows(dy), None if dres is None else rows.as_rows(dres)
    dx, dgain, n = rows.norm_backward(dy @ weight, rows.as_rows(x), gain, stats, dres, write_n=True)
    return dx.view(x.shape), dgain, dy.t() @ n, rows.column_sums(dy, bias)


@norm_linear_backward_op.register_fake
def _(dy, dres, x, gain, weight, bias, stats):
    gradients = [t.new_empty(t.shape) for t in (x, gain, weight)]
    return *gradients, dy.new_empty(0 if bias is None else bias.shape)


def _norm_linear_setup(ctx, inputs, output):
    x, gain, weight, bias, *_ = inputs
    ctx.save_for_backward(x, gain, weight, bias, output[1])
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _norm_linear_backward(ctx, dy, _):
    dx, dgain, dweight, dbias = norm_linear_backward_op(dy, None, *ctx.saved_tensors)
    return dx, dgain, dweight, dbias if ctx.has_bias else None, None, None


norm_linear_op.register_autograd(_norm_linear_backward, setup_context=_norm_linear_setup)


class NormLinearThrough(torch.autograd.Function):
    """(y, x): x goes on to the residual connection from here, so that its gradient comes back here and is added in the
    pass that makes dx. Autograd would add the two in a pass of its own: 6 d bytes a token. An operator's outputs may
    not alias its inputs, hence a Function around the operators."""

    @staticmethod
    def forward(ctx, x, gain, weight, bias, *options):
        y, stats = norm_linear_op(x, gain, weight, bias, *options)
        ctx.save_for_backward(x, gain, weight, bias, stats)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dres):
        if dy is None:
            return dres, *[None] * 5
        saved = ctx.saved_tensors  # once: a checkpointed block unpacks them but one time
        dx, dgain, dweight, dbias = norm_linear_backward_op(dy, dres, *saved)
        return dx, dgain, dweight, None if saved[3] is None else dbias, None, None


@torch.library.custom_op("igpt::linear_residual", mutates_args=())
def linear_residual_op(
    a: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    check_device("linear_residual", a, weight, residual, bias)
    added = residual if bias is None else residual + bias
    return torch.addmm(rows.as_rows(added), rows.as_rows(a), weight.t()).view(residual.shape)


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


def norm_linear(x, norm_weight, weight, bias=None, eps: float = 1e-5, centred: bool = False, through: bool = False):
    """norm(x) @ weight^T + bias: (..., d) -> (..., out). Differentiable in x, norm_weight, weight and bias.

    through: return (y, x), for a residual connection to read x from, whose gradient then costs no pass of its own.
    Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    rows.check_norm("norm_linear", x, norm_weight)
    rows.check_operand("norm_linear", "weight", weight, x.dtype, (None, x.shape[-1]))
    rows.check_operand("norm_linear", "bias", bias, x.dtype, weight.shape[:1])
    arguments = x, norm_weight, weight, bias, eps, centred
    if through and torch.is_grad_enabled():
        return NormLinearThrough.apply(*arguments)
    y, _ = norm_linear_op(*arguments)
    return (y, x) if through else y


def linear_residual(a, weight, residual, bias=None):
    """residual + a @ weight^T + bias: (..., in) -> (..., out). Differentiable in all four.

    Raises ValueError naming the argument for a wrong shape or dtype: all are in a's dtype."""
    rows.check_operand("linear_residual", "weight", weight, a.dtype, (None, a.shape[-1]))
    rows.check_operand("linear_residual", "residual", residual, a.dtype, (*a.shape[:-1], weight.shape[0]))
    rows.check_operand("linear_residual", "bias", bias, a.dtype, weight.shape[:1])
    return linear_residual_op(a, weight, residual, bias)
