"""ViT: its maths restated, gradients against fp64, sizes, corruption, Hugging Face's layout, what is refused."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import igpt
from bench.correctness.budget import against_fp64, compare
from igpt import ViT, ViTConfig
from igpt.kernels import reference

SMALL = {"n_layer": 2, "width": 64, "heads": 2, "size": 28, "patch": 4, "classes": 5}  # 49 patches


def small(impl="torch", **overrides):
    """A little model without a zero in it."""
    model = ViT(ViTConfig(**{**SMALL, **overrides}), impl=impl)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def pixels_for(model, B=2, seed=1):
    S = model.config.size
    return torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def restated(c: ViTConfig, w: dict, pixels, sources=None):
    """The maths once more in plain PyTorch, layer norms with their biases: what outputs() gives of every position."""
    p, dtype = c.patch, w["patch"].dtype
    x = pixels.float() / 127.5 - 1
    x = x.unfold(1, p, p).unfold(2, p, p).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2).to(dtype)
    h = F.linear(x, w["patch"], w["b_patch"])
    if sources is not None:
        h = torch.stack([torch.cat([e, w["mask"][None]])[s] for e, s in zip(h, sources)])
    h = torch.cat([w["cls"].expand(len(h), 1, -1), h], 1) + w["wpe"]

    def norm(h, name):
        front, dot, last = name.rpartition(".")
        return reference.norm(h, w[name], c.norm_eps, centred=True) + w[f"{front}{dot}b_{last}"]

    for i in range(c.n_layer):
        b = f"blocks.{i}."
        packed = F.linear(norm(h, b + "attn.norm"), w[b + "attn.qkv"], w[b + "attn.b_qkv"])
        a = reference.attention(*reference.pack_heads(packed, c.heads).unbind(2), causal=False)
        h = h + F.linear(a.flatten(-2), w[b + "attn.proj"], w[b + "attn.b_proj"])
        u = F.linear(norm(h, b + "mlp.norm"), w[b + "mlp.fc"], w[b + "mlp.b_fc"])
        h = h + F.linear(F.gelu(u), w[b + "mlp.proj"], w[b + "mlp.b_proj"])
    n = norm(h, "norm_f")
    n = torch.tanh(F.linear(n, w["pooler"], w["b_pooler"])) if c.pooler else n
    return F.linear(n, w["head"], w["b_head"]) if c.outputs else n


def eager_loss(c, w, pixels, targets):
    if c.objective == "labels":
        return F.cross_entropy(reference.wide(restated(c, w, pixels)[:, 0]), targets[0])
    sources, corrupted = targets
    logits = restated(c, w, pixels, sources)[:, 1:].gather(1, corrupted[..., None].expand(-1, -1, 512))
    return F.cross_entropy(reference.wide(logits).flatten(0, 1), mean_colours(c, pixels).gather(1, corrupted).flatten())


@pytest.mark.parametrize("overrides", [{}, {"objective": "patches", "classes": 0}, {"pooler": True}], ids=str)
def test_loss_and_every_gradient_against_fp64(overrides, device):
    """In fp64 they are the restated maths'. In fp32 and bf16 all gradients, each over its largest, keep the budget."""
    c, labels = ViTConfig(**{**SMALL, **overrides}), torch.tensor([1, 4])
    pixels = pixels_for(small(**overrides)).to(device)
    corruption = small(**overrides).draw_corruption(2, torch.Generator().manual_seed(2))
    targets = [t.to(device) for t in (corruption if c.objective == "patches" else [labels])]

    def gradients(dtype, impl):
        """Of our model, or of the restated maths where impl is None."""
        model = small(impl or "torch", **overrides).to(device, dtype)
        w = dict(model.named_parameters())
        loss = model.loss(pixels, *targets) if impl else eager_loss(c, w, pixels, targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(w.values()))]

    exact = gradients(torch.float64, None)
    for got, want in zip(gradients(torch.float64, "torch"), exact):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    peaks = [t.abs().max() for t in exact]

    def scaled(tensors):
        return torch.cat([(t.double() / peak).flatten() for t, peak in zip(tensors, peaks)])

    for dtype, impl in ((torch.float32, "torch"), (torch.bfloat16, "torch"), (torch.float32, "triton")):
        eager, ours = scaled(gradients(dtype, None)), scaled(gradients(dtype, impl))
        errors = compare(f"{dtype} {impl}", ours, eager, scaled(exact))
        assert errors.ok, errors


def mean_colours(c, pixels):
    """Of each patch in a loop: the first 3 bits of each channel's mean."""
    found = []
    for picture in pixels:
        squares = [
            picture[y : y + c.patch, x : x + c.patch].flatten(0, 1).double().mean(0)
            for y in range(0, c.size, c.patch) for x in range(0, c.size, c.patch)
        ]  # fmt: skip
        found.append([sum(int(v) // 32 * 8 ** (2 - i) for i, v in enumerate(rgb)) for rgb in squares])
    return torch.tensor(found, device=pixels.device)


SIZES = [("vit-b16", 86.6), ("vit-l16", 304.3), ("vit-s16", 22.1), ("vit-tiny", 1.3)]


@pytest.mark.parametrize("name, millions", SIZES)
def test_parameter_counts(name, millions):
    """The paper's 86 M and 307 M, to more places: 1000 classes at 224; 32 x 32 for tiny."""
    model = ViT.from_preset(name, device="meta")
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05) and model.config.classes == 1000


def test_the_first_loss_knows_nothing():
    model = ViT(ViTConfig(**SMALL))
    assert model.loss(pixels_for(model), torch.tensor([0, 3])).item() == pytest.approx(math.log(5), abs=1e-6)
    model = ViT(ViTConfig(**{**SMALL, "objective": "patches"}))
    assert model.loss(pixels_for(model)).item() == pytest.approx(math.log(512), abs=1e-5)


def test_corruption_is_half_of_the_patches_in_the_papers_shares():
    model = small(objective="patches")
    sources, corrupted = model.draw_corruption(4000, torch.Generator().manual_seed(0))
    P, places = 49, torch.arange(49)
    assert corrupted.shape == (4000, 24) and all(len(set(row)) == 24 for row in corrupted[:50].tolist())
    chosen = sources.gather(1, corrupted)
    shares = [(chosen == P).double().mean(), (chosen == corrupted).double().mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.005)
    untouched = torch.ones(4000, P, dtype=torch.bool).scatter(1, corrupted, False)
    assert (sources == places)[untouched].all()
    other = chosen[(chosen != P) & (chosen != corrupted)]
    assert set(other.tolist()) == set(range(P))


def test_float_pixels_are_the_bytes(device):
    model = small().to(device)
    pixels = pixels_for(model).to(device)
    floats = pixels / 127.5 - 1
    torch.testing.assert_close(model(floats), model(pixels))
    assert torch.equal(model.colours(model.patches(floats)), model.colours(model.patches(pixels)))
    assert torch.equal(model.colours(model.patches(pixels)), mean_colours(model.config, pixels))


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_no_bit(recompute):
    model = small()
    pixels, labels, found = pixels_for(model), torch.tensor([0, 1]), []
    for model.recompute in ("none", recompute):
        model.zero_grad()
        model.loss(pixels, labels).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def hugging_face(kind: str, **config):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.ViTConfig(**sizes, image_size=56, patch_size=8, **config)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return theirs


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_hugging_face_there_and_back(kind, tmp_path):
    """google/vit-*'s names and shapes: equal logits, and every tensor, name and label again."""
    labels = {0: "tench", 1: "a great white shark", 2: "rooster"}
    theirs = hugging_face(kind, id2label=labels, label2id={v: k for k, v in labels.items()})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ViT.from_pretrained(tmp_path / "theirs")
    pixels = pixels_for(ours, 3)
    with torch.no_grad():
        found = theirs((pixels / 127.5 - 1).permute(0, 3, 1, 2))
        want = found.logits if kind == "ViTForImageClassification" else found.pooler_output
        torch.testing.assert_close(ours(pixels), want, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "back", format="hf")
    again, loading = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in again.state_dict().items())
    assert igpt.convert.convert(tmp_path / "theirs", tmp_path / "ours")["source_format"] == "hf"
    ours.save_pretrained(tmp_path / "ours")
    mine = ViT.from_pretrained(tmp_path / "ours")
    assert mine.config == ours.config and mine.class_names == ours.class_names
    assert all(map(torch.equal, mine.parameters(), ours.parameters()))
    if kind == "ViTForImageClassification":
        assert again.config.id2label == labels and ours.class_names == tuple(labels.values())
    processor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3 and processor["size"] == {"height": 56, "width": 56}


def test_checkpoints_that_are_no_such_vit_are_refused(tmp_path):
    hugging_face("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"hidden_act": "relu"}, "hidden_act: got 'relu', expected 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias: got False"),
        ({"image_size": 64}, r"wpe: got shape \(50, 64\), expected \(65, 64\)"),
        ({"patch_size": 4}, r"projection.weight: got shape \(64, 3, 8, 8\)"),
        ({"num_hidden_layers": 2}, "16 tensors unknown to ViT"),
        ({"num_attention_heads": 5}, "heads: got 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            ViT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": [56, 56]}))
    assert ViT.from_pretrained(tmp_path).config.size == 56
    with pytest.raises(ValueError, match="is a model of a ViTConfig, expected one of a Config"):
        igpt.ImageGPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_scale: got 'hf'"):
        ViT.from_pretrained(tmp_path, attn_scale="hf")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.485, 0.456, 0.406]}')
    with pytest.raises(ValueError, match=r"image_mean: got \[0.485"):
        ViT.from_pretrained(tmp_path)
    for overrides in ({"objective": "patches"}, {"pooler": True}):
        with pytest.raises(ValueError, match=r"expected .* Hugging Face's ViT"):
            small(**overrides).save_pretrained(tmp_path / "new", format="hf")


def test_shapes_are_the_models():
    for overrides in ({}, {"objective": "patches"}, {"pooler": True}, {"classes": 0, "n_inner": 40}):
        model = ViT(ViTConfig(**{**SMALL, **overrides}), device="meta")
        shapes = igpt.convert.checkpoints.shapes(model.config)
        assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_bad_input():
    model = small()
    for wrong in (torch.zeros(2, 28, 27, 3), torch.zeros(2, 3, 28, 28), torch.zeros(2, 28, 28, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"ViT: pixels: got .* expected uint8 or floats"):
            model(wrong)
    for labels in (torch.tensor([0, 5]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="loss: labels: got"):
            model.loss(pixels_for(model), labels)
    for objective, targets in (("labels", 0), ("labels", 2), ("patches", 1)):
        with pytest.raises(ValueError, match=f"loss: got {targets} targets for objective '{objective}', expected"):
            small(objective=objective).loss(pixels_for(model), *[torch.zeros(2, dtype=torch.int64)] * targets)
    with pytest.raises(ValueError, match="loss: got 0 pictures"):
        model.loss(pixels_for(model)[:0], torch.tensor([]))
    bad = {"size": 30, "objective": "ar", "pooler": 1, "patch": 0, "classes": -1, "norm_eps": 0, "heads": 3}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name}: got"):
            ViTConfig(**{**SMALL, name: value})
    with pytest.raises(ValueError, match="patch: got 28"):
        ViTConfig(**{**SMALL, "patch": 28, "objective": "patches"})
    with pytest.raises(ValueError, match="preset: got 's', expected one of"):
        ViT.from_preset("s")


@pytest.mark.parametrize("N", [50, 65, 197])
def test_full_attention_at_its_lengths(N, device, poison_empty):
    qkv = torch.randn(1, N, 3, 1, 64, generator=torch.Generator().manual_seed(N)).to(device)
    ours = functools.partial(igpt.ops.attention, causal=False, impl="triton")
    for errors in against_fp64(ours, lambda q: reference.attention(*q.unbind(2), False), {"q": qkv}, ("q",)):
        assert errors.ok, errors
