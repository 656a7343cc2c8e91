"""Hugging Face's Image GPT, right and fast, by one line."""

from igpt.hf.patch import Patch, apply_igpt_kernels, processor_tokens

__all__ = ["Patch", "apply_igpt_kernels", "processor_tokens"]
