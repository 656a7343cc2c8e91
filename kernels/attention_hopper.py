"""What the warp-specialised kernels attention_hopper_forward.py and attention_hopper_backward.py share, in Gluon; rings
and the order of tiles also serve gelu_hopper.py.

A program is persistent, one a multiprocessor: a producer, one warp, and two consumers, warpgroups of 64 rows each. A
tile is a list of column chunks: D = 96 is 64 + 32, for widths are powers of two and padding would add a third; other
head dims are one chunk. In memory, a view (B, N, H, D) is a tensor (B, N, H D) with a descriptor for every chunk; that
of a tail begins at its column, so that both take the same coordinates. Rows past N read as zero and are not written.

Tiles reach consumers through rings, (buffers of every chunk, full, empty): places in shared memory with a barrier for
either direction. A tile's step, its number in the ring's history, says which place and which round of it:

    producer     claim  copy ....                            claim  copy ....         step, then step + PLACES
                   |         |                                 |
    empty          0         |                                 1, by all readers
    full                     1, when the bytes are there       |
                             |                                 |
    consumers            wait_filled  view, read ....  release
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 64  # that a consumer owns: what one warpgroup multiplies at a time
# Of a consumer's thread and the producer's, in multiples of 8: together at most what 384 threads have, 65536.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
# Positions, heads of a picture, all tiles, tiles of a head, all heads, heads a group: one binary serves every value.
SIZES = ["N", "H", "WORK", "TILES", "HEADS", "GROUP"]


@gluon.jit
def tile_of(t, sizes, LAST_FIRST: gl.constexpr):
    """(tile of its head, head) of the t-th tile: groups of heads, in each the first rows or the last ones first."""
    TILES, HEADS, GROUP = sizes[3:]
    group = t // (GROUP * TILES)
    r = t - group * GROUP * TILES
    size = gl.minimum(GROUP, HEADS - group * GROUP)
    i = r // size
    return TILES - 1 - i if LAST_FIRST else i, group * GROUP + r % size


@gluon.jit
def chunks_of(chunk, tail):
    if tail is None:
        chunks = [chunk]
    else:
        chunks = [chunk, tail]
    return chunks


@gluon.jit
def allocate_ring(descs, PLACES: gl.constexpr, READERS: gl.constexpr):
    """A ring of PLACES tiles, each of which READERS consumers release."""
    buffers = [gl.allocate_shared_memory(x.dtype, [PLACES] + x.block_shape, x.layout) for x in descs]
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=READERS)
    fence_async_shared()  # threads made `full`, TMA counts it down
    return buffers, full, empty


@gluon.jit
def place_of(ring, step):
    """(place, parity of its round), the parity that `full` is waited for with; `empty` was, a round before."""
    PLACES: gl.constexpr = ring[1].shape[0]
    return step % PLACES, (step // PLACES) & 1


@gluon.jit
def claim(ring, step, BYTES: gl.constexpr):
    """Wait until the step's place is free; it is filled once BYTES have been copied there."""
    place, parity = place_of(ring, step)
    mbarrier.wait(ring[2].index(place), parity ^ 1)
    mbarrier.expect(ring[1].index(place), BYTES)


@gluon.jit
def copy(descs, at, ring, step, FIRST: gl.constexpr = 0):
    """Have the tile at these coordinates (batch, row, column) copied to the step's place, from buffer FIRST on."""
    place, _ = place_of(ring, step)
    for i in gl.static_range(len(descs)):
        tma.async_copy_global_to_shared(descs[i], at, ring[1].index(place), ring[0][FIRST + i].index(place))


@gluon.jit
def wait_filled(ring, step):
    place, parity = place_of(ring, step)
    mbarrier.wait(ring[1].index(place), parity)


@gluon.jit
def view(ring, step):
    """The step's tile, [rows, width] of every chunk."""
    place, _ = place_of(ring, step)
    chunks = [buffer.index(place) for buffer in ring[0]]
    return [chunk.reshape([chunk.shape[1], chunk.shape[2]]) for chunk in chunks]


@gluon.jit
def release(ring, step, pred=True):
    place, _ = place_of(ring, step)
    mbarrier.arrive(ring[2].index(place), count=1, pred=pred)


@gluon.jit
def store_through(ring, step, tile, descs, at):
    """Write accumulators to memory, rounded, through the step's place, which is busy until tma.store_wait."""
    place, _ = place_of(ring, step)
    chunks = view(ring, step)
    for i in gl.static_range(len(descs)):
        chunks[i].store(tile[i].to(chunks[i].dtype))
    fence_async_shared()
    for i in gl.static_range(len(descs)):
        tma.async_copy_shared_to_global(descs[i], at, ring[0][i].index(place))


@gluon.constexpr_function
def product_layout(width):
    """Of the registers of a consumer's product with so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def zero_rows(tile):
    """Accumulators of a consumer for products with this tile."""
    return [gl.full([64, x.shape[1]], 0.0, gl.float32, product_layout(x.shape[1])) for x in tile]


@gluon.jit
def scale_rows(tile, factor):
    """Every row of accumulators times its factor, [ROWS]."""
    return [x * gl.convert_layout(factor, gl.SliceLayout(1, product_layout(x.shape[1])))[:, None] for x in tile]


@gluon.jit
def issue_dots(a, b):
    """a b^T of tiles in shared memory, in flight, one product a chunk."""
    M: gl.constexpr = a[0].shape[0]
    N: gl.constexpr = b[0].shape[0]
    zero = gl.full([M, N], 0.0, gl.float32, product_layout(N))
    dots = warpgroup_mma(a[0], b[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(a)):
        dots = warpgroup_mma(a[i], b[i].permute((1, 0)), dots, is_async=True)
    return dots


@gluon.jit
def add_products(acc, weights, tile):
    """(acc + weights tile, in flight, one product a chunk, and the registers that hold weights until they are done)."""
    total, held = [], []
    for i in gl.static_range(len(tile)):
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, product_layout(tile[i].shape[1]), 2))
        total = total + [warpgroup_mma(operand, tile[i], acc[i], is_async=True)]
        held = held + [operand]
    return total, held


@gluon.jit
def row_dots(a, b):
    """Of every row of a with that row of b, tiles in shared memory: fp32 [rows]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, product_layout(64))
    dots = gl.full([a[0].shape[0]], 0.0, gl.float32, LAYOUT)
    for i in gl.static_range(len(a)):
        b_a, b_b = a[i].load(product_layout(a[i].shape[1])), b[i].load(product_layout(a[i].shape[1]))
        dots += gl.convert_layout(gl.sum(b_a.to(gl.float32) * b_b.to(gl.float32), 1), LAYOUT)
    return dots


@functools.cache
def layout_of(dtype: torch.dtype, rows: int, width: int) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory. Gluon takes 8 us to make one, and a block's attention asks for 12."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, rows, width], element)


FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class Descriptor(TensorDescriptor):
    def __post_init__(self):
        """Nothing: choose.takes_views has seen what Triton would look at again, for 2 us each."""


def describe(t: torch.Tensor, rows: int) -> tuple:
    """Descriptors of t (B, N, H, D) for tiles of `rows`: of its chunk, or its first, and of its tail, or None."""
    B, N, H, D = t.shape
    picture, row, _, _ = t.stride()
    strides = [picture if B > 1 else N * row, row, 1]

    def chunk(base, columns, width):
        return Descriptor(base, [B, N, columns], strides, [1, rows, width], layout_of(t.dtype, rows, width))

    return (chunk(t, H * D, 64), chunk(t[..., 64:], H * D - 64, 32)) if D == 96 else (chunk(t, H * D, D), None)


def describe_flat(t: torch.Tensor) -> TensorDescriptor:
    """A contiguous fp32 tensor as one long row, read in blocks of ROWS."""
    return Descriptor(t, [t.numel()], [1], [ROWS], FLAT)


def named(**described: tuple) -> dict:
    """What `describe` made as a kernel's arguments: name_desc and name_tail."""
    arguments = {}
    for name, descs in described.items():
        arguments[f"{name}_desc"], arguments[f"{name}_tail"] = descs
    return arguments
