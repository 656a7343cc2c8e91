"""Launch parameters as data: for each kernel a table from (architecture, shape class) to a tile.

Each row says where it was measured ("H200 2026-12-01") or "compiled only". `bench/tune.py` searches and prints rows;
nothing searches in the call path. Architectures that no row names use "portable", and say so once.
"""

import contextlib
import functools
import warnings
from dataclasses import dataclass

import torch

from .interpreter import INTERPRETED

ARCHS = ("portable", "sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel. `tma`: loads through tensor descriptors (sm_90 and later)."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    evidence: str = "compiled only"


_forced: str | None = None


@contextlib.contextmanager
def target(arch: str):
    """Within this context every launcher picks the tiles of `arch`: for tests and for compiling without a GPU."""
    global _forced
    if arch not in ARCHS:
        raise ValueError(f"arch: got {arch!r}, expected one of {ARCHS}")
    previous, _forced = _forced, arch
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def _device_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        # 8.6 and 8.9 (consumer Ampere, Ada) have less shared memory than the sm_80 tiles ask for: portable.
        name = "sm_100" if (major, minor) == (10, 3) else f"sm_{major}{minor}"
    if name not in ARCHS:
        warnings.warn(f"igpt has no tiles for {name} ({properties.name}); using the portable ones", stacklevel=2)
        return "portable"
    return name


def arch(device: torch.device) -> str:
    """The architecture whose tiles a launch on `device` uses; "portable" in the interpreter unless forced."""
    if _forced is not None:
        return _forced
    if device.type != "cuda" or INTERPRETED:
        return "portable"
    return _device_arch(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent kernel launches: the GPU's multiprocessors; 132 (H200) where there is no GPU
    to ask and an architecture is forced, 4 in the interpreter."""
    if device.type == "cuda":
        return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())
    return 4 if INTERPRETED else 132
