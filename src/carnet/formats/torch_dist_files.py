"""The files of a new ``torch_dist`` checkpoint, all but the tensors' bytes: laid out before any of those is read.

::

    latest_checkpointed_iteration.txt    iter_0000001/  metadata.json  common.pt  .metadata  __0_0.distcp  __0_1.distcp ...

    __0_0.distcp   | prefix | chunk | suffix | prefix | chunk | suffix | ...     every frame follows from a chunk's type and shape

What Megatron stores beside tensors and a new model does not have (``_extra_state``) is written as nothing: a pickled ``[None]``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnet.algebra.box import Box
from carnet.dtypes import BY_NAME
from carnet.errors import BadRequest
from carnet.formats.torch_frames import Frame, archive, frame
from carnet.formats.torch_opcodes import Call, Global, Made, Program, Value, dumps
from carnet.steps import RawFile, TargetFile, TargetTensor, TextFile

TRACKER = "latest_checkpointed_iteration.txt"
BACKEND = (  # CheckpointingConfig, megatron/core/dist_checkpointing/core.py
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}'
)
# how Megatron nests the states of layers and optimizers: _build_sharded_state_dict_metadata, megatron/training/checkpointing.py
CONTENT: Mapping[str, Value] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = Global(f"{_CHECKPOINT}.metadata", "Metadata")
_TENSOR = Global(f"{_CHECKPOINT}.metadata", "TensorStorageMetadata")
_OBJECT = Global(f"{_CHECKPOINT}.metadata", "BytesStorageMetadata")
_PROPERTIES = Global(f"{_CHECKPOINT}.metadata", "TensorProperties")
_CHUNK = Global(f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata")
_INDEX = Global(f"{_CHECKPOINT}.metadata", "MetadataIndex")
_META = Global(f"{_CHECKPOINT}.metadata", "StorageMeta")
_INFO = Global(f"{_CHECKPOINT}.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"), (0,))


@dataclass(frozen=True, slots=True)
class StoreChunk:
    """One chunk of a global tensor."""

    name: str
    dtype: str  # carnet's name
    shape: tuple[int, ...]  # elements, of the global tensor
    box: Box  # what this chunk holds of it


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """The files of a store but for the training arguments: where every chunk will lie, and what is not a chunk."""

    files: tuple[TargetFile, ...]  # .distcp; a TargetTensor here is a chunk, with the chunk's shape
    raws: tuple[RawFile, ...]  # .metadata, and the .distcp files of nothing but empty states


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    start: tuple[int, ...] | None  # of a chunk
    file: str
    offset: int  # bytes
    nbytes: int


def folder_of(iteration: int | None) -> str:
    """Return the name of an iteration's folder; None is Megatron's "release", a checkpoint that no training run stands behind.

    >>> folder_of(1), folder_of(None)
    ('iter_0000001', 'release')
    """
    return "release" if iteration is None else f"iter_{iteration:07d}"


def layout_store(
    folder: str, files: Sequence[tuple[str, Sequence[StoreChunk]]], states: Sequence[tuple[str, Sequence[str]]] = ()
) -> StoreFiles:
    """Return where each chunk of new data files will lie, one item after another in the order given, and their ``.metadata``.

    ``folder`` is the iteration's; ``files`` are names in it with their chunks; ``states`` are further names with the names of
    empty states ("...linear_qkv._extra_state/shard_0_4"), which Megatron's strict loading wants. Whether the chunks of a tensor
    cover it is not looked at here. Raises ValueError where two say the same place, or one tensor is said in two ways.

    >>> store = layout_store("iter_0000001", [("__0_0.distcp", [StoreChunk("w", "bf16", (4, 3), Box((2, 0), (2, 3)))])])
    >>> store.files[0].tensors[0].offset, store.files[0].nbytes
    (704, 1577)
    """
    frames: dict[tuple[str, tuple[int, ...]], Frame] = {}
    items: list[_Item] = []
    raws, laid = [], []
    empty = archive(dumps([None]))
    for file, names in states:
        raws.append(RawFile(f"{folder}/{file}", empty * len(names)))
        items += [_Item(name, None, file, number * len(empty), len(empty)) for number, name in enumerate(names)]
    for file, chunks in files:
        offset, tensors = 0, []
        for chunk in chunks:
            framed = _framed(frames, chunk.dtype, chunk.box.shape)
            tensors.append(TargetTensor(chunk.name, chunk.dtype, chunk.box.shape, offset + len(framed.prefix)))
            items.append(_Item(chunk.name, chunk.box.start, file, offset, framed.nbytes))
            offset += framed.nbytes
        laid.append(TargetFile(f"{folder}/{file}", offset, tuple(tensors), {}, "torch_dist"))
    _check_distinct([file for file, _ in (*files, *states)], items)
    tensors_of = _by_name([chunk for _, chunks in files for chunk in chunks])
    objects = [name for _, names in states for name in names]
    raws.append(RawFile(f"{folder}/.metadata", _metadata(tensors_of, objects, items)))
    return StoreFiles(tuple(laid), tuple(raws))


def frames_of(file: TargetFile) -> Iterator[tuple[int, bytes]]:
    """Give every byte of a data file that is not a chunk's: offset and bytes, in order, once for each gap between two chunks.

    Raises BadRequest where the file's places are not those that ``layout_store`` gives.
    """
    frames: dict[tuple[str, tuple[int, ...]], Frame] = {}
    end, held = 0, b""
    for tensor in file.tensors:
        framed = _framed(frames, tensor.dtype, tensor.shape)
        held += framed.prefix
        if end + len(held) != tensor.offset:
            facts = {"where": file.name, "expected": f"byte {end + len(held)}", "found": f"byte {tensor.offset}"}
            raise BadRequest(f"{tensor.name} does not lie where its frame ends", facts)
        yield end, held
        end = tensor.offset + framed.nbytes - len(framed.prefix) - len(framed.suffix)
        held = framed.suffix
    if end + len(held) != file.nbytes:
        facts = {"where": file.name, "expected": f"{end + len(held)} bytes", "found": f"{file.nbytes} bytes"}
        raise BadRequest("a data file is not as long as its chunks and their frames", facts)
    if held:
        yield end, held


def common_pt(
    arguments: Mapping[str, Value],
    iteration: int | None,
    content: Mapping[str, Value] = CONTENT,
    more: Mapping[str, Value] | None = None,
) -> bytes:
    """Return the bytes of ``common.pt``: the training arguments as an argparse.Namespace, what Megatron saves beside them, and more.

    A torch type is ``torch_type("bf16")``, a member of an enum ``Call(Global("megatron.core.enums", "ModelType"), (1,))``.
    """
    state: dict[str, Value] = {
        "args": Made(Global("argparse", "Namespace"), arguments),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": content,
        **(more or {}),
    }
    return archive(dumps(state), "common")


def torch_type(dtype: str) -> Global:
    """Return what stands for an element type among training arguments.

    >>> torch_type("bf16")
    Global(module='torch', name='bfloat16')
    """
    return Global("torch", BY_NAME[dtype].torch)


def store_texts(iteration: int | None) -> tuple[TextFile, ...]:
    """Return the small text files: what the folder is, and which folder is the latest."""
    latest = "release" if iteration is None else str(iteration)
    return TextFile(f"{folder_of(iteration)}/metadata.json", BACKEND), TextFile(TRACKER, latest)


def _framed(frames: dict[tuple[str, tuple[int, ...]], Frame], dtype: str, shape: tuple[int, ...]) -> Frame:
    """Return a frame, made once for all chunks of one type and shape."""
    framed = frames.get((dtype, shape))
    if framed is None:
        framed = frames[dtype, shape] = frame(dtype, shape)
    return framed


def _check_distinct(files: Sequence[str], items: Sequence[_Item]) -> None:
    if len(set(files)) != len(files):
        raise ValueError("two files have the same name")
    if len({(item.name, item.start) for item in items}) != len(items):
        raise ValueError("two items have the same name and place")


def _by_name(chunks: Sequence[StoreChunk]) -> dict[str, list[StoreChunk]]:
    found: dict[str, list[StoreChunk]] = {}
    for chunk in chunks:
        held = found.setdefault(chunk.name, [])
        held.append(chunk)
        if (chunk.dtype, chunk.shape) != (held[0].dtype, held[0].shape) or len(chunk.box.start) != len(chunk.shape):
            raise ValueError(f"the chunks of {chunk.name} disagree on its type or shape")
        reaches = zip(chunk.box.start, chunk.box.shape, chunk.shape, strict=True)
        if any(low < 0 or length < 0 or low + length > size for low, length, size in reaches):
            raise ValueError(f"a chunk of {chunk.name} reaches beyond it")
    return found


def _metadata(tensors: Mapping[str, Sequence[StoreChunk]], objects: Sequence[str], items: Sequence[_Item]) -> bytes:
    """Return the pickle of a ``Metadata``: what there is, and the item that holds each (torch/distributed/checkpoint)."""
    program = Program()
    code = program.code
    _begin(program, _METADATA)
    program.text("state_dict_metadata")
    code += b"}("
    for name, chunks in tensors.items():
        program.text(name)
        _push_tensor(program, chunks)
    for name in objects:
        program.text(name)
        program.push(Made(_OBJECT, {}))
    code += b"u"
    program.text("planner_data")
    program.push(None)
    program.text("storage_data")
    code += b"}("
    for item in items:
        _push_item(program, item)
    code += b"u"
    program.text("storage_meta")
    program.push(Made(_META, {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}))
    program.text("version")
    program.text("1.0.0")  # CURRENT_DCP_VERSION, torch/distributed/checkpoint/filesystem.py
    code += b"ub"
    return program.finished()


def _begin(program: Program, kind: Global) -> None:
    """Make an object and begin the table of its fields, which ``ub`` ends."""
    program.name(kind)
    program.code += b")\x81}("


def _push_tensor(program: Program, chunks: Sequence[StoreChunk]) -> None:
    first = chunks[0]
    _begin(program, _TENSOR)
    program.text("properties")
    program.push(Made(_PROPERTIES, (torch_type(first.dtype), _STRIDED, False, _CONTIGUOUS, False)))
    program.text("size")
    _push_size(program, first.shape)
    program.text("chunks")
    program.code += b"]("
    for chunk in chunks:
        _begin(program, _CHUNK)
        program.text("offsets")
        _push_size(program, chunk.box.start)
        program.text("sizes")
        _push_size(program, chunk.box.shape)
        program.code += b"ub"
    program.code += b"eub"


def _push_item(program: Program, item: _Item) -> None:
    """Push a key and a value of storage_data."""
    _begin(program, _INDEX)
    program.text("fqn")
    program.text(item.name)
    program.text("index")
    program.push(None)
    if item.start is not None:
        program.text("offset")
        _push_size(program, item.start)
    program.code += b"ub"
    _begin(program, _INFO)
    program.text("relative_path")
    program.text(item.file)
    program.text("offset")
    program.push(item.offset)
    program.text("length")
    program.push(item.nbytes)
    program.code += b"ub"


def _push_size(program: Program, shape: tuple[int, ...]) -> None:
    """Push a torch.Size, made once for all that are equal."""
    if not program.recall(shape):
        program.push(Call(_SIZE, (shape,)))
        program.remember(shape)
