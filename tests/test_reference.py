"""The specification itself: gradients by finite differences in fp64, and values computed by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from igpt.kernels import reference as R


def normal(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()


TOKENS = torch.tensor([[1, 4, 4, 0], [2, 2, 3, 1]])
MASKED = torch.tensor([[False, True, False, False], [True, False, False, True]])
CENTRED = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, m, kv_len", [(4, 4, None), (1, 5, 3), (2, 5, 4)])
def test_attention_gradients(causal, n, m, kv_len):
    q, k, v = normal(2, n, 2, 3), normal(2, m, 2, 3, seed=1), normal(2, m, 2, 3, seed=2)
    assert gradcheck(lambda q, k, v: R.attention(q, k, v, causal, kv_len=kv_len), (q, k, v))


@CENTRED
def test_norm_and_product_gradients(centred):
    x, g, w, b = normal(3, 4), normal(4), normal(5, 4), normal(5)
    assert gradcheck(lambda x, g: R.norm(x, g, centred=centred), (x, g))
    assert gradcheck(lambda x, g, w, b: R.norm_linear(x, g, w, b, centred=centred), (x, g, w, b))


def test_activation_and_residual_gradients():
    assert gradcheck(R.quick_gelu, (normal(7),))
    assert gradcheck(R.linear_residual, (normal(3, 4), normal(5, 4), normal(3, 5), normal(5)))


@CENTRED
def test_norm_mlp_gradients(centred):
    args = normal(3, 4), normal(4), normal(6, 4), normal(4, 6), normal(6), normal(4, seed=1)
    assert gradcheck(lambda *a: R.norm_mlp(*a, centred=centred), args)


@pytest.mark.parametrize("masked", [None, MASKED], ids=["unmasked", "masked"])
def test_embed_gradients(masked):
    wte, wpe, sos = normal(5, 3), normal(4, 3), normal(3)
    assert gradcheck(lambda wte, wpe: R.embed(TOKENS, wte, wpe, None, masked), (wte, wpe))
    assert gradcheck(lambda wte, wpe, sos: R.embed(TOKENS, wte, wpe, sos, masked), (wte, wpe, sos))


@CENTRED
def test_head_loss_gradients(centred):
    args = normal(2, 4, 3), normal(3), normal(5, 3)
    assert gradcheck(lambda x, g, w: R.head_loss(x, g, w, TOKENS, centred=centred), args)


def test_attention_by_hand():
    # Scores 0 and ln 3 weigh two values as 1 : 3; the first query sees only itself.
    q = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    k = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(R.attention(q, k, v, causal=True).flatten(), torch.tensor([4.0, 7.0]))
    torch.testing.assert_close(R.attention(q, k, v, causal=False).flatten(), torch.tensor([6.0, 7.0]))


def test_attention_default_scale_and_bounds_by_hand():
    q = torch.full((1, 1, 1, 4), math.log(3.0) / 2)  # q . k1 = 2 ln 3, over sqrt(4): ln 3
    k = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), 99.0)]).view(1, 3, 1, 4)
    v = torch.tensor([4.0, 8.0, 1e30]).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    out = R.attention(q, k, v, causal=True, kv_len=2)  # a cache of three that holds two
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 7.0))


def test_norm_by_hand():
    x, weight = torch.tensor([3.0, -4.0]), torch.tensor([1.0, 2.0])
    rms = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(R.norm(x, weight, eps=0.0), torch.tensor([3 / rms, -8 / rms]))
    torch.testing.assert_close(R.norm(x, weight, eps=0.0, centred=True), torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(R.norm(torch.zeros(2), weight), torch.zeros(2))


def test_quick_gelu_by_hand():
    # sigmoid(1.702 x) at x = ln 3 / 1.702 is 3 / 4.
    x = math.log(3.0) / 1.702
    torch.testing.assert_close(R.quick_gelu(torch.tensor([0.0, x, -x])), torch.tensor([0.0, 0.75 * x, -0.25 * x]))


def test_norm_mlp_by_hand():
    x = torch.tensor([3.0, 4.0])
    n = x / math.sqrt(12.5)
    hidden = R.quick_gelu(n[0] + n[1] + 1)
    out = R.norm_mlp(x, torch.ones(2), torch.ones(1, 2), torch.tensor([[2.0], [5.0]]), torch.ones(1), eps=0.0)
    torch.testing.assert_close(out, torch.stack([3 + 2 * hidden, 4 + 5 * hidden]))


def test_embed_by_hand():
    wte, wpe = torch.arange(5.0)[:, None] * 10, torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    h = R.embed(TOKENS, wte, wpe)[..., 0]
    assert h.tolist() == [[11, 42, 43, 4], [21, 22, 33, 14]]
    h = R.embed(TOKENS, wte, wpe, torch.tensor([700.0]))[..., 0]
    assert h.tolist() == [[701, 12, 43, 44], [701, 22, 23, 34]]
    h = R.embed(TOKENS, wte, wpe, None, MASKED)[..., 0]
    assert h.tolist() == [[11, 2, 43, 4], [1, 22, 33, 4]]


def test_head_loss_by_hand():
    # A zero head is OpenAI's initial state: every loss is ln V.
    x = torch.randn(2, 4, 3)
    loss = R.head_loss(x, torch.ones(3), torch.zeros(512, 3), TOKENS)
    torch.testing.assert_close(loss, torch.full((2, 4), math.log(512)))
    # Two logits, 0 and ln 3: probabilities 1/4 and 3/4.
    head = torch.tensor([[0.0], [math.log(3.0)]])
    loss = R.head_loss(torch.tensor([[5.0], [5.0]]), torch.ones(1), head, torch.tensor([0, 1]), eps=0.0)
    torch.testing.assert_close(loss, torch.tensor([math.log(4.0), math.log(4 / 3)]))


def test_half_precision_keeps_its_statistics_in_fp32():
    x = torch.full((8,), 300.0, dtype=torch.float16)  # the square of 300 overflows fp16
    torch.testing.assert_close(R.norm(x, torch.ones(8, dtype=torch.float16)), torch.ones(8, dtype=torch.float16))
    loss = R.head_loss(x.bfloat16(), torch.ones(8).bfloat16(), torch.zeros(16, 8).bfloat16(), torch.tensor(3))
    assert loss.dtype == torch.float32


def test_palette_by_hand():
    palette = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1], [1, 1, 1]])
    pixels = torch.tensor([[0, 0, 0], [255, 255, 255], [200, 30, 40], [128, 128, 128]], dtype=torch.uint8)
    assert R.palette_encode(pixels, palette).tolist() == [0, 1, 2, 1]  # never 3, its equal with a higher index
    middle = torch.tensor([[0.0, 0.0, 0.0]])  # as far from all four
    assert R.palette_encode(middle, palette).tolist() == [0]
    colours = R.palette_decode(torch.tensor([0, 2]), torch.tensor([[-1.0, 0.0, 1.0], [9, 9, 9], [-1.1, 0.5, 1.1]]))
    assert colours.tolist() == [[0, 128, 255], [0, 191, 255]]  # 127.5 is rounded to even: 128


def test_pack_heads_is_a_view():
    x = torch.arange(2 * 3 * 24.0).view(2, 3, 24)
    packed = R.pack_heads(x, heads=2)
    assert packed.shape == (2, 3, 3, 2, 4) and packed.data_ptr() == x.data_ptr()
    assert packed[1, 2, 1, 1].tolist() == x[1, 2, 12:16].tolist()  # k of the second head
