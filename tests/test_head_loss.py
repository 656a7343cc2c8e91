"""The fused head against fp64: forward, every gradient, hard values, both norms, with and without TMA tiles."""

import pytest
import torch

from bench.correctness.budget import against_fp64
from igpt.kernels import head_loss as kernel
from igpt.kernels import reference, tiles
from igpt.kernels.device import target
from igpt.kernels.head_loss import head_loss

DIFF = ("x", "norm_weight", "head_weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"aligned": (128, 64, 512), "rows": (77, 64, 512), "columns": (40, 70, 96), "colours": (64, 48, 300),
          "tiny": (7, 16, 16), "one colour": (7, 16, 1)}  # fmt: skip


def make(T, d, V, dtype, device, values="random"):
    gen = torch.Generator().manual_seed(T + d + V)

    def normal(*shape):
        return torch.randn(shape, generator=gen)

    x, weight, targets = normal(T, d), 0.2 * normal(V, d), torch.randint(0, V, (T,), generator=gen)
    if values == "certain":  # nll near 1e-4: the target's softmax - 1 is far below the rounding of softmax
        x = weight[targets] + 0
        weight *= 1.3
    elif values == "mean":
        x += 30 * normal(T, 1)
    elif values == "outliers":
        x[:, ::17] *= 60
    elif values == "spread":  # late chunks far above early ones: the running maximum climbs
        weight *= torch.linspace(0.1, 12, V)[:, None]
    x, norm_weight, weight = (t.to(dtype).to(device) for t in (x, 1 + 0.3 * normal(d), weight))
    return {"x": x, "norm_weight": norm_weight, "head_weight": weight, "targets": targets.to(device)}


def check(inputs, centred=False):
    errors = against_fp64(
        lambda **k: head_loss(**k, centred=centred), lambda **k: reference.head_loss(**k, centred=centred), inputs, DIFF
    )
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape, dtype, centred, device, poison_empty):
    check(make(*SHAPES[shape], dtype, device), centred)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["certain", "mean", "outliers", "spread"])
def test_hard_values(values, dtype, centred, device, poison_empty):
    # Enough rows that the budget's maximum isn't one near-tie between two colours, where either side may be lucky.
    check(make(256, 64, 512, dtype, device, values), centred)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", [(150, 96, 512), (130, 72, 528)])
def test_tiles_of_other_architectures(arch, shape, device, poison_empty):
    if device.type != "cpu":
        pytest.skip("a GPU runs its own tiles")
    with target(arch):
        check(make(*shape, torch.bfloat16, device, "spread"))


def test_strided_input_and_narrow_targets(device, poison_empty):
    inputs = make(60, 32, 64, torch.float32, device)
    x, targets = inputs["x"], inputs["targets"]
    inputs["x"] = torch.cat([x, x.flip(0)], 1).view(3, 20, 64)[:, 1:19, :32]  # rows of a wider matrix
    for narrow in (torch.int32, torch.int16, torch.uint8):
        inputs["targets"] = targets.view(3, 20)[:, 1:19].to(narrow)
        check(inputs)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_any_address(centred, device):
    """TMA asks for addresses that 16 divides: operands that start elsewhere, contiguous or not, are copied."""
    inputs = make(20, 32, 64, torch.bfloat16, device)
    shifted = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for name, t in inputs.items()}
    assert all(shifted[name].data_ptr() % 16 for name in DIFF)
    with target("sm_90"):
        assert torch.equal(head_loss(**shifted, centred=centred), head_loss(**inputs, centred=centred))


def test_a_tile_that_cannot_fit_is_refused(device, monkeypatch):
    monkeypatch.setitem(tiles.HEAD_LOSS, ("sm_80", 2), tiles.Tile(256, 512, 128, num_stages=2))
    inputs = make(20, 32, 64, torch.bfloat16, device)
    message = r"head_loss_kernel: Tile.* 196608 bytes .* sm_80 has 166912"
    with target("sm_80"), pytest.raises(ValueError, match=message):
        head_loss(**inputs)


def test_positions_without_weight_get_no_gradient(device, poison_empty):
    """BERT: dnll is 0 at unmasked positions."""
    inputs = make(48, 32, 64, torch.float32, device)
    seen = (torch.arange(48) % 7 == 0).float().to(device)
    errors = against_fp64(head_loss, reference.head_loss, inputs, DIFF, grad_output=seen)
    assert all(e.ok for e in errors), "\n".join(map(str, errors))
    x = inputs["x"].requires_grad_()
    head_loss(**inputs).backward(seen)
    assert (x.grad[seen == 0] == 0).all() and (x.grad[seen == 1] != 0).any()


def test_evaluation_writes_no_logits(device):
    inputs = make(64, 32, 512, torch.bfloat16, device)
    with_grad = head_loss(**(inputs | {"x": inputs["x"].clone().requires_grad_()}))
    with torch.no_grad():
        assert torch.equal(head_loss(**inputs), with_grad)
    outputs = kernel.HeadLoss(*inputs.values(), 1e-5, False, False)
    assert sum(t.numel() for t in outputs) == 2 * 64  # nll and the norm's statistics


def test_target_outside_the_palette_is_nan(device):
    inputs = make(8, 16, 32, torch.float32, device)
    inputs["targets"][2], inputs["targets"][5], inputs["targets"][6] = 32, -1, 2**32 + 3
    assert head_loss(**inputs).isnan().nonzero().flatten().tolist() == [2, 5, 6]


def test_a_row_does_not_depend_on_its_neighbours(device):
    inputs = make(70, 32, 96, torch.bfloat16, device)
    alone = inputs | {"x": inputs["x"][:1], "targets": inputs["targets"][:1]}
    assert torch.equal(head_loss(**alone), head_loss(**inputs)[:1])


def test_no_rows(device):
    inputs = make(4, 16, 32, torch.float32, device)
    inputs |= {"x": inputs["x"][:0].requires_grad_(), "targets": inputs["targets"][:0]}
    weight = inputs["head_weight"].requires_grad_()
    head_loss(**inputs).sum().backward()
    assert (weight.grad == 0).all()


def test_same_bits_every_run(device):
    def run():
        inputs = make(96, 64, 300, torch.bfloat16, device, "spread")
        for name in DIFF:
            inputs[name].requires_grad_()
        nll = head_loss(**inputs)
        nll.mean().backward()
        return [nll, *(inputs[name].grad for name in DIFF)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run()))


@pytest.mark.parametrize(
    "name, value",
    [("x", torch.zeros(4, 16, dtype=torch.float64)), ("norm_weight", torch.zeros(8)),
     ("head_weight", torch.zeros(32, 8)), ("targets", torch.zeros(5, dtype=torch.int64)), ("targets", torch.zeros(4))],
)  # fmt: skip
def test_bad_input_is_named(name, value, device):
    inputs = make(4, 16, 32, torch.float32, device)
    with pytest.raises(ValueError, match=name):
        head_loss(**(inputs | {name: value.to(device)}))


@pytest.mark.parametrize("has_grad", [False, True])
def test_opcheck(has_grad, device):
    x, _, weight, targets = make(9, 16, 32, torch.float32, device).values()
    torch.library.opcheck(kernel.head_loss_op, (x, weight, targets, has_grad))
    nll, sums, shifted, maxima = kernel.head_loss_op(x, weight, targets, True)
    torch.library.opcheck(kernel.dlogits_op, (nll, shifted, maxima, sums, targets, 64))


def test_full_graph_compile(device):
    def loss(x, norm_weight, head_weight, targets):
        return head_loss(2 * x, norm_weight, head_weight, targets).mean()

    inputs = make(24, 16, 32, torch.float32, device)
    weight = inputs["head_weight"].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**inputs)
    grad = torch.autograd.grad(compiled, weight)[0]
    expected = loss(**inputs)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, weight)[0], rtol=0, atol=0)
