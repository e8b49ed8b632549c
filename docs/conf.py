"""How Sphinx builds the guides and the API reference: `make docs`."""

import cupy_roialign

project = "cupy_roialign"
author = "The cupy_roialign authors"
copyright = author
version = release = cupy_roialign.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

default_role = "py:obj"  # `name` in a docstring is a link
nitpicky = True  # and one that leads nowhere is a warning
nitpick_ignore_regex = [("py:exc", r"\w+Error")]  # Python's own
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings tell of shapes, which types do not
python_maximum_signature_line_length = 88

myst_heading_anchors = 3

html_theme = "furo"  # which fetches nothing from elsewhere
html_title = "cupy_roialign"
html_static_path = ["assets"]
html_css_files = ["extra.css"]
html_copy_source = False
html_show_sphinx = False
