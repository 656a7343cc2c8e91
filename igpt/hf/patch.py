"""Hugging Face's Image GPT, right and fast, by one line.

    igpt.hf.apply_igpt_kernels(model)            # this model of transformers, or whatever model contains it
    patch = igpt.hf.apply_igpt_kernels()         # every one, also those made later
    patch.undo()                                 # as it was

What becomes right (transformers 5.17): attention's scale for head dims that aren't squares (medium: 128, large: 96),
static caches, norms of large fp16 activations, tied heads of 513 colours. What stays: weights, names, arguments,
outputs, save_pretrained, generate, gradient checkpointing, hooks and adapters.
"""

from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image

from igpt.data.crops import check_filter, to_rgb
from igpt.palette import Palette


class Patch(AbstractContextManager):
    """What apply_igpt_kernels changed. As a context manager it is undone when the block ends."""

    def __init__(self):
        self._restore = []

    def set(self, owner, name: str, value) -> None:
        """setattr that undo() takes back."""
        before = vars(owner).get(name, self) if name != "__class__" else owner.__class__
        self._restore.append((owner, name, before))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back as it was. Doing it twice is doing it once."""
        while self._restore:
            owner, name, before = self._restore.pop()
            if before is self:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def __exit__(self, *exception) -> None:
        self.undo()


def apply_igpt_kernels(model: torch.nn.Module | None = None, *, paper_loss: bool = False) -> Patch:
    """Replace attention, norm, MLP and loss inside `model`, or inside transformers' classes themselves.

    model: an ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, or what contains one.

    paper_loss: with labels, the loss is the paper's, of all n pixels: position i predicts labels[i]. input_ids are the
    pixels, or the pixels behind the start token; the shift happens inside. Without it the loss is transformers' own,
    which shifts labels by one and drops the last prediction.

    Patch before torch.compile. Raises ValueError for a model without Image GPT in it, for cross-attention, and for
    modules that something else has already replaced."""
    from igpt.hf import forward as hf_forward

    theirs = {cls.__base__: cls for cls in hf_forward.REPLACED}
    patch = Patch()
    if model is None:
        if any(base.forward is cls.forward for base, cls in theirs.items()):
            raise ValueError("model: the classes are patched already; undo() that patch first")
        for base, cls in theirs.items():
            patch.set(base, "forward", cls.forward)
        patch.set(hf_forward.hf.ImageGPTForCausalImageModeling, "igpt_paper_loss", paper_loss)
        return patch
    found = [module for module in model.modules() if isinstance(module, tuple(theirs))]
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without an ImageGPTModel of transformers in it")
    for module in found:
        if type(module) not in theirs:
            how = "is patched already; undo() that patch first" if type(module) in theirs.values() else "is a subclass"
            raise ValueError(f"model: {type(module).__name__} {how}; expected transformers' own class")
        if "forward" in vars(module):
            raise ValueError(f"model: {type(module).__name__}.forward has been replaced on this instance; patch first")
        if getattr(module, "is_cross_attention", False):
            raise ValueError("model: config.add_cross_attention: got True, expected a model without cross-attention")
    for module in found:
        patch.set(module, "__class__", theirs[type(module)])
        if isinstance(module, hf_forward.ImageGPTForCausalImageModeling):
            patch.set(module, "igpt_paper_loss", paper_loss)
    return patch


def processor_tokens(images, size: int | tuple[int, int], palette: Palette, resample: str = "bilinear") -> torch.Tensor:
    """The tokens int64 (B, H*W) that transformers' ImageGPTImageProcessorPil makes of pictures: the whole picture is
    resized to `size` (side, or height and width) whatever its proportions, each pixel then becomes its nearest colour.

    images: PIL pictures or uint8 arrays (H, W, 3); other modes become RGB as a file's would, where theirs raises. The
    paper's crops are igpt.data.crops' and the default of `igpt encode`. Raises ValueError naming a bad argument."""
    height, width = (size, size) if isinstance(size, int) else size
    squares = []
    for image in images:
        if not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"images: got {image.dtype} {image.shape}, expected pictures or uint8 (H, W, 3)")
            image = Image.fromarray(image)
        squares.append(np.asarray(to_rgb(image).resize((width, height), check_filter(resample))))
    if not squares:
        raise ValueError("images: got none, expected at least one picture")
    return palette.encode(np.stack(squares))
