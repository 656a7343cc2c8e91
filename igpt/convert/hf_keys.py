"""Hugging Face's names, layouts and config keys for Image GPT, and ours.

A Conv1D weight is (in, out), ours (out, in). The start vector is the last row of wte. Their `c_attn` columns and our
`qkv` rows have one order: [q; k; v], each head after head.
"""

import math
import re

import torch

from igpt.config import Config
from igpt.convert.tensors import Lazy

# ours in a block: (theirs, is it a Conv1D weight)
BLOCK = {
    "attn.norm": ("ln_1.weight", False),
    "attn.qkv": ("attn.c_attn.weight", True),
    "attn.b_qkv": ("attn.c_attn.bias", False),
    "attn.proj": ("attn.c_proj.weight", True),
    "attn.b_proj": ("attn.c_proj.bias", False),
    "mlp.norm": ("ln_2.weight", False),
    "mlp.fc": ("mlp.c_fc.weight", True),
    "mlp.b_fc": ("mlp.c_fc.bias", False),
    "mlp.proj": ("mlp.c_proj.weight", True),
    "mlp.b_proj": ("mlp.c_proj.bias", False),
}
CONFIG, MODEL_TYPE, FORMAT = Config, "imagegpt", "igpt"
# Constant buffers that older versions saved.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# Their configuration class takes these names too.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Keys that change the maths in a way that has no counterpart here: the value that leaves it alone.
REFUSED = {"activation_function": "quick_gelu", "add_cross_attention": False, "quantization_config": None}
REFUSED_PROCESSOR = {}
SCALES = ("exact", "hf")


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of ImageGPT(config), without building one."""
    d, inner = config.width, config.inner
    block = {"attn.norm": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d)}
    block |= {"mlp.norm": (d,), "mlp.fc": (inner, d), "mlp.proj": (d, inner)}
    if config.bias:
        block |= {"attn.b_qkv": (3 * d,), "attn.b_proj": (d,), "mlp.b_fc": (inner,), "mlp.b_proj": (d,)}
    whole = {"wte": (config.vocab, d), "wpe": (config.n_ctx, d), "norm_f": (d,), "head": (config.vocab, d)}
    whole |= {"sos": (d,)} if config.causal else {}
    whole |= {"classifier": (config.classes, d)} if config.classes else {}
    return whole | {f"blocks.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()}


def from_hf(hf: dict, tensors: dict[str, Lazy], attn_scale: str) -> tuple[Config, dict[str, Lazy], list[str]]:
    """(config, tensors by our names, remarks for the user). Raises ValueError naming a key or tensor that can't be
    honoured. Of `reorder_and_upcast_attn` only its scale matters, dropout keys only say how to train."""
    hf = {ALIASES.get(key, key): value for key, value in hf.items()} | {k: hf[k] for k in ALIASES.values() if k in hf}
    require_neutral("config.json", hf, REFUSED)
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""  # ImageGPTModel saves without
    rest = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    rest = {name: tensor for name, tensor in rest.items() if not BUFFERS.fullmatch(name)}
    remarks = []
    n_layer, vocab = integer(hf, "n_layer", 24), integer(hf, "vocab_size", 513) - 1
    if n_layer > len(rest):
        raise ValueError(f"config.json: n_layer: got {n_layer}, but there are only {len(rest)} tensors")
    ours = {}
    for i in range(n_layer):
        for name, (theirs, is_conv) in BLOCK.items():
            if (tensor := rest.pop(f"h.{i}.{theirs}", None)) is not None:
                ours[f"blocks.{i}.{name}"] = tensor.t() if is_conv and len(tensor.shape) == 2 else tensor
    biases = [name for name in ours if ".b_" in name]
    bias = any(has_bits(ours[name].read()) for name in biases)
    if not bias:
        ours = {name: tensor for name, tensor in ours.items() if name not in biases}
    for name, theirs in (("wpe", "wpe.weight"), ("norm_f", "ln_f.weight"), ("head", "lm_head.weight")):
        if theirs in rest:
            ours[name] = rest.pop(theirs)
    wte = rest.pop("wte.weight", None)
    if wte is None or len(wte.shape) != 2 or wte.shape[0] != vocab + 1:
        got = None if wte is None else wte.shape
        raise ValueError(f"wte.weight: got {got}, expected ({vocab + 1}, width): {vocab} colours and the start vector")
    ours["wte"], ours["sos"] = wte.rows(0, vocab), wte.rows(vocab, vocab + 1).reshape(wte.shape[1])
    if hf.get("tie_word_embeddings", False):
        # Tying makes their logits 513 wide, the last one the start vector's, which is no colour.
        ours["head"] = ours["wte"]
        remarks.append("tie_word_embeddings: the head is a copy of the colours' embeddings, without the start vector")
    elif "head" not in ours:
        ours["head"] = Lazy.zeros((vocab, wte.shape[1]), wte.dtype)
        remarks.append("lm_head.weight: none in this checkpoint, so the output head is zero")
    if "score.weight" in rest:
        ours["classifier"] = rest.pop("score.weight")
    if rest:
        raise ValueError(f"got {len(rest)} tensors unknown to Image GPT: {sorted(rest)[:5]}")
    width, heads = integer(hf, "n_embd", 512), integer(hf, "n_head", 8)
    scale = None if _flag(hf, "scale_attn_weights", True) else 1.0
    head_dim = width // max(heads, 1)
    if scale is None and math.isqrt(head_dim) ** 2 != head_dim and not _flag(hf, "reorder_and_upcast_attn", False):
        theirs, exact = math.isqrt(head_dim), f"sqrt({head_dim})"
        scale = 1 / theirs if attn_scale == "hf" else None
        taken, other = (exact, f"'hf' for {theirs}") if scale is None else (theirs, f"'exact' for {exact}")
        remarks.append(
            f"attn_scale: scores are divided by {taken}; OpenAI's code has {exact}, transformers 5.17 {theirs}; "
            f"attn_scale={other}"
        )
    config = Config(
        n_layer=n_layer,
        width=width,
        heads=heads,
        n_ctx=integer(hf, "n_positions", 1024),
        vocab=vocab,
        norm_eps=number(hf, "layer_norm_epsilon", 1e-5),
        n_inner=None if hf.get("n_inner") is None else integer(hf, "n_inner", None),
        bias=bias,
        attn_scale=scale,
        scale_by_layer=_flag(hf, "scale_attn_by_inverse_layer_idx", False),
        classes=ours["classifier"].shape[0] if "classifier" in ours else 0,
    )
    return config, ours, remarks


def require_neutral(file: str, values: dict, refused: dict) -> None:
    """Raises ValueError for a key whose value is there and another one."""
    for key, neutral in refused.items():
        if values.get(key, neutral) != neutral:
            raise ValueError(f"{file}: {key}: got {values[key]!r:.80}, expected {neutral!r}")


def class_names(hf: dict, count: int) -> tuple[str, ...]:
    """What a classifier's rows are called; empty where nobody said. Raises ValueError for names of other rows."""
    names = hf.get("id2label")
    if not count or names is None:
        return ()
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(count))):
        raise ValueError(f"config.json: id2label: got {names!r:.80}, expected names for 0 to {count - 1}")
    return tuple(names[str(i)] for i in range(count))


def to_hf(
    config: Config, ours: dict[str, Lazy], dtype: torch.dtype, classes: tuple[str, ...], palette
) -> tuple[dict, dict | None, dict[str, Lazy]]:
    """(their config.json, preprocessor_config.json or None, tensors by their names). Raises ValueError naming a field
    that they can't express."""
    if config.objective != "ar":
        raise ValueError(f"objective: got {config.objective!r}, expected 'ar': Hugging Face's ImageGPT is causal")
    if config.norm != "rms":
        raise ValueError(f"norm: got {config.norm!r}, expected 'rms': Hugging Face's ImageGPT does not centre")
    truncated = 1 / math.isqrt(config.head_dim)
    if config.attn_scale not in (None, 1.0, truncated):
        expected = f"None, 1.0 or {truncated}"
        raise ValueError(f"attn_scale: got {config.attn_scale}, expected {expected} for Hugging Face's ImageGPT")
    theirs = {
        "transformer.wte.weight": Lazy.stack(ours["wte"], ours["sos"].reshape(1, config.width)),
        "transformer.wpe.weight": ours["wpe"],
        "transformer.ln_f.weight": ours["norm_f"],
        "lm_head.weight": ours["head"],
    }
    for i in range(config.n_layer):
        for name, (their_name, is_conv) in BLOCK.items():
            tensor = ours.get(f"blocks.{i}.{name}")
            if tensor is None:
                width = {"attn.b_qkv": 3 * config.width, "mlp.b_fc": config.inner}.get(name, config.width)
                tensor = Lazy.zeros((width,), ours["wte"].dtype)
            theirs[f"transformer.h.{i}.{their_name}"] = tensor.t() if is_conv else tensor
    hf = {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": "imagegpt",
        "activation_function": "quick_gelu",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.n_inner,
        "n_layer": config.n_layer,
        "n_positions": config.n_ctx,
        # The path without it divides by int(sqrt(head dim)); this one by the root itself.
        "reorder_and_upcast_attn": math.isqrt(config.head_dim) ** 2 != config.head_dim and config.attn_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "scale_attn_weights": config.attn_scale != 1.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab + 1,
    }
    if config.classes:
        theirs["score.weight"] = ours["classifier"]
        hf["architectures"] = ["ImageGPTForImageClassification", "ImageGPTForCausalImageModeling"]
        hf |= label_maps(classes, config.classes)
    return hf, None if palette is None else processor_config(palette, config.n_ctx), theirs


def label_maps(classes: tuple[str, ...], count: int) -> dict:
    names = classes or [f"LABEL_{i}" for i in range(count)]
    return {"id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)}}  # fmt: skip


def processor_config(palette, n_ctx: int) -> dict:
    """Their preprocessor_config.json for square pictures of n_ctx pixels."""
    side = math.isqrt(n_ctx)
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": palette.centres.tolist(),
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": side, "width": side},
    }


def has_bits(tensor: torch.Tensor) -> bool:
    """Whether any bit is set: a bias of +0.0 alone can be left out and comes back equal."""
    return bool(tensor.contiguous().view(torch.uint8).any())


def integer(hf: dict, key: str, default: int | None) -> int:
    value = hf.get(key, default)
    if type(value) is not int:
        raise ValueError(f"config.json: {key}: got {value!r:.80}, expected an integer")
    return value


def number(hf: dict, key: str, default: float) -> float:
    value = hf.get(key, default)
    if type(value) not in (int, float):
        raise ValueError(f"config.json: {key}: got {value!r:.80}, expected a number")
    return float(value)


def _flag(hf: dict, key: str, default: bool) -> bool:
    value = hf.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"config.json: {key}: got {value!r:.80}, expected true or false")
    return value
