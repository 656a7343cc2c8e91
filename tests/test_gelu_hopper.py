"""quick-gelu's warp-specialised products: their protocol in the simulator, and what an approximate tanh costs."""

import dataclasses
import functools
import itertools
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gluon_simulator import POLICIES, caught, load

from bench import cost
from bench.cases import Case
from bench.correctness.budget import compare
from bench.speed import measure, products
from bench.speed.timing import CpuTimer
from igpt.kernels import device, reference, tiles
from igpt.kernels.tiles import GELU_HOPPER

FORMS = "forward", "h alone", "backward", "du alone"


@pytest.fixture(autouse=True)
def hopper():
    with device.target("sm_90"):
        yield


def simulated(policy="producer first", seed=0, edit=lambda source: source):
    return load(Path(tiles.__file__).with_name("gelu_hopper.py"), "igpt.kernels", policy, seed, edit)


def normal(*shape, dtype, std=1.0):
    """Rows at 16 bytes, the head of something larger that is NaN."""
    big = torch.full([n + 8 for n in shape[:-1]] + [-(-shape[-1] // 8) * 8 + 8], float("nan"), dtype=dtype)
    view = big[tuple(slice(0, n) for n in shape)]
    return view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * std)


def unwritten(M, N, dtype):
    return normal(M, N, dtype=dtype, std=float("nan"))


def untouched_outside(t):
    return t._base[t.shape[0] :].isnan().all() and t._base[:, t.shape[1] :].isnan().all()


def forward(M, K, N, dtype=torch.bfloat16, tile=GELU_HOPPER[0], bias=True, alone=False, wide=1.0, **how):
    """Whether u and h, or h alone, of a simulated launch are within the budget and nothing else is written."""
    x, w = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, std=wide * K**-0.5)
    b = normal(N, dtype=dtype) if bias else None
    u, h = None if alone else unwritten(M, N, dtype), unwritten(M, N, dtype)
    simulated(**how)["gelu_forward_hopper"](x, w, b, u, h, tile)
    eager, exact = F.linear(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double())
    found = [("h", h, reference.quick_gelu(eager), reference.quick_gelu(exact))]
    found += [] if alone else [("u", u, eager, exact)]
    return all(compare(*f).ok for f in found) and all(untouched_outside(f[1]) for f in found)


def backward(M, K, N, dtype=torch.bfloat16, tile=GELU_HOPPER[0], alone=False, wide=1.0, **how):
    """The same for du and h, or du alone."""
    dz, w, u = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, std=K**-0.5), normal(M, N, dtype=dtype, std=wide)
    du, h = unwritten(M, N, dtype), None if alone else unwritten(M, N, dtype)
    simulated(**how)["gelu_backward_hopper"](dz, w, u, du, h, tile)

    def answers(dtype):
        x = u.to(dtype).requires_grad_()
        h = reference.quick_gelu(x)
        return torch.autograd.grad(h, x, dz.to(dtype) @ w.to(dtype))[0], h.detach()

    found = list(zip(("du", "h"), (du, h), answers(dtype), answers(torch.double)))[: 1 if alone else 2]
    return all(compare(*f).ok for f in found) and all(untouched_outside(f[1]) for f in found)


RUNS = {
    "forward": forward,
    "h alone": functools.partial(forward, alone=True, bias=False),
    "backward": backward,
    "du alone": functools.partial(backward, alone=True),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", GELU_HOPPER, ids=lambda tile: f"steps of {tile.BLOCK_K}")
def test_right_under_every_schedule(tile, form, policy):
    assert RUNS[form](200, 264, 264, tile=tile, policy=policy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M, K, N", [(1, 256, 264), (63, 256, 256), (65, 200, 520), (129, 512, 72), (333, 168, 300)])
@pytest.mark.parametrize("form", ["forward", "backward"])
def test_any_number_of_rows_and_columns(form, M, K, N, dtype):
    assert RUNS[form](M, K, N, dtype=dtype, policy="random", seed=M)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_persistent_programs_carry_their_phases_from_tile_to_tile(monkeypatch, form, programs):
    """5 bands: three groups of them, the last one short."""
    monkeypatch.setattr(device, "multiprocessors", lambda _: programs)
    edit = lambda source: source.replace("BANDS = 16", "BANDS = 2")  # noqa: E731
    assert RUNS[form](5 * 128 - 7, 192, 520, policy="random", edit=edit)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_second_consumer_never_begins_a_tile_before_the_first_leads(monkeypatch, policy):
    monkeypatch.setattr(device, "multiprocessors", lambda _: 1)
    module, issued = simulated(policy), []
    real = module["warpgroup_mma"]

    def recorded(*operands, **options):
        issued.append(threading.current_thread().rank)
        return real(*operands, **options)

    module["warpgroup_mma"] = recorded
    M, K, N, steps, lead = 256, 256, 512, 8, GELU_HOPPER[0].num_stages // 3
    x, w, out = (normal(*shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (M, N)))
    module["gelu_forward_hopper"](x, w, None, None, out)
    assert issued.count(0) == issued.count(1) == 4 * steps
    for tile in range(4):
        before = issued[: [i for i, rank in enumerate(issued) if rank == 1][tile * steps]]
        assert before.count(0) > tile * steps + lead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [4.0, 20.0])
@pytest.mark.parametrize("form", ["forward", "backward"])
def test_tails_keep_the_budget(form, wide, dtype):
    """u of so many standard deviations: sigmoids that are 0 or 1, and all that lies between."""
    assert RUNS[form](128, 256, 256, dtype=dtype, wide=wide)


@pytest.mark.parametrize("form", ["forward", "backward"])
def test_a_tanh_that_is_not_stretched_is_over_the_budget_in_the_tails(form):
    run = functools.partial(RUNS[form], 128, 256, 256, dtype=torch.float16, wide=20.0)
    assert caught(run, "0f3F001000", "0f3F000000") is (form == "backward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_tanh_makes_the_sigmoid(dtype):
    """With the worst tanh that PTX allows."""
    u = torch.linspace(-40, 40, 100001).to(dtype).float()
    s, exact = simulated()["sigmoid"](0.851 * u), torch.sigmoid(1.702 * u.double())
    error = (s - exact).abs()
    assert 2.4e-4 < error.max() < 4.9e-4
    assert error[u.abs() > 8].max() < 2e-6
    slope = exact + 1.702 * u * exact * (1 - exact)
    assert ((s + 1.702 * u * (s - s * s)) - slope).abs().max() < 4e-3
    for x in (torch.tensor([torch.nan]), torch.tensor([torch.inf])):
        assert torch.equal((x * simulated()["sigmoid"](0.851 * x)).isnan(), reference.quick_gelu(x).isnan())


def test_what_backward_makes_again_has_the_bits_of_forward():
    M, K, N, dtype = 200, 256, 264, torch.bfloat16
    x, w, v = (normal(*shape, dtype=dtype) for shape in ((M, K), (N, K), (K, N)))
    u, h, du, again = (unwritten(M, N, dtype) for _ in range(4))
    module = simulated()
    module["gelu_forward_hopper"](x, w, None, u, h)
    module["gelu_backward_hopper"](x, v, u, du, again)
    assert torch.equal(h, again)


FREE = "mbarrier.wait(ring[2].index(place), parity ^ 1)"
# (what, the text as it stands, what stands there instead)
FAULTS = {
    "forward": [
        ("no wait for a step", "    wait_filled(ring, step)\n    tile = view", "    tile = view"),
        ("no wait for a free place", FREE, "pass"),
        ("wrong phase", "parity ^ 1", "parity"),
        ("wrong byte count", "(2 * ROWS + COLUMNS) * STEP * 2", "(ROWS + COLUMNS) * STEP * 2"),
        ("one consumer's arrival is enough", "b_desc], STAGES, 2)", "b_desc], STAGES, 1)"),
        ("the other consumer's rows", "warpgroup_mma(tile[c], b", "warpgroup_mma(tile[1 - c], b"),
        ("a step released while it is read", "release(ring, step - 1)\n    return", "release(ring, step)\n    return"),
        ("the last step kept", "step += STEPS\n        release(ring, step - 1)", "step += STEPS"),
        ("accumulators used in flight", "warpgroup_mma_wait(0, deps=[acc])", "warpgroup_mma_wait(1, deps=[acc])"),
        ("the second never called", "mbarrier.arrive(order, count=1)", "pass"),
        ("the second called once", "mbarrier.wait(order, tile & 1)", "mbarrier.wait(order, 0)"),
        ("no fence before a store", "    fence_async_shared()\n    for", "    for"),
        ("no fence behind the barriers", "    fence_async_shared()  # threads", "    # threads"),
        ("a chunk of h over the last one", "tma.store_wait(1)", "pass"),
        ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
        ("the bias of other columns", "o_n = column + j * WIDTH", "o_n = j * WIDTH"),
        ("the bias past its end", "mask=o_n < N", "mask=o_n <= N"),
        ("halves exchanged", "halves(left) + halves(right)", "halves(right) + halves(left)"),
        ("h in u's chunk", "put(own, CHUNKS,", "put(own, j,"),
        ("bands side by side", "(2 * band + c) * ROWS", "(band + c) * ROWS"),
    ],
    "h alone": [
        ("a tile over the last one", "tma.store_wait(0)\n        if IS_GRAD", "pass\n        if IS_GRAD"),
        ("u not rounded", "place.store(x.to(dtype))", "pass"),
    ],
    "backward": [
        ("no wait for u", "wait_filled(own, tile)", "pass"),
        ("u never claimed", "claim(own[c], tile, ROWS * COLUMNS * 2)", "pass"),
        ("the other consumer's u", "row + c * ROWS, column + j * WIDTH], own[c]",
         "row + (1 - c) * ROWS, column + j * WIDTH], own[c]"),
        ("u's place kept", "release(own, tile - 1, tile > 0)", "pass"),
        ("u's place freed a tile early", "release(own, tile - 1, tile > 0)", "release(own, tile)"),
        ("u's place freed while du leaves", "tma.store_wait(0)\n        if IS_GRAD", "pass\n        if IS_GRAD"),
        ("the sigmoid's slope forgotten", "(s - s * s)", "s"),
        ("weights transposed", "[0, k * STEP, column] if", "[0, column, k * STEP] if"),
    ],
}  # fmt: skip
PLANTED = [(form, *fault) for form, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize("form, what, right, wrong", PLANTED, ids=[f"{f[0]}: {f[1]}" for f in PLANTED])
def test_planted_faults_are_caught(monkeypatch, form, what, right, wrong):
    monkeypatch.setattr(device, "multiprocessors", lambda _: 1)
    assert caught(functools.partial(RUNS[form], 300, 256, 520), right, wrong)


def test_what_does_not_fit_is_refused(monkeypatch):
    module = simulated()
    forward, backward = module["gelu_forward_hopper"], module["gelu_backward_hopper"]
    x, w, v, u = (normal(*shape, dtype=torch.bfloat16) for shape in ((64, 256), (512, 256), (256, 512), (64, 512)))
    for call, words in (
        (lambda: forward(x, w[:, :-8], None, u, u), r"forward_hopper: w_fc: got .*expected floats \(512, 256\)"),
        (lambda: forward(x, w, w[:8, 0], u, u), r"b_fc: got .*expected floats \(512,\)"),
        (lambda: forward(x, w, None, u[1:], u), r"u: got .*expected floats \(64, 512\)"),
        (lambda: forward(x, w, None, None, u.mT), r"h: got .*expected floats \(64, 512\)"),
        (lambda: forward(x[:0], w, None, None, u[:0]), "x: got .*expected fp16 or bf16 like the others, not empty"),
        (lambda: forward(x.float(), w, None, u, u), "x: got torch.float32.*expected fp16 or bf16"),
        (lambda: forward(x, w.half(), None, u, u), "w_fc: got torch.float16.*like the others"),
        (lambda: forward(x, w.mT.contiguous().mT, None, u, u), "w_fc: got .*strides .*rows at 16 bytes"),
        (lambda: forward(x[:, :160], w[:, :160], None, u, u), "x: got .*expected more than 160 columns"),
        (lambda: backward(x, v, u, u, u[:, :-1]), r"backward_hopper: h: got .*expected floats \(64, 512\)"),
        (lambda: backward(x, w, u, u, None), r"w_proj: got .*expected floats \(256, 256\)|u: got"),
        (lambda: backward(x, v, u.half(), u, None), "u: got torch.float16"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    big, one = (dataclasses.replace(GELU_HOPPER[0], num_stages=n) for n in (7, 1))
    with pytest.raises(ValueError, match=r"gelu_hopper_kernel: Tile.*bytes in shared memory, sm_90 has"):
        forward(x, w, None, u, u, big)
    with pytest.raises(ValueError, match="has 1 stages, expected at least 2"):
        backward(x, v, u, u, None, one)
    with device.target("sm_80"), pytest.raises(ValueError, match=r"x: got .*on sm_80, expected .*on sm_90"):
        forward(x, w, None, u, u)


def test_a_candidate_is_timed_where_it_keeps_its_budget(monkeypatch):
    """The stage of `make gpu`, on a CPU: the kernels simulated, the clock a lying one."""
    timer, found = CpuTimer(clock=functools.partial(next, itertools.count())), {}
    monkeypatch.setattr(measure, "ceilings", lambda device: cost.H200)
    for factor in "0f3F001000", "0f3E001000":
        module = simulated(edit=lambda source, factor=factor: source.replace("0f3F001000", factor))
        monkeypatch.setattr(products, "gelu_forward_hopper", module["gelu_forward_hopper"])
        monkeypatch.setattr(products, "gelu_backward_hopper", module["gelu_backward_hopper"])
        chosen = [Case("gelu", 1, 70, 4, 64, direction=direction) for direction in ("fwd", "bwd")]
        found[factor] = list(products.rows(chosen, measure.Run("cpu", timer, timer, case_s=0.0, least=2)))
    right, wrong = found.values()
    assert [r.impl for r in right] == 2 * ["ours", "gluon, steps of 32", "gluon, steps of 64"]
    assert all(r.ok and r.median_ms for r in right)
    assert [r.impl for r in wrong if r.median_ms] == ["ours", "ours"]
    assert all("OVER BUDGET" in r.note and not r.ok for r in wrong if not r.median_ms) and len(wrong) == 6
