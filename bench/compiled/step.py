"""What a training step is made of: `python -m bench.compiled.step --preset s` counts every launch, byte and FLOP of it.

The step runs on meta tensors: our launches are recorded by compile.py's `capture`, the vendor's operations by a
dispatch mode. Bytes are compulsory: each tensor of a launch once, however often the kernel comes back to it.
"""

import argparse
import contextlib
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import cost
from bench.compiled.compile import capture
from bench.rows import StepRow, to_json
from bench.tables import columns
from igpt import ImageGPT

# Neither views nor allocations move a byte.
FREE = (
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
)  # fmt: skip


class Vendor(TorchDispatchMode):
    """Counts the operations that are not ours: (name, bytes, FLOPs) each."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, float, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and name.removesuffix("_") not in FREE:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            if name == "matmul":  # not taken apart into mm inside a custom op
                flops = 2 * out.numel() * args[0].shape[-1]
            self.found.append((name, cost.moved(leaves), float(flops)))
        return out


@contextlib.contextmanager
def without_autocast():
    """Autocast knows no meta tensors, not even to be off for them."""
    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
    ):
        yield


def account(preset: str, B: int, N: int, arch: str = "sm_90") -> list[StepRow]:
    """Rows of one training step (loss and backward, bf16) of B pictures, most bytes first."""
    model = ImageGPT.from_preset(preset, impl="triton", device="meta", dtype=torch.bfloat16, n_ctx=N)
    tokens = torch.empty(B, N, dtype=torch.int64, device="meta")
    with without_autocast(), Vendor() as vendor, capture(arch) as launches:
        model.loss(tokens).backward()
    total = defaultdict(lambda: [0, 0.0, 0.0])
    ours = [(f"{x.file}.{x.name}", *astuple(cost.launch(x.name, x.values))[::-1]) for x in launches]
    for is_vendor, entries in ((False, ours), (True, vendor.found)):
        for name, n_bytes, flops in entries:
            sums = total[name, is_vendor]
            sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + n_bytes, sums[2] + flops
    rows = [
        StepRow("step", preset, B, N, name, vendor, n, b, f, cost.H200.floor_ms(cost.Cost(f, b), "bf16"))
        for (name, vendor), (n, b, f) in total.items()
    ]
    return sorted(rows, key=lambda r: -r.floor_ms)


def profile(call: Callable[[], object], runs: int = 3) -> str:
    """Milliseconds of each kernel in one of these calls, as torch's profiler saw them, most first; of each operation
    where there is no GPU."""
    gpu = torch.cuda.is_available()
    for _ in range(2):
        call()
    with torch.profiler.profile() as seen:
        start = time.perf_counter()
        for _ in range(runs):
            call()
        if gpu:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / runs
    spent = [  # on a GPU of kernels alone: an operation's time is that of its kernels
        ((x.self_device_time_total if gpu else x.self_cpu_time_total) / runs / 1e3, x.count / runs, x.key)
        for x in seen.key_averages()
        if (x.device_type == torch.autograd.DeviceType.CUDA and not x.is_user_annotation) == gpu
    ]
    spent.sort(reverse=True)
    total, launches = (math.fsum(x[i] for x in spent) for i in (0, 1))
    lines = [f"{1e3 * wall:.2f} ms with the profiler on; kernels' sum {total:.2f} ms, {launches:.0f} launches"]
    lines += [f"{ms:9.3f} ms {100 * ms / total:5.1f}%  x {n:6.1f} {1e3 * ms / n:9.1f} us  {name[:100]}"
              for ms, n, name in spent[:40]]  # fmt: skip
    return "\n".join(lines)


def table(rows: list[StepRow], markdown: bool = False) -> str:
    """One preset's step, most bytes first, and its sum."""
    first, lines = rows[0], []
    total = [math.fsum(getattr(r, f) for r in rows) for f in ("launches", "bytes", "flops", "floor_ms")]
    total = StepRow("step", first.preset, first.B, first.N, "total", False, *total)
    for r in [*rows, total]:
        name = f"aten.{r.kernel}" if r.vendor else r.kernel
        lines.append([name, f"{r.launches:.0f}", f"{r.bytes / 1e9:.3f}", f"{r.flops / 1e12:.3f}", f"{r.floor_ms:.3f}"])
    title = f"iGPT-{first.preset.upper()}, {first.B} x {first.N} tokens, bf16, loss and backward"
    return columns(lines, [title, "launches", "GB", "TFLOP", "floor ms"], markdown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled.step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["s", "m", "l"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file")
    args = parser.parse_args(argv)
    for preset in args.preset:
        rows = account(preset, args.batch, args.seq, args.arch)
        if args.out:
            with args.out.open("a") as out:
                out.writelines(to_json(row) + "\n" for row in rows)
        else:
            print(f"{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
