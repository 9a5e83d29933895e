"""Train a vision-language model with SPARK: one model that is policy and generative reward (arXiv 2509.22624)."""

__version__ = "0.1.0"
