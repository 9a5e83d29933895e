"""How recycled prompts are worded and how their replies are read."""

from .templater import REASONING_SUFFIX, Rendered, Template, Templater

__all__ = ["REASONING_SUFFIX", "Rendered", "Template", "Templater"]
