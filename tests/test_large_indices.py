"""No index passes 2^31 unnoticed: every kernel's addresses at batch 256, 4096 positions and width 1536, and at 2^31
pixels, without the memory.

Launches are recorded on meta tensors (kernels/launching.py). Then the interpreter runs the first and the last program
of each, with arguments at made-up addresses, where a load gives a constant and every address that is touched must lie
in the tensor that its pointer came from.
"""

from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench.cases import ROW_OPS, Case, shapes
from bench.compiled.cases import decode_step, forward_and_backward, meta
from igpt.kernels import embedding, norm
from igpt.kernels.launching import recording
from igpt.kernels.palette import palette_decode, palette_encode, palette_sums
from igpt.sample.draw import Sampler

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="reads addresses as the interpreter does")

B, N, COLOURS, PIXELS = 256, 4096, 512, 1 << 31
LOADED = {"position": N - 1, "tokens": COLOURS - 1, "targets": COLOURS - 1}  # by argument; all else loads as 0


class Address:
    """Stands for a tensor, in the middle of a place of its own of 2^48 bytes."""

    def __init__(self, name: str, tensor: torch.Tensor, place: int):
        self.name, self.dtype, self.start = name, tensor.dtype, (place << 48) + (1 << 47)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.stop = self.start + (last + 1) * tensor.element_size() if tensor.numel() else self.start

    def data_ptr(self) -> int:
        return self.start


def run(kernel, grid: tuple, arguments: dict, monkeypatch) -> int:
    """Runs two programs of a launch; gives the highest offset touched, in elements."""
    fn = kernel.rewrite()
    executor = interpreter.GridExecutor(fn, kernel.arg_names, grid)
    tensors = [name for name in kernel.arg_names if torch.is_tensor(arguments.get(name))]
    places = {name: Address(name, arguments[name], i) for i, name in enumerate(tensors)}
    highest = 0

    def touch(pointers, mask) -> Address:
        nonlocal highest
        touched = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        address = list(places.values())[int(pointers.data.flat[0] >> np.uint64(48))]
        if touched.size:
            low, high = int(touched.min()), int(touched.max())
            assert address.start <= low and high < address.stop, (
                f"{kernel.__name__}: {address.name}: bytes {low - address.start} to {high - address.start} of "
                f"{address.stop - address.start}"
            )
            highest = max(highest, (high - address.start) // address.dtype.itemsize)
        return address

    def load(pointers, mask, other, *_):
        value = LOADED.get(touch(pointers, mask).name, 0)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.full(pointers.data.shape, value, interpreter._get_np_dtype(kind)), kind)

    def add(_, pointers, value, mask, *__):
        touch(pointers, mask)
        return interpreter.TensorHandle(np.zeros_like(value.data), value.dtype.scalar)

    builder = interpreter.interpreter_builder
    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load, raising=False)
        patch.setattr(builder, "create_masked_store", lambda p, value, mask, *_: touch(p, mask), raising=False)
        patch.setattr(builder, "create_atomic_rmw", add, raising=False)
        scope = interpreter._patch_lang(fn)
        try:
            given = {name: places.get(name, arguments.get(name)) for name in kernel.arg_names}
            given = {k: v if k in executor.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
            grid = (*grid, 1, 1)[:3]
            builder.set_grid_dim(*grid)
            for program in ((0, 0, 0), tuple(size - 1 for size in grid)):
                builder.set_grid_idx(*program)
                fn(**given)
        finally:
            scope.restore()
    return highest


@triton.jit
def narrow_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 0)


def test_a_narrow_product_is_seen(monkeypatch):
    x = meta(PIXELS + 1024, dtype=torch.uint8)
    run(narrow_kernel, (PIXELS // 1024,), {"x": x, "BLOCK": 1024}, monkeypatch)
    with pytest.raises(AssertionError, match="narrow_kernel: x: bytes -2147483648 to -2147482625 of 2147484672"):
        run(narrow_kernel, (PIXELS // 1024 + 1,), {"x": x, "BLOCK": 1024}, monkeypatch)


H, D = shapes("l")
CASES = {op: partial(forward_and_backward, Case(op, B, N, H, D, "bf16")) for op in ROW_OPS}
CASES |= {
    f"attention {causal}": partial(forward_and_backward, Case("attention", B, N, H, D, "bf16", causal))
    for causal in (True, False)
}
CASES |= {
    "decode": partial(decode_step, "l", B, n_ctx=N), "decode few": partial(decode_step, "l", 4, n_ctx=N),
    "decode fp32": partial(decode_step, "l", B, torch.float32, None, "fp32", Sampler(top_k=9, top_p=0.5), n_ctx=N),
    "palette_encode": lambda: palette_encode(meta(PIXELS, 3, dtype=torch.uint8), meta(COLOURS, 3)),
    "palette_decode": lambda: palette_decode(meta(PIXELS, dtype=torch.int64), meta(COLOURS, 3)),
    "palette_sums": lambda: palette_sums(
        meta(PIXELS, 3, dtype=torch.uint8), meta(PIXELS, dtype=torch.int64), meta(COLOURS, 3)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_addresses(case, monkeypatch, record_property):
    launches, highest = [], {}
    for module in (embedding, norm):  # as many programs as a large GPU takes, so that each has little to do
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8192)
    with recording(lambda *launch: launches.append(launch)):
        CASES[case]()
    assert launches
    for kernel, grid, arguments in launches:
        highest[kernel.__name__] = max(run(kernel, grid, arguments, monkeypatch), highest.get(kernel.__name__, 0))
    record_property("count", ", ".join(f"{name} {offset:.1e}" for name, offset in highest.items()))
