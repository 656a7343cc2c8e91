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

from .primitives import check_device

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


def launch_encode(pixels, palette):
    T = pixels.numel() // 3
    tokens = torch.empty(pixels.shape[:-1], dtype=torch.int64, device=pixels.device)
    if T:
        encode_kernel[(triton.cdiv(T, BLOCK),)](
            pixels=pixels.contiguous(), palette=palette.float().contiguous(), tokens=tokens, T=T, V=palette.shape[0],
            BLOCK_T=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return tokens


def launch_decode(tokens, palette):
    T = tokens.numel()
    pixels = torch.empty((*tokens.shape, 3), dtype=torch.uint8, device=tokens.device)
    if T:
        decode_kernel[(triton.cdiv(3 * T, BLOCK),)](
            tokens=tokens.contiguous(), palette=palette.float().contiguous(), pixels=pixels, T=T, V=palette.shape[0],
            BLOCK_T=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return pixels


def launch_sums(colours, weight, palette):
    T, V = weight.numel(), palette.shape[0]
    index = torch.empty(T, dtype=torch.int64, device=colours.device)
    sums = torch.zeros(PARTS, 4, V, dtype=torch.int64, device=colours.device)
    if T:
        sums_kernel[(triton.cdiv(T, BLOCK),)](
            colours=colours.contiguous(), weight=weight.contiguous(), palette=palette.float().contiguous(),
            index=index, sums=sums, T=T, V=V, BLOCK_T=BLOCK, PARTS=PARTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return index, sums.sum(0)


@torch.library.custom_op("igpt::palette_encode", mutates_args=())
def palette_encode_op(pixels: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    check_device("palette_encode", pixels, palette)
    return launch_encode(pixels, palette)


@palette_encode_op.register_fake
def _(pixels, palette):
    return pixels.new_empty(pixels.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("igpt::palette_decode", mutates_args=())
def palette_decode_op(tokens: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    check_device("palette_decode", tokens, palette)
    return launch_decode(tokens, palette)


@palette_decode_op.register_fake
def _(tokens, palette):
    return tokens.new_empty((*tokens.shape, 3), dtype=torch.uint8)


@torch.library.custom_op("igpt::palette_sums", mutates_args=())
def palette_sums_op(
    colours: torch.Tensor, weight: torch.Tensor, palette: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    check_device("palette_sums", colours, weight, palette)
    return launch_sums(colours, weight, palette)


@palette_sums_op.register_fake
def _(colours, weight, palette):
    return torch.empty_like(weight), weight.new_empty(4, palette.shape[0])


def check_palette(name: str, palette: torch.Tensor) -> None:
    if palette.dim() != 2 or palette.shape[1] != 3 or not palette.shape[0] or not palette.is_floating_point():
        raise ValueError(f"{name}: palette: got {palette.dtype} {tuple(palette.shape)}, expected floats (V >= 1, 3)")


def palette_encode(pixels, palette):
    """Nearest colour, the lowest on ties: uint8 or float (..., 3), palette (V, 3) -> int64 (...).

    Raises ValueError for pixels or a palette of another shape or dtype."""
    check_palette("palette_encode", palette)
    if pixels.shape[-1:] != (3,) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        got = f"{pixels.dtype} {tuple(pixels.shape)}"
        raise ValueError(f"palette_encode: pixels: got {got}, expected uint8 or float (..., 3)")
    return palette_encode_op(pixels, palette)


def palette_decode(tokens, palette):
    """Colours of tokens: integers (...), palette (V, 3) -> uint8 (..., 3). A token outside [0, V) is black.

    Raises ValueError for tokens or a palette of another shape or dtype."""
    check_palette("palette_decode", palette)
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"palette_decode: tokens: got {tokens.dtype}, expected integers")
    return palette_decode_op(tokens, palette)


def palette_sums(colours, weight, palette):
    """Nearest colours and, for each colour of the palette, the sums of weight and weight * (r, g, b), exact:
    uint8 (n, 3), int64 (n,), palette (V, 3) -> int64 (n,), int64 (4, V).

    Raises ValueError for colours, weights or a palette of another shape or dtype."""
    check_palette("palette_sums", palette)
    if colours.dtype != torch.uint8 or colours.dim() != 2 or colours.shape[1] != 3:
        raise ValueError(f"palette_sums: colours: got {colours.dtype} {tuple(colours.shape)}, expected uint8 (n, 3)")
    if weight.dtype != torch.int64 or weight.shape != colours.shape[:1]:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"palette_sums: weight: got {got}, expected int64 ({len(colours)},)")
    return palette_sums_op(colours, weight, palette)
