"""Links as they work in a checkout, made to work in the site.

A link that reads `page.md`, as it does in an editor, is shown with the page's title; one to a
Markdown file that is no page of the site gives the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def _adapt(app: Sphinx, doctree: nodes.document) -> None:
    for link in list(doctree.findall(addnodes.pending_xref)):
        target = Path(f"{link.get('reftarget', '')}.md")
        if link.get("refdomain") == "doc" and target.is_absolute() and target.exists():
            folder = Path(app.env.doc2path(app.env.docname)).parent
            file = addnodes.download_reference(
                "", "", *link.children, reftarget=os.path.relpath(target, folder),
                refdoc=app.env.docname,
            )  # fmt: skip
            link.replace_self(file)
        elif re.fullmatch(r"[\w./-]+\.md", link.astext()):
            link["refexplicit"] = False
            for child in list(link.children):
                link.remove(child)
            link += nodes.inline("", "", classes=["xref"])


def setup(app: Sphinx) -> dict[str, Any]:
    # before downloads are collected
    app.connect("doctree-read", _adapt, priority=100)
    return {"parallel_read_safe": True}
