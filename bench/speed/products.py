"""quick-gelu's products: the vendor's product and an elementwise pass, which is what runs, beside the candidates of
kernels/gelu_hopper.py, each held to the error budget before it is timed.

The rows of "ours" have the ratios: below 1 the candidate is the quicker one.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case, Draw
from bench.correctness.budget import compare
from bench.rows import Row
from bench.speed.measure import Run, together
from bench.speed.peers import Absent
from igpt.kernels import reference, tiles
from igpt.kernels.gelu_hopper import fits, gelu_backward_hopper, gelu_forward_hopper
from igpt.kernels.norm_mlp import gelu_backward_op, gelu_op
from igpt.kernels.tiles import Tile

CANDIDATES = {f"gluon, steps of {tile.BLOCK_K}": tile for tile in tiles.GELU_HOPPER}


def operands(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, w_fc and None; backward dz, w_proj and u."""
    draw, T, wide = Draw(case, device), case.B * case.N, 4 * case.d
    if case.direction == "fwd":
        return draw.normal(T, case.d), draw.weight(wide, case.d), None
    return draw.normal(T, case.d), draw.weight(case.d, wide), draw.normal(T, wide)


def now(x, w, u) -> tuple[torch.Tensor, torch.Tensor]:
    """u and h; backward du and h."""
    first = F.linear(x, w) if u is None else x @ w
    return first, gelu_op(first, False) if u is None else gelu_backward_op(u, first, False, True)


def candidate(tile: Tile, x, w, u, alone: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same; alone: h without u, du without h."""
    first, h = (x.new_empty(len(x), w.shape[u is not None]) for _ in range(2))
    if u is None:
        first = None if alone else first
        gelu_forward_hopper(x, w, None, first, h, tile)
    else:
        h = None if alone else h
        gelu_backward_hopper(x, w, u, first, h, tile)
    return first, h


def wanted(x, w, u) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the reference, in the operands' dtype."""
    if u is None:
        u = F.linear(x, w)
        return u, reference.quick_gelu(u)
    u = u.detach().requires_grad_()
    h = reference.quick_gelu(u)
    return torch.autograd.grad(h, u, x @ w)[0], h.detach()


def build(name: str, case: Case, device: str) -> Callable[[], object]:
    """The timed call, of a candidate only if its results are within the budget."""
    given = operands(case, device)
    if name == "ours":
        return functools.partial(now, *given)
    if not fits(*given):
        raise Absent("needs sm_90, fp16 or bf16")
    call = functools.partial(candidate, CANDIDATES[name], *given)
    exact = wanted(*(t if t is None else t.double() for t in given))
    errors = map(compare, ("u or du", "h"), call(), wanted(*given), exact)
    if over := [str(e) for e in errors if not e.ok]:
        raise ArithmeticError("; ".join(over))
    return call


def rows(cases: Iterable[Case], run: Run) -> Iterator[Row]:
    for case in cases:
        group = [(name, case) for name in ("ours", *CANDIDATES)]
        yield from together("kernels", group, build, {}, run)
