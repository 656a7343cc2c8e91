"""The embedding against fp64: the shift, the start vector, the mask, every token dtype, and the tables' gradients."""

import pytest
import torch

from bench.correctness.budget import against_fp64
from igpt.kernels import embedding as kernel
from igpt.kernels import reference
from igpt.kernels.device import target
from igpt.kernels.embedding import embed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, N, V, d
SHAPES = {"aligned": (4, 64, 64, 64), "odd": (3, 37, 50, 72), "columns": (2, 24, 33, 21), "tiny": (1, 1, 1, 1),
          "tall table": (2, 16, 300, 32)}  # fmt: skip
FORMS = {"ar": (True, False), "bert": (False, True), "plain": (False, False), "both": (True, True)}


def make(B, N, V, d, dtype, device, sos, masked, n_ctx=None):
    gen = torch.Generator().manual_seed(B + N + V + d)

    def normal(*shape):
        return torch.randn(shape, generator=gen).to(dtype).to(device)

    return {
        "tokens": torch.randint(0, V, (B, N), generator=gen).to(device),
        "wte": normal(V, d), "wpe": normal(n_ctx or N, d),
        "sos": normal(d) if sos else None,
        "masked": (torch.rand(B, N, generator=gen) < 0.3).to(device) if masked else None,
    }  # fmt: skip


def check(inputs, grad_output=None):
    diff = ("wte", "wpe", "sos") if inputs["sos"] is not None else ("wte", "wpe")
    errors = against_fp64(
        lambda **k: embed(*k.values()), lambda **k: reference.embed(*k.values()), inputs, diff, grad_output
    )
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, form, device, poison_empty):
    check(make(*SHAPES["odd"], dtype, device, *FORMS[form]))


@pytest.mark.parametrize("dtype, form", [(torch.bfloat16, "ar"), (torch.float32, "bert")], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_within_budget(shape, dtype, form, device, poison_empty):
    check(make(*SHAPES[shape], dtype, device, *FORMS[form]))


def test_bits_of_the_forward(device):
    """A sum of two values and one rounding: the same bits as eager."""
    for form in FORMS.values():
        inputs = make(3, 20, 40, 56, torch.bfloat16, device, *form)
        assert torch.equal(embed(*inputs.values()), reference.embed(*inputs.values()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16], ids=str)
def test_token_dtypes(dtype, device, poison_empty):
    inputs = make(2, 24, 200, 32, torch.float32, device, True, False)
    expected = embed(*inputs.values())
    inputs["tokens"] = inputs["tokens"].to(dtype)
    assert torch.equal(embed(*inputs.values()), expected)


def test_longer_position_table_and_strided_tokens(device, poison_empty):
    inputs = make(4, 18, 50, 32, torch.float32, device, True, False, n_ctx=25)
    inputs["tokens"] = inputs["tokens"].repeat_interleave(2, 1)[:, ::2]
    check(inputs)
    wpe = inputs["wpe"].requires_grad_()
    assert (torch.autograd.grad(embed(*inputs.values()).sum(), wpe)[0][18:] == 0).all()


def test_one_colour_takes_every_row(device, poison_empty):
    """The most contended table row there is: its gradient is the sum over all positions."""
    inputs = make(4, 40, 512, 32, torch.bfloat16, device, True, False)
    inputs["tokens"].fill_(511)
    check(inputs)


def test_large_gradients_stay_exact(device, poison_empty):
    """Products with 0 and 1 lose nothing, and what belongs to other rows doesn't leak into a sum."""
    inputs = make(2, 64, 32, 16, torch.float32, device, False, False)
    huge = torch.where(inputs["tokens"] % 2 == 0, 1e30, 1.0)[..., None].expand(2, 64, 16).contiguous()
    check(inputs, huge)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tiles_of_other_architectures(arch, device, poison_empty):
    if device.type != "cpu":
        pytest.skip("a GPU runs its own tiles")
    with target(arch):
        check(make(2, 70, 130, 144, torch.bfloat16, device, True, False))


def test_token_outside_the_table_is_nan(device):
    inputs = make(2, 6, 10, 16, torch.float32, device, True, False)
    for at, token in {(0, 0): 2**32, (0, 2): 10, (1, 1): 3 - 2**32, (1, 3): -1, (1, 4): 2**40 + 5}.items():
        inputs["tokens"][at] = token
    h = embed(*inputs.values())
    bad = [[0, 1], [0, 3], [1, 2], [1, 4], [1, 5]]  # each is read one position later
    assert h.isnan().all(-1).nonzero().tolist() == h.isnan().any(-1).nonzero().tolist() == bad


def test_last_token_is_not_read(device):
    inputs = make(2, 6, 10, 16, torch.float32, device, True, False)
    before = embed(*inputs.values())
    inputs["tokens"][:, -1] = 9999
    assert torch.equal(embed(*inputs.values()), before)


def test_same_bits_every_run(device):
    def run():
        inputs = make(4, 64, 32, 64, torch.bfloat16, device, True, False)
        tables = [inputs[name].requires_grad_() for name in ("wte", "wpe", "sos")]
        return torch.autograd.grad(embed(*inputs.values()).square().sum(), tables)

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run()))


@pytest.mark.parametrize(
    "name, value",
    [("tokens", torch.zeros(2, 9, dtype=torch.int64)), ("tokens", torch.zeros(2, 6)), ("wpe", torch.zeros(6, 8)),
     ("sos", torch.zeros(8)), ("masked", torch.zeros(2, 6)), ("wte", torch.zeros(16))],
)  # fmt: skip
def test_bad_input_is_named(name, value, device):
    inputs = make(2, 6, 10, 16, torch.float32, device, True, True)
    with pytest.raises(ValueError, match=name):
        embed(*(inputs | {name: value.to(device)}).values())


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, device):
    inputs = make(2, 6, 10, 16, torch.float32, device, *FORMS[form])
    torch.library.opcheck(kernel.embed_op, tuple(inputs.values()))
    dh = torch.randn(2, 6, 16, device=device)
    has_sos = inputs["sos"] is not None
    torch.library.opcheck(kernel.embed_backward_op, (dh, inputs["tokens"], inputs["masked"], 10, 6, has_sos))


def test_full_graph_compile(device):
    inputs = make(2, 6, 10, 16, torch.float32, device, True, False)
    wte = inputs["wte"].requires_grad_()

    def loss(tokens, wte, wpe, sos, masked):
        return embed(tokens, 2 * wte, wpe, sos, masked).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs.values())
    grad = torch.autograd.grad(compiled, wte)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(loss(*inputs.values()), wte)[0], rtol=0, atol=0)
