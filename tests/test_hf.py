"""transformers' Image GPT patched by apply_igpt_kernels: each fault of theirs by name, and all that must stay."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DynamicCache,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
    StaticCache,
)
from transformers.models.imagegpt import modeling_imagegpt as theirs  # noqa: E402

import igpt  # noqa: E402
from bench.correctness.budget import compare  # noqa: E402

N, START = 16, 16
SMALL = {"n_layer": 24, "n_embd": 512, "n_head": 8, "n_positions": 1024, "vocab_size": 513, "initializer_range": 0.05}


def build(cls=ImageGPTForCausalImageModeling, seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": N, "vocab_size": START + 1}
    sizes |= {"initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = cls(ImageGPTConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                p += 0.2 * torch.randn_like(p)
    return model.to(dtype)


def tokens(batch=2, length=N, seed=1):
    return torch.randint(0, START, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def patched():
    """Patch a model until the test ends."""
    patches = []

    def apply(model=None, **options):
        patches.append(igpt.hf.apply_igpt_kernels(model, **options))
        return model

    yield apply
    for patch in reversed(patches):
        patch.undo()


def right_scale(model):
    """What their own code computes where its division is by the root itself."""
    before = theirs.torch_float
    theirs.torch_float = float
    try:
        yield model
    finally:
        theirs.torch_float = before


def exact(model, *args, **kwargs):
    """Their own forward in fp64, its scale mended."""
    wide = copy.deepcopy(model).double()
    for fixed in right_scale(wide):
        return fixed(*args, **kwargs)


def fault(seen: bool) -> None:
    """transformers 5.17 has it; 5.23 has mended the scale and generate with a static cache."""
    assert seen or not transformers.__version__.startswith("5.17.")


# --- their faults


@pytest.mark.parametrize("head_dim", [96, 128, 30])
def test_fault_scale_truncated_to_an_integer(head_dim, patched):
    model = build(n_embd=2 * head_dim, n_head=2)
    x = tokens()
    want, before = exact(model, x).logits, model(x).logits
    got = patched(model)(x).logits
    fault((before - want).abs().max() > 1e-3)
    assert (got - want).abs().max() < 1e-4


def test_fault_static_cache_sees_empty_slots(patched):
    model, x = build(n_positions=64), tokens(length=12)
    want = model(x, use_cache=False).logits
    with torch.no_grad():
        before = model(x, past_key_values=StaticCache(config=model.config, max_cache_len=64), use_cache=True).logits
        fault((before - want).abs().max() > 0.1)
        patched(model)
        cache = StaticCache(config=model.config, max_cache_len=64)
        chunks = [model(part, past_key_values=cache, use_cache=True).logits for part in x.split([5, 1, 1, 5], dim=1)]
    assert torch.allclose(torch.cat(chunks, 1), want, atol=1e-5)


def test_fault_generate_with_a_static_cache_fails(patched):
    model, x = build(n_positions=64), tokens(length=5)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    want = model.generate(x, **options)
    try:
        fault(not torch.equal(model.generate(x, cache_implementation="static", **options), want))
    except RuntimeError as error:
        assert "must match the size" in str(error)  # a 4-D mask that was flattened
    patched(model)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), want)


def test_fault_norm_overflows_in_fp16(patched):
    model = build(dtype=torch.float16)
    norm, x = model.transformer.ln_f, torch.full((1, 64), 300.0, dtype=torch.float16)
    want = norm.weight.float()
    fault((norm(x).float() == 0).all())
    patched(model)
    assert torch.allclose(norm(x).float(), want[None], rtol=1e-3)


def test_fault_tied_head_has_513_colours(patched):
    model = build(tie_word_embeddings=True)
    x = tokens()
    before = model(x).logits
    fault(before.shape[-1] == START + 1)  # the start vector can be sampled
    patched(model)
    assert torch.allclose(model(x).logits, before[..., :START], atol=1e-5)
    assert model(x, labels=x).loss.isfinite()


def test_loss_drops_the_last_pixel_unless_paper_loss(patched):
    model, x = build(), tokens()
    before = model(x, labels=x).loss
    patched(model)
    assert torch.allclose(model(x, labels=x).loss, before, rtol=1e-6)


def test_paper_loss_is_that_of_all_pixels(patched, tmp_path):
    model, x = build(), tokens()
    model.save_pretrained(tmp_path)
    want = igpt.ImageGPT.from_pretrained(tmp_path).loss(x)
    patched(model, paper_loss=True)
    assert torch.allclose(model(x, labels=x).loss, want, rtol=1e-5)
    behind = torch.cat([torch.full_like(x[:, :1], START), x[:, :-1]], 1)
    assert torch.allclose(model(behind, labels=x).loss, want, rtol=1e-5)
    some = x.masked_fill(torch.arange(N) > 3, -100)
    assert torch.allclose(model(x, labels=some).loss, nll(model(behind).logits, x)[:, :4].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="labels"):
        model(inputs_embeds=torch.zeros(1, 4, 64), labels=x[:1, :4])


def nll(logits, x):
    return -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]


# --- what stays


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 48},
        {"reorder_and_upcast_attn": True, "n_embd": 96, "n_head": 2}, {"activation_function": "gelu"},
        {"layer_norm_epsilon": 0.3}, {"is_decoder": True},
    ],
    ids=str,
)  # fmt: skip
def test_config_keys_and_gradients(changes, patched):
    model, x = build(**changes).train(), tokens()
    names = [name for name, _ in model.named_parameters()]

    def run(model):
        out = model(x, labels=x)
        return [out.logits.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]

    for fixed in right_scale(model):
        eager, wide = run(fixed), run(copy.deepcopy(fixed).double())
    for errors in map(compare, ["logits", *names], run(patched(copy.deepcopy(model))), eager, wide):
        assert errors.ok, errors


@pytest.mark.parametrize("cls", [ImageGPTModel, ImageGPTForImageClassification])
def test_the_other_classes(cls, patched):
    model, x = build(cls, num_labels=3), tokens()
    want = model(x, output_hidden_states=True, output_attentions=True)
    labels = {"labels": torch.tensor([0, 2])} if cls is ImageGPTForImageClassification else {}
    with_labels = model(x, **labels)
    got = patched(model)(x, output_hidden_states=True, output_attentions=True)
    assert torch.allclose(got[0], want[0], atol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip((*got.hidden_states, *got.attentions), (*want.hidden_states, *want.attentions)):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(model(x, **labels)[0], with_labels[0], atol=1e-5)  # with labels, the loss
    pair = model(x, return_dict=False)
    assert isinstance(pair, tuple) and torch.allclose(pair[0], want[0], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_cache": False}, {"num_beams": 3}, {"pad": 2}, {"pad": 2, "num_beams": 2},
        {"pad": 2, "use_cache": False}, {"pad": 2, "static": True}, {"static": True},
        {"prompt_lookup_num_tokens": 2, "batch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_generate_is_equal(options, patched):
    model = build(n_positions=64)
    options = dict(options)
    x, static = tokens(batch=options.pop("batch", 2), length=6), options.pop("static", False)
    mask = torch.ones_like(x)
    mask[0, : options.pop("pad", 0)] = 0
    options |= {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "attention_mask": mask}
    want = model.generate(x, **options)
    patched(model)
    got = model.generate(x, **options, **({"cache_implementation": "static"} if static else {}))
    assert torch.equal(got, want)


def test_greedy_generate_of_the_small_model_is_equal(patched):
    model = build(**SMALL)
    x = torch.cat([torch.full((2, 1), 512), torch.randint(0, 512, (2, 7))], 1)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    # A random model's greedy pictures are of one colour: drawn ones, by the same noise, say more.
    drawn = options | {"do_sample": True}
    want = model.generate(x, **options)
    torch.manual_seed(1)
    want_drawn = model.generate(x, **drawn)
    patched(model)
    assert torch.equal(model.generate(x, **options), want)
    torch.manual_seed(1)
    assert torch.equal(model.generate(x, **drawn), want_drawn)
    assert want_drawn[:, 8:].unique().numel() > 8


def test_left_padding_in_every_dtype_has_no_nan(patched):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, x = patched(build(dtype=dtype)), tokens()
        mask = torch.ones_like(x)
        mask[0, :5] = 0
        got = model(x, attention_mask=mask).logits
        alone = model(x[:1, 5:], position_ids=torch.arange(5, N)[None]).logits
        assert got.isfinite().all()
        assert (got[0, 5:].float() - alone[0].float()).abs().max() <= {4: 1e-5, 2: 0.15}[dtype.itemsize]
        four = model(x, attention_mask=mask[:, None, None, :].bool().expand(-1, 1, N, -1)).logits
        assert torch.equal(four, got)


def test_cached_chunks_equal_one_pass(patched):
    model, x = patched(build()), tokens()
    with torch.no_grad():
        want, cache = model(x, use_cache=False).logits, None
        for part, logits in zip(x.split([7, 1, 8], dim=1), want.split([7, 1, 8], dim=1)):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert torch.allclose(out.logits, logits, atol=1e-5)


@pytest.mark.parametrize("cls", [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification])
def test_an_empty_batch(cls, patched):
    """Theirs dies in a reshape."""
    model, x = patched(build(cls, num_labels=3)), tokens()[:0]
    for options in ({}, {"attention_mask": torch.ones_like(x)}, {"output_attentions": True}, {"use_cache": False}):
        out = model(x, **options)[0]
        assert out.shape == {3: (0, 3), 64: (0, N, 64), START: (0, N, START)}[out.shape[-1]]


def test_dropout_stays(patched):
    x = tokens()
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        model = patched(build(**{key: 0.3}))
        quiet = model(x).logits
        assert (model.train()(x).logits != model(x).logits).any(), key
        assert torch.equal(model.eval()(x).logits, quiet)


def test_gradient_checkpointing(patched):
    model, x = patched(build()), tokens()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(x, labels=x).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_save_and_load(patched, tmp_path):
    model, x = build(), tokens()
    want = patched(model)(x).logits
    model.save_pretrained(tmp_path)
    assert ImageGPTConfig.from_pretrained(tmp_path).architectures == ["ImageGPTForCausalImageModeling"]
    again, info = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(again(x).logits, want, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x).logits, want)


def test_compile_full_graph(patched):
    model, x = patched(build()), tokens()
    want = model(x, use_cache=False, labels=x)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = run(x, use_cache=False, labels=x)
    assert torch.allclose(got.logits, want.logits, atol=1e-5) and torch.allclose(got.loss, want.loss)


def test_autocast_keeps_each_operations_dtype(patched):
    model, x = build(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x).logits
        got = patched(model)(x).logits
    assert got.dtype == want.dtype
    reference = exact(model, x).logits
    assert (got - reference).abs().max() <= 2 * (want - reference).abs().max()


def test_hooks_and_adapters_are_not_bypassed(patched):
    model, x = patched(build()), tokens()
    want, seen = model(x).logits, []
    handles = [
        model.transformer.h[0].ln_1.register_forward_hook(lambda m, i, o: seen.append(o)),
        model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(lambda m, i: seen.append(i)),
    ]
    assert torch.allclose(model(x).logits, want, atol=1e-5) and len(seen) == 2
    for handle in handles:
        handle.remove()

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    model.transformer.h[0].attn.c_proj = Adapter(model.transformer.h[0].attn.c_proj)
    assert (model(x).logits - want).abs().max() > 1e-2


# --- undo and refusals


def test_undo_restores_bit_for_bit():
    model, x = build(n_embd=96, n_head=1), tokens()
    classes = {cls: dict(vars(cls)) for cls in vars(theirs).values() if isinstance(cls, type)}
    states = {name: dict(vars(module)) for name, module in model.named_modules()}
    want = model(x).logits
    for target in (model, None):
        patch = igpt.hf.apply_igpt_kernels(target)
        assert not torch.equal(model(x).logits, want)
        patch.undo()
        patch.undo()
        assert torch.equal(model(x).logits, want)
        assert {cls: dict(vars(cls)) for cls in classes} == classes
        assert all(vars(module) == states[name] for name, module in model.named_modules())


def test_class_patch_reaches_models_made_before_and_after():
    before, x = build(n_embd=96, n_head=1), tokens()
    wrong = before(x).logits
    with igpt.hf.apply_igpt_kernels():
        after = build(n_embd=96, n_head=1)
        assert torch.equal(before(x).logits, after(x).logits) and not torch.equal(before(x).logits, wrong)
        with pytest.raises(ValueError, match="patched already"):
            igpt.hf.apply_igpt_kernels()
    assert torch.equal(before(x).logits, wrong)


def test_instance_patch_leaves_others_alone(patched):
    one, other, x = build(n_embd=96, n_head=1), build(n_embd=96, n_head=1), tokens()
    want = other(x).logits
    patched(one)
    assert torch.equal(other(x).logits, want) and not torch.equal(one(x).logits, want)
    with pytest.raises(ValueError, match="patched already"):
        igpt.hf.apply_igpt_kernels(one)


def test_refusals(patched):
    with pytest.raises(ValueError, match="without an ImageGPTModel"):
        igpt.hf.apply_igpt_kernels(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="add_cross_attention"):
        igpt.hf.apply_igpt_kernels(build(add_cross_attention=True))
    model = build()
    model.transformer.h[0].forward = lambda *a: None
    with pytest.raises(ValueError, match="ImageGPTBlock"):
        igpt.hf.apply_igpt_kernels(model)
    assert type(model.transformer) is ImageGPTModel  # nothing was changed
    model = patched(build())
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(tokens(), encoder_hidden_states=torch.zeros(2, 3, 64))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model()


X = tokens(length=12)
STRIPES = (torch.arange(2 * N).view(2, N) % 3 > 0).long()
FAR = torch.arange(12)[None] + 5


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"input_ids": X.float()}, r"input_ids: got torch.float32 \(2, 12\)"), ({"input_ids": X.tolist()}, "got list"),
        ({"input_ids": X.to(torch.uint8)}, "got torch.uint8"), ({"input_ids": X[:, :0]}, r"int64 \(2, 0\)"),
        ({"input_ids": X + START + 1}, "input_ids: got values in"), ({"input_ids": X + 2**32}, "got values in"),
        ({"input_ids": torch.zeros(2, N + 1).long()}, f"got {N + 1} positions, expected at most n_positions = {N}"),
        ({"inputs_embeds": torch.zeros(2, N + 1, 64)}, f"got {N + 1} positions"),
        ({"inputs_embeds": torch.zeros(2, 3, 63)}, "inputs_embeds: got"),
        ({"inputs_embeds": torch.zeros(2, 3, 64).double()}, "inputs_embeds: got torch.float64"),
        ({"input_ids": X, "attention_mask": STRIPES[:, :8]}, r"attention_mask: got shape \(2, 8\), expected \(2, 12\)"),
        ({"input_ids": X, "attention_mask": STRIPES}, r"attention_mask: got shape \(2, 16\)"),
        ({"input_ids": X, "attention_mask": STRIPES[:1, :12]}, r"attention_mask: got shape \(1, 12\)"),
        ({"input_ids": X, "attention_mask": torch.ones(2, 12, 12)}, "attention_mask: got"),
        ({"input_ids": X, "attention_mask": torch.zeros(2, 3, 12, 12)}, "attention_mask: got"),
        ({"input_ids": X, "attention_mask": torch.zeros(2, 1, 12, 8)}, "attention_mask: got"),
        ({"input_ids": X, "token_type_ids": X[:, :6]}, r"token_type_ids: got shape \(2, 6\), expected \(2, 12\)"),
        ({"input_ids": X, "token_type_ids": X.float()}, "token_type_ids: got torch.float32"),
        ({"input_ids": X, "token_type_ids": X + 17}, "token_type_ids: got values"),
        ({"input_ids": X, "position_ids": FAR}, r"position_ids: got values in \[5, 16\], expected \[0, 16\)"),
        ({"input_ids": X, "position_ids": FAR[:, :6]}, "position_ids: got shape"),
        ({"input_ids": X, "position_ids": FAR[:, None]}, "position_ids: got shape"),
        ({"input_ids": X, "past_key_values": ((X, X),)}, "past_key_values: got tuple"),
        ({"input_ids": X, "labels": X.flatten()}, r"labels: got shape \(24,\), expected \(2, 12\)"),
        ({"input_ids": X, "labels": X.t()}, "labels: got shape"), ({"input_ids": X, "labels": X.int()}, "labels: got"),
        ({"input_ids": X, "labels": X + START}, "labels: got values"),
        ({"input_ids": X, "labels": X - START}, "labels: got values"),
    ],
)  # fmt: skip
def test_what_theirs_refuses_is_refused_by_name(arguments, said, patched):
    """Theirs raises some error, or (all-true masks, a width of 1) takes what has no meaning."""
    model = build()
    with pytest.raises(ValueError, match=said):
        patched(model)(**arguments)


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=N)])
def test_what_lies_behind_counts(cache, patched):
    model = patched(build())
    past = cache(config=model.config)
    with torch.no_grad():
        model(tokens(length=10), past_key_values=past, use_cache=True)
        for new, options, said in (
            (7, {}, "got 7 positions behind 10 in past_key_values, expected at most n_positions = 16"),
            (7, {"position_ids": torch.arange(7)}, "got 7 positions behind 10"),
            (4, {"attention_mask": STRIPES[:, :4]}, r"attention_mask: got shape \(2, 4\), expected \(2, 14\)"),
        ):
            with pytest.raises(ValueError, match=said):
                model(tokens(length=new), past_key_values=past, **options)
        out = model(tokens(length=4), past_key_values=past, attention_mask=STRIPES[:, :14])
        assert out.logits.shape == (2, 4, START)


# --- ours in their clothes


@pytest.mark.parametrize("head_dim", [64, 96, 128, 20])
def test_exported_model_is_right_without_a_patch(head_dim, tmp_path):
    config = igpt.Config(n_layer=2, width=2 * head_dim, heads=2, n_ctx=N, vocab=START)
    model = igpt.ImageGPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "hf", format="hf")
    hf, info = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    x = tokens()
    behind = torch.cat([torch.full_like(x[:, :1], START), x[:, :-1]], 1)
    want = model.double()(x)
    assert (hf.eval()(behind).logits - want).abs().max() < 1e-4
    assert math.isqrt(head_dim) ** 2 != head_dim or not hf.config.reorder_and_upcast_attn
    assert igpt.ImageGPT.from_pretrained(tmp_path / "hf").config == config


# --- the image processor


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "nearest"])
def test_processor_gives_the_same_tokens(resample):
    processor = pytest.importorskip("transformers.models.imagegpt.image_processing_pil_imagegpt")
    rng = np.random.default_rng(0)
    palette = igpt.Palette(rng.uniform(-1, 1, (512, 3)))
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((90, 70)))
    pictures = [smooth, rng.integers(0, 256, (40, 33, 3), np.uint8), rng.integers(0, 256, (32, 32, 3), np.uint8)]
    hf = processor.ImageGPTImageProcessorPil(
        clusters=palette.centres.tolist(), size={"height": 32, "width": 32},
        resample=Image.Resampling[resample.upper()],
    )  # fmt: skip
    want = np.stack(hf(pictures, return_tensors="np")["input_ids"])
    got = igpt.hf.processor_tokens(pictures, 32, palette, resample)
    assert torch.equal(got, torch.from_numpy(want).long())
    grey = Image.fromarray(pictures[0]).convert("L")
    assert igpt.hf.processor_tokens([grey], (8, 4), palette).shape == (1, 32)
    wide = Image.fromarray(257 * np.asarray(grey).astype(np.uint16))
    assert wide.mode == "I;16"
    assert torch.equal(*(igpt.hf.processor_tokens([image], 8, palette, resample) for image in (wide, grey)))
    with pytest.raises(ValueError, match="images"):
        igpt.hf.processor_tokens([np.zeros((4, 4))], 32, palette)
