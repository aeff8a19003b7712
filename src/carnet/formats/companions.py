"""A model's *companions* are the side files that go along with its weights into a folder of the same layout.

Its code goes along where a config names it (``auto_map``), with what it imports from beside itself, as transformers finds it:
get_relative_import_files in transformers/dynamic_module_utils.py.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import PurePosixPath

from carnet.errors import BadRequest, shown
from carnet.formats.files import digest_file, read_whole
from carnet.formats.jsons import read_object
from carnet.formats.side_files import CODE, TOKENIZER, Kind, check_asset, kind_of, side_files
from carnet.steps import AssetFile
from carnet.storage.protocol import FILE, Folder

SMALL = 64 << 20  # bytes of a config or of code
CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_FROM = re.compile(r"^[ \t]*from[ \t]+(\.+)([\w.]*)[ \t]+import[ \t]+\(?[ \t]*([^\n#;)]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Companions:
    """What goes along, and what does not."""

    assets: tuple[AssetFile, ...] = ()
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what files are -> their names
    auto_map: Mapping[str, object] | None = None  # of config.json: the part of it whose code goes along

    @property
    def names(self) -> list[str]:
        """Return the names of what goes along."""
        return [asset.name for asset in self.assets]


def companions(root: Folder, config: Mapping[str, object], own: frozenset[str], tokenizer: Folder | None) -> Companions:
    """Return the companions of a Hugging Face model; those of its tokenizer are those of ``tokenizer`` where that is given.

    ``own`` are the names of the files that hold its weights.
    """
    references = config.get("auto_map")
    code = {*_code(root, _modules(references)), *(_tokenizer_code(root) if tokenizer is None else ())}
    folders = {str(PurePosixPath(name).parent) for name in code} - {"."}
    goes: dict[str, Folder] = {}  # name -> the folder that it is in
    left: list[str] = []
    lent = {} if tokenizer is None else tokenizer_files(tokenizer)
    kinds = {kind_of(name).what for name in lent}
    for name in side_files(root, own, folders):
        kind = kind_of(name)
        if kind.along == "anew":
            continue
        if shown(name) == name and (
            name in code or kind.along == "model" or (kind.along == "tokenizer" and _kept(kind, lent, kinds))
        ):
            check_asset(root, name)
            goes[name] = root
        else:
            left.append(name)
    clash = next((name for name in goes.keys() & lent.keys() if kind_of(name) == CODE), None)
    if clash is not None and digest_file(goes[clash], clash) != digest_file(lent[clash], clash):
        facts = {"file": clash, "one": goes[clash], "other": lent[clash]}
        raise BadRequest("the model and the tokenizer bring different code of one name", facts, remedy="make them one file")
    assets = tuple(asset(folder, name) for name, folder in sorted({**goes, **lent}.items(), key=itemgetter(0)))
    here = _with_code(references, set(code))
    return Companions(assets, _by_kind(left), here)


def left_behind(root: Folder, own: frozenset[str], target: Folder) -> dict[str, tuple[str, ...]]:
    """Return the side files of a model that a target of the same layout does not have: what they are -> their names."""
    names = side_files(root, own)
    return _by_kind(name for name in names if kind_of(name).along != "anew" and not target.kind(name))


def _by_kind(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return what files are -> their names, as they may go to a terminal."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(kind_of(name).what, []).append(shown(name))
    return {what: tuple(each) for what, each in sorted(found.items())}


def tokenizer_files(root: Folder) -> dict[str, Folder]:
    """Return the files of a tokenizer, processors, templates, the generation config and the code that they name: name -> folder."""
    names = [name for name in side_files(root, frozenset()) if kind_of(name).along == "tokenizer"]
    if not any(kind_of(name) == TOKENIZER for name in names):
        facts = {"where": root, "looked for": "tokenizer.json, tokenizer_config.json, tokenizer.model, ..."}
        raise BadRequest("the folder holds no tokenizer", facts, remedy="name the folder that the model's tokenizer lies in")
    found = (*names, *_tokenizer_code(root))
    for name in found:
        check_asset(root, name)
    return dict.fromkeys(found, root)


def _kept(kind: Kind, lent: Mapping[str, Folder], kinds: set[str]) -> bool:
    """Say whether a file of the source's tokenizer goes along: another tokenizer brings all, but for what it has nothing of."""
    return not lent or (kind.what in ("processors", "generation") and kind.what not in kinds)


def lacking(names: Collection[str], eos: object, generation: object) -> dict[str, str]:
    """Return the line that says what a Hugging Face folder lacks before a program can use it, none where it lacks nothing.

    ``eos`` is what its config says, ``generation`` what its generation config does, which counts alone where there is one.
    """
    kinds = {kind_of(name).what for name in names}
    lacks = [] if TOKENIZER.what in kinds else ["a tokenizer"]
    lacks += [] if "generation" in kinds or eos is not None else ["the id of the token that ends a text"]
    lines = [f"{' and '.join(lacks)}: --tokenizer DIR brings {'it' if len(lacks) == 1 else 'both'}"] if lacks else []
    if "generation" in kinds and generation is None:
        lines.append("an eos_token_id in generation_config.json, without which no text ends: write it there")
    return {"lacks": "; ".join(lines)} if lines else {}


def asset(root: Folder, name: str) -> AssetFile:
    """Return a file that is to be taken over, with its digest."""
    return AssetFile(name, str(root / name), *digest_file(root, name))


def _tokenizer_code(root: Folder) -> set[str]:
    found = set[str]()
    for name in CONFIGS:
        if root.kind(name) == FILE:
            check_asset(root, name)
            found |= _code(root, _modules(read_object(root, name, SMALL).get("auto_map")))
    return found


def _modules(references: object) -> Iterator[str]:
    """Yield the files that an auto_map names: ``modeling_x.Model``; one of another repository, ``repo--file.Class``, is not here."""
    for each in references.values() if isinstance(references, Mapping) else ():
        for reference in each if isinstance(each, list) else [each]:
            if isinstance(reference, str) and "--" not in reference and reference.count(".") == 1:
                yield f"{reference.split('.')[0]}.py"


def _code(root: Folder, modules: Iterator[str]) -> set[str]:
    """Return the files of code that are here, with those that they import from beside themselves."""
    found, todo = set[str](), [*modules]
    while todo:
        name = todo.pop()
        parts = PurePosixPath(name).parts
        if name in found or ".." in parts or name.startswith("/") or root.kind(name) != FILE:
            continue
        check_asset(root, name)
        found.add(name)
        text = read_whole(root, name, SMALL)[0].decode("utf-8", "replace")
        for dots, module, names in _FROM.findall(text):
            base = PurePosixPath(*parts[: -len(dots)]) if len(dots) <= len(parts) else None
            if base is None:
                continue
            at = base.joinpath(*module.split(".")) if module else base
            todo += [f"{at}.py", f"{at}/__init__.py"] if module else []
            todo += [f"{at / each.split()[0]}.py" for each in names.split(",") if each.split() and "/" not in each]
    return found


def _with_code(references: object, code: set[str]) -> Mapping[str, object] | None:
    """Return the part of an auto_map whose code goes along, or stands in another repository."""
    if not isinstance(references, Mapping):
        return None
    kept = {key: said for key, said in references.items() if set(_modules({"": said})) <= code}
    return kept or None
