"""One process or many: who we are, how a model is sharded over us, and how it is whole again.

Alone, a model is a plain module. Under torchrun, FSDP2 shards every block and the root over all processes, GPUs with
NCCL or CPUs with gloo; gradients are means over the processes, so the losses are those of one process.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from igpt.config import Blocks
from igpt.machine import device_of
from igpt.model import ImageGPT, Transformer

# A block's output may be a view. Nothing of ours writes into one in place, which is what FSDP2 warns of.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device
    mesh: Any = None  # of all processes, for FSDP2; None alone
    checkpoint_group: Any = None  # gloo: checkpoints are written by a thread, beside the training's own collectives

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place, over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def wait_for_first(self) -> None:
        """However long the first process has work that the others leave to it."""
        if self.world > 1:
            dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=7)))

    def from_first(self, value):
        """The first process's `value` (any small object), in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone; device "auto", "cpu" or "cuda".

    Raises ValueError for "cuda" without a GPU."""
    cuda = device_of(device).type == "cuda"
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if world == 1:
        yield Processes(0, 1, here)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=here if cuda else None)
    try:
        mesh = init_device_mesh(here.type, (world,))
        yield Processes(rank, world, here, mesh, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def build(
    kind: type[Transformer], config: Blocks, us: Processes, *, impl: str, bf16: bool,
    fill: Callable[[Transformer], None],
) -> Transformer:  # fmt: skip
    """A model with the weights that `fill` gives it, sharded where we are many: then the first process's count."""

    def whole_model():
        model = kind(config, impl=impl, device="cpu")
        fill(model)
        return model

    if us.world == 1:
        return whole_model().to(us.device)
    # bf16 parameters travel in the all-gather, gradients are summed in fp32; the sharded master copy is fp32.
    dtypes = (torch.bfloat16, torch.float32) if bf16 else ()
    # The stream has its dtype from the embedding, and what goes beside it (squares) is fp32 to stay.
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)
    model = kind(config, impl=impl, device="meta")
    for block in model.blocks:
        fully_shard(block, mesh=us.mesh, mp_policy=policy)
    fully_shard(model, mesh=us.mesh, mp_policy=policy)
    for method in kind.entered_by:
        register_fsdp_forward_method(model, method)
    model.to_empty(device=us.device)
    state = whole_model().state_dict() if us.first else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def whole(model: ImageGPT, us: Processes) -> ImageGPT | None:
    """The model with all its weights, in the first process; None in the others, which must call this too."""
    if us.world == 1:
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not us.first:
        return None
    plain = ImageGPT(model.config, impl=model.impl, device="meta")
    plain.load_state_dict(state, assign=True)
    return plain.to(us.device)
