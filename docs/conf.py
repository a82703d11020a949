"""Sphinx configuration: builds without a network, and every warning is an error (`make docs`)."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "pyro_ebm"
author = "The pyro-ebm contributors"
copyright = author  # noqa: A001
release = installed_version("pyro-ebm")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pyro_ebm {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
