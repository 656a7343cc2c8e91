"""norm_linear and norm_mlp: error budgets for output and every gradient, hard values, odd shapes."""

import functools

import pytest
import torch
from test_norm import DTYPES, assert_budget, values

from bench.correctness.budget import against_fp64
from igpt.kernels import norm_linear as products
from igpt.kernels import norm_mlp as mlp
from igpt.kernels import reference

# Rows, width, output width: aligned, odd in each, one row.
SHAPES = [((2, 16), 64, 128), ((7,), 100, 72), ((2, 3), 513, 40), ((1,), 40, 513), ((1, 5), 256, 96)]
cases = pytest.mark.parametrize("case", SHAPES, ids=str)
norms = pytest.mark.parametrize("centred", [False, True])
activations = pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])


def inputs(kind, shape, d, out, dtype, bias, device):
    """Weights of size 1/sqrt(d), so that every intermediate is of order one."""
    t = {
        "x": values(kind, (*shape, d), dtype),
        "norm_weight": 1 + values("normal", (d,), dtype, 1) / 4,
        "weight": values("normal", (out, d), dtype, 2) * d**-0.5,
    }
    if bias:
        t["bias"] = values("normal", (out,), dtype, 3)
    return {k: v.to(device) for k, v in t.items()}


def mlp_inputs(kind, shape, d, f, dtype, bias, device):
    t = inputs(kind, shape, d, f, dtype, bias, device)
    t["w_fc"], t["w_proj"] = t.pop("weight"), (values("normal", (d, f), dtype, 4) * f**-0.5).to(device)
    if bias:
        t["b_fc"], t["b_proj"] = t.pop("bias"), values("normal", (d,), dtype, 5).to(device)
    return t


def check(ours, eager, t, centred=False, activation=None, **options):
    """`eager` knows only of `centred` and `activation`."""
    both = ({"centred": True} if centred else {}) | ({"activation": activation} if activation else {})
    ours, eager = functools.partial(ours, **both), functools.partial(eager, **both)
    assert_budget(against_fp64(lambda **k: ours(**k, **options), eager, t, tuple(t)))


@norms
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_linear(case, dtype, centred, device, poison_empty):
    t = inputs("normal", *case, dtype, case[1] % 8 == 0, device)
    check(products.norm_linear, reference.norm_linear, t, centred)


@norms
@activations
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_mlp(case, dtype, activation, centred, device, poison_empty):
    t = mlp_inputs("normal", *case, dtype, case[1] % 8 == 0, device)
    check(mlp.norm_mlp, reference.norm_mlp, t, centred, activation)


@norms
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_sums_up_the_stream(case, dtype, centred, device, poison_empty):
    """With `add`: the product of the norm of a sum, and the sum, whose gradients meet in one pass."""
    t = inputs("normal", *case, dtype, False, device)
    t["add"] = values("outliers", t["x"].shape, dtype, 6).to(device)

    def ours(x, norm_weight, weight, add, **options):
        return torch.cat(products.norm_linear(x, norm_weight, weight, add=add, through=True, **options), -1)

    def eager(x, norm_weight, weight, add, **options):
        return torch.cat([reference.norm_linear(x + add, norm_weight, weight, **options), x + add], -1)

    check(ours, eager, t, centred)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mlp_as_a_branch(dtype, device, poison_empty):
    """through: the two summands; each alone has its gradients."""
    t = mlp_inputs("normal", (2, 7), 72, 100, dtype, True, device)
    t["add"] = values("normal", (2, 7, 72), dtype, 6).to(device)

    def ours(add, only, **t):
        return torch.cat(mlp.norm_mlp(**t, add=add, through=True)[only], -1)

    def eager(x, add, only, **t):
        return torch.cat((reference.norm_mlp(x + add, **t) - (x + add), x + add)[only], -1)

    for only in (slice(None), slice(0, 1), slice(1, 2)):
        asked = t if only != slice(1, 2) else {name: t[name] for name in ("x", "add")}
        held = {name: t[name] for name in t if name not in asked}
        assert_budget(
            against_fp64(
                lambda only=only, held=held, **k: ours(only=only, **held, **k),
                lambda only=only, held=held, **k: eager(
                    only=only, **{n: h.to(k["x"].dtype) for n, h in held.items()}, **k
                ),
                asked, tuple(asked),
            )
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_through_the_norm(dtype, device, poison_empty):
    """Both gradients of x in one pass; either alone; and one backward node in all."""
    t = inputs("normal", (2, 7), 72, 72, dtype, False, device)

    def ours(x, norm_weight, weight, only=slice(None)):
        return torch.cat(products.norm_linear(x, norm_weight, weight, through=True)[only])

    def eager(x, norm_weight, weight, only=slice(None)):
        return torch.cat((reference.norm_linear(x, norm_weight, weight), x)[only])

    check(ours, eager, t)
    check(functools.partial(ours, only=slice(1)), functools.partial(eager, only=slice(1)), t)
    y, x = products.norm_linear(**{k: v.requires_grad_() for k, v in t.items()}, through=True)
    assert x.data_ptr() == t["x"].data_ptr()  # no copy
    assert y.grad_fn.next_functions[0][0] is x.grad_fn.next_functions[0][0]
    loss = torch.compile(lambda **t: ours(**t).square().sum(), backend="aot_eager", fullgraph=True)(**t)
    got, want = (torch.autograd.grad(l, tuple(t.values())) for l in (loss, ours(**t).square().sum()))
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@activations
@pytest.mark.parametrize("bias", [False, True])
def test_norm_mlp_recomputing(bias, activation, device, poison_empty):
    t = mlp_inputs("normal", (2, 7), 80, 144, torch.bfloat16, bias, device)
    check(mlp.norm_mlp, reference.norm_mlp, t, activation=activation, recompute=True)


@norms
@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mean", "outliers", "large", "zeros"])
def test_hard_values(kind, dtype, activation, centred, device, poison_empty):
    t = mlp_inputs(kind, (12,), 144, 160, dtype, False, device)
    check(mlp.norm_mlp, reference.norm_mlp, t, centred, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_far_from_zero(dtype, device, poison_empty):
    """Where it is x, and where it is 0: nothing infinite, and no gradient but 1 and 0."""
    u = torch.tensor([-3e4, -100, -9, -1, 0, 1, 9, 100, 3e4], device=device).to(dtype)
    du = torch.ones_like(u)
    h = torch.ops.igpt.gelu_backward_(u, du, True, True)
    assert torch.equal(h, torch.ops.igpt.gelu(u, True)) and torch.equal(h[[0, 1, 7, 8]], u.relu()[[0, 1, 7, 8]])
    assert du[[0, 1, 7, 8]].tolist() == [0, 0, 1, 1] and h.isfinite().all() and du.isfinite().all()


def test_strides(device):
    """Columns of a wider matrix, and a transposed weight: what packed projections hand over."""
    t = mlp_inputs("normal", (2, 9), 96, 80, torch.float32, False, device)
    t["x"] = t["x"][..., 32:]
    t["norm_weight"] = t["norm_weight"][::3][:64].repeat(2)[:64]
    t["w_fc"], t["w_proj"] = t["w_fc"][:, :64], t["w_proj"][:64]
    check(mlp.norm_mlp, reference.norm_mlp, t)
    t = {"x": t["x"], "norm_weight": t["norm_weight"], "weight": t["w_fc"].t().contiguous().t()}
    check(products.norm_linear, reference.norm_linear, t)


def test_nothing_is_kept_without_gradients(device):
    t = mlp_inputs("normal", (4,), 32, 64, torch.float32, False, device)
    want = mlp.norm_mlp(**{k: v.requires_grad_() for k, v in t.items()})
    with torch.no_grad():
        assert torch.equal(mlp.norm_mlp(**t), want)
    x, *weights = t.values()
    out = mlp.NormMLP(x, None, *weights, None, None, 1e-5, False, False, False, 0)
    assert [o.numel() for o in out] == [4 * 32, 4 * 32, 4, 0, 0]


def test_backward_keeps_nothing_twice(device):
    """Bytes held between forward and backward: the statistics, u and h; u alone when recomputing."""
    t = {k: v.requires_grad_() for k, v in mlp_inputs("normal", (8,), 32, 128, torch.float32, False, device).items()}
    for recompute, want in ((False, 8 * 4 + 2 * 8 * 128 * 4), (True, 8 * 4 + 8 * 128 * 4)):
        held = {}

        def pack(s, held=held):
            held[s.untyped_storage().data_ptr()] = s.untyped_storage().nbytes()
            return s

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s):
            mlp.norm_mlp(**t, recompute=recompute)
        given = {v.untyped_storage().data_ptr() for v in t.values()}
        assert sum(size for p, size in held.items() if p not in given) == want


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_and_compile(bias, device):
    t = mlp_inputs("normal", (2, 5), 32, 48, torch.float32, bias, device)
    a = {k: v.requires_grad_() for k, v in t.items()}
    x, gain, stats = a["x"].detach().view(10, 32), a["norm_weight"].detach(), torch.ones(1, 10, device=device)
    u, dh = torch.randn(2, 10, 48, device=device)
    ops = torch.ops.igpt
    torch.library.opcheck(ops.norm, (x, x, gain, 1e-5, bias))
    torch.library.opcheck(ops.norm_backward, (x, x, gain, stats, None if bias else x, bias))
    torch.library.opcheck(ops.gelu, (u, bias))
    torch.library.opcheck(ops.gelu_backward_, (u, dh, bias, not bias))

    def block(**t):
        y, x = products.norm_linear(t["x"], t["norm_weight"], t["w_fc"], t.get("b_fc"), through=True)
        return mlp.norm_mlp(**{**t, "x": x}, add=y @ t["w_proj"].t()).square().sum()

    got = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(**a), tuple(a.values()))
    want = torch.autograd.grad(block(**a), tuple(a.values()))
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_bad_input(device):
    t = mlp_inputs("normal", (4,), 32, 64, torch.float32, True, device)
    wrong_ones = {"w_fc": t["w_proj"], "w_proj": t["w_fc"], "b_fc": t["b_proj"], "b_proj": t["b_proj"].half()}
    for name, wrong in wrong_ones.items():
        with pytest.raises(ValueError, match=f"norm_mlp: {name}: got"):
            mlp.norm_mlp(**{**t, name: wrong})
    with pytest.raises(ValueError, match="norm_mlp: activation: got 'relu', expected one of"):
        mlp.norm_mlp(**t, activation="relu")
    with pytest.raises(ValueError, match="norm_linear: weight: got"):
        products.norm_linear(t["x"], t["norm_weight"], t["w_proj"])
    with pytest.raises(ValueError, match="norm_linear: add: got"):
        products.norm_linear(t["x"], t["norm_weight"], t["w_fc"], add=t["x"][1:])
