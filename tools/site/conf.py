"""How Sphinx builds the site of what tools/make_site.py has gathered. Warnings are errors there."""

import ast
import inspect
import textwrap
from typing import Any, Union

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import _MockObject

from carnet import __version__

# what stands in for a class can be one of `torch.Tensor | None`, too; here `|` is what is being defined
_MockObject.__or__ = lambda self, other: Union[self, other]  # noqa: UP007
_MockObject.__ror__ = lambda self, other: Union[other, self]  # noqa: UP007

project, author, release, version = "carnet", "the carnet authors", __version__, __version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "index"
exclude_patterns: list[str] = []

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # as GitHub makes them, so that a link to a section means the same there and here
suppress_warnings = ["misc.highlighting_failure"]  # an example may leave out what a program needs to parse it: `...` in calls

autodoc_mock_imports = ["megatron", "torch", "triton"]  # gigabytes that no signature needs
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

smartquotes = False  # `--amax` in a sentence stays what is typed
html_theme = "furo"
html_title = f"carnet {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None  # the same pages give the same site
highlight_language = "none"  # of blocks that do not say theirs
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7fb7dd", "color-brand-content": "#7fb7dd"},
}

CALLED = ("Grid", "Key", "Trust")  # classes that a caller makes; of all others the fields are what is read


def setup(app: Sphinx) -> None:
    """Have the fields of records documented by the comment on each one's line."""
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", fields)


def signature(*said: Any) -> tuple[str, str] | None:  # noqa: ANN401  as Sphinx calls it
    """Return nothing for how a record is called that verbs return; leave all else as it is."""
    _, what, name, _, _, arguments, _ = said
    return ("", "") if what == "class" and arguments and name.rpartition(".")[2] not in CALLED else None


def fields(*said: Any) -> None:  # noqa: ANN401  as Sphinx calls it
    """Add a record's fields to its docstring."""
    _, what, _, record, _, lines = said
    if what != "class":
        return
    source = textwrap.dedent(inspect.getsource(record)).splitlines()
    for node in ast.walk(ast.parse("\n".join(source))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.col_offset == 4:
            comment = source[(node.end_lineno or 0) - 1].partition("  # ")[2]
            lines += ["", f".. attribute:: {node.target.id}", f"   :type: {ast.unparse(node.annotation)}", "", f"   {comment}"]
