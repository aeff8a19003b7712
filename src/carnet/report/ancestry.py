"""A lineage for a terminal: a row a folder, the target first, and what is wrong below."""

from collections.abc import Iterator
from os.path import relpath
from pathlib import Path

from carnet.lineage import Lineage, Link, Stage
from carnet.report.tables import facts_in_lines, table

HEAD = ("folder", "layout", "carnet.json", "signature", "made from")


def lineage_lines(found: Lineage, width: int | None) -> Iterator[str]:
    """Yield the chain, and whether it holds."""
    yield from table(HEAD, [_row(stage) for stage in found.stages], width)
    first = [_near(stage.folder) for stage in found.stages if not stage.links]
    facts = {"broken": "; ".join(f"{_near(folder)}: {said}" for folder, said in found.problems)}
    yield from facts_in_lines(facts if found.problems else {"whole": f"back to {', '.join(first)}"}, width)


def _row(stage: Stage) -> tuple[str, ...]:
    state = f"{stage.state or 'none: the first'}{' !' if stage.problem else ''}"
    return _near(stage.folder), stage.layout, state, stage.signature, "; ".join(map(_made, stage.links))


def _made(link: Link) -> str:
    if link.problem:
        return f"{link.name} !"
    same = f"{link.tensors:,} digests equal" if link.tensors else "by its headers"
    return f"{_near(link.folder)}, {same}"


def _near(folder: str) -> str:
    """Return a path as it is said from here, where it lies below."""
    here = Path.cwd()
    return relpath(folder) if Path(folder).is_relative_to(here) else folder
