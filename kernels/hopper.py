"""What the two warp-specialised attention kernels share (attention_hopper.py, attention_hopper_backward.py): the order
of tiles, products over chunks of columns, descriptors, and what fits.

A program holds a producer and two consumers of 64 rows each. D = 96 is a chunk of 64 and a chunk of 32 columns, for
widths are powers of two and padding would add a third; other head dims are one chunk, D2 = 0.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE = 128  # rows of a tile: two consumers of 64
# Of a consumer's thread and the producer's, in multiples of 8: together at most what 384 threads have, 65536.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24

FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit
def tile_of(t, TILES, HEADS, GROUP, H):
    """(tile of rows, batch, head) of the t-th tile: groups of heads, within a group the last rows first."""
    group = t // (GROUP * TILES)
    r = t - group * GROUP * TILES
    size = gl.minimum(GROUP, HEADS - group * GROUP)
    i_bh = group * GROUP + r % size
    return TILES - 1 - r // size, i_bh // H, i_bh % H


@gluon.jit
def issue_dots(a, a2, b, b2, zero, D2: gl.constexpr):
    """a b^T of tiles in shared memory, in flight, one product a chunk; `zero` gives the layout."""
    dots = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2 > 0:
        dots = warpgroup_mma(a2, b2.permute((1, 0)), dots, is_async=True)
    return dots


def fits(*tensors: torch.Tensor) -> bool:
    """Whether these views (B, N, H, D) of one shape suit the kernels: fp16 or bf16, N a multiple of TILE, heads side by
    side, rows that start at 16 bytes, pictures at one distance."""
    B, N, _, D = tensors[0].shape
    return D in (64, 96, 128) and N % TILE == 0 and all(
        t.dtype in (torch.float16, torch.bfloat16)
        and t.stride()[1:] == (t.stride(1), D, 1)
        and (B == 1 or t.stride(0) == N * t.stride(1))
        and t.stride(1) % 8 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )  # fmt: skip


def require(scale: float, **tensors: torch.Tensor) -> None:
    """Raises ValueError for tensors that do not fit, or a scale that is not positive."""
    if not fits(*tensors.values()) or not scale > 0:
        first, said = next(iter(tensors.values())), ", ".join(tensors)
        raise ValueError(
            f"{said}: got {first.dtype} {tuple(first.shape)}, strides {[t.stride() for t in tensors.values()]}, scale "
            f"{scale}; expected fp16 or bf16, D 64, 96 or 128, N a multiple of {TILE}, heads side by side, scale > 0"
        )


def chunks(D: int) -> tuple[int, int]:
    """(D1, D2): the columns of a tile's two chunks."""
    return (64, 32) if D == 96 else (D, 0)


@functools.cache
def layout_of(dtype: torch.dtype, rows: int, width: int):
    """Gluon takes 9 us to make one, and a block's attention asks for 32."""
    return gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def describe(t: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """t (B, N, H, D) as a matrix (B N, H D), read and written in blocks of [rows, width]."""
    B, N, H, D = t.shape
    view = t.as_strided((B * N, H * D), (t.stride(1), 1))
    return TensorDescriptor.from_tensor(view, [rows, width], layout_of(t.dtype, rows, width))


def describe_flat(t: torch.Tensor, length: int) -> TensorDescriptor:
    """A contiguous fp32 tensor as one long row, read in blocks of `length`."""
    return TensorDescriptor.from_tensor(t.view(-1), [length], FLAT)
