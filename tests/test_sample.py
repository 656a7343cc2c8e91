"""Decoding against the full forward, drawing against probabilities, seeds, bad input, and the two programs."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from PIL import Image

from bench.cases import decode_case
from bench.correctness.budget import compare
from bench.cost import H200
from igpt import ImageGPT, Palette, machine, sample
from igpt.programs import complete
from igpt.programs import sample as program
from igpt.programs.sampling import Sampling
from igpt.sample import decoder as decode
from igpt.sample import draw, grid

HEAD_DIMS = (64, 96, 128)
FORMS = {
    "released": {},
    "layer norm, biases": {"norm": "layer", "bias": True},
    "scaled by layer": {"scale_by_layer": True, "attn_scale": 0.2, "n_inner": 160},
}


def small(head_dim: int = 64, seed: int = 0, dtype=torch.float32, **overrides) -> ImageGPT:
    """Two heads, three layers, with every weight random and a head that has opinions."""
    config = {"n_layer": 3, "width": 2 * head_dim, "heads": 2, "n_ctx": 21, "vocab": 37, **overrides}
    model = ImageGPT.from_preset("tiny", **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.init_weights(generator)
        for name, p in model.named_parameters():
            if p.dim() == 1 or name == "head":
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def small_copy(model, dtype) -> ImageGPT:
    copy = ImageGPT(model.config, impl="torch", dtype=dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def random_tokens(model, batch: int, seed: int = 1):
    c = model.config
    return torch.randint(c.vocab, (batch, c.n_ctx), generator=torch.Generator().manual_seed(seed))


def of_tokens(log_p_BNV, tokens_BN):
    return log_p_BNV.log_softmax(-1).gather(-1, tokens_BN[..., None])[..., 0]


@triton.jit
def rand_kernel(p_out, p_counter, seed, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.rand(seed, tl.load(p_counter + o)))


# --- noise and drawing


def test_philox_known_answers():
    """The first word of Random123's test vector for key and counter zero; other keys are Triton's, below."""
    assert draw.philox(0, torch.tensor([0])).item() == 0x6627E8D5


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**40 + 12345])
def test_uniform_is_triton_rand(seed, device):
    generator = torch.Generator().manual_seed(seed)
    counter = torch.randint(2**62, (256,), generator=generator)
    counter[:4] = torch.tensor([0, 1, 2**32 - 1, (7 << 32) + 5])
    counter = counter.to(device)
    out = torch.empty(256, device=device)
    rand_kernel[(1,)](out, counter, seed, BLOCK=256)
    ours = draw.uniform(seed, counter)
    assert torch.equal(ours, out)
    assert ours.min() >= 0 and ours.max() < 1


def test_noise_is_gumbel_and_keyed_by_picture_and_position():
    pictures, positions = torch.tensor([3, 9]), torch.tensor([0, 5, 6])
    noise = draw.gumbel(4, pictures, positions, 50_000)
    assert noise.shape == (3, 2, 50_000)
    # A Gumbel has mean 0.5772 and variance pi^2 / 6: four standard errors of 300,000 draws.
    assert abs(noise.mean() - 0.57722) < 4 * math.pi / math.sqrt(6 * noise.numel())
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2, 1:], draw.gumbel(4, pictures[1:], positions[1:2], 50_000))
    assert not torch.equal(noise, draw.gumbel(5, pictures, positions, 50_000))


def chi_square(counts, expected) -> float:
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_have_the_right_frequencies(temperature):
    n, logits = 20_000, torch.tensor([1.5, 0.0, -1.0, 0.3, -4.0, 2.0, 0.5, 0.0])
    noise = draw.gumbel(0, torch.arange(n), torch.tensor([2]), 8)[0]
    counts = torch.bincount(draw.Sampler(temperature)(logits.expand(n, 8), noise), minlength=8)
    # 0.999 quantile of chi-square with 7 degrees of freedom.
    assert chi_square(counts, n * (logits / temperature).softmax(-1)) < 24.3


def test_generated_pictures_have_the_models_frequencies():
    """Pictures of two pixels in four colours: all 16 against the product of the model's own conditionals."""
    model, n = small(n_ctx=2, vocab=4, n_layer=2), 8_000
    tokens = model.generate(n, seed=11)
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    expected = n * of_tokens(model(every).detach(), every).sum(-1).exp()
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)
    assert chi_square(counts, expected) < 37.7  # 0.999 quantile, 15 degrees of freedom


@pytest.mark.parametrize(
    "top_k, top_p", [(1, None), (5, None), (37, None), (None, 0.01), (None, 0.6), (None, 1.0), (9, 0.5)]
)
def test_truncation_by_definition(top_k, top_p):
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(0))
    logits[2, 10:20] = logits[2, 10]  # ties live or die together
    logits[3] = 0.0
    for row, cut in zip(logits, draw.truncate(logits, top_k, top_p)):
        likelier = row[None, :] > row[:, None]
        alive = likelier.sum(-1) < (top_k or 37)
        mass = row.masked_fill(~alive, -math.inf).softmax(-1)
        alive &= (mass * likelier).sum(-1) < (top_p or 2.0)
        assert torch.equal(cut > -math.inf, alive)
        assert torch.equal(cut[alive], row[alive])


def test_top_k_one_and_tiny_temperature_are_greedy():
    model = small()
    greedy = model.generate(2, temperature=0.0)
    assert torch.equal(model.generate(2, top_k=1, seed=3), greedy)
    for temperature in (1e-6, 1e-30, 1e-38, 1e-45, 5e-324):
        assert torch.equal(model.generate(2, temperature=temperature, seed=3), greedy)
    for top_p in (1e-6, 1e-45, 5e-324):
        assert torch.equal(model.generate(2, top_p=top_p, seed=3), greedy)


# --- decoding against the full forward


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_greedy_is_the_full_forwards_argmax(head_dim, form, poison_empty):
    model = small(head_dim, **FORMS[form])
    tokens = model.generate(3, temperature=0.0)
    assert torch.equal(model(tokens).argmax(-1), tokens)
    assert torch.equal(model.complete(tokens, 8, temperature=0.0), tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_log_likelihood_is_within_the_budget(head_dim, dtype, form, poison_empty):
    """One pixel at a time, and the full forward of the same dtype, both against the full forward in fp64."""
    model = small(head_dim, dtype=dtype, **FORMS[form])
    tokens = random_tokens(model, 3)
    decoded = sample.log_likelihood(model, tokens)
    eager = of_tokens(model(tokens).float(), tokens)
    exact = of_tokens(small_copy(model, torch.float64)(tokens), tokens)
    assert (errors := compare("log-likelihood", decoded, eager, exact)).ok, errors


def to_int8_values(model) -> None:
    """Weights that int8 holds exactly, and gains of one."""
    with torch.no_grad():
        for block in model.blocks:
            for norm, w in ((block.attn.norm, block.attn.qkv), (block.mlp.norm, block.mlp.fc)):
                w.mul_(norm)
                norm.fill_(1.0)
            for w in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj):
                rounded, scale = decode.quantise(w)
                w.copy_(rounded * scale[:, None])


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_narrow_weights(weights, poison_empty):
    """Within the budget of eager bf16; int8 on weights that it holds exactly."""
    model = small()
    if weights == "int8":
        to_int8_values(model)
    tokens = random_tokens(model, 3)
    decoded = sample.log_likelihood(model, tokens, weights=weights)
    eager = of_tokens(small_copy(model, torch.bfloat16)(tokens).float(), tokens)
    exact = of_tokens(small_copy(model, torch.float64)(tokens), tokens)
    assert (errors := compare("log-likelihood", decoded, eager, exact)).ok, errors


def test_quantise_rounds_to_nearest():
    weight = torch.randn(16, 64) * torch.logspace(-8, 3, 16)[:, None]
    weight[5] = 0.0
    rounded, scale = decode.quantise(weight)
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert rounded.abs().amax(1)[weight.abs().amax(1) > 0].eq(127).all()


@pytest.mark.parametrize("rows", [1, 3, 5, 17])
@pytest.mark.parametrize("out, columns", [(64, 64), (37, 24), (60, 20), (1, 32)])
def test_int8_product_at_any_size(out, columns, rows):
    """torch._weight_int8pack_mm reads past the end of rows of 20 or 24 (seen: garbage, and a segmentation fault)."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(out, columns, generator=generator), torch.randn(out, generator=generator)
    a = torch.randn(rows, columns, generator=generator).bfloat16()
    rounded, scale = decode.quantise(weight)
    ours = decode.Product(weight, bias, rows, "int8")(a)
    held = rounded * scale[:, None]
    eager = torch.nn.functional.linear(a, held.bfloat16(), bias.bfloat16())
    errors = compare("y", ours, eager, a.double() @ held.double().t() + bias)
    assert errors.ok, errors


def test_narrow_caches(poison_empty):
    """What is kept is the keys and values rounded once; fp8 saturates where a cast would make NaN."""
    model, tokens = small(), random_tokens(small(), 2)
    with torch.no_grad():
        model.blocks[0].attn.qkv[-1] *= 1e4
    exact, narrow = decode.Decoder(model, 2), decode.Decoder(model, 2, cache_dtype="fp8")
    for d in (exact, narrow):
        d.prefill(tokens[:, :9])
        d.step(9, tokens[:, 8])
    kept, want = narrow.cache[0, ..., :10, :], exact.cache[0, ..., :10, :]
    assert want.abs().max() > 448
    assert torch.equal(kept.float(), want.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    model, tokens = small(), random_tokens(small(), 2)
    full = of_tokens(model(tokens), tokens)
    fp32, bf16, fp8 = (
        (sample.log_likelihood(model, tokens, cache_dtype=c) - full).abs().mean() for c in ("fp32", "bf16", "fp8")
    )
    assert fp32 < bf16 < fp8 < full.abs().mean()


def test_sampled_pictures_likelihood_and_prefix():
    model = small()
    tokens = model.generate(2, seed=2)
    half = model.complete(tokens, 10, seed=2)
    assert torch.equal(half, tokens)  # the rest draws from the same counters
    other = model.complete(tokens, 10, seed=3)
    assert torch.equal(other[:, :10], tokens[:, :10]) and not torch.equal(other, tokens)


def test_seeds_do_not_depend_on_the_batch_split():
    model = small()
    whole = model.generate(5, seed=7)
    parts = [model.generate(stop - start, seed=7, first=start) for start, stop in ((0, 1), (1, 3), (3, 5))]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(t.tolist()) for t in whole}) == 5


def test_progress_counts_every_pixel_and_results_can_train():
    model, seen = small(), []
    tokens = model.complete(random_tokens(model, 2), 4, progress=seen.append)
    assert sum(seen) == 2 * (model.config.n_ctx - 4)
    model.loss(tokens).backward()


@pytest.mark.parametrize("keep", [0, 9])
@pytest.mark.parametrize("every", [1, 5, 100])
def test_a_stream_is_the_same_picture_in_parts(keep, every):
    model = small()
    tokens = random_tokens(model, 2)
    whole = model.complete(tokens, keep, seed=3, top_k=9) if keep else model.generate(2, seed=3, top_k=9)
    seen = []
    parts = sample.stream(model, tokens[:, :keep], every, seed=3, top_k=9, progress=seen.append)
    assert not seen, "nothing is drawn before it is asked for"
    first = next(parts)
    assert len(seen) == first.shape[1] == min(every, 21 - keep)
    assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.cat([tokens[:, :keep], first, *parts], 1), whole)


def test_a_stream_refuses_at_the_call():
    model = small()
    for every in (0, 2.0):
        with pytest.raises(ValueError, match="every: got"):
            sample.stream(model, random_tokens(model, 2)[:, :5], every)
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 22\)"):
        sample.stream(model, torch.zeros(2, 22, dtype=torch.int64), 1)


def test_generation_ignores_autocast():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.complete(random_tokens(model, 2), 9, seed=1)
        judged = sample.log_likelihood(model, inside)
    assert torch.equal(inside, model.complete(random_tokens(model, 2), 9, seed=1))
    assert torch.equal(judged, sample.log_likelihood(model, inside))


# --- the kernels' decoder: interpreted where there is no GPU, so one layer and four pixels


def both_ways(device, head_dim=64, dtype=torch.float32, **overrides):
    """One model for the kernels and for PyTorch."""
    model = small(head_dim, dtype=dtype, n_layer=1, heads=1, width=head_dim, n_ctx=4, **overrides).to(device)
    plain = small_copy(model, dtype).to(device)
    model.impl = "triton"
    return model, plain


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernels_decode_and_draw_as_pytorch_does(head_dim, device, poison_empty):
    model, plain = both_ways(device, head_dim)
    greedy = model.generate(2, temperature=0.0)
    assert torch.equal(plain(greedy).argmax(-1), greedy)
    assert torch.equal(model.generate(2, seed=5, first=3), plain.generate(2, seed=5, first=3))


def test_kernels_complete_truncate_and_reuse(device, poison_empty):
    model, plain = both_ways(device, **FORMS["layer norm, biases"])
    tokens = random_tokens(model, 2).to(device)
    how = {"top_k": 9, "top_p": 0.8}
    assert torch.equal(model.complete(tokens, 2, seed=1, **how), plain.complete(tokens, 2, seed=1, **how))
    parts = sample.stream(model, tokens[:, :2], 1, seed=1, **how)
    assert torch.equal(torch.cat([tokens[:, :2], *parts], 1), plain.complete(tokens, 2, seed=1, **how))
    decoder = sample.decoder_of(model, 2)
    for seed in (3, 4):  # on a GPU the second picture replays the first one's graph
        drawn = torch.zeros(2, 4, dtype=torch.int64, device=device)
        decoder.sample(drawn, 0, 3, draw.Sampler(seed=seed))
        assert torch.equal(drawn[:, :3], plain.generate(2, seed=seed)[:, :3])
        assert (drawn[:, 3] == 0).all()


@pytest.mark.parametrize(
    "dtype, options, form",
    [
        (torch.float32, {}, "scaled by layer"),
        (torch.bfloat16, {}, "layer norm, biases"),
        (torch.float32, {"weights": "bf16"}, "released"),
        (torch.float32, {"weights": "int8", "cache_dtype": "bf16"}, "released"),
        (torch.float32, {"cache_dtype": "fp8"}, "released"),
    ],
)
def test_kernels_log_likelihood(dtype, options, form, device, poison_empty):
    """Within the budget of the full forward in the products' dtype; with an fp8 cache, of PyTorch's with one."""
    model, plain = both_ways(device, dtype=dtype, **FORMS[form])
    if "weights" in options:
        to_int8_values(model)
        plain, dtype = small_copy(model, torch.bfloat16).to(device), torch.bfloat16
    exact, tokens = small_copy(model, torch.float64).to(device), random_tokens(model, 2).to(device)
    ours = sample.log_likelihood(model, tokens, **options)
    if options == {"cache_dtype": "fp8"}:
        eager = sample.log_likelihood(plain, tokens, **options)
    else:
        eager = of_tokens(plain(tokens).float(), tokens)
    errors = compare("log-likelihood", ours, eager, of_tokens(exact(tokens), tokens))
    assert errors.ok, errors


# --- bad input


@pytest.mark.parametrize("options, named", [
    ({"temperature": -0.5}, "temperature"), ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_k": 38}, "top_k.*37"),
    ({"seed": 2**63}, "seed: got"), ({"seed": 1.5}, "seed: got"), ({"top_k": 2.5}, "top_k: got"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
    ({"weights": "int4"}, "weights"), ({"cache_dtype": "int8"}, "cache_dtype"), ({"batch": 0}, "batch"),
    ({"batch": 2.0}, "batch"),
])  # fmt: skip
def test_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        small().generate(**options)


@pytest.mark.parametrize("change, keep, named", [
    (lambda t: t, 0, "keep"), (lambda t: t, 21, "keep"), (lambda t: t, 0.5, "keep"), (lambda t: t[:, :-1], 5, "tokens"),
    (lambda t: t[0], 5, "tokens"), (lambda t: t.float(), 5, "tokens"), (lambda t: t + 37, 5, "tokens"),
    (lambda t: t - 37, 5, "tokens"), (lambda t: t[:0], 5, "tokens"),
])  # fmt: skip
def test_bad_completions(change, keep, named):
    model = small()
    with pytest.raises(ValueError, match=named):
        model.complete(change(random_tokens(model, 2)), keep)


@pytest.mark.parametrize("change, named", [
    (lambda t: t + 37, r"values in \[37, "), (lambda t: t - 37, "values in"), (lambda t: t.float(), "torch.float32"),
    (lambda t: t + 2**32, "values in"), (lambda t: torch.cat([t, t], 1), r"shape \(2, 42\)"), (lambda t: t[0], "shape"),
    (lambda t: t[:0], "shape"), (lambda t: t[:, :0], "shape"),
])  # fmt: skip
def test_bad_tokens_to_judge(change, named):
    model = small()
    with pytest.raises(ValueError, match=f"tokens: got {named}"):
        sample.log_likelihood(model, change(random_tokens(model, 2)))
    tokens = random_tokens(model, 2)
    assert torch.equal(sample.log_likelihood(model, tokens.to(torch.uint8)), sample.log_likelihood(model, tokens))


def test_bert_cannot_generate():
    with pytest.raises(ValueError, match="objective"):
        small(objective="bert").generate(1)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    model = small()
    each = 21 * 2 * 3 * 128 * 4  # positions, keys and values, layers, width, fp32
    monkeypatch.setattr(decode, "available_bytes", lambda device: 10 * each + 5)
    monkeypatch.setattr(torch, "zeros", None)
    message = f"batch: got 11, .*{11 * each:,} bytes.*{10 * each + 5:,} are available.*batch of 10"
    with pytest.raises(ValueError, match=message):
        model.generate(11)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="batch of"):
        model.generate(10**12)


@pytest.mark.parametrize(
    "preset, floors", [("s", (0.041, 0.129, 0.78)), ("m", (0.23, 0.49, 2.5)), ("l", (0.67, 1.2, 5.1))]
)
def test_floor_of_a_token(preset, floors):
    """Milliseconds worked out by hand: weights and a half-full cache in bf16 over an H200's bandwidth."""
    for B, floor in zip((1, 16, 128), floors):
        case = decode_case(preset, B, 544, "bf16")
        assert H200.floor_ms(case.cost(), "bf16") == pytest.approx(floor, rel=0.05)


# --- the programs


@pytest.fixture
def checkpoint(tmp_path):
    """A model of 4 x 4 pictures with its palette."""
    small(n_ctx=16, vocab=8).save_pretrained(tmp_path / "model")
    Palette(torch.cartesian_prod(*3 * [torch.tensor([-1.0, 1.0])])).save(tmp_path / "model" / "palette.npy")
    return tmp_path / "model"


def test_sample_program(checkpoint):
    def pixels(**how):
        options = program.Options(str(checkpoint), n=5, scale=1, out=checkpoint / "grids" / "a.png", **how)
        report = program.run(options)
        assert report["pictures"] == 5 and report["pictures_per_s"] > 0
        return np.asarray(Image.open(report["out"]))

    whole = pixels(batch=5)
    assert whole.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert np.array_equal(whole, pixels(batch=2)) and np.array_equal(whole, pixels())
    assert not np.array_equal(whole, pixels(batch=5, seed=1))


def test_complete_program(checkpoint):
    rng = np.random.default_rng(0)
    files = []
    for i in range(2):
        Image.fromarray(rng.integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255).save(checkpoint / f"{i}.png")
        files.append(checkpoint / f"{i}.png")
    options = {"pictures": tuple(files), "completions": 3, "scale": 1, "out": checkpoint / "c.png"}
    report = complete.run(complete.Options(str(checkpoint), **options))
    assert report["kept_pixels"] == 8 and report["pictures"] == 6
    sheet = np.asarray(Image.open(report["out"]))
    cells = sheet[2:, 2:].reshape(2, 6, 5, 6, 3).transpose(0, 2, 1, 3, 4)[:, :, :4, :4]
    for row, file in zip(cells, files):
        truth = np.asarray(Image.open(file))
        assert np.array_equal(row[-1], truth)
        assert np.array_equal(row[0, :2], truth[:2]) and (row[0, 2:] == grid.HIDDEN).all()
        assert all(np.array_equal(cell[:2], truth[:2]) for cell in row[1:-1])
        assert not np.array_equal(row[1], row[2])


def test_complete_leaves_unreadable_pictures_out_where_it_may(checkpoint):
    files = tuple(checkpoint / f"{i}.png" for i in range(3))
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    files[1].write_bytes(files[1].read_bytes()[:40])
    options = complete.Options(str(checkpoint), pictures=files, completions=2, out=checkpoint / "c.png")
    with pytest.raises(ValueError, match=r"1\.png: unreadable picture"):
        complete.run(options)
    with pytest.warns(UserWarning, match=r"pictures: left out 1 unreadable of 3 pictures \(.*1\.png\)"):
        assert complete.run(dataclasses.replace(options, skip_bad=True))["pictures"] == 4


def test_only_pictures_of_ours_are_overwritten(checkpoint):
    out = checkpoint / "a.png"
    options = program.Options(str(checkpoint), n=1, out=out)
    program.run(options)
    program.run(dataclasses.replace(options, seed=1))
    Image.new("RGB", (4, 4)).save(out)
    before = out.read_bytes()
    for precious in (before, b"no picture at all"):
        out.write_bytes(precious)
        with pytest.raises(ValueError, match=r"out: .*a\.png is there already and is no picture of igpt's; --force"):
            program.run(options)
        with pytest.raises(ValueError, match=r"out: .*a\.png is there already"):
            complete.run(complete.Options(str(checkpoint), pictures=(out,), out=out))
        assert out.read_bytes() == precious
    program.run(dataclasses.replace(options, force=True))
    program.run(options)
    (checkpoint / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"out: cannot write a file at .*folder\.png"):
        program.run(dataclasses.replace(options, out=checkpoint / "folder.png", force=True))


def test_programs_refuse(checkpoint, monkeypatch):
    Image.new("RGB", (9, 5)).save(checkpoint / "wide.png")
    wide = {"pictures": (checkpoint / "wide.png",), "out": checkpoint / "c.png", "completions": 1}
    with pytest.raises(ValueError, match=r"wide.png: got 9 x 5, expected 4 x 4 without --resize"):
        complete.run(complete.Options(str(checkpoint), resize=False, **wide))
    complete.run(complete.Options(str(checkpoint), **wide))
    for bad in ({"keep": 0.0}, {"keep": 1.0}, {"keep": 0.01}, {"completions": 0}, {"pictures": ()}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            complete.run(complete.Options(str(checkpoint), **{**wide, **bad}))
    monkeypatch.setattr(Sampling, "load", None)  # what follows is refused before a model is read
    for bad in ({"columns": 0}, {"out": checkpoint}, {"out": checkpoint / "a.jpg"}, {"out": checkpoint / "a"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            program.run(program.Options(str(checkpoint), **bad))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="scale: got 0"):
        program.run(program.Options(str(checkpoint), scale=0))
    (checkpoint / "palette.npy").unlink()
    with pytest.raises(ValueError, match=r"palette: .* came without one, expected --palette"):
        program.run(program.Options(str(checkpoint)))
    with pytest.raises(ValueError, match="n: got 0"):
        program.run(program.Options(str(checkpoint), n=0, out=Path("never.png")))


def test_a_container_s_limit_counts(tmp_path):
    assert machine.container_bytes(tmp_path) == sys.maxsize
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 250\nfile 250\ninactive_file 200\nactive_file 50\n")
    for limit, left in (("max", sys.maxsize), ("1000", 700)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert machine.container_bytes(tmp_path) == left


def test_a_decoder_is_used_again_and_fits():
    model = small(16)
    decoder = sample.decoder_of(model, 2)
    want = sample.generate(model, 2, seed=3)
    assert all(torch.equal(sample.generate(model, 2, seed=3, decoder=decoder), want) for _ in range(2))
    with pytest.raises(ValueError, match="decoder: got one for 2 pictures, expected 3"):
        sample.generate(model, 3, decoder=decoder)
