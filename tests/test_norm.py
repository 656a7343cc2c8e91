"""The norm's row kernels, alone: error budgets, hard values, odd shapes, determinism."""

import pytest
import torch

from bench.correctness.budget import against_fp64
from igpt.kernels import reference
from igpt.kernels.norm import norm, norm_backward_op, norm_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row, one column, odd sizes, the presets' widths, and rows enough for a program to take several steps.
SHAPES = [(2, 7, 40), (1, 512), (3, 1536), (37, 100), (9, 513), (5, 1), (2, 3, 3072), (150, 24)]


def values(kind: str, shape: tuple, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Activations: what a residual stream looks like, and what breaks a careless norm."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "mean":  # digits cancel when a mean is subtracted late
            x += 100
        case "outliers":  # a few channels far above the rest, as in trained transformers
            x[..., ::17] *= 60
        case "large":  # 300^2 is beyond fp16
            x = 300 + x
        case "zeros":  # rows whose norm is eps alone
            x[..., ::2, :] = 0
    return x.to(dtype)


def assert_budget(errors):
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def check(x, centred, eps=1e-5):
    weight = values("normal", x.shape[-1:], x.dtype, seed=1)
    assert_budget(
        against_fp64(
            lambda x, weight: norm(x, weight, eps, centred),
            lambda x, weight: reference.norm(x, weight, eps, centred),
            {"x": x, "weight": weight},
            ("x", "weight"),
        )
    )


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget(shape, dtype, centred, device, poison_empty):
    check(values("normal", shape, dtype).to(device), centred)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mean", "outliers", "large", "zeros"])
def test_hard_values(kind, dtype, centred, device, poison_empty):
    check(values(kind, (6, 136), dtype).to(device), centred)


@pytest.mark.parametrize("layout", ["row stride", "column stride", "broadcast"])
def test_strides(layout, device):
    x = values("normal", (5, 4, 96), torch.float32).to(device)
    x = {"row stride": x[..., :48], "column stride": x[..., ::2], "broadcast": x[:1, :, :48].expand(5, 4, 48)}[layout]
    check(x, centred=False)
    check(x, centred=True)


def test_gradient_of_a_sum_is_broadcast(device):
    x, w = values("normal", (4, 24), torch.float32).to(device), torch.ones(24, device=device)
    ones = torch.ones(1, device=device).expand(4, 24)
    assert_budget(against_fp64(norm, reference.norm, {"x": x, "weight": w}, ("x", "weight"), ones))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_gradient_and_n_of_the_backward_pass(dtype, centred, device, poison_empty):
    """dres is added in fp32 before the one rounding, and n comes out again with forward's very bits."""
    x, dn, dres = (values("normal", (19, 72), dtype, seed=s).to(device) for s in range(3))
    gain = values("normal", (72,), dtype, seed=3).to(device)
    n, stats, _ = norm_op(x, None, gain, 1e-5, centred)
    plain, dgain, _ = norm_backward_op(dn, x, gain, stats, None, False)
    fused, dgain2, again = norm_backward_op(dn, x, gain, stats, dres, True)
    assert torch.equal(again, n) and torch.equal(dgain, dgain2)
    exact, _, _ = norm_backward_op(*(t.float() for t in (dn, x, gain)), stats, dres.float(), False)
    torch.testing.assert_close(fused, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(plain, (exact - dres.float()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_same_bits_every_run(device):
    x, dn = (values("outliers", (200, 64), torch.bfloat16, seed=s).to(device) for s in range(2))
    gain = values("normal", (64,), torch.bfloat16, seed=2).to(device)
    _, stats, _ = norm_op(x, None, gain, 1e-5, False)
    first, *others = (norm_backward_op(dn, x, gain, stats, None, False)[:2] for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_no_rows(device):
    x = torch.empty(0, 32, device=device, requires_grad=True)
    w = torch.ones(32, device=device, requires_grad=True)
    y = norm(x, w)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 32) and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("centred", [False, True])
def test_opcheck_and_compile(centred, device):
    x, w = (values("normal", s, torch.float32).to(device).requires_grad_() for s in ((2, 3, 40), (40,)))
    rows, gain = x.detach().view(6, 40), w.detach()
    torch.library.opcheck(torch.ops.igpt.norm, (rows, rows, gain, 1e-5, centred))

    def loss(x, w):
        return norm(x, w, centred=centred).square().sum()

    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, w), (x, w))
    want = torch.autograd.grad(loss(x, w), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_second_derivative_is_refused(device):
    """Its first derivative may be part of a graph; what comes out of it knows that it cannot be differentiated."""
    x, w = torch.randn(3, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    y = norm(x, w)
    assert y.grad_fn.name() == "NormBackward"
    (once,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(once.detach(), *torch.autograd.grad(norm(x, w).square().sum(), x))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_bad_input(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"norm_weight: got torch.float32 \(7,\), expected torch.float32 \(8,\)"):
        norm(x, torch.ones(7, device=device))
    with pytest.raises(ValueError, match=r"norm_weight: got torch\.float16"):
        norm(x, torch.ones(8, device=device, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x: got torch\.float64"):
        norm(x.double(), torch.ones(8, device=device).double())
    with pytest.raises(ValueError, match=r"x: got torch.float32 \(1, 9000\), expected .* 1 <= d <= 8192"):
        norm(torch.zeros(1, 9000, device=device), torch.ones(9000, device=device))
