"""The norm, alone or with the residual connection's sum in front of it.

    s = x + add, rounded to x's dtype (x itself without `add`)
    n = s * rsqrt(mean(s^2) + eps) * norm_weight          (centred: of s - mean(s))       (..., d), (d) -> (..., d)

With xhat = (s - mean) rstd and p = dn * norm_weight, backward is

    ds = rstd (p - xhat rowmean(p xhat) - [centred] rowmean(p)) + dres        dnorm_weight = sum_rows dn xhat

where dres is the gradient of s from everything else that reads it; ds is the gradient of both x and add. `stats` is
fp32 [1, M] = (rstd,) or, centred, [2, M] = (rstd, mean): all that backward needs besides s. The variance is that of
s - mean, in registers: two passes over a row but one over memory, so a large mean costs no digits.

The sum rides with the norm because a product that adds the residual itself (addmm) has the library copy it first: 6 d
bytes a token more than 4 d here. Backward can write n again for a weight's gradient: the bytes of reading it back, and
none between forward and backward.

dnorm_weight is the sum of one fp32 partial row a program, each over its own rows in order, then over programs in order:
no atomics, and the same bits in every run on the same GPU.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device, multiprocessors
from .launching import blocks, launch
from .registration import differentiable, operation
from .rows import as_rows, load_rows, store_rows, sum_partials, with_row_stride


@triton.jit
def norm_forward_kernel(
    x, add, gain, n, stats, s, M, d, stride_x, stride_add, eps,
    HAS_ADD: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_m < M)[:, None] & (o_d < d)[None, :]
    b_x = load_rows(x, o_m, o_d, m, stride_x)  # [BLOCK_M, BLOCK_D]
    if HAS_ADD:
        b_s = (b_x + load_rows(add, o_m, o_d, m, stride_add)).to(s.dtype.element_ty)
        store_rows(s, b_s, o_m, o_d, m, d)
        b_x = b_s.to(tl.float32)
    if IS_CENTRED:
        b_mean = tl.sum(b_x, 1) / d
        tl.store(stats + M + o_m, b_mean, mask=o_m < M)
        b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / d + eps)  # [BLOCK_M]
    tl.store(stats + o_m, b_rstd, mask=o_m < M)
    b_gain = tl.load(gain + o_d, mask=o_d < d, other=0.0).to(tl.float32)
    store_rows(n, b_x * b_rstd[:, None] * b_gain[None, :], o_m, o_d, m, d)


@triton.jit
def norm_backward_kernel(
    dn, x, gain, stats, dres, dx, n, partials, M, d, stride_dn, stride_x, stride_dres,
    HAS_DRES: tl.constexpr, HAS_N: tl.constexpr, IS_CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    b_gain = tl.load(gain + o_d, mask=o_d < d, other=0.0).to(tl.float32)[None, :]
    b_dgain = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_m in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m = (o_m < M)[:, None] & (o_d < d)[None, :]
        b_dn = load_rows(dn, o_m, o_d, m, stride_dn)  # [BLOCK_M, BLOCK_D]
        b_xhat = load_rows(x, o_m, o_d, m, stride_x)
        b_rstd = tl.load(stats + o_m, mask=o_m < M, other=0.0)[:, None]
        if IS_CENTRED:
            b_mean = tl.load(stats + M + o_m, mask=o_m < M, other=0.0)[:, None]
            b_xhat = tl.where(m, b_xhat - b_mean, 0.0)
        b_xhat *= b_rstd
        if HAS_N:
            store_rows(n, b_xhat * b_gain, o_m, o_d, m, d)
        b_dgain += b_dn * b_xhat
        b_dn *= b_gain
        b_dx = b_dn - b_xhat * (tl.sum(b_dn * b_xhat, 1) / d)[:, None]
        if IS_CENTRED:
            b_dx -= (tl.sum(b_dn, 1) / d)[:, None]
        b_dx *= b_rstd
        if HAS_DRES:
            b_dx += load_rows(dres, o_m, o_d, m, stride_dres)
        store_rows(dx, b_dx, o_m, o_d, m, d)
    tl.store(partials + tl.program_id(0) * d + o_d, tl.sum(b_dgain, 0), mask=o_d < d)


def _forward_outputs(x, add, gain, eps, centred):
    n = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty((1 + centred, x.numel() // x.shape[-1]), dtype=torch.float32)
    return n, stats, x.new_empty(0) if add is None else torch.empty_like(n)


@operation(
    "norm(Tensor x, Tensor? add, Tensor gain, float eps, bool centred) -> (Tensor, Tensor, Tensor)", _forward_outputs
)
def norm_op(x, add, gain, eps: float, centred: bool, n, stats, s) -> None:
    """x, add (..., d), M rows -> n (..., d), stats [1 or 2, M], s (..., d) (empty without `add`)."""
    M, d = stats.shape[1], x.shape[-1]
    tile = tiles.row_tile(tiles.NORM_FORWARD, arch(x.device), d)
    if M:
        x, stride_x = with_row_stride(x)
        add, stride_add = (None, 0) if add is None else with_row_stride(add)
        launch(
            norm_forward_kernel, (blocks(M, tile.BLOCK_M),),
            x=x, add=add, gain=gain.contiguous(), n=n, stats=stats, s=s, M=M, d=d,
            stride_x=stride_x, stride_add=stride_add, eps=eps,
            HAS_ADD=add is not None, IS_CENTRED=centred, BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _backward_outputs(dn, x, gain, stats, dres, write_n):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(gain), torch.empty_like(dn) if write_n else x.new_empty(0)


@operation(
    "norm_backward(Tensor dn, Tensor x, Tensor gain, Tensor stats, Tensor? dres, bool write_n) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_outputs,
)
def norm_backward_op(dn, x, gain, stats, dres, write_n: bool, dx, dgain, n) -> None:
    """dn [M, d], x, dres (..., d) -> dx (..., d), dgain [d], n [M, d] (empty unless `write_n`)."""
    M, d = dn.shape
    tile = tiles.row_tile(tiles.NORM_BACKWARD, arch(x.device), d)
    programs = min(blocks(M, tile.BLOCK_M), tile.programs * multiprocessors(x.device))
    partials = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    if M:
        x, stride_x = with_row_stride(x)
        dres, stride_dres = (None, 0) if dres is None else with_row_stride(dres)
        launch(
            norm_backward_kernel, (programs,),
            dn=dn, x=x, gain=gain.contiguous(), stats=stats, dres=dres, dx=dx, n=n, partials=partials, M=M, d=d,
            stride_dn=dn.stride(0), stride_x=stride_x, stride_dres=stride_dres,
            HAS_DRES=dres is not None, HAS_N=write_n, IS_CENTRED=stats.shape[0] == 2,
            BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    sum_partials(partials, dgain)


@differentiable
class Norm(torch.autograd.Function):
    """x (..., d), gain, eps, centred -> n (..., d), the norm's statistics."""

    @staticmethod
    def forward(x, gain, eps, centred):
        n, stats, _ = norm_op(x, None, gain, eps, centred)
        return n, stats

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[:2], outputs[1])
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dn, _):
        x, gain, stats = ctx.saved_tensors
        dx, dgain, _ = norm_backward_op(as_rows(dn), x, gain, stats, None, False)
        return dx, dgain, None, None


def norm(x, weight, eps: float = 1e-5, centred: bool = False):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; differentiable in x and weight.

    Raises ValueError for a weight of another shape or dtype, or a row too wide."""
    checks.norm("norm", x, None, weight, x.dtype)
    tiles.check_kernel_rows("norm", x)
    check_device("norm", x, weight)
    return Norm(x, weight, eps, centred)[0]
