"""Picture sets under one roof: `load`, and what it gives."""

import importlib

_HOMES = {
    "crops": ("CROPS", "cifar_augment", "resize_all", "shifted", "shifts"),
    "encode": ("encode_folder",),
    "loading": ("SPLITS", "hold_out", "kind_of", "load"),
    "pictures": ("Pictures", "Rows", "same_classes"),
    "token_sets": ("save_tokens",),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_EXPORTS)


def __getattr__(name):
    # On first use: worker processes import igpt.data.workers, and no torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'igpt.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"igpt.data.{_EXPORTS[name]}"), name)
