"""Sampling: pictures out of nothing, and the rest of half-seen ones."""

from igpt.sample.decoder import batch_of
from igpt.sample.generation import complete, decoder_of, generate, log_likelihood, stream

__all__ = ["batch_of", "complete", "decoder_of", "generate", "log_likelihood", "stream"]
