"""The MLP half of a block.

    y = x + quick_gelu(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj        x (..., d), w_fc (f, d), w_proj (d, f)

u is the pre-activation, h = quick_gelu(u), both (T, f) for T tokens; f is 4 d in the paper. FLOPs: 4 T d f forward,
8 T d f backward, all in products. Bytes of a token in 16 bits in the plain form, f = 4 d, weights apart:

    forward  : norm 4 d, n @ w_fc^T 10 d, quick-gelu 16 d, h @ w_proj^T with the residual 16 d
    backward : dh = dy @ w_proj 10 d, quick-gelu's 24 d (32 d when it writes h again), dn = du @ w_fc 10 d, the norm's
               dx with dy added and n written again 10 d, two weight gradients 20 d

In the folded form (kernels/gemm.py, kernels/tiles.py FORMS; not for the centred norm) the elementwise passes are gone:

    forward  : statistics 2 d (0 with `squares`), x @ W'^T with u and h written 18 d, the residual's product 12 d
    backward : dy @ w_proj with u read and dus written 18 d, dus @ W' with x and dy read 14 d, weight gradients 20 d

or 32 d against 46 d, and 52 d against 74 d. Floor of either: max(FLOPs / peak, bytes / bandwidth).

Saved for backward: x, the statistics, u, and h unless `recompute` (then backward's elementwise pass, which reads u in
any case, writes h again: 8 d bytes more of traffic for 8 d bytes a token less held; the folded form needs a pass of
16 d for it). n is never saved (kernels/rows.py). Nothing is saved when no gradient is asked for. Elementwise
arithmetic and sums are fp32.
"""

import torch
import triton
import triton.language as tl

from . import gemm, rows, tiles
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


def folded_backward(dy, x, gain, w_fc, w_proj, stats, u):
    """dx, dgain, dw_fc without an elementwise pass: kernels/gemm.py derives it."""
    (M, d), f = x.shape, w_fc.shape[0]
    partials = gemm.empty_partials(M, f, x.device)
    dus = gemm.product(dy, w_proj, is_kn=True, epilogue="gelu_grad", u=u, row=stats, partials=partials)
    row = gemm.norm_grad_row(partials, stats, d)
    dx = gemm.product(dus, w_fc * gain, is_kn=True, epilogue="norm_grad", u=x, row=row, r=dy)
    dw_fc, dgain = gemm.unfold_gain(dus.t() @ x, w_fc, gain)
    return dx, dgain, dw_fc


@torch.library.custom_op("igpt::norm_mlp", mutates_args=())
def norm_mlp_op(
    x: torch.Tensor, gain: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor,
    b_fc: torch.Tensor | None, b_proj: torch.Tensor | None, squares: torch.Tensor | None, eps: float, centred: bool,
    form: str, emit_squares: bool, keep_u: bool, keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, its squares, stats, and u and h where they are kept for backward (else empty)."""
    check_device("norm_mlp", x, gain, w_fc, w_proj, b_fc, b_proj, squares)
    rows_x = rows.as_rows(x)
    folded = gemm.is_folded(form, "norm_mlp", x, w_fc, centred=centred)
    if folded:
        stats = gemm.rstd_of(rows_x, gain, squares, eps)
        u = torch.empty((rows_x.shape[0], w_fc.shape[0]), dtype=x.dtype, device=x.device) if keep_u else None
        h = gemm.product(rows_x, w_fc * gain, epilogue="gelu", row=stats, bias=b_fc, z=u)
    else:
        n, stats = rows.norm_forward(rows_x, gain, eps, centred)
        u = n @ w_fc.t() if b_fc is None else torch.addmm(b_fc, n, w_fc.t())
        h = quick_gelu_forward(u, torch.empty_like(u) if keep_u else u)
    y, squares = gemm.product_residual(h, w_proj, rows_x, b_proj, folded or emit_squares, emit_squares)
    return y.view(x.shape), squares, stats, u if keep_u else x.new_empty(0), h if keep_h else x.new_empty(0)


@norm_mlp_op.register_fake
def _(x, gain, w_fc, w_proj, b_fc, b_proj, squares, eps, centred, form, emit_squares, keep_u, keep_h):
    M = x.numel() // x.shape[-1]
    wide = (M, w_fc.shape[0])
    stats = x.new_empty((1 + centred, M), dtype=torch.float32)
    kept = (x.new_empty(wide if keep else 0) for keep in (keep_u, keep_h))
    return x.new_empty(x.shape), gemm.empty_squares(x, emit_squares), stats, *kept


@torch.library.custom_op("igpt::norm_mlp_backward", mutates_args=())
def norm_mlp_backward_op(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor,
    b_fc: torch.Tensor | None, b_proj: torch.Tensor | None, stats: torch.Tensor, u: torch.Tensor, h: torch.Tensor,
    form: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("norm_mlp_backward", dy, x, gain, w_fc, w_proj)
    dy, rows_x = rows.as_rows(dy), rows.as_rows(x)
    recompute = h.shape != u.shape
    h = torch.empty_like(u) if recompute else h
    # With a bias the row's dot would be that of du with u - b_fc, one operand too many for the epilogue's registers.
    if b_fc is None and gemm.is_folded(form, "norm_mlp", x, w_fc, centred=stats.shape[0] == 2):
        if recompute:
            quick_gelu_forward(u, h)
        dx, dgain, dw_fc = folded_backward(dy, rows_x, gain, w_fc, w_proj, stats, u)
        db_fc = rows.column_sums(dy, None)
    else:
        du = quick_gelu_backward(u, dy @ w_proj, h if recompute else None)
        dx, dgain, n = rows.norm_backward(du @ w_fc, rows_x, gain, stats, dres=dy, write_n=True)
        dw_fc, db_fc = du.t() @ n, rows.column_sums(du, b_fc)
    return dx.view(x.shape), dgain, dw_fc, dy.t() @ h, db_fc, rows.column_sums(dy, b_proj)


@norm_mlp_backward_op.register_fake
def _(dy, x, gain, w_fc, w_proj, b_fc, b_proj, stats, u, h, form):
    biases = [x.new_empty(0 if b is None else b.shape) for b in (b_fc, b_proj)]
    return x.new_empty(x.shape), *(w.new_empty(w.shape) for w in (gain, w_fc, w_proj)), *biases


def _setup(ctx, inputs, output):
    tensors, (_, _, *kept) = inputs[:6], output
    ctx.save_for_backward(*tensors, *kept)
    ctx.has_bias, ctx.form = [b is not None for b in tensors[4:]], inputs[9]
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    *gradients, db_fc, db_proj = norm_mlp_backward_op(dy, *ctx.saved_tensors, ctx.form)
    biases = [g if has else None for g, has in zip((db_fc, db_proj), ctx.has_bias)]
    return *gradients, *biases, *[None] * 7


norm_mlp_op.register_autograd(_backward, setup_context=_setup)


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None, eps: float = 1e-5, centred: bool = False,
    form: str | None = None, recompute: bool = False, squares=None, emit_squares: bool = False,
):  # fmt: skip
    """x + quick_gelu(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj: (..., d) -> (..., d), differentiable in all six.

    form: "plain", "folded" or the table's choice. recompute: keep u but not quick_gelu(u) for backward. squares: of x,
    from the operation that wrote it; emit_squares: also return those of y (kernels/norm_linear.py).
    Raises ValueError naming the argument for a wrong shape or dtype: all are in x's dtype."""
    rows.check_norm("norm_mlp", x, norm_weight)
    d, f = x.shape[-1], w_fc.shape[0]
    for name, t, shape in (
        ("w_fc", w_fc, (None, d)), ("w_proj", w_proj, (d, f)), ("b_fc", b_fc, (f,)), ("b_proj", b_proj, (d,))
    ):  # fmt: skip
        rows.check_operand("norm_mlp", name, t, x.dtype, shape)
    gemm.check_squares("norm_mlp", squares, x)
    form = gemm.check_form("norm_mlp", form, w_fc, centred=centred)
    if emit_squares:
        gemm.check_form("norm_mlp", "folded", w_fc)  # of the last product alone
    tensors = (x, norm_weight, w_fc, w_proj, b_fc, b_proj)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, squares_y, *_ = norm_mlp_op(*tensors, squares, eps, centred, form, emit_squares, keep, keep and not recompute)
    return (y, squares_y.detach()) if emit_squares else y
