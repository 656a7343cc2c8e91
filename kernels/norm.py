"""The norm on its own: probe features, and wherever no product follows.

    y = x * rsqrt(mean(x^2) + eps) * weight          (centred: of x - mean(x))        (..., d), (d) -> (..., d)

Kernels, formulas, bytes and determinism: kernels/rows.py. Saved for backward: x and `stats` (4 bytes a row, 8 when
centred). Floor: forward 4 d bytes a row in 16 bits, backward 6 d; the arithmetic is free beside them.
"""

import torch

from . import rows
from .primitives import check_device


@torch.library.custom_op("igpt::norm", mutates_args=())
def norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("norm", x, weight)
    y, stats = rows.norm_forward(rows.as_rows(x), weight, eps, centred)
    return y.view(x.shape), stats


@norm_op.register_fake
def _(x, weight, eps, centred):
    rows_of = x.numel() // x.shape[-1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (1 + centred, rows_of), dtype=torch.float32
    )


@torch.library.custom_op("igpt::norm_backward", mutates_args=())
def norm_backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("norm_backward", dy, x, weight)
    dx, dweight, _ = rows.norm_backward(rows.as_rows(dy), rows.as_rows(x), weight, stats)
    return dx.view(x.shape), dweight


@norm_backward_op.register_fake
def _(dy, x, weight, stats):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    return *norm_backward_op(dy, *ctx.saved_tensors), None, None


norm_op.register_autograd(_backward, setup_context=_setup)


def norm(x, weight, eps: float = 1e-5, centred: bool = False):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; differentiable in x and weight.

    Raises ValueError for a weight of another shape or dtype, or a row too wide."""
    rows.check_norm("norm", x, weight)
    return norm_op(x, weight, eps, centred)[0]
