"""What stands around the tensors of a target and is read with them: the metadata of headers, the totals of an index, ``auto_map``."""

from collections.abc import Iterator
from math import prod

from carnet.dialects.kinds import KINDS
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.examiner.account import executed
from carnet.examiner.compare import Finding
from carnet.formats.folder import CONFIG, INDEX
from carnet.formats.jsons import read_object
from carnet.formats.safetensors import read_header
from carnet.formats.stored import Checkpoint
from carnet.storage.lent import ADAPTER
from carnet.storage.protocol import names_in

FORMATS = (None, "pt")  # transformers and vLLM take the others for tensors of another framework


def check_containers(source: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Yield what is wrong around the tensors of a folder of safetensors."""
    if target.format != "safetensors":
        return
    theirs = _metadata(source) if source.format == "safetensors" else {}
    for file, said in _metadata(target).items():
        known = {pair for metadata in theirs.values() for pair in metadata.items()}
        for key, text in said.items():
            if key == "format" and text not in FORMATS:
                yield Finding("header metadata differs", "format", file, f"expected 'pt', found {text!r}"[:200])
            elif key != "format" and (key, text) not in known:
                yield Finding("header metadata that the source does not have", key[:80], file, f"it says {text!r}"[:200])
    yield from _totals(target)
    named = executed(source.config) if KINDS[source.dialect].companions else set[tuple[str, str]]()
    for key, each in sorted(executed(target.config) - named):
        yield Finding(f"{key} was added", key, CONFIG, f"loading it executes code that the source does not name: {each}"[:400])


def _metadata(of: Checkpoint) -> dict[str, dict[str, str]]:
    files = sorted({chunk.file for stored in of.tensors.values() for chunk in stored.chunks})
    return {file: dict(read_header(of.root, file).metadata) for file in files if not file.startswith(ADAPTER)}


def _totals(target: Checkpoint) -> Iterator[Finding]:
    """Compare the sums in an index; its map is compared when the folder is opened."""
    if INDEX not in names_in(target.root):
        return
    try:
        said = read_object(target.root, INDEX).get("metadata")
    except CarnetError as error:
        yield Finding("the index cannot be read", INDEX, INDEX, error.what)
        return
    sizes = [(prod(stored.shape), BY_NAME[stored.dtype].nbytes) for stored in target.tensors.values()]
    totals = {
        "total_size": sum(count * nbytes for count, nbytes in sizes),
        "total_parameters": sum(count for count, _ in sizes),
    }
    for key, total in totals.items():
        found = said.get(key, total) if isinstance(said, dict) else total
        if found != total:
            yield Finding("the index says another total", key, INDEX, f"expected {total}, found {found!r}"[:200])
