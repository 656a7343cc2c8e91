"""The training loop (paper section 2 and appendix), on one process or many.

A step is a function of (configuration, step, weights and optimiser state): which pictures, which BERT masks, which
learning rate. So a run that was killed goes on from its last checkpoint as if nothing had happened. On one GPU a step
is a CUDA graph (graphed.py).
"""

import math
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from igpt import convert, data
from igpt.machine import peak_flops
from igpt.model import MASK_PROBABILITY, ImageGPT
from igpt.sample import generate, grid
from igpt.training import graphed, muon
from igpt.training.checkpoint import Checkpoints
from igpt.training.order import Order
from igpt.training.processes import Processes, build, whole
from igpt.training.rundir import Metrics, claim, keep_palette
from igpt.training.start import config_of, fill

SAMPLES = 16  # pictures in a grid during training
# What a resumed run may change beside its length: none of it moves the loss by more than rounding.
FREE = {
    "run", "accumulate", "recompute", "impl", "device", "log_every", "save_every", "keep", "valid_every",
    "valid_pictures", "sample_every", "tensorboard", "skip_bad", "interpolate",
}  # fmt: skip


class Training:
    """One process's part of a run. `options`: those of `igpt train` (igpt/programs/train.py), resolved."""

    def __init__(
        self, options, us: Processes, micro: int, train: data.Pictures, valid: data.Pictures,
        init: convert.Checkpoint | None = None,
    ):  # fmt: skip
        self.options, self.us, self.micro, self.train, self.valid = options, us, micro, train, valid
        self.config = config_of(options, init, train)
        self.bf16 = options.dtype == "bf16" or (options.dtype == "auto" and us.device.type == "cuda")
        epoch = math.ceil(len(train) / options.batch)
        self.warmup = min(epoch, options.steps // 10) if options.warmup is None else options.warmup
        self.order = Order(len(train), options.batch, options.seed)
        if us.first:
            claim(options.run, self.identity())
            keep_palette(options.run, train.palette)
        us.wait()
        self.checkpoints = Checkpoints(options.run / "checkpoints", us, options.keep)
        first = partial(fill, init=init, size=train.size, seed=options.seed)
        self.model = build(self.config, us, impl=options.impl, bf16=self.bf16, fill=first)
        self.model.recompute, self.model.palette = options.recompute, train.palette
        self.optimizers = self.make_optimizers()
        how = self.loss, self.optimizers, options.accumulate, options.clip
        self.step = graphed.stepper(*how, us, self.model.set_requires_gradient_sync if us.world > 1 else None)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam, for all parameters or for those that Muon leaves."""
        options = self.options
        matrices = muon.groups(self.model) if options.optimizer == "muon" else []
        taken = {p for group in matrices for p in group["params"]}
        on_gpu = graphed.possible(self.us.device)
        adam = torch.optim.Adam(
            [p for p in self.model.parameters() if p not in taken], lr=options.lr,
            betas=(options.beta1, options.beta2), eps=options.eps, fused=on_gpu, capturable=on_gpu,
        )  # fmt: skip
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return [adam, muon.Muon(matrices, options.lr, dtype=dtype)] if matrices else [adam]

    def identity(self) -> dict:
        """What config.json says: all that decides the run's losses."""
        asked = {k: v for k, v in asdict(self.options).items() if k not in FREE}
        asked["palette"] = None if self.train.palette is None else self.train.palette.fingerprint
        return {"model": self.config.to_dict(), "train": {**asked, "warmup": self.warmup, "pictures": len(self.train)}}

    def run(self, stopped: threading.Event) -> dict:
        options = self.options
        start = self.checkpoints.load(self.model, self.optimizers)
        flops = ImageGPT(self.config, device="meta").flops_per_token() * self.config.n_ctx
        peak = peak_flops(self.us.device)
        self.metrics = Metrics(
            options.run, start, options.steps, on=self.us.first, flops_a_picture=flops,
            peak=peak and peak * self.us.world, tensorboard=options.tensorboard,
        )  # fmt: skip
        every = [n for n in (options.save_every, options.valid_every, options.sample_every) if n]
        if self.us.first and start > options.steps:
            print(f"{options.run} is at step {start} already: nothing is trained", file=sys.stderr)
        step, queued, stop = start, None, False
        try:
            while step < options.steps and not stop:
                step += 1
                statistics = self.update(step, stopped.is_set())
                # A GPU's figures are read when the next step has been launched, so that it never waits for us.
                if queued is not None:
                    stop = self.report(*queued)
                queued = step, statistics
                due = stop or step == options.steps or any(step % n == 0 for n in every)
                if due or self.us.device.type == "cpu":
                    stop, queued = self.report(*queued) or stop, None
                if due or stop:
                    self.look(step, stop)
                self.checkpoints.poll()
            self.checkpoints.poll(wait=True)
        finally:
            self.metrics.close()
        result = {"run": str(options.run), "step": step, **{k: v for k, v in self.metrics.last.items() if "loss" in k}}
        if step < options.steps:
            return {**result, "stopped": "by a signal; the same command goes on"}
        return {**result, **self.export()}

    def update(self, step: int, stop: bool) -> Callable[[], list[float]]:
        """One optimiser step. Gives [loss, gradient norm, processes asked to stop] over all, read when it is called."""
        options, us = self.options, self.us
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.lr(step)
        rows = self.order.rows(step - 1)
        mine = slice(us.rank * len(rows) // us.world, (us.rank + 1) * len(rows) // us.world)
        masks = (m[mine] for m in self.masks(len(rows), options.seed, step))
        figures = self.step(torch.from_numpy(self.train.tokens[rows[mine]].astype(np.int64)), *masks)
        asked = torch.full((1,), float(stop), device=us.device)
        return graphed.to_host(us.sum(torch.cat([figures / us.world, asked])))

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        device = self.us.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.loss(*(t.to(device, non_blocking=True) for t in batch))

    def masks(self, pictures: int, *seed: int) -> list[torch.Tensor]:
        """BERT's masks of a whole batch, the same however many processes share it; none for a causal model."""
        if self.config.causal:
            return []
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return [torch.rand(pictures, self.config.n_ctx, generator=generator) < MASK_PROBABILITY]

    def lr(self, step: int) -> float:
        """Of update `step` = 1, 2, ...: linear warm-up, then a cosine that would reach 0 after the last."""
        peak, steps, done = self.options.lr, self.options.steps, step - 1
        if done < self.warmup:
            return peak * step / self.warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (steps - self.warmup)))

    def report(self, step: int, statistics: Callable[[], list[float]]) -> bool:
        """Log a finished step; whether to stop. Raises FloatingPointError for figures that are not finite."""
        loss, norm, stop = statistics()
        self.metrics.count(self.options.batch)
        self.require_finite(step, {"loss": loss, "gradient norm": norm})
        if step % self.options.log_every == 0 or step in (1, self.options.steps):
            self.metrics.trained(step, {"loss": loss, "lr": self.lr(step), "grad_norm": norm})
        return stop > 0

    def require_finite(self, step: int, figures: dict) -> None:
        if not all(map(math.isfinite, figures.values())):
            self.checkpoints.poll(wait=True)
            said = ", ".join(f"{name} {value}" for name, value in figures.items())
            raise FloatingPointError(
                f"step {step}: {said}; the last good checkpoint is {self.checkpoints.latest() or 'none'}"
            )

    def look(self, step: int, stop: bool) -> None:
        """What is due between two steps: validation, samples, a checkpoint."""
        options, last, loss = self.options, step == self.options.steps, None
        with self.metrics.apart():
            if step % options.valid_every == 0 or last:
                loss = self.valid_loss()
                self.require_finite(step, {"validation loss": loss})
                self.metrics.validated(step, loss)
            if options.sample_every and self.config.causal and (step % options.sample_every == 0 or last):
                self.sample(step)
        is_best = loss is not None and loss < self.checkpoints.lowest
        if step % options.save_every == 0 or last or stop or is_best:
            self.metrics.sync()
            self.checkpoints.start(step, self.model, self.optimizers, loss)

    @torch.no_grad()
    def valid_loss(self) -> float:
        """Over the validation pictures, the same however many processes share them."""
        n, us, weighted = len(self.valid), self.us, torch.zeros((), device=self.us.device, dtype=torch.float64)
        masks = self.masks(n, self.options.seed)
        # Processes take micro-batches in turn; one that has none left computes along, as FSDP needs all, and adds 0.
        for first in range(0, n, self.micro * us.world):
            start = first + us.rank * self.micro
            part = slice(start, start + self.micro) if start < n else slice(0, self.micro)
            loss = self.loss(torch.from_numpy(self.valid.tokens[part].astype(np.int64)), *(m[part] for m in masks))
            weighted += loss * max(0, min(self.micro, n - start))
        return float(us.sum(weighted)) / n

    def sample(self, step: int) -> None:
        """A grid of samples, the same noise each time."""
        model = whole(self.model, self.us)
        if model is not None and self.train.palette is not None:
            weights = "bf16" if self.bf16 else None
            tokens = generate(model, SAMPLES, seed=self.options.seed, weights=weights).cpu()
            pictures = self.train.palette.decode(tokens, self.train.size)
            path = self.options.run / "samples" / f"step-{step:07d}.png"
            grid.save(path, pictures, columns=math.isqrt(SAMPLES), scale=4)
        self.us.wait()

    def export(self) -> dict:
        """The best checkpoint as a directory of its own, with its palette, for every other program."""
        path, written = self.options.run / "export", None
        if self.us.first:
            written = convert.convert(self.options.run, path)["trained"]
        return {"export": str(path), "exported": self.us.from_first(written)}
