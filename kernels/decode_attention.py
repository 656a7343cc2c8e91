"""One query a picture against the cache, which this step's key and value join on the way.

    k_cache[:, :, p], v_cache[:, :, p] = k, v
    out = softmax(scale q k_cache[:, :, : p + 1]^T) v_cache[:, :, : p + 1]

qkv (B, 3, H, D), caches (B, H, n_ctx, D) with contiguous rows, p the position of each picture: integers in device
memory, so that one CUDA graph serves every step. Of few pictures the keys are split, evenly over those that exist, and
what comes out are parts, which the projection joins (kernels/decode_linear.py):

    partial (B, splits, H, D) = sum of exp2(s - maximum) v,   maxima, sums (B, splits, H)

Bytes rule: 4 D a key and head in 16 bits, each read once, so scores are sums of fp32 products and no matrix
instruction is in sight. The BLOCK_N rows of a tile are as many softmaxes of their own, with their own running maximum
and accumulator in registers; they meet once, after the loop, and no thread waits for another before. In parts the first
tile, at window 512 the only one, is fetched before the kernel waits for q; whole, two tiles are on their way to shared
memory while one is worked on. Rows of D = 96 are 64 + 32 columns, not 128. This step's key comes from qkv, not from
memory just written.

Deterministic, and the same for a picture whatever B. The cache may be fp8: values are clipped to its range, as it has
no infinity.
"""

import torch
import triton
import triton.language as tl

from . import checks, tiles
from .attention_heads import load_tile, row_dots, scale_tile, store_tile, zero_tile
from .decode_chain import launch_chained, release, wait
from .device import arch, check_device
from .primitives import LOG2E
from .registration import operation

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # a maximum before any key; finite, since inf - inf is NaN


@triton.jit
def add_weighted(tile, weights, b):
    """tile + weights b, row by row, weights [ROWS, 1]."""
    total = (tile[0] + weights * b[0].to(tl.float32),)
    if len(tile) == 2:
        total = (total[0], tile[1] + weights * b[1].to(tl.float32))
    return total


@triton.jit
def joined(tile, weights, p_new, b_new, total):
    """(sum over rows of weights tile + p_new b_new) / total: a tile of one row."""
    joint = ((tl.sum(tile[0] * weights, 0)[None, :] + p_new * b_new[0].to(tl.float32)) / total,)
    if len(tile) == 2:
        joint = (joint[0], (tl.sum(tile[1] * weights, 0)[None, :] + p_new * b_new[1].to(tl.float32)) / total)
    return joint


@triton.jit
def as_kept(b, cache, LIMIT: tl.constexpr):
    """A chunk as the cache will hold it."""
    b = b.to(tl.float32)
    if LIMIT > 0:
        b = tl.minimum(tl.maximum(b, -LIMIT), LIMIT)
    return b.to(cache.dtype.element_ty)


@triton.jit
def append(new, cache, p, is_owner, D: tl.constexpr, LIMIT: tl.constexpr):
    """Store the row `new` at position p of a head's cache, if it is this program's to store; what it will read as."""
    tile = load_tile((new, D), 0, 1, 1, D)
    kept = (as_kept(tile[0], cache, LIMIT),)
    if len(tile) == 2:
        kept = (kept[0], as_kept(tile[1], cache, LIMIT))
    store_tile((cache, D), p, kept, tl.where(is_owner, p + 1, 0), 1, D)
    return kept


@triton.jit
def attention_kernel(
    qkv, k_cache, v_cache, position, out, maxima, sums, H, n_ctx, stride_b, stride_h, scale,
    D: tl.constexpr, SPLITS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    IS_EARLY: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    release(IS_EARLY, IS_CHAINED)
    i_bh, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.arange(0, BLOCK_N)
    # Ahead of the wait nothing says that L1 knows what the last step wrote: these loads go past it.
    p = tl.load(position + i_b, cache_modifier=".cg").to(tl.int32)
    is_inside = (p >= 0) & (p < n_ctx)
    p = tl.where(is_inside, p, 0)
    qkv += (i_b * 3 * H + i_h) * D
    k_cache += i_b * stride_b + i_h * stride_h
    v_cache += i_b * stride_b + i_h * stride_h
    share = tl.cdiv(tl.cdiv(p, SPLITS), BLOCK_N) * BLOCK_N
    start = i_split * share
    end = tl.minimum(p, start + share)
    if maxima is not None:
        b_k = load_tile((k_cache, D), start, end, BLOCK_N, D, PAST_L1=True)
        b_v = load_tile((v_cache, D), start, end, BLOCK_N, D, PAST_L1=True)
    wait(IS_EARLY, IS_CHAINED)

    # Scores in powers of two; NaN, and with it all that comes of it, for a position outside.
    b_q = scale_tile(load_tile((qkv, D), 0, 1, 1, D), tl.where(is_inside, scale * LOG2E, float("nan")))
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_acc = zero_tile(BLOCK_N, D)
    for i_n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        if maxima is None or i_n > start:
            b_k = load_tile((k_cache, D), i_n, end, BLOCK_N, D, PAST_L1=True)
            b_v = load_tile((v_cache, D), i_n, end, BLOCK_N, D, PAST_L1=True)
        b_s = tl.where(i_n + o_n < end, row_dots(b_k, b_q), float("-inf"))
        b_new_max = tl.maximum(b_max, b_s)
        b_fade, b_p = tl.exp2(b_max - b_new_max), tl.exp2(b_s - b_new_max)
        b_sum = b_sum * b_fade + b_p
        b_acc = add_weighted(scale_tile(b_acc, b_fade[:, None]), b_p[:, None], b_v)
        b_max = b_new_max

    is_owner = i_split == 0  # of this step's key, whose softmax is one more
    b_k = append(qkv + H * D, k_cache, p, is_owner & is_inside, D, LIMIT)
    b_v = append(qkv + 2 * H * D, v_cache, p, is_owner & is_inside, D, LIMIT)
    s_new = tl.where(is_owner, tl.sum(row_dots(b_k, b_q), 0), float("-inf"))
    top = tl.maximum(tl.max(b_max, 0), s_new)
    b_fade, p_new = tl.exp2(b_max - top), tl.exp2(s_new - top)
    total = tl.sum(b_sum * b_fade, 0) + p_new
    if maxima is None:
        store_tile((out + i_bh * D, D), 0, joined(b_acc, b_fade[:, None], p_new, b_v, total), 1, 1, D)
    else:
        i_part = (i_b * SPLITS + i_split) * H + i_h
        tl.store(maxima + i_part, top)
        tl.store(sums + i_part, total)
        store_tile((out + i_part * D, D), 0, joined(b_acc, b_fade[:, None], p_new, b_v, 1.0), 1, 1, D)


def attend(qkv, k_cache, v_cache, position, scale: float, out, maxima=None, sums=None) -> None:
    B, _, H, D = qkv.shape
    splits = 1 if maxima is None else maxima.shape[1]
    tile = tiles.decode_attention_tile("whole" if maxima is None else "parts", D, k_cache.element_size())
    launch_chained(
        qkv.device, attention_kernel, (B * H, splits),
        qkv=qkv.contiguous(), k_cache=k_cache, v_cache=v_cache, position=position.contiguous(),
        out=out, maxima=maxima, sums=sums, H=H, n_ctx=k_cache.shape[2],
        stride_b=k_cache.stride(0), stride_h=k_cache.stride(1), scale=scale,
        D=D, SPLITS=splits, LIMIT=torch.finfo(k_cache.dtype).max if k_cache.element_size() == 1 else 0,
        BLOCK_N=tile.BLOCK_N, STAGES=tile.num_stages, IS_EARLY=tile.early, num_warps=tile.num_warps,
    )  # fmt: skip


def splits(n_ctx: int) -> int:
    """Ways to split the keys of a full cache: DECODE_SPLITS, but no fewer than 64 keys each."""
    return 1 << (max(1, min(tiles.DECODE_SPLITS, n_ctx // 64)).bit_length() - 1)


@operation(
    "decode_attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, float scale, int rows) "
    "-> Tensor",
    lambda qkv, *args: qkv.new_empty((args[-1], *qkv.shape[2:])),
)
def decode_attention_op(qkv, k_cache, v_cache, position, scale: float, rows: int, out) -> None:
    """The first B of out (rows, H, D); the caches gain a row."""
    attend(qkv, k_cache, v_cache, position, scale, out)


def _parts(qkv, k_cache, *_):
    B, _, H, D = qkv.shape
    partial = qkv.new_empty((B, splits(k_cache.shape[2]), H, D), dtype=torch.float32)
    return partial, partial.new_empty(partial.shape[:3]), partial.new_empty(partial.shape[:3])


@operation(
    "decode_attention_parts(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _parts,
)
def decode_attention_parts_op(qkv, k_cache, v_cache, position, scale: float, partial, maxima, sums) -> None:
    """partial (B, splits, H, D), maxima and sums (B, splits, H); the caches gain a row."""
    attend(qkv, k_cache, v_cache, position, scale, partial, maxima, sums)


def check(qkv, k_cache, v_cache, position) -> None:
    checks.decode_attention(qkv, k_cache, v_cache)
    B, D = qkv.shape[0], qkv.shape[3]
    if D > 128:
        checks.refuse("decode_attention", "qkv", f"head dim {D}", "at most 128")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride()[2:] != (D, 1) or cache.stride() != k_cache.stride():
            checks.refuse("decode_attention", name, f"strides {cache.stride()}", "dense rows, strides as k_cache's")
    if k_cache.element_size() == 1 and arch(qkv.device) == "sm_80":
        checks.refuse("decode_attention", "k_cache", f"{k_cache.dtype} on sm_80", "bf16: fp8 came with sm_89")
    if position.shape != (B,) or position.is_floating_point():
        checks.refuse("decode_attention", "position", checks.said(position), f"integers ({B},)")
    check_device("decode_attention", qkv, k_cache, v_cache, position)


def decode_attention(qkv, k_cache, v_cache, position, scale: float | None = None, rows: int | None = None):
    """Attention of the new position: qkv (B, 3, H, D), caches (B, H, n_ctx, D) -> (B, H, D), or (rows, H, D) of which
    only the first B are written.

    `position` (B,), integers on the device in [0, n_ctx), says how many keys the caches hold; k and v are written
    there. scale defaults to 1/sqrt(D). A position outside gives NaN, and nothing is written. Raises ValueError for
    operands that don't fit."""
    check(qkv, k_cache, v_cache, position)
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    return decode_attention_op(qkv, k_cache, v_cache, position, scale, len(qkv) if rows is None else rows)


def decode_attention_parts(qkv, k_cache, v_cache, position, scale: float):
    """The same as parts, one a split of the keys, for `decode_linear_residual`: (partial, maxima, sums)."""
    check(qkv, k_cache, v_cache, position)
    return decode_attention_parts_op(qkv, k_cache, v_cache, position, scale)
