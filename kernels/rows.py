"""Matrices [M, d] row by row: masked loads and stores, and sums over programs. All arithmetic is fp32."""

import torch
import triton
import triton.language as tl

from .launching import blocks, launch


@triton.jit
def load_rows(p, o_m, o_d, m, stride):
    """Rows of a matrix in fp32, 0 outside the mask: [BLOCK_M, BLOCK_D]."""
    return tl.load(p + o_m[:, None].to(tl.int64) * stride + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, b, o_m, o_d, m, stride):
    tl.store(p + o_m[:, None].to(tl.int64) * stride + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def sum_partials_kernel(partials, out, P, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i_p in range(0, P, BLOCK_P):
        b_sum += load_rows(partials, i_p + o_p, o_d, (i_p + o_p < P)[:, None] & (o_d < d)[None, :], d)
    tl.store(out + o_d, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_d < d)


def sum_partials(partials, out) -> None:
    """out [d] = the sum of fp32 partials [P, d], in order."""
    P, d = partials.shape
    BLOCK_D = 32
    launch(
        sum_partials_kernel, (blocks(d, BLOCK_D),),
        partials=partials, out=out, P=P, d=d, BLOCK_P=64, BLOCK_D=BLOCK_D, num_warps=4, num_stages=2,
    )  # fmt: skip


def with_row_stride(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(..., d) as a kernel reads its rows, a copy only where their columns are apart or they themselves unevenly."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_rows(x)
    return x, x.stride(0)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., d) as [M, d] with contiguous columns: a view wherever the strides allow one."""
    x = x if x.dim() == 2 else x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[-1] else x.contiguous()
