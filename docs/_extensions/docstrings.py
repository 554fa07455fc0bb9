"""Docstrings in Markdown, on pages that Sphinx's autodoc writes.

Autodoc takes docstrings for reStructuredText. Here each one is handed to the MyST parser instead,
with doctests made code blocks and ``[`name`][]`` made links.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_LINK = re.compile(r"\[`([\w.]+)`\]\[\]")
_BULLET = re.compile(r"^( *)(- )")
_UNDERLINE = re.compile(r" *[-=]{3,} *")


def as_markdown(lines: list[str]) -> list[str]:
    """Lines of a docstring as MyST reads them: fenced doctests, links, lists after a blank."""
    found: list[str] = []
    fenced = listed = False
    for line in lines:
        prompt = line.lstrip().startswith(">>>")
        if prompt and not fenced:
            found += ["", "```pycon"]
            fenced = True
        elif fenced and not line.strip():
            found += ["```", ""]
            fenced = False
        if fenced:
            found.append(line.strip() if prompt else line)
            continue
        if _UNDERLINE.fullmatch(line) and found and found[-1].strip():
            found[-1] = f"**{found[-1].strip()}**"  # a section of an inherited docstring
            found.append("")
            continue
        bullet = _BULLET.match(line)
        if bullet and not listed and found and found[-1].strip():
            found.append("")
        listed = bool(bullet) or (listed and bool(line.strip()))
        found.append(_LINK.sub(r"`\1`", line))
    if fenced:
        found.append("```")
    return found


class MarkdownDocstring(SphinxDirective):
    """The content, parsed as Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of a document of its own."""
        source = self.get_source_info()[0]
        document = new_document(source, self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return list(document.children)


def _wrap(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    if any(line.strip() for line in lines):
        text = [f"   {line}" if line.strip() else "" for line in as_markdown(lines)]
        lines[:] = [".. markdown-docstring::", "", *text, ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("markdown-docstring", MarkdownDocstring)
    app.connect("autodoc-process-docstring", _wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
