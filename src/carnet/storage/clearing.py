"""Removing what a crossing left in its staging folder: what its journal names, and nothing else."""

import os
from pathlib import Path

from carnet.errors import BadRequest, shown
from carnet.storage import journal as journals
from carnet.storage.drafts import PosixDraft, entries, staging_of
from carnet.storage.journal_lines import NAME, File, said_in
from carnet.storage.opening import FOLDER, explained, open_regular
from carnet.storage.protocol import Crossing


def cleared(out: Path) -> list[str]:
    """Remove what an unfinished crossing into ``out`` left, or what lies in its staging folder, and return the names of what it was."""
    folder = out.absolute() if out.name.endswith(".partial") else staging_of(out)
    nothing = BadRequest(f"no unfinished crossing of carnet is at {out}", {"expected": folder / NAME})
    try:
        base = os.open(folder, FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        raise nothing from None
    try:
        crossing = _crossing(base, folder)
        with journals.held(base, folder, crossing, begin=False) as journal:
            if journal is None:
                raise nothing
            draft = PosixDraft(folder.with_suffix(""), folder, frozenset(crossing.names), base, journal, crossing)
            before = {name for name, _ in entries(base)}
            draft.discard()
            return sorted(before - {name for name, _ in entries(base)})
    except FileNotFoundError:
        raise nothing from None
    except OSError as error:
        raise explained(error, str(folder)) from error
    finally:
        os.close(base)


def _crossing(base: int, folder: Path) -> Crossing:
    """Return whose a folder is, as its journal says."""
    descriptor = open_regular(NAME, dir_fd=base)
    try:
        said = said_in(File(descriptor, str(folder / NAME))).head
    finally:
        os.close(descriptor)
    names = said.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "run the command that writes it again, or see what the folder holds and remove it"
        raise BadRequest(f"{folder / NAME} does not say what was written", {"found": shown(str(names))}, remedy=remedy)
    plan, source, identity = (str(said.get(key, "")) for key in ("plan", "source", "identity"))
    return Crossing(plan, source, identity, tuple(names))
