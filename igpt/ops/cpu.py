"""The torch path's blocks on a CPU, as four hand-written autograd functions over oneDNN's products.

Why not F.linear: its fp32 products go to MKL, which on AMD processors stops at AVX2 (measured on 2 Zen 5 cores, 1024 x
512 x 2048: 203 GFLOP/s, against 480 through oneDNN, which `torch.ops.mkldnn._linear_pointwise` reaches; the same op
that torch.compile emits); on Intel's they do stay with MKL (kernels/choose.py). Why not autograd: on a CPU each fresh
8 MB tensor costs its page faults, so the backward here reuses its buffers, and the activation and the residual ride in
the products' epilogues where oneDNN has one.

For fp32 and bf16 in eager mode; kernels/choose.py sends everything else to plain PyTorch. Saved for backward: x, the
rows' statistics, the MLP's pre-activation and, unless `recompute`, activation. Statistics and the norm's
gradients are fp32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from igpt.kernels.choose import HAS_ONEDNN, mkl
from igpt.kernels.reference import QUICK_GELU, wide

_linear = torch.ops.mkldnn._linear_pointwise if HAS_ONEDNN else None


class Activation(NamedTuple):
    """activation(h) = function(scale h) / scale."""

    scale: float
    function: Callable
    in_place: Callable
    backward: Callable  # (gradient, pre, grad_input=)
    epilogue: str  # oneDNN's name for it


aten = torch.ops.aten
ACTIVATIONS = {
    "quick_gelu": Activation(QUICK_GELU, F.silu, aten.silu_, aten.silu_backward.grad_input, "swish"),
    "gelu": Activation(1.0, F.gelu, aten.gelu_, aten.gelu_backward.grad_input, "gelu"),
}


def product(a, weight, bias=None, act: Activation | None = None):
    """a @ weight^T + bias for 2-D operands of any strides, and the activation's function of it."""
    if mkl(a):
        y = torch.mm(a, weight.t()) if bias is None else torch.addmm(bias, a, weight.t())
        return y if act is None else act.in_place(y)
    return _linear(a, weight, bias, act.epilogue if act else "none", [], "none")  # gelu without approximation


def transposed_product(a, b):
    """a^T @ b, of (rows, m) and (rows, n): a weight's gradient. oneDNN's op would copy a^T; torch.mm, in bf16 oneDNN
    too, reads it where it is, and where fp32's is not to be MKL's the narrower of the two is copied."""
    if a.dtype == torch.bfloat16 or mkl(a):
        return torch.mm(a.t(), b)
    return product(a.t(), b.t()) if a.shape[1] <= b.shape[1] else product(b.t(), a.t()).t()


def _normalise(x, gain, eps, centred):
    """(n, mean, rstd): n = (x - mean) rstd gain in x's dtype; fp32 statistics. Without `centred` there is no mean; with
    it, it is ATen's layer norm, one pass over x."""
    if centred:  # of 16 bits it would keep the statistics in 16, and sum dgain in them
        n, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], wide(gain), None, eps)
        return n.to(x.dtype), mean, rstd
    h = wide(x)
    rstd = torch.rsqrt(torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
    return (h * rstd).mul_(gain).to(x.dtype), None, rstd


def _again(x, gain, mean, rstd, eps):
    """n once more, for a weight's gradient: cheaper than to have kept it."""
    if mean is not None:
        return torch.native_layer_norm(wide(x), x.shape[-1:], wide(gain), None, eps)[0].to(x.dtype)
    return (wide(x) * rstd).mul_(gain).to(x.dtype)


def _normalise_backward(dn, x, gain, mean, rstd):
    """(dx, dgain), both fp32: dx = rstd (gain dn - xhat rowdot(gain dn, xhat) / d), less its mean if centred."""
    if mean is not None:
        tensors = wide(dn), wide(x), x.shape[-1:], mean, rstd, wide(gain), None
        return torch.ops.aten.native_layer_norm_backward(*tensors, [True, True, False])[:2]
    dn, xhat = wide(dn), wide(x) * rstd
    product = dn * xhat
    dgain = product.sum(0)
    rowdot = product.mul_(gain).sum(-1, keepdim=True).div_(x.shape[-1])
    return (dn * gain).sub_(xhat.mul_(rowdot)).mul_(rstd), dgain


class Norm(Function):
    @staticmethod
    def forward(ctx, x, gain, eps, centred):
        n, *stats = _normalise(x, gain, eps, centred)
        ctx.save_for_backward(x, gain, *stats)
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx, dn):
        x, gain, *stats = ctx.saved_tensors
        dx, dgain = _normalise_backward(dn, x, gain, *stats)
        return dx.to(x.dtype), dgain.to(gain.dtype), None, None


class Linear(Function):
    @staticmethod
    def forward(ctx, a, weight, bias):
        ctx.save_for_backward(a, weight)
        ctx.has_bias = bias is not None
        return product(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, weight = ctx.saved_tensors
        return product(dy, weight.t()), transposed_product(dy, a), dy.sum(0) if ctx.has_bias else None


class NormLinear(Function):
    @staticmethod
    def forward(ctx, x, gain, weight, bias, eps, centred):
        n, *stats = _normalise(x, gain, eps, centred)
        ctx.save_for_backward(x, gain, weight, *stats)
        ctx.has_bias, ctx.eps = bias is not None, eps
        return product(n, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gain, weight, *stats = ctx.saved_tensors
        dweight = transposed_product(dy, _again(x, gain, *stats, ctx.eps))
        dx, dgain = _normalise_backward(product(dy, weight.t()), x, gain, *stats)
        return dx.to(x.dtype), dgain.to(gain.dtype), dweight, dy.sum(0) if ctx.has_bias else None, None, None


class NormMLP(Function):
    """The activation's scale rides in the norm's gain (and fc's bias) and, inverted, in the sum with the residual.
    Without `training` nothing is kept and its function runs in the product's epilogue, where there is one."""

    @staticmethod
    def forward(ctx, x, gain, w_fc, w_proj, b_fc, b_proj, eps, centred, activation, training, recompute):
        act = ACTIVATIONS[activation]
        n, *stats = _normalise(x, gain * act.scale, eps, centred)
        bias = None if b_fc is None else b_fc * act.scale
        if training:
            pre = product(n, w_fc, bias)
            hidden = act.function(pre)
            ctx.save_for_backward(x, gain, w_fc, w_proj, pre, None if recompute else hidden, *stats)
            ctx.has_bias, ctx.eps, ctx.act = (b_fc is not None, b_proj is not None), eps, act
        else:
            hidden = product(n, w_fc, bias, act)
        y = product(hidden, w_proj)
        y = (y if act.scale == 1 else y.mul_(1 / act.scale)).add_(x)
        return y if b_proj is None else y.add_(b_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gain, w_fc, w_proj, pre, hidden, *stats = ctx.saved_tensors
        act = ctx.act
        hidden = act.function(pre) if hidden is None else hidden
        dz = dy if act.scale == 1 else dy * (1 / act.scale)
        dw_proj = transposed_product(dz, hidden)
        dpre = product(dz, w_proj.t())
        act.backward(dpre, pre, grad_input=dpre)
        scaled = gain * act.scale
        dw_fc = transposed_product(dpre, _again(x, scaled, *stats, ctx.eps))
        dx, dgain = _normalise_backward(product(dpre, w_fc.t()), x, scaled, *stats)
        db_fc = dpre.sum(0).mul_(act.scale) if ctx.has_bias[0] else None
        db_proj = dy.sum(0) if ctx.has_bias[1] else None
        dx, dgain = dx.add_(dy).to(x.dtype), dgain.mul_(act.scale).to(gain.dtype)
        return dx, dgain, dw_fc, dw_proj, db_fc, db_proj, None, None, None, None, None
