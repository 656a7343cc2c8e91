"""Where kernels run: the architecture whose tiles they take, how many multiprocessors it has, and what they refuse."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch

from .interpreter import INTERPRETED

ARCHS = ("portable", "sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a block may ask for; portable: the least of them, an Ada or consumer Ampere card's 99 KB.
SHARED_BYTES = {"portable": 101376, "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

_forced: str | None = None


@contextlib.contextmanager
def target(arch: str) -> Iterator[None]:
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
    """How many programs fill the GPU once; 132 (H200) where there is no GPU to ask and an architecture is forced, 4 in
    the interpreter."""
    if device.type == "cuda":
        return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())
    return 4 if INTERPRETED else 132


def check_device(name: str, *tensors: torch.Tensor | None) -> None:
    """Kernels run on a GPU or, with TRITON_INTERPRET=1 set before import, in the interpreter. Never silently elsewhere.

    Raises ValueError if a tensor is neither on a GPU nor (interpreted) on the CPU, if devices differ, or if they are a
    GPU other than the current one, where Triton would launch."""
    device = tensors[0].device
    for t in tensors:
        if t is not None and t.device != device:
            devices = sorted({str(t.device) for t in tensors if t is not None})
            raise ValueError(f"{name}: tensors on several devices {devices}; expected one")
    kind = device.type
    if kind not in ("cuda", "meta") and not (kind == "cpu" and INTERPRETED):
        raise ValueError(
            f"{name}: the Triton kernels need a GPU (got tensors on {kind}), or TRITON_INTERPRET=1 in the environment "
            "before igpt is imported; use impl='torch' or impl='auto' here"
        )
    if kind == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"{name}: got tensors on {device}, expected the current device, cuda:{current}, where Triton launches; "
            "see torch.cuda.set_device"
        )
