"""The program `igpt convert`: from our, Hugging Face's and OpenAI's checkpoints to ours and Hugging Face's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from igpt.convert.checkpoints import convert
from igpt.programs.source import OfRun

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options(OfRun):
    """Convert a checkpoint, tensor by tensor. Nothing that could run code is ever loaded."""

    source: str  # builtin:emoji, our directory, a run's, Hugging Face's, a hub id, or an OpenAI TF1 prefix
    out: Path  # a new directory, or one that holds an earlier model
    format: Literal["igpt", "hf"] = "igpt"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # default: the source's
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the source's
    attn_scale: Literal["exact", "hf"] = "exact"  # of Hugging Face's: 1/sqrt(head dim), or their 1/int(sqrt(head dim))


def run(options: Options) -> dict:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    how = {"step": options.which, "dtype": dtype, "palette": options.palette, "attn_scale": options.attn_scale}
    return convert(options.source, options.out, options.format, **how)
