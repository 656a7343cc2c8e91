"""The MLP half of a block, as a branch of the residual stream.

    s = x + add                                        (x itself without `add`)
    z = quick_gelu(norm(s) @ w_fc^T + b_fc) @ w_proj^T + b_proj        x, add, s, z (..., d), w_fc (f, d), w_proj (d, f)

u is the pre-activation, h = quick_gelu(u), both (T, f) for T tokens; f is 4 d in the paper. The next norm adds z to s
(kernels/norm.py), so that no pass is spent on the sum. Backward:

    dh = dz @ w_proj,   du = dh * quick_gelu'(u),   dn = du @ w_fc,   ds from dn and the gradient that came to s

Saved for backward: s, the statistics, u, and h unless `recompute` (then backward's elementwise pass, which reads u in
any case, writes h again: 8 d bytes more of traffic for 8 d bytes a token less held). n is never saved. Nothing is saved
when no gradient is asked for. Products are the vendor's; elementwise arithmetic and sums are fp32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device
from .launching import blocks, launch
from .norm import norm_backward_op, norm_op
from .primitives import quick_gelu, quick_gelu_grad
from .registration import differentiable, operation
from .rows import as_rows


@triton.jit
def quick_gelu_kernel(u, h, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_u = tl.load(u + o, mask=o < numel, other=0.0).to(tl.float32)
    tl.store(h + o, quick_gelu(b_u).to(h.dtype.element_ty), mask=o < numel)


@triton.jit
def quick_gelu_backward_kernel(u, dh, du, h, numel, HAS_H: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_u = tl.load(u + o, mask=o < numel, other=0.0).to(tl.float32)
    b_dh = tl.load(dh + o, mask=o < numel, other=0.0).to(tl.float32)
    tl.store(du + o, (b_dh * quick_gelu_grad(b_u)).to(du.dtype.element_ty), mask=o < numel)
    if HAS_H:
        tl.store(h + o, quick_gelu(b_u).to(h.dtype.element_ty), mask=o < numel)


@operation("quick_gelu(Tensor u) -> Tensor", torch.empty_like)
def quick_gelu_op(u, h) -> None:
    tile = tiles.elementwise_tile(arch(u.device))
    if u.numel():
        launch(
            quick_gelu_kernel, (blocks(u.numel(), tile.BLOCK_N),),
            u=u, h=h, numel=u.numel(), BLOCK=tile.BLOCK_N, num_warps=tile.num_warps, num_stages=tile.num_stages
        )


def _written_again(u, dh, write_h):
    return torch.empty_like(u) if write_h else u.new_empty(0)


@operation("quick_gelu_backward_(Tensor u, Tensor(a!) dh, bool write_h) -> Tensor", _written_again)
def quick_gelu_backward_op(u, dh, write_h: bool, h) -> None:
    """dh becomes du; returns h = quick_gelu(u), empty unless `write_h`."""
    tile = tiles.elementwise_tile(arch(u.device))
    if u.numel():
        launch(
            quick_gelu_backward_kernel, (blocks(u.numel(), tile.BLOCK_N),),
            u=u, dh=dh, du=dh, h=h, numel=u.numel(), HAS_H=write_h, BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


@differentiable
class NormMLP(torch.autograd.Function):
    """x, add (..., d), gain, w_fc, w_proj, b_fc, b_proj, eps, centred, kept -> z, s (..., d), the norm's statistics and
    what is kept for backward (else empty): 2 u and h, 1 u, 0 neither."""

    @staticmethod
    def forward(x, add, gain, w_fc, w_proj, b_fc, b_proj, eps, centred, kept):
        n, stats, s = norm_op(x, add, gain, eps, centred)
        u = F.linear(n, w_fc, b_fc)
        h = quick_gelu_op(u)
        z, s = F.linear(h, w_proj, b_proj), x.view_as(x) if add is None else s
        return z, s, stats, u if kept else x.new_empty(0), h if kept == 2 else x.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, add, gain, w_fc, w_proj, b_fc, b_proj, *_ = inputs
        _, s, *kept = outputs
        ctx.save_for_backward(x if add is None else s, gain, w_fc, w_proj, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.has_add, ctx.has_b_fc, ctx.has_b_proj = (t is not None for t in (add, b_fc, b_proj))

    @staticmethod
    def backward(ctx, dz, dres, *_):
        if dz is None:
            return dres, dres if ctx.has_add else None, *[None] * 8
        s, gain, w_fc, w_proj, stats, u, h = ctx.saved_tensors
        dz, recompute = as_rows(dz), h.shape != u.shape
        du = dz @ w_proj
        again = quick_gelu_backward_op(u, du, recompute)
        ds, dgain, n = norm_backward_op(du @ w_fc, s, gain, stats, dres, True)
        dw_fc, dw_proj = du.t() @ n, dz.t() @ as_rows(again if recompute else h)
        db_fc = du.sum(0) if ctx.has_b_fc else None
        db_proj = dz.sum(0) if ctx.has_b_proj else None
        return ds, ds if ctx.has_add else None, dgain, dw_fc, dw_proj, db_fc, db_proj, None, None, None


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None, eps: float = 1e-5, centred: bool = False,
    recompute: bool = False, add=None, through: bool = False,
):  # fmt: skip
    """s + quick_gelu(norm(s) @ w_fc^T + b_fc) @ w_proj^T + b_proj, s = x + add: (..., d) -> (..., d), differentiable in
    all of them.

    through: return the two summands, (branch, s): the next norm's `add` and x. recompute: keep u but not quick_gelu(u)
    for backward. Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    checks.norm_mlp(x, add, norm_weight, w_fc, w_proj, b_fc, b_proj, x.dtype)
    tiles.check_kernel_rows("norm_mlp", x)
    check_device("norm_mlp", x, add, norm_weight, w_fc, w_proj, b_fc, b_proj)
    tensors = x, add, norm_weight, w_fc, w_proj, b_fc, b_proj
    is_training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    z, s, *_ = NormMLP(*tensors, eps, centred, (1 if recompute else 2) if is_training else 0)
    return (z, s) if through else s + z
