"""Row kernels shared by the operations that contain a norm. They move bytes; all of their arithmetic is fp32.

    xhat = (x - mean) rstd,  rstd = rsqrt(mean((x - mean)^2) + eps),  n = xhat * gain        mean = 0 unless centred
    dx   = rstd (p - xhat rowmean(p xhat) - [centred] rowmean(p)) + dres,  p = dn * gain,    dgain = sum_rows dn xhat

Matrices are [M, d] with any row stride and contiguous columns. `stats` is fp32 [1, M] = (rstd,) or, centred, [2, M] =
(rstd, mean): all that backward needs besides x. The variance is that of x - mean, in registers: two passes over a row
but one over memory, so a large mean costs no digits.

Bytes of a token in 16 bits, d columns: forward reads x and writes n, 4 d (2 d for the statistics alone); backward
reads dn, x, dres and writes dx, 8 d, and 2 d more where it also writes n again. Writing n again there is cheaper than
keeping it: the same bytes of traffic as reading it back, and none between forward and backward.

dgain is the sum of one fp32 partial row a program, each over its own rows in order, then over programs in order: no
atomics, and the same bits in every run on the same GPU.
"""

import torch
import triton
import triton.language as tl

from . import tiles

MAX_WIDTH = 8192


@triton.jit
def load_rows(p, o_m, o_d, m, stride):
    """Rows of a matrix in fp32, 0 outside the mask: [BLOCK_M, BLOCK_D]."""
    return tl.load(p + o_m[:, None].to(tl.int64) * stride + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, b, o_m, o_d, m, stride):
    tl.store(p + o_m[:, None].to(tl.int64) * stride + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def norm_forward_kernel(
    x, gain, n, stats, M, d, stride_x, eps,
    HAS_N: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_m < M)[:, None] & (o_d < d)[None, :]
    b_x = load_rows(x, o_m, o_d, m, stride_x)  # [BLOCK_M, BLOCK_D]
    if IS_CENTRED:
        b_mean = tl.sum(b_x, 1) / d
        tl.store(stats + M + o_m, b_mean, mask=o_m < M)
        b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / d + eps)  # [BLOCK_M]
    tl.store(stats + o_m, b_rstd, mask=o_m < M)
    if HAS_N:
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


@triton.jit
def sum_partials_kernel(partials, out, P, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i_p in range(0, P, BLOCK_P):
        b_sum += load_rows(partials, i_p + o_p, o_d, (i_p + o_p < P)[:, None] & (o_d < d)[None, :], d)
    tl.store(out + o_d, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_d < d)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., d) as [M, d] with contiguous columns: a view wherever the strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[-1] else x.contiguous()


def check_norm(name: str, x: torch.Tensor, gain: torch.Tensor) -> None:
    """What every operation with a norm asks of its first two arguments. Raises ValueError."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dim() < 1:
        raise ValueError(f"{name}: x: got {x.dtype} {tuple(x.shape)}, expected fp32, fp16 or bf16 (..., d)")
    d = x.shape[-1]
    if not 1 <= d <= MAX_WIDTH:  # a row lives in the registers of one program
        raise ValueError(f"{name}: x: got {d} columns, expected 1 to {MAX_WIDTH}")
    check_operand(name, "norm_weight", gain, x.dtype, (d,))


def check_operand(name: str, argument: str, t: torch.Tensor | None, dtype: torch.dtype, shape: tuple) -> None:
    """None in `shape` is any size; a tensor that is None passes. Raises ValueError."""
    if t is None:
        return
    fits = t.dim() == len(shape) and all(want is None or have == want for have, want in zip(t.shape, shape))
    if t.dtype != dtype or not fits:
        want = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name}: {argument}: got {t.dtype} {tuple(t.shape)}, expected {dtype} {want}")


def norm_forward(x, gain, eps: float, centred: bool, write: bool = True):
    """x [M, d] -> n [M, d] (None unless `write`), stats."""
    M, d = x.shape
    n = torch.empty((M, d), dtype=x.dtype, device=x.device) if write else None
    stats = torch.empty((1 + centred, M), dtype=torch.float32, device=x.device)
    if M:
        tile = tiles.row_tile(tiles.NORM_FORWARD, tiles.arch(x.device), d)
        norm_forward_kernel[(triton.cdiv(M, tile.BLOCK_M),)](
            x, gain, n, stats, M=M, d=d, stride_x=x.stride(0), eps=eps,
            HAS_N=write, IS_CENTRED=centred, BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return n, stats


def norm_backward(dn, x, gain, stats, dres=None, write_n: bool = False):
    """dn, x, dres [M, d] -> dx [M, d], dgain [d], n [M, d] (None unless `write_n`)."""
    M, d = x.shape
    dx = torch.empty((M, d), dtype=x.dtype, device=x.device)
    n = torch.empty_like(dx) if write_n else None
    tile = tiles.row_tile(tiles.NORM_BACKWARD, tiles.arch(x.device), d)
    # Four blocks a multiprocessor keep enough loads in flight; more would only lengthen the sum of the partials.
    programs = min(triton.cdiv(M, tile.BLOCK_M), 4 * tiles.multiprocessors(x.device))
    partials = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    if M:
        norm_backward_kernel[(programs,)](
            dn, x, gain, stats, dres, dx, n, partials,
            M=M, d=d, stride_dn=dn.stride(0), stride_x=x.stride(0), stride_dres=0 if dres is None else dres.stride(0),
            HAS_DRES=dres is not None, HAS_N=write_n, IS_CENTRED=stats.shape[0] == 2,
            BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dx, sum_partials(partials, gain.dtype), n


def sum_partials(partials, dtype: torch.dtype):
    """fp32 [P, d] -> [d], summed in order."""
    P, d = partials.shape
    out = torch.empty(d, dtype=dtype, device=partials.device)
    BLOCK_D = 32
    sum_partials_kernel[(triton.cdiv(d, BLOCK_D),)](
        partials, out, P=P, d=d, BLOCK_P=64, BLOCK_D=BLOCK_D, num_warps=4, num_stages=2
    )
    return out


def column_sums(dy, bias):
    """The gradient of a bias; an empty tensor where there is none, as custom ops return no None."""
    return dy.new_empty(0) if bias is None else dy.sum(0)
