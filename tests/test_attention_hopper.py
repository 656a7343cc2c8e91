"""The warp-specialised forward's protocol, in the simulator, with faults planted to show that it would tell."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from gluon_simulator import POLICIES, Deadlock, load

import igpt.kernels.tiles as tiles
from bench.budget import compare
from igpt.kernels import reference

SOURCE = Path(tiles.__file__).parent / "attention_hopper.py"


def run(D, causal, N=384, B=2, H=2, policy="producer first", seed=0, edit=lambda s: s, programs=None):
    """Errors of out and lse against fp64, from one simulated launch."""
    g = torch.Generator().manual_seed(D + N)
    qkv = torch.randn(B, N, 3, H, D, generator=g).bfloat16()
    q, k, v = qkv.unbind(2)
    module = load(SOURCE, "igpt.kernels", policy, seed, edit)
    if programs:
        module["multiprocessors"] = lambda device: programs
    out, lse = module["attention_forward_hopper"](q, k, v, causal, D**-0.5)
    exact = reference.attention(q.double(), k.double(), v.double(), causal)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * D**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    exact_lse = scores.logsumexp(-1) * math.log2(math.e)
    return compare("out", out, reference.attention(q, k, v, causal), exact), lse.double() - exact_lse


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_forward_under_every_schedule(D, causal, policy):
    errors, lse_error = run(D, causal, policy=policy, seed=D)
    assert errors.ok, errors
    # fp32 sums of some hundred exponentials of exact products.
    assert lse_error.abs().max() < 1e-5


@pytest.mark.parametrize("programs", [1, 5])
def test_persistent_programs_carry_their_phases_from_tile_to_tile(programs):
    errors, _ = run(64, True, programs=programs, policy="random")
    assert errors.ok, errors


# (what, the line as it stands, what stands there instead)
FAULTS = [
    ("no wait for keys", "mbarrier.wait(k_full.index(slot), phase)\n        s =", "s ="),
    ("no wait for next keys", "mbarrier.wait(k_full.index(next_slot), ((step + 1) // STAGES) & 1)", "pass"),
    ("no wait for values", "            mbarrier.wait(v_full.index(slot), phase)\n            b_p", "            b_p"),
    ("no wait for a free key slot", "mbarrier.wait(k_empty.index(slot), phase)", "pass"),
    ("no wait for a free value slot", "mbarrier.wait(v_empty.index(slot), phase)", "pass"),
    ("no wait for queries", "mbarrier.wait(q_full.index(c), tile & 1)", "pass"),
    ("no wait for free queries", "mbarrier.wait(q_empty.index(c), (tile & 1) ^ 1)", "pass"),
    ("wrong phase", "phase = ((step // STAGES) & 1) ^ 1", "phase = (step // STAGES) & 1"),
    ("wrong byte count", "KV_BYTES: gl.constexpr = BLOCK * (D1 + D2) * 2", "KV_BYTES: gl.constexpr = BLOCK * D1"),
    ("one consumer's arrival is enough", "mbarrier.init(k_empty.index(slot), count=2)",
     "mbarrier.init(k_empty.index(slot), count=1)"),
    ("values released before they are read", "b_p = gl.convert_layout(p, P_LAYOUT)\n",
     "b_p = gl.convert_layout(p, P_LAYOUT)\n            mbarrier.arrive(v_empty.index(slot), count=1)\n"),
    ("mask off by one", "o_col[None, :] <= c * ROWS + o_row", "o_col[None, :] < c * ROWS + o_row"),
    ("scores used in flight", "s = warpgroup_mma_wait(PV_GROUPS, deps=[s])",
     "s = warpgroup_mma_wait(2 + PV_GROUPS, deps=[s])"),
    ("no fence before the store", "fence_async_shared()", "pass"),
    ("queries released before the store read them", "        tma.store_wait(0)\n", ""),
]  # fmt: skip


@pytest.mark.parametrize("what, right, wrong", FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_caught(what, right, wrong):
    def plant(source):
        assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times"
        return source.replace(right, wrong)

    caught = []
    for policy in POLICIES:
        try:
            errors, lse_error = run(64, True, N=640, B=1, programs=1, policy=policy, edit=plant)
            caught.append(not errors.ok or not lse_error.abs().max() < 1e-5)
        except (AssertionError, Deadlock):
            caught.append(True)
    assert any(caught)


def test_a_row_is_off_until_a_gpu_has_measured_it(monkeypatch):
    q = torch.empty(1, 128, 2, 64, device="meta", dtype=torch.bfloat16)
    with tiles.target("sm_90"):
        monkeypatch.setitem(tiles.ATTENTION_HOPPER, 64, tiles.Tile(128, 128, num_stages=4))
        assert not tiles.warp_specialised(q)
        measured = dataclasses.replace(tiles.ATTENTION_HOPPER[64], evidence="H200, some day")
        monkeypatch.setitem(tiles.ATTENTION_HOPPER, 64, measured)
        assert tiles.warp_specialised(q)
    with tiles.target("sm_100"):
        assert not tiles.warp_specialised(q)


def test_what_does_not_fit_is_refused():
    module = load(SOURCE, "igpt.kernels")
    for shape in ((1, 100, 3, 2, 64), (1, 128, 3, 2, 80)):
        q, k, v = torch.zeros(shape, dtype=torch.bfloat16).unbind(2)
        with pytest.raises(ValueError, match="expected fp16 or bf16"):
            module["attention_forward_hopper"](q, k, v, True, 0.1)
