"""Products with epilogues: every epilogue over several tiles, by pointers and by TMA, against fp64."""

import pytest
import torch
from test_norm import DTYPES, assert_budget

from bench.budget import compare
from igpt.kernels import gemm, reference, tiles


def drawn(seed: int, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def gelu_grad(u):
    s = torch.sigmoid(reference.QUICK_GELU * u)
    return s * (1 + reference.QUICK_GELU * u * (1 - s))


def sums(t):
    """fp32 or wider sums of each row over 128 columns: [ceil(N / 128), M]."""
    return torch.stack([p.sum(1, dtype=torch.promote_types(t.dtype, torch.float32)) for p in t.split(gemm.PIECE, 1)])


# Each epilogue in eager PyTorch, with every option, one matrix pass at a time: (y, z or None, partials or None).
def linear(acc, row, bias, u, r):
    y = row[:, None].to(acc.dtype) * acc + bias + r
    return y, None, sums(reference.wide(y).square())


def gelu(acc, row, bias, u, r):
    z = row[:, None].to(acc.dtype) * acc + bias
    return reference.quick_gelu(z), z, None


def gelu_gradient(acc, row, bias, u, r):
    du = acc * gelu_grad(u)
    return row[:, None].to(acc.dtype) * du, None, sums(reference.wide(du) * reference.wide(u))


def norm_gradient(acc, row, bias, u, r):
    return acc - row[:, None].to(acc.dtype) * u + r, None, None


EPILOGUES = {"linear": linear, "gelu": gelu, "gelu_grad": gelu_gradient, "norm_grad": norm_gradient}
USES = {"linear": ("bias", "r"), "gelu": ("bias",), "gelu_grad": ("u",), "norm_grad": ("u", "r")}


# A forward product has a weight (N, K), a backward one (K, N); one of each the other way round.
PRODUCTS = [("linear", False), ("gelu", False), ("gelu_grad", True), ("norm_grad", True), ("linear", True)]
# fp32 has one tile, and TMA only helps 16 bits.
MACHINES = [(torch.float32, "portable"), *((t, a) for t in DTYPES[1:] for a in ("portable", "sm_90"))]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # sigmoid's right limit
@pytest.mark.parametrize(("dtype", "arch"), MACHINES, ids=str)
@pytest.mark.parametrize(("epilogue", "is_kn"), PRODUCTS)
@pytest.mark.parametrize("shape", [(300, 392, 80), (131, 520, 40), (3, 128, 64)], ids=str)
def test_budget(shape, epilogue, is_kn, dtype, arch, device, poison_empty):
    M, N, K = shape
    a, b = drawn(0, M, K, dtype=dtype), drawn(1, *((K, N) if is_kn else (N, K)), dtype=dtype, scale=K**-0.5)
    u, r, bias = (drawn(s, *size, dtype=dtype) for s, size in ((2, (M, N)), (3, (M, N)), (4, (N,))))
    row = drawn(5, M).exp()
    a, b, u, r, bias, row = (t.to(device) for t in (a, b, u, r, bias, row))

    def eager(*tensors):
        a, b, *rest = tensors
        return EPILOGUES[epilogue](a @ (b if is_kn else b.t()), *rest)

    used = {name: t for name, t in (("bias", bias), ("u", u), ("r", r)) if name in USES[epilogue]}
    z = torch.empty_like(u) if epilogue == "gelu" else None
    partials = gemm.empty_partials(M, N, device) if epilogue in ("linear", "gelu_grad") else None
    with tiles.target(arch):
        y = gemm.product(a, b, is_kn=is_kn, epilogue=epilogue, row=row, z=z, partials=partials, **used)
    tensors = a, b, row, bias, u, r
    wanted = zip(("y", "z", "partials"), (y, z, partials), eager(*tensors), eager(*(t.double() for t in tensors)))
    assert_budget([compare(name, *three) for name, *three in wanted if three[0] is not None])


def test_same_bits_every_run_and_every_grid(device, monkeypatch):
    """Each tile and partial has one writer: neither repetition nor the number of programs may change a bit."""
    a, b = drawn(0, 300, 64, dtype=torch.bfloat16).to(device), drawn(1, 400, 64, dtype=torch.bfloat16).to(device)
    results = []
    for programs in (4, 4, 1, 9):
        monkeypatch.setattr(tiles, "multiprocessors", lambda device, programs=programs: programs)
        partials = gemm.empty_partials(300, 400, device)
        results.append((gemm.product(a, b, partials=partials), partials))
    for y, partials in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(partials, results[0][1])


def test_a_tile_that_cannot_fit_is_refused(device, monkeypatch):
    monkeypatch.setitem(tiles.PRODUCT, ("gfx942", 2), tiles.Tile(256, 256, 64, num_stages=3))
    a = drawn(0, 16, 64, dtype=torch.bfloat16).to(device)
    message = r"product_kernel: Tile.* 131072 bytes .* gfx942 has 65536"
    with tiles.target("gfx942"), pytest.raises(ValueError, match=message):
        gemm.product(a, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unfold_gain(dtype, device, poison_empty):
    dw, weight, gain = (drawn(s, *size, dtype=dtype).to(device) for s, size in enumerate([[70, 100]] * 2 + [[100]]))
    exact = dw.double() * gain.double(), (dw.double() * weight.double()).sum(0)
    eager = dw * gain, (dw * weight).sum(0)
    ours = gemm.unfold_gain(dw.clone(), weight, gain)
    assert_budget([compare(name, *three) for name, *three in zip(("dw", "dgain"), ours, eager, exact)])


def test_statistics_from_partial_sums(device, poison_empty):
    x = drawn(0, 77, 300).to(device)
    stats = gemm.rstd_of(x, torch.ones(300, device=device), None, 1e-5)
    torch.testing.assert_close(gemm.rstd_of(x, None, sums(x.square()).contiguous(), 1e-5), stats, rtol=1e-6, atol=0)
    want = sums(x).sum(0) * stats[0].square() / 300
    torch.testing.assert_close(gemm.norm_grad_row(sums(x).contiguous(), stats, 300)[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["portable", "sm_90"])
def test_operands_of_any_strides_and_addresses(arch, device):
    """TMA and wide loads need rows from an address that 16 divides: other operands are copied."""
    a = drawn(0, 5 * 64 + 1, dtype=torch.bfloat16).to(device)[1:].view(5, 64)
    b = drawn(1, 64, 24, dtype=torch.bfloat16).to(device).t()
    r = drawn(2, 5, 48, dtype=torch.bfloat16).to(device)[:, ::2]
    with tiles.target(arch):
        y = gemm.product(a, b, r=r)
    torch.testing.assert_close(y, (a.float() @ b.float().t() + r.float()).bfloat16(), rtol=2**-7, atol=1e-3)
