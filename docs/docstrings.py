"""What our docstrings say, in Markdown: an extension of griffe, which reads them for mkdocstrings.

They have doctests without a section around them, formulas as ``.. math::`` and roles such as
``:class:``. Read as Markdown these would be quotations and bare words.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|(?=\n\1 )))*)", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`")
_FORMULA_ROLE = re.compile(r":math:`([^`]+)`")


class DocstringsAsMarkdown(griffe.Extension):
    """Rewrites every docstring as soon as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return a docstring with sections around its doctests, and code in place of roles."""

    def section(found: re.Match[str]) -> str:
        return "Examples:\n" + textwrap.indent(found[0], "    ")

    def block(found: re.Match[str]) -> str:
        lines = textwrap.dedent(found[2]).strip()
        return textwrap.indent(f"```\n{lines}\n```", found[1])

    text = _FORMULA.sub(block, docstring)
    text = _FORMULA_ROLE.sub(r"`\1`", text)
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _DOCTEST.sub(section, text)
