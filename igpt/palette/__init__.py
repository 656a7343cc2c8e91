"""The 512 colours: fitting them, and pixels to tokens and back."""

from igpt.palette.palette import FILES, Palette, load_npy

__all__ = ["FILES", "Palette", "load_npy"]
