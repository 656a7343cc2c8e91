"""What the patched model of transformers asks of its arguments: all that the original refuses, said by name.

Values are read where that costs no synchronisation: on a CPU, outside of torch.compile.
"""

import torch
from transformers.cache_utils import Cache

from igpt.kernels import checks

INDICES = (torch.int64, torch.int32)  # what an embedding of PyTorch takes


def refuse(argument: str, got, expected: str) -> None:
    raise ValueError(f"{argument}: got {got}, expected {expected}")


def said(value) -> str:
    return checks.said(value) if torch.is_tensor(value) else type(value).__name__


def positions(model, input_ids, inputs_embeds) -> torch.Size:
    """The shape of the positions, (..., N)."""
    if input_ids is not None:
        if not torch.is_tensor(input_ids) or not input_ids.dim() or not input_ids.shape[-1]:
            refuse("input_ids", said(input_ids), "integers (..., N >= 1)")
        indices("input_ids", input_ids, model.wte.num_embeddings, input_ids.shape)
        return input_ids.shape
    width, dtype = model.wte.embedding_dim, model.wpe.weight.dtype
    fits = torch.is_tensor(inputs_embeds) and inputs_embeds.dim() in (2, 3) and inputs_embeds.shape[-1] == width
    if not fits or not inputs_embeds.shape[-2]:
        refuse("inputs_embeds", said(inputs_embeds), f"{dtype} (batch, N >= 1, {width})")
    is_wider = torch.promote_types(inputs_embeds.dtype, dtype) != dtype
    if is_wider and not torch.is_autocast_enabled(inputs_embeds.device.type):
        refuse("inputs_embeds", said(inputs_embeds), f"{dtype}, as the model's parameters")
    return inputs_embeds.shape[:-1]


def indices(argument: str, ids, count: int, shape: torch.Size, may_repeat: bool = False) -> None:
    """Integers in [0, count) for every position of `shape`, or the same for each picture; with `may_repeat` one for
    all positions."""
    if ids is None:
        return
    if not torch.is_tensor(ids) or ids.dtype not in INDICES:
        refuse(argument, said(ids), f"torch.int64 or torch.int32 in [0, {count})")
    rows, batch = ids.shape[:-1].numel(), shape[:-1].numel()
    lengths = (1, shape[-1]) if may_repeat else shape[-1:]
    if not ids.dim() or ids.shape[-1] not in lengths or rows not in (1, batch) or (may_repeat and ids.dim() > 2):
        refuse(argument, f"shape {tuple(ids.shape)}", f"{tuple(shape)}")
    if ids.is_cpu and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= count:
            refuse(argument, f"values in [{low}, {high}]", f"[0, {count})")


def past(model, cache, N: int) -> int | torch.Tensor:
    """How many positions a cache holds; a tensor in a static one."""
    if cache is None:
        length = 0
    elif isinstance(cache, Cache):
        length = cache.get_seq_length()
    else:
        refuse("past_key_values", type(cache).__name__, "a Cache of transformers")
    most = model.wpe.num_embeddings
    if is_known(length) and length + N > most:
        before = f" behind {int(length)} in past_key_values" if length else ""
        refuse("input_ids, inputs_embeds", f"{N} positions{before}", f"at most n_positions = {most} in all")
    return length


def is_known(length) -> bool:
    return not torch.is_tensor(length) or (length.is_cpu and not torch.compiler.is_compiling())


def mask(mask, B: int, H: int, N: int, past, cache) -> None:
    """(B, keys) or (B, H, N, keys), as many keys as there are by now, or as a static cache will hold."""
    keys, slots = mask.shape[-1], -1
    if cache is not None:
        slots = cache.get_max_length() if hasattr(cache, "get_max_length") else cache.get_max_cache_shape()
    fits = mask.shape[0] == B if mask.dim() == 2 else all(n in (1, most) for n, most in zip(mask.shape, (B, H, N)))
    if not fits or (slots != keys and is_known(past) and past + N != keys):
        want = int(past + N if is_known(past) else slots)
        expected = f"({B}, {want}) or ({B} or 1, {H} or 1, {N} or 1, {want})"
        refuse("attention_mask", f"shape {tuple(mask.shape)}", expected)


def labels(labels, input_ids, inputs_embeds, colours: int, ignored: int) -> None:
    """int64 in [0, colours) or `ignored` for every position."""
    if labels is None:
        return
    shape = inputs_embeds.shape[:-1] if input_ids is None else input_ids.shape
    if not torch.is_tensor(labels) or labels.dtype != torch.int64:
        refuse("labels", said(labels), f"torch.int64 in [0, {colours}), or {ignored}")
    if labels.dim() < 1 or labels.shape[-1] != shape[-1] or labels.numel() != shape.numel():
        refuse("labels", f"shape {tuple(labels.shape)}", f"{tuple(shape)}")
    if labels.is_cpu and not torch.compiler.is_compiling() and labels.numel():
        counted = labels[labels != ignored]
        if counted.numel() and (counted.min() < 0 or counted.max() >= colours):
            refuse("labels", f"values in [{counted.min()}, {counted.max()}]", f"[0, {colours}), or {ignored}")
