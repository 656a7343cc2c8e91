"""The program `igpt train`: pretraining, on one process or many.

    igpt train --preset s --data imagenet32/ --run runs/s
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

from igpt.config import Config
from igpt.training.loop import Training
from igpt.training.pictures import tokens_of
from igpt.training.processes import processes
from igpt.training.rundir import summary_writer
from igpt.training.start import checkpoint_of, preset_of

# The paper's, at 32x32 (XL: 64x64). It prints .01 for L at 48x48, which looks like a slip. tiny's is ours.
LEARNING_RATES = {
    ("tiny", "ar"): 0.003, ("s", "ar"): 0.003, ("m", "ar"): 0.003, ("l", "ar"): 0.001, ("xl", "ar"): 0.0003,
    ("tiny", "bert"): 0.003, ("s", "bert"): 0.01, ("m", "bert"): 0.003, ("l", "bert"): 0.001, ("xl", "bert"): 0.0003,
}  # fmt: skip
BATCHES = {"tiny": 16, "xl": 64}  # pictures a step; the others 128
STEPS = {"tiny": 1000, "xl": 2_000_000}  # the others 1,000,000


@dataclass(frozen=True)
class Options:
    """Pretrain a model. A run directory that has a checkpoint is resumed, also with more or fewer steps, whose schedule
    the learning rate then follows; one of another configuration is refused. Every program takes the run directory as a
    model at any moment; export/ is the best checkpoint by validation loss. A folder of pictures is encoded once, into
    the run's tokens/.

    `torchrun --nproc-per-node 8 -m igpt -- train ...` shares the batch between 8 processes; their number may change
    between a run and its resumption. SIGTERM and Ctrl-C save a checkpoint and end the run."""

    run: Path  # the run directory: config.json, palette.npy, metrics.jsonl, checkpoints/, samples/, export/ at the end
    data: str = "builtin:emoji"  # builtin:emoji, a folder of pictures, a token set, CIFAR, STL-10, IDX, OpenAI's npy
    init: str | None = None  # a model to start from: a run, our directory, Hugging Face's, a hub id, OpenAI's prefix
    interpolate: bool = False  # its positions, to pictures of another size (bicubic)
    preset: Literal["tiny", "s", "m", "l", "xl"] = "s"  # the model's size; with --init it is the checkpoint's
    objective: Literal["ar", "bert"] = "ar"  # next pixel, or 15% of the pixels hidden
    layers: int | None = None  # default: the preset's
    width: int | None = None  # default: the preset's
    heads: int | None = None  # default: the preset's
    norm: Literal["rms", "layer"] = "rms"  # as OpenAI's code has it (not centred), or as the paper writes it
    size: int | None = None  # pictures become size x size; default: 32, or the token set's own
    holdout: float = 0.1  # part of train that is valid, where the set has no valid of its own (paper's ImageNet: 0.04)
    skip_bad: bool = False  # leave a folder's unreadable pictures out; default: stop at the first
    palette: Path | None = None  # palette.npy or kmeans_centers.npy; default: --init's, the set's own, or one is fitted
    steps: int | None = None  # updates; default: the paper's 1,000,000 (xl 2,000,000; tiny 1000)
    batch: int | None = None  # pictures an update, over all processes; default: the paper's 128 (xl 64; tiny 16)
    lr: float | None = None  # at its peak; default: the paper's for this preset and objective
    warmup: int | None = None  # updates of linear warm-up; default: one epoch, at most a tenth of the run
    optimizer: Literal["adam", "muon"] = "adam"  # muon: of the blocks' matrices, Adam of the rest; training/muon.py
    beta1: float = 0.9  # Adam's, as are the next two
    beta2: float = 0.95
    eps: float = 1e-8  # the paper doesn't say
    clip: float | None = 1.0  # largest gradient norm, None for no clipping; the paper doesn't say
    seed: int = 0  # of the first weights, the order of the pictures and the masks
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 on a GPU, fp32 on a CPU
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

    def resolved(self, init: Config | None = None) -> "Options":
        """With the defaults that depend on other options, and on the model to start from, filled in. Raises ValueError
        for values that make no run."""
        if self.preset == "s" and init is not None and (named := preset_of(init)):
            return replace(self, preset=named).resolved()
        steps = STEPS.get(self.preset, 1_000_000) if self.steps is None else self.steps
        tenth = max(1, steps // 10)
        filled = {
            "steps": steps, "batch": BATCHES.get(self.preset, 128), "save_every": min(tenth, 1000),
            "lr": LEARNING_RATES[self.preset, self.objective], "valid_every": tenth, "sample_every": tenth,
        }  # fmt: skip
        options = replace(self, **{k: v for k, v in filled.items() if getattr(self, k) is None})
        for name in (
            "steps", "batch", "accumulate", "log_every", "save_every", "valid_every", "valid_pictures", "keep",
        ):  # fmt: skip
            if getattr(options, name) < 1:
                raise ValueError(f"{name}: got {getattr(options, name)}, expected at least 1")
        for name in ("lr", "eps"):
            if not 0 < getattr(options, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(options, name)}, expected a positive number")
        if options.clip is not None and not options.clip > 0:
            raise ValueError(f"clip: got {options.clip}, expected a positive number or None")
        if not (0 <= options.beta1 < 1 and 0 <= options.beta2 < 1):
            raise ValueError(f"beta1, beta2: got {options.beta1}, {options.beta2}, expected numbers in [0, 1)")
        if options.sample_every < 0 or (options.warmup or 0) < 0 or options.seed < 0:
            raise ValueError(
                f"sample_every, warmup, seed: got {options.sample_every}, {options.warmup}, {options.seed}, expected 0 "
                "or more"
            )
        return options


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
        train, valid = tokens_of(options, us, init)
        if options.sample_every and options.objective == "ar" and train.palette is None and us.first:
            print(f"no sample grids: {options.data} came without a palette", file=sys.stderr)
        with stop_signal() as stopped:
            return Training(options, us, micro, train, valid.rows(slice(options.valid_pictures)), init).run(stopped)


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
