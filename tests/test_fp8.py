"""Products in 8 bits: rounding to the bit, both ways of it the same, gradients, training and what is refused."""

import json
import math

import pytest
import torch
from test_norm import values
from test_train import curve

import igpt
from igpt import ops
from igpt.kernels import quantize, reference
from igpt.kernels.fp8 import Linear
from igpt.programs import train
from tests.children import options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = torch.bfloat16


def value(pair):
    q, scale = pair
    return q.double() * scale.double()


def same(one, other):
    """To the bit, NaN wherever the other is."""
    return all(torch.equal(a.float().nan_to_num(7e7), b.float().nan_to_num(7e7)) for a, b in zip(one, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 513), (33, 1030), (8, 512), (70, 128)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_the_kernel_rounds_as_the_reference(shape, dtype, layout, device, poison_empty):
    x = values("normal", shape, dtype).to(device) * torch.logspace(-4, 4, shape[0], device=device)[:, None].to(dtype)
    if layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "apart":
        x = torch.stack([x, x], -1)[..., 0]
    q, scale = quantize.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and scale.shape == (shape[0], 1)
    assert same((q, scale), reference.quantize_rows(x))


def test_hard_rows(device, poison_empty):
    """Zeros, subnormals, both sides of 448 times a power of two, the largest floats, inf and NaN."""
    rows = [
        [0.0, 0.0], [1e-45, 0.0], [2.0**-118, 2.0**-120], [2.0**-117 * 1.01, -(2.0**-130)], [448.0, 1.0],
        [448.0001, 1.0], [-447.9, 2.0**-9], [0.875, 1e-3], [0.8751, 1e-3], [3.4e38, -1.0], [math.inf, 1.0],
        [1.0, math.nan], [-math.inf, math.nan], [1.0, 2.0**-18],
    ]  # fmt: skip
    x = torch.tensor(rows, device=device)
    q, scale = quantize.quantize_rows(x)
    assert same((q, scale), reference.quantize_rows(x))
    broken = ~x.isfinite().all(1)
    assert scale[broken].isnan().all() and q[broken].float().isnan().all()  # nothing infinite becomes 448
    assert torch.isfinite(scale[~broken]).all() and (q[~broken].float().abs() <= 448).all()


def test_the_scale_is_the_least_power_of_two_that_holds_a_row():
    x = values("normal", (500, 64), torch.float32) * torch.logspace(-6, 6, 500)[:, None]
    q, scale = reference.quantize_rows(x)
    assert (torch.frexp(scale)[0] == 0.5).all()
    top = x.abs().amax(1, keepdim=True) / scale
    assert (top <= 448).all() and (top > 224).all()
    error = ((value((q, scale)) - x.double()).abs() / x.double().abs())[(x.abs() / scale) >= 2.0**-6]
    assert 0.05 < error.max() <= 2.0**-4  # three bits of mantissa


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [quantize.quantize_rows_op, reference.quantize_rows])
def test_product_and_gradients(quantized, bias, device):
    """Of the rounded operands, as fp64 has them; the weight's gradient of those that were given."""
    x, w, dy = (values("normal", s, BF16, i).to(device) for i, s in enumerate([(2, 9, 48), (80, 48), (2, 9, 80)]))
    b = values("normal", (80,), BF16, 3).to(device).requires_grad_() if bias else None
    x, w = x.requires_grad_(), w.requires_grad_()
    y = Linear.apply(x, w, b, quantized)
    wanted = [value(quantized(x.flatten(0, 1).detach())) @ value(quantized(w.detach())).t() + (b if bias else 0)]
    wanted += [value(quantized(dy.flatten(0, 1))) @ value(quantized(w.detach().t())).t()]
    wanted += [dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()]
    wanted += [dy.flatten(0, 1).double().sum(0)] * bias
    found = [y, *torch.autograd.grad(y, (x, w, b) if bias else (x, w), dy)]
    for have, want in zip(found, wanted, strict=True):
        # A sum of 80 products and one rounding to bf16.
        assert (have.reshape(want.shape).double() - want).abs().max() <= 2.0**-8 * want.abs().max()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_operations_round_to_8_bits(impl, activation, device):
    """Against fp64 each result is off by what operands of 3 bits leave, 2^-5 of its root mean square or so: several
    times what bf16's 8 bits do, and not more."""
    d, f = 64, 256
    shapes = {"x": (2, 40, d), "gain": (d,), "qkv": (3 * d, d), "fc": (f, d), "proj": (d, f), "b": (f,)}
    t = {k: values("normal", s, BF16, i).to(device) * (s[-1] ** -0.5 if len(s) == 2 else 1)
         for i, (k, s) in enumerate(shapes.items())}  # fmt: skip
    t["gain"] = 1 + t["gain"] / 4

    def both(x, gain, qkv, fc, proj, b, impl, **how):
        y = ops.norm_linear(x, gain, qkv, impl=impl, **how)
        z = ops.norm_mlp(x, gain, fc, proj, b, activation=activation, impl=impl, **how) - x
        return torch.cat([y, z], -1)

    def run(dtype, impl, **how):
        inputs = {k: v.to(dtype).requires_grad_() for k, v in t.items()}
        out = both(**inputs, impl=impl, **how)
        return [out[..., : 3 * d], out[..., 3 * d :], *torch.autograd.grad(out, list(inputs.values()), out.detach())]

    found = run(torch.float64, "torch"), run(BF16, impl), run(BF16, impl, fp8=True)
    for name, exact, *both in zip(("y", "z", *(f"d{k}" for k in t)), *found, strict=True):
        plain, rough = ((x.double() - exact).norm() / exact.norm() for x in both)
        assert 2 * plain < rough < 0.1, (name, plain, rough)


def model_of(**more):
    torch.manual_seed(0)
    model = igpt.ImageGPT.from_preset("tiny", n_ctx=64, n_layer=1, width=64, heads=1, dtype=BF16, **more)
    torch.nn.init.normal_(model.head, std=0.1)
    return model


def test_a_model_trains_in_fp8_and_predicts_as_it_is(device):
    model, tokens = model_of(device=device), torch.randint(0, 512, (2, 64), device=device)
    plain = model.loss(tokens)
    with torch.no_grad():
        quiet = model.loss(tokens)
    model.fp8 = True
    loss = model.loss(tokens)
    assert loss != plain and abs(loss - plain) < 0.02 * plain
    with torch.no_grad():
        assert torch.equal(model.loss(tokens), quiet)
    wanted, found = (torch.autograd.grad(x, list(model.parameters())) for x in (plain, loss))
    for (name, _), a, b in zip(model.named_parameters(), wanted, found, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
        assert cosine > 0.97, (name, cosine)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_forgetting_changes_nothing(impl, device):
    model, tokens = model_of(device=device, impl=impl), torch.randint(0, 512, (1, 20), device=device)
    model.fp8 = True

    def run(recompute):
        model.recompute = recompute
        loss = model.loss(tokens)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    kept = run("none")
    for recompute in ("mlp", "block"):
        assert all(map(torch.equal, kept, run(recompute)))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_under_torch_compile(impl, device):
    model, tokens = model_of(device=device, impl=impl), torch.randint(0, 512, (1, 20), device=device)
    model.fp8 = True
    wanted, found = (
        [loss, *torch.autograd.grad(loss, list(model.parameters()))]
        for loss in (f(tokens) for f in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")))
    )
    for a, b in zip(wanted, found, strict=True):
        assert (a - b).abs().max() <= 2.0**-6 * a.abs().max()
    torch.compiler.reset()


def test_the_operation_is_registered_as_torch_asks(device):
    torch.library.opcheck(torch.ops.igpt.quantize_rows, (values("normal", (5, 48), BF16).to(device),))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_in_fp8_goes_on_bit_for_bit(tmp_path, optimizer, monkeypatch):
    few = {"steps": 6, "save_every": 2, "valid_every": 3, "sample_every": 0, "optimizer": optimizer}
    train.run(options(tmp_path / "bf16", dtype="bf16", **few))
    train.run(options(tmp_path / "whole", precision="fp8", **few))
    report = train.Training.report
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "report", lambda self, at, figures: report(self, at, figures) or at == 3)
        assert train.run(options(tmp_path / "parts", precision="fp8", **few))["step"] == 3
    with pytest.raises(ValueError, match="precision: fp8 there, None asked"):
        train.run(options(tmp_path / "parts", **few))
    train.run(options(tmp_path / "parts", precision="fp8", **few))
    bf16, whole, parts = (curve(tmp_path / name) for name in ("bf16", "whole", "parts"))
    assert whole == parts
    last = [next(row["valid_loss"] for row in reversed(rows) if "valid_loss" in row) for rows in (bf16, whole)]
    assert last[0] != last[1] and abs(last[0] - last[1]) < 0.05
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["train"]["precision"] == "fp8"


def test_refusals(tmp_path, device, monkeypatch):
    x, w = torch.ones(4, 48, dtype=BF16, device=device), torch.ones(16, 48, dtype=BF16, device=device)
    gain = torch.ones(48, dtype=BF16, device=device)
    for impl in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"x: got torch.float32 with fp8, expected bf16"):
            ops.linear(x.float(), w, fp8=True, impl=impl)
        with pytest.raises(ValueError, match=r"weight: got \(12, 48\) with fp8, expected sizes that 16 divides"):
            ops.norm_linear(x, gain, w[:12], fp8=True, impl=impl)
        with pytest.raises(ValueError, match=r"weight: got \(24, 48\) with fp8"):
            ops.norm_mlp(x, gain, w.new_ones(24, 48), w.new_ones(48, 24), fp8=True, impl=impl)
    for bad in (x[0], x[None], x.double(), x.long()):
        with pytest.raises(ValueError, match=r"x: got .*, expected fp32, bf16 or fp16 \(M, K\)"):
            quantize.quantize_rows(bad)
    model = model_of(device=device)
    model.fp8 = True
    with pytest.raises(ValueError, match=r"fp8: got True under torch.func"):
        torch.func.grad(lambda h: model.through_blocks(h).sum())(torch.ones(1, 8, 64, dtype=BF16, device=device))
    for wrong, said in (({"width": 40, "heads": 1}, "sizes that 16 divides"), ({"dtype": "fp32"}, "got 'fp32'")):
        with pytest.raises(ValueError, match=said):
            train.run(options(tmp_path / "run", precision="fp8", **wrong))
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match="precision: fp8: got A100, expected a GPU of Nvidia's"):
        igpt.kernels.checks.fp8_device("precision", torch.device("cuda"))
