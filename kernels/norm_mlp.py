"""The MLP half of a block, as a branch of the residual stream.

    s = x + add                                        (x itself without `add`)
    z = gelu(norm(s) @ w_fc^T + b_fc) @ w_proj^T + b_proj              x, add, s, z (..., d), w_fc (f, d), w_proj (d, f)

gelu is the quick one (Image GPT) or the exact one (ViT); u its argument, h = gelu(u), both (T, f) for T tokens; f is
4 d in the papers. The next norm adds z to s (kernels/norm.py), so that no pass is spent on the sum. Backward:

    dh = dz @ w_proj,   du = dh * gelu'(u),   dn = du @ w_fc,   ds from dn and the gradient that came to s

Saved for backward: s, the statistics, u, and h unless `recompute` (then backward's elementwise pass, which reads u in
any case, writes h again: 8 d bytes more of traffic for 8 d bytes a token less held). n is never saved. Nothing is saved
when no gradient is asked for. Products are the vendor's; elementwise arithmetic and sums are fp32.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device
from .launching import blocks, launch
from .norm import norm_backward_op, norm_op
from .primitives import gelu, gelu_grad, quick_gelu, quick_gelu_grad
from .quantize import linear, linear_backward
from .registration import differentiable, operation
from .rows import as_rows


@triton.jit
def gelu_kernel(u, h, numel, IS_EXACT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_u = tl.load(u + o, mask=o < numel, other=0.0).to(tl.float32)
    b_h = gelu(b_u) if IS_EXACT else quick_gelu(b_u)
    tl.store(h + o, b_h.to(h.dtype.element_ty), mask=o < numel)


@triton.jit
def gelu_backward_kernel(u, dh, du, h, numel, IS_EXACT: tl.constexpr, HAS_H: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_u = tl.load(u + o, mask=o < numel, other=0.0).to(tl.float32)
    b_dh = tl.load(dh + o, mask=o < numel, other=0.0).to(tl.float32)
    b_du = b_dh * (gelu_grad(b_u) if IS_EXACT else quick_gelu_grad(b_u))
    tl.store(du + o, b_du.to(du.dtype.element_ty), mask=o < numel)
    if HAS_H:
        b_h = gelu(b_u) if IS_EXACT else quick_gelu(b_u)
        tl.store(h + o, b_h.to(h.dtype.element_ty), mask=o < numel)


@operation("gelu(Tensor u, bool exact) -> Tensor", lambda u, exact: torch.empty_like(u))
def gelu_op(u, exact: bool, h) -> None:
    tile = tiles.elementwise_tile(arch(u.device))
    if u.numel():
        launch(
            gelu_kernel, (blocks(u.numel(), tile.BLOCK_N),),
            u=u, h=h, numel=u.numel(), IS_EXACT=exact, BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _written_again(u, dh, exact, write_h):
    return torch.empty_like(u) if write_h else u.new_empty(0)


@operation("gelu_backward_(Tensor u, Tensor(a!) dh, bool exact, bool write_h) -> Tensor", _written_again)
def gelu_backward_op(u, dh, exact: bool, write_h: bool, h) -> None:
    """dh becomes du; returns h = gelu(u), empty unless `write_h`."""
    tile = tiles.elementwise_tile(arch(u.device))
    if u.numel():
        launch(
            gelu_backward_kernel, (blocks(u.numel(), tile.BLOCK_N),),
            u=u, dh=dh, du=dh, h=h, numel=u.numel(), IS_EXACT=exact, HAS_H=write_h, BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


@differentiable
class NormMLP(torch.autograd.Function):
    """x, add (..., d), gain, w_fc, w_proj, b_fc, b_proj, eps, centred, exact, fp8, kept -> z, s (..., d), the norm's
    statistics and what is kept for backward (else empty): 2 u and h, 1 u, 0 neither."""

    @staticmethod
    def forward(x, add, gain, w_fc, w_proj, b_fc, b_proj, eps, centred, exact, fp8, kept):
        n, stats, s = norm_op(x, add, gain, eps, centred)
        u = linear(n, w_fc, b_fc, fp8)
        h = gelu_op(u, exact)
        z, s = linear(h, w_proj, b_proj, fp8), x.view_as(x) if add is None else s
        return z, s, stats, u if kept else x.new_empty(0), h if kept == 2 else x.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, add, gain, w_fc, w_proj, b_fc, b_proj, *_, ctx.exact, ctx.fp8, _ = inputs
        _, s, *kept = outputs
        ctx.save_for_backward(x if add is None else s, gain, w_fc, w_proj, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.has_add, ctx.has_b_fc, ctx.has_b_proj = (t is not None for t in (add, b_fc, b_proj))

    @staticmethod
    def backward(ctx, dz, dres, *_):
        if dz is None:
            return dres, dres if ctx.has_add else None, *[None] * 10
        s, gain, w_fc, w_proj, stats, u, h = ctx.saved_tensors
        dz, recompute = as_rows(dz), h.shape != u.shape
        du = linear_backward(dz, w_proj, ctx.fp8)
        again = gelu_backward_op(u, du, ctx.exact, recompute)
        ds, dgain, n = norm_backward_op(linear_backward(du, w_fc, ctx.fp8), s, gain, stats, dres, True)
        dw_fc, dw_proj = du.t() @ n, dz.t() @ as_rows(again if recompute else h)
        db_fc = du.sum(0) if ctx.has_b_fc else None
        db_proj = dz.sum(0) if ctx.has_b_proj else None
        return ds, ds if ctx.has_add else None, dgain, dw_fc, dw_proj, db_fc, db_proj, *[None] * 5


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None, eps: float = 1e-5, centred: bool = False,
    recompute: bool = False, add=None, through: bool = False, activation: str = "quick_gelu", fp8: bool = False,
):  # fmt: skip
    """s + activation(norm(s) @ w_fc^T + b_fc) @ w_proj^T + b_proj, s = x + add: (..., d) -> (..., d), differentiable in
    all of them. activation: "quick_gelu", x sigmoid(1.702 x), or "gelu", the exact one.

    through: return the two summands, (branch, s): the next norm's `add` and x. recompute: keep the activation's
    argument but not its result for backward. fp8: both products, and backward's with the weights, in 8 bits
    (kernels/fp8.py). Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    checks.norm_mlp(x, add, norm_weight, w_fc, w_proj, b_fc, b_proj, activation, x.dtype)
    tiles.check_kernel_rows("norm_mlp", x)
    check_device("norm_mlp", x, add, norm_weight, w_fc, w_proj, b_fc, b_proj)
    if fp8:
        checks.fp8("norm_mlp", x, w_fc)
    tensors = x, add, norm_weight, w_fc, w_proj, b_fc, b_proj
    is_training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    kept = (1 if recompute else 2) if is_training else 0
    z, s, *_ = NormMLP(*tensors, eps, centred, activation == "gelu", fp8, kept)
    return (z, s) if through else s + z
