"""Train Qwen2.5-VL with SPARK: one model that is policy and generative reward (arXiv 2509.22624)."""

__version__ = "0.1.0"
