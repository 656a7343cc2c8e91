"""Sampling: pictures out of nothing, and the rest of half-seen ones."""

from igpt.sample.generation import complete, decoder_of, generate, log_likelihood, stream

__all__ = ["complete", "decoder_of", "generate", "log_likelihood", "stream"]
