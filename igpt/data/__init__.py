"""Picture sets under one roof: `load`, and what it gives."""

from igpt.data.crops import CROPS, cifar_augment, resize_all
from igpt.data.encode import encode_folder
from igpt.data.load import SPLITS, hold_out, kind_of, load
from igpt.data.pictures import Pictures, Rows, same_classes
from igpt.data.token_sets import save_tokens

__all__ = [
    "CROPS", "SPLITS", "Pictures", "Rows", "cifar_augment", "encode_folder", "hold_out", "kind_of", "load",
    "resize_all", "same_classes", "save_tokens",
]  # fmt: skip
