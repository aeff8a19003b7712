"""A plan's target while it is being written: every file in its full size first, small ones last."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import PurePosixPath

import xxhash

from carnet.errors import BadCheckpoint
from carnet.executor.files import contained, opened
from carnet.executor.quantizing import numbers
from carnet.formats.files import contents
from carnet.formats.safetensors import render_header
from carnet.formats.torch_dist_files import frames_of
from carnet.plans.columns import Plan
from carnet.steps import AssetFile, Put
from carnet.storage.protocol import Crossing, Draft, Folder, Part
from carnet.storage.schemes import PathLike, file_at, folder_at


def owned(
    plan: Plan, crossing: Crossing, source: PathLike | Folder | None, out: PathLike | Folder, part: Part | None = None
) -> AbstractContextManager[Draft]:
    """Own the target of a plan, a new one or as an earlier run of the same crossing left it; errors are those of ``Folder.owned``."""
    return folder_at(out).owned(names_of(plan), crossing, None if source is None else folder_at(source), part)


def names_of(plan: Plan) -> list[str]:
    """Return the names of all files of a target."""
    return [contained(file.name) for part in (plan.files, plan.assets, plan.texts, plan.raws) for file in part]


def prepare(plan: Plan, draft: Draft, own: Collection[str] | None = None) -> None:
    """Make every tensor file, or ``own`` ones, in full size, with header and known numbers, where there is room for all."""
    sizes = [(file.name, file.nbytes) for file in plan.files] + [(asset.name, asset.nbytes) for asset in plan.assets]
    draft.reserve([*sizes, *((text.name, len(text.text.encode())) for text in plan.texts)])
    known: dict[str, list[tuple[int, bytes]]] = {}
    for step in plan.steps.only(Put):
        known.setdefault(step.target.file, []).append((step.target.offset, numbers(step)))
    for file in plan.files if own is None else [file for file in plan.files if file.name in {*own}]:
        parts = frames_of(file) if file.kind == "torch_dist" else [(0, render_header(file))]
        draft.create(file.name, file.nbytes, chain(parts, known.get(file.name, ())))


def intact(plan: Plan, draft: Draft) -> bool:
    """Say whether every tensor file is there in its size, as an earlier run made it."""
    return all(draft.size(file.name) == file.nbytes for file in plan.files)


def put_texts(plan: Plan, draft: Draft) -> None:
    """Write the texts of a plan, the config last: what has it is a model."""
    for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
        draft.put(text.name, [text.text.encode()])


def put_asset(asset: AssetFile, draft: Draft) -> None:
    """Take a file over, whole or not at all, and compare its digest on the way."""
    draft.put(asset.name, _chunks(asset))


def _chunks(asset: AssetFile) -> Iterator[bytes]:
    digest = xxhash.xxh3_128()
    for chunk in contents(opened(*file_at(asset.path))):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != asset.digest:
        facts = {"where": asset.path, "expected": f"xxh3-128 {asset.digest}", "found": digest.hexdigest()}
        raise BadCheckpoint("a file changed after planning", facts, remedy="plan again")


def written(plan: Plan) -> list[str]:
    """Return the names of every file of a plan, then of every folder, the staging folder's own "" last: what must reach the disk."""
    names = names_of(plan)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
    return [*names, *sorted(folders, reverse=True), ""]
