"""Sphinx's settings. `make docs` builds the site into out/site, with every warning an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "hyperframe"
author = "The hyperframe authors"
copyright = "the hyperframe authors, Apache-2.0"
version = release = re.findall(
    r'^version = "(.*)"', (HERE.parent / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "modules_of",
    "commands_of",
    "docstrings",
    "page_titles",
]
exclude_patterns = ["_*", "images", "results", "Thumbs.db"]
nitpicky = True
# docstrings write `name` for code, as Markdown does
default_role = "literal"

# ------------------------------------------------------------------------------------ the pages

# a browser without a network shows formulas as TeX; to build the site none is needed
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_dmath_allow_space = myst_dmath_allow_digits = False
# the anchors that GitHub gives to headings
myst_heading_anchors = 4
# a table of five columns on a phone scrolls by itself, see _static/site.css
html_theme = "furo"
html_title = f"hyperframe {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#a8322d", "color-brand-content": "#a8322d"},
    "dark_css_variables": {"color-brand-primary": "#ff8f88", "color-brand-content": "#ff8f88"},
}
# blocks of four spaces are what a command prints, or a command line
highlight_language = "text"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"

# ------------------------------------------------------------------------------ the API reference

autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
# types stand beside the arguments' descriptions, and signatures stay readable
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
add_module_names = False
# pages list modules and components, not every argument's attribute
toc_object_entries = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
napoleon_preprocess_types = False
# the library's own code is shown, and nobody else's
viewcode_follow_imported_members = True

# other projects' types have no page here; an inventory of theirs would have to be fetched
nitpick_ignore_regex = [
    ("py:.*", r"(abc|argparse|collections|contextlib|enum|pathlib|numbers)\..*"),
    ("py:.*", r"(numpy|np|torch|transformers|typer|hypothesis|st)\..*"),
    # values of a Literal
    ("py:class", r"'.*'"),
    # type variables and other private names of annotations
    ("py:.*", r"~?([\w.]+\.)?_\w+"),
    # names that an annotation keeps short: it can't be evaluated, or they live in private modules
    ("py:class", r"nn\.Module|[A-Z]\w+"),
]
# classes of one name in several modules: an annotation that can't be evaluated finds them all
suppress_warnings = ["ref.python"]
