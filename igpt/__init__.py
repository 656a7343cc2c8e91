"""Image GPT (Chen et al. 2020) with Triton kernels.

    import igpt
    model = igpt.ImageGPT.from_preset("s")

Submodules load on first use, so that importing one kernel (`igpt.kernels.attention`) costs only that kernel.
"""

import importlib

__version__ = "0.2.0"

_EXPORTS = {
    "Config": "config",
    "PRESETS": "config",
    "ImageGPT": "model",
    "Palette": "palette",
    "ViT": "vit",
    "ViTConfig": "config",
    "graphed": "training.graphed",
}
_MODULES = ("config", "convert", "data", "hf", "model", "ops", "palette", "sample", "vit")

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"igpt.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"igpt.{name}")
    raise AttributeError(f"module 'igpt' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
