"""The dispatch: its checks, its torch path against the reference, and that "triton" never falls back."""

import os
import subprocess
import sys
import types
from functools import partial

import pytest
import torch

from bench.correctness.budget import against_fp64, compare
from igpt import ops
from igpt.kernels import checks, choose, reference
from igpt.kernels.device import check_device
from igpt.ops import cpu_attention


def rand(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).to(dtype)


def block_inputs(rows, d, inner, dtype, bias):
    inputs = {
        "x": rand(2, rows, d, dtype=dtype), "norm_weight": 1 + rand(d, dtype=dtype, scale=0.1),
        "w_fc": rand(inner, d, dtype=dtype, scale=d**-0.5), "w_proj": rand(d, inner, dtype=dtype, scale=inner**-0.5),
    }  # fmt: skip
    if bias:
        inputs |= {"b_fc": rand(inner, dtype=dtype, seed=1), "b_proj": rand(d, dtype=dtype, seed=2)}
    return inputs


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("rows, d, inner", [(64, 64, 256), (33, 40, 100)])
def test_norm_mlp_and_norm_linear_on_the_torch_path(rows, d, inner, dtype, bias, centred, processor, monkeypatch):
    monkeypatch.setattr(choose, "processor", lambda: processor)  # whose fp32 products are oneDNN's, or MKL's
    monkeypatch.setattr(choose, "MKL_ROWS", 1)
    inputs = block_inputs(rows, d, inner, dtype, bias)
    settings = {"centred": centred}
    for activation in reference.ACTIVATIONS:
        both = {**settings, "activation": activation}
        functions = partial(ops.norm_mlp, **both, impl="torch"), partial(reference.norm_mlp, **both)
        found = against_fp64(*functions, inputs, tuple(inputs))
        with torch.no_grad():  # where the activation is in a product's epilogue
            found += against_fp64(*functions, inputs, ())
        for errors in found:
            assert errors.ok, (activation, errors)
    inputs = {"x": inputs["x"], "norm_weight": inputs["norm_weight"], "weight": inputs["w_fc"]} | (
        {"bias": inputs["b_fc"]} if bias else {}
    )
    for errors in against_fp64(
        lambda **k: ops.norm_linear(**k, **settings, impl="torch"),
        lambda **k: reference.norm_linear(**k, **settings), inputs, tuple(inputs),
    ):  # fmt: skip
        assert errors.ok, errors


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recomputing_the_mlp_changes_no_bit_and_keeps_less(dtype, impl):
    """bf16 on the torch path is igpt/ops/cpu.py's, fp16 is plain PyTorch's."""
    inputs = {name: t.requires_grad_() for name, t in block_inputs(33, 48, 192, dtype, True).items()}

    def run(recompute):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            y = ops.norm_mlp(**inputs, recompute=recompute, impl=impl)
        gradients = torch.autograd.grad(y.float().square().sum(), list(inputs.values()))
        return [y, *gradients], saved.count(2 * 33 * 192)

    (kept, wide), (again, fewer) = run(False), run(True)
    assert fewer < wide and all(map(torch.equal, kept, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_linear_on_the_torch_path(dtype):
    inputs = {"x": rand(3, 7, 50, dtype=dtype), "weight": rand(50, dtype=dtype)}
    for errors in against_fp64(lambda **k: ops.norm(**k, impl="torch"), reference.norm, inputs, tuple(inputs)):
        assert errors.ok, errors
    inputs = {"x": rand(7, 50, dtype=dtype), "weight": rand(20, 50, dtype=dtype), "bias": rand(20, dtype=dtype)}
    for errors in against_fp64(ops.linear, lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias),
                               inputs, tuple(inputs)):  # fmt: skip
        assert errors.ok, errors


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_that_its_next_norm_sums_up(dtype, impl, device):
    """Two blocks' worth: what one operation adds, the next one's norm reads; every gradient, and that of the sum."""
    inputs = {k: v.to(device) for k, v in block_inputs(9, 48, 48, dtype, True).items()}

    def ours(x, norm_weight, w_fc, w_proj, b_fc, b_proj):
        add = None
        for _ in range(2):
            y, x = ops.norm_linear(x, norm_weight, w_fc, b_fc, add=add, through=True, impl=impl)
            add, x = ops.norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, add=y, through=True, impl=impl)
        return x if add is None else x + add

    def eager(x, norm_weight, w_fc, w_proj, b_fc, b_proj):
        for _ in range(2):
            x = x + reference.norm_linear(x, norm_weight, w_fc, b_fc)
            x = reference.norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj)
        return x

    for errors in against_fp64(ours, eager, inputs, tuple(inputs)):
        assert errors.ok, errors


def strided_calls(impl, device="cpu"):
    """Operations by the vector or the ids that they read, for any strides of it."""
    shapes = (6, 32), (16, 32), (8, 32), (64, 32), (32, 64), (32,)
    x, weight, table, w_fc, w_proj, vector = (rand(*shape).to(device) for shape in shapes)
    ids = torch.arange(6, device=device) % 5
    return {
        "norm": (vector, lambda gain: ops.norm(x, gain, impl=impl)),
        "norm_linear": (vector, lambda gain: ops.norm_linear(x, gain, weight, impl=impl)),
        "norm_mlp": (vector, lambda gain: ops.norm_mlp(x, gain, w_fc, w_proj, impl=impl)),
        "head_loss gain": (vector, lambda gain: ops.head_loss(x, gain, weight, ids, impl=impl)),
        "head_loss targets": (ids, lambda targets: ops.head_loss(x, table[0], weight, targets, impl=impl)),
        "embed": (vector, lambda sos: ops.embed(ids[None], weight, table, sos, impl=impl)),
    }


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", strided_calls("torch"))
def test_vectors_and_ids_of_any_stride(name, impl, device):
    """The kernels read every other number's neighbour too: of `gain[::2]`, of `tokens[:, 3]` as targets."""
    value, call = strided_calls(impl, device)[name]
    results = []
    for t in (value, torch.stack([value, -value - 1], 1)[:, 0]):
        t = t.detach().requires_grad_(t.is_floating_point())
        y = call(t)
        results.append([y, *(torch.autograd.grad(y.square().sum(), t) if t.requires_grad else ())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # igpt/ops/cpu.py's, and plain PyTorch's
def test_one_row_without_a_batch(dtype):
    x, gain, weight, proj = rand(32, dtype=dtype), rand(32), rand(16, 32), rand(32, 16)
    target = torch.tensor(3)
    for call in (
        lambda x, _: ops.norm(x, gain),
        lambda x, _: ops.norm_linear(x, gain, weight),
        lambda x, _: ops.norm_mlp(x, gain, weight, proj),
        lambda x, _: ops.linear(x, weight),
        lambda x, target: ops.head_loss(x, gain, weight, target),
    ):
        assert torch.equal(call(x, target), call(x[None], target[None])[0])


def test_the_kernels_train_under_autocast(device):
    """In the activations' dtype, as without it: a product in another one is what backward could not multiply by."""
    inputs = {k: t.to(device).requires_grad_() for k, t in block_inputs(5, 32, 64, torch.float32, True).items()}
    x, gain, w_fc, _, b_fc, _ = inputs.values()

    def gradients(enabled):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            y = ops.norm_mlp(**inputs, impl="triton")
            z = ops.norm_linear(x, gain, w_fc, b_fc, impl="triton")
        return torch.autograd.grad(y.square().sum() + z.square().sum(), list(inputs.values()))

    assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_the_torch_path(dtype, causal):
    inputs = {"qkv": rand(2, 37, 3, 2, 16, dtype=dtype)}
    for errors in against_fp64(
        lambda qkv: ops.attention(qkv, causal=causal, impl="torch"),
        lambda qkv: reference.attention(*qkv.unbind(2), causal), inputs, ("qkv",),
    ):  # fmt: skip
        assert errors.ok, errors


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("position", [0, 17, 39])
def test_decode_attention(impl, position, device):
    """A step with a cache is the last row of attention over all positions so far, and leaves its key and value."""
    qkv = rand(2, position + 1, 3, 2, 16).to(device)
    k_cache, v_cache = torch.full((2, 2, 2, 40, 16), torch.nan, device=device)
    for cache, part in ((k_cache, qkv[:, :-1, 1]), (v_cache, qkv[:, :-1, 2])):
        cache[:, :, :position] = part.transpose(1, 2)
    at = torch.tensor([position], dtype=torch.int32, device=device)
    out = ops.decode_attention(qkv[:, -1], k_cache, v_cache, at, impl=impl)
    want = reference.attention(*qkv.double().unbind(2), True)[:, -1]
    eager = reference.attention(*qkv.unbind(2), True)[:, -1]
    assert (errors := compare("out", out, eager, want)).ok, errors
    assert torch.equal(k_cache[:, :, : position + 1], qkv[:, :, 1].transpose(1, 2))
    assert torch.equal(v_cache[:, :, : position + 1], qkv[:, :, 2].transpose(1, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, h, d", [(600, 2, 64), (513, 1, 96), (256, 3, 8), (1, 1, 16)])
def test_attention_by_blocks_on_a_cpu(n, h, d, dtype, causal, packed):
    qkv = rand(2, n, 3, h, d, dtype=dtype)
    inputs = {"qkv": qkv} if packed else dict(zip("qkv", qkv.unbind(2)))
    for errors in against_fp64(
        lambda **k: cpu_attention.Attention.apply(causal, d**-0.5, *k.values()),
        lambda **k: reference.attention(*(k["qkv"].unbind(2) if packed else k.values()), causal), inputs, tuple(inputs),
    ):  # fmt: skip
        assert errors.ok, errors


def test_attention_by_blocks_sums_in_fp32_whatever_the_default_dtype():
    qkv = rand(1, 600, 3, 1, 16).requires_grad_()

    def gradient():
        return torch.autograd.grad(cpu_attention.Attention.apply(True, 0.25, qkv).square().sum(), qkv)[0]

    want = gradient()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(gradient(), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_attention_by_blocks_is_causal_to_the_bit_and_takes_hard_scores():
    qkv = rand(1, 600, 3, 1, 64, scale=6.0)
    changed = qkv.clone()
    changed[:, 300:] *= -3
    first, second = (cpu_attention.Attention.apply(True, 0.125, t) for t in (qkv, changed))
    assert torch.equal(first[:, :300], second[:, :300]) and not torch.equal(first[:, 300:], second[:, 300:])
    for errors in against_fp64(
        lambda q: cpu_attention.Attention.apply(True, 0.125, q),
        lambda q: reference.attention(*q.unbind(2), True), {"q": qkv}, ("q",),
    ):  # fmt: skip
        assert errors.ok, errors


@pytest.mark.parametrize("processor, wins", [("AuthenticAMD", True), ("GenuineIntel", False), ("another", False)])
def test_attention_by_blocks_is_what_long_rows_on_few_threads_get(processor, wins, monkeypatch):
    monkeypatch.setattr(choose, "processor", lambda: processor)
    long, short = torch.zeros(1, 1024, 3, 1, 16), torch.zeros(1, 256, 3, 1, 16)
    assert choose.blocks(long) == (wins and choose.onednn(long) and torch.get_num_threads() <= choose.MAX_THREADS)
    assert not choose.blocks(short) and not choose.blocks(long.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_loss_on_the_torch_path(dtype):
    targets = torch.randint(0, 30, (2, 9))
    x, gain, head = rand(2, 9, 24, dtype=dtype), rand(24, dtype=dtype), rand(30, 24, dtype=dtype)
    inputs = {"x": x, "norm_weight": gain, "head_weight": head}
    for errors in against_fp64(
        lambda **k: ops.head_loss(**k, targets=targets, impl="torch"),
        lambda **k: reference.head_loss(**k, targets=targets), inputs, tuple(inputs),
    ):  # fmt: skip
        assert errors.ok, errors


def test_fp32_parameters_get_fp32_gradients_under_bf16_activations():
    inputs = block_inputs(8, 16, 64, torch.float32, bias=True)
    params = {k: v.requires_grad_() for k, v in inputs.items() if k != "x"}
    y = ops.norm_mlp(inputs["x"].bfloat16(), **params)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in params.values())


def test_large_values_in_fp16_do_not_overflow_the_norm():
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    assert torch.allclose(ops.norm(x, torch.ones(64)), torch.ones_like(x))


def test_full_graph_compile_leaves_the_cpu_functions_out():
    inputs = block_inputs(8, 16, 64, torch.float32, bias=False)
    compiled = torch.compile(ops.norm_mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), ops.norm_mlp(**inputs))


def test_cpu_functions_are_used_where_onednn_is():
    assert choose.onednn(torch.zeros(2, 2)) == torch.backends.mkldnn.is_available()
    assert not choose.onednn(torch.zeros(2, 2, dtype=torch.float64))


def test_palette_on_the_torch_path_holds_few_distances(monkeypatch):
    """Whatever the number of pixels: a part of them at once, and the same answer."""
    colours, palette = torch.randint(0, 256, (1000, 3), dtype=torch.uint8), torch.rand(7, 3) * 2 - 1
    weight = torch.randint(1, 9, (1000,))
    want, sums = reference.palette_encode(colours, palette), reference.palette_sums(colours, weight, palette)[1]
    monkeypatch.setattr(ops, "DISTANCES", 7 * 64)
    sizes, real = [], reference.palette_encode
    monkeypatch.setattr(reference, "palette_encode", lambda x, p: sizes.append(len(x)) or real(x, p))
    assert torch.equal(ops.palette_encode(colours.view(10, 100, 3), palette), want.view(10, 100))
    got = ops.palette_sums(colours, weight, palette)
    assert torch.equal(got[0], want) and torch.equal(got[1], sums) and max(sizes) == 64
    assert ops.palette_encode(torch.zeros(0, 4, 3), palette).shape == (0, 4)


@pytest.fixture
def two_threads():
    """As many as share out loops over more than some ten thousand elements."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_has_the_same_bits_every_time(dtype, two_threads):
    """At sizes that threads share: 16 pictures of 1024 tokens of few colours, as the tiny preset's step has them."""
    B, N, d, V = 16, 1024, 32, 64
    tokens = torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = 7  # as backgrounds are
    block = block_inputs(B * N // 2, d, 64, dtype, bias=True)
    x, gain = block["x"], block["norm_weight"]
    tables = {"wte": rand(V, d), "wpe": rand(N, d), "sos": rand(d)}
    linear = {"x": x, "weight": rand(48, d, dtype=dtype), "bias": rand(48, dtype=dtype)}
    cases = {
        "embed": (lambda **k: ops.embed(tokens, **k, dtype=dtype), tables),
        "embed bert": (lambda **k: ops.embed(tokens, **k, masked=tokens == 3), {k: tables[k] for k in ("wte", "wpe")}),
        "norm": (ops.norm, {"x": x, "weight": gain}), "linear": (ops.linear, linear),
        "norm_linear": (ops.norm_linear, linear | {"norm_weight": gain}), "norm_mlp": (ops.norm_mlp, block),
        "attention": (partial(ops.attention, causal=True), {"q": rand(2, N, 3, 2, 16, dtype=dtype)}),
        "head_loss": (
            partial(ops.head_loss, targets=tokens.view(2, -1)),
            {"x": x, "norm_weight": gain, "head_weight": rand(V, d, dtype=dtype)},
        ),
    }  # fmt: skip
    for name, (operation, inputs) in cases.items():
        leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
        y = operation(**leaves)
        dy = rand(*y.shape, dtype=y.dtype)
        first = torch.autograd.grad(y, list(leaves.values()), dy)
        for _ in range(6):
            again = operation(**leaves)
            assert torch.equal(again, y), name
            gradients = torch.autograd.grad(again, list(leaves.values()), dy)
            assert all(map(torch.equal, gradients, first)), (name, *leaves)


def test_a_colour_s_gradient_is_summed_in_fp32():
    """Of 4096 equal addends a sum in bf16 stands still at the 256th."""
    wte = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    h = ops.embed(torch.zeros(4, 1024, dtype=torch.long), wte, torch.zeros(1024, 4, dtype=torch.bfloat16))
    assert torch.autograd.grad(h.sum(), wte)[0].tolist() == [[4096.0] * 4, [0.0] * 4]


def test_ids_that_nobody_could_read_are_nan_or_black(monkeypatch):
    """As on a GPU, where reading would cost a synchronisation: no index leaves its table, and the rest is untouched."""
    ids = torch.tensor([[0, 2**32, 3, -1, 9, 2**40 + 5, 1]])
    inside = torch.tensor([[True, False, True, False, False, False, True]])
    wte, wpe, palette = rand(9, 8), rand(7, 8), rand(9, 3).clamp(-1, 1)
    x, gain, head = rand(1, 7, 8), rand(8), rand(9, 8)
    kept = ids.where(inside, 0)
    want = ops.embed(kept, wte, wpe), ops.head_loss(x, gain, head, kept), ops.palette_decode(kept, palette)
    monkeypatch.setattr(checks, "is_readable", lambda t: False)
    h, nll, colours = ops.embed(ids, wte, wpe), ops.head_loss(x, gain, head, ids), ops.palette_decode(ids, palette)
    assert torch.equal(h[inside], want[0][inside]) and h[~inside].isnan().all()
    assert torch.equal(nll[inside], want[1][inside]) and nll[~inside].isnan().all()
    assert torch.equal(colours[inside], want[2][inside]) and not colours[~inside].any()
    shifted = ops.embed(ids, wte, wpe, rand(8))
    assert torch.equal(shifted.isnan().all(-1)[:, 1:], ~inside[:, :-1])


def test_triton_never_falls_back():
    """Without a GPU or the interpreter impl="triton" raises; "auto" runs."""
    code = (
        "import torch; from igpt import ops; x = torch.zeros(4, 16); ops.norm(x, torch.ones(16)); "
        "ops.norm(x, torch.ones(16), impl='triton')"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 1
    assert "ValueError: impl='triton'" in run.stderr and "TRITON_INTERPRET" in run.stderr


X, G = torch.zeros(2, 8), torch.ones(8)
QKV = torch.zeros(1, 4, 3, 2, 16)
TOKENS = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.norm(X, torch.ones(7)), r"norm_weight: got .*\(7,\), expected .*\(8,\)"),
        (lambda: ops.norm(X.long(), G), "x: got torch.int64"),
        (lambda: ops.norm(X, G, impl="fast"), "impl: got 'fast'"),
        (lambda: ops.norm(X.double(), G, impl="triton"), "float64"),
        (lambda: ops.norm_linear(X, G, torch.ones(3, 7)), "weight: got"),
        (lambda: ops.norm_linear(X, G, torch.ones(3, 8), torch.ones(4)), "bias: got"),
        (lambda: ops.norm_mlp(X, G, torch.ones(32, 8), torch.ones(8, 31)), "w_proj: got"),
        (lambda: ops.norm_mlp(X, G, torch.ones(32, 8), torch.ones(8, 32), add=X[:1]), "add: got"),
        (lambda: ops.attention(QKV[0], causal=True), "qkv: got"),
        (lambda: ops.attention(QKV[:, :, 0], QKV[:, :, 1], causal=True), "k, v: got one"),
        (lambda: ops.attention(QKV[:, :, 0], QKV[:, :2, 1], QKV[:, :, 2], causal=True), "k: got"),
        (lambda: ops.attention(QKV[:, :, 0], QKV[:, :, 1].half(), QKV[:, :, 2], causal=True), "k: got torch.float16"),
        (lambda: ops.attention(QKV.long(), causal=True), "qkv: got torch.int64"),
        (lambda: ops.decode_attention(X, X, X, TOKENS), "qkv: got torch.float32"),
        (lambda: ops.decode_attention(QKV[:, 0], QKV, X, TOKENS), "k_cache: got"),
        (lambda: ops.decode_attention(QKV[:, 0], *torch.zeros(2, 1, 2, 9, 16), torch.tensor(9)), "position: got 9"),
        (lambda: ops.embed(TOKENS + 9, torch.zeros(9, 8), torch.zeros(4, 8)), r"values in \[9, 9\]"),
        (lambda: ops.embed(TOKENS, torch.zeros(9, 8), torch.zeros(3, 8)), "1 <= N <= 3"),
        (lambda: ops.embed(TOKENS, torch.zeros(9, 8), torch.zeros(4, 8), masked=TOKENS), "masked: got torch.int64"),
        (lambda: ops.head_loss(X, G, torch.zeros(5, 8), torch.tensor([1, 5])), "targets: got values"),
        (lambda: ops.palette_encode(torch.zeros(2, 4), torch.zeros(5, 3)), "pixels: got"),
        (lambda: ops.palette_encode(torch.zeros(2, 3), torch.zeros(5, 4)), "palette: got"),
        (lambda: ops.palette_decode(torch.tensor([5]), torch.zeros(5, 3)), "tokens: got values"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_tensors_on_another_gpu_than_the_current_one_are_refused(monkeypatch):
    """Triton launches on the current device, whatever its operands' one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    first, second = (types.SimpleNamespace(device=torch.device("cuda", i)) for i in range(2))
    check_device("norm", first)
    with pytest.raises(ValueError, match="norm: got tensors on cuda:1, expected the current device, cuda:0"):
        check_device("norm", second)
