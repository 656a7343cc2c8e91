"""Checkpoints in and out: our own, Hugging Face's, OpenAI's."""

from igpt.convert.checkpoints import FORMATS, Checkpoint, convert, describe, open_checkpoint, save, write

__all__ = ["FORMATS", "Checkpoint", "convert", "describe", "open_checkpoint", "save", "write"]
