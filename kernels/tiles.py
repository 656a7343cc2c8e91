"""Launch parameters as data: for each kernel a table from (architecture, shape class) to a tile.

Each row says where it was measured ("H200 2026-12-01") or "compiled only". `bench/speed/tune.py` searches and
prints rows; nothing searches in the call path. Architectures that no row names use "portable", and say so once.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .device import SHARED_BYTES, arch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels take
MAX_WIDTH = 8192  # columns of a row, which lives in the registers of one program


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel. `tma`: loads through tensor descriptors (sm_90 and later).
    `programs`: of a persistent kernel, how many a multiprocessor. `group_bytes`: of attention, what the rows that one
    group of heads streams may take of L2 (40 MB on A100, 50 on H100 and H200). `early`: of a chained kernel
    (kernels/decode_chain.py), whether the next may start before this one has waited."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    programs: int = 1
    group_bytes: int = 16 << 20
    early: bool = True
    evidence: str = "compiled only"


@contextlib.contextmanager
def using(table: dict, key, tile: Tile) -> Iterator[None]:
    """Within this context the table's row `key` is `tile`, whether it had one or not: for searches and tests."""
    before = table.get(key)
    table[key] = tile
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def require(kernel: str, tile: Tile, x: torch.Tensor, elements: int, stages: int = 1, held: int = 0) -> None:
    """Refuse a tile that cannot fit: raise ValueError if what its loop keeps in flight, `elements` of x's dtype a step,
    and what it holds beside them exceed the shared memory, or if it has fewer stages than the kernel's waits need not
    to wait for themselves.
    Before anything is compiled, and never for a tile that fits."""
    if tile.num_stages < stages:
        raise ValueError(f"{kernel}: {tile} has {tile.num_stages} stages, expected at least {stages}")
    machine = arch(x.device)
    stages = tile.num_stages if tile.tma else tile.num_stages - 1  # a plain load's last stage lies in registers
    needed, there = (stages * elements + held) * x.element_size(), SHARED_BYTES[machine]
    if needed > there:
        raise ValueError(f"{kernel}: {tile} keeps {needed} bytes in shared memory, {machine} has {there} for a block")


# Row kernels (kernels/norm.py): (architecture, widest power of two of columns) -> BLOCK_M rows a step. BLOCK_N, the
# columns, is the power of two that holds the row at hand. Backward's programs keep loads in flight; each leaves a
# partial sum of the gain's gradient.
NORM_FORWARD = {
    ("portable", 512): Tile(8, 512, num_warps=4),
    ("portable", 1024): Tile(4, 1024, num_warps=4),
    ("portable", 2048): Tile(2, 2048, num_warps=4),
    ("portable", 4096): Tile(1, 4096, num_warps=4),
    ("portable", 8192): Tile(1, 8192, num_warps=8),
}
NORM_BACKWARD = {
    ("portable", 512): Tile(4, 512, num_warps=8, programs=4),
    ("sm_90", 512): Tile(1, 512, num_warps=2, programs=16, evidence="H200 2026-11-27"),
    ("portable", 1024): Tile(2, 1024, num_warps=8, programs=4),
    ("sm_90", 1024): Tile(2, 1024, num_warps=4, programs=16, evidence="H200 2026-11-27"),
    ("portable", 2048): Tile(1, 2048, num_warps=4, programs=4),
    ("sm_90", 2048): Tile(1, 2048, num_warps=4, programs=16, evidence="H200 2026-11-27"),
    ("sm_100", 2048): Tile(1, 2048, num_warps=8, programs=4),
    ("portable", 4096): Tile(1, 4096, num_warps=16, programs=4),
    ("portable", 8192): Tile(1, 8192, num_warps=32, programs=4),
    ("gfx942", 8192): Tile(1, 8192, num_warps=16, programs=4),
}


def row_tile(table: dict, arch: str, d: int) -> Tile:
    """The tile of a row kernel for d columns: of the narrowest class that holds them."""
    width = max(16, 1 << (d - 1).bit_length())
    widest = max(512, width)
    tile = table.get((arch, widest), table["portable", widest])
    return tile if width == tile.BLOCK_N else replace(tile, BLOCK_N=width)


def check_kernel_rows(name: str, x: torch.Tensor) -> None:
    """What the row kernels take of activations (..., d). Raises ValueError."""
    if x.dtype not in FLOATS or not 1 <= x.shape[-1] <= MAX_WIDTH:
        expected = f"fp32, fp16 or bf16 (..., d) with 1 <= d <= {MAX_WIDTH}"
        raise ValueError(f"{name}: x: got {x.dtype} {tuple(x.shape)}, expected {expected}")


# Elementwise kernels (kernels/norm_mlp.py): BLOCK_N elements a program.
ELEMENTWISE = {"portable": Tile(1, 4096, num_warps=8)}


def elementwise_tile(arch: str) -> Tile:
    return ELEMENTWISE.get(arch, ELEMENTWISE["portable"])


# Rows in 8 bits (kernels/quantize.py): whether memory runs along the rows, or across -> rows and columns a step.
QUANTIZE = {True: Tile(8, 1, 512, num_warps=4), False: Tile(32, 1, 128, num_warps=4)}


def quantize_tile(arch: str, along_rows: bool) -> Tile:
    return QUANTIZE[along_rows]


# The head (kernels/head_loss.py): (architecture, bytes of an element) -> rows, colours a chunk, columns a step.
# "ragged": sizes that 16 doesn't divide, whose unaligned loads take more registers.
HEAD_LOSS = {
    ("ragged", 2): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("portable", 2): Tile(64, 128, 32, num_warps=4, num_stages=3),
    ("portable", 4): Tile(32, 64, 32, num_warps=4, num_stages=2),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_90", 2): Tile(128, 256, 64, num_warps=8, num_stages=3, tma=True),
    ("sm_100", 2): Tile(128, 128, 64, num_warps=8, num_stages=3, tma=True),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=4, num_stages=2),
}


def head_loss_tile(arch: str, element_bytes: int, d: int, vocab: int) -> Tile:
    if d % 16 or vocab % 16:
        arch = "ragged"
    return HEAD_LOSS.get((arch, element_bytes), HEAD_LOSS["portable", element_bytes])


# Attention (kernels/attention.py, attention_backward.py): (architecture, head dim up to) -> BLOCK_M queries, BLOCK_N
# keys. Two rows stand for every architecture: "fp32", whose products run outside of the matrix units, and "unaligned",
# views whose rows don't start at 16 bytes, loaded one element at a time.
ATTENTION_FORWARD = {
    ("portable", 64): Tile(64, 64, num_warps=4, num_stages=2),
    ("portable", 96): Tile(64, 64, num_warps=4, num_stages=2),
    ("portable", 128): Tile(128, 32, num_warps=8, num_stages=2),
    ("sm_80", 64): Tile(128, 64, num_warps=8, num_stages=3),
    ("sm_80", 96): Tile(128, 64, num_warps=8, num_stages=3),
    ("sm_80", 128): Tile(128, 64, num_warps=8, num_stages=4),
    ("sm_100", 64): Tile(128, 128, num_warps=8, num_stages=2, tma=True),
    ("sm_100", 96): Tile(128, 128, num_warps=8, num_stages=2, tma=True),
    ("sm_100", 128): Tile(128, 128, num_warps=8, num_stages=2, tma=True),
    ("gfx942", 64): Tile(128, 64, num_warps=8, num_stages=2),
    ("gfx942", 96): Tile(128, 32, num_warps=8, num_stages=2),
    ("gfx942", 128): Tile(128, 32, num_warps=8, num_stages=2),
    ("fp32", 64): Tile(32, 32, num_warps=8, num_stages=2),
    ("fp32", 128): Tile(32, 16, num_warps=8, num_stages=2),
    ("unaligned", 128): Tile(64, 64, num_warps=8, num_stages=1),
}
ATTENTION_DQ = {
    ("portable", 64): Tile(64, 64, num_warps=4, num_stages=2),
    ("portable", 96): Tile(64, 32, num_warps=4, num_stages=2),
    ("portable", 128): Tile(64, 32, num_warps=4, num_stages=2),
    ("sm_80", 64): Tile(128, 64, num_warps=8, num_stages=2),
    ("sm_80", 96): Tile(128, 32, num_warps=8, num_stages=3),
    ("sm_80", 128): Tile(64, 64, num_warps=8, num_stages=2),
    ("sm_100", 64): Tile(128, 64, num_warps=8, num_stages=2, tma=True),
    ("sm_100", 96): Tile(128, 64, num_warps=8, num_stages=2, tma=True),
    ("sm_100", 128): Tile(128, 64, num_warps=8, num_stages=2, tma=True),
    ("gfx942", 64): Tile(128, 32, num_warps=8, num_stages=2),
    ("gfx942", 96): Tile(128, 32, num_warps=8, num_stages=2),
    ("gfx942", 128): Tile(128, 32, num_warps=4, num_stages=2),
    ("fp32", 128): Tile(32, 16, num_warps=4, num_stages=2),
    ("unaligned", 128): Tile(64, 16, num_warps=8, num_stages=1),
}
ATTENTION_DKDV = {
    ("portable", 64): Tile(64, 64, num_warps=4, num_stages=2),
    ("portable", 96): Tile(32, 64, num_warps=4, num_stages=2),
    ("portable", 128): Tile(32, 64, num_warps=8, num_stages=2),
    ("sm_80", 64): Tile(64, 64, num_warps=8, num_stages=3),
    ("sm_80", 96): Tile(32, 128, num_warps=8, num_stages=2),
    ("sm_80", 128): Tile(64, 64, num_warps=8, num_stages=3),
    ("sm_100", 64): Tile(64, 128, num_warps=8, num_stages=3, tma=True),
    ("sm_100", 96): Tile(64, 128, num_warps=4, num_stages=2, tma=True),
    ("sm_100", 128): Tile(64, 128, num_warps=8, num_stages=2, tma=True),
    ("gfx942", 64): Tile(32, 128, num_warps=4, num_stages=2),
    ("gfx942", 96): Tile(32, 128, num_warps=4, num_stages=2),
    ("gfx942", 128): Tile(32, 64, num_warps=4, num_stages=2),
    ("fp32", 128): Tile(16, 32, num_warps=8, num_stages=2),
    ("unaligned", 128): Tile(16, 64, num_warps=8, num_stages=1),
}


def attention_tile(table: dict, q: torch.Tensor, aligned: bool) -> Tile:
    """The tile of the narrowest row that holds the head dim of q (B, N, H, D)."""
    row, D = "fp32" if q.dtype == torch.float32 else arch(q.device) if aligned else "unaligned", q.shape[3]
    for name in (row, "portable"):
        for width in (64, 96, 128):
            if width >= D and (name, width) in table:
                return table[name, width]
    raise ValueError(f"attention: no tile for head dim {D}, expected up to 128")


# The warp-specialised kernels of sm_90 (kernels/attention_hopper_forward.py, _backward.py) by head dim: BLOCK_M
# rows in two consumers, BLOCK_N streamed rows, num_stages of which are in shared memory.
ATTENTION_HOPPER_FORWARD = {
    64: Tile(128, 128, num_stages=4, tma=True, evidence="H200 2026-11-27"),
    96: Tile(128, 128, num_stages=3, tma=True, evidence="H200 2026-11-27"),
    128: Tile(128, 128, num_stages=2, tma=True, group_bytes=32 << 20, evidence="H200 2026-11-27"),
}
ATTENTION_HOPPER_BACKWARD = {
    64: Tile(128, 64, num_stages=5, tma=True, evidence="H200 2026-11-27"),
    96: Tile(128, 64, num_stages=4, tma=True, evidence="H200 2026-11-27"),
    128: Tile(128, 64, num_stages=3, tma=True, evidence="H200 2026-11-27"),
}

# Candidates for quick-gelu's products (kernels/gelu_hopper.py), which tests and `make gpu` alone read: BLOCK_M rows in
# two consumers, BLOCK_N columns, BLOCK_K columns of the operands in each of the ring's num_stages places.
GELU_HOPPER = (
    Tile(128, 256, 32, num_stages=6, tma=True),
    Tile(128, 256, 64, num_stages=3, tma=True),
)

# The embedding table's gradient (kernels/embedding.py): (architecture, bytes of an element) -> BLOCK_M colours,
# BLOCK_N columns, BLOCK_K positions a step. "ragged": widths that 16 doesn't divide. fp32 has 32 rows: from 64 on
# Triton 3.7 for sm_100 rounds the operands to tf32 when a byte (the mask) was loaded on the way to the one-hot matrix.
EMBEDDING_BACKWARD = {
    ("ragged", 2): Tile(128, 64, 32, num_warps=4, num_stages=3),
    ("portable", 2): Tile(128, 64, 32, num_warps=4, num_stages=3),
    ("portable", 4): Tile(32, 64, 32, num_warps=4, num_stages=2),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_100", 2): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=4, num_stages=2),
}


def embedding_backward_tile(arch: str, element_bytes: int, d: int) -> Tile:
    arch = "ragged" if d % 16 else arch
    return EMBEDDING_BACKWARD.get((arch, element_bytes), EMBEDDING_BACKWARD["portable", element_bytes])


# One decoding step's products for few pictures (kernels/decode_linear.py): (what goes in or comes out, columns up to)
# -> BLOCK_N output features a program. Nothing in them is one architecture's: what an H200 was quick with, in
# a prototype of these kernels, is taken everywhere. Two of its best spill here: for gelu at 1536, 4 rows, with int8 and
# many pictures; for add at 2048, 8 rows, 1.5% quicker, under Triton 3.6 where they aren't sm_90's. The other widths
# keep to 128 weights a thread, which fit its registers even in fp32.
DECODE_LINEAR = {
    ("norm", 256): Tile(1, 32, num_warps=4),
    ("norm", 512): Tile(1, 16, num_warps=8, early=False, evidence="H200 2026-11-27"),
    ("norm", 1024): Tile(1, 8, num_warps=2, evidence="H200 2026-11-27"),
    ("norm", 1536): Tile(1, 8, num_warps=4, evidence="H200 2026-11-27"),
    ("norm", 4096): Tile(1, 4, num_warps=4),
    ("norm", 32768): Tile(1, 1, num_warps=8),
    ("gelu", 256): Tile(1, 32, num_warps=4),
    ("gelu", 512): Tile(1, 4, num_warps=4, early=False, evidence="H200 2026-11-27"),
    ("gelu", 1024): Tile(1, 4, num_warps=4, evidence="H200 2026-11-27"),
    ("gelu", 1536): Tile(1, 2, num_warps=1, evidence="H200 2026-11-27"),
    ("gelu", 4096): Tile(1, 4, num_warps=4),
    ("gelu", 32768): Tile(1, 1, num_warps=8),
    ("join", 256): Tile(1, 32, num_warps=4, num_stages=1),
    ("join", 512): Tile(1, 16, num_warps=4, num_stages=1, early=False, evidence="H200 2026-11-27"),
    ("join", 1024): Tile(1, 4, num_warps=4, num_stages=1, evidence="H200 2026-11-27"),
    ("join", 1536): Tile(1, 16, num_warps=8, num_stages=1, evidence="H200 2026-11-27"),
    ("join", 4096): Tile(1, 4, num_warps=8, num_stages=1),
    ("join", 32768): Tile(1, 1, num_warps=8, num_stages=1),
    ("add", 1024): Tile(1, 16, num_warps=4),
    ("add", 2048): Tile(1, 2, num_warps=4, early=False, evidence="H200 2026-11-27"),
    ("add", 4096): Tile(1, 4, num_warps=4, evidence="H200 2026-11-27"),
    ("add", 6144): Tile(1, 2, num_warps=4, evidence="H200 2026-11-27"),
    ("add", 16384): Tile(1, 2, num_warps=8),
    ("add", 32768): Tile(1, 1, num_warps=8),
}
MAX_COLUMNS = 32768


def decode_linear_tile(form: str, K: int) -> Tile:
    """The tile of the narrowest class that holds K columns. BLOCK_K is K's power of two, or a quarter of it where three
    of those hold K (1536 = 3 x 512); at most 4096, and 1024 where each column of x is joined from DECODE_SPLITS."""
    whole = max(64, 1 << (K - 1).bit_length())
    chunk = whole // (4 if 3 * whole >= 4 * K else 1)
    tile = DECODE_LINEAR[form, min(width for name, width in DECODE_LINEAR if name == form and width >= K)]
    return replace(tile, BLOCK_K=min(chunk, 1024 if form == "join" else 4096))


# One decoding step's attention (kernels/decode_attention.py): (in parts or whole, head dim up to) -> BLOCK_N keys, half
# of them in fp32. Parts: all of a split's keys at window 512 in registers at once. Whole: two tiles on their way to
# shared memory, and as many programs a multiprocessor as 128 pictures of 8 heads need to run all at once (at 128 eight
# warps also keep q's row from being a tile of its own, whose layout Triton would then give to the keys).
DECODE_ATTENTION = {
    ("parts", 64): Tile(1, 64, num_warps=4, num_stages=1, early=False, evidence="H200 2026-11-27"),
    ("parts", 128): Tile(1, 64, num_warps=4, num_stages=1, evidence="H200 2026-11-27"),
    ("whole", 96): Tile(1, 32, num_warps=4, num_stages=3),
    ("whole", 128): Tile(1, 32, num_warps=8, num_stages=3),
}
DECODE_SPLITS = 8  # of the keys, in parts


def decode_attention_tile(form: str, D: int, element_bytes: int) -> Tile:
    tile = DECODE_ATTENTION[form, min(width for name, width in DECODE_ATTENTION if name == form and width >= D)]
    return replace(tile, BLOCK_N=tile.BLOCK_N // 2) if element_bytes == 4 else tile
