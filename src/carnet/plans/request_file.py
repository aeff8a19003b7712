"""A file of options: TOML as a person types it, or JSON as `plan --json` and a target's document give a request back."""

import codecs
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carnet.errors import BadOption, CarnetError
from carnet.formats.files import TABLE_LIMIT, read_whole
from carnet.formats.jsons import TABLE, parse_object
from carnet.plans.options import here, local
from carnet.plans.request import KNOWN, flag_of, only
from carnet.storage.schemes import file_at, is_place

MOST = 64 << 10  # bytes of TOML: what a person types is a page


def gathered(options: Mapping[str, object]) -> dict[str, Any]:
    """Return options with those of the file that ``request`` names, which count where nothing else is said."""
    said = {name: value for name, value in options.items() if name != "request"}
    asked = options.get("request")
    return said if asked is None else {**read_request(here("request", asked)), **said}


def read_request(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file, or those that `plan --json` and a document give back; paths are seen from its folder."""
    spelled = {flag_of(name).removeprefix("--"): name for name in KNOWN}  # as on the command line, or as in Python
    said: dict[str, Any] = {}
    for key, value in _table(path).items():
        name = spelled.get(key, key.replace("-", "_"))
        if name in said:
            raise BadOption(f"the request says {name!r} twice", {"where": path})
        if value is not None and key != "tokens":
            said[name] = value
    only(KNOWN.keys() - {"request"}, said)
    for name, value in said.items():
        if KNOWN[name].value in ("path", "folder") and isinstance(value, str):
            there = local(name, value)
            said[name] = there if is_place(there) else str(path.parent / there)
    return said


def _table(path: Path) -> dict[str, Any]:
    """Return the table that a file of options holds; of what `plan --json` and a document say else, nothing is asked for."""
    try:
        data = read_whole(*file_at(path), TABLE_LIMIT)[0].removeprefix(codecs.BOM_UTF8)
        if data.lstrip().startswith(b"{"):
            found = parse_object(data, "the request", path, TABLE, float)
            asked = found.get("request")
            return asked if isinstance(asked, dict) and "to" not in found else found
        if len(data) > MOST:
            raise BadOption("the request is too large for what it should hold", {"where": path})
        return tomllib.loads(data.decode())
    except CarnetError as error:
        raise BadOption(error.what, error.facts, remedy=error.remedy) from error
    except RecursionError as error:
        raise BadOption("the request is nested too deeply", {"where": path}) from error
    except ValueError as error:  # of UTF-8 and of TOML
        raise BadOption("the request is not TOML", {"where": path, "reason": str(error)}) from error
