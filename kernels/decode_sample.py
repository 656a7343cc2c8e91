"""The two ends of a decoding step: a token's embedding, and the draw of the next token.

    x = wpe[p] + (wte[tokens[:, p - 1]] if p > 0 else sos)                                     decode_embed
    tokens[:, p] = argmax(truncate(logits / temperature, top_k, top_p) + gumbel)              decode_sample

p is an integer of each picture in device memory, which the draw, a step's last kernel, moves on.
gumbel = -log(-log(u)), u = tl.rand(seed, (picture << 32) + p V + k): noise by counter (Philox-4x32-10), the same for a
picture whatever batch it is drawn in. truncate keeps a token while fewer than top_k are likelier, then while the
likelier ones have less than top_p of the mass that is left; equal logits live or die together, and the likeliest live.
temperature 0 takes the likeliest token, the lowest on ties. One program a picture; truncation counts by V^2
comparisons, which for the few hundred colours of a palette is no slower than a sort and needs no order.
"""

import torch
import triton
import triton.language as tl

from . import checks
from .decode_chain import launch_chained, wait
from .device import check_device
from .launching import launch
from .registration import operation


@triton.jit
def embed_kernel(tokens, wte, wpe, sos, position, x, n_ctx, V, d, BLOCK_D: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    p = tl.load(position + i_b).to(tl.int64)
    is_inside = (p >= 0) & (p < n_ctx)
    token = tl.load(tokens + i_b * n_ctx + p - 1, mask=(p > 0) & is_inside, other=0).to(tl.int64)
    is_token = (token >= 0) & (token < V) & is_inside
    b_start = tl.load(sos + o_d, mask=m_d & (p == 0), other=0.0).to(tl.float32)
    b_token = tl.load(wte + token * d + o_d, mask=m_d & (p > 0) & is_token, other=0.0).to(tl.float32)
    b_x = tl.where(is_token, b_start + b_token, float("nan"))
    b_x += tl.load(wpe + p * d + o_d, mask=m_d & is_inside, other=0.0).to(tl.float32)
    tl.store(x + i_b * d + o_d, b_x.to(x.dtype.element_ty), mask=m_d)


@triton.jit
def load_scores(logits, o_v, V, temperature):
    return tl.div_rn(tl.load(logits + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32), temperature)


@triton.jit
def truncate(
    logits, b_scores, V, temperature, top_k, top_p,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """-inf for the scores [BLOCK_V] that may not be drawn: those with too many, or too much mass, of likelier ones."""
    o_chunk = tl.arange(0, CHUNK)
    if HAS_TOP_K:
        b_likelier = tl.zeros([BLOCK_V], tl.int32)
        for i_v in range(0, V, CHUNK):
            b_other = load_scores(logits, i_v + o_chunk, V, temperature)[None, :]
            b_likelier += tl.sum((b_other > b_scores[:, None]).to(tl.int32), 1)
        b_scores = tl.where(b_likelier < top_k, b_scores, float("-inf"))
    if HAS_TOP_P:
        top = tl.max(b_scores, 0)
        least = tl.min(tl.where(b_scores == float("-inf"), top, b_scores), 0)
        b_likelier = tl.zeros([BLOCK_V], tl.float32)
        for i_v in range(0, V, CHUNK):
            b_other = load_scores(logits, i_v + o_chunk, V, temperature)[None, :]
            b_mass = tl.where(b_other >= least, tl.exp(b_other - top), 0.0)
            b_likelier += tl.sum(tl.where(b_other > b_scores[:, None], b_mass, 0.0), 1)
        is_kept = (b_likelier < top_p * tl.sum(tl.exp(b_scores - top), 0)) | (b_scores == top)
        b_scores = tl.where(is_kept, b_scores, float("-inf"))
    return b_scores


@triton.jit
def sample_kernel(
    logits, tokens, position, pictures, seed, n_ctx, V, temperature, top_k, top_p,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    IS_GREEDY: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    wait(False, IS_CHAINED)
    p = tl.load(position + i_b).to(tl.int64)
    logits += i_b * V
    b_scores = load_scores(logits, o_v, V, 1.0 if IS_GREEDY else temperature)
    if not IS_GREEDY:
        b_scores = truncate(logits, b_scores, V, temperature, top_k, top_p, HAS_TOP_K, HAS_TOP_P, BLOCK_V, CHUNK)
        b_u = tl.rand(tl.load(seed), (tl.load(pictures + i_b) << 32) + p * V + o_v)
        b_scores += -tl.log(-tl.log(b_u))
    is_inside = (p >= 0) & (p < n_ctx)
    tl.store(tokens + i_b * n_ctx + p, tl.argmax(b_scores, 0).to(tokens.dtype.element_ty), mask=is_inside)
    tl.store(position + i_b, (p + 1).to(position.dtype.element_ty), mask=is_inside)


@operation(
    "decode_embed(Tensor tokens, Tensor wte, Tensor wpe, Tensor sos, Tensor position, ScalarType dtype) -> Tensor",
    lambda tokens, wte, wpe, sos, position, dtype: wte.new_empty((tokens.shape[0], wte.shape[1]), dtype=dtype),
)
def decode_embed_op(tokens, wte, wpe, sos, position, dtype, x) -> None:
    (B, n_ctx), (V, d) = tokens.shape, wte.shape
    BLOCK_D = 256
    launch(  # plainly: the first kernel of a step
        embed_kernel, (B, triton.cdiv(d, BLOCK_D)),
        tokens=tokens, wte=wte.contiguous(), wpe=wpe.contiguous(), sos=sos.contiguous(), position=position, x=x,
        n_ctx=n_ctx, V=V, d=d, BLOCK_D=BLOCK_D, num_warps=2,
    )  # fmt: skip


@operation(
    "decode_sample(Tensor logits, Tensor(a!) tokens, Tensor(b!) position, Tensor pictures, Tensor seed, "
    "float temperature, int top_k, float top_p) -> ()",
    lambda *_: None,
)
def decode_sample_op(logits, tokens, position, pictures, seed, temperature: float, top_k: int, top_p: float) -> None:
    B, V = logits.shape
    launch_chained(
        logits.device, sample_kernel, (B,),
        logits=logits.contiguous(), tokens=tokens, position=position, pictures=pictures.contiguous(), seed=seed,
        n_ctx=tokens.shape[1], V=V, temperature=temperature, top_k=top_k, top_p=top_p,
        BLOCK_V=triton.next_power_of_2(V), CHUNK=16,
        IS_GREEDY=temperature == 0, HAS_TOP_K=0 < top_k < V, HAS_TOP_P=top_p < 1, num_warps=4,
    )  # fmt: skip


def check(name: str, tokens, position, batch: int) -> None:
    if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.is_floating_point() or not tokens.is_contiguous():
        checks.refuse(name, "tokens", checks.said(tokens), f"contiguous integers ({batch}, n_ctx)")
    if position.shape != (batch,) or position.is_floating_point() or not position.is_contiguous():
        checks.refuse(name, "position", checks.said(position), f"contiguous integers ({batch},)")


def decode_embed(tokens, wte, wpe, sos, position, dtype: torch.dtype = torch.float32):
    """The residual stream's start at `position` (B,): tokens (B, n_ctx) -> (B, d). A token outside [0, V), or a
    position outside [0, n_ctx), gives NaN. Raises ValueError for operands that don't fit."""
    check("decode_embed", tokens, position, tokens.shape[0])
    checks.operand("decode_embed", "wpe", wpe, (None, wte.shape[1]), wte.dtype)
    checks.operand("decode_embed", "sos", sos, (wte.shape[1],), wte.dtype)
    if wpe.shape[0] < tokens.shape[1]:
        raise ValueError(f"decode_embed: wpe: got {wpe.shape[0]} rows, expected at least {tokens.shape[1]}")
    check_device("decode_embed", tokens, wte, wpe, sos, position)
    return decode_embed_op(tokens, wte, wpe, sos, position, dtype)


def decode_sample(logits, tokens, position, pictures, seed, temperature=1.0, top_k=None, top_p=None) -> None:
    """Draw tokens[i, position[i]] from logits (B, V), and add 1 to position (B,). pictures (B) int64 and seed (one
    int64) key the noise; they and `position` live on the device. A position outside [0, n_ctx) draws nothing and stays.

    Raises ValueError for operands that don't fit or values that draw nothing."""
    B, V = logits.shape
    check("decode_sample", tokens, position, B)
    checks.operand("decode_sample", "pictures", pictures, (B,), torch.int64)
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"decode_sample: seed: got {seed.dtype} {tuple(seed.shape)}, expected one int64")
    temperature = checks.temperature("decode_sample", temperature)
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"decode_sample: top_k: got {top_k}, expected None or 1 to {V}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"decode_sample: top_p: got {top_p}, expected None or a number in (0, 1]")
    top_p = 1.0 if top_p is None else float(top_p)
    check_device("decode_sample", logits, tokens, position, pictures, seed)
    decode_sample_op(logits, tokens, position, pictures, seed, temperature, top_k or 0, top_p)
