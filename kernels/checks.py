"""What each operation asks of its arguments, whichever way it runs: one place that refuses, before any work.

Every check raises ValueError naming the operation and the argument, what came and what was expected. `dtype` is the one
that all operands must share: the kernels ask for it, the torch path (igpt/ops/) has cast them already.
"""

import torch

COLDEST = 1e-30  # temperature
ACTIVATIONS = ("quick_gelu", "gelu")


def refuse(name: str, argument: str, got, expected: str) -> None:
    raise ValueError(f"{name}: {argument}: got {got}, expected {expected}")


def said(t: torch.Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)}"


def operand(name: str, argument: str, t: torch.Tensor | None, shape: tuple, dtype: torch.dtype | None = None) -> None:
    """None in `shape` is any size; a tensor that is None passes."""
    if t is None:
        return
    have = t.shape
    if len(have) == len(shape) and (dtype is None or t.dtype == dtype):
        if have == shape:
            return
        for size, want in zip(have, shape):
            if want is not None and size != want:
                break
        else:
            return
    want = tuple("any" if size is None else size for size in shape)
    refuse(name, argument, said(t), f"{dtype or 'floats'} {want}")


def rows(name: str, argument: str, x: torch.Tensor) -> int:
    """The last dimension of floating activations (..., d)."""
    if not x.is_floating_point() or x.dim() < 1:
        refuse(name, argument, said(x), "floats (..., d)")
    return x.shape[-1]


def integers(name: str, argument: str, t: torch.Tensor, vocab: int | None = None) -> None:
    """Integer ids; with `vocab`, in [0, vocab): read where the tensor is on a CPU and no graph is being traced."""
    within = "" if vocab is None else f" in [0, {vocab})"
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        refuse(name, argument, t.dtype, f"integers{within}")
    if vocab is not None and is_readable(t) and t.numel():
        low, high = (int(end) for end in torch.aminmax(t.long()))
        if low < 0 or high >= vocab:
            refuse(name, argument, f"values in [{low}, {high}]", f"integers{within}")


def is_readable(t: torch.Tensor) -> bool:
    """Whether values can be looked at here and now: on a CPU, in eager mode, outside of vmap."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not is_vmap()


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, in eager mode."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_vmap() -> bool:
    """Whether torch.func.vmap is: one call stands for many, and no value can be read."""
    functorch = torch._C._functorch
    return is_transformed() and any(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack()
    )


def attention(q, k, v) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            refuse("attention", name, f"shape {tuple(t.shape)}", "(B, N, H, D)")
        if t.dtype != q.dtype or t.shape != q.shape:
            refuse("attention", name, said(t), f"q's {said(q)}")
    if not q.is_floating_point():
        refuse("attention", "q", q.dtype, "floats")


def attention_packed(qkv) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        refuse("attention", "qkv", said(qkv), "floats (B, N, 3, H, D)")


def decode_attention(qkv, k_cache, v_cache) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        refuse("decode_attention", "qkv", said(qkv), "floats (B, 3, H, D)")
    B, _, H, D = qkv.shape
    operand("decode_attention", "k_cache", k_cache, (B, H, None, D))
    operand("decode_attention", "v_cache", v_cache, tuple(k_cache.shape))


def norm(name: str, x, add, norm_weight, dtype=None) -> None:
    d = rows(name, "x", x)
    operand(name, "add", add, tuple(x.shape), dtype)
    operand(name, "norm_weight", norm_weight, (d,), dtype)


def norm_linear(x, add, norm_weight, weight, bias, dtype=None) -> None:
    norm("norm_linear", x, add, norm_weight, dtype)
    operand("norm_linear", "weight", weight, (None, x.shape[-1]), dtype)
    operand("norm_linear", "bias", bias, weight.shape[:1], dtype)


def norm_mlp(x, add, norm_weight, w_fc, w_proj, b_fc, b_proj, activation: str, dtype=None) -> None:
    if activation not in ACTIVATIONS:
        refuse("norm_mlp", "activation", repr(activation), f"one of {ACTIVATIONS}")
    norm("norm_mlp", x, add, norm_weight, dtype)
    d = x.shape[-1]
    operand("norm_mlp", "w_fc", w_fc, (None, d), dtype)
    inner = w_fc.shape[0]
    operand("norm_mlp", "w_proj", w_proj, (d, inner), dtype)
    operand("norm_mlp", "b_fc", b_fc, (inner,), dtype)
    operand("norm_mlp", "b_proj", b_proj, (d,), dtype)


def fp8(name: str, x, *weights) -> None:
    """What products in 8 bits ask for besides: sizes that 16 divides, bf16, and a device that has them."""
    if x.dtype != torch.bfloat16:
        refuse(name, "x", f"{x.dtype} with fp8", "bf16")
    for weight in weights:
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            refuse(name, "weight", f"{tuple(weight.shape)} with fp8", "sizes that 16 divides")
    fp8_device(name, x.device)


def fp8_device(name: str, device: torch.device) -> None:
    """A CPU, where they are emulated, or a GPU of Nvidia's from sm_89 on."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9)):
        refuse(name, "fp8", torch.cuda.get_device_name(device), "a GPU of Nvidia's, compute capability 8.9 or newer")


def quantize_rows(x) -> None:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse("quantize_rows", "x", said(x), "fp32, bf16 or fp16 (M, K)")


def head_loss(x, norm_weight, head_weight, targets, dtype=None) -> None:
    """On a GPU a target outside of [0, V) is not found here (that would cost a synchronisation): its loss is NaN."""
    norm("head_loss", x, None, norm_weight, dtype)
    operand("head_loss", "head_weight", head_weight, (None, x.shape[-1]), dtype)
    if targets.shape != x.shape[:-1]:
        refuse("head_loss", "targets", said(targets), f"integers {tuple(x.shape[:-1])}")
    integers("head_loss", "targets", targets)


def embed(tokens, wte, wpe, sos, masked, dtype=None) -> None:
    integers("embed", "tokens", tokens)
    operand("embed", "wte", wte, (None, None), dtype)
    d = wte.shape[1]
    operand("embed", "wpe", wpe, (None, d), dtype)
    operand("embed", "sos", sos, (d,), dtype)
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= wpe.shape[0]:
        refuse("embed", "tokens", f"shape {tuple(tokens.shape)}", f"(B, N) with 1 <= N <= {wpe.shape[0]}")
    operand("embed", "masked", masked, tuple(tokens.shape), torch.bool)


def temperature(name: str, value: float) -> float:
    """Itself, or 0 (greedy) where logits divided by it would be infinite: no noise makes up for such differences."""
    if not 0 <= value < float("inf"):
        refuse(name, "temperature", value, "a finite number >= 0 (0: greedy)")
    return 0.0 if value < COLDEST else float(value)


def palette(name: str, palette) -> None:
    if palette.dim() != 2 or palette.shape[1] != 3 or not palette.shape[0] or not palette.is_floating_point():
        refuse(name, "palette", said(palette), "floats (V >= 1, 3)")


def palette_encode(pixels, palette_V3) -> None:
    palette("palette_encode", palette_V3)
    if pixels.shape[-1:] != (3,) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        refuse("palette_encode", "pixels", said(pixels), "uint8 or floats (..., 3)")


def palette_decode(tokens, palette_V3) -> None:
    palette("palette_decode", palette_V3)
    integers("palette_decode", "tokens", tokens)


def palette_sums(colours, weight, palette_V3) -> None:
    palette("palette_sums", palette_V3)
    operand("palette_sums", "colours", colours, (None, 3), torch.uint8)
    operand("palette_sums", "weight", weight, colours.shape[:1], torch.int64)
