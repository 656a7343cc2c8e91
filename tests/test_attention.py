"""Fused attention: error budgets of output and gradients, masks, layouts, hard values, determinism, bad input.

Every budget runs with the portable tiles and with the GPU's own; in the interpreter "own" is sm_100, so that the
descriptors (TMA) are tested too."""

import contextlib

import pytest
import torch
from torch.library import opcheck

from bench.correctness.budget import against_fp64
from igpt.kernels import reference, tiles
from igpt.kernels.attention import attention, attention_op, attention_packed
from igpt.kernels.attention_heads import head_width, is_aligned, tail_width
from igpt.kernels.device import ARCHS, target
from igpt.kernels.interpreter import INTERPRETED

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["portable", "own"])
def family(request):
    with contextlib.ExitStack() as stack:
        if request.param == "portable" or INTERPRETED:
            stack.enter_context(target("portable" if request.param == "portable" else "sm_100"))
        yield request.param


def draw(*shape, dtype=torch.bfloat16, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def three(B, N, H, D, dtype=torch.bfloat16, device="cpu"):
    return tuple(draw(B, N, H, D, dtype=dtype, device=device, seed=seed) for seed in range(3))


def assert_budget(errors):
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def check(q, k, v, causal, scale=None, dout=None):
    assert_budget(
        against_fp64(
            lambda q, k, v: attention(q, k, v, causal, scale),
            lambda q, k, v: reference.attention(q, k, v, causal, scale),
            {"q": q, "k": k, "v": v}, ("q", "k", "v"), dout,
        )
    )  # fmt: skip


def check_packed(qkv, causal):
    assert_budget(
        against_fp64(
            lambda qkv: attention_packed(qkv, causal),
            lambda qkv: reference.attention(*qkv.unbind(2), causal),
            {"qkv": qkv}, ("qkv",),
        )
    )  # fmt: skip


def upstream(out):
    return draw(*out.shape, dtype=out.dtype, device=out.device, seed=3)


def results(q, k, v, causal):
    """Output and gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, causal)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream(out))]


@pytest.mark.parametrize("N, causal", [(7, True), (33, False), (129, True), (200, False), (200, True), (256, False)])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_budget(D, N, causal, family, device, poison_empty):
    """Lengths below, at and astride the tiles; the two half dtypes take turns, packed and separate views too."""
    dtype, H = HALF[(N + D // 32) % 2], 2 if N < 200 else 1
    if N % 2:
        check(*three(1, N, H, D, dtype, device), causal)
    else:
        check_packed(draw(1, N, 3, H, D, dtype=dtype, device=device), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_one_position(D, causal, family, device, poison_empty):
    """out = v and dv = dout to the bit. dq = dk = 0, but for what two orders of one fp32 sum of D products differ."""
    q, k, v = three(1, 1, 2, D, device=device)
    out, dq, dk, dv = results(q, k, v, causal)
    dout = upstream(out)
    assert torch.equal(out, v) and torch.equal(dv, dout)
    ds = torch.finfo(torch.float32).eps * D * (dout * v).abs().float().sum(-1, keepdim=True)
    for grad, other in ((dq, k), (dk, q)):
        assert (grad.abs() <= D**-0.5 * ds * other.abs()).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D, N", [(16, 70), (64, 33), (96, 40), (128, 17)])
def test_fp32(D, N, causal, device, poison_empty):
    check(*three(2, N, 1, D, torch.float32, device), causal)


@pytest.mark.parametrize("D", [16, 48, 80, 112])
def test_other_head_dims(D, family, device, poison_empty):
    assert head_width(D) + tail_width(D) >= D
    check_packed(draw(2, 67, 3, 2, D, dtype=torch.float16, device=device), True)


def test_a_full_picture(device, poison_empty):
    with target("sm_100") if INTERPRETED else contextlib.nullcontext():
        check_packed(draw(1, 1024, 3, 1, 64, device=device), True)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scale(scale, device):
    check(*three(1, 50, 2, 64, device=device), True, scale)


def lay_out(x, layout):
    """The values of x (B, N, H, D) in other strides."""
    B, N, H, D = x.shape
    match layout:
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "positions first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "odd rows":  # rows start at any byte: neither TMA nor vector loads
            wide = x.new_full((B, N, H * D + 3), float("nan"))
            view = wide[..., 1 : H * D + 1].unflatten(-1, (H, D))
            return view.copy_(x)
        case "last stride 2":
            return x.repeat_interleave(2, -1)[..., ::2]
        case "one head for all":
            return x[:, :, :1].expand(B, N, H, D)


LAYOUTS = ["heads first", "positions first", "odd rows", "last stride 2", "one head for all"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, family, device, poison_empty):
    q, k, v = (lay_out(x, layout) for x in three(2, 35, 2, 96, device=device))
    check(q, k, v, True)


@pytest.mark.parametrize("layout", [*LAYOUTS, "a sum's"])
def test_layouts_of_the_upstream_gradient(layout, family, device, poison_empty):
    dout = draw(2, 35, 2, 64, device=device, seed=3)
    dout = dout[:1, :1, :1, :1].expand(dout.shape) if layout == "a sum's" else lay_out(dout, layout)
    check(*three(2, 35, 2, 64, device=device), False, dout=dout)


def test_odd_rows_of_a_packed_view(family, device, poison_empty):
    wide = draw(2, 35, 3 * 2 * 64 + 5, dtype=torch.float16, device=device)
    check_packed(wide[..., 2:-3].unflatten(-1, (3, 2, 64)), True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["equal scores", "planted certainty", "large mean", "outlier channel"])
def test_hard_values(kind, causal, device, poison_empty):
    """bf16. In fp32 a recomputed p shows scores of some hundred (gradients' RMS up to 5 times eager at scores of 450),
    as in any attention that does not keep it."""
    q, k, v = three(1, 96, 2, 64, torch.float32, device)
    match kind:
        case "equal scores":
            q = torch.zeros_like(q)
        case "planted certainty":  # scores of some ten thousand: one key takes all
            q, k = 30 * q, 30 * k
        case "large mean":
            v = v + 50
        case "outlier channel":
            q[..., 3] *= 20
            k[..., 3] *= 20
    check(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal)


@pytest.mark.parametrize("D", [64, 96])
def test_no_image_or_head_sees_another(D, family, device):
    """NaN in image 1 and in head 1 leave the rest bitwise alone: edge tiles end where their head and image end."""
    q, k, v = three(2, 37, 3, D, device=device)
    clean = results(q, k, v, False)
    for x in (q, k, v):
        x[1] = x[:, :, 1] = float("nan")
    for before, after in zip(clean, results(q, k, v, False)):
        assert torch.equal(before[0, :, ::2], after[0, :, ::2])


@pytest.mark.parametrize("D", [64, 96])
def test_causal_never_leaks(D, family, device):
    """Later keys and values change no bit of earlier outputs; earlier queries give later keys exact zeros."""
    q, k, v = three(1, 150, 2, D, device=device)
    out, _ = attention_op(q, k, v, True, 0.1)
    for i in (0, 62, 127, 148):
        changed = [x.clone() for x in (q, k, v)]
        for x, noise in zip(changed, three(1, 150, 2, D, device=device)):
            x[:, i + 1 :] = 50 * noise[:, i + 1 :].flip(1)
        assert torch.equal(attention_op(*changed, True, 0.1)[0][:, : i + 1], out[:, : i + 1])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.zeros_like(out)
    dout[:, :63] = 1
    for grad in torch.autograd.grad(attention(*inputs, True), inputs, dout):
        assert grad[:, :63].any() and not grad[:, 63:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_deterministic(causal, family, device):
    q, k, v = three(1, 140, 2, 96, device=device)
    for first, second in zip(results(q, k, v, causal), results(q, k, v, causal)):
        assert torch.equal(first, second)


def test_lse_is_base_two(family, device):
    q, k, v = three(2, 45, 2, 64, torch.float32, device)
    lse = attention_op(q, k, v, False, 0.125)[1]
    exact = torch.logsumexp(torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / 8, -1) / torch.log(
        torch.tensor(2.0, dtype=torch.float64)
    )
    # Sums of 64 products, of 45 exponentials, and two roundings: a few units in the last place of 8.
    assert (lse - exact).abs().max() < 16 * torch.finfo(torch.float32).eps * 8


@pytest.mark.skipif(not INTERPRETED, reason="asks for 4 GB of a GPU")
def test_offsets_past_two_to_the_31(device):
    """Strides whose products overflow 32 bits. The memory between is never touched."""
    N, D, far = 3, 16, 2**30 + 8
    lake = torch.empty(2 * far + 8 * D, dtype=torch.float16)
    views = [lake.as_strided((1, N, 1, D), (8 * far, far, 8 * far, 1), i * D) for i in range(4)]
    for view, values in zip(views, three(1, N, 1, D, torch.float16)):
        view.copy_(values)
    check(*views[:3], True)
    views[3].copy_(draw(1, N, 1, D, dtype=torch.float16, seed=3))
    check(*three(1, N, 1, D, torch.float16), True, dout=views[3])


def test_nothing_to_do():
    for shape in [(0, 5, 2, 64), (2, 0, 2, 64)]:
        q = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
        attention(q, q, q, True).sum().backward()
        assert q.grad.shape == shape


@pytest.mark.parametrize("packed", [False, True])
def test_as_custom_ops(packed, device):
    if packed:
        op, inputs = torch.ops.igpt.attention_packed.default, (draw(1, 9, 3, 2, 16, device=device),)
    else:
        op, inputs = torch.ops.igpt.attention.default, three(1, 9, 2, 16, device=device)
    opcheck(op, (*inputs, True, 0.25))
    dout, (out, lse) = draw(1, 9, 2, 16, device=device), op(*inputs, True, 0.25)
    backward = getattr(torch.ops.igpt, "attention_packed_backward" if packed else "attention_backward").default
    opcheck(backward, (dout, *inputs, out, lse, True, 0.25))


def test_compiles_to_one_graph(device):
    def block(x):
        qkv = x.repeat(1, 1, 3).unflatten(-1, (3, 2, 16))
        return attention_packed(qkv, True).flatten(2) + attention(*qkv.unbind(2), False).flatten(2)

    x = draw(1, 12, 32, device=device).requires_grad_()
    eager = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (eager, compiled)]
    assert torch.equal(eager, compiled) and torch.equal(*grads)


ONE = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attention(ONE[0], ONE[0], ONE[0], True), r"q: got shape \(4, 2, 64\), expected \(B, N, H, D\)"),
        (lambda: attention(ONE, ONE[:, :3], ONE, True), r"k: got torch.bfloat16 \(1, 3, 2, 64\), expected q's"),
        (lambda: attention(ONE, ONE, ONE.half(), True), "v: got torch.float16"),
        (lambda: attention(*[ONE.double()] * 3, True), "q: got torch.float64, expected fp32, fp16 or bf16"),
        (lambda: attention(*[ONE.long()] * 3, True), "q: got torch.int64"),
        (lambda: attention(*[ONE[..., :40]] * 3, True), "q: got head dim 40, expected a multiple of 16 up to 128"),
        (lambda: attention(*[torch.zeros(1, 4, 1, 144)] * 3, True), "q: got head dim 144"),
        (lambda: attention(ONE, ONE, ONE, True, scale=0.0), "scale: got 0.0, expected a positive number"),
        (lambda: attention(ONE, ONE, ONE, True, scale=float("nan")), "scale: got nan"),
        (lambda: attention_packed(ONE, True), r"qkv: got .*, expected floats \(B, N, 3, H, D\)"),
        (lambda: attention_packed(torch.zeros(1, 4, 2, 2, 64), True), "qkv: got"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("table", ["ATTENTION_FORWARD", "ATTENTION_DQ", "ATTENTION_DKDV"])
def test_every_architecture_has_tiles(arch, table):
    with target(arch):
        for D in range(16, 129, 16):
            for dtype in (torch.float32, torch.float16):
                for aligned in (True, False):
                    tile = tiles.attention_tile(getattr(tiles, table), torch.empty(1, 1, 1, D, dtype=dtype), aligned)
                    # TMA carries no unaligned view; the loops of the causal kernels need tiles that divide each other.
                    assert not tile.tma or (aligned and dtype != torch.float32)
                    assert max(tile.BLOCK_M, tile.BLOCK_N) % min(tile.BLOCK_M, tile.BLOCK_N) == 0


@pytest.mark.parametrize("table, kernel", [
    ("ATTENTION_FORWARD", "attention_forward_kernel"), ("ATTENTION_DQ", "attention_dq_kernel"),
    ("ATTENTION_DKDV", "attention_dkdv_kernel"),
])  # fmt: skip
def test_a_tile_that_cannot_fit_is_refused(table, kernel, device, monkeypatch):
    """By name and before any launch: two streamed operands of 512 rows and 64 columns, 2 stages of them."""
    monkeypatch.setitem(getattr(tiles, table), ("sm_100", 64), tiles.Tile(512, 512, num_stages=2, tma=True))
    q = draw(1, 16, 1, 64, device=device)
    with target("sm_100"), pytest.raises(ValueError, match=f"{kernel}: Tile.* 262144 bytes .* sm_100 has 232448"):
        attention(q.requires_grad_(), q, q, True).sum().backward()


def test_alignment():
    x = torch.zeros(2, 4, 2, 64, dtype=torch.bfloat16)
    assert is_aligned(x) and is_aligned(x[:, :, :, :48]) and is_aligned(x.transpose(1, 2))
    assert not is_aligned(x[..., 1:49]) and not is_aligned(x[:, :, :1].expand(2, 4, 2, 64))
    assert not is_aligned(torch.zeros(2, 4, 100, dtype=torch.bfloat16)[..., :64].unflatten(-1, (1, 64)))
