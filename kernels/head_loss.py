"""Final norm, output head and cross-entropy in one kernel: the logits never reach memory.

    logits = norm(x, norm_weight) @ head_weight.T                          # (T, d), (V, d) -> (T, V)
    nll    = logsumexp(logits, -1) - logits[arange(T), targets]            # (T,), fp32

The released norm only scales rows, so it folds: logits = rstd * (x @ (g * W)^T), with sum(x^2) taken in the product's
own loop. The centred one doesn't fold (a large mean would cancel): a row kernel writes n first, and the product runs
on n and W. The vocabulary is walked in chunks of BLOCK_N with an online log-sum-exp,
so any V runs and a 128-row tile halves the traffic of W that a 64 x 512 tile in registers would have.

Saved for backward besides the inputs: dlogits = softmax - onehot in x's dtype, not yet scaled by dnll. While lse is
still unknown a chunk's exp(logit - running max) goes out in its place; once it is known the program comes back to its
own tile (in L2) and rescales. The target's entry is exp(-nll) - 1 in fp32: near certainty a rounded softmax - 1 would
be all rounding. Backward, with dn = dnll * (dlogits @ W):

    dx, dg = norm backward of dn (kernels/rows.py),  dW = dlogits^T @ (dnll * n)

two of the vendor's products around one row kernel, which makes dnll * n again on its way. fp32: accumulators, statistics, nll, dg's partial sums. Everything is
deterministic: no atomics, sums in an order fixed by the shapes and the GPU. Floor: 2 T d V FLOPs and (T d + V d) reads
(+ T V written with gradients) forward; 4 T d V and 4 T d + 2 T V elements backward.

A target outside [0, V) gives NaN.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import rows, tiles
from .primitives import check_device


@triton.jit
def load_tile(source, i_row, i_col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr):
    """[BLOCK_R, BLOCK_C] of a contiguous matrix, zero outside it."""
    if USE_TMA:
        return source.load([i_row, i_col])
    o_r, o_c = i_row + tl.arange(0, BLOCK_R), i_col + tl.arange(0, BLOCK_C)
    m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    return tl.load(source + o_r[:, None].to(tl.int64) * cols + o_c[None, :], mask=m, other=0.0)


@triton.jit
def forward_kernel(
    x, weight, targets, nll, dlogits, chunk_max, rstd, T, d, V, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_FOLDED: tl.constexpr, HAS_GRAD: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < T
    chunks = tl.cdiv(V, BLOCK_N)
    b_target = tl.load(targets + o_m, mask=m_m, other=0).to(tl.int64)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_picked = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, chunks):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        b_logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_squares = tl.zeros([BLOCK_M], tl.float32)
        for i_k in range(0, d, BLOCK_K):
            b_x = load_tile(x, i_m * BLOCK_M, i_k, T, d, BLOCK_M, BLOCK_K, USE_TMA)  # [BLOCK_M, BLOCK_K]
            b_w = load_tile(weight, i_n * BLOCK_N, i_k, V, d, BLOCK_N, BLOCK_K, USE_TMA)  # [BLOCK_N, BLOCK_K]
            b_logits = tl.dot(b_x, b_w.T, b_logits, input_precision=PRECISION)
            if IS_FOLDED:
                b_wide = b_x.to(tl.float32)
                b_squares += tl.sum(b_wide * b_wide, 1)
        if IS_FOLDED:
            b_rstd = tl.rsqrt(b_squares / d + eps)
            b_logits *= b_rstd[:, None]
            if HAS_GRAD:
                tl.store(rstd + o_m, b_rstd, mask=m_m)
        b_logits = tl.where(o_n[None, :] < V, b_logits, float("-inf"))
        b_picked += tl.sum(tl.where(o_n[None, :] == b_target[:, None], b_logits, 0.0), 1)
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_exp = tl.exp(b_logits - b_new_max[:, None])
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.sum(b_exp, 1)
        b_max = b_new_max
        if HAS_GRAD:
            o_tile = o_m[:, None] * V + o_n[None, :]
            m_tile = m_m[:, None] & (o_n[None, :] < V)
            tl.store(dlogits + o_tile, b_exp.to(dlogits.dtype.element_ty), mask=m_tile)
            tl.store(chunk_max + o_m * chunks + i_n, b_max, mask=m_m)
    b_lse = b_max + tl.log(b_sum)
    is_token = (b_target >= 0) & (b_target < V)
    b_nll = tl.where(is_token, b_lse - b_picked, float("nan"))
    tl.store(nll + o_m, b_nll, mask=m_m)
    if HAS_GRAD:
        tl.debug_barrier()  # the tile comes back in another layout, so other threads' stores must have landed
        for i_n in range(0, chunks):
            o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
            o_tile = o_m[:, None] * V + o_n[None, :]
            m_tile = m_m[:, None] & (o_n[None, :] < V)
            b_scale = tl.exp(tl.load(chunk_max + o_m * chunks + i_n, mask=m_m, other=0.0) - b_lse)
            b_p = tl.load(dlogits + o_tile, mask=m_tile, other=0.0).to(tl.float32) * b_scale[:, None]
            b_p = tl.where(o_n[None, :] == b_target[:, None], tl.exp(-b_nll)[:, None] - 1.0, b_p)
            tl.store(dlogits + o_tile, b_p.to(dlogits.dtype.element_ty), mask=m_tile)


def launch_forward(x, norm_weight, head_weight, targets, eps: float, centred: bool, has_grad: bool):
    """x [T, d] -> nll [T] and, if has_grad, dlogits [T, V] and the norm's stats (else both empty)."""
    (T, d), V = x.shape, head_weight.shape[0]
    tile = tiles.head_loss_tile(tiles.arch(x.device), x.dtype, V)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    nll = new(T)
    stats, chunk_max, dlogits = new((0, 0)), new((0, 0)), new((0, 0), dtype=x.dtype)
    if centred:
        x, stats = rows.norm_forward(x, norm_weight, eps, centred)
        weight = head_weight
    else:
        weight = norm_weight * head_weight
    if has_grad:
        stats = stats if centred else new((1, T))
        chunk_max, dlogits = new((T, triton.cdiv(V, tile.BLOCK_N))), new((T, V), dtype=x.dtype)
    if T == 0:
        return nll, dlogits, stats
    x, weight = x.contiguous(), weight.contiguous()
    use_tma = tile.tma and d * x.element_size() % 16 == 0
    forward_kernel[(triton.cdiv(T, tile.BLOCK_M),)](
        x=TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]) if use_tma else x,
        weight=TensorDescriptor.from_tensor(weight, [tile.BLOCK_N, tile.BLOCK_K]) if use_tma else weight,
        targets=targets, nll=nll, dlogits=dlogits, chunk_max=chunk_max, rstd=stats, T=T, d=d, V=V, eps=eps,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
        IS_FOLDED=not centred, HAS_GRAD=has_grad, USE_TMA=use_tma,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return nll, dlogits, stats


def launch_backward(dnll, dlogits, x, norm_weight, head_weight, stats):
    """dx, dnorm_weight, dhead_weight: the two products are the vendor's."""
    dn = dlogits @ head_weight
    dx, dnorm_weight, scaled_n = rows.norm_backward(dn, x, norm_weight, stats, scale=dnll, write_n=True)
    return dx, dnorm_weight, dlogits.t() @ scaled_n


@torch.library.custom_op("igpt::head_loss", mutates_args=())
def head_loss_op(
    x: torch.Tensor, norm_weight: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor,
    eps: float, centred: bool, has_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("head_loss", x, norm_weight, head_weight, targets)
    return launch_forward(x, norm_weight, head_weight, targets, eps, centred, has_grad)


@head_loss_op.register_fake
def _(x, norm_weight, head_weight, targets, eps, centred, has_grad):
    T, V = x.shape[0], head_weight.shape[0]
    nll = x.new_empty(T, dtype=torch.float32)
    dlogits = x.new_empty((T, V) if has_grad else (0, 0))
    stats = x.new_empty((1 + centred, T) if centred or has_grad else (0, 0), dtype=torch.float32)
    return nll, dlogits, stats


@torch.library.custom_op("igpt::head_loss_backward", mutates_args=())
def head_loss_backward_op(
    dnll: torch.Tensor, dlogits: torch.Tensor, x: torch.Tensor, norm_weight: torch.Tensor, head_weight: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device("head_loss_backward", dnll, x, norm_weight, head_weight)
    return launch_backward(dnll, dlogits, x, norm_weight, head_weight, stats)


@head_loss_backward_op.register_fake
def _(dnll, dlogits, x, norm_weight, head_weight, stats):
    return torch.empty_like(x), torch.empty_like(norm_weight), torch.empty_like(head_weight)


def _setup(ctx, inputs, output):
    x, norm_weight, head_weight, *_ = inputs
    _, dlogits, stats = output
    ctx.mark_non_differentiable(dlogits, stats)
    ctx.save_for_backward(dlogits, x, norm_weight, head_weight, stats)


def _backward(ctx, dnll, *_):
    return *head_loss_backward_op(dnll.contiguous(), *ctx.saved_tensors), None, None, None, None


head_loss_op.register_autograd(_backward, setup_context=_setup)


def head_loss(x, norm_weight, head_weight, targets, eps: float = 1e-5, centred: bool = False):
    """nll in nats, fp32, of each position: x (..., d), norm_weight (d), head_weight (V, d), targets (...) integers.

    Differentiable in x and both weights; without a gradient to take, nothing but nll is written. A target outside
    [0, V) gives NaN. Raises ValueError for an operand of another shape or dtype."""
    rows.check_norm("head_loss", x, norm_weight)
    rows.check_operand("head_loss", "head_weight", head_weight, x.dtype, (None, x.shape[-1]))
    if targets.shape != x.shape[:-1] or targets.is_floating_point():
        raise ValueError(f"head_loss: targets: got {targets.dtype} {tuple(targets.shape)}, expected {tuple(x.shape[:-1])} integers")
    has_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, norm_weight, head_weight))
    nll, *_ = head_loss_op(rows.as_rows(x), norm_weight, head_weight, targets.reshape(-1), eps, centred, has_grad)
    return nll.view(targets.shape)
