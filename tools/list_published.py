"""Print what carnet can do with published models: a line for each whose config.json aiconfigurator-core brings.

Read is what config.json and hf_quant_config.json say. A target counts where its config can say the model; of a class that carnet does
not know the line names it.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from carnet.architectures.family import Family
from carnet.architectures.known import dialect_of, padded, recognise, text_of
from carnet.dialects.kinds import KINDS, Kind
from carnet.dialects.megatron.needs import needs
from carnet.dialects.writing import written
from carnet.errors import CarnetError, NotSupported
from carnet.model.fields import Config
from carnet.model.model import canonical_shapes
from carnet.quantize.configs import BESIDE
from carnet.quantize.reading import CONFIG_KEY, plain, read

BROUGHT = "aiconfigurator-core-*/aiconfigurator_core/model_configs"
CONFIG, QUANT = "_config.json", "_hf_quant_config.json"
HEADINGS = ("published as", "class", "weights", "targets")


def main() -> None:
    """Print the table that docs/families.md shows: what can be read, by name, then the classes that cannot."""
    paths = sorted(Path(sys.prefix).glob(f"{BROUGHT}/*{CONFIG}"), key=lambda path: path.name.lower())
    models = [path for path in paths if not path.name.endswith(QUANT)]
    lines = sorted((can_do(path) for path in models), key=lambda line: not line[3])
    known = [line for line in lines if line[3]]
    widths = [max(map(len, column)) + 2 for column in zip(HEADINGS, *known, strict=True)]
    for line in (HEADINGS, *known):
        print("".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    why: dict[str, list[str]] = {}
    for name, _, reason, _ in lines[len(known) :]:
        why.setdefault(reason, []).append(name)
    print(f"{len(known)} of {len(models)} are read. Not yet:")
    for reason, names in sorted(why.items()):
        print(f"{reason}\n    {' '.join(names)}")


def can_do(path: Path) -> tuple[str, str, str, str]:
    """Return a model's name, its class, its number format or why it is refused, and what can be written; "" for nothing."""
    name, raw = path.name.removesuffix(CONFIG).replace("--", "/"), json.loads(path.read_text())
    beside = path.with_name(path.name.replace(CONFIG, QUANT))
    raw |= {BESIDE: json.loads(beside.read_text())} if beside.exists() else {}
    (architecture,) = raw["architectures"]
    try:
        text, wrapper = text_of(raw, name)
        told = targets(plain(CONFIG_KEY, text), wrapper, name)
        codes = read(CONFIG_KEY, text, name)
    except CarnetError as error:
        found = f": {error.facts['found']}" if "found" in error.facts else ""
        return name, architecture, f"{error.what}{found}", ""
    return name, architecture, (codes.coded_as if codes else "") or "plain", told


def targets(text: Mapping[str, object], wrapper: str, where: str) -> str:
    """Return the kinds of targets that can say a model: * with ``--accept needs``, + with ``--read-by megatron-bridge``."""
    family, config = recognise("hf", text, where, {"wrapper": wrapper} if wrapper else {})
    return " ".join(filter(None, (_told(family, kind, config, where) for kind in KINDS.values() if not kind.alone)))


def _told(family: Family, kind: Kind, config: Config, where: str) -> str:
    try:
        dialect = dialect_of(family, kind.name, config)
    except NotSupported:
        return ""
    if kind.reorders and any(name.endswith(kind.reorders) for name in canonical_shapes(config)):
        return ""
    said, lacking = written(dialect.table, padded(dialect, config), {} if kind.arguments else family.traits, where)
    if not kind.arguments:
        return "" if lacking else kind.name
    mark = "*" if lacking else ""
    try:
        needs(said, None, local=False)
    except NotSupported:
        mark += "+"
    return kind.name + mark


if __name__ == "__main__":
    main()
