"""Token plus position embedding, with the start vector's shift and BERT's mask inside the gather.

    h[b, n] = wte[tokens[b, n - 1]] + wpe[n],  h[b, 0] = sos + wpe[0]               with sos (AR)
    h[b, n] = wte[tokens[b, n]] * ~masked[b, n] + wpe[n]                            without (BERT)

tokens (B, N) of any integer dtype, wte (V, d), wpe (n_ctx >= N, d). As rows r = b N + n of (B N, d) the shift reads
token r - 1, and n = r mod N. A token outside [0, V) gives a row of NaN, and no gradient.

Backward reads tokens and mask again; nothing else is saved.

    dwte = onehot^T @ dh     on the matrix units: each program owns [BLOCK_V, BLOCK_D] of the table and a share of the
                             rows; shares land in fp32 partials that are summed in order
    dwpe = sum_b dh,  dsos = sum_b dh[:, 0]

Products by 0 and 1 are exact and sums are fp32, so the only rounding of half-precision gradients is the last one.
Deterministic: no atomics, unlike an indexed add on 512 contended rows. Floor: forward B N d elements written; backward
2 B N V d FLOPs and two reads of dh.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .device import arch, check_device, multiprocessors
from .launching import launch
from .registration import differentiable, operation
from .rows import sum_partials


@triton.jit
def table_row(tokens, masked, o_r, R, N, V, HAS_SOS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which row of wte position o_r reads: V means the start vector, V + 1 nothing, V + 2 a token out of range."""
    o_source = o_r - 1 if HAS_SOS else o_r
    is_start = (o_r % N == 0) & HAS_SOS
    b_token = tl.load(tokens + o_source, mask=(o_r < R) & ~is_start, other=0).to(tl.int64)
    b_row = tl.where((b_token >= 0) & (b_token < V), b_token, V + 2)
    b_row = tl.where(is_start, V, b_row)
    if HAS_MASK:
        b_row = tl.where(tl.load(masked + o_r, mask=o_r < R, other=0) != 0, V + 1, b_row)
    return tl.where(o_r < R, b_row, V + 1).to(tl.int32)


@triton.jit
def embed_kernel(
    tokens, wte, wpe, sos, masked, h, R, N, V, d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SOS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < d)[None, :]
    m = (o_r < R)[:, None] & m_d
    b_row = table_row(tokens, masked, o_r, R, N, V, HAS_SOS, HAS_MASK)[:, None]
    b_h = tl.load(wte + b_row.to(tl.int64) * d + o_d[None, :], mask=(b_row < V) & m_d, other=0.0).to(tl.float32)
    if HAS_SOS:
        b_sos = tl.load(sos + o_d, mask=o_d < d, other=0.0).to(tl.float32)
        b_h = tl.where(b_row == V, b_sos[None, :], b_h)
    b_h = tl.where(b_row == V + 2, float("nan"), b_h)
    b_h += tl.load(wpe + (o_r % N)[:, None] * d + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(h + o_r[:, None].to(tl.int64) * d + o_d[None, :], b_h.to(h.dtype.element_ty), mask=m)


@triton.jit
def table_backward_kernel(
    dh, tokens, masked, partials, R, N, V, d, share,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_SOS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_share = tl.program_id(2)
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < d)[None, :]
    b_dwte = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_r in range(i_share * share, min(R, (i_share + 1) * share), BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        b_row = table_row(tokens, masked, o_r, R, N, V, HAS_SOS, HAS_MASK)
        o_dh = o_r[:, None].to(tl.int64) * d + o_d[None, :]
        b_dh = tl.load(dh + o_dh, mask=(o_r < R)[:, None] & m_d, other=0.0)  # [BLOCK_R, BLOCK_D]
        b_onehot = (o_v[:, None] == b_row[None, :]).to(b_dh.dtype)  # [BLOCK_V, BLOCK_R]
        b_dwte = tl.dot(b_onehot, b_dh, b_dwte, input_precision=PRECISION)
    o_out = (i_share.to(tl.int64) * V + o_v)[:, None] * d + o_d[None, :]
    tl.store(partials + o_out, b_dwte, mask=(o_v < V)[:, None] & m_d)


@triton.jit
def position_backward_kernel(dh, dwpe, B, N, n_ctx, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < d)[None, :]
    o_tile = o_n[:, None].to(tl.int64) * d + o_d[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for _ in range(0, B):
        b_sum += tl.load(dh + o_tile, mask=(o_n < N)[:, None] & m_d, other=0.0).to(tl.float32)
        dh += N * d
    tl.store(dwpe + o_tile, b_sum.to(dwpe.dtype.element_ty), mask=(o_n < n_ctx)[:, None] & m_d)


@operation(
    "embed(Tensor tokens, Tensor wte, Tensor wpe, Tensor? sos, Tensor? masked) -> Tensor",
    lambda tokens, wte, *_: wte.new_empty((*tokens.shape, wte.shape[1])),
)
def embed_op(tokens, wte, wpe, sos, masked, h) -> None:
    """(B, N) -> (B, N, d)."""
    (B, N), (V, d) = tokens.shape, wte.shape
    BLOCK_R, BLOCK_D = 8, 256
    if B * N:
        launch(
            embed_kernel, (triton.cdiv(B * N, BLOCK_R), triton.cdiv(d, BLOCK_D)),
            tokens=tokens.contiguous(), wte=wte.contiguous(), wpe=wpe.contiguous(),
            sos=None if sos is None else sos.contiguous(), masked=None if masked is None else masked.contiguous(),
            h=h, R=B * N, N=N, V=V, d=d,
            BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, HAS_SOS=sos is not None, HAS_MASK=masked is not None, num_warps=4,
        )  # fmt: skip


def _backward_outputs(dh, tokens, masked, V, n_ctx, has_sos):
    return dh.new_empty((V, dh.shape[-1])), dh.new_empty((n_ctx, dh.shape[-1]))


@operation(
    "embed_backward(Tensor dh, Tensor tokens, Tensor? masked, int V, int n_ctx, bool has_sos) -> (Tensor, Tensor)",
    _backward_outputs,
)
def embed_backward_op(dh, tokens, masked, V: int, n_ctx: int, has_sos: bool, dwte, dwpe) -> None:
    """dh (B, N, d) contiguous -> dwte (V, d), dwpe (n_ctx, d)."""
    B, N, d = dh.shape
    R, tile = B * N, tiles.embedding_backward_tile(arch(dh.device), dh.element_size(), d)
    owners = triton.cdiv(V, tile.BLOCK_M), triton.cdiv(d, tile.BLOCK_N)
    steps = triton.cdiv(R, tile.BLOCK_K)
    shares = max(1, min(multiprocessors(dh.device) // (owners[0] * owners[1]), steps // 4))
    partials = torch.empty((shares, V * d), dtype=torch.float32, device=dh.device)
    launch(
        table_backward_kernel, (*owners, shares),
        dh=dh, tokens=tokens.contiguous(), masked=None if masked is None else masked.contiguous(), partials=partials,
        R=R, N=N, V=V, d=d, share=triton.cdiv(steps, shares) * tile.BLOCK_K,
        BLOCK_V=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N, BLOCK_R=tile.BLOCK_K, HAS_SOS=has_sos, HAS_MASK=masked is not None,
        PRECISION="ieee" if dh.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_partials(partials, dwte.view(-1))
    BLOCK_N, BLOCK_D = 8, 128
    launch(
        position_backward_kernel, (triton.cdiv(n_ctx, BLOCK_N), triton.cdiv(d, BLOCK_D)),
        dh=dh, dwpe=dwpe, B=B, N=N, n_ctx=n_ctx, d=d, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4
    )


@differentiable
class Embed(torch.autograd.Function):
    """tokens (B, N), wte, wpe, sos, masked -> h (B, N, d)."""

    @staticmethod
    def forward(tokens, wte, wpe, sos, masked):
        return embed_op(tokens, wte, wpe, sos, masked)

    @staticmethod
    def setup_context(ctx, inputs, h):
        tokens, wte, wpe, sos, masked = inputs
        ctx.save_for_backward(tokens, masked)
        ctx.V, ctx.n_ctx, ctx.has_sos = wte.shape[0], wpe.shape[0], sos is not None

    @staticmethod
    def backward(ctx, dh):
        tokens, masked = ctx.saved_tensors
        dwte, dwpe = embed_backward_op(dh.contiguous(), tokens, masked, ctx.V, ctx.n_ctx, ctx.has_sos)
        dsos = None
        if ctx.has_sos:
            dsos = dwpe[0].clone() if masked is None else (dh[:, 0] * ~masked[:, :1]).sum(0)
        return None, dwte, dwpe, dsos, None


def embed(tokens, wte, wpe, sos=None, masked=None):
    """(B, N) integers -> (B, N, d); differentiable in wte (V, d), wpe (n_ctx >= N, d) and sos (d).

    masked (B, N) bool: those positions' token embeddings count as 0. Raises ValueError for operands that don't fit."""
    checks.embed(tokens, wte, wpe, sos, masked, wte.dtype)
    tiles.check_kernel_rows("embed", wte)
    check_device("embed", tokens, wte, wpe, sos, masked)
    return Embed(tokens, wte, wpe, sos, masked)
