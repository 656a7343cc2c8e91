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


def fits(*tensors: torch.Tensor) -> bool:
    """Whether these views (B, N, H, D) of one shape suit the kernels: fp16 or bf16, heads side by side, rows and
    pictures that start at 16 bytes."""
    B, D = tensors[0].shape[0], tensors[0].shape[3]
    return D in (64, 96, 128) and all(
        t.dtype in (torch.float16, torch.bfloat16)
        and t.stride()[2:] == (D, 1)
        and all(stride > 0 and stride % 8 == 0 for stride in t.stride()[B == 1 : 2])
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def require(scale: float, **tensors: torch.Tensor) -> None:
    """Raises ValueError for tensors that do not fit, or a scale that is not positive."""
    if not fits(*tensors.values()) or not scale > 0:
        first, said = next(iter(tensors.values())), ", ".join(tensors)
        raise ValueError(
            f"{said}: got {first.dtype} {tuple(first.shape)}, strides {[t.stride() for t in tensors.values()]}, scale "
            f"{scale}; expected fp16 or bf16, D 64, 96 or 128, heads side by side, rows at 16 bytes, scale > 0"
        )


def describe(name: str, t: torch.Tensor, rows: int) -> dict:
    """A kernel's two arguments for t (B, N, H, D), in tiles of `rows`: name_desc, and name_tail or None."""
    B, N, H, D = t.shape
    pictures = t.stride(0) if B > 1 else N * t.stride(1)
    matrix = t.as_strided((B, N, H * D), (pictures, t.stride(1), 1))

    def chunk(first, width):
        block, dtype = [1, rows, width], gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return TensorDescriptor.from_tensor(matrix[..., first:], block, layout)

    tail = chunk(64, 32) if D == 96 else None
    return {f"{name}_desc": chunk(0, 64 if D == 96 else D), f"{name}_tail": tail}


def describe_flat(t: torch.Tensor) -> TensorDescriptor:
    """A contiguous fp32 tensor as one long row, read in blocks of ROWS."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor.from_tensor(t.view(-1), [ROWS], layout)
