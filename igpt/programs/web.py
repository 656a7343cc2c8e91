"""The program `igpt web`: complete pictures in the browser while one watches."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from igpt.programs.sampling import drawable
from igpt.programs.source import OfRun
from igpt.web import Server, Studio, probe_of


@dataclass(frozen=True)
class Options(OfRun):
    """Serve a page on this machine: drop or draw a picture, keep its first rows, see the rest being drawn; samples; the
    curve of a linear probe that was written to RUN/probe. Ctrl-C ends it."""

    model: str = "builtin:emoji"  # builtin:emoji, our directory, a run's, Hugging Face's, a hub id, OpenAI's prefix
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the model's own
    host: str = "127.0.0.1"  # another address lets other machines in: whoever reaches it may use the page
    port: int = 7860  # 0: a free one
    device: Literal["auto", "cpu", "cuda"] = "auto"


def run(options: Options) -> dict:
    model, palette, (side, _) = drawable(options.pretrained(options.model, options.device), options)
    if not model.config.causal:
        raise ValueError(f"model: {options.model} is a BERT model, expected an autoregressive one, which can draw")
    # The page is told what the model is called, not where it lies.
    name = Path(options.model).resolve().name if Path(options.model).exists() else options.model
    studio = Studio(model.eval(), palette, side, name, probe_of(options.model))
    with Server(studio, options.host, options.port) as server:
        print(f"igpt web: {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return {"url": server.url, "model": name}
