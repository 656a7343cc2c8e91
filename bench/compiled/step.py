"""What a training step is made of: every launch, byte and FLOP of it, counted.

The step runs on meta tensors: our launches are recorded by compile.py's `capture`, the vendor's operations by a
dispatch mode. Bytes are compulsory: each tensor of a launch once, however often the kernel comes back to it.
"""

import contextlib
from collections import defaultdict
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import cost
from bench.compiled.compile import capture
from bench.rows import StepRow
from igpt import ImageGPT

# Neither views nor allocations move a byte.
FREE = (
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
)  # fmt: skip


class Vendor(TorchDispatchMode):
    """Counts the operations that are not ours: the name and cost of each."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, cost.Cost]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and name.removesuffix("_") not in FREE:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            if name == "matmul":  # not taken apart into mm inside a custom op
                flops = 2 * out.numel() * args[0].shape[-1]
            self.found.append((name, cost.Cost(float(flops), cost.moved(leaves))))
        return out


# Autocast knows no meta tensors, not even to be off for them.
WITHOUT_AUTOCAST = {"is_autocast_enabled": lambda *_: False, "autocast": lambda *_, **__: contextlib.nullcontext()}


def launched(model, *batch: torch.Tensor) -> None:
    """A step of a model on meta tensors, but for its optimiser."""
    with mock.patch.multiple(torch, **WITHOUT_AUTOCAST):
        model.loss(*batch).backward()


def account(preset: str, B: int, N: int) -> list[StepRow]:
    """Rows of one training step (loss and backward, bf16, on sm_90) of B pictures, most of the floor first."""
    model = ImageGPT.from_preset(preset, impl="triton", device="meta", dtype=torch.bfloat16, n_ctx=N)
    tokens = torch.empty(B, N, dtype=torch.int64, device="meta")
    with Vendor() as vendor, capture("sm_90") as launches:
        launched(model, tokens)
    entries = defaultdict(list)
    for x in launches:
        entries[f"{x.file}.{x.name}", False].append(cost.launch(x.name, x.values))
    for name, found in vendor.found:
        entries[name, True].append(found)
    rows = []
    for (name, is_vendor), found in entries.items():
        total = sum(found, cost.Cost(0.0, 0.0))
        floor = cost.H200.floor_ms(total, "bf16")
        rows.append(StepRow("step", preset, B, N, name, is_vendor, len(found), total.bytes, total.flops, floor))
    return sorted(rows, key=lambda r: -r.floor_ms)
