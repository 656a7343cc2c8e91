"""The warp-specialised kernels' protocols, in the simulator, with faults planted to show that it would tell."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from gluon_simulator import POLICIES, caught, load

from bench.correctness.budget import compare
from igpt.kernels import device, reference, tiles
from igpt.kernels.choose import takes_views


@pytest.fixture(autouse=True)
def hopper():
    with device.target("sm_90"):
        yield


def simulated(name, policy="producer first", seed=0, edit=lambda s: s):
    return load(Path(tiles.__file__).with_name(f"{name}.py"), "igpt.kernels", policy, seed, edit)


def poisoned(B, N, *shape, dtype=torch.bfloat16):
    """(B, N, *shape) full of NaN, the head of something longer that is too."""
    return torch.full((B, N + 3, *shape), float("nan"), dtype=dtype)[:, :N]


def is_poisoned_past_the_end(x):
    return x._base[:, x.shape[1] :].isnan().all()


def inputs(D, B, N, H):
    g = torch.Generator().manual_seed(D + N)
    qkv, dout = poisoned(B, N, 3, H, D), poisoned(B, N, H, D)
    return qkv.copy_(torch.randn(qkv.shape, generator=g)), dout.copy_(torch.randn(dout.shape, generator=g))


def base_2_lse(q, k, causal):
    N = q.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    return scores.logsumexp(-1) * math.log2(math.e)


def forward(D, causal, N=384, B=2, H=2, qkv=None, **how):
    """Whether out and lse of one simulated launch are right, by the budget and by fp64."""
    q, k, v = (inputs(D, B, N, H)[0] if qkv is None else qkv).unbind(2)
    out, lse = poisoned(B, N, H, D), torch.full((B, H, N), float("nan"))
    simulated("attention_hopper_forward", **how)["attention_forward_hopper"](q, k, v, causal, D**-0.5, out, lse)
    exact = reference.attention(q.double(), k.double(), v.double(), causal)
    errors = compare("out", out, reference.attention(q, k, v, causal), exact)
    # fp32 sums of some hundred exponentials of exact products.
    error = (lse.double() - base_2_lse(q, k, causal)).abs() / lse.abs().clamp(min=1)
    return errors.ok and is_poisoned_past_the_end(out) and error.max() < 1e-5


def backward(D, causal, N=384, B=2, H=2, qkv=None, wanted="ok", **how):
    """Whether dq, dk, dv of two simulated launches keep the budget, or are `wanted`; they are views of one gradient."""
    random, dout = inputs(D, B, N, H)
    qkv = random if qkv is None else qkv

    def eager(dtype):
        x = qkv.detach().to(dtype, copy=True).requires_grad_()
        out = reference.attention(*x.unbind(2), causal)
        return torch.autograd.grad(out, x, dout.to(dtype))[0], out.detach().contiguous()

    (exact, _), (plain, out) = eager(torch.double), eager(torch.bfloat16)
    q, k, v = qkv.unbind(2)
    lse = base_2_lse(q, k, causal).float()
    dqkv = poisoned(B, N, 3, H, D)
    module = simulated("attention_hopper_backward", **how)
    module["attention_backward_hopper"](dout, q, k, v, out, lse, *dqkv.unbind(2), causal, D**-0.5)
    errors = [compare("dqkv"[i], dqkv[:, :, i], plain[:, :, i], exact[:, :, i]) for i in range(3)]
    return all(getattr(e, wanted) for e in errors) and is_poisoned_past_the_end(dqkv)


KERNELS = {"forward": forward, "backward": backward}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_right_under_every_schedule(kernel, D, causal, policy):
    assert KERNELS[kernel](D, causal, policy=policy, seed=D)


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_persistent_programs_carry_their_phases_from_tile_to_tile(monkeypatch, kernel, programs):
    monkeypatch.setattr(device, "multiprocessors", lambda _: programs)
    assert KERNELS[kernel](64, True, policy="random")


@pytest.fixture
def empty_is_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", functools.partial(torch.full, fill_value=float("nan")))


@pytest.mark.parametrize("N", [50, 65, 77, 197])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_length(empty_is_nan, kernel, D, causal, N):
    assert KERNELS[kernel](D, causal, N=N, policy="random", seed=N)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_tiles_and_a_last_one_cut(empty_is_nan, kernel):
    assert KERNELS[kernel](64, True, N=1000, B=1, H=1) and KERNELS[kernel](64, False, N=1000, B=1, H=1)


def test_keys_past_the_end_are_none_though_all_scores_are_far_below_zero():
    """A key of zeros past the end has a score of 0: its weight against an lse of -300 overflows. (dq is not within the
    budget here: delta is made of a rounded output, and these keys all point one way. That is every backward's formula.)
    """
    qkv, _ = inputs(64, 1, 197, 1)
    qkv[:, :, 0] = qkv[:, :, 0].abs().clamp(min=1) * -5
    qkv[:, :, 1] = qkv[:, :, 1].abs().clamp(min=1) * 5
    assert base_2_lse(*qkv[:, :, :2].unbind(2), False).max() < -200
    assert forward(64, False, N=197, B=1, H=1, qkv=qkv)
    assert backward(64, False, N=197, B=1, H=1, qkv=qkv, wanted="finite")
    unmasked = functools.partial(backward, 64, False, N=197, B=1, H=1, qkv=qkv, wanted="finite")
    assert caught(unmasked, "o_streamed[None, :] < N", "o_streamed[None, :] < N + 128")


FREE = "mbarrier.wait(ring[2].index(place), parity ^ 1)"
# (what, the line as it stands, what stands there instead)
FAULTS = {
    "forward": [
        ("no wait for keys", "wait_filled(k_ring, step)\n", "pass\n"),
        ("no wait for next keys", "wait_filled(k_ring, step + 1)", "pass"),
        ("no wait for the first values", "wait_filled(v_ring, step)\n", "pass\n"),
        ("no wait for next values", "wait_filled(v_ring, step + 1)", "pass"),
        ("no wait for queries", "wait_filled(q_ring, tile)", "pass"),
        ("no wait for a free place", FREE, "pass"),
        ("wrong phase", "parity ^ 1", "parity"),
        ("keys neither claimed nor counted", "claim(k_ring, step, BLOCK * D * 2)", "pass"),
        ("wrong byte count", "claim(v_ring, step, BLOCK * D * 2)", "claim(v_ring, step, BLOCK * D)"),
        ("copied to the next place", "copy(v_desc, at, v_ring, step)", "copy(v_desc, at, v_ring, step + 1)"),
        ("queries' place freed a tile early", "release(q_ring, tile - 1, tile > 0)", "release(q_ring, tile)"),
        ("one consumer's arrival is enough", "k_ring, v_ring = allocate_ring(descs[1], STAGES, 2)",
         "k_ring, v_ring = allocate_ring(descs[1], STAGES, 1)"),
        ("values released before they are read", "            o, b_p =",
         "            release(v_ring, step)\n            o, b_p ="),
        ("the output not rescaled", "o, b_p = add_products(scale_rows(o, alpha)", "o, b_p = add_products(o"),
        ("the last rescaling missed", "o, _ = add_products(scale_rows(o, alpha)", "o, _ = add_products(o"),
        ("mask off by one", "o_col[None, :] <= o_row", "o_col[None, :] < o_row"),
        ("scores used in flight", "warpgroup_mma_wait(len(o), deps=[s])", "warpgroup_mma_wait(2 + len(o), deps=[s])"),
        ("no fence before the store", "    fence_async_shared()\n    for", "    for"),
        ("no fence behind the barriers", "    fence_async_shared()  # threads", "    # threads"),
        ("queries released before the store read them", "tma.store_wait(0)\n        release", "release"),
        ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
    ],
    "forward, full, 200": [
        ("keys past the end", "N - (TILES - 1) * BLOCK, IS_CAUSAL", "BLOCK, IS_CAUSAL"),
        ("a key too few", "N - (TILES - 1) * BLOCK, IS_CAUSAL", "N - (TILES - 1) * BLOCK - 1, IS_CAUSAL"),
        ("lse past the end", "mask=o_m < N", "mask=o_m <= N"),
    ],
    "backward": [
        ("no wait for a pair", "wait_filled(ring, step)\n    pair", "pair"),
        ("a skipped pair kept", "release(ring, step)\n                start = 1", "start = 1"),
        ("no wait for the owned rows", "wait_filled(own, tile)", "pass"),
        ("no wait for a free place", FREE, "pass"),
        ("wrong phase", "parity ^ 1", "parity"),
        ("owned rows' place freed a tile early", "release(own, tile - 1, tile > 0)", "release(own, tile)"),
        ("statistics not counted", "(2 * ROWS * 4 if OWNS_KEYS else 0)", "0"),
        ("one consumer's arrival is enough", "ring = allocate_ring(descs, STAGES, 2)",
         "ring = allocate_ring(descs, STAGES, 1)"),
        ("a pair released before its products", "    acc_x, b_ds =", "    release(ring, step)\n    acc_x, b_ds ="),
        ("keys' mask off by one", "o_row[:, None] <= o_col[None, :]", "o_row[:, None] < o_col[None, :]"),
        ("queries' mask off by one", "o_streamed[None, :] <= o_own[:, None]", "o_streamed[None, :] < o_own[:, None]"),
        ("the wrong consumer skips", "c == (1 if OWNS_KEYS else 0)", "c == (0 if OWNS_KEYS else 1)"),
        ("scores used in flight", "s = warpgroup_mma_wait(CHUNKS, deps=[s])",
         "s = warpgroup_mma_wait(1 + CHUNKS, deps=[s])"),
        ("dp used in flight", "dp = warpgroup_mma_wait(CHUNKS, deps=[dp])",
         "dp = warpgroup_mma_wait(1 + CHUNKS, deps=[dp])"),
        ("pairs miscounted from tile to tile", "        step += count\n\n", "        step += count - start\n\n"),
        ("no wait for rows of out", "wait_filled(ring, step)\n    delta", "delta"),
        ("rows of out kept", "release(ring, step)\n    gl.store", "gl.store"),
        ("the other consumer's rows of out", "[c * CHUNKS : (c + 1) * CHUNKS]", "[:CHUNKS]"),
        ("rows of out not counted", "delta[:, None]\n            step += 1", "delta[:, None]"),
        ("another head's delta", "(HEADS + head)", "(HEADS)"),
        ("no fence before the store", "    fence_async_shared()\n    for", "    for"),
        ("no fence behind the barriers", "    fence_async_shared()  # threads", "    # threads"),
        ("owned rows released before the store read them", "tma.store_wait(0)\n                    release", "release"),
        ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
    ],
    "backward, full, 200": [
        ("a key too few", "o_streamed[None, :] < N", "o_streamed[None, :] < N - 1"),
        ("another head's lse", "mask=o_own < N,", "mask=o_own <= N,"),
        ("no lse past the end", 'other=float("inf")', 'other=float("nan")'),
    ],
}  # fmt: skip
PLANTED = [(case, *fault) for case, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize("case, what, right, wrong", PLANTED, ids=[f"{f[0]}: {f[1]}" for f in PLANTED])
def test_planted_faults_are_caught(monkeypatch, empty_is_nan, case, what, right, wrong):
    monkeypatch.setattr(device, "multiprocessors", lambda _: 1)
    kernel, *full = case.split(", ")
    assert caught(functools.partial(KERNELS[kernel], 64, not full, N=200 if full else 640, B=1), right, wrong)


def test_a_tile_that_cannot_fit_is_refused(monkeypatch):
    q = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    for table in (tiles.ATTENTION_HOPPER_FORWARD, tiles.ATTENTION_HOPPER_BACKWARD):
        monkeypatch.setitem(table, 64, dataclasses.replace(table[64], num_stages=30))
    with pytest.raises(ValueError, match=r"attention_hopper_forward_kernel: Tile.*bytes in shared memory, sm_90 has"):
        simulated("attention_hopper_forward")["attention_forward_hopper"](q, q, q, True, 0.1, q, None)
    with pytest.raises(ValueError, match="attention_hopper_backward_kernel: Tile"):
        simulated("attention_hopper_backward")["attention_backward_hopper"](*[q] * 5, None, *[q] * 3, True, 1)
    one = dataclasses.replace(tiles.ATTENTION_HOPPER_FORWARD[64], num_stages=1)
    monkeypatch.setitem(tiles.ATTENTION_HOPPER_FORWARD, 64, one)
    with pytest.raises(ValueError, match="has 1 stages, expected at least 2"):
        simulated("attention_hopper_forward")["attention_forward_hopper"](q, q, q, True, 0.1, q, None)


def test_which_views_it_takes():
    """16 bits, a head dim with a tile, heads side by side, pictures and rows that start at 16 bytes, rows that an int32
    counts."""
    q, k, _ = torch.zeros(2, 128, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    flat = torch.zeros(1 << 16, dtype=torch.bfloat16)

    def view(picture, row, head=64, start=0):
        return flat[start:].as_strided((2, 100, 2, 64), (picture, row, head, 1))

    assert takes_views(q, k) and takes_views(q[:, 1:])
    assert takes_views(view(100 * 128, 128)) and takes_views(view(0, 128)[:1])
    assert not takes_views(q, k.half())
    for N, pictures in (8, 1 << 20), (129, 1 << 19):
        heads = [torch.empty(B, N, 8, 64, dtype=torch.bfloat16, device="meta") for B in (pictures - 1, pictures)]
        assert [takes_views(x) for x in heads] == [True, False]
    unfit = {
        "fp32": q.float(), "head dim": q[..., :48], "columns apart": torch.cat([q, k], -1)[..., ::2],
        "heads apart": view(100 * 256, 256, head=128), "one picture twice": view(0, 128), "one row": view(128, 0),
        "rows at 8 bytes": view(100 * 132, 132), "pictures at 8 bytes": view(100 * 128 + 4, 128),
        "start at 8 bytes": view(100 * 128, 128, start=4),
    }  # fmt: skip
    assert not [what for what, t in unfit.items() if takes_views(t)]
