"""Pixels to tokens and back by the kernels: equal, bit for bit, to numpy's fp32 and to the reference."""

import numpy as np
import pytest
import torch

from igpt.kernels import palette as kernel
from igpt.kernels import reference
from igpt.kernels.palette import palette_decode, palette_encode, palette_sums


def colours(V, device, seed=0):
    return (torch.rand(V, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(device)


def numpy_encode(pixels, palette):
    """Independent of the reference: float32 by numpy alone."""
    x = pixels.numpy()
    x = x.astype(np.float32) / np.float32(127.5) - np.float32(1) if x.dtype == np.uint8 else x.astype(np.float32)
    d = x[..., None, :] - palette.numpy()
    d *= d
    return torch.from_numpy(np.asarray(((d[..., 0] + d[..., 1]) + d[..., 2]).argmin(-1)))


@pytest.mark.parametrize("shape", [(513, 3), (2, 5, 7, 3), (1, 3), (0, 3), (3,)], ids=str)
@pytest.mark.parametrize("V", [1, 37, 512])
def test_bytes(shape, V, device, poison_empty):
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(V), dtype=torch.uint8)
    tokens = palette_encode(pixels.to(device), colours(V, device))
    assert tokens.dtype == torch.int64 and tokens.shape == shape[:-1]
    assert torch.equal(tokens.cpu(), numpy_encode(pixels, colours(V, "cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floats(dtype, device, poison_empty):
    pixels = (torch.rand(700, 3, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2).to(dtype)
    tokens = palette_encode(pixels.to(device), colours(512, device))
    assert torch.equal(tokens.cpu(), reference.palette_encode(pixels, colours(512, "cpu")))


def test_lowest_index_on_ties(device):
    """Every colour three times over, pixels half way between two colours, and pixels on colours."""
    grid = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    palette = torch.cartesian_prod(grid, grid, grid)[torch.randperm(125, generator=torch.Generator().manual_seed(2))]
    palette = palette.repeat(3, 1)
    pixels = torch.cat([palette, (palette[:125] + palette[torch.randperm(125)]) / 2])
    tokens = palette_encode(pixels.to(device), palette.to(device)).cpu()
    assert torch.equal(tokens, numpy_encode(pixels, palette))
    assert tokens.max() < 125


def test_near_ties_are_decided_as_numpy_does(device):
    """Pixels on planes between two colours: here a fused multiply-add or an approximate division changes the answer."""
    palette, gen = colours(64, "cpu"), torch.Generator().manual_seed(3)
    a, b = palette[torch.randint(64, (2, 4000), generator=gen)]
    across = torch.linalg.cross(b - a, torch.randn(4000, 3, generator=gen))
    pixels = (a + b) / 2 + 0.1 * across
    tokens = palette_encode(pixels.to(device), palette.to(device)).cpu()
    assert torch.equal(tokens, numpy_encode(pixels, palette))
    fused = torch.cdist(pixels.double(), palette.double()).argmin(-1)
    assert (fused != tokens).any(), "no pixel is near enough to a tie for rounding to matter"


def test_strided_pixels_and_infinities(device, poison_empty):
    pixels = torch.rand(6, 4, 8, generator=torch.Generator().manual_seed(4))
    pixels[0, 0, 3], pixels[1, 1, 4], pixels[2, 2, 5] = float("nan"), float("inf"), float("-inf")
    view = pixels[:, ::2, 2:5]
    tokens = palette_encode(view.to(device), colours(16, device)).cpu()
    assert torch.equal(tokens, numpy_encode(view, colours(16, "cpu")))
    assert tokens[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16], ids=str)
def test_decode(dtype, device, poison_empty):
    palette = colours(200, device, seed=5) * 1.02  # a few channels beyond [-1, 1]
    tokens = torch.randint(0, 200, (3, 77), generator=torch.Generator().manual_seed(6)).to(device)
    assert torch.equal(palette_decode(tokens.to(dtype), palette), reference.palette_decode(tokens, palette))


def test_decode_rounds_halves_to_even(device):
    """Every byte and every half between two bytes."""
    palette = (torch.arange(-2, 513)[:, None].expand(-1, 3) / 255 - 1).contiguous().to(device)
    tokens = torch.arange(len(palette), device=device)
    ours = palette_decode(tokens, palette)
    assert torch.equal(ours, reference.palette_decode(tokens, palette)) and ours.min() == 0 and ours.max() == 255


def test_every_byte_survives_a_round_trip(device):
    bytes_ = torch.arange(256, dtype=torch.uint8, device=device)[:, None].expand(-1, 3)
    grey = reference.palette_pixels(bytes_)
    assert torch.equal(palette_decode(palette_encode(bytes_, grey), grey), bytes_)


def test_token_outside_the_palette_is_black(device):
    tokens = torch.tensor([0, 9, -1, 1, 2**32, 3 - 2**32], device=device)
    assert palette_decode(tokens, torch.ones(9, 3, device=device))[:, 0].tolist() == [255, 0, 0, 255, 0, 0]


def distinct(n, seed=0):
    """Distinct colours, sorted as k-means has them, and counts beyond what fp32 holds."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randperm(1 << 16, generator=gen)[:n].sort().values * 251
    colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).to(torch.uint8)
    return colours, torch.randint(1, 1 << 40, (n,), generator=gen)


@pytest.mark.parametrize("n, V", [(40_000, 64), (1025, 37), (3, 512), (0, 5)])
def test_sums(n, V, device, poison_empty):
    """More programs than copies of the sums, odd sizes, colours without a pixel: equal to numpy's whole numbers."""
    (colours_, weight), palette = distinct(n), colours(V, "cpu")
    index, sums = (x.cpu() for x in palette_sums(colours_.to(device), weight.to(device), palette.to(device)))
    assert torch.equal(index, numpy_encode(colours_, palette))
    expected = np.zeros((V, 4), object)
    np.add.at(expected, index.numpy(), np.array([[w, w * r, w * g, w * b] for w, (r, g, b) in zip(
        weight.tolist(), colours_.tolist())], object).reshape(-1, 4))
    assert sums.dtype == torch.int64 and sums.tolist() == expected.T.tolist()
    assert all(map(torch.equal, (index, sums), reference.palette_sums(colours_, weight, palette)))


@pytest.mark.parametrize(
    "function, first, palette, name",
    [(palette_encode, torch.zeros(4, 4), torch.zeros(8, 3), "pixels"),
     (palette_encode, torch.zeros(4, 3, dtype=torch.int64), torch.zeros(8, 3), "pixels"),
     (palette_encode, torch.zeros(4, 3), torch.zeros(8, 4), "palette"),
     (palette_encode, torch.zeros(4, 3), torch.zeros(0, 3), "palette"),
     (palette_decode, torch.zeros(4), torch.zeros(8, 3), "tokens"),
     (palette_decode, torch.zeros(4, dtype=torch.int64), torch.zeros(8, 3, dtype=torch.int64), "palette")],
)  # fmt: skip
def test_bad_input_is_named(function, first, palette, name, device):
    with pytest.raises(ValueError, match=f"{name}: got"):
        function(first.to(device), palette.to(device))


def test_opcheck_and_full_graph_compile(device):
    pixels = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8, device=device)
    palette = colours(16, device)
    torch.library.opcheck(kernel.palette_encode_op, (pixels, palette))
    torch.library.opcheck(kernel.palette_decode_op, (palette_encode(pixels, palette), palette))
    torch.library.opcheck(kernel.palette_sums_op, (*(x.to(device) for x in distinct(20)), palette))

    def both(pixels, palette):
        return palette_decode(palette_encode(pixels, palette), palette)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels, palette), both(pixels, palette))


def test_bad_sums_are_named(device):
    good, weight, palette = torch.zeros(4, 3, dtype=torch.uint8), torch.ones(4, dtype=torch.int64), torch.zeros(8, 3)
    for name, bad in [
        ("colours", (good.float(), weight, palette)), ("weight", (good, weight.float(), palette)),
        ("weight", (good, weight[:3], palette)), ("palette", (good, weight, palette[:, :2])),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got"):
            palette_sums(*(x.to(device) for x in bad))
