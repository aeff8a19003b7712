"""A ``torch_dist`` folder, as megatron-core writes it: global tensors in chunks, each chunk an item of some data file.

::

    .metadata       linear_fc1.weight (4, 192, 64): chunk at (0, 96, 0) of (1, 48, 64) is in __0_1.distcp, bytes 24582-32303
    __0_1.distcp    | item | item | item | ...          every item a whole torch.save zip, one after another
    metadata.json   {"sharded_backend": "torch_dist", ...}
    common.pt       the training arguments; since megatron-core 0.19 an item named common_state/shard_0_1 instead
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from carnet.algebra.box import Box, overlap, tiles, uncovered, whole
from carnet.dtypes import BY_TORCH
from carnet.errors import BadCheckpoint, NotSupported, shown
from carnet.formats.dcp import METADATA_LIMIT, Item, StoreMetadata, TensorEntry, parse_metadata
from carnet.formats.files import Sighting, check_inside, digest_of, read_whole
from carnet.formats.jsons import CONFIG, parse_object
from carnet.formats.stored import Chunk, Stored
from carnet.formats.torch_zip import Archive, TensorItem, ends, object_item, tensor_item
from carnet.storage.protocol import Folder, Stamp, asked

Locate = Callable[[str], bool]  # tensor name -> whether its bytes are wanted
COMMON_FILE = "common.pt"
COMMON_ITEM = "common_state/shard_0_1"  # since megatron-core 0.19: dist_checkpointing/strategies/common.py


@dataclass(frozen=True, slots=True)
class Store:
    """Everything that the headers of a torch_dist folder say."""

    tensors: Mapping[str, Stored]
    objects: Mapping[str, int]  # name -> bytes
    places: Mapping[str, Item]  # of the objects
    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class Common:
    """The common state of a store, what all ranks say alike."""

    value: object
    sightings: tuple[Sighting, ...]
    inner: bytes  # the pickle that was read, where it is inside a data file
    archive: Archive  # where its storages lie


def read_store(root: Folder, locate: Locate) -> Store:
    """Return what a torch_dist folder holds; tensors that ``locate`` does not want have no chunks and are not opened."""
    backend, seen_backend = read_whole(root, "metadata.json")
    _check_backend(parse_object(backend, "metadata.json", root, CONFIG), root)
    store = read_plain_store(root, locate)
    return replace(store, sightings=(seen_backend, *store.sightings))


def read_plain_store(root: Folder, locate: Locate) -> Store:
    """Return what a folder of torch.distributed.checkpoint holds: the same without megatron-core's metadata.json."""
    raw, seen_metadata = read_whole(root, ".metadata", METADATA_LIMIT)
    metadata = parse_metadata(raw, root)
    _check_names(metadata, root)
    stamps = _check_files(root, metadata.items.values())
    wanted = {name: entry for name, entry in metadata.tensors.items() if locate(name)}
    for name, entry in wanted.items():
        _check_chunks(name, entry, metadata, root)
    chunks = _locate(root, wanted, metadata)
    tensors = {
        name: Stored("", name, _dtype(name, entry, root, known=name in wanted), entry.shape, tuple(chunks.get(name, ())))
        for name, entry in metadata.tensors.items()
    }
    places = {name: metadata.items[name, None] for name in sorted(metadata.objects)}
    objects = {name: item.nbytes for name, item in places.items()}
    return Store(tensors, objects, places, (seen_metadata, *stamps))


def read_object(root: Folder, item: Item) -> tuple[object, bytes, Archive]:
    """Return the plain object of one item, the pickle that says so, and the zip that is the item."""
    file = root.open(item.file)
    return object_item(file, item.offset, item.nbytes)


def read_common(root: Folder, store: Store) -> Common | None:
    """Return the common state of a store, None where it has none."""
    if COMMON_ITEM in store.places:
        value, inner, archive = read_object(root, store.places[COMMON_ITEM])
        return Common(value[0] if isinstance(value, list) and len(value) == 1 else value, (), inner, archive)
    if not root.kind(COMMON_FILE):
        return None
    file = root.open(COMMON_FILE)
    value, pickled, archive = object_item(file, 0, file.stamp.nbytes)
    return Common(value, (Sighting(file.stamp, digest_of(pickled)),), b"", archive)


# what megatron/core/dist_checkpointing/core.py CheckpointingConfig may say; any other word stops megatron-core, too
BACKENDS: Mapping[str, object] = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",  # of 0.18 and older
    "common_backend_version": 1,
}


def _check_backend(description: Mapping[str, object], root: Folder) -> None:
    said = {"sharded_backend": None, **description}
    for key, found in said.items():
        if key not in BACKENDS or found != BACKENDS[key]:
            expected = BACKENDS.get(key, f"no words but {', '.join(BACKENDS)}")
            facts = {"where": root / "metadata.json", "expected": expected, "found": shown(f"{key}: {found}"[:80])}
            remedy = "load it with the Megatron that wrote it and save it with --ckpt-format torch_dist"
            raise NotSupported(
                f"the checkpoint format {shown(str(said['sharded_backend']))!r} is not read", facts, remedy=remedy
            )


def _check_names(metadata: StoreMetadata, root: Folder) -> None:
    """Raise BadCheckpoint where an item belongs to nothing, or a pickled object has no item."""
    for name, start in metadata.items:
        if name not in (metadata.objects if start is None else metadata.tensors):
            raise BadCheckpoint(f"an item names {shown(name)!r}, which .metadata does not describe", {"where": root})
    for name in metadata.objects:
        if (name, None) not in metadata.items:
            raise BadCheckpoint(f"{shown(name)!r} is stored in no file", {"where": root})


def _check_files(root: Folder, items: Iterable[Item]) -> list[Sighting]:
    """Return the sightings of all data files, once every item lies inside its file and beside the others."""
    ordered = sorted(items, key=lambda item: (item.file, item.offset))
    files = {name: list(group) for name, group in groupby(ordered, key=lambda item: item.file)}

    def stamp(name: str) -> Stamp:
        check_inside(root, name, ".metadata")
        return root.open(name).stamp

    sightings = []
    for (name, held), seen in zip(files.items(), asked(root, stamp, files), strict=True):
        sightings.append(Sighting(seen, ""))
        for one, other in pairwise(held):
            if one.offset + one.nbytes > other.offset:
                facts = {"where": root / name, "items": f"at byte {one.offset} and at byte {other.offset}"}
                raise BadCheckpoint(f"two items of {shown(name)} overlap", facts)
        end = held[-1].offset + held[-1].nbytes
        if end > seen.nbytes:
            facts = {"where": root, "expected": f"at least {end} bytes", "found": f"{seen.nbytes} bytes"}
            raise BadCheckpoint(f"{shown(name)} is shorter than .metadata says", facts, remedy="copy the checkpoint again")
    return sightings


def _check_chunks(name: str, entry: TensorEntry, metadata: StoreMetadata, root: Folder) -> None:
    """Raise BadCheckpoint unless the chunks tile the tensor and each is stored."""
    if not _is_grid(entry.shape, entry.boxes) and not tiles(whole(entry.shape), entry.boxes):
        doubled, missing = overlap(entry.boxes), uncovered(whole(entry.shape), entry.boxes)
        fault = f"{doubled[0].start} and {doubled[1].start} overlap" if doubled else "they reach beyond the tensor"
        fault = f"nothing covers {missing.shape} from {missing.start}" if missing else fault
        facts = {"where": root, "shape": entry.shape, "chunks": len(entry.boxes), "reason": fault}
        raise BadCheckpoint(f"the chunks of {shown(name)!r} do not make up the tensor", facts)
    for box in entry.boxes:
        if (name, box.start) not in metadata.items:
            raise BadCheckpoint(f"a chunk of {shown(name)!r} is stored in no file", {"where": root, "chunk": f"at {box.start}"})


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Say whether boxes are the cells of a grid over a shape: the usual case, and decided without comparing any two."""
    cuts = [sorted({box.start[axis] for box in boxes}) for axis in range(len(shape))]
    if not boxes or math.prod(map(len, cuts)) != len(boxes) or len({box.start for box in boxes}) != len(boxes):
        return False
    if any(not cut or cut[0] != 0 for cut in cuts):
        return False
    sizes = [
        {low: high - low for low, high in pairwise([*cut, size])} for cut, size in zip(cuts, shape, strict=True)
    ]  # per axis: where a cell starts -> how far it reaches
    if any(reach <= 0 for axis in sizes for reach in axis.values()):
        return False
    return all(all(axis[low] == reach for axis, low, reach in zip(sizes, box.start, box.shape, strict=True)) for box in boxes)


def _dtype(name: str, entry: TensorEntry, root: Folder, *, known: bool) -> str:
    """Return carnet's name of an element type, or torch's where the tensor is not to be read."""
    spelled = entry.dtype.removeprefix("torch.")
    found = BY_TORCH.get(spelled)
    if found is None and known:
        raise NotSupported(f"the tensor {shown(name)!r} has an unknown element type", {"where": root, "found": entry.dtype})
    return found.name if found else spelled


def _locate(root: Folder, wanted: Mapping[str, TensorEntry], metadata: StoreMetadata) -> dict[str, list[Chunk]]:
    """Return the chunks of the wanted tensors, reading the heads of their items in file order."""
    jobs = [(metadata.items[name, box.start], name, box) for name, entry in wanted.items() for box in entry.boxes]
    jobs.sort(key=lambda job: (job[0].file, job[0].offset))
    groups = [(name, list(group)) for name, group in groupby(jobs, key=lambda job: job[0].file)]

    def located(group: tuple[str, list[tuple[Item, str, Box]]]) -> list[tuple[str, Chunk]]:
        name, held = group
        file, found = root.open(name), list[tuple[str, Chunk]]()
        file.expect(place for item, _, _ in held for place in ends(item.offset, item.nbytes))
        for item, tensor, box in held:
            holds = tensor_item(file, item.offset, item.nbytes)
            _check_item(holds, tensor, wanted[tensor], box, root / name)
            found.append((tensor, Chunk(box, name, holds.offset, holds.strides)))
        return found

    chunks: dict[str, list[Chunk]] = {}
    for some in asked(root, located, groups):
        for tensor, chunk in some:
            chunks.setdefault(tensor, []).append(chunk)
    for found in chunks.values():
        found.sort(key=lambda chunk: chunk.box.start)
    return chunks


def _check_item(found: TensorItem, tensor: str, entry: TensorEntry, box: Box, where: Folder) -> None:
    """Raise BadCheckpoint where an item holds something else than .metadata says."""
    known = BY_TORCH.get(entry.dtype.removeprefix("torch."))
    if known is not None and (found.dtype != known.name or found.shape != box.shape):
        said, holds = f"{known.name} {box.shape}", f"{found.dtype} {found.shape}"
        facts = {"where": where, "chunk": f"at {box.start}", "expected": said, "found": holds}
        raise BadCheckpoint(f"an item of {shown(tensor)!r} is not the chunk that .metadata describes", facts)
