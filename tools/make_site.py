"""Build the documentation site: `make docs` does it, into build/docs.

The pages stay where they are, as GitHub shows them. Here they are gathered in a folder of their own, with links turned that lead out of
docs/; what a page says between ``<!--`` and ``-->`` is replaced by what the program says of itself: commands, options, docstrings.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from inspect import cleandoc
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
from sphinx.cmd.build import build_main

import carnet
from carnet.cli import main as commands
from carnet.cli.options import Grouped
from carnet.plans.request import KNOWN, MOST, flag_of
from carnet.quantize.recipes import by_style

ROOT = Path(__file__).parents[1]
PAGES, SITE, HOW = ROOT / "build/pages", ROOT / "build/docs", ROOT / "tools/site"
ELSEWHERE = {  # pages that do not lie in docs/, and what lies there under another name
    "README.md": "overview.md",
    "bench/README.md": "benchmarks.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docs/README.md": "index.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<rest>#[^)\s]*)?(?=\))")
NAMED = re.compile(r"^- \[(.+)\]\((.+)\.md\)", re.MULTILINE)
ASKED = re.compile(r"^<!-- (?P<what>\w+)(?: (?P<module>[\w.]+): (?P<names>.+))? -->$", re.MULTILINE)


def main() -> int:
    """Gather the pages, build the site with warnings as errors, and look for links within it that lead nowhere."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.md"))
    for page in (*(ROOT / "docs").rglob("*.md"), *map(ROOT.joinpath, ELSEWHERE)):
        path = PAGES / staged(page)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = LINK.sub(partial(turned, page=page), page.read_text())
        path.write_text(ASKED.sub(answer, text) + (contents(text) if path.name == "index.md" else ""))
    if unsaid := {*carnet.__all__} - {"Options", *re.findall(r"\w+", (ROOT / "docs/api.md").read_text())}:
        sys.exit(f"docs/api.md says nothing of {', '.join(sorted(unsaid))}")
    for name, command in commands.commands.items():
        path = PAGES / "cli" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(reference(name, command)))
    failed = build_main(["-W", "--keep-going", "-q", "-c", str(HOW), "-d", str(ROOT / "build/doctrees"), str(PAGES), str(SITE)])
    lost = sorted(set(astray()))
    print("\n".join(lost), end="\n" if lost else "", file=sys.stderr)
    print(f"{SITE.relative_to(ROOT)}/index.html")
    return failed or bool(lost)


def staged(page: Path) -> str:
    """Return where a page of the repository lies among the gathered ones."""
    path = page.relative_to(ROOT).as_posix()
    return ELSEWHERE.get(path, path.removeprefix("docs/"))


def turned(link: re.Match[str], page: Path) -> str:
    """Return a link of a page as it leads to the same place from where the page is gathered."""
    there = Path(os.path.normpath(page.parent / link["path"]))
    if not there.exists():
        sys.exit(f"{page.relative_to(ROOT)}: nothing is at {link['path']}")
    return Path(os.path.relpath(PAGES / staged(there), (PAGES / staged(page)).parent)).as_posix() + (link["rest"] or "")


def contents(index: str) -> str:
    """Return the tables of contents that the list of pages is: a page that it does not name is a warning of Sphinx's."""
    parts = (part.partition("\n") for part in index.split("\n## ")[1:])
    pages = ((title, [f"{name} <{page}>" for name, page in NAMED.findall(text)]) for title, _, text in parts)
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```\n" for title, names in pages
    )


def answer(asked: re.Match[str]) -> str:
    """Return what stands in place of a comment: the list of commands, the table of options, or the docstrings of some names."""
    match asked["what"]:
        case "commands":
            return "\n".join(listed())
        case "options":
            return "\n".join(request())
        case "autodoc":
            return "\n".join(f"```{{eval-rst}}\n{of_name(asked['module'], name)}\n```\n" for name in asked["names"].split())
        case _:
            sys.exit(f"nobody knows what {asked[0]} asks for")


def listed() -> Iterator[str]:
    """Yield the list of the commands, and the table of contents that it is."""
    for name, command in sorted(commands.commands.items()):
        yield f"- [carnet {name}](cli/{name}.md): {command.get_short_help_str(limit=200)}"
    yield from ("", "```{toctree}", ":hidden:", "", *(f"cli/{name}" for name in sorted(commands.commands)), "```")


def of_name(module: str, name: str) -> str:
    """Return the directive that shows the docstring of a name: of a class with what it offers, of an error without."""
    if name[0].islower():
        return f".. autofunction:: {module}.{name}"
    return f".. autoclass:: {module}.{name}\n   :members:\n   :exclude-members: __init__, __new__"


def request() -> Iterator[str]:
    """Yield the table of the options of a crossing, as Python says them."""
    yield "What `carnet.plan` and `carnet.cross` take by name, as on [the command line](cli/cross.md); `carnet.verify` takes those that"
    yield "say what a target should be.\n"
    for name, option in KNOWN.items():
        words = ", ".join(map(str, option.words())) if option.value == "word" else ""
        said = f" One of {words}." if words else ""
        yield f"`{name}` (`{flag_of(name)}`)\n: {option.help.replace('; see below', '')}{said}\n"


def reference(name: str, command: click.Command) -> Iterator[str]:
    """Yield the page of a command."""
    context = click.Context(command, commands.make_context("carnet", ["--", name]), name)
    yield f"# carnet {name}\n\n```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield f"{cleandoc(command.help or '')}\n"
    yield f"```{{program}} carnet {name}\n```\n"
    shown = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    for group in dict.fromkeys([MOST, *map(group_of, shown)]):  # in the order of --help
        yield f"## {group or 'Options'}\n"
        for param in shown:
            if group_of(param) == group:
                yield option(param, context)
    if "quantize" in {param.name for param in shown}:
        rows = "\n".join(f"| {style} | {', '.join(schemes)} |" for style, schemes in by_style().items())
        yield f"## Schemes\n\n| `--style` | `--quantize` |\n|---|---|\n{rows}\n"
    if command.epilog:
        yield f"## Examples\n\n```text\n{command.epilog}\n```"


def group_of(param: click.Parameter) -> str:
    """Return the group that help lists an option in."""
    return param.group if isinstance(param, Grouped) else MOST


def option(param: click.Option, context: click.Context) -> str:
    """Return an option as Sphinx's own directive, which gives it an address."""
    names, text = param.get_help_record(context) or ("", "")
    return f"`````{{option}} {names}\n{text}\n`````\n"


class Links(HTMLParser):
    """The addresses and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.to: list[str] = []
        self.anchors = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where a tag leads, and by what name others lead to it."""
        said = dict(attrs)
        self.to += [link for name in ("href", "src") if (link := said.get(name)) is not None and tag != "link"]
        self.anchors |= {anchor for name in ("id", "name") if (anchor := said.get(name)) is not None}


def astray() -> Iterator[str]:
    """Yield every link within the site that leads to no page, file or anchor; what is elsewhere in the world nobody asks."""
    pages = {page.resolve(): Links(page) for page in SITE.rglob("*.html")}
    for page, links in pages.items():
        for link in links.to:
            parts = urlsplit(link)
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            there = there / "index.html" if there.is_dir() else there
            known = pages.get(there)
            if not parts.scheme and (
                not there.exists() or (known is not None and unquote(parts.fragment) not in known.anchors)
            ):
                yield f"{page.relative_to(SITE)}: {link} leads nowhere"


if __name__ == "__main__":
    sys.exit(main())
