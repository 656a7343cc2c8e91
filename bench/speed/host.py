"""What the host does for one block of iGPT-S while a GPU would work: `pytest bench --benchmark-only -k host` times it.

Nothing is launched: our kernels are handed to a recorder that drops them, the vendor's products only allocate. What
is left is what Python, the dispatcher and autograd cost: checks, tiles, descriptors, arguments, outputs, the engine.
Not in it is the driver's and Triton's own cost of a launch, which is the same for everybody who launches as many.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from igpt import ImageGPT
from igpt.kernels import choose, device
from igpt.kernels.launching import recording

DIRECTIONS = ("fwd", "fwd+bwd")


@contextlib.contextmanager
def unlaunched(arch: str) -> Iterator[None]:
    """On a CPU what `arch` would do, up to the launches."""

    def mm(a, b):
        return a.new_empty((a.shape[0], b.shape[1]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # that a kernel of PyTorch's is replaced
        stack.enter_context(torch.library._scoped_library("aten", "IMPL")).impl("mm", mm, "CPU")
        stack.enter_context(mock.patch.object(device, "INTERPRETED", True))  # check_device lets the CPU pass
        stack.enter_context(mock.patch.object(choose, "HAS_ONEDNN", False))
        stack.enter_context(device.target(arch))
        stack.enter_context(recording(lambda *_: None))
        yield


def block(direction: str) -> Callable[[], object]:
    """A call of one block of S on 128 tokens in bf16, from the stream to the stream, and back to every gradient."""
    block = ImageGPT.from_preset("s", impl="triton", device="meta", dtype=torch.bfloat16, n_layer=1).blocks[0]
    block.to_empty(device="cpu")
    shape = 1, 128, block.attn.norm.shape[0]
    stream, add = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    gradients, wanted = [torch.zeros(shape, dtype=torch.bfloat16)] * 2, [stream, add, *block.parameters()]

    def forward():
        return block(stream, add, "triton")

    return forward if direction == "fwd" else lambda: torch.autograd.grad(forward(), wanted, gradients)
