"""Pixels to tokens and back, and a step of the k-means that fits a palette, bit for bit as the reference.

    encode: argmin_v ((r - r_v)^2 + (g - g_v)^2) + (b - b_v)^2, the lowest v on ties      (..., 3) -> int64 (...)
    decode: rint(127.5 (palette[token] + 1)) as uint8                                     (...) -> uint8 (..., 3)
    sums:   index = encode(colours); sums[:, v] = sum over index = v of weight (1, r, g, b)
            uint8 (n, 3), int64 (n,) -> int64 (n,), int64 (4, V)

uint8 pixels are taken as pixel / 127.5 - 1, floats as they are. The distances are plain fp32 sums and products in that
order: a fused multiply-add or an approximate division would move ties and near-ties, so the kernels are launched with
fusion off and divide by `div_rn`. Each thread walks all V colours for its own pixels: 12 V instructions a pixel (8 of
arithmetic, 3 that choose), no tile of distances (and no tensor-core product: its rounding flips 0.7% of the choices).
On an H200 that caps encoding at 5.0 Gpixel/s for 512 colours. A NaN pixel takes colour 0, as numpy's argmin does where
all distances are NaN.

The sums are of integers: exact, so that atomics in any order give the same bits, where fp32 products one-hot^T @ weight
would not even hold the counts. Distinct colours come sorted, neighbours go to one centre: PARTS copies of the sums
keep programs from queueing for one address. n (3 + 8 + 8) bytes and 12 n V instructions.
"""

import torch
import triton
import triton.language as tl

from . import checks
from .device import check_device
from .launching import launch
from .registration import operation

BLOCK = 1024  # pixels a program: 8 for each of 128 threads, which share the loads and the loop
PARTS = 32  # copies of a palette's sums


@triton.jit
def channel(p, m):
    """A colour channel of each pixel in [-1, 1]."""
    b = tl.load(p, mask=m, other=0)
    if p.dtype.element_ty == tl.uint8:
        b = tl.div_rn(b.to(tl.float32), 127.5) - 1.0
    return b.to(tl.float32)


@triton.jit
def nearest(b_r, b_g, b_b, palette, V):
    """The nearest colour of each pixel, the lowest on ties."""
    b_nearest = tl.full(b_r.shape, float("inf"), tl.float32)
    b_token = tl.zeros(b_r.shape, tl.int32)
    for v in tl.range(0, V, loop_unroll_factor=4):  # a tenth of the instructions was the loop's own
        b_dr = b_r - tl.load(palette + 3 * v)
        b_dg = b_g - tl.load(palette + 3 * v + 1)
        b_db = b_b - tl.load(palette + 3 * v + 2)
        b_distance = (b_dr * b_dr + b_dg * b_dg) + b_db * b_db
        # Strictly nearer: of equal distances the first, lowest colour stays.
        b_token = tl.where(b_distance < b_nearest, v, b_token)
        b_nearest = tl.minimum(b_distance, b_nearest)
    return b_token


@triton.jit
def encode_kernel(pixels, palette, tokens, T, V, BLOCK_T: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    pixels += 3 * o_t
    b_token = nearest(channel(pixels, m_t), channel(pixels + 1, m_t), channel(pixels + 2, m_t), palette, V)
    tl.store(tokens + o_t, b_token.to(tl.int64), mask=m_t)


@triton.jit
def sums_kernel(colours, weight, palette, index, sums, T, V, BLOCK_T: tl.constexpr, PARTS: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    colours += 3 * o_t
    b_token = nearest(channel(colours, m_t), channel(colours + 1, m_t), channel(colours + 2, m_t), palette, V)
    b_token = b_token.to(tl.int64)
    tl.store(index + o_t, b_token, mask=m_t)
    b_w = tl.load(weight + o_t, mask=m_t, other=0)
    sums += i_t % PARTS * 4 * V + b_token
    tl.atomic_add(sums, b_w, mask=m_t, sem="relaxed")
    for c in tl.static_range(3):
        b_c = tl.load(colours + c, mask=m_t, other=0).to(tl.int64)
        tl.atomic_add(sums + (c + 1) * V, b_w * b_c, mask=m_t, sem="relaxed")


@triton.jit
def decode_kernel(tokens, palette, pixels, T, V, BLOCK_T: tl.constexpr):
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # over channels, so that stores are dense
    m_c = o_c < 3 * T
    b_token = tl.load(tokens + o_c // 3, mask=m_c, other=0).to(tl.int64)
    is_colour = (b_token >= 0) & (b_token < V)
    b_c = tl.load(palette + 3 * b_token + o_c % 3, mask=m_c & is_colour, other=-1.0)
    b_c = tl.minimum(tl.maximum(127.5 * (b_c + 1.0), 0.0), 255.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction: rounds to the nearest integer, halves to even, as rint does.
    b_c = (b_c + 12582912.0) - 12582912.0
    tl.store(pixels + o_c, b_c.to(tl.uint8), mask=m_c)


@operation(
    "palette_encode(Tensor pixels, Tensor palette) -> Tensor",
    lambda pixels, palette: pixels.new_empty(pixels.shape[:-1], dtype=torch.int64),
)
def palette_encode_op(pixels, palette, tokens) -> None:
    T = tokens.numel()
    if T:
        launch(
            encode_kernel, (triton.cdiv(T, BLOCK),),
            pixels=pixels.contiguous(), palette=palette.float().contiguous(), tokens=tokens, T=T, V=palette.shape[0],
            BLOCK_T=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@operation(
    "palette_decode(Tensor tokens, Tensor palette) -> Tensor",
    lambda tokens, palette: tokens.new_empty((*tokens.shape, 3), dtype=torch.uint8),
)
def palette_decode_op(tokens, palette, pixels) -> None:
    T = tokens.numel()
    if T:
        launch(
            decode_kernel, (triton.cdiv(3 * T, BLOCK),),
            tokens=tokens.contiguous(), palette=palette.float().contiguous(), pixels=pixels, T=T, V=palette.shape[0],
            BLOCK_T=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@operation(
    "palette_sums(Tensor colours, Tensor weight, Tensor palette) -> (Tensor, Tensor)",
    lambda colours, weight, palette: (torch.empty_like(weight), weight.new_empty(4, palette.shape[0])),
)
def palette_sums_op(colours, weight, palette, index, sums) -> None:
    T, V = weight.numel(), palette.shape[0]
    parts = torch.zeros(PARTS, 4, V, dtype=torch.int64, device=colours.device)
    if T:
        launch(
            sums_kernel, (triton.cdiv(T, BLOCK),),
            colours=colours.contiguous(), weight=weight.contiguous(), palette=palette.float().contiguous(),
            index=index, sums=parts, T=T, V=V, BLOCK_T=BLOCK, PARTS=PARTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    torch.sum(parts, 0, out=sums)


def palette_encode(pixels, palette):
    """Nearest colour, the lowest on ties: uint8 or float (..., 3), palette (V, 3) -> int64 (...).

    Raises ValueError for pixels or a palette of another shape or dtype."""
    checks.palette_encode(pixels, palette)
    check_device("palette_encode", pixels, palette)
    return palette_encode_op(pixels, palette)


def palette_decode(tokens, palette):
    """Colours of tokens: integers (...), palette (V, 3) -> uint8 (..., 3). A token outside [0, V) is black.

    Raises ValueError for tokens or a palette of another shape or dtype."""
    checks.palette_decode(tokens, palette)
    check_device("palette_decode", tokens, palette)
    return palette_decode_op(tokens, palette)


def palette_sums(colours, weight, palette):
    """Nearest colours and, for each colour of the palette, the sums of weight and weight * (r, g, b), exact:
    uint8 (n, 3), int64 (n,), palette (V, 3) -> int64 (n,), int64 (4, V).

    Raises ValueError for colours, weights or a palette of another shape or dtype."""
    checks.palette_sums(colours, weight, palette)
    check_device("palette_sums", colours, weight, palette)
    return palette_sums_op(colours, weight, palette)
