"""The demo: questions about pairs of handwritten digits, and a Qwen2.5-VL small enough to learn them on a laptop."""
