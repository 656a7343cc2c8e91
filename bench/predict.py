"""A guess at a launch's time on an H200, from its binary and its floor: a prediction, and labelled so everywhere.

    products   FLOPs / 790 TFLOP/s with wgmma, 62% of that with the older mma
    exp2       one a pair of positions in attention, 16 a cycle and multiprocessor
    bytes      compulsory bytes / 4.3 TB/s; below a quarter of the resident warps plain loads cannot fill the memory

A kernel that issues its exponentials with no product in flight has the two one after the other; one that has a good
part of them under products (the first block's, masked, come before any), or none, is as slow as its slowest part.
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


def work(name: str, values: dict) -> Work:
    attends = name.rsplit(".", 1)[-1] in cost.ATTENTION_PRODUCTS
    return Work(cost.launch(name, values), cost.pairs(values) if attends else 0.0)


def milliseconds(row: CompileRow, work: Work) -> float | None:
    """None where nothing is known of the launch's work, or fp32 products run outside of the matrix units."""
    if not work.cost.bytes or (work.cost.flops and not row.mma):
        return None
    products = work.cost.flops / (PRODUCTS if row.wgmma else OLD_MMA * PRODUCTS)
    memory = work.cost.bytes / cost.H200.bytes * (1.0 if row.tma else max(1.0, 0.25 / max(row.occupancy, 0.01)))
    exponentials = work.exponentials / EXP2
    overlaps = row.exp2_under >= 0.4 * row.exp2
    on_chip = max(products, exponentials) if overlaps else products + exponentials
    return 1e3 * max(on_chip, memory)
