"""Final norm, output head and cross-entropy in one kernel: the logits never reach memory.

    logits = norm(x, norm_weight) @ head_weight.T                          # (T, d), (V, d) -> (T, V)
    nll    = logsumexp(logits, -1) - logits[arange(T), targets]            # (T,), fp32

A row kernel writes n = norm(x); the product runs on it. (Folding the norm into the product would save the pass, but a
tile that both multiplies asynchronously and is summed through registers gets too few places in the pipeline, and the
rounding of g * W is one error for all rows, which dnorm_weight adds up.) The vocabulary is walked in chunks of BLOCK_N
with an online log-sum-exp: any V runs, and 128 rows by 256 colours move a third fewer bytes from L2 than the 64 by 512
that registers could hold at once.

With gradients to come a chunk leaves as shifted = exp(logit - running max) in x's dtype with its fp32 maximum, since
the sum isn't known before the last chunk. Saved besides the inputs: n and the norm's stats, shifted, maxima, and of
each row the last maximum and the sum of exponentials over it (joined as lse they would lose digits of softmax):

    dlogits = dnll * (shifted * exp(maximum - last maximum) / sum - onehot)
    dn = dlogits @ W,   dW = dlogits^T @ n,   dx and dnorm_weight from dn by the norm's backward (kernels/rows.py)

Near certainty softmax - 1 keeps its digits although shifted is rounded: a target that likely is its chunk's maximum,
and shifted is exactly 1 there. Backward's two products are the vendor's. fp32: accumulators, statistics, sums, nll.
Deterministic: no atomics. A target outside [0, V) gives NaN.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks, tiles
from .device import arch, check_device
from .launching import launch
from .norm import norm_backward_op, norm_op
from .registration import differentiable, operation
from .rows import as_rows


@triton.jit
def load_block(p, i_row, i_col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr):
    """[BLOCK_R, BLOCK_C] of a contiguous [rows, cols], 0 outside of it."""
    if USE_TMA:
        return p.load([i_row, i_col])
    else:
        o_r, o_c = i_row + tl.arange(0, BLOCK_R), i_col + tl.arange(0, BLOCK_C)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        return tl.load(p + o_r[:, None].to(tl.int64) * cols + o_c[None, :], mask=m, other=0.0)


@triton.jit
def store_block(p, b, i_row, i_col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr):
    if USE_TMA:
        p.store([i_row, i_col], b.to(p.dtype))
    else:
        o_r, o_c = i_row + tl.arange(0, BLOCK_R), i_col + tl.arange(0, BLOCK_C)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        tl.store(p + o_r[:, None].to(tl.int64) * cols + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def colour_of(p, m, V):
    """Targets as int32, -1 for one outside of [0, V): judged before it is narrowed, since 2^32 would come out as 0."""
    b_target = tl.load(p, mask=m, other=0).to(tl.int64)
    return tl.where((b_target >= 0) & (b_target < V), b_target, -1).to(tl.int32)


@triton.jit
def head_loss_kernel(
    n, weight, targets, nll, sums, shifted, maxima, T, d, V,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_GRAD: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BLOCK_M
    o_m, o_n = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_m = o_m < T
    b_target = colour_of(targets + o_m, m_m, V)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_picked = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, V, BLOCK_N):
        b_logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_k in range(0, d, BLOCK_K):
            b_n = load_block(n, i_m, i_k, T, d, BLOCK_M, BLOCK_K, USE_TMA)  # [BLOCK_M, BLOCK_K]
            b_w = load_block(weight, i_n, i_k, V, d, BLOCK_N, BLOCK_K, USE_TMA)  # [BLOCK_N, BLOCK_K]
            b_logits = tl.dot(b_n, b_w.T, b_logits, input_precision=PRECISION)
        # Columns are counted from the chunk's first, so that one set of numbers serves all: registers are scarce here.
        b_logits = tl.where(o_n[None, :] < V - i_n, b_logits, float("-inf"))
        b_picked += tl.sum(tl.where(o_n[None, :] == (b_target - i_n)[:, None], b_logits, 0.0), 1)
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_exp = tl.exp(b_logits - b_new_max[:, None])
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.sum(b_exp, 1)
        b_max = b_new_max
        if HAS_GRAD:
            store_block(shifted, b_exp, i_m, i_n, T, V, BLOCK_M, BLOCK_N, USE_TMA)
            tl.store(maxima + o_m.to(tl.int64) * tl.cdiv(V, BLOCK_N) + i_n // BLOCK_N, b_max, mask=m_m)
    b_nll = tl.where(b_target >= 0, b_max + tl.log(b_sum) - b_picked, float("nan"))
    tl.store(nll + o_m, b_nll, mask=m_m)
    if HAS_GRAD:
        tl.store(sums + o_m, b_max, mask=m_m)
        tl.store(sums + T + o_m, b_sum, mask=m_m)


@triton.jit
def dlogits_kernel(
    dnll, shifted, maxima, sums, targets, dlogits, T, V,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dnll (softmax - onehot), softmax = exp(logit - running max) exp(running max - last max) / sum."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = tl.program_id(1) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_m = o_m < T
    o_tile = o_m.to(tl.int64)[:, None] * V + o_n[None, :]
    m_tile = m_m[:, None] & (o_n < V)[None, :]
    b_max = tl.load(maxima + o_m.to(tl.int64) * tl.cdiv(V, CHUNK) + i_n // CHUNK, mask=m_m, other=0.0)
    b_last = tl.load(sums + o_m, mask=m_m, other=0.0)
    b_scale = tl.div_rn(tl.exp(b_max - b_last), tl.load(sums + T + o_m, mask=m_m, other=1.0))
    b_p = tl.load(shifted + o_tile, mask=m_tile, other=0.0).to(tl.float32) * b_scale[:, None]  # [BLOCK_M, BLOCK_N]
    b_target = colour_of(targets + o_m, m_m, V)
    b_p = tl.where(o_n[None, :] == b_target[:, None], b_p - 1.0, b_p)
    b_p *= tl.load(dnll + o_m, mask=m_m, other=0.0)[:, None]
    tl.store(dlogits + o_tile, b_p.to(dlogits.dtype.element_ty), mask=m_tile)


def dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it, contiguous from an address that 16 divides."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _tile(n, weight) -> tiles.Tile:
    return tiles.head_loss_tile(arch(n.device), n.element_size(), n.shape[1], weight.shape[0])


def _forward_outputs(n, weight, targets, has_grad):
    T, V = n.shape[0], weight.shape[0]
    chunks = triton.cdiv(V, _tile(n, weight).BLOCK_N)

    def new(*shape, dtype=torch.float32, exists=has_grad):
        return n.new_empty(shape if exists else 0, dtype=dtype)

    return new(T, exists=True), new(2, T), new(T, V, dtype=n.dtype), new(T, chunks)


@operation(
    "head_loss(Tensor n, Tensor weight, Tensor targets, bool has_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_outputs,
)
def head_loss_op(n, weight, targets, has_grad: bool, nll, sums, shifted, maxima) -> None:
    """n [T, d], weight [V, d] -> nll [T], and for backward (empty unless has_grad) sums [2, T], shifted [T, V] and
    maxima [T, chunks]."""
    (T, d), V, tile = n.shape, weight.shape[0], _tile(n, weight)
    tiles.require("head_loss_kernel", tile, n, (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K)

    def matrix(t, *block):
        return TensorDescriptor.from_tensor(t, block) if tile.tma and t.numel() else t

    if T:
        launch(
            head_loss_kernel, (triton.cdiv(T, tile.BLOCK_M),),
            n=matrix(n, tile.BLOCK_M, tile.BLOCK_K), weight=matrix(dense(weight), tile.BLOCK_N, tile.BLOCK_K),
            targets=targets, nll=nll, sums=sums, shifted=matrix(shifted, tile.BLOCK_M, tile.BLOCK_N),
            maxima=maxima, T=T, d=d, V=V, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
            HAS_GRAD=has_grad, USE_TMA=tile.tma, PRECISION="ieee" if n.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


@operation(
    "dlogits(Tensor dnll, Tensor shifted, Tensor maxima, Tensor sums, Tensor targets, int chunk) -> Tensor",
    lambda dnll, shifted, *_: torch.empty_like(shifted),
)
def dlogits_op(dnll, shifted, maxima, sums, targets, chunk: int, dlogits) -> None:
    """dnll [T] -> dlogits [T, V]; `chunk` colours share a column of maxima."""
    T, V = shifted.shape
    BLOCK_M, BLOCK_N = 16, min(chunk, 128)
    if T:
        launch(
            dlogits_kernel, (triton.cdiv(T, BLOCK_M), triton.cdiv(V, BLOCK_N)),
            dnll=dnll, shifted=shifted, maxima=maxima, sums=sums, targets=targets, dlogits=dlogits, T=T, V=V,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, CHUNK=chunk, num_warps=4,
        )  # fmt: skip


@differentiable
class HeadLoss(torch.autograd.Function):
    """x [T, d], norm_weight, head_weight, targets [T], eps, centred, has_grad -> nll [T] and what backward keeps."""

    @staticmethod
    def forward(x, norm_weight, head_weight, targets, eps, centred, has_grad):
        n, stats, _ = norm_op(x, None, norm_weight, eps, centred)
        nll, *kept = head_loss_op(n, head_weight, targets, has_grad)
        return nll, n if has_grad else x.new_empty(0), stats, *kept

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, norm_weight, head_weight, targets, *_ = inputs
        ctx.save_for_backward(x, norm_weight, head_weight, targets, *outputs[1:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dnll, *_):
        x, norm_weight, head_weight, targets, n, stats, sums, shifted, maxima = ctx.saved_tensors
        chunk = _tile(n, head_weight).BLOCK_N
        dlogits = dlogits_op(dnll.contiguous(), shifted, maxima, sums, targets, chunk)
        dx, dnorm_weight, _ = norm_backward_op(dlogits @ head_weight, x, norm_weight, stats, None, False)
        return dx, dnorm_weight, dlogits.t() @ n, None, None, None, None


def head_loss(x, norm_weight, head_weight, targets, eps: float = 1e-5, centred: bool = False):
    """nll in nats, fp32, of each position: x (..., d), norm_weight (d), head_weight (V, d), targets (...) integers.

    Differentiable in x and both weights; where no gradient is asked for, nothing of size V is written. A target outside
    [0, V) gives NaN. Raises ValueError for an operand of another shape or dtype."""
    checks.head_loss(x, norm_weight, head_weight, targets, x.dtype)
    tiles.check_kernel_rows("head_loss", x)
    check_device("head_loss", x, norm_weight, head_weight, targets)
    has_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, norm_weight, head_weight))
    nll, *_ = HeadLoss(as_rows(x), norm_weight, head_weight, targets.reshape(-1).contiguous(), eps, centred, has_grad)
    return nll.view(targets.shape)
