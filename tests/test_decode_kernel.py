"""The one-token kernels: products, attention over the cache, the draw; and a whole step against the full forward."""

import pytest
import torch
import torch.nn.functional as F

from bench.correctness.budget import against_fp64
from igpt.config import Config
from igpt.kernels import decode_attention as attention_file
from igpt.kernels import reference
from igpt.kernels.decode_attention import decode_attention, decode_attention_op
from igpt.kernels.decode_linear import decode_linear_op, decode_linear_residual, decode_norm_linear
from igpt.kernels.decode_sample import decode_embed, decode_embed_op, decode_sample, decode_sample_op
from igpt.model import ImageGPT
from igpt.sample.draw import Sampler

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def at(p, device):
    return torch.tensor(p, dtype=torch.int32, device=device)


def budget(ours, eager, inputs):
    errors = against_fp64(ours, eager, inputs, ())
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def operands(B, K, O, dtype, device, seed=0):
    gen = generator(seed)
    tensors = {
        "x": 3 * torch.randn(B, K, generator=gen), "gain": (1 + 0.3 * torch.randn(K, generator=gen)).to(dtype),
        "weight": (0.2 * torch.randn(O, K, generator=gen)).to(dtype), "bias": torch.randn(O, generator=gen).to(dtype),
    }  # fmt: skip
    return {name: t.to(device) for name, t in tensors.items()}


def eager_norm_linear(x, gain, weight, bias, centred=False):
    """The stream at least fp32, the product in the weights' dtype: as a careful decoder without our kernels."""
    return F.linear(reference.norm(x, gain.to(x.dtype), centred=centred).to(weight.dtype), weight, bias)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, O", [(1, 64, 48), (5, 300, 70), (16, 256, 64), (30, 96, 33), (70, 40, 64)])
def test_norm_linear_within_budget(B, K, O, dtype, centred, device, poison_empty):
    budget(
        lambda x, gain, weight, bias: decode_norm_linear(x, gain, weight, bias, centred=centred),
        lambda **k: eager_norm_linear(**k, centred=centred), operands(B, K, O, dtype, device),
    )  # fmt: skip


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["mean", "outliers", "beyond fp16"])
def test_norm_linear_hard_values(values, dtype, centred, device):
    inputs = operands(12, 128, 64, dtype, device)
    if values == "mean":
        inputs["x"] += 100
    elif values == "outliers":
        inputs["x"][:, ::31] *= 500
    else:  # x * gain leaves fp16's range, norm(x) doesn't
        inputs["x"] *= 3e4
        inputs["gain"] *= 4
    budget(
        lambda x, gain, weight, bias: decode_norm_linear(x, gain, weight, bias, centred=centred),
        lambda **k: eager_norm_linear(**k, centred=centred), inputs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_residual_within_budget(dtype, device, poison_empty):
    inputs = operands(7, 80, 48, dtype, device)
    budget(
        lambda x, gain, weight, bias: decode_norm_linear(x, gain, weight, bias, gelu=True),
        lambda **k: reference.quick_gelu(eager_norm_linear(**k)), inputs,
    )  # fmt: skip
    for stream in {torch.float32, dtype}:
        residual = torch.randn(7, 48, generator=generator(1)).to(stream).to(device)
        added = {"a": inputs["x"].to(dtype), "weight": inputs["weight"], "residual": residual, "bias": inputs["bias"]}
        budget(decode_linear_residual, reference.linear_residual, added)


def test_gain_may_be_folded_beforehand(device):
    inputs = operands(4, 64, 32, torch.float32, device)
    folded = decode_norm_linear(inputs["x"], None, inputs["weight"] * inputs["gain"], inputs["bias"])
    torch.testing.assert_close(folded, decode_norm_linear(*inputs.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("B", [1, 20])
def test_int8_weights_within_budget(B, device, poison_empty):
    """Against the same integers in fp64: the integers are exact in bf16, so only the operands' rounding is left."""
    inputs = operands(B, 200, 48, torch.bfloat16, device)
    scale = inputs["weight"].float().abs().amax(1) / 127
    quantised = (inputs["weight"].float() / scale[:, None]).round().to(torch.int8)
    inputs |= {"weight": quantised, "scale": scale}

    def eager(x, gain, weight, bias, scale):
        n = reference.norm(x, gain.to(x.dtype)).to(bias.dtype)
        return F.linear(n, weight.to(n.dtype)) * scale.to(n.dtype) + bias

    budget(lambda x, gain, weight, bias, scale: decode_norm_linear(x, gain, weight, bias, scale=scale), eager, inputs)


def cached(B, H, n_ctx, D, dtype, device, seed=0, written=None):
    """qkv and a cache inside a wider allocation; what isn't `written` yet is NaN."""
    gen = generator(seed)
    cache = torch.full((3, 2, B, H, n_ctx, D), float("nan"))
    cache[1, :, :, :, :written] = torch.randn(2, B, H, n_ctx if written is None else written, D, generator=gen)
    k_cache, v_cache = cache.to(dtype).to(device)[1]
    qkv = torch.randn(B, 3, H, D, generator=gen)
    return qkv.to(torch.bfloat16 if dtype.itemsize == 1 else dtype).to(device), k_cache, v_cache


# B, H, n_ctx, D, position. With up to 4 heads in all and 128 keys or more the interpreter splits the keys.
STEPS = [(2, 2, 256, 64, 100), (1, 2, 256, 96, 255), (1, 1, 192, 128, 191), (3, 3, 70, 48, 0), (2, 2, 300, 16, 33),
         (4, 4, 33, 80, 32), (1, 2, 128, 64, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("B, H, n_ctx, D, p", STEPS)
def test_attention_within_budget(B, H, n_ctx, D, p, dtype, device, poison_empty):
    qkv, k_cache, v_cache = cached(B, H, n_ctx, D, dtype, device, written=p)
    k_after, v_after = k_cache.clone(), v_cache.clone()
    for cache, new in ((k_after, qkv[:, 1]), (v_after, qkv[:, 2])):
        cache[:, :, p] = new.to(cache.dtype)
    out = decode_attention(qkv, k_cache, v_cache, at(p, device))
    for cache, after in ((k_cache, k_after), (v_cache, v_after)):
        assert torch.equal(cache.float().nan_to_num(1e9), after.float().nan_to_num(1e9))

    def eager(q, k, v):
        return reference.attention(q, k, v, causal=True, kv_len=p + 1)[:, 0]

    inputs = {"q": qkv[:, :1].flatten(0, 1)[:, None], "k": k_after.to(qkv.dtype).transpose(1, 2).nan_to_num(),
              "v": v_after.to(qkv.dtype).transpose(1, 2).nan_to_num()}  # fmt: skip
    budget(lambda q, k, v: out, eager, inputs)


def test_attention_with_keys_that_dominate(device):
    """Scores of several hundred, at the first key, the new key, and where shares of split keys meet."""
    p = 200
    for planted in (0, 31, 32, 64, 199, 200):
        qkv, k_cache, v_cache = cached(1, 2, 256, 64, torch.float32, device, written=p)
        target = qkv[:, 1] if planted == p else k_cache[:, :, planted]
        target.copy_(40 * qkv[:, 0])
        value = (qkv[:, 2] if planted == p else v_cache[:, :, planted]).clone()
        torch.testing.assert_close(decode_attention(qkv, k_cache, v_cache, at(p, device)), value)


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_splitting_changes_nothing_but_rounding(ways, device, monkeypatch):
    monkeypatch.setattr(attention_file, "splits", lambda *_: ways)
    qkv, k_cache, v_cache = cached(2, 2, 100, 32, torch.float32, device, written=77)
    expected = reference.attention(
        qkv[:, 0][:, None].double(), torch.cat([k_cache[:, :, :77], qkv[:, 1][:, :, None]], 2).transpose(1, 2).double(),
        torch.cat([v_cache[:, :, :77], qkv[:, 2][:, :, None]], 2).transpose(1, 2).double(), causal=True,
    )  # fmt: skip
    out = decode_attention(qkv, k_cache, v_cache, at(77, device))
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=0, atol=1e-6)


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
        assert torch.equal(decode_embed(tokens, wte, wpe, sos, at(p, device)), full[:, p])
    tokens[1, 3] = 20
    assert decode_embed(tokens, wte, wpe, sos, at(4, device)).isnan().any(1).tolist() == [False, True, False]


def draw(logits, n_ctx, sampler, device):
    B = len(logits)
    tokens = torch.full((B, n_ctx), -1, device=device)
    pictures = torch.arange(sampler.first, sampler.first + B, device=device)
    for p in range(n_ctx):
        options = sampler.temperature, sampler.top_k, sampler.top_p
        decode_sample(logits, tokens, at(p, device), pictures, torch.tensor(sampler.seed, device=device), *options)
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.6}, {"top_k": 1}, {"temperature": 1e-3},
     {"top_k": 10, "top_p": 0.8, "seed": 2**40}, {"top_k": 37, "top_p": 1.0}],
    ids=str,
)  # fmt: skip
def test_draws_are_those_of_the_specification(options, device):
    """Token for token what igpt/draw.py takes, which says what a draw is."""
    sampler = Sampler(**{"seed": 3, "first": 7} | options)
    logits = 2 * torch.randn(6, 37, generator=generator(1))
    expected = torch.stack([sampler(logits, noise) for noise in sampler.noise(6, 37, 0, 8, "cpu")], 1)
    assert torch.equal(draw(logits.to(device), 8, sampler, device).cpu(), expected)


def test_frequencies_match_the_probabilities(device):
    """Chi-square over 8 tokens and 300 draws, at 1 in 1000, with and without truncation."""
    logits = torch.linspace(-1, 1.5, 8)
    for options, kept in (({}, 8), ({"top_k": 4}, 4), ({"temperature": 0.7, "top_p": 0.9}, 5)):
        sampler = Sampler(**options, seed=5)
        drawn = draw(logits.expand(75, 8).contiguous().to(device), 4, sampler, device).cpu()
        p = (logits / sampler.temperature).softmax(0)
        p[: 8 - kept] = 0
        expected = 300 * (p / p.sum())[8 - kept :]
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


def step(model, x, caches, position):
    """One block after another by our kernels; fp32 residual stream."""
    c = model.config
    form = {"eps": c.norm_eps, "centred": c.centred}
    for block, (k_cache, v_cache) in zip(model.blocks, caches):
        a, m = block.attn, block.mlp
        qkv = decode_norm_linear(x, a.norm, a.qkv, **form).view(-1, 3, c.heads, c.head_dim)
        x = decode_linear_residual(decode_attention(qkv, k_cache, v_cache, position, a.scale).flatten(1), a.proj, x)
        x = decode_linear_residual(decode_norm_linear(x, m.norm, m.fc, gelu=True, **form), m.proj, x)
    return decode_norm_linear(x, model.norm_f, model.head, dtype=torch.float32, **form)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_greedy_steps_are_the_argmax_of_the_full_forward(D, norm, device):
    torch.manual_seed(0)
    model = ImageGPT(Config(n_layer=2, width=2 * D, heads=2, n_ctx=6, vocab=32, norm=norm)).to(device)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    caches = torch.full((2, 2, 3, 2, 6, D), float("nan"), device=device)
    tokens = torch.full((3, 6), -1, device=device)
    pictures, seed = torch.arange(3, device=device), torch.tensor(0, device=device)
    logits = []
    for p in range(6):
        x = decode_embed(tokens, model.wte, model.wpe, model.sos, at(p, device))
        logits.append(step(model, x, caches, at(p, device)))
        decode_sample(logits[-1], tokens, at(p, device), pictures, seed, temperature=0)
    full = model(tokens)
    assert torch.equal(tokens, full.argmax(-1))
    torch.testing.assert_close(torch.stack(logits, 1), full, rtol=1e-4, atol=1e-4)


def test_opcheck(device):
    x, gain, weight, bias = operands(3, 32, 16, torch.float32, device).values()
    qkv, k_cache, v_cache = cached(2, 2, 16, 32, torch.float32, device, written=5)
    tokens = torch.zeros(3, 4, dtype=torch.int64, device=device)
    wpe = torch.randn(4, 32, device=device)
    pictures, seed = torch.arange(3, device=device), torch.tensor(1, device=device)
    opcheck = torch.library.opcheck
    opcheck(decode_linear_op, (x, weight, None, bias, None, "rms", gain, 1e-5, True, torch.float32))
    opcheck(decode_attention_op, (qkv, k_cache.contiguous(), v_cache.contiguous(), at(5, device), 0.2))
    opcheck(decode_embed_op, (tokens, weight, wpe, gain, at(2, device), torch.float32))
    opcheck(decode_sample_op, (x, tokens, at(2, device), pictures, seed, 1.0, 5, 0.9))


def test_full_graph_compile_sees_the_cache_change(device):
    def run(qkv, k_cache, v_cache, position):
        out = decode_attention(2 * qkv, k_cache, v_cache, position)
        return out + k_cache[:, :, 5]

    inputs = cached(2, 2, 16, 32, torch.float32, device, written=5)
    copies = [t.clone() for t in inputs]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*copies, at(5, device))
    assert torch.equal(compiled, run(*inputs, at(5, device)))
    assert torch.equal(copies[1].nan_to_num(), inputs[1].nan_to_num())


@pytest.mark.parametrize("position", [-1, 4, 1 << 30])
def test_a_position_outside_writes_nothing(position, device):
    """It is known on the device alone: a store there would land in memory of someone else's."""
    p = at(position, device)
    room = torch.arange(24, device=device)
    tokens = room[8:16].view(2, 4)  # with neighbours on either side
    decode_sample(torch.randn(2, 16, device=device), tokens, p, room[:2], torch.tensor(1, device=device))
    assert torch.equal(room, torch.arange(24, device=device))
    x = torch.randn(16, 32, device=device)
    assert decode_embed(tokens % 16, x, x[:4], x[0], p).isnan().all()
    qkv, *caches = cached(2, 2, 4, 32, torch.float32, device)
    before = [cache.clone() for cache in caches]
    assert decode_attention(qkv, *caches, p).isnan().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(caches, before))


def test_bad_input_is_named(device):
    x, gain, weight, _ = operands(3, 32, 16, torch.float32, device).values()
    qkv, k_cache, v_cache = cached(2, 2, 16, 32, torch.float32, device)
    tokens, p = torch.zeros(3, 4, dtype=torch.int64, device=device), at(0, device)
    pictures, seed = torch.arange(3, device=device), torch.tensor(1, device=device)
    attempts = {
        "x:": lambda: decode_norm_linear(x.double(), gain, weight),
        "weight:": lambda: decode_norm_linear(x, gain, weight[:, :30]),
        "norm_weight:": lambda: decode_norm_linear(x, gain[:5], weight),
        "bias:": lambda: decode_linear_residual(x, weight, x[:, :16], gain),
        "scale:": lambda: decode_norm_linear(x, gain, weight.to(torch.int8)),
        "residual:": lambda: decode_linear_residual(x, weight, x),
        "qkv:": lambda: decode_attention(qkv[:, :2], k_cache, v_cache, p),
        "k_cache:": lambda: decode_attention(qkv, k_cache[:, :1], v_cache, p),
        "v_cache:": lambda: decode_attention(qkv, k_cache, v_cache.transpose(2, 3), p),
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
