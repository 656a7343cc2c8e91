"""What the compile suite launches: for each kernel file its launchers, on meta tensors, at the presets' shapes.

A launcher that a user can reach stands here; kernels that it launches are found by `bench.compile.capture`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from igpt.kernels.tiles import ARCHS


@dataclass(frozen=True)
class CompileCase:
    """`run()` calls launchers. `quick`: in the quick suite. `small_products` names kernel functions whose products
    have fewer than the 64 rows that wgmma needs."""

    kernel: str
    name: str
    run: Callable[[], None]
    quick: bool = False
    archs: tuple[str, ...] = ARCHS
    small_products: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[CompileCase]:
    yield from ()
