"""A report as one file of HTML: drawn by a template whose every name is escaped, with no script, and with nothing to fetch.

Who opens it from a mail is protected twice: a tensor may be called ``<script>``, and the page's own policy lets no script run and no
address be asked.
"""

import os
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnet.errors import BadRequest, MachineFailed, printable
from carnet.report.flow import FATES
from carnet.report.heat import damaged, lost
from carnet.report.multiples import spreads, strips
from carnet.report.page import NAMED, WORDS, Page
from carnet.report.sankey import sankey
from carnet.report.scales import short
from carnet.report.series import mean, series
from carnet.report.terminal import decibels, size
from carnet.storage.opening import failed, reading, replace_file
from carnet.storage.schemes import PathLike, file_at, folder_at, lies_in
from carnet.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

INSTALL = "pip install 'carnet[report]'"
MAGIC = b"<!doctype html><!-- carnet report -->"
KINDS = 40  # kinds of weights that are drawn, those that lose most first
WIDE, NARROW = (1040.0, 300.0), (360.0, 260.0)  # of a flow: its width, and the room for bytes


def check(path: Path, out: PathLike | None = None) -> None:
    """Raise BadRequest where a report may not be written, and MachineFailed where nothing draws one: before anything is done for it."""
    _environment()
    folder, _ = file_at(path)
    if out is not None and lies_in(path, folder_at(out)):
        raise BadRequest("a report is no part of a target", {"report": path}, remedy="choose a place outside of OUT")
    if not folder.kind():
        raise BadRequest(f"there is no folder {path.parent}", {"report": path}, remedy="make it first")
    try:
        with suppress(FileNotFoundError), reading(path, os.O_NOFOLLOW) as there:
            if not MAGIC.startswith(there.read(len(MAGIC))[: len(MAGIC)]):
                raise BadRequest(f"{path} exists and is not a report", remedy="choose another file")
    except OSError as error:
        raise failed("the report cannot be written", path, error) from error


def write(page: Page, path: Path) -> None:
    """Write a report, whole or not at all; what is there is replaced where it is a report or empty."""
    check(path)
    data = rendered(page).encode("utf-8", "backslashreplace")
    try:
        replace_file(path, [data])
    except OSError as error:
        raise failed("the report cannot be written", path, error) from error


def rendered(page: Page) -> str:
    """Return a report as the text of its file."""
    environment = _environment()
    style, _, _ = (
        environment.loader.get_source(environment, "report.css") if environment.loader is not None else ("", None, None)
    )
    policy = b64encode(sha256(style.encode()).digest()).decode()
    text = environment.get_template("report.html.j2").render(page=page, style=style, policy=policy, **_shapes(page))
    return MAGIC.decode() + "\n" + text


def _shapes(page: Page) -> Mapping[str, object]:
    """Return everything that is drawn."""
    kinds = sorted(page.loss.kinds, key=lambda kind: kind.all.snr)[:KINDS] if page.loss is not None else []
    heats, ends = lost(page.losses)
    run = [] if page.run is None else page.run.samples
    memory = [each.memory for each in run if each.memory is not None]
    return {
        "version": __version__,
        "words": WORDS,
        "named": NAMED,
        "fates": {fate: FATES[fate] for fate in page.flow.fates},
        "flows": {"wide": sankey(page.flow, *WIDE), "narrow": sankey(page.flow, *NARROW, inside=True)},
        "kinds": list(zip(kinds, strips(kinds), spreads(kinds), strict=True)),
        "heats": heats,
        "ends": ends,
        "damages": damaged(page.damages),
        "series": [] if page.run is None else series(page.run),
        "ran": {"seconds": run[-1].seconds, "mean": mean(run), "peak": max(memory, default=None)} if len(run) > 1 else None,
    }


def _environment() -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as missing:
        raise MachineFailed("what draws reports is not installed", {"missing": missing.name}, remedy=INSTALL) from missing

    def seen(value: Any) -> Any:  # noqa: ANN401  whatever a template writes
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=PackageLoader("carnet.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=seen,
    )
    made.filters |= {
        "size": size,
        "dB": _decibels,
        "short": short,
        "name": os.path.basename,
        "slug": lambda fate: fate.replace(" ", "-"),
    }
    return made


def _decibels(ratio: float | None) -> str:
    return "exact" if ratio is None else decibels(ratio)
