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


@pytest.fixture(autouse=True)
def hopper():
    with device.target("sm_90"):
        yield


def simulated(name, policy="producer first", seed=0, edit=lambda s: s):
    return load(Path(tiles.__file__).with_name(f"{name}.py"), "igpt.kernels", policy, seed, edit)


def inputs(D, B, N, H):
    g = torch.Generator().manual_seed(D + N)
    return torch.randn(B, N, 3, H, D, generator=g).bfloat16(), torch.randn(B, N, H, D, generator=g).bfloat16()


def base_2_lse(q, k, causal):
    N = q.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    return scores.logsumexp(-1) * math.log2(math.e)


def forward(D, causal, N=384, B=2, H=2, **how):
    """Whether out and lse of one simulated launch are right, by the budget and by fp64."""
    q, k, v = inputs(D, B, N, H)[0].unbind(2)
    out, lse = torch.full((B, N, H, D), float("nan")).bfloat16(), torch.full((B, H, N), float("nan"))
    simulated("attention_hopper_forward", **how)["attention_forward_hopper"](q, k, v, causal, D**-0.5, out, lse)
    exact = reference.attention(q.double(), k.double(), v.double(), causal)
    errors = compare("out", out, reference.attention(q, k, v, causal), exact)
    # fp32 sums of some hundred exponentials of exact products.
    return errors.ok and (lse.double() - base_2_lse(q, k, causal)).abs().max() < 1e-5


def backward(D, causal, N=384, B=2, H=2, **how):
    """Whether dq, dk, dv of two simulated launches keep the budget; they are views of one packed gradient."""
    qkv, dout = inputs(D, B, N, H)

    def eager(dtype):
        x = qkv.detach().to(dtype, copy=True).requires_grad_()
        out = reference.attention(*x.unbind(2), causal)
        return torch.autograd.grad(out, x, dout.to(dtype))[0], out.detach().contiguous()

    (exact, _), (plain, out) = eager(torch.double), eager(torch.bfloat16)
    q, k, v = qkv.unbind(2)
    lse = base_2_lse(q, k, causal).float()
    dqkv = torch.full_like(qkv, float("nan"))
    module = simulated("attention_hopper_backward", **how)
    module["attention_backward_hopper"](dout, q, k, v, out, lse, *dqkv.unbind(2), causal, D**-0.5)
    return all(compare("dqkv"[i], dqkv[:, :, i], plain[:, :, i], exact[:, :, i]).ok for i in range(3))


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


ALPHA = "gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]"
# (what, the line as it stands, what stands there instead)
FAULTS = {
    "forward": [
        ("no wait for keys", "mbarrier.wait(k_full.index(slot), phase)\n        s =", "s ="),
        ("no wait for next keys", "mbarrier.wait(k_full.index(next_slot), next_phase)", "pass"),
        ("no wait for the first values", "mbarrier.wait(v_full.index(slot), phase)", "pass"),
        ("no wait for next values", "mbarrier.wait(v_full.index(next_slot), next_phase)", "pass"),
        ("no wait for a free key slot", "mbarrier.wait(k_empty.index(slot), phase)", "pass"),
        ("no wait for a free value slot", "mbarrier.wait(v_empty.index(slot), phase)", "pass"),
        ("no wait for queries", "mbarrier.wait(q_full.index(place), (tile // 2) & 1)", "pass"),
        ("no wait for free queries", "mbarrier.wait(q_empty.index(place), (((tile + 1) // 2) & 1) ^ 1)", "pass"),
        ("queries' place freed a tile early", "mbarrier.arrive(q_empty.index(place ^ 2), count=1)",
         "mbarrier.arrive(q_empty.index(place), count=1)"),
        ("wrong phase", "phase = ((step // STAGES) & 1) ^ 1", "phase = (step // STAGES) & 1"),
        ("wrong byte count", "KV_BYTES: gl.constexpr = BLOCK * (D1 + D2) * 2", "KV_BYTES: gl.constexpr = BLOCK * D1"),
        ("one consumer's arrival is enough", "mbarrier.init(k_empty.index(slot), count=2)",
         "mbarrier.init(k_empty.index(slot), count=1)"),
        ("values released before they are read", "b_p = gl.convert_layout(p.to(dtype), P_LAYOUT)\n",
         "b_p = gl.convert_layout(p.to(dtype), P_LAYOUT)\n            mbarrier.arrive(v_empty.index(slot), count=1)\n"),
        ("the output not rescaled", f"o = o * {ALPHA}\n            b_p", "b_p"),
        ("the last rescaling missed", f"o = o * {ALPHA}\n        o =", "o ="),
        ("mask off by one", "o_k[None, :] <= o_q", "o_k[None, :] < o_q"),
        ("scores used in flight", "s = warpgroup_mma_wait(PV_GROUPS, deps=[s])",
         "s = warpgroup_mma_wait(2 + PV_GROUPS, deps=[s])"),
        ("no fence before the store", "fence_async_shared()", "pass"),
        ("queries released before the store read them", "tma.store_wait(0)\n        mbarrier", "mbarrier"),
        ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
    ],
    "backward": [
        ("no wait for a pair", "mbarrier.wait(full.index(slot), phase)\n                s =", "s ="),
        ("a skipped pair kept", "mbarrier.arrive(empty.index(slot), count=1)\n                start = 1", "start = 1"),
        ("no wait for a free slot", "mbarrier.wait(empty.index(slot), (((done + j) // STAGES) & 1) ^ 1)", "pass"),
        ("no wait for the owned rows", "mbarrier.wait(own_full.index(place), (tile // PLACES) & 1)", "pass"),
        ("no wait for free owned rows",
         "mbarrier.wait(own_empty.index(place), (((tile + PLACES - 1) // PLACES) & 1) ^ 1)", "pass"),
        ("owned rows' place freed a tile early", "mbarrier.arrive(own_empty.index(place ^ 2), count=1)",
         "mbarrier.arrive(own_empty.index(place), count=1)"),
        ("wrong phase", "(((done + j) // STAGES) & 1) ^ 1", "((done + j) // STAGES) & 1"),
        ("statistics not counted", "(2 * BLOCK * 4 if OWNS_KEYS else 0)", "0"),
        ("one consumer's arrival is enough", "mbarrier.init(empty.index(slot), count=2)",
         "mbarrier.init(empty.index(slot), count=1)"),
        ("a pair released before its products were read", "ds = (p * (dp - delta)).to(dtype)\n",
         "ds = (p * (dp - delta)).to(dtype)\n                mbarrier.arrive(empty.index(slot), count=1)\n"),
        ("keys' mask off by one", "o_own[:, None] <= o_streamed[None, :]", "o_own[:, None] < o_streamed[None, :]"),
        ("queries' mask off by one", "o_streamed[None, :] <= o_own[:, None]", "o_streamed[None, :] < o_own[:, None]"),
        ("the wrong consumer skips", "c == (1 if OWNS_KEYS else 0)", "c == (0 if OWNS_KEYS else 1)"),
        ("scores used in flight", "s = warpgroup_mma_wait(CHUNKS, deps=[s])",
         "s = warpgroup_mma_wait(1 + CHUNKS, deps=[s])"),
        ("dp used in flight", "dp = warpgroup_mma_wait(CHUNKS, deps=[dp])",
         "dp = warpgroup_mma_wait(1 + CHUNKS, deps=[dp])"),
        ("pairs miscounted from tile to tile", "        done += count\n\n", "        done += count - start\n\n"),
        ("no fence before the store", "fence_async_shared()", "pass"),
        ("owned rows released before the store read them", "tma.store_wait(0)\n                    mbarrier",
         "mbarrier"),
        ("left before the last store", "        tile += 1\n    tma.store_wait(0)\n", "        tile += 1\n"),
    ],
}  # fmt: skip
PLANTED = [(kernel, *fault) for kernel, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize("kernel, what, right, wrong", PLANTED, ids=[f"{f[0]}: {f[1]}" for f in PLANTED])
def test_planted_faults_are_caught(monkeypatch, kernel, what, right, wrong):
    monkeypatch.setattr(device, "multiprocessors", lambda _: 1)
    assert caught(functools.partial(KERNELS[kernel], 64, True, N=640, B=1), right, wrong)


def test_a_tile_that_cannot_fit_is_refused(monkeypatch):
    q = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    for table in (tiles.ATTENTION_HOPPER_FORWARD, tiles.ATTENTION_HOPPER_BACKWARD):
        monkeypatch.setitem(table, 64, dataclasses.replace(table[64], num_stages=30))
    with pytest.raises(ValueError, match=r"attention_hopper_forward_kernel: Tile.*bytes in shared memory, sm_90 has"):
        simulated("attention_hopper_forward")["attention_forward_hopper"](q, q, q, True, 0.1, q, None)
    with pytest.raises(ValueError, match="attention_hopper_backward_kernel: Tile"):
        simulated("attention_hopper_backward")["attention_backward_hopper"](*[q] * 4, None, None, *[q] * 3, True, 1)
    shallow = dataclasses.replace(tiles.ATTENTION_HOPPER_FORWARD[64], num_stages=1)
    monkeypatch.setitem(tiles.ATTENTION_HOPPER_FORWARD, 64, shallow)
    with pytest.raises(ValueError, match="has 1 stages, expected at least 2"):
        simulated("attention_hopper_forward")["attention_forward_hopper"](q, q, q, True, 0.1, q, None)


def test_what_does_not_fit_is_refused():
    forward, backward = simulated("attention_hopper_forward"), simulated("attention_hopper_backward")
    for shape in ((1, 100, 3, 2, 64), (1, 128, 3, 2, 80)):
        q, k, v = torch.zeros(shape, dtype=torch.bfloat16).unbind(2)
        with pytest.raises(ValueError, match=r"q, k, v: got .*expected fp16 or bf16"):
            forward["attention_forward_hopper"](q, k, v, True, 0.1, q, None)
        with pytest.raises(ValueError, match=r"dout, q, k, v, dq, dk, dv: got .*expected fp16 or bf16"):
            backward["attention_backward_hopper"](q, q, k, v, None, None, q, k, v, True, 0.1)
