"""A whole training step as one CUDA graph: the host launches a step, not its thousand kernels.

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True, capturable=True)
    step = igpt.graphed(model.loss, optimizer, clip=1.0)
    for tokens in batches:                        # all of one shape
        loss, norm = step(tokens)                 # on the GPU; reading them (loss.item()) waits for the step

A graph repeats the launches of the step it was captured from, on the same addresses: what a step reads has its fixed
place, and is brought there before a replay. Kernels and their order are those of the step run as it is, so losses are
the same to the bit, and a checkpoint of either goes on as the other.
"""

import gc
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

# Calls that run as they are before the capture, on its stream: the first compiles the kernels, has the libraries
# allocate their workspaces and the optimizer make its state; the second finds all of that there, as every later one.
WARM_UP = 2


class CaptureError(RuntimeError):
    """A step did what no CUDA graph can hold."""


def graphed(
    loss: Callable, optimizers, *, accumulate: int = 1, clip: float | None = None,
    otherwise: Callable[[str], None] | None = None,
) -> "Graphed":  # fmt: skip
    """A call that trains: step(*batch) is loss(*part).backward() of each of `accumulate` equal parts of the batch (its
    tensors' first dimension), the gradient clipped to the norm `clip`, and a step of each optimizer (one or a list).
    Returns fp32 [the parts' mean loss, gradient norm before clipping], (2,) on the GPU, a tensor of its own.

    The first two calls run as they are, the third is captured, and from then on a call is one launch. Batches may lie
    on the CPU: they are copied beside the step before. Learning rates are read from the optimizers' groups in every
    call, as fp32, so schedulers work. What a graph asks of the loop around it:

    - every batch has the shapes and dtypes of the first (drop_last=True in a DataLoader);
    - Python in `loss` runs in the first three calls only: no host reads (.item(), print(tensor), boolean indexing), no
      branch on data, no counters. Random draws on the GPU go on, but are not those of a step without a graph;
    - parameters, the optimizers' state and their options but the learning rate stay what and where they are: load
      checkpoints and move or convert the model before the first call, or call `graphed` anew;
    - gradients are None between calls; autocast, to bf16 and without a scaler, is entered inside of `loss`;
    - a pinned batch may be written to only when its step is done.

    otherwise: called once with the reason if the step can't be captured; all steps then run as they are. Without it
    that raises CaptureError (a RuntimeError). Raises ValueError for parameters that aren't on one GPU, optimizers
    without capturable=True, and calls against these rules."""
    return Graphed(loss, optimizers, accumulate, clip, otherwise)


def possible(device: torch.device) -> bool:
    return device.type == "cuda"


def said(batch) -> list:
    return [f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__ for t in batch]


def train_step(
    loss: Callable, optimizers, accumulate: int, clip: float | None, batch, sync: Callable[[bool], None] | None = None
) -> torch.Tensor:
    """One update: [loss, gradient norm before clipping]. sync: told before each micro-batch whether it is the last, for
    FSDP2's set_requires_gradient_sync."""
    total = 0.0
    for i, part in enumerate(zip(*(t.chunk(accumulate) for t in batch), strict=True), 1):
        if sync is not None:
            sync(i == accumulate)
        share = loss(*part) / accumulate
        share.backward()
        total = total + share.detach()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([total, norm.full_tensor() if isinstance(norm, DTensor) else norm])


def stepper(loss: Callable, optimizers, accumulate: int, clip: float | None, us, sync: Callable | None) -> Callable:
    """The step that these processes (processes.py) run best: a graph, or as it is, which a GPU's user is
    told once."""

    def say(why: str) -> None:
        if us.first:
            print(f"no CUDA graph of a step: {why}", file=sys.stderr)

    if us.world == 1 and possible(us.device):
        return Graphed(loss, optimizers, accumulate, clip, say)
    if possible(us.device):
        say(f"FSDP2 shards the model over {us.world} processes")
    return lambda *batch: train_step(loss, optimizers, accumulate, clip, batch, sync)


def why_not(error: RuntimeError) -> str:
    """A capture's error in words. Apart from where it is caught: a variable there that holds it would be a cycle, and
    keep the broken graph's memory."""
    cause = error.__context__ or error  # ending the capture raises an error of its own
    return (
        f"the step could not be captured ({type(cause).__name__}: {str(cause).partition(chr(10))[0]}); most often "
        "the loss reads the GPU from the host (.item(), .tolist(), print, boolean indexing) or copies to it: do that "
        "outside of the loss, and hand tensors in with the batch"
    )


def to_host(figures: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy; the result gives the figures, and waits for them but not for what was launched after them."""
    if figures.device.type == "cpu":
        return figures.tolist
    here, copied = figures.to("cpu", non_blocking=True), torch.cuda.Event()  # to pinned memory
    copied.record()

    def read():
        copied.synchronize()
        return here.tolist()

    return read


class Graphed:
    """What `graphed` returns. `warm_up`: calls that are still to run as they are."""

    def __init__(self, loss: Callable, optimizers, accumulate: int, clip: float | None, otherwise=None):
        if accumulate < 1 or not (clip is None or clip > 0):
            raise ValueError(f"accumulate, clip: got {accumulate}, {clip}, expected at least 1, and above 0 or None")
        self.loss, self.accumulate, self.clip, self.otherwise, self.warm_up = loss, accumulate, clip, otherwise, WARM_UP
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        parameters = [p for group in self.groups for p in group["params"]]
        self.device = parameters[0].device
        if {(p.device, type(p) is DTensor) for p in parameters} != {(self.device, False)} or not possible(self.device):
            kinds = sorted({f"{type(p).__name__} on {p.device}" for p in parameters})
            raise ValueError(f"optimizers: got {', '.join(kinds)}, expected parameters on one GPU, not sharded")
        if not all(group.get("capturable", True) for group in self.groups):
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise ValueError(f"optimizers: got {names} with capturable=False, expected capturable=True")
        self.aside, self.taken = torch.cuda.Stream(self.device), torch.cuda.Event()
        self.inputs = self.rates = self.figures = self.graph = self.captured = None

    @property
    def groups(self) -> list[dict]:
        """As they are now: load_state_dict makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        self.refill(batch)
        if self.graph is None and self.warm_up == 0:
            try:
                self.capture()
            except CaptureError as error:
                if self.otherwise is None:
                    raise
                self.otherwise(str(error))
                self.warm_up = math.inf
        if self.graph is None:
            self.warm_up -= 1
            self.run()
        else:
            self.require_unchanged()
            self.graph.replay()
        return self.figures.clone()

    def refill(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Batch and learning rates to their places. A batch comes from the host on the side stream, under the last
        replay; only the copy from there to its place, within the GPU's memory, waits for the replay's end. The next one
        comes when that copy is done, so it may come to the same memory."""
        main, got = torch.cuda.current_stream(self.device), said(batch)
        if self.inputs is None:
            fits = [isinstance(t, torch.Tensor) and t.dim() and not len(t) % self.accumulate for t in batch]
            if not fits or not all(fits):
                raise ValueError(f"batch: got {got}, expected tensors of a multiple of {self.accumulate} rows")
            self.inputs = [torch.empty_like(t, device=self.device) for t in batch]
            self.rates = [torch.zeros((), device=self.device) for _ in self.groups]
            self.figures = torch.zeros(2, device=self.device)
        if got != (want := said(self.inputs)):
            raise ValueError(
                f"batch: got {got}, expected {want} as in the first call: drop or pad a last, smaller batch, or call "
                "igpt.graphed again for another shape"
            )
        self.aside.wait_event(self.taken)
        with torch.cuda.stream(self.aside):
            fresh = [t.pin_memory().to(self.device, non_blocking=True) if t.device.type == "cpu" else t for t in batch]
        main.wait_stream(self.aside)
        for place, t in zip(self.inputs, fresh):
            place.copy_(t)
        self.taken.record(main)
        for rate, group in zip(self.rates, self.groups):
            rate.fill_(group["lr"])

    def step(self) -> None:
        self.forget()
        self.figures.copy_(train_step(self.loss, self.optimizers, self.accumulate, self.clip, self.inputs))

    def forget(self) -> None:
        """Gradients: one that lay there would be added to by every replay."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def run(self) -> None:
        """The step as it is."""
        main = torch.cuda.current_stream(self.device)
        self.aside.wait_stream(main)
        with self.on_the_side():
            self.step()
        main.wait_stream(self.aside)

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # what dead cycles hold would be missing in the graph's memory, or be freed during the capture
        try:
            # The other threads' calls (a loader that pins memory) are no part of the step.
            with self.on_the_side(), torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as error:
            raise CaptureError(why_not(error)) from error
        finally:
            self.forget()
        self.graph, self.captured = graph, self.holds()

    @contextmanager
    def on_the_side(self):
        """On the side stream, learning rates read from the GPU's memory. (torch.cuda.graph leaves its stream current
        when a capture fails; here the former one comes back.)"""
        groups = self.groups
        before = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            with torch.cuda.stream(self.aside):
                yield
        finally:
            for group, rate in zip(groups, before):
                group["lr"] = rate

    def holds(self) -> dict[str, list]:
        """What a graph has the addresses of, or as constants."""
        parameters, state, options = [], [], []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                options.append({k: v for k, v in group.items() if k != "params" and "lr" not in k})
                for p in group["params"]:
                    parameters.append((p.data_ptr(), p.dtype))
                    state += [t.data_ptr() for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
        return {"parameters": parameters, "optimizers' state": state, "optimizers' options": options}

    def require_unchanged(self) -> None:
        for (name, now), then in zip(self.holds().items(), self.captured.values()):
            if now != then:
                raise ValueError(
                    f"{name}: not what the graph was captured with: after model.to(), load_state_dict of an optimizer, "
                    "an assignment to a parameter's data or a change of options call igpt.graphed again"
                )
