"""What the host does for one block of iGPT-S while a GPU would work, in microseconds: `python -m bench.speed.host`.

Nothing is launched: our kernels are handed to a recorder that drops them, the vendor's products only allocate. What
is left is what Python, the dispatcher and autograd cost: checks, tiles, descriptors, arguments, outputs, the engine.
Not in it is the driver's and Triton's own cost of a launch, which is the same for everybody who launches as many.
"""

import argparse
import contextlib
import sys
import time
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.host", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90", "portable"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for arch in args.arch:
        with unlaunched(arch):
            for direction in DIRECTIONS:
                call, rounds = block(direction), []
                for _ in range(20):
                    start = time.thread_time()
                    for _ in range(100):
                        call()
                    rounds.append((time.thread_time() - start) * 1e4)
                print(f"{arch} {direction}: {min(rounds):.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
