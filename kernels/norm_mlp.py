"""The MLP half of a block.

    y = x + quick_gelu(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj        x (..., d), w_fc (f, d), w_proj (d, f)

u is the pre-activation, h = quick_gelu(u), both (T, f) for T tokens; f is 4 d in the paper. FLOPs: 4 T d f forward,
8 T d f backward, all in products. Bytes of a token in 16 bits, f = 4 d, weights apart:

    forward  : norm 4 d, n @ w_fc^T 10 d, quick-gelu 16 d, h @ w_proj^T with the residual 16 d
    backward : dh = dy @ w_proj 10 d, quick-gelu's 24 d (32 d when it writes h again), dn = du @ w_fc 10 d, the norm's
               dx with dy added and n written again 10 d, two weight gradients 20 d

Saved for backward: x, the statistics, u, and h unless `recompute` (then backward's elementwise pass, which reads u in
any case, writes h again: 8 d bytes more of traffic for 8 d bytes a token less held). n is never saved
(kernels/rows.py). Nothing is saved when no gradient is asked for. Elementwise arithmetic and sums are fp32.
"""

import torch
import triton
import triton.language as tl

from . import rows, tiles
from .primitives import check_device, quick_gelu, quick_gelu_grad


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


def quick_gelu_forward(u, h):
    """h = quick_gelu(u), contiguous; h may be u."""
    tile = tiles.elementwise_tile(tiles.arch(u.device))
    if u.numel():
        quick_gelu_kernel[(triton.cdiv(u.numel(), tile.BLOCK_N),)](
            u, h, numel=u.numel(), BLOCK=tile.BLOCK_N, num_warps=tile.num_warps, num_stages=tile.num_stages
        )
    return h


def quick_gelu_backward(u, dh, h=None):
    """dh becomes du, in place; h, if given, becomes quick_gelu(u)."""
    tile = tiles.elementwise_tile(tiles.arch(u.device))
    if u.numel():
        quick_gelu_backward_kernel[(triton.cdiv(u.numel(), tile.BLOCK_N),)](
            u, dh, dh, h, numel=u.numel(), HAS_H=h is not None, BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dh


@torch.library.custom_op("igpt::norm_mlp", mutates_args=())
def norm_mlp_op(
    x: torch.Tensor, gain: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor,
    b_fc: torch.Tensor | None, b_proj: torch.Tensor | None, eps: float, centred: bool, keep_u: bool, keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, stats, and u and h where they are kept for backward (else empty)."""
    check_device("norm_mlp", x, gain, w_fc, w_proj, b_fc, b_proj)
    rows_x = rows.as_rows(x)
    n, stats = rows.norm_forward(rows_x, gain, eps, centred)
    u = n @ w_fc.t() if b_fc is None else torch.addmm(b_fc, n, w_fc.t())
    h = quick_gelu_forward(u, torch.empty_like(u) if keep_u else u)
    y = torch.addmm(rows_x if b_proj is None else rows_x + b_proj, h, w_proj.t())
    return y.view(x.shape), stats, u if keep_u else x.new_empty(0), h if keep_h else x.new_empty(0)


@norm_mlp_op.register_fake
def _(x, gain, w_fc, w_proj, b_fc, b_proj, eps, centred, keep_u, keep_h):
    M = x.numel() // x.shape[-1]
    wide = (M, w_fc.shape[0])
    stats = x.new_empty((1 + centred, M), dtype=torch.float32)
    return x.new_empty(x.shape), stats, *(x.new_empty(wide if keep else 0) for keep in (keep_u, keep_h))


@torch.library.custom_op("igpt::norm_mlp_backward", mutates_args=())
def norm_mlp_backward_op(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor,
    b_fc: torch.Tensor | None, b_proj: torch.Tensor | None, stats: torch.Tensor, u: torch.Tensor, h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("norm_mlp_backward", dy, x, gain, w_fc, w_proj)
    dy, rows_x = rows.as_rows(dy), rows.as_rows(x)
    recompute = h.shape != u.shape
    h = torch.empty_like(u) if recompute else h
    du = quick_gelu_backward(u, dy @ w_proj, h if recompute else None)
    dx, dgain, n = rows.norm_backward(du @ w_fc, rows_x, gain, stats, dres=dy, write_n=True)
    dw_fc, db_fc = du.t() @ n, rows.column_sums(du, b_fc)
    return dx.view(x.shape), dgain, dw_fc, dy.t() @ h, db_fc, rows.column_sums(dy, b_proj)


@norm_mlp_backward_op.register_fake
def _(dy, x, gain, w_fc, w_proj, b_fc, b_proj, stats, u, h):
    biases = [x.new_empty(0 if b is None else b.shape) for b in (b_fc, b_proj)]
    return x.new_empty(x.shape), *(w.new_empty(w.shape) for w in (gain, w_fc, w_proj)), *biases


def _setup(ctx, inputs, output):
    tensors, (_, *kept) = inputs[:6], output
    ctx.save_for_backward(*tensors, *kept)
    ctx.has_bias = [b is not None for b in tensors[4:]]
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    *gradients, db_fc, db_proj = norm_mlp_backward_op(dy, *ctx.saved_tensors)
    biases = [g if has else None for g, has in zip((db_fc, db_proj), ctx.has_bias)]
    return *gradients, *biases, *[None] * 4


norm_mlp_op.register_autograd(_backward, setup_context=_setup)


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None, eps: float = 1e-5, centred: bool = False,
    recompute: bool = False,
):  # fmt: skip
    """x + quick_gelu(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj: (..., d) -> (..., d), differentiable in all six.

    recompute: keep u but not quick_gelu(u) for backward.
    Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    rows.check_norm("norm_mlp", x, norm_weight)
    d, f = x.shape[-1], w_fc.shape[0]
    for name, t, shape in (
        ("w_fc", w_fc, (None, d)), ("w_proj", w_proj, (d, f)), ("b_fc", b_fc, (f,)), ("b_proj", b_proj, (d,))
    ):  # fmt: skip
        rows.check_operand("norm_mlp", name, t, x.dtype, shape)
    tensors = (x, norm_weight, w_fc, w_proj, b_fc, b_proj)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return norm_mlp_op(*tensors, eps, centred, keep, keep and not recompute)[0]
