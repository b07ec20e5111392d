"""Sphinx's settings for this folder: `make docs`."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spo_kernels import __version__  # noqa: E402
from spo_kernels.integrations import trl_seam  # noqa: E402

project = "spo_kernels"
author = copyright = "the authors of spo_kernels"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"spo_kernels {release}"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
# what browsers draw themselves, also without a network
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# what is in single backticks in a docstring is code, as in Markdown
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
add_module_names = False
# torch is there; what trains is not, since only names and docstrings are read
autodoc_mock_imports = ["accelerate", "datasets", "peft", "pyarrow", "safetensors", "tqdm", "transformers", "trl"]
# a stand-in for TRL's trainer has no parameters to look at
trl_seam.check_dpo_trainer = lambda trainer: None


def setup(app: Any) -> None:
    """Links to Markdown outside of this folder are files to load; others outside of it are that by themselves."""
    app.connect("source-read", outside)
    app.add_html_math_renderer("mathml", (partial(formula, "inline"), None), (partial(formula, "block"), None))


def outside(app: Any, page: str, source: list[str]) -> None:
    """Rewrite the links of a page."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+\.md)\)", r"{download}`\1 <\2>`", source[0])


def formula(display: str, translator: Any, node: nodes.Node) -> None:
    """Write a formula."""
    spaced = convert(node.astext(), display=display).replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.15em"/>')
    translator.body.append(spaced)
    raise nodes.SkipNode
