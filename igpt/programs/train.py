"""The program `igpt train`: pretraining, on one process or many.

    igpt train --preset s --data imagenet32/ --run runs/s
    igpt train --model vit-b16 --data imagenet/ --run runs/vit
    torchrun --nproc-per-node 8 -m igpt -- train --preset l --data imagenet32/ --run runs/l --accumulate 2
"""

import math
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from igpt.config import OBJECTIVES, VIT_OBJECTIVES, Blocks
from igpt.training.loop import Training
from igpt.training.processes import processes
from igpt.training.rundir import held, summary_writer
from igpt.training.start import checkpoint_of, preset_of
from igpt.training.tasks import is_vit, task_of

# The paper's, at 32x32 (XL: 64x64). It prints .01 for L at 48x48, which looks like a slip. tiny's is ours.
LEARNING_RATES = {
    ("tiny", "ar"): 0.003, ("s", "ar"): 0.003, ("m", "ar"): 0.003, ("l", "ar"): 0.001, ("xl", "ar"): 0.0003,
    ("tiny", "bert"): 0.003, ("s", "bert"): 0.01, ("m", "bert"): 0.003, ("l", "bert"): 0.001, ("xl", "bert"): 0.0003,
}  # fmt: skip
BATCHES = {"tiny": 16, "xl": 64}  # pictures a step; the others 128
STEPS = {"tiny": 1000, "xl": 2_000_000}  # the others 1,000,000
# ViT's, on ImageNet without any other pictures (table 3), and of patches (B.1.2); tiny's are ours.
VIT_RECIPES = {
    "labels": {"steps": 93_750, "batch": 4096, "lr": 0.003, "weight_decay": 0.3},
    "patches": {"steps": 1_000_000, "batch": 4096, "lr": 0.0002, "weight_decay": 0.1},
}
VIT_TINY = {"steps": 2000, "batch": 64, "lr": 0.001, "weight_decay": 0.1}
VIT_WARMUP = 10_000  # updates, at most a tenth of the run


@dataclass(frozen=True)
class Options:
    """Train a model: pretrain an Image GPT, or with --model train a ViT. A run directory that has a checkpoint is
    resumed, also with more or fewer steps, whose schedule the learning rate then follows; one of another configuration
    is refused. Every program takes the run directory of an Image GPT as a model at any moment; export/ is the best
    checkpoint by validation loss. A folder of pictures is encoded once, into an Image GPT's run, as its tokens/.

    `torchrun --nproc-per-node 8 -m igpt -- train ...` shares the batch between 8 processes; their number may change
    between a run and its resumption. SIGTERM and Ctrl-C save a checkpoint and end the run."""

    run: Path  # the run directory: config.json, palette.npy, metrics.jsonl, checkpoints/, samples/, export/ at the end
    data: str = "builtin:emoji"  # builtin:emoji, a folder of pictures, a token set, CIFAR, STL-10, IDX, OpenAI's npy
    init: str | None = None  # a model to start from: a run, our directory, Hugging Face's, a hub id, OpenAI's prefix
    interpolate: bool = False  # its positions, to pictures of another size (bicubic)
    preset: Literal["tiny", "s", "m", "l", "xl"] = "s"  # the model's size; with --init it is the checkpoint's
    model: Literal["vit-tiny", "vit-s16", "vit-b16", "vit-l16"] | None = None  # a ViT instead of --preset's Image GPT
    # Next pixel (the default), or 15% of the pixels hidden; a ViT's: labels (its default), corrupted patches' colours.
    objective: Literal["ar", "bert", "labels", "patches"] | None = None
    layers: int | None = None  # default: the preset's
    width: int | None = None  # default: the preset's
    heads: int | None = None  # default: the preset's
    norm: Literal["rms", "layer"] = "rms"  # as OpenAI's code has it (not centred), or as the paper writes it
    size: int | None = None  # pictures become size x size; default: 32, or the token set's own
    holdout: float = 0.1  # part of train that is valid, where the set has no valid of its own (paper's ImageNet: 0.04)
    augment: bool = False  # a ViT's pictures: reflect-pad by an eighth, a random crop of each or of its mirror image
    skip_bad: bool = False  # leave a folder's unreadable pictures out; default: stop at the first
    palette: Path | None = None  # palette.npy or kmeans_centers.npy; default: --init's, the set's own, or one is fitted
    steps: int | None = None  # updates; default: the paper's 1,000,000 (xl 2,000,000; tiny 1000)
    batch: int | None = None  # pictures an update, over all processes; default: the paper's 128 (xl 64; tiny 16)
    lr: float | None = None  # at its peak; default: the paper's for this preset and objective
    warmup: int | None = None  # updates of linear warm-up; default: one epoch, at most a tenth of the run
    optimizer: Literal["adam", "muon"] = "adam"  # muon: of the blocks' matrices, Adam of the rest; training/muon.py
    beta1: float = 0.9  # Adam's, as are the next two
    beta2: float | None = None  # default: the paper's 0.95, ViT's 0.999
    weight_decay: float | None = None  # of matrices, decoupled; default: none, ViT's 0.3 (patches, vit-tiny: 0.1)
    eps: float = 1e-8  # the paper doesn't say
    clip: float | None = 1.0  # largest gradient norm, None for no clipping; the paper doesn't say
    seed: int = 0  # of the first weights, the order of the pictures and the masks
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["fp8"] | None = None  # of the blocks' products: fp8 (Hopper or newer), or as the activations
    accumulate: int = 1  # micro-batches an update, to need less memory
    recompute: Literal["none", "mlp", "block"] = "none"  # what to forget of each block and make again in backward
    impl: Literal["auto", "triton", "torch"] = "auto"  # Triton kernels or PyTorch; auto: kernels on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10  # updates between lines of metrics.jsonl
    save_every: int | None = None  # updates between checkpoints; default: a tenth of the run, at most 1000
    keep: int = 2  # the newest checkpoints that are kept, beside the best, which is saved when it is validated
    valid_every: int | None = None  # updates between validation losses; default: a tenth of the run
    valid_pictures: int = 1024  # at most so many of the validation split, the first ones
    sample_every: int | None = None  # updates between sample grids, 0 for none; default: a tenth of the run
    tensorboard: bool = False  # write TensorBoard's files too

    def resolved(self, init: Blocks | None = None) -> "Options":
        """With the defaults that depend on other options, and on the model to start from, filled in. Raises ValueError
        for values that make no run."""
        if not (vit := is_vit(self, init)) and self.preset == "s" and init is not None and (named := preset_of(init)):
            return replace(self, preset=named).resolved()
        options = self.filled(self.vit_defaults(init) if vit else self.defaults())
        tenth = max(1, options.steps // 10)
        options = options.filled({"save_every": min(tenth, 1000), "valid_every": tenth, "sample_every": tenth})
        for name in (
            "steps", "batch", "accumulate", "log_every", "save_every", "valid_every", "valid_pictures", "keep",
        ):  # fmt: skip
            if getattr(options, name) < 1:
                raise ValueError(f"{name}: got {getattr(options, name)}, expected at least 1")
        if options.size is not None and options.size < 1:
            raise ValueError(f"size: got {options.size}, expected at least 1")
        for name in ("lr", "eps"):
            if not 0 < getattr(options, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(options, name)}, expected a positive number")
        if options.clip is not None and not options.clip > 0:
            raise ValueError(f"clip: got {options.clip}, expected a positive number or None")
        if options.weight_decay is not None and not 0 <= options.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {options.weight_decay}, expected 0 or more")
        if not (0 <= options.beta1 < 1 and 0 <= options.beta2 < 1):
            raise ValueError(f"beta1, beta2: got {options.beta1}, {options.beta2}, expected numbers in [0, 1)")
        if options.precision == "fp8" and options.dtype == "fp32":
            raise ValueError("dtype: got 'fp32' with precision 'fp8', expected 'bf16' or 'auto'")
        if options.sample_every < 0 or (options.warmup or 0) < 0 or options.seed < 0:
            raise ValueError(
                f"sample_every, warmup, seed: got {options.sample_every}, {options.warmup}, {options.seed}, expected 0 "
                "or more"
            )
        return options

    def filled(self, defaults: dict) -> "Options":
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def defaults(self) -> dict:
        objective = self.objective or "ar"
        if self.augment:
            raise ValueError("augment: got it for an Image GPT, expected it with a ViT only")
        require_one_of("objective", objective, OBJECTIVES)
        return {
            "objective": objective, "steps": STEPS.get(self.preset, 1_000_000), "batch": BATCHES.get(self.preset, 128),
            "lr": LEARNING_RATES[self.preset, objective], "beta2": 0.95,
        }  # fmt: skip

    def vit_defaults(self, init: Blocks | None) -> dict:
        objective, model = self.objective or "labels", self.model or preset_of(init)
        require_one_of("objective", objective, VIT_OBJECTIVES)
        for name, default in (("preset", "s"), ("norm", "rms"), ("palette", None)):
            if (got := getattr(self, name)) != default:
                raise ValueError(f"{name}: got {got!r} for a ViT, expected it with an Image GPT only")
        recipe = VIT_TINY if model == "vit-tiny" else VIT_RECIPES[objective]
        warmup = min(VIT_WARMUP, (self.steps or recipe["steps"]) // 10)
        return {"model": model, "objective": objective, "beta2": 0.999, "warmup": warmup, **recipe}


def require_one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {choices}")


def run(options: Options) -> dict:
    init = checkpoint_of(options)
    options = options.resolved(init and init.config)
    if options.tensorboard:
        summary_writer()  # or say now that it is not there
    with processes(options.device) as us:
        micro, rest = divmod(options.batch, us.world * options.accumulate)
        if rest:
            raise ValueError(
                f"batch: got {options.batch}, expected a multiple of {us.world} processes * {options.accumulate} "
                "micro-batches"
            )
        task = task_of(options, us, init)
        if options.sample_every and options.objective == "ar" and task.palette is None and us.first:
            print(f"no sample grids: {options.data} came without a palette", file=sys.stderr)
        with held(options.run, us), stop_signal() as stopped:
            return Training(options, us, micro, task).run(stopped)


@contextmanager
def stop_signal():
    """An event that the first SIGTERM or SIGINT sets; the second one acts as ever."""
    event, before = threading.Event(), {}

    def stop(number, frame):
        event.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
