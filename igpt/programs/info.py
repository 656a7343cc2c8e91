"""The program `igpt info`: what a model costs before it is made, and how it fits on a number of GPUs."""

import math
from dataclasses import dataclass
from typing import Literal

from igpt import convert
from igpt.config import Config, preset
from igpt.model import ImageGPT
from igpt.programs.source import OfRun

GB = 1e9
SAVED = 14  # widths d a token and block that the backward pass needs: h, q k v, attention's output, h, two of 4 d


@dataclass(frozen=True)
class Options(OfRun):
    """Parameters, FLOPs a token, and the memory that training takes on 1 to `gpus` GPUs (FSDP2, bf16 activations)."""

    model: str | None = None  # builtin:emoji, our directory, a run's, Hugging Face's, a hub id, or an OpenAI prefix
    # Without one, a model to come:
    preset: Literal["tiny", "s", "m", "l", "xl"] = "s"
    objective: Literal["ar", "bert"] = "ar"
    size: int | None = None  # pictures are size x size; default: the paper's 32 (xl 64)
    gpus: int = 8
    memory: float = 80.0  # GB a GPU

    def config(self) -> Config:
        size = (64 if self.preset == "xl" else 32) if self.size is None else self.size
        for name, value in (("size", size), ("gpus", self.gpus), ("memory", self.memory)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a positive number")
        return preset(self.preset, objective=self.objective, n_ctx=size * size)


def run(options: Options) -> dict:
    config, known = options.config(), {"preset": options.preset}
    if options.model is not None or options.which is not None:
        if options.model is None or options.size is not None:
            raise ValueError("model, size: expected one of them, and --step or --last with a run only")
        found = convert.open_checkpoint(options.model, options.which)
        known = {"model": options.model, "trained": found.trained and found.trained._asdict()}
        config = found.config
        if not isinstance(config, Config):
            raise ValueError(f"model: {options.model} is a ViT, expected an Image GPT: docs/vit.md has a ViT's figures")
    model = ImageGPT(config, device="meta")
    counts = sorted({options.gpus, *(2**i for i in range(options.gpus.bit_length()) if 2**i <= options.gpus)})
    plans = [plan(model, gpus, options.memory * GB) for gpus in counts]
    print(f"{'GPUs':>5} {'state GB':>9} {'gathered GB':>12} {'GB a picture':>13} {'recomputed':>11} "
          f"{'pictures a GPU':>15} {'recomputed':>11}")  # fmt: skip
    for p in plans:
        print(f"{p['gpus']:>5} {p['state_gb']:>9.2f} {p['gathered_gb']:>12.2f} {p['picture_gb']:>13.3f} "
              f"{p['picture_recompute_gb']:>11.3f} {p['pictures']:>15} {p['pictures_recompute']:>11}")  # fmt: skip
    return {
        **known, "config": config.to_dict(), "parameters": model.num_parameters(),
        "flops_per_token": {"training": model.flops_per_token(), "forward": model.flops_per_token(training=False)},
        "kv_bytes_per_picture": model.kv_bytes_per_token() * config.n_ctx, "memory_gb": options.memory, "plan": plans,
    }  # fmt: skip


def plan(model: ImageGPT, gpus: int, memory: float) -> dict:
    """Bytes a GPU. State: fp32 weights, gradients and Adam's two moments, sharded. Gathered: bf16 weights and gradients
    of the block at work, weights of the next one, and of the embeddings and head; on one GPU a bf16 copy of all
    weights. A tenth of the memory is left to the allocator and to what kernels need for a moment."""
    c = model.config
    total = model.num_parameters()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    state = 16 * total / gpus
    gathered = 2 * total if gpus == 1 else 2 * (3 * block + 2 * (total - c.n_layer * block))
    picture, recomputed = activations(c), activations(c, recompute=True)
    room = 0.9 * memory - state - gathered
    return {
        "gpus": gpus, "state_gb": round(state / GB, 3), "gathered_gb": round(gathered / GB, 3),
        "picture_gb": round(picture / GB, 4), "picture_recompute_gb": round(recomputed / GB, 4),
        "pictures": max(0, int(room // picture)), "pictures_recompute": max(0, int(room // recomputed)),
    }  # fmt: skip


def activations(config: Config, recompute: bool = False) -> float:
    """Bytes that training keeps of one picture, in bf16: SAVED widths of each block (recomputed: its input, and one
    block's all), the final norm's input, and the head's gradient in bf16."""
    c = config
    block = (SAVED - 8) * c.width + 2 * c.inner
    widths = c.n_layer * c.width + block if recompute else c.n_layer * block
    return 2.0 * c.n_ctx * (widths + c.width + c.vocab)
