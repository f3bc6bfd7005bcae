"""What Sphinx makes of these pages: `make docs`. It reads no network, and a warning is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import zokern  # noqa: E402

project, author = "zokern", "zokern authors"
copyright = "zokern authors, Apache-2.0"
version = release = zokern.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "docstrings"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["__pycache__"]
smartquotes_action = "D"  # dashes alone: names stay in straight quotes

html_theme = "furo"
html_title = f"zokern {version}"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
highlight_language = "text"
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
