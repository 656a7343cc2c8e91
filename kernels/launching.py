"""The one door through which our kernels are launched, so that launches can be looked at without a GPU.

Inside of `recording(record)` nothing runs: each launch is handed to record(kernel, grid, arguments), and operations on
meta tensors run their bodies (kernels/registration.py), which is where the launches are.
"""

import contextlib
from collections.abc import Callable, Iterator

_record: Callable | None = None


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """kernel[grid](**arguments): tensors and sizes by the kernel's names for them, num_warps and other options."""
    if _record is None:
        kernel[grid](**arguments)
    else:
        _record(kernel, grid, arguments)


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` hold n: what triton.cdiv says, 2 us later."""
    return -(-n // size)


def is_recording() -> bool:
    return _record is not None


@contextlib.contextmanager
def recording(record: Callable) -> Iterator[None]:
    """Within this context launches are handed to `record` instead of made."""
    global _record
    previous, _record = _record, record
    try:
        yield
    finally:
        _record = previous
