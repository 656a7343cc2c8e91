"""A guess at a launch's time on an H200, from its binary and its floor: a prediction, and labelled so everywhere.

    products   FLOPs / 790 TFLOP/s with wgmma, 62% of that with the older mma
    exp2       one a pair of positions in attention, 16 a cycle and multiprocessor; quick-gelu's two operations of the
               same unit an element in the epilogues of products
    bytes      compulsory bytes / 4.3 TB/s; below a quarter of the resident warps plain loads cannot fill the memory

A kernel that issues its exponentials with no product in flight has the two one after the other; one that has a good
part of them under products (the first block's, masked, come before any), or in a partition of their own, or none, is
as slow as its slowest part.
"""

from dataclasses import dataclass

from bench import cost
from bench.rows import CompileRow

PRODUCTS, OLD_MMA, EXP2 = cost.H200.flops["bf16"], 0.62, 16 * 132 * 1.755e9


@dataclass(frozen=True)
class Work:
    """What a launch has to do."""

    cost: cost.Cost
    exponentials: float
    apart: bool = False  # the exponentials have a partition of their own


def work(name: str, values: dict) -> Work:
    total, apart = cost.launch(name, values), name == "gemm_hopper.product_hopper_kernel"
    if name.rsplit(".", 1)[-1] in cost.ATTENTION_PRODUCTS:
        return Work(total, cost.pairs(values))
    if apart or values.get("EPILOGUE") in ("gelu", "gelu_grad"):
        return Work(total, 2.0 * values["M"] * values["N"], apart)
    return Work(total, 0.0)


def milliseconds(row: CompileRow, work: Work) -> float | None:
    """None where nothing is known of the launch's work, or fp32 products run outside of the matrix units."""
    if not work.cost.bytes or (work.cost.flops and not row.mma):
        return None
    products = work.cost.flops / (PRODUCTS if row.wgmma else OLD_MMA * PRODUCTS)
    memory = work.cost.bytes / cost.H200.bytes * (1.0 if row.tma else max(1.0, 0.25 / max(row.occupancy, 0.01)))
    exponentials = work.exponentials / EXP2
    overlaps = work.apart or row.exp2_under >= 0.4 * row.exp2
    on_chip = max(products, exponentials) if overlaps else products + exponentials
    return 1e3 * max(on_chip, memory)
