"""How Sphinx builds these pages; ``make docs`` does, with warnings as errors."""

import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # importing what is documented asks nobody anything

from sphinx.application import Sphinx  # noqa: E402

import molf  # noqa: E402

project = "MoLF"
author = "The MoLF authors"
copyright = "2026, The MoLF authors"
release = molf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build"]

# Links to headings are checked like links to pages. Pages read the same in a repository's viewer.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = f"MoLF {release}"
html_copy_source = False
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}

OUTSIDE = re.compile(r"\]\((\.\./[^)#]+\.md)\)")


def setup(app: Sphinx) -> None:
    """Have pages read as a repository's viewer reads them."""
    app.connect("source-read", prepare)


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """List the pages of docs/integrations in the index; let links to Markdown outside of docs be files, not pages."""
    if page == "index":
        found = sorted(
            Path(app.srcdir, "integrations").glob("*.md"), key=lambda path: (path.stem != "index", path.stem)
        )
        source[0] = source[0].replace("INTEGRATIONS\n", "".join(f"integrations/{path.stem}\n" for path in found))
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])
