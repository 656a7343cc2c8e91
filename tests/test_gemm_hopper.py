"""The warp-specialised products' protocol, in the simulator, with faults planted to show that it would tell."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from gluon_simulator import POLICIES, caught, load
from test_gemm import gelu, gelu_gradient

import igpt.kernels.tiles as tiles
from bench.budget import compare
from igpt.kernels import gemm, gemm_hopper

TILE = tiles.PRODUCT_HOPPER["gelu", 512]
EAGER = {"gelu": gelu, "gelu_grad": gelu_gradient}


@pytest.fixture(autouse=True)
def hopper():
    with tiles.target("sm_90"):
        yield


def right(epilogue, M=384, N=512, K=256, dtype=torch.bfloat16, has_row=True, has_z=True,
          policy="producer first", seed=0, edit=lambda source: source):  # fmt: skip
    """Whether y, z and the partial sums of one simulated launch keep the budget."""
    source = Path(tiles.__file__).with_name("gemm_hopper.py")
    module = load(source, "igpt.kernels", policy, seed, edit)
    g = torch.Generator().manual_seed(M + N + K)
    is_kn = epilogue == "gelu_grad"
    a, b, u = (torch.randn(s, generator=g).to(dtype) for s in ((M, K), (K, N) if is_kn else (N, K), (M, N)))
    b, row = b * K**-0.5, torch.rand(M, generator=g) + 0.5 if has_row else torch.ones(M)
    z, partials = None, None
    if is_kn:
        partials = torch.full((N // 128, M), float("nan"))
    elif has_z:
        z = torch.full((M, N), float("nan"), dtype=dtype)
    y = module["product"](a, b, is_kn, epilogue, row if has_row else None, u if is_kn else None, z, partials, TILE)

    def eager(*tensors):
        a, b, *rest = tensors
        return EAGER[epilogue](a @ (b if is_kn else b.t()), *rest)

    no_bias = torch.zeros(N, dtype=dtype)
    plain = eager(a, b, row, no_bias, u, u)
    exact = eager(*(t.double() for t in (a, b, row, no_bias, u, u)))
    return all(
        compare(name, ours, *others).ok
        for name, ours, *others in zip(("y", "z", "partials"), (y, z, partials), plain, exact) if ours is not None
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("epilogue", EAGER)
def test_right_under_every_schedule(epilogue, policy):
    assert right(epilogue, policy=policy)


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("epilogue", EAGER)
def test_persistent_programs_carry_their_phases_from_tile_to_tile(monkeypatch, epilogue, programs):
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: programs)
    assert right(epilogue, M=1408, K=64, policy="random", seed=programs)


@pytest.mark.parametrize("epilogue", EAGER)
def test_fp16_without_a_row_or_z(epilogue):
    assert right(epilogue, M=128, N=256, K=192, dtype=torch.float16, has_row=False, has_z=False)


# (what, the line as it stands, what stands there instead)
FAULTS = [
    ("no wait for a step", "mbarrier.wait(full.index(slot), (done // STAGES) & 1)", "pass"),
    ("no wait for a free slot", "mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)", "pass"),
    ("wrong byte count", "2 * (ROWS + PIECE) * STEP * 2", "(ROWS + PIECE) * STEP * 2"),
    ("one consumer's release is enough", "mbarrier.init(empty.index(slot), count=2)",
     "mbarrier.init(empty.index(slot), count=1)"),
    ("a step released in flight", "warpgroup_mma_wait(2, deps=[left, right])",
     "warpgroup_mma_wait(4, deps=[left, right])"),
    ("a release too many", "count=1, pred=i_k > 0", "count=1"),
    ("sums used in flight", "left, right = warpgroup_mma_wait(0, deps=[left, right])", "pass"),
    ("no wait for a free piece", "mbarrier.wait(staged_empty.index(c * 2), (tile & 1) ^ 1)", "pass"),
    ("no wait for the other free piece", "mbarrier.wait(staged_empty.index(c * 2 + 1), (tile & 1) ^ 1)", "pass"),
    ("no wait for a piece", "            mbarrier.wait(staged_full.index(place), tile & 1)\n            if",
     "            if"),
    ("a piece freed before its y has left", "staged_empty.index((place + 3) % 4)", "staged_empty.index(place)"),
    ("a piece freed before it was taken", "count=1, pred=tile * 4 + place > 0", "count=1"),
    ("y over z on its way out", "            tma.store_wait(0)  #", "            pass  #"),
    ("no fence behind y", "            piece.store(y.to(dtype))\n            fence_async_shared()",
     "            piece.store(y.to(dtype))"),
    ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
    ("halves of b exchanged", "right = warpgroup_mma(a, b2, right", "right = warpgroup_mma(a, b, right"),
]  # fmt: skip


@pytest.mark.parametrize("what, line, wrong", FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_caught(monkeypatch, what, line, wrong):
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 1)
    assert caught(functools.partial(right, "gelu", M=384, N=512, K=320), line, wrong)


def test_a_row_is_off_until_a_gpu_has_measured_it(monkeypatch):
    called = []
    monkeypatch.setattr(gemm_hopper, "product", lambda *args: called.append(args[-1]))
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((128, 512), (256, 512)))
    on = dataclasses.replace(TILE, evidence="H200, some day")
    monkeypatch.setitem(tiles.PRODUCT_HOPPER, ("gelu", 512), on)
    gemm.product(a, b, epilogue="gelu")
    assert called == [on]
    monkeypatch.setattr(gemm, "product_kernel", {(2,): lambda *args, **kwargs: called.append("plain")})
    monkeypatch.setattr(gemm.tiles, "multiprocessors", lambda device: 2)
    monkeypatch.setitem(tiles.PRODUCT_HOPPER, ("gelu_grad", 512), on)
    sums = {"epilogue": "gelu_grad", "u": a}
    for changed in (
        {"epilogue": "linear"}, {"epilogue": "gelu", "bias": a[0]}, {"epilogue": "gelu", "r": a}, sums,
    ):  # fmt: skip
        gemm.product(a, b.repeat(2, 1), **changed)
    with tiles.target("sm_100"):
        gemm.product(a, b.repeat(2, 1), epilogue="gelu")
    monkeypatch.setitem(tiles.PRODUCT_HOPPER, ("gelu", 512), dataclasses.replace(on, evidence="compiled only"))
    gemm.product(a, b.repeat(2, 1), epilogue="gelu")
    assert called[1:] == ["plain"] * 6


def test_what_does_not_fit_is_refused():
    module = load(Path(tiles.__file__).with_name("gemm_hopper.py"), "igpt.kernels")
    a = torch.zeros(128, 64, dtype=torch.bfloat16)
    for x, w in ((a[:100], torch.zeros(256, 64)), (a, torch.zeros(128, 64)), (a.float(), torch.zeros(256, 64))):
        with pytest.raises(ValueError, match=r"product_hopper: got .* expected fp16 or bf16 and multiples of 128, 256"):
            module["product"](x, w.to(x.dtype), False, "gelu", None, None, None, None, TILE)
    one, w = dataclasses.replace(TILE, num_stages=1), torch.zeros(256, 64, dtype=a.dtype)
    with pytest.raises(ValueError, match=r"product_hopper_kernel: .* has 1 stages, expected at least 2"):
        module["product"](a, w, False, "gelu", None, None, None, None, one)
