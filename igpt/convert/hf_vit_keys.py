"""Hugging Face's names and config keys for ViT, and ours.

Weights are (out, in) in both. Their q, k and v are three matrices, ours are one, [q; k; v]; their patch projection is a
convolution's (d, 3, p, p), ours has a patch's pixels row by row. Their processors' mean and deviation of 0.5 are our
pixels in [-1, 1].
"""

import torch

from igpt.config import ViTConfig
from igpt.convert.hf_keys import integer, label_maps, number, require_neutral
from igpt.convert.tensors import Lazy

CONFIG, MODEL_TYPE, FORMAT = ViTConfig, "vit", "igpt-vit"
# Keys that change the maths in a way that has no counterpart here: the value that leaves it alone.
REFUSED = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3, "pooler_act": "tanh", "quantization_config": None}
REFUSED_PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
ENDS = {  # ours: theirs
    "b_patch": "embeddings.patch_embeddings.projection.bias",
    "cls": "embeddings.cls_token",
    "wpe": "embeddings.position_embeddings",
    "norm_f": "layernorm.weight",
    "b_norm_f": "layernorm.bias",
    "pooler": "pooler.dense.weight",
    "b_pooler": "pooler.dense.bias",
}
HEAD = {"head": "classifier.weight", "b_head": "classifier.bias"}  # beside their ViTModel, which is "vit."
PATCH = "embeddings.patch_embeddings.projection.weight"
LAYER = {
    "attn.norm": "layernorm_before.weight",
    "attn.b_norm": "layernorm_before.bias",
    "attn.proj": "attention.output.dense.weight",
    "attn.b_proj": "attention.output.dense.bias",
    "mlp.norm": "layernorm_after.weight",
    "mlp.b_norm": "layernorm_after.bias",
    "mlp.fc": "intermediate.dense.weight",
    "mlp.b_fc": "intermediate.dense.bias",
    "mlp.proj": "output.dense.weight",
    "mlp.b_proj": "output.dense.bias",
}
QKV = {"attn.qkv": "attention.attention.{}.weight", "attn.b_qkv": "attention.attention.{}.bias"}
PARTS = ("query", "key", "value")


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of ViT(config), without building one."""
    d, inner = config.width, config.inner
    block = {"attn.norm": (d,), "attn.b_norm": (d,), "attn.qkv": (3 * d, d), "attn.b_qkv": (3 * d,)}
    block |= {"attn.proj": (d, d), "attn.b_proj": (d,), "mlp.norm": (d,), "mlp.b_norm": (d,)}
    block |= {"mlp.fc": (inner, d), "mlp.b_fc": (inner,), "mlp.proj": (d, inner), "mlp.b_proj": (d,)}
    whole = {"patch": (d, 3 * config.patch**2), "b_patch": (d,), "cls": (d,), "wpe": (1 + config.side**2, d)}
    whole |= {"norm_f": (d,), "b_norm_f": (d,)}
    whole |= {"mask": (d,)} if config.objective == "patches" else {}
    whole |= {"pooler": (d, d), "b_pooler": (d,)} if config.pooler else {}
    whole |= {"head": (config.outputs, d), "b_head": (config.outputs,)} if config.outputs else {}
    return whole | {f"blocks.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()}


def from_hf(hf: dict, tensors: dict[str, Lazy], attn_scale: str) -> tuple[ViTConfig, dict[str, Lazy], list[str]]:
    """(config, tensors by our names, remarks for the user). Raises ValueError naming a key or tensor that can't be
    honoured. Dropout keys only say how to train."""
    require_neutral("config.json", hf, REFUSED)
    if attn_scale != "exact":
        raise ValueError(f"attn_scale: got {attn_scale!r}, expected 'exact': Hugging Face's ViT has no other")
    rest = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    n_layer = integer(hf, "num_hidden_layers", 12)
    width, patch, size = integer(hf, "hidden_size", 768), square(hf, "patch_size", 16), square(hf, "image_size", 224)
    if not 0 < n_layer <= len(rest):
        raise ValueError(f"config.json: num_hidden_layers: got {n_layer}, but there are {len(rest)} tensors")
    ours = {name: rest.pop(theirs) for name, theirs in (ENDS | HEAD).items() if theirs in rest}
    # Their two have leading dimensions of 1.
    for name, rank in (("cls", 1), ("wpe", 2)):
        if name in ours and set(ours[name].shape[:-rank]) <= {1}:
            ours[name] = ours[name].reshape(*ours[name].shape[-rank:])
    if PATCH in rest:
        ours["patch"] = pixels_last(rest.pop(PATCH), patch)
    for i in range(n_layer):
        layer = f"encoder.layer.{i}."
        for name, theirs in LAYER.items():
            if layer + theirs in rest:
                ours[f"blocks.{i}.{name}"] = rest.pop(layer + theirs)
        for name, theirs in QKV.items():
            if all(layer + theirs.format(part) in rest for part in PARTS):
                ours[f"blocks.{i}.{name}"] = Lazy.stack(*(rest.pop(layer + theirs.format(part)) for part in PARTS))
    if rest:
        raise ValueError(f"got {len(rest)} tensors unknown to ViT: {sorted(rest)[:5]}")
    config = ViTConfig(
        n_layer=n_layer,
        width=width,
        heads=integer(hf, "num_attention_heads", 12),
        size=size,
        patch=patch,
        classes=ours["head"].shape[0] if "head" in ours else 0,
        n_inner=integer(hf, "intermediate_size", 3072),
        norm_eps=number(hf, "layer_norm_eps", 1e-12),
        pooler="pooler" in ours,
    )
    return config, ours, []


def square(hf: dict, key: str, default: int) -> int:
    """A side, which may be given twice."""
    value = hf.get(key, default)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    return integer({key: value}, key, default)


def pixels_last(tensor: Lazy, patch: int) -> Lazy:
    """(d, 3, p, p) -> (d, 3 p^2): row by row, r g b each."""
    if tensor.shape[1:] != (3, patch, patch):
        raise ValueError(f"{PATCH}: got shape {tensor.shape}, expected (width, 3, {patch}, {patch})")
    return tensor.view((tensor.shape[0], 3 * patch**2), lambda x: x.permute(0, 2, 3, 1).flatten(1))


def to_hf(
    config: ViTConfig, ours: dict[str, Lazy], dtype: torch.dtype, classes: tuple[str, ...], palette
) -> tuple[dict, dict, dict[str, Lazy]]:
    """(their config.json, preprocessor_config.json, tensors by their names). Raises ValueError naming a field that they
    can't express."""
    if config.objective != "labels":
        raise ValueError(f"objective: got {config.objective!r}, expected 'labels': Hugging Face's ViT has no 'patches'")
    if config.classes and config.pooler:
        raise ValueError("pooler: got True with classes, expected one of them for Hugging Face's ViT")
    d, p, rows = config.width, config.patch, 1 + config.side**2
    theirs = {PATCH: ours["patch"].view((d, 3, p, p), lambda x: x.view(d, p, p, 3).permute(0, 3, 1, 2))}
    theirs |= {name: ours[own] for own, name in ENDS.items() if own in ours}
    theirs |= {ENDS["cls"]: ours["cls"].reshape(1, 1, d), ENDS["wpe"]: ours["wpe"].reshape(1, rows, d)}
    for i in range(config.n_layer):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        theirs |= {layer + name: ours[block + own] for own, name in LAYER.items()}
        for own, name in QKV.items():
            parts = (ours[block + own].rows(k * d, (k + 1) * d) for k in range(3))
            theirs |= {layer + name.format(part): tensor for part, tensor in zip(PARTS, parts)}
    hf = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": d,
        "image_size": config.size,
        "intermediate_size": config.inner,
        "layer_norm_eps": config.norm_eps,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.n_layer,
        "patch_size": p,
        "qkv_bias": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.classes:
        theirs = {f"vit.{name}": tensor for name, tensor in theirs.items()}
        theirs |= {name: ours[own] for own, name in HEAD.items()}
        hf |= {"architectures": ["ViTForImageClassification"], **label_maps(classes, config.classes)}
    return hf, processor_config(config.size), theirs


def processor_config(size: int) -> dict:
    """Their preprocessor_config.json for our pixels."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
