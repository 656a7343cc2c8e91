"""What the attention kernels share: views of heads (B, N, H, D) of any strides, tiles of them on chip, their order.

A tile is a tuple of column chunks: widths on chip are powers of two, so D = 96 is 64 + 32 columns (padding to 128 would
add a third to every product), 112 is 64 + 48 in a chunk of 64, and 16, 32, 64, 128 are one chunk. Rows past N and
columns past D read as zero and are never written.

A view reaches a kernel as three arguments. With TMA `x`, `x_tail` are host-side descriptors of its chunks over
(B, H, N, D), so that the hardware's bounds are those of one head of one image, and `x_strides` is None; otherwise `x`
is its pointer, `x_tail` None and `x_strides` its strides of (B, N, H). The last dimension is contiguous in both.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Tile

# Arguments that a model's head count decides. Triton would compile anew for one that is 1 or that 16 divides, and no
# address here gains from knowing: H = 2 and H = 16 share a binary.
HEAD_COUNTS = ["H", "HEADS", "GROUP"]


@triton.constexpr_function
def head_width(D):
    """Columns of a tile's first chunk: the largest power of two up to D."""
    return 1 << (D.bit_length() - 1)


@triton.constexpr_function
def tail_width(D):
    """Columns of its second chunk, 0 if there is none; at least the 16 that a product needs."""
    rest = D - (1 << (D.bit_length() - 1))
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0


@triton.jit
def tile_and_head(TILES, HEADS, GROUP):
    """(tile, head) of this program. Heads go in groups of GROUP, whose streamed rows share L2; a group does the first
    tile of all its heads before the second of any, so causal work put longest first ends in the shortest."""
    group = tl.program_id(0) // (GROUP * TILES)
    i = tl.program_id(0) % (GROUP * TILES)
    size = tl.minimum(GROUP, HEADS - group * GROUP)
    return i // size, group * GROUP + i % size


@triton.jit
def head_of(x, x_tail, x_strides, i_b, i_h):
    """One head of a view: (pointer, row stride), or with TMA (batch, head, descriptor of each chunk ...)."""
    if x_strides is not None:
        head = (x + i_b.to(tl.int64) * x_strides[0] + i_h.to(tl.int64) * x_strides[2], x_strides[1])
    elif x_tail is not None:
        head = (i_b, i_h, x, x_tail)
    else:
        head = (i_b, i_h, x)
    return head


@triton.jit
def pointers(head, start, N, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Of rows from `start` on and columns from FIRST on, and their mask: [ROWS, WIDTH]."""
    o_n, o_d = start + tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    m = (o_n < N)[:, None]
    if FIRST + WIDTH > D:
        m = m & (o_d < D)[None, :]
    return head[0] + o_n[:, None].to(tl.int64) * head[1] + o_d[None, :], m


@triton.jit
def load_tile(head, start, N, ROWS: tl.constexpr, D: tl.constexpr, PAST_L1: tl.constexpr = False):
    """Rows from `start` on of a head: ([ROWS, head_width(D)],) or with a second chunk [ROWS, tail_width(D)].
    PAST_L1: loads through pointers read L2."""
    CACHE: tl.constexpr = ".cg" if PAST_L1 else ""
    HEAD: tl.constexpr = head_width(D)
    TAIL: tl.constexpr = tail_width(D)
    if len(head) == 2:
        p, m = pointers(head, start, N, ROWS, 0, HEAD, D)
        tile = (tl.load(p, mask=m, other=0.0, cache_modifier=CACHE),)
        if TAIL > 0:
            p, m = pointers(head, start, N, ROWS, HEAD, TAIL, D)
            tile = (tile[0], tl.load(p, mask=m, other=0.0, cache_modifier=CACHE))
    else:
        tile = (head[2].load([head[0], head[1], start, 0]).reshape(ROWS, HEAD),)
        if TAIL > 0:
            tile = (tile[0], head[3].load([head[0], head[1], start, HEAD]).reshape(ROWS, TAIL))
    return tile


@triton.jit
def store_tile(head, start, tile, N, ROWS: tl.constexpr, D: tl.constexpr):
    """Write the rows of a tile that lie before N, through pointers."""
    dtype: tl.constexpr = head[0].dtype.element_ty
    p, m = pointers(head, start, N, ROWS, 0, head_width(D), D)
    tl.store(p, tile[0].to(dtype), mask=m)
    if len(tile) == 2:
        p, m = pointers(head, start, N, ROWS, head_width(D), tail_width(D), D)
        tl.store(p, tile[1].to(dtype), mask=m)


@triton.jit
def zero_tile(ROWS: tl.constexpr, D: tl.constexpr):
    TAIL: tl.constexpr = tail_width(D)
    tile = (tl.zeros([ROWS, head_width(D)], tl.float32),)
    if TAIL > 0:
        tile = (tile[0], tl.zeros([ROWS, TAIL], tl.float32))
    return tile


@triton.jit
def scale_tile(tile, factor):
    """tile * factor, a number or [ROWS, 1]."""
    scaled = (tile[0] * factor,)
    if len(tile) == 2:
        scaled = (scaled[0], tile[1] * factor)
    return scaled


@triton.jit
def row_dots(a, b):
    """Of every row of a with that row of b, fp32: [ROWS]."""
    dots = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        dots += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return dots


@triton.jit
def outer_dots(a, b):
    """a b^T, of every row of a with every row of b: [ROWS_A, ROWS_B]. fp32 operands are not rounded to tf32."""
    dots = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        dots = tl.dot(a[1], tl.trans(b[1]), dots, input_precision="ieee")
    return dots


@triton.jit
def add_product(tile, weights, b):
    """tile + weights b, weights [ROWS, ROWS_B]."""
    total = (tl.dot(weights, b[0], tile[0], input_precision="ieee"),)
    if len(b) == 2:
        total = (total[0], tl.dot(weights, b[1], tile[1], input_precision="ieee"))
    return total


def heads_in_group(x: torch.Tensor, tile: Tile) -> int:
    """How many heads of x (B, N, H, D) run together: two streamed tensors of its size are to fit tile.group_bytes."""
    return max(1, tile.group_bytes // (2 * x.shape[1] * x.shape[3] * x.element_size()))


def is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA can address x: 16-byte aligned start and strides, none of them zero."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def view_args(name: str, x: torch.Tensor | None, rows: int, tma: bool) -> dict:
    """The three kernel arguments of view x (B, N, H, D), loaded in tiles of `rows`."""
    if x is None or not tma:
        return {name: x, f"{name}_tail": None, f"{name}_strides": None if x is None else x.stride()[:3]}
    D = x.shape[3]
    x = x.transpose(1, 2)

    def chunk(width):
        return TensorDescriptor.from_tensor(x, [1, 1, rows, width]) if width else None

    return {name: chunk(head_width(D)), f"{name}_tail": chunk(tail_width(D)), f"{name}_strides": None}
