"""How Sphinx makes the documentation: `make docs`."""

import re
from pathlib import Path

import kvmmu

project = "kvmmu"
author = "the kvmmu authors"
project_copyright = "the kvmmu authors, Apache-2.0"
version = release = kvmmu.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"kvmmu {version}"

# Markdown: anchors of headings, as GitHub makes them, and lists of definitions.
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

# Docstrings are those of numpydoc; a word in backquotes is code.
default_role = "code"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"              # docstrings say it, with units and shapes
autodoc_preserve_defaults = True


COLON = "\N{MODIFIER LETTER COLON}"


def hide_colons(app, what, name, value, options, lines):
    """Keep Napoleon from taking the words before a colon, in the docstring of a property, for its type."""
    if what == "property":
        lines[:] = [line.replace(":", COLON) for line in lines]


def show_colons(app, what, name, value, options, lines):
    lines[:] = [line.replace(COLON, ":") for line in lines]


def without_self(app, what, name, value, options, signature, returns):
    """Write signatures of compiled methods as those of others."""
    return (re.sub(r"^\(self(, )?", "(", signature) if signature else signature), returns


def setup(app):
    """Let tables of contents have pages that may be missing (?page), and the reference end with names that it has not."""
    app.connect("autodoc-process-docstring", hide_colons, priority=400)
    app.connect("autodoc-process-docstring", show_colons, priority=600)
    app.connect("autodoc-process-signature", without_self)
    top = Path(app.srcdir)
    pages = "\n".join(page.read_text() for page in (top / "reference").glob("*.md"))

    def entry(name):
        value = getattr(kvmmu, name)
        if callable(value):
            kind, members = ("class", "   :members:\n") if isinstance(value, type) else ("function", "")
            return f".. auto{kind}:: kvmmu.{name}\n{members}"
        return f".. autodata:: kvmmu.{name}\n"

    def complete(app, docname, source):
        text = re.sub(r"^\?(.*)\n", lambda page: f"{page[1]}\n" if (top / f"{page[1]}.md").exists() else "", source[0],
                      flags=re.MULTILINE)
        others = "\n".join(entry(name) for name in kvmmu.__all__ if f":: kvmmu.{name}\n" not in pages)
        source[0] = text.replace("```{others}\n", f"## Other names\n\n```{{eval-rst}}\n{others}")

    app.connect("source-read", complete)
