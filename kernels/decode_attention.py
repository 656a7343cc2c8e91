"""One query a picture against the cache, which this step's key and value join on the way.

    k_cache[:, :, p], v_cache[:, :, p] = k, v
    out = softmax(scale q k_cache[:, :, : p + 1]^T) v_cache[:, :, : p + 1]

qkv (B, 3, H, D), caches (B, H, n_ctx, D) with contiguous rows, p the position: an integer in device memory, so that one
CUDA graph serves every step. out is (B, H, D).

Bytes rule: 4 D a key and head in 16 bits, each read once, so scores are sums of fp32 products and no matrix
instruction is in sight. The BLOCK_N rows of a tile are as many softmaxes of their own, with their own running maximum
and accumulator in registers; they meet once, after the loop, and no thread waits for another before. This step's key
comes from qkv, not from memory just written.

With few pictures the keys are split SPLITS ways, evenly over those that exist; the partial sums are combined in order
by a second kernel. Deterministic. The cache may be fp8: values are clipped to its range, as it has no infinity.
"""

import torch
import triton
import triton.language as tl

from .device import arch, check_device, multiprocessors
from .launching import launch
from .primitives import LOG2E
from .registration import operation

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # a maximum before any key; finite, since inf - inf is NaN


@triton.jit
def append(p_new, p_cache, m_d, m_new, LIMIT: tl.constexpr):
    """Store the new row where m_new says so and return it as it will be read back."""
    b_new = tl.load(p_new, mask=m_d, other=0.0).to(tl.float32)
    if LIMIT > 0:
        b_new = tl.minimum(tl.maximum(b_new, -LIMIT), LIMIT)
    b_new = b_new.to(p_cache.dtype.element_ty)
    tl.store(p_cache, b_new, mask=m_new)
    return b_new.to(tl.float32)


@triton.jit
def attention_kernel(
    qkv, k_cache, v_cache, position, out, partial, maxima, sums, H, D, n_ctx, stride_b, stride_h, scale,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    i_bh, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p = tl.load(position).to(tl.int32)
    is_inside = (p >= 0) & (p < n_ctx)
    p = tl.where(is_inside, p, 0)
    qkv += (i_b * 3 * H + i_h) * D
    k_cache += i_b * stride_b + i_h * stride_h
    v_cache += i_b * stride_b + i_h * stride_h
    b_q = tl.load(qkv + o_d, mask=m_d, other=0.0).to(tl.float32) * (scale * LOG2E)  # scores in powers of two
    b_q = tl.where(is_inside, b_q, float("nan"))

    share = tl.cdiv(tl.cdiv(p, SPLITS), BLOCK_N) * BLOCK_N
    end = tl.minimum(p, (i_split + 1) * share)
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_n in range(i_split * share, end, BLOCK_N):
        o_kv = (i_n + o_n)[:, None].to(tl.int64) * D + o_d[None, :]
        m_n = i_n + o_n < end
        m_kv = m_n[:, None] & m_d[None, :]
        b_k = tl.load(k_cache + o_kv, mask=m_kv, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(v_cache + o_kv, mask=m_kv, other=0.0).to(tl.float32)
        b_s = tl.where(m_n, tl.sum(b_k * b_q[None, :], 1), float("-inf"))
        b_new_max = tl.maximum(b_max, b_s)
        b_fade, b_p = tl.exp2(b_max - b_new_max), tl.exp2(b_s - b_new_max)
        b_sum = b_sum * b_fade + b_p
        b_acc = b_acc * b_fade[:, None] + b_p[:, None] * b_v
        b_max = b_new_max

    is_owner = i_split == 0  # of this step's key, whose softmax is one more
    m_new = m_d & is_owner & is_inside
    o_new = p.to(tl.int64) * D + o_d
    b_k = append(qkv + H * D + o_d, k_cache + o_new, m_d, m_new, LIMIT)
    b_v = append(qkv + 2 * H * D + o_d, v_cache + o_new, m_d, m_new, LIMIT)
    s_new = tl.where(is_owner, tl.sum(b_q * b_k, 0), float("-inf"))
    top = tl.maximum(tl.max(b_max, 0), s_new)
    b_fade, p_new = tl.exp2(b_max - top), tl.exp2(s_new - top)
    total = tl.sum(b_sum * b_fade, 0) + p_new
    b_out = tl.sum(b_acc * b_fade[:, None], 0) + p_new * b_v
    if SPLITS == 1:
        tl.store(out + i_bh * D + o_d, (b_out / total).to(out.dtype.element_ty), mask=m_d)
    else:
        i_partial = i_bh * SPLITS + i_split
        tl.store(partial + i_partial * D + o_d, b_out, mask=m_d)
        tl.store(maxima + i_partial, top)
        tl.store(sums + i_partial, total)


@triton.jit
def combine_kernel(partial, maxima, sums, out, D, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    o_p = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_max = tl.load(maxima + o_p)
    b_fade = tl.exp2(b_max - tl.max(b_max, 0))
    b_partial = tl.load(partial + o_p[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)  # [SPLITS, BLOCK_D]
    b_out = tl.sum(b_partial * b_fade[:, None], 0) / tl.sum(tl.load(sums + o_p) * b_fade, 0)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def splits(heads: int, n_ctx: int, device: torch.device) -> int:
    """Ways to split the keys: two programs a multiprocessor, no fewer than 64 keys of a full cache each."""
    wanted = min(triton.cdiv(2 * multiprocessors(device), heads), n_ctx // 64)
    return 1 << (max(1, wanted).bit_length() - 1)


@operation(
    "decode_attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, float scale) -> Tensor",
    lambda qkv, *_: qkv.new_empty((qkv.shape[0], *qkv.shape[2:])),
)
def decode_attention_op(qkv, k_cache, v_cache, position, scale: float, out) -> None:
    """out (B, H, D); the caches gain a row."""
    B, _, H, D = qkv.shape
    n_ctx, device = k_cache.shape[2], qkv.device
    SPLITS, BLOCK_D = splits(B * H, n_ctx, device), triton.next_power_of_2(D)
    shape = (B * H, SPLITS) if SPLITS > 1 else (0, 0)
    partial = torch.empty((*shape, D), dtype=torch.float32, device=device)
    maxima, sums = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    launch(
        attention_kernel, (B * H, SPLITS),
        qkv=qkv.contiguous(), k_cache=k_cache, v_cache=v_cache, position=position, out=out,
        partial=partial, maxima=maxima, sums=sums, H=H, D=D, n_ctx=n_ctx,
        stride_b=k_cache.stride(0), stride_h=k_cache.stride(1), scale=scale, SPLITS=SPLITS, BLOCK_N=32, BLOCK_D=BLOCK_D,
        LIMIT=torch.finfo(k_cache.dtype).max if k_cache.element_size() == 1 else 0, num_warps=4,
    )  # fmt: skip
    if SPLITS > 1:
        launch(
            combine_kernel, (B * H,),
            partial=partial, maxima=maxima, sums=sums, out=out, D=D, SPLITS=SPLITS, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip


def decode_attention(qkv, k_cache, v_cache, position, scale: float | None = None):
    """Attention of the new position: qkv (B, 3, H, D), caches (B, H, n_ctx, D) -> (B, H, D).

    `position` (one int32 on the device, in [0, n_ctx)) says how many keys the caches hold; k and v are written there.
    scale defaults to 1/sqrt(D). A position outside gives NaN, and nothing is written. Raises ValueError for operands
    that don't fit."""
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"decode_attention: qkv: got {qkv.dtype} {tuple(qkv.shape)}, expected floats (B, 3, H, D)")
    B, _, H, D = qkv.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and cache.shape[:2] == (B, H) and cache.shape[3] == D
        if not fits or cache.stride()[2:] != (D, 1) or cache.stride() != k_cache.stride():
            got = f"{tuple(cache.shape)} with strides {cache.stride()}"
            raise ValueError(f"decode_attention: {name}: got {got}, expected ({B}, {H}, n_ctx, {D}) with dense rows")
    if k_cache.element_size() == 1 and arch(qkv.device) == "sm_80":
        raise ValueError(f"decode_attention: k_cache: got {k_cache.dtype} on sm_80, expected bf16: fp8 came with sm_89")
    if position.numel() != 1 or position.is_floating_point():
        got = f"{position.dtype} {tuple(position.shape)}"
        raise ValueError(f"decode_attention: position: got {got}, expected one integer")
    check_device("decode_attention", qkv, k_cache, v_cache, position)
    return decode_attention_op(qkv, k_cache, v_cache, position, D**-0.5 if scale is None else scale)
