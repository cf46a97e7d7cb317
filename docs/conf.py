"""How the documentation is built: `make docs`, warnings as errors, no network."""

import sys
from pathlib import Path

import hifusion

sys.path.insert(0, str(Path(__file__).parent))  # from_program.py

project = "hifusion"
author = "The hifusion package contributors"
copyright = author
version = release = hifusion.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_program"]
exclude_patterns = ["images"]
html_theme = "furo"
html_title = f"hifusion {version}"
html_show_sourcelink = False
pygments_style = "tango"
highlight_language = "none"  # of blocks that name none, such as trees of files

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # so that results.md#maps leads where it does on GitHub

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
