"""How Sphinx builds the site of what tools/make_site.py has gathered. Warnings are errors there."""

from typing import Union

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
