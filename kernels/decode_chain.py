"""How a decoding step's kernels follow one another: programmatic dependent launch, on the GPUs that have it.

A token is a hundred kernels of 2 to 5 us, each of which would wait for the last program of the one before, then for its
own launch, then for its weights. Launched as here, a kernel starts while the one before still runs, fetches what no
kernel of the step writes (weights, the position, the cache's earlier rows) and only then waits: until every kernel
before it is done and what they wrote can be seen. Where launches are plain, as in the interpreter, nothing of this is.

It is right because (1) a chained kernel waits in every program, before it reads what the step writes and before it
writes anything, so that its end is the end of all before it; and (2) the first kernel of a step is launched plainly:
it, and whatever starts early behind it, however far ahead, finds earlier steps complete. IS_EARLY lets the next kernel
start at once, otherwise when this one has waited.
"""

import torch
import triton
import triton.language as tl

from .device import arch
from .interpreter import INTERPRETED
from .launching import launch

PROGRAMMATIC = ("sm_90", "sm_100")


@triton.jit
def release(IS_EARLY: tl.constexpr, IS_CHAINED: tl.constexpr):
    """The first line of a kernel: the next one may start, if it is to start early."""
    if IS_CHAINED and IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(IS_EARLY: tl.constexpr, IS_CHAINED: tl.constexpr):
    """From here on what the step's earlier kernels wrote may be read."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_wait()
        if not IS_EARLY:
            tl.extra.cuda.gdc_launch_dependents()


def launch_chained(device: torch.device, kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel that calls both with its own IS_CHAINED, which is decided here."""
    chained = not INTERPRETED and arch(device) in PROGRAMMATIC
    launch(kernel, grid, **arguments, IS_CHAINED=chained, **({"launch_pdl": True} if chained else {}))
