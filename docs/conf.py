"""Sphinx's settings for this folder: `make docs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spo_kernels import __version__  # noqa: E402

project = "spo_kernels"
author = copyright = "the authors of spo_kernels"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"spo_kernels {release}"
html_show_copyright = False

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# what is in single backticks in a docstring is code, as in Markdown
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# torch is there; what trains is not, since only names and docstrings are read
autodoc_mock_imports = ["accelerate", "datasets", "peft", "transformers", "trl"]

# pages that a later version brings may be named in a list of pages before
suppress_warnings = ["toc.empty_glob"]
