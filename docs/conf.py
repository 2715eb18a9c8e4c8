"""Sphinx: `pip install -e ".[docs]" && python -m sphinx -W --keep-going -n docs docs/_build`."""

import jaxlm

project, author = "jaxlm", "the jaxlm authors"
copyright, version, release = "the jaxlm authors", jaxlm.__version__, jaxlm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings write names as `name`

html_theme = "furo"
html_title = f"jaxlm {version}"
html_show_sourcelink = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
html_theme_options = {"sidebar_hide_name": False}
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_heading_anchors = 3  # so that [text](page.md#heading) works here as it does on a forge
suppress_warnings = ["myst.header"]  # an included README begins with its own title

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
nitpicky = True
nitpick_ignore_regex = [  # types of other libraries, and aliases, whose pages are not here
    (
        "py:.*",
        r"(jax|jaxlib|flax|nnx|optax|orbax|ocp|np|numpy|pathlib|os|re|collections|typing|argparse|Path|Any)(\..*)?",
    ),
    ("py:.*", r"jaxlm\.(data\.(documents\.(Document|LeftOut|RowFormat)|held_out\.HeldOut)|config\.schema\.DataConfig)"),
    ("py:.*", r"jaxlm\.(data\.handed_over\.HandedOver|monitor\.sinks\.Sink)"),
    ("py:.*", r"jaxlm\.train\.(assemble\.Resolved|step\.TrainState)"),
    ("py:.*", r"(UserError|RunFailed|Stopped|Exception|optional|Callable|Iterator|Mapping|Sequence)"),
    ("py:.*", r"one of SAVE_ERRORS"),
]

ELSEWHERE = {
    "../launch/README.md": "launch.md",
    "../benchmarks/README.md": "speed.md",
    "../CONTRIBUTING.md": "contributing.md",
}


def _own_pages(app, name, source):
    """Links to files beside docs/, as a forge wants them, go to the pages that include those files."""
    for file, page in ELSEWHERE.items():
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def setup(app):
    app.connect("source-read", _own_pages)
