"""Sphinx settings: `python -m sphinx -W docs docs/_build`.

The tutorials and the gallery are Python files that run while the site is built; one that fails
fails the build. Pages of the interface are written from docstrings, for the names that
`reference.md` lists.
"""

import os
import sys
import tomllib
from pathlib import Path

_docs = Path(__file__).resolve().parent
_pyproject = _docs.parent / "pyproject.toml"
_project = tomllib.loads(_pyproject.read_text(encoding="utf-8"))["project"]
sys.path[:0] = [str(_docs / "_extensions"), str(_docs.parent), str(_docs.parent / "adapters")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = _project["name"]
author = _project["authors"][0]["name"]
project_copyright = f"2026, {author}"
release = version = _project["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "interface",
]
exclude_patterns = ["_build", "tutorials", "gallery"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

sphinx_gallery_conf = {
    "examples_dirs": ["tutorials", "gallery"],
    "gallery_dirs": ["generated/tutorials", "generated/gallery"],
    "filename_pattern": r"\.py$",
    "within_subsection_order": "interface.ReadingOrder",
    "reset_modules": ("matplotlib", "interface.forget_compilations"),
    "abort_on_example_error": False,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "parallel": 2,
    "min_reported_time": 5,
    "remove_config_comments": True,
    "doc_module": ("bilevel",),
}

# Types of other libraries, whose documentation no build can rely on reaching, and names that
# only type annotations use.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|jaxtyping|numpy|np|jnp|optax|equinox|eqx|collections|typing)\..*"),
]

html_theme = "furo"
html_title = f"bilevel {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_edit_link": ""}
html_show_sourcelink = False
