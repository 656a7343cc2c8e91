"""The training loop (paper section 2 and appendix), on one process or many.

A step is a function of (configuration, step, weights and optimiser state): which pictures, which masks, which learning
rate. So a run that was killed goes on from its last checkpoint as if nothing had happened. On one GPU a step
is a CUDA graph (graphed.py).
"""

import math
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from igpt import convert
from igpt.kernels import checks
from igpt.machine import peak_flops
from igpt.sample import batch_of, generate, grid
from igpt.training import graphed, muon
from igpt.training.checkpoint import Checkpoints
from igpt.training.order import Order
from igpt.training.processes import Processes, build, whole
from igpt.training.rundir import Metrics, claim
from igpt.training.tasks import Pixels, Tokens

SAMPLES = 16  # pictures in a grid during training
RESULTS = ("loss", "valid_loss", "valid_accuracy")
# What a resumed run may change beside its length: none of it moves the loss by more than rounding.
FREE = {
    "run", "accumulate", "recompute", "impl", "device", "log_every", "save_every", "keep", "valid_every",
    "valid_pictures", "sample_every", "tensorboard", "skip_bad", "interpolate",
}  # fmt: skip


class Training:
    """One process's part of a run. `options`: those of `igpt train` (igpt/programs/train.py), resolved."""

    def __init__(self, options, us: Processes, micro: int, task: Tokens | Pixels):
        self.options, self.us, self.micro, self.task, self.config = options, us, micro, task, task.config
        fp8 = options.precision == "fp8"
        self.bf16 = options.dtype == "bf16" or (options.dtype == "auto" and (fp8 or us.device.type == "cuda"))
        if fp8:
            matrices = [p for p in task.kind(task.config, device="meta").blocks.parameters() if p.dim() == 2]
            checks.fp8("precision", torch.empty(0, dtype=torch.bfloat16, device=us.device), *matrices)
        pictures = len(task.train)
        epoch = math.ceil(pictures / options.batch)
        self.warmup = min(epoch, options.steps // 10) if options.warmup is None else options.warmup
        self.order = Order(pictures, options.batch, options.seed)
        if us.first:
            claim(options.run, self.identity())
            if task.palette is not None:
                task.palette.save(options.run / "palette.npy")
        us.wait()
        self.checkpoints = Checkpoints(options.run / "checkpoints", us, options.keep)
        self.model = build(task.kind, task.config, us, impl=options.impl, bf16=self.bf16, fill=task.fill)
        self.model.recompute, self.model.fp8 = options.recompute, fp8
        self.model.palette, self.model.class_names = task.palette, task.classes
        self.optimizers = self.make_optimizers()
        how = self.loss, self.optimizers, options.accumulate, options.clip
        self.step = graphed.stepper(*how, us, self.model.set_requires_gradient_sync if us.world > 1 else None)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam, for all parameters or for those that Muon leaves."""
        options = self.options
        matrices = muon.groups(self.model) if options.optimizer == "muon" else []
        taken = {p for group in matrices for p in group["params"]}
        on_gpu = graphed.possible(self.us.device)
        rest = [p for p in self.model.parameters() if p not in taken]
        if options.weight_decay:
            decayed, as_is = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() == 1]
            rest = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": as_is}]
        adam = torch.optim.Adam(
            rest, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, decoupled_weight_decay=True,
            fused=on_gpu, capturable=on_gpu,
        )  # fmt: skip
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return [adam, muon.Muon(matrices, options.lr, dtype=dtype)] if matrices else [adam]

    def identity(self) -> dict:
        """What config.json says: all that decides the run's losses."""
        asked = {k: v for k, v in asdict(self.options).items() if k not in FREE}
        asked["palette"] = None if self.task.palette is None else self.task.palette.fingerprint
        asked["augment"] = self.options.augment or None  # runs from before it go on
        pictures = len(self.task.train)
        return {"model": self.config.to_dict(), "train": {**asked, "warmup": self.warmup, "pictures": pictures}}

    def run(self, stopped: threading.Event) -> dict:
        options = self.options
        start = self.checkpoints.load(self.model, self.optimizers)
        flops = self.task.kind(self.config, device="meta").flops_per_picture()
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
        result = {"run": str(options.run), "step": step, **{k: v for k, v in self.metrics.last.items() if k in RESULTS}}
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
        draws = (t[mine] for t in self.task.draws(len(rows), options.seed, step))
        figures = self.step(*self.task.inputs(self.task.train, rows, options.seed, step, mine=mine), *draws)
        asked = torch.full((1,), float(stop), device=us.device)
        return graphed.to_host(us.sum(torch.cat([figures / us.world, asked])))

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.called(self.model.loss, *batch)

    def called(self, function: Callable, *batch: torch.Tensor) -> torch.Tensor:
        """Of a batch, brought to the device, in the dtype of the activations."""
        device = self.us.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return function(*(t.to(device, non_blocking=True) for t in batch))

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
                figures = self.validated()
                loss = figures["valid_loss"]
                self.require_finite(step, {"validation loss": loss})
                self.metrics.write(step, figures)
            if options.sample_every and self.config.causal and (step % options.sample_every == 0 or last):
                self.sample(step)
        is_best = loss is not None and loss < self.checkpoints.lowest
        if step % options.save_every == 0 or last or stop or is_best:
            self.metrics.sync()
            self.checkpoints.start(step, self.model, self.optimizers, loss)

    @torch.no_grad()
    def validated(self) -> dict[str, float]:
        """The task's measures of the validation pictures, the same however many processes share them."""
        task, us, n = self.task, self.us, len(self.task.valid)
        weighted = torch.zeros(len(task.measures), device=us.device, dtype=torch.float64)
        draws = task.draws(n, self.options.seed)
        # Processes take micro-batches in turn; one that has none left computes along, as FSDP needs all, and adds 0.
        for first in range(0, n, self.micro * us.world):
            start = first + us.rank * self.micro
            part = slice(start, start + self.micro) if start < n else slice(0, self.micro)
            batch = *task.inputs(task.valid, np.arange(n), mine=part), *(t[part] for t in draws)
            figures = self.called(lambda *batch: task.measure(self.model, *batch), *batch)
            weighted += figures * max(0, min(self.micro, n - start))
        return dict(zip(task.measures, (us.sum(weighted) / n).tolist()))

    def sample(self, step: int) -> None:
        """A grid of samples, the same noise each time."""
        model = whole(self.model, self.us)
        if model is not None and self.task.palette is not None:
            weights = "bf16" if self.bf16 else None
            batch = batch_of(model, SAMPLES, weights=weights)  # memory too small for a grid ends no run
            tokens = [
                generate(model, min(batch, SAMPLES - first), first=first, seed=self.options.seed, weights=weights).cpu()
                for first in range(0, SAMPLES, batch)
            ]
            pictures = self.task.palette.decode(torch.cat(tokens), self.task.train.size)
            path = self.options.run / "samples" / f"step-{step:07d}.png"
            grid.save(path, pictures, columns=math.isqrt(SAMPLES), scale=4)
        self.us.wait()

    def export(self) -> dict:
        """The best checkpoint as a directory of its own, with its palette, for every other program."""
        path, written = self.options.run / "export", None
        if self.us.first:
            written = convert.convert(self.options.run, path)["trained"]
        return {"export": str(path), "exported": self.us.from_first(written)}
