"""Prints docs/api.md from the docstrings: `python scripts/docs_api.py > docs/api.md`."""

from __future__ import annotations

import inspect
from textwrap import fill
from typing import Any

import spark_vl

HEAD = """# Public API

What `from spark_vl import …` gives, with signatures and the first paragraph of each docstring; the docstrings say more:
`help(spark_vl.verify)`. Written by `scripts/docs_api.py`, not by hand. What has a module of its own is imported from
there: `spark_vl.recycle.recycle`, `spark_vl.hub.publish_model`.
"""


def signature(name: str, value: Any) -> str:
    """`value` as it is called, one parameter a line where it does not fit into one."""
    found = inspect.signature(value)
    parts: list[str] = []
    keyword_only = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("<factory>", "…")
        parts.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    end = "" if inspect.isclass(value) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def page() -> str:
    """The text of docs/api.md."""
    blocks = [HEAD]
    for module, names in spark_vl.PUBLIC.items():
        blocks.append(f"## {module}\n")
        for name in names:
            value = getattr(spark_vl, name)
            about = fill(" ".join(inspect.getdoc(value).partition("\n\n")[0].split()), 120)
            blocks.append(f"### {name}\n\n```python\n{signature(name, value)}\n```\n\n{about}\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    print(page(), end="")
