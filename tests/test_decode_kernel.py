"""The one-token kernels: products, attention over the cache, the draw; and a whole step against the full forward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.correctness.budget import against_fp64
from igpt.config import Config
from igpt.kernels import decode_chain, reference, tiles
from igpt.kernels import device as device_file
from igpt.kernels.decode_attention import (
    decode_attention,
    decode_attention_op,
    decode_attention_parts,
    decode_attention_parts_op,
)
from igpt.kernels.decode_linear import decode_linear_op, decode_linear_residual, decode_norm_linear
from igpt.kernels.decode_rows import ROWS, decode_norm, decode_norm_op, decode_product
from igpt.kernels.decode_sample import decode_embed, decode_embed_op, decode_sample, decode_sample_op
from igpt.kernels.launching import recording
from igpt.model import ImageGPT
from igpt.sample.draw import Sampler
from igpt.sample.kernel_decoder import KernelDecoder
from tests.test_compile import child

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def at(p, device, batch=1):
    return torch.full((batch,), p, dtype=torch.int32, device=device)


def budget(ours, eager, inputs):
    errors = against_fp64(ours, eager, inputs, ())
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def operands(B, K, O, dtype, device, seed=0):
    gen = generator(seed)
    tensors = {
        "x": 3 * torch.randn(B, K, generator=gen), "weight": (0.2 * torch.randn(O, K, generator=gen)).to(dtype),
        "bias": torch.randn(O, generator=gen).to(dtype),
    }  # fmt: skip
    return {name: t.to(device) for name, t in tensors.items()}


def eager_norm_linear(x, weight, bias=None, centred=False):
    """The stream at least fp32, the product in the weights' dtype: as a careful decoder without our kernels."""
    return F.linear(reference.norm(x, torch.ones_like(x[0]), centred=centred).to(weight.dtype), weight, bias)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, O", [(1, 64, 48), (5, 300, 70), (8, 256, 64), (3, 96, 33), (2, 40, 64)])
def test_norm_linear_within_budget(B, K, O, dtype, centred, device, poison_empty):
    budget(
        lambda **k: decode_norm_linear(**k, centred=centred),
        lambda **k: eager_norm_linear(**k, centred=centred), operands(B, K, O, dtype, device),
    )  # fmt: skip


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["mean", "outliers", "beyond fp16"])
def test_norm_linear_hard_values(values, dtype, centred, device):
    inputs = operands(3, 128, 64, dtype, device)
    if values == "mean":
        inputs["x"] += 100
    elif values == "outliers":
        inputs["x"][:, ::31] *= 500
    else:  # x leaves fp16's range, norm(x) doesn't
        inputs["x"] *= 3e5
    budget(
        lambda **k: decode_norm_linear(**k, centred=centred),
        lambda **k: eager_norm_linear(**k, centred=centred), inputs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_residual_within_budget(dtype, device, poison_empty):
    inputs = operands(7, 80, 48, dtype, device)
    budget(
        lambda **k: decode_norm_linear(**k, gelu=True), lambda **k: reference.quick_gelu(eager_norm_linear(**k)), inputs
    )
    for stream in {torch.float32, dtype}:
        residual = torch.randn(7, 48, generator=generator(1)).to(stream).to(device)
        added = {"a": inputs["x"].to(dtype), "weight": inputs["weight"], "residual": residual, "bias": inputs["bias"]}
        budget(decode_linear_residual, reference.linear_residual, added)


@pytest.mark.parametrize("K", [1024, 1536, 4096, 6144])
def test_fp32_sums_at_the_widths_of_m_and_l(K, device):
    """Within the budget of eager fp32, which a sum over K one product after the other breaks."""
    x, weight, bias = operands(2, K, 16, torch.float32, device).values()
    in_turn = torch.from_numpy((x[:, None] * weight).cpu().numpy().cumsum(-1, dtype="float32")[..., -1]) + bias.cpu()
    for ours, fits in ((decode_linear_residual(x, weight, bias.expand(2, 16)), True), (in_turn, False)):
        inputs = {"a": x, "weight": weight, "residual": bias}
        (errors,) = against_fp64(lambda ours=ours, **_: ours.to(device), reference.linear_residual, inputs, ())
        assert errors.ok == fits, errors
    if K < 4096:
        budget(decode_norm_linear, eager_norm_linear, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize("B", [1, 5])
def test_int8_weights_within_budget(B, device, poison_empty):
    """Against the same integers in fp64: they are exact in bf16, so only the operands' rounding is left."""
    inputs = operands(B, 200, 48, torch.bfloat16, device)
    scale = inputs["weight"].float().abs().amax(1) / 127
    inputs |= {"weight": (inputs["weight"].float() / scale[:, None]).round().to(torch.int8), "scale": scale}

    def eager(x, weight, bias, scale):
        n = reference.norm(x, torch.ones_like(x[0])).to(bias.dtype)
        return F.linear(n, weight.to(n.dtype)) * scale.to(n.dtype) + bias

    budget(decode_norm_linear, eager, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_pictures_norm_and_product(dtype, device, poison_empty):
    """The sum into the stream, its norm and the vendor's product; the same bits for a picture among fewer."""
    B, d = ROWS + 3, 48
    inputs = operands(B, d, 32, dtype, device) | {"gain": torch.full((d,), 1.5, device=device)}
    add = torch.randn(2 * ROWS, d, generator=generator(2)).to(dtype).to(device)

    def ours(x, weight, bias, gain, first=0, count=B):
        stream = x[first : first + count].clone()
        rows = add[first:].new_full((-(-count // ROWS) * ROWS, d), float("nan"))
        rows[:count] = add[first : first + count]
        n = decode_norm(stream, rows, gain, dtype=dtype)
        assert torch.equal(stream, x[first : first + count] + add[first : first + count])
        return decode_product(n, weight, bias)[:count]

    def eager(x, weight, bias, gain):
        return F.linear(reference.norm(x + add[:B].to(x.dtype), gain).to(weight.dtype), weight, bias)

    budget(ours, eager, inputs)
    split = [ours(**inputs, first=first, count=count) for first, count in ((0, 1), (1, ROWS), (ROWS + 1, 2))]
    assert torch.equal(ours(**inputs), torch.cat(split))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_few_pictures_have_the_same_bits_whatever_their_number(centred, device):
    x, weight, bias = operands(3, 200, 40, torch.bfloat16, device).values()
    whole = decode_norm_linear(x, weight, bias, centred=centred, gelu=True)
    rows = torch.cat([decode_norm_linear(r[None], weight, bias, centred=centred, gelu=True) for r in x])
    assert torch.equal(whole, rows)
    qkv, k_cache, v_cache = cached(3, 2, 512, 48, torch.bfloat16, device, written=300)
    whole = decode_attention_parts(qkv, k_cache, v_cache, at(300, device, 3), 0.2)
    for i in range(3):
        each = decode_attention_parts(qkv[i : i + 1], k_cache[i : i + 1], v_cache[i : i + 1], at(300, device), 0.2)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, each))


def cached(B, H, n_ctx, D, dtype, device, seed=0, written=None):
    """qkv and a cache inside a wider allocation; what isn't `written` yet is NaN."""
    gen = generator(seed)
    cache = torch.full((3, 2, B, H, n_ctx, D), float("nan"))
    cache[1, :, :, :, :written] = torch.randn(2, B, H, n_ctx if written is None else written, D, generator=gen)
    k_cache, v_cache = cache.to(dtype).to(device)[1]
    qkv = torch.randn(B, 3, H, D, generator=gen)
    return qkv.to(torch.bfloat16 if dtype.itemsize == 1 else dtype).to(device), k_cache, v_cache


def in_parts(qkv, k_cache, v_cache, position, scale=None):
    """Attention by splits of the keys, joined by a projection that changes nothing: (B, H, D)."""
    B, _, H, D = qkv.shape
    parts = decode_attention_parts(qkv, k_cache, v_cache, position, scale or D**-0.5)
    residual, eye = torch.zeros(B, H * D, device=qkv.device), torch.eye(H * D, device=qkv.device)
    return decode_linear_residual(parts, eye, residual).view(B, H, D).to(qkv.dtype)


# B, H, n_ctx, D, position.
STEPS = [(2, 2, 256, 64, 100), (1, 2, 600, 96, 599), (1, 1, 192, 128, 191), (3, 3, 70, 48, 0), (2, 2, 300, 16, 33),
         (4, 4, 33, 80, 32), (1, 2, 128, 64, 1)]  # fmt: skip
WAYS = {"whole": decode_attention, "parts": in_parts}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("B, H, n_ctx, D, p", STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_attention_within_budget(way, B, H, n_ctx, D, p, dtype, device, poison_empty):
    qkv, k_cache, v_cache = cached(B, H, n_ctx, D, dtype, device, written=p)
    k_after, v_after = k_cache.clone(), v_cache.clone()
    for cache, new in ((k_after, qkv[:, 1]), (v_after, qkv[:, 2])):
        cache[:, :, p] = new.to(cache.dtype)
    out = WAYS[way](qkv, k_cache, v_cache, at(p, device, B))
    for cache, after in ((k_cache, k_after), (v_cache, v_after)):
        assert torch.equal(cache.float().nan_to_num(1e9), after.float().nan_to_num(1e9))

    def eager(q, k, v):
        return reference.attention(q, k, v, causal=True, kv_len=p + 1)[:, 0]

    inputs = {"q": qkv[:, :1].flatten(0, 1)[:, None], "k": k_after.to(qkv.dtype).transpose(1, 2).nan_to_num(),
              "v": v_after.to(qkv.dtype).transpose(1, 2).nan_to_num()}  # fmt: skip
    budget(lambda q, k, v: out, eager, inputs)


@pytest.mark.parametrize("way", WAYS)
def test_attention_with_keys_that_dominate(way, device):
    """Scores of several hundred, at the first key, the new key, and where shares of split keys meet."""
    p = 200
    for planted in (0, 31, 32, 64, 199, 200):
        qkv, k_cache, v_cache = cached(1, 2, 256, 64, torch.float32, device, written=p)
        target = qkv[:, 1] if planted == p else k_cache[:, :, planted]
        target.copy_(40 * qkv[:, 0])
        value = (qkv[:, 2] if planted == p else v_cache[:, :, planted]).clone()
        torch.testing.assert_close(WAYS[way](qkv, k_cache, v_cache, at(p, device)), value)


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_splitting_changes_nothing_but_rounding(ways, device, monkeypatch):
    monkeypatch.setattr(tiles, "DECODE_SPLITS", ways)
    qkv, k_cache, v_cache = cached(2, 2, 512, 32, torch.float32, device, written=277)
    expected = reference.attention(
        qkv[:, 0][:, None].double(),
        *(torch.cat([cache[:, :, :277], qkv[:, i][:, :, None]], 2).transpose(1, 2).double()
          for i, cache in ((1, k_cache), (2, v_cache))), causal=True,
    )  # fmt: skip
    assert decode_attention_parts(qkv, k_cache, v_cache, at(277, device, 2), 0.2)[0].shape[1] == ways
    out = in_parts(qkv, k_cache, v_cache, at(277, device, 2))
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=0, atol=1e-6)


def test_each_picture_has_its_own_position(device):
    qkv, k_cache, v_cache = cached(3, 2, 128, 32, torch.float32, device)
    positions = torch.tensor([5, 90, 127], dtype=torch.int32, device=device)
    whole = decode_attention(qkv, k_cache.clone(), v_cache.clone(), positions)
    for i, p in enumerate(positions.tolist()):
        each = decode_attention(qkv[i : i + 1], k_cache[i : i + 1], v_cache[i : i + 1], at(p, device))
        assert torch.equal(whole[i : i + 1], each)


def test_fp8_cache_clips_what_it_cannot_hold(device):
    qkv, k_cache, v_cache = cached(1, 1, 64, 16, torch.float8_e4m3fn, device, written=3)
    qkv[:, 2] = torch.linspace(-1000, 1000, 16)
    decode_attention(qkv, k_cache, v_cache, at(3, device))
    assert v_cache[0, 0, 3].float().abs().max() == 448


def test_embed_is_the_reference_at_one_position(device, poison_empty):
    gen = generator()
    tokens = torch.randint(0, 20, (3, 9), generator=gen).to(device)
    wte, wpe, sos = (torch.randn(s, generator=gen).to(torch.bfloat16).to(device) for s in ((20, 72), (9, 72), (72,)))
    full = reference.embed(tokens, wte.float(), wpe.float(), sos.float())
    for p in (0, 1, 8):
        assert torch.equal(decode_embed(tokens, wte, wpe, sos, at(p, device, 3)), full[:, p])
    tokens[1, 3] = 20
    assert decode_embed(tokens, wte, wpe, sos, at(4, device, 3)).isnan().any(1).tolist() == [False, True, False]


def test_vectors_of_any_stride(device):
    x, weight, bias = operands(3, 64, 48, torch.float32, device).values()
    narrow, scale = torch.randint(-127, 128, (48, 64), dtype=torch.int8, device=device), bias.abs() + 1
    tokens, pictures = torch.full((3, 4), 2, device=device), torch.arange(3, device=device)
    seed, table = torch.tensor(5, device=device), torch.randn(8, 64, generator=generator(1)).to(device)

    def drawn(numbers):
        written, position = tokens.clone(), at(1, device, 3)
        decode_sample(x, written, position, numbers, seed)
        return written

    for t, call in (
        (bias, lambda bias: decode_norm_linear(x, weight, bias)),
        (scale, lambda scale: decode_norm_linear(x, narrow, scale=scale)),
        (table[0], lambda gain: decode_norm(x, None, gain, dtype=x.dtype)[:3]),
        (table[0], lambda sos: decode_embed(tokens, table, table[:4], sos, at(0, device, 3))),
        (pictures, drawn),
    ):
        assert torch.equal(call(t), call(torch.stack([t, -t - 1], 1)[:, 0]))


def draw(logits, n_ctx, sampler, device):
    B = len(logits)
    tokens, position = torch.full((B, n_ctx), -1, device=device), at(0, device, B)
    pictures = torch.arange(sampler.first, sampler.first + B, device=device)
    seed = torch.tensor(sampler.seed, device=device)
    for p in range(n_ctx):
        assert (position == p).all()
        decode_sample(logits, tokens, position, pictures, seed, sampler.temperature, sampler.top_k, sampler.top_p)
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.6}, {"top_k": 1}, {"temperature": 1e-3},
     {"top_k": 10, "top_p": 0.8, "seed": 2**40}, {"top_k": 37, "top_p": 1.0}],
    ids=str,
)  # fmt: skip
def test_draws_are_those_of_the_specification(options, device):
    """Token for token what igpt/sample/draw.py takes, which says what a draw is."""
    sampler = Sampler(**{"seed": 3, "first": 7} | options)
    logits = 2 * torch.randn(6, 37, generator=generator(1))
    expected = torch.stack([sampler(logits, noise) for noise in sampler.noise(6, 37, 0, 8, "cpu")], 1)
    assert torch.equal(draw(logits.to(device), 8, sampler, device).cpu(), expected)


def test_frequencies_match_the_probabilities(device):
    """Chi-square over 8 tokens and 200 draws, at 1 in 1000, with and without truncation."""
    logits = torch.linspace(-1, 1.5, 8)
    for options, kept in (({}, 8), ({"top_k": 4}, 4), ({"temperature": 0.7, "top_p": 0.9}, 5)):
        sampler = Sampler(**options, seed=5)
        drawn = draw(logits.expand(50, 8).contiguous().to(device), 4, sampler, device).cpu()
        p = (logits / sampler.temperature).softmax(0)
        p[: 8 - kept] = 0
        expected = 200 * (p / p.sum())[8 - kept :]
        counts = torch.bincount(drawn.flatten(), minlength=8)
        assert counts[: 8 - kept].sum() == 0
        statistic = ((counts[8 - kept :] - expected).square() / expected).sum()
        critical = {8: 24.32, 4: 16.27, 5: 18.47}[kept]  # of one degree of freedom fewer
        assert statistic < critical, (options, counts, expected)


def test_a_picture_is_the_same_in_any_batch(device):
    logits = torch.randn(5, 64, generator=generator(2)).to(device)
    whole = draw(logits, 6, Sampler(seed=11), device)
    parts = [draw(logits[i : i + 1], 6, Sampler(seed=11, first=i), device) for i in range(5)]
    assert torch.equal(whole, torch.cat(parts))


def test_ties_take_the_lowest_when_greedy_and_live_together_when_truncated(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]], device=device)
    assert draw(logits, 1, Sampler(temperature=0), device).item() == 1
    drawn = draw(logits.expand(100, 5).contiguous(), 1, Sampler(top_k=1), device)
    assert set(drawn.flatten().tolist()) == {1, 2, 4}


@pytest.mark.parametrize("options", [{"temperature": t} for t in (1e-30, 1e-38, 5e-324)] + [{"top_p": 5e-324}], ids=str)
def test_the_smallest_temperatures_and_masses_are_greedy(options, device):
    logits = torch.randn(6, 37, generator=generator(1)).to(device)
    drawn = draw(logits, 4, Sampler(**options), device)
    assert torch.equal(drawn, logits.argmax(-1, keepdim=True).expand(6, 4))


def small_model(D, device, **overrides):
    torch.manual_seed(0)
    config = {"n_layer": 2, "width": 2 * D, "heads": 2, "n_inner": 2 * D, "n_ctx": 3, "vocab": 32, **overrides}
    model = ImageGPT(Config(**config)).to(device)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    model.impl = "triton"
    return model


@torch.no_grad()
@pytest.mark.parametrize("total", [2, 9], ids=["few", "many"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_greedy_steps_are_the_argmax_of_the_full_forward(D, norm, total, device, poison_empty):
    model = small_model(D, device, norm=norm, bias=norm == "layer")
    decoder = KernelDecoder(model, 2, total=total)
    decoder.cache.fill_(float("nan"))
    decoder.replayable = lambda sampler: lambda: decoder.draw(sampler)
    logits_of, seen, tokens = decoder.logits, [], torch.full((2, 3), -1, device=device)
    decoder.logits = lambda: seen.append(logits_of()) or seen[-1]
    decoder.sample(tokens, 0, 3, Sampler(temperature=0))
    model.impl = "torch"
    full = model(tokens)
    assert torch.equal(tokens, full.argmax(-1))
    torch.testing.assert_close(torch.stack(seen, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("total", [5, 9], ids=["few", "many"])
def test_pictures_do_not_depend_on_the_batch_split(total, device):
    """To the bit, in bf16 and with int8 weights, where nothing forgives another order of a sum."""
    model = small_model(16, device, n_layer=1).to(torch.bfloat16)

    def pictures(first, count):
        decoder = KernelDecoder(model, count, total=total, weights="int8")
        logits = [decoder.step(p, torch.arange(first, first + count, device=device)) for p in range(3)]
        drawn = torch.zeros(count, 3, dtype=torch.int64, device=device)
        decoder.sample(drawn, 0, 3, Sampler(seed=7, first=first))
        return torch.cat([torch.stack(logits, 1).flatten(1).double(), drawn], 1)

    assert torch.equal(pictures(0, 5), torch.cat([pictures(0, 1), pictures(1, 2), pictures(3, 2)]))


def recorded_step(preset, batch, arch):
    """The launches of one token, the kernels' and the vendor's in one list: (name, options)."""
    found = []

    class Vendor(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::mm", "aten::addmm"):
                found.append(("vendor", {}))
            return func(*args, **(kwargs or {}))

    def record(kernel, grid, options):
        found.append((kernel.__name__, options))

    with torch.no_grad(), device_file.target(arch), recording(record):
        model = ImageGPT.from_preset(preset, impl="triton", device="meta", dtype=torch.bfloat16)
        decoder = KernelDecoder(model, batch)
        with Vendor():
            decoder.draw(Sampler())
    return found


def test_launches_a_token_of_s():
    few = [name for name, _ in recorded_step("s", 1, "sm_90")]
    layer = ["linear_kernel", "attention_kernel", *3 * ["linear_kernel"]]
    assert few == ["embed_kernel", *24 * layer, "linear_kernel", "sample_kernel"] and len(few) == 24 * 5 + 3
    many = [name for name, _ in recorded_step("s", 9, "sm_90")]
    layer = ["norm_forward_kernel", "vendor", "attention_kernel", "vendor", "norm_forward_kernel", "vendor"]
    layer += ["gelu_kernel", "vendor"]
    assert many == ["embed_kernel", *24 * layer, "norm_forward_kernel", "vendor", "sample_kernel"]


def test_chained_kernels_follow_a_plain_one(monkeypatch):
    """On sm_90 every kernel but a step's first may start early; elsewhere, and in the interpreter, none."""
    assert not any("launch_pdl" in options for _, options in recorded_step("tiny", 2, "sm_90"))
    monkeypatch.setattr(decode_chain, "INTERPRETED", False)
    for arch in device_file.ARCHS:
        (name, first), *rest = recorded_step("tiny", 2, arch)
        chained = arch in ("sm_90", "sm_100")
        assert name == "embed_kernel" and "launch_pdl" not in first and len(rest) == 22
        assert all(options.get("launch_pdl", False) == options["IS_CHAINED"] == chained for _, options in rest)


def test_weights_are_on_their_way_before_the_wait():
    """In sm_90's PTX and SASS: all of a program's weights, or its keys and values, in loads of 16 bytes ahead of the
    one wait, and no weight behind it; and as many sums and products for one picture as for each of several. Every
    thread comes to the wait and has stored nothing before; what it has loaded are weights, or came past L1."""
    script = r"""
import re
from bench.compiled import compile as c
from bench.compiled.cases import decode_step

def halves(text, wait, load):
    before, after = text.split(wait)
    return len(re.findall(load, before)), len(re.findall(load, after))

for preset in "sl":
    orders = {}
    for B in (1, 4):
        with c.capture("sm_90") as launches:
            decode_step(preset, B)
        assert len(launches) == 8, launches
        for place, launch in enumerate(launches[1:]):
            kernel = c.built(launch)
            early, _ = kernel.asm["ptx"].split("griddepcontrol.wait")
            assert not re.search(r"\bst\.|\batom\.|\bred\.|\bbra\b|\bret;", early), launch.name
            loads = re.findall(r"ld\.global\S*", early)
            assert all("evict_first" in load or ".cg." in load for load in loads), (launch.name, loads)
            if launch.name == "sample_kernel":
                continue
            _, sass = c.dumped(kernel.asm["cubin"])
            v, threads = launch.values, 32 * launch.options["num_warps"]
            if launch.name == "linear_kernel":
                want = v["BLOCK_N"] * v["K"] * 2 // 16 // threads
                found = halves(kernel.asm["ptx"], "griddepcontrol.wait", r"ld\.global\S*evict_first\S*\.v4\.b32")
                machine = halves(sass, "ACQBULK", r"LDG\.E\.EF\.128")
                order = [len(re.findall(op, sass)) for op in (r"\bFFMA", r"\bFADD", r"\bFMUL")]
                assert orders.setdefault(place, order) == order, (launch.name, preset, B, orders[place], order)
            else:
                want = 2 * v["BLOCK_N"] * v["D"] * 2 // 16 // threads
                found = (halves(kernel.asm["ptx"], "griddepcontrol.wait", r"ld\.global\S*\.v4\.b32")[0], 0)
                machine = (halves(sass, "ACQBULK", r"LDG\.E\.128")[0], 0)
            assert found == machine == (want, 0), (launch.name, launch.tile, preset, B, want, found, machine)
"""
    done = child("-c", script)
    assert done.returncode == 0, done.stderr


def test_opcheck(device):
    x, weight, bias = operands(3, 32, 16, torch.float32, device).values()
    qkv, k_cache, v_cache = cached(2, 2, 16, 32, torch.float32, device, written=5)
    tokens, gain = torch.zeros(3, 4, dtype=torch.int64, device=device), torch.ones(32, device=device)
    wpe = torch.randn(4, 32, device=device)
    pictures, seed = torch.arange(3, device=device), torch.tensor(1, device=device)
    opcheck = torch.library.opcheck
    opcheck(decode_linear_op, (x, None, None, weight, None, bias, None, "rms", 1e-5, True, torch.float32))
    step = qkv, k_cache.contiguous(), v_cache.contiguous(), at(5, device, 2), 0.2
    opcheck(decode_attention_op, (*step, 2))
    opcheck(decode_attention_parts_op, step)
    opcheck(decode_norm_op, (torch.randn(ROWS, 32, device=device), None, gain, 1e-5, False, torch.bfloat16))
    opcheck(decode_embed_op, (tokens, weight, wpe, gain, at(2, device, 3), torch.float32))
    opcheck(decode_sample_op, (x, tokens, at(2, device, 3), pictures, seed, 1.0, 5, 0.9))


def test_full_graph_compile_sees_the_cache_change(device):
    def run(qkv, k_cache, v_cache, position):
        out = decode_attention(2 * qkv, k_cache, v_cache, position)
        return out + k_cache[:, :, 5]

    inputs = cached(2, 2, 16, 32, torch.float32, device, written=5)
    copies = [t.clone() for t in inputs]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*copies, at(5, device, 2))
    assert torch.equal(compiled, run(*inputs, at(5, device, 2)))
    assert torch.equal(copies[1].nan_to_num(), inputs[1].nan_to_num())


@pytest.mark.parametrize("position", [-1, 4, 1 << 30])
def test_a_position_outside_writes_nothing(position, device):
    """It is known on the device alone: a store there would land in memory of someone else's."""
    p = at(position, device, 2)
    room = torch.arange(24, device=device)
    tokens = room[8:16].view(2, 4)  # with neighbours on either side
    decode_sample(torch.randn(2, 16, device=device), tokens, p, room[:2], torch.tensor(1, device=device))
    assert torch.equal(room, torch.arange(24, device=device)) and (p == position).all()
    x = torch.randn(16, 32, device=device)
    assert decode_embed(tokens % 16, x, x[:4], x[0], p).isnan().all()
    qkv, *caches = cached(2, 2, 4, 32, torch.float32, device)
    before = [cache.clone() for cache in caches]
    assert decode_attention(qkv, *caches, p).isnan().all() and in_parts(qkv, *caches, p).isnan().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(caches, before))


def test_bad_input_is_named(device):
    x, weight, _ = operands(3, 32, 16, torch.float32, device).values()
    qkv, k_cache, v_cache = cached(2, 2, 16, 32, torch.float32, device)
    tokens, p, p2 = torch.zeros(3, 4, dtype=torch.int64, device=device), at(0, device, 3), at(0, device, 2)
    pictures, seed = torch.arange(3, device=device), torch.tensor(1, device=device)
    wide, gain = torch.zeros(1, tiles.MAX_COLUMNS + 1, device=device), torch.ones(32, device=device)
    attempts = {
        "x:": lambda: decode_norm_linear(x.double(), weight),
        "weight:": lambda: decode_norm_linear(x, weight[:, :30]),
        "weight: got 32769 columns": lambda: decode_norm_linear(wide, wide),
        "bias:": lambda: decode_linear_residual(x, weight, x[:, :16], gain),
        "scale:": lambda: decode_norm_linear(x, weight.to(torch.int8)),
        "residual:": lambda: decode_linear_residual(x, weight, x),
        "a:": lambda: decode_linear_residual((x, x, x), weight, x[:, :16]),
        "add:": lambda: decode_norm(x, x, gain, dtype=torch.float32),
        "gain:": lambda: decode_norm(x, None, gain[:5], dtype=torch.float32),
        "x: got strides": lambda: decode_norm(x[:, ::2], None, gain[:16], dtype=torch.float32),
        "qkv:": lambda: decode_attention(qkv[:, :2], k_cache, v_cache, p2),
        "k_cache:": lambda: decode_attention(qkv, k_cache[:, :1], v_cache, p2),
        "v_cache:": lambda: decode_attention(qkv, k_cache, v_cache.transpose(2, 3), p2),
        "v_cache: got strides": lambda: decode_attention(qkv, k_cache, v_cache.mT.contiguous().mT, p2),
        "wpe:": lambda: decode_embed(tokens, gain[None], gain[None], gain, p),
        "position:": lambda: decode_attention(qkv, k_cache, v_cache, torch.zeros(2, device=device)),
        "tokens:": lambda: decode_sample(x, tokens[:2], p, pictures, seed),
        "pictures:": lambda: decode_sample(x, tokens, p, pictures.int(), seed),
        "seed:": lambda: decode_sample(x, tokens, p, pictures, seed.float()),
        "temperature:": lambda: decode_sample(x, tokens, p, pictures, seed, temperature=-1.0),
        "top_k:": lambda: decode_sample(x, tokens, p, pictures, seed, top_k=33),
        "top_p:": lambda: decode_sample(x, tokens, p, pictures, seed, top_p=0.0),
    }
    for name, attempt in attempts.items():
        with pytest.raises(ValueError, match=name):
            attempt()
