"""The per-rank format of Megatron-LM: each model-parallel rank's state is one ``torch.save`` file, in a folder of its own.

::

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     args, iteration, model (or model0, model1, ...), optimizer, rng_state, ...
                           distrib_optim.pt       the distributed optimizer's state: never opened

A *unit* is one virtual chunk of one rank, ``tp1-pp0-ep0-vp0``: all four numbers are always there. Layers are counted within it.
A single number after TT is a pipeline rank or an expert rank: the arguments say which.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from carnet.algebra.box import whole
from carnet.dtypes import BY_NAME
from carnet.errors import BadCheckpoint, NotSupported, shown
from carnet.formats.files import Sighting, check_inside, digest_of
from carnet.formats.jsons import is_text
from carnet.formats.stored import Chunk, Stored
from carnet.formats.torch_pickles import Inert, Namespace, PickledTensor
from carnet.formats.torch_zip import Archive, locate_storage, object_item, open_archive
from carnet.storage.protocol import File, Folder, names_in, read_at

MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
READ = frozenset({"args", "checkpoint_version", "iteration"})  # what is taken out of a rank's file beside the model
_PREFIX = "mp_rank_"
_NAME = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_CHUNK = re.compile(r"model(0|[1-9]\d{0,3})?")
_RANKS = 1 << 16  # no machine has more
_DEPTH, _VALUES = 32, 1_000_000  # of a model's state: real ones have two levels and some thousand values

World = tuple[int, int, int]  # sizes, or the ranks of one file: tensor, pipeline and expert parallel


@dataclass(frozen=True, slots=True)
class Ranks:
    """Everything that the files of all ranks say."""

    tensors: Mapping[tuple[str, str], Stored]
    objects: Mapping[str, int]  # "optimizer/mp_rank_00", "tp0-pp0-ep0-vp0/decoder..._extra_state" -> bytes
    common: Mapping[str, object]  # args, iteration and version, as the first rank has them
    sizes: Mapping[str, int]  # "tp", "pp", "ep", "vp"
    sightings: tuple[Sighting, ...]
    values: Mapping[str, object]  # of the objects that were asked for


@dataclass(frozen=True, slots=True)
class _File:
    """One rank's file, read."""

    common: Mapping[str, object]  # args, iteration and version
    chunks: Sequence[Mapping[str, Stored | int]]  # for each virtual chunk: name -> tensor, or bytes of what is none
    others: Mapping[str, int]  # what stands beside the model: name -> bytes
    sightings: tuple[Sighting, ...]
    values: Sequence[Mapping[str, object]]  # for each virtual chunk: what is not a tensor and was asked for


def rank_folders(names: Sequence[str]) -> list[str]:
    """Return the folders of ranks among the names in a folder."""
    return [name for name in names if name.startswith(_PREFIX)]


def read_ranks(root: Folder, locate: Callable[[str], bool], keep: Callable[[str], bool] = lambda name: False) -> Ranks:
    """Return what a folder of ranks holds; tensors that ``locate`` does not want have no chunks, ``keep`` names objects to return.

    Raises BadCheckpoint where ranks are missing, or contradict each other or the arguments.
    """
    folders = rank_folders(names_in(root))
    first = _read_file(root, folders[0], locate, keep)
    world = _world(first.common, root)
    _check_chunks(first, root)
    placed = None if world is None else _expected(world)
    if placed is not None:  # before any more is read: a folder that was not copied is the likeliest fault
        _compare(placed, folders, root)
    files = {folders[0]: first}
    for folder in folders[1:]:
        files[folder] = _read_file(root, folder, locate, keep)
        _agree(first, files[folder], folder, root)
    placed = _by_content(files, root) if placed is None else placed
    tensors: dict[tuple[str, str], Stored] = {}
    objects: dict[str, int] = {}
    values: dict[str, object] = {}
    for folder, (tensor, pipeline, expert) in placed.items():
        objects |= {f"{name}/{folder}": nbytes for name, nbytes in files[folder].others.items()}
        for virtual, state in enumerate(files[folder].chunks):
            unit = f"tp{tensor}-pp{pipeline}-ep{expert}-vp{virtual}"
            for name, held in state.items():
                if isinstance(held, Stored):
                    tensors[unit, name] = replace(held, unit=unit)
                else:
                    objects[f"{unit}/{name}"] = held
            values |= {f"{unit}/{name}": value for name, value in files[folder].values[virtual].items()}
    sizes = [max(ranks) + 1 for ranks in zip(*placed.values(), strict=True)]
    named = dict(zip(("tp", "pp", "ep", "vp"), (*sizes, len(first.chunks)), strict=True))
    seen = tuple(sighting for file in files.values() for sighting in file.sightings)
    return Ranks(tensors, objects, first.common, named, seen, values)


def _read_file(root: Folder, folder: str, locate: Callable[[str], bool], keep: Callable[[str], bool]) -> _File:
    """Read one rank's file, and look whether an optimizer's lies beside it."""
    name = f"{folder}/{MODEL_FILE}"
    check_inside(root, name, "the folder's listing")
    file = root.open(name)
    _refuse_old(file)
    state, pickled, _ = object_item(file, 0, file.stamp.nbytes)
    archive = open_archive(file, 0, file.stamp.nbytes)
    # a key that is not text may be too deep to hash
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        facts = {"where": root, "expected": "a table with args, model, ...", "found": type(state).__name__}
        raise BadCheckpoint(f"{shown(name)} holds no state of a rank", facts)
    models = _models(state, root / name)
    values: list[dict[str, object]] = [{} for _ in models]
    chunks = [_chunk(part, archive, root / name, locate, _Keep(keep, kept)) for part, kept in zip(models, values, strict=True)]
    seen = [Sighting(file.stamp, digest_of(pickled))]
    others = {key: _nbytes(value) for key, value in state.items() if key not in READ and not _is_model(key)}
    beside = f"{folder}/{OPTIMIZER_FILE}"
    if root.kind(beside):
        check_inside(root, beside, "the folder's listing")
        file = root.open(beside)
        seen.append(Sighting(file.stamp, ""))
        others[OPTIMIZER_FILE] = file.stamp.nbytes
    common = {key: value for key, value in state.items() if key in READ or key == "modelopt_state"}
    return _File(common, chunks, others, tuple(seen), values)


def _refuse_old(file: File) -> None:
    """Refuse what torch wrote before 1.6: bare pickles with the tensors' bytes after them."""
    if file.stamp.nbytes > 2 and read_at(file, 0, 2)[:1] == b"\x80":
        facts = {"where": f"{file.where}/{file.stamp.file}", "found": "a bare pickle, as torch wrote before 1.6"}
        remedy = "load it with torch.load and save it again with torch.save"
        raise NotSupported("the old file format of torch.save is not read", facts, remedy=remedy)


def _is_model(key: str) -> bool:
    return _CHUNK.fullmatch(key) is not None


def _models(state: Mapping[str, object], where: Folder) -> list[object]:
    """Return the states of a rank's virtual chunks: model, or model0, model1, ..."""
    keys = [key for key in state if _is_model(key)]
    expected = ["model"] if len(keys) == 1 and "model" in keys else [f"model{number}" for number in range(len(keys))]
    if not keys or set(keys) != set(expected):
        facts = {"where": where, "expected": "model, or model0, model1, ...", "found": shown(", ".join(keys)) or "-"}
        raise BadCheckpoint("a rank's file does not hold the model's state", facts)
    return [state[key] for key in expected]


@dataclass(frozen=True, slots=True)
class _Keep:
    """What is wanted of the values that are no tensors, and a place for them."""

    wants: Callable[[str], bool]
    values: dict[str, object]


def _chunk(
    part: object, archive: Archive, where: Folder, locate: Callable[[str], bool], keep: _Keep
) -> dict[str, Stored | int]:
    """Return one virtual chunk's values under their dotted names: tensors, and the bytes of what is none."""
    result: dict[str, Stored | int] = {}
    waiting = [("", part, 0)]
    count = 0
    while waiting:
        prefix, table, depth = waiting.pop()
        if not isinstance(table, dict):
            facts = {"where": where, "expected": "a table of tensors", "found": type(table).__name__}
            raise BadCheckpoint("a rank's file does not hold the model's state", facts)
        count += len(table)
        if depth > _DEPTH or count > _VALUES:
            raise BadCheckpoint("the model's state is too large or nested too deeply", {"where": where})
        for key, value in table.items():
            name = f"{prefix}{key}" if isinstance(key, str) and is_text(key) else ""
            if not name or name in result:
                fault = f"the name {shown(name)!r} twice" if name else "a name that is not text"
                raise BadCheckpoint(f"the model's state has {fault}", {"where": where})
            if isinstance(value, dict):
                waiting.append((f"{name}.", value, depth + 1))
            elif isinstance(value, PickledTensor):
                result[name] = _stored(name, value, archive, where, wanted=locate(name))
            else:
                result[name] = _nbytes(value)
                if keep.wants(name):
                    keep.values[name] = value
    return result


def _stored(name: str, tensor: PickledTensor, archive: Archive, where: Folder, *, wanted: bool) -> Stored:
    """Return a tensor with the place of its bytes; its unit is still to be said."""
    reach = 0  # elements between the first and the last of the axes seen so far
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size > 1 and stride <= reach and 0 not in tensor.shape:
            facts = {"where": where, "shape": tensor.shape, "strides": tensor.strides}
            raise BadCheckpoint(f"elements of {shown(name)!r} lie on top of each other", facts)
        reach += (size - 1) * stride
    if not wanted:
        return Stored("", name, tensor.dtype, tensor.shape, ())
    itemsize = BY_NAME[tensor.dtype].nbytes
    offset = locate_storage(archive, tensor.storage, itemsize) + tensor.offset * itemsize
    chunk = Chunk(whole(tensor.shape), archive.span.file.stamp.file, offset, tensor.strides)
    return Stored("", name, tensor.dtype, tensor.shape, (chunk,))


def _nbytes(value: object) -> int:
    """Return the bytes of all storages and texts below a value, each once."""
    seen: set[int] = set()
    storages: dict[str, int] = {}
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, PickledTensor):
            nbytes = BY_NAME[item.storage.dtype].nbytes if item.storage.dtype else 1
            storages[item.storage.key] = item.storage.length * nbytes
        elif isinstance(item, (bytes, str)):
            total += len(item)
        elif isinstance(item, (dict, list, tuple, Namespace, Inert)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(_inside(item))
    return total + sum(storages.values())


def _inside(item: object) -> list[object]:
    """Return the values that one value holds."""
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, Inert):
        # bytes, as protocol 2 spells them: a text and the codec's name
        return list(item.args[:1]) if item.name == "_codecs.encode" else [*item.args, item.state]
    return [item.fields] if isinstance(item, Namespace) else list(item) if isinstance(item, (list, tuple)) else []


def _world(common: Mapping[str, object], where: Folder) -> World | None:
    """Return the sizes that the arguments say, or None where there are no arguments."""
    arguments = common.get("args")
    if arguments is None:
        return None
    if not isinstance(arguments, Namespace):
        raise BadCheckpoint("the training arguments are no arguments", {"where": where, "found": type(arguments).__name__})
    tensor, pipeline, expert = (
        _size(arguments, f"{axis}_model_parallel_size", where) for axis in ("tensor", "pipeline", "expert")
    )
    if tensor * pipeline * expert > _RANKS:
        facts = {"where": where, "tensor, pipeline, expert": f"{tensor}, {pipeline}, {expert}"}
        raise BadCheckpoint("the training arguments say more ranks than any machine has", facts)
    cut = arguments.fields.get("expert_tensor_parallel_size")
    if expert > 1 and cut not in (None, tensor):
        facts = {"where": where, "expert_tensor_parallel_size": _brief(cut), "tensor_model_parallel_size": tensor}
        remedy = "load it with Megatron and save it with --ckpt-format torch_dist"
        raise NotSupported("ranks whose experts are cut otherwise than the rest are not read", facts, remedy=remedy)
    return tensor, pipeline, expert


def _check_chunks(file: _File, where: Folder) -> None:
    """Raise BadCheckpoint where there are more or fewer virtual chunks than the arguments say."""
    arguments = file.common.get("args")
    said = arguments.fields.get("virtual_pipeline_model_parallel_size") if isinstance(arguments, Namespace) else None
    if said is not None and said != len(file.chunks):
        found = "model" if len(file.chunks) == 1 else f"model0 to model{len(file.chunks) - 1}"
        facts = {"where": where, "virtual_pipeline_model_parallel_size": _brief(said), "found": found}
        raise BadCheckpoint("a rank's virtual chunks are not all here, or too many", facts)


def _size(arguments: Namespace, name: str, where: Folder) -> int:
    found = arguments.fields.get(name)
    if found is None:  # arguments older than the axis
        return 1
    if type(found) is not int or found < 1:
        raise BadCheckpoint(f"the training argument {name!r} is not a size", {"where": where, "found": _brief(found)})
    return found


def _brief(value: object) -> str:
    """Return a value in few words: what is made of other values could be endless."""
    return (
        shown(str(value))
        if isinstance(value, (bool, float, str))
        else str(value)[:20]
        if type(value) is int
        else type(value).__name__
    )


def _expected(world: World) -> dict[str, World]:
    """Return every rank's folder: a number appears where its size is more than one (Megatron's get_checkpoint_name)."""
    _, pipelines, experts = world
    return {
        f"{_PREFIX}{t:02d}" + (f"_{p:03d}" if pipelines > 1 else "") + (f"_{e:03d}" if experts > 1 else ""): (t, p, e)
        for t, p, e in product(*map(range, world))
    }


def _compare(placed: Mapping[str, World], folders: Sequence[str], root: Folder) -> None:
    """Raise BadCheckpoint where the folders are not those of the ranks."""
    missing, extra = sorted(placed.keys() - set(folders)), sorted(set(folders) - placed.keys())
    if missing or extra:
        sizes = (max(ranks) + 1 for ranks in zip(*placed.values(), strict=True))
        facts: dict[str, object] = {"where": root, "tensor, pipeline, expert": ", ".join(map(str, sizes))}
        facts |= {"missing": shown(", ".join(missing[:8]))} if missing else {}
        facts |= {"too many": shown(", ".join(extra[:8]))} if extra else {}
        raise BadCheckpoint("the ranks' folders are not all here, or too many", facts, remedy="copy the checkpoint again")


def _by_content(files: Mapping[str, _File], root: Folder) -> dict[str, World]:
    """Return every folder's ranks without arguments.

    Expert-parallel ranks hold the same names, pipeline ranks never do: the first alone has the embedding.
    """
    numbers = {}
    for folder in files:
        match = _NAME.fullmatch(folder)
        if match is None:
            raise BadCheckpoint(f"{shown(folder)!r} is not a name of a rank's folder", {"where": root})
        numbers[folder] = [int(number) for number in match.groups() if number is not None]
    if len({len(found) for found in numbers.values()}) != 1:
        raise BadCheckpoint("the ranks' folders are of several kinds", {"where": root, "found": ", ".join(list(files)[:8])})
    alike = len({tuple(frozenset(chunk) for chunk in file.chunks) for file in files.values()}) == 1
    placed: dict[str, World] = {}
    for folder, (tensor, *rest) in numbers.items():
        pipeline, expert = rest if len(rest) == 2 else (0, *rest) if alike and rest else (*rest, 0) if rest else (0, 0)
        placed[folder] = (tensor, pipeline, expert)
    sizes = [max(ranks) + 1 for ranks in zip(*placed.values(), strict=True)]
    if len(files) < sizes[0] * sizes[1] * sizes[2] > _RANKS:
        raise BadCheckpoint("the ranks' folders are not all here", {"where": root, "found": len(files)})
    _compare(_expected((sizes[0], sizes[1], sizes[2])), list(files), root)
    return placed


def _agree(first: _File, other: _File, folder: str, root: Folder) -> None:
    """Raise BadCheckpoint where two ranks' files are not of one saving."""
    for what, one, two in (
        ("the parallel sizes", _world(first.common, root), _world(other.common, root)),
        ("the iteration", _brief(first.common.get("iteration")), _brief(other.common.get("iteration"))),
        ("the number of virtual chunks", len(first.chunks), len(other.chunks)),
    ):
        if one != two:
            facts = {"where": root / folder, "expected": shown(str(one)), "found": shown(str(two))}
            raise BadCheckpoint(f"the ranks disagree on {what}", facts, remedy="copy the checkpoint again")
