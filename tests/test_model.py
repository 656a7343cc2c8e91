import math

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

import igpt
from bench.correctness.budget import compare
from igpt.kernels import reference

SMALL = {"n_layer": 2, "width": 64, "heads": 1, "n_ctx": 48, "vocab": 32}


def small(seed=0, impl="torch", **overrides):
    """A little model whose head is not zero, so that logits say something."""
    torch.manual_seed(seed)
    model = igpt.ImageGPT(igpt.Config(**{**SMALL, **overrides}), impl=impl)
    torch.nn.init.normal_(model.head, 0.0, 0.3)
    return model


def tokens_for(model, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab, (batch, model.config.n_ctx), generator=g)


def restated(model, tokens, masked=None, dtype=torch.float64):
    """The maths once more, from the reference operations alone: (each layer's normed input, final norm, logits)."""
    c = model.config
    w = {k: p.detach().to(dtype) for k, p in model.state_dict().items()}
    h = reference.embed(tokens, w["wte"], w["wpe"], w.get("sos"), masked)
    inputs = []
    for i in range(c.n_layer):
        b = f"blocks.{i}."
        inputs.append(reference.norm(h, w[b + "attn.norm"], c.norm_eps, c.centred))
        qkv = inputs[-1] @ w[b + "attn.qkv"].T + w.get(b + "attn.b_qkv", 0)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=c.heads)
        a = reference.attention(q, k, v, c.causal)
        h = h + rearrange(a, "b n h d -> b n (h d)") @ w[b + "attn.proj"].T + w.get(b + "attn.b_proj", 0)
        h = reference.norm_mlp(
            h, *(w[b + f"mlp.{n}"] for n in ("norm", "fc", "proj")), w.get(b + "mlp.b_fc"), w.get(b + "mlp.b_proj"),
            c.norm_eps, c.centred,
        )  # fmt: skip
    n = reference.norm(h, w["norm_f"], c.norm_eps, c.centred)
    return inputs, n, n @ w["head"].T


@pytest.mark.parametrize("name, count", [("s", 76571648), ("m", 455157760), ("l", 1362250752), ("xl", 6801438720)])
def test_parameter_counts(name, count):
    assert igpt.ImageGPT.from_preset(name, device="meta").num_parameters() == count
    bert = igpt.ImageGPT.from_preset(name, device="meta", objective="bert")
    assert bert.num_parameters() == count - bert.config.width


def test_flops_match_the_published_floor():
    model = igpt.ImageGPT.from_preset("s", device="meta")
    assert model.flops_per_token() == pytest.approx(0.54e9, rel=0.03)
    assert 1024 * model.kv_bytes_per_token() == pytest.approx(50e6, rel=0.01)


def test_first_loss_is_ln_512():
    model = igpt.ImageGPT.from_preset("tiny")
    tokens = tokens_for(model)
    assert model.loss(tokens).item() == pytest.approx(math.log(512), abs=1e-6)
    bert = igpt.ImageGPT.from_preset("tiny", objective="bert")
    assert bert.loss(tokens).item() == pytest.approx(math.log(512), abs=1e-6)


def test_init_table():
    torch.manual_seed(0)
    c = igpt.Config(n_layer=3, width=256, heads=4, classes=10)
    model = igpt.ImageGPT(c)
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    for p, std in [
        (model.wte, 0.02), (model.wpe, 0.01), (attn.qkv, 256**-0.5), (attn.proj, (256 * 3) ** -0.5),
        (mlp.fc, 0.02), (mlp.proj, 0.02), (model.sos, 0.02),
    ]:  # fmt: skip
        # The standard error of a standard deviation is std / sqrt(2 n); 5 of them.
        assert abs(p.std().item() - std) < 5 * std / math.sqrt(2 * p.numel())
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel())
    assert not model.head.any() and not model.classifier.any()
    assert (model.norm_f == 1).all() and (attn.norm == 1).all() and (mlp.norm == 1).all()


@pytest.mark.parametrize("overrides", [{}, {"objective": "bert"}, {"norm": "layer"}, {"bias": True, "n_inner": 96}])
def test_logits_loss_and_features_are_the_restated_maths(overrides):
    model = small(**overrides).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".b_" in name or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    tokens = tokens_for(model)
    masked = None if model.config.causal else torch.rand(tokens.shape) < 0.3
    inputs, n, logits = restated(model, tokens, masked)
    torch.testing.assert_close(model(tokens, masked), logits, rtol=0, atol=1e-11)
    feats = torch.stack([t.mean(1) for t in (*inputs, n)])
    torch.testing.assert_close(model.features(tokens, masked), feats, rtol=0, atol=1e-11)
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    want = nll.mean() if masked is None else ((nll * masked).sum(1) / masked.sum(1)).mean()
    torch.testing.assert_close(model.loss(tokens, masked), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype, autocast", [
    (torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True),
    (torch.float16, True),
])  # fmt: skip
def test_dtypes(dtype, autocast):
    model = small()
    tokens = tokens_for(model)
    exact, eager = restated(model, tokens)[2], restated(model, tokens, dtype=dtype)[2]
    if autocast:
        with torch.autocast("cpu", dtype):
            logits, loss = model(tokens), model.loss(tokens)
    else:
        model = model.to(dtype)
        logits, loss = model(tokens), model.loss(tokens)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    errors = compare("logits", logits, eager, exact)
    assert errors.ok, errors
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_causal_leak(impl):
    model = small(impl=impl)
    tokens = tokens_for(model, batch=1)
    with torch.no_grad():
        before = model(tokens)
        for i in (0, 17, 46):
            changed = tokens.clone()
            changed[:, i] = (changed[:, i] + 1) % 32
            after = model(changed)
            assert torch.equal(before[:, : i + 1], after[:, : i + 1])
            assert not torch.equal(before[:, i + 1], after[:, i + 1])


def test_bert_sees_both_ways_but_not_the_masked():
    model = small(objective="bert")
    tokens = tokens_for(model, batch=1)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 20] = True
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 32
    assert torch.equal(model(tokens, masked), model(changed, masked))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 32
    assert not torch.equal(model(tokens, masked)[:, 20], model(changed, masked)[:, 20])


def test_bert_zero_masked_positions_is_zero_not_nan():
    model = small(objective="bert")
    tokens = tokens_for(model)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    assert model.loss(tokens, masked).item() == 0.0
    masked[0, 3] = True
    loss = model.loss(tokens, masked)
    one = -restated(model, tokens, masked)[2].log_softmax(-1)[0, 3, tokens[0, 3]]
    assert loss.item() == pytest.approx(one.item() / 2, rel=1e-5)


def curve(impl, dtype=torch.float32, steps=12, **overrides):
    """Losses of `steps` Adam steps on two sequences, in fp64."""
    model = small(impl=impl, n_ctx=24, **overrides).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    tokens = tokens_for(model)
    losses = []
    for step in range(steps):
        masked = None if model.config.causal else model.draw_mask(tokens, torch.Generator().manual_seed(step))
        loss = model.loss(tokens, masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_twelve_steps_agree_with_triton(objective):
    exact = curve("torch", torch.float64, objective=objective)
    eager, ours = curve("torch", objective=objective), curve("triton", objective=objective)
    assert exact[-5:].mean() < exact[0] - 1
    errors = compare("losses", ours, eager, exact)
    # Rounding is amplified by training, for both alike; the losses themselves are fp32 numbers.
    assert errors.ours_max <= 2 * errors.eager_max + torch.finfo(torch.float32).eps * exact.max(), errors


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recompute_gives_the_same_gradients(recompute, impl):
    """With the kernels, a checkpointed block's backward once read its saved tensors twice, and raised."""
    a, b = small(impl=impl), small(impl=impl)
    b.recompute = recompute
    tokens = tokens_for(a)
    a.loss(tokens).backward()
    b.loss(tokens).backward()
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_classifier():
    model = small(classes=5)
    logits = model.classify(model.trunk(tokens_for(model)))
    assert logits.shape == (2, 5)
    assert not logits.any()
    with pytest.raises(ValueError, match="classes"):
        small().classify(torch.zeros(1, 4, 64))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # fp16 on the torch path is plain PyTorch's
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_no_pictures_give_empty_results(objective, dtype, impl):
    model = small(objective=objective, bias=True, classes=3, impl=impl).to(dtype)
    none = torch.empty(0, 48, dtype=torch.long)
    results = {"logits": model(none), "features": model.features(none), "classes": model.classify(model.trunk(none))}
    assert {name: tuple(result.shape) for name, result in results.items()} == {
        "logits": (0, 48, 32), "features": (3, 0, 64), "classes": (0, 3),
    }  # fmt: skip
    sum(result.float().sum() for result in results.values()).backward()
    assert all(not p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="tokens_BN: got no pictures"):
        model.loss(none)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms(objective, impl):
    """grad is backward's, vmap of it each picture's own; what cannot be is refused by name."""
    model = small(objective=objective, impl=impl)
    model.forward = model.loss  # what functional_call calls
    tokens, parameters = tokens_for(model), {name: p.detach() for name, p in model.named_parameters()}
    masked = () if objective == "ar" else (torch.arange(48).remainder(3).eq(0).expand(2, 48),)

    def loss(parameters, tokens, *masked):
        return torch.func.functional_call(model, parameters, (tokens, *masked))

    def alone(parameters, *row):
        return loss(parameters, *(x[None] for x in row))

    def close(ours, theirs):
        for name, gradient in zip(parameters, theirs):
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)

    weights = list(model.parameters())
    close(torch.func.grad(loss)(parameters, tokens, *masked), torch.autograd.grad(model.loss(tokens, *masked), weights))
    each = torch.func.vmap(torch.func.grad(alone), (None, 0, *[0] * len(masked)))
    if impl == "triton":
        with pytest.raises(ValueError, match=r"impl='triton': .* no batch of vmap's"):
            each(parameters, tokens, *masked)
    else:
        own = dict(model.named_parameters())
        rows = [torch.autograd.grad(alone(own, *row), weights) for row in zip(tokens, *masked)]
        close(each(parameters, tokens, *masked), map(torch.stack, zip(*rows)))
    model.recompute = "block"
    with pytest.raises(ValueError, match=r"recompute: got 'block' under torch\.func"):
        torch.func.grad(loss)(parameters, tokens, *masked)


def test_full_graph_compile():
    model = small()
    tokens = tokens_for(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model.loss(tokens))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_full_graph_compile_with_the_kernels(recompute):
    model = small(impl="triton")
    model.recompute, tokens = recompute, tokens_for(model)
    weights = list(model.parameters())
    want, got = (
        torch.autograd.grad(loss(tokens), weights)
        for loss in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager"))
    )
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.zeros(2, 8)), "tokens"),
        (lambda m: m(torch.zeros(2, 8, 8, dtype=torch.long)), "tokens"),
        (lambda m: m(torch.zeros(2, 49, dtype=torch.long)), "tokens"),
        (lambda m: m(torch.full((1, 4), 32)), "32"),
        (lambda m: m(torch.full((1, 4), -1)), "-1"),
        (lambda m: m.loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)), "masked"),
        (lambda m: setattr(m, "recompute", True) or m(torch.zeros(1, 4, dtype=torch.long)), "recompute: got True"),
        (lambda m: igpt.ImageGPT.from_preset("huge"), "preset"),
        (lambda m: igpt.ImageGPT.from_preset("tiny", impl="cuda"), "impl"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(small())


def test_another_default_device_moves_nothing_of_ours(tmp_path):
    """With torch.set_default_device("cuda"), or inside of `with torch.device("cuda")`: "meta" stands for it."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    model = igpt.ImageGPT.from_preset("tiny", n_layer=1, n_ctx=16, vocab=5)
    vit = igpt.ViT.from_preset("vit-tiny", n_layer=1, objective="patches", classes=0)
    model.save_pretrained(tmp_path / "ours")
    with torch.device("meta"):
        assert igpt.ImageGPT.from_pretrained(tmp_path / "ours").device.type == "meta"
        again = igpt.ImageGPT.from_pretrained(tmp_path / "ours", device="cpu")
        again.palette = igpt.Palette.fit(pictures, k=5)
        again.save_pretrained(tmp_path / "theirs", format="hf")
        back = igpt.ImageGPT.from_pretrained(tmp_path / "theirs", device="cpu")
        tokens = back.palette.encode(pictures)
        assert back.palette.decode(tokens, (4, 4)).device.type == back.generate(2).device.type == "cpu"
        assert vit.loss(torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device="cpu")).device.type == "cpu"
    assert all(map(torch.equal, back.parameters(), model.parameters()))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_shapes_and_flops_without_memory(objective):
    """On "meta", where FLOP counters run: every product that is made is one that `flops_per_token` counts."""
    model = small(objective=objective, classes=3).to("meta")
    tokens = torch.zeros(2, 48, dtype=torch.int64, device="meta")
    assert model(tokens).shape == (2, 48, 32) and model.features(tokens).shape == (3, 2, 64)
    assert model.classify(model.trunk(tokens)).shape == (2, 3)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens).backward()
    assert model.wte.grad.shape == (32, 64)
    if objective == "bert":  # SDPA's counter takes a causal product for a whole one
        assert counter.get_total_flops() == 2 * 48 * model.flops_per_token()
