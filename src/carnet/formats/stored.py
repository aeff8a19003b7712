"""A *stored tensor* is what a file or a rank holds; a *checkpoint* is all of them, with where every byte lies.

The readers in this folder produce these records from headers alone; nothing after them needs to know a file format to find
a byte. An *extent* of a tensor is a chunk: a box of the tensor's own indices and the place of its first element in one file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from carnet.algebra.box import Box
from carnet.algebra.strided import within
from carnet.dtypes import BY_NAME
from carnet.errors import NotSupported
from carnet.formats.training import Training
from carnet.storage.protocol import Folder, Stamp

Key = tuple[str, str]  # (unit, name) of a stored tensor


def label_of(key: Key) -> str:
    """Return what a stored tensor is called in messages and documents.

    >>> label_of(("rank3", "lm_head.weight")), label_of(("", "lm_head.weight"))
    ('rank3/lm_head.weight', 'lm_head.weight')
    """
    return "/".join(filter(None, key)) if key[0] else key[1]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a stored tensor in one file."""

    box: Box  # in the stored tensor's own index space
    file: str  # path below the checkpoint's root, with forward slashes
    offset: int  # bytes, from the start of the file to element ``box.start``
    strides: tuple[int, ...]  # elements (not bytes) from one index to the next, per axis


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a program stored it."""

    unit: str  # the rank or part that holds it ("rank3"); "" where names are global
    name: str  # the name in the file
    dtype: str  # carnet's name of the element type
    shape: tuple[int, ...]  # elements; global where a format stores global tensors in chunks
    chunks: tuple[Chunk, ...]  # tile the shape; empty where only names and shapes were asked for

    @property
    def label(self) -> str:
        """Return what it is called in messages and documents."""
        return label_of((self.unit, self.name))

    @property
    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        return math.prod(self.shape) * BY_NAME[self.dtype].nbytes


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight that is stored as codes of few bits, with the scales that they stand under."""

    recipe: str  # its name: "modelopt/fp8"
    shape: tuple[int, ...]  # of the weight, unpacked
    codes: Stored
    scales: Stored | None  # a number for each block
    outer: Stored | None  # one number over them
    others: tuple[Stored, ...]  # what stands beside and is no part of the weight: scale of activations, shape
    parts_of: tuple[int, ...] = ()  # rows of each part that has a scale of its own, where an engine joins several; () for one

    @property
    def parts(self) -> tuple[Stored, ...]:
        """Return the stored tensors that make up the weight: codes, then scales."""
        return tuple(each for each in (self.codes, self.scales, self.outer) if each is not None)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the headers of a checkpoint say."""

    root: Folder  # the folder that all ``file`` paths are below
    dialect: str  # one of KINDS in carnet.dialects.kinds: whose names these are
    format: str  # how the bytes lie, for people: "torch_dist", "safetensors", ...
    config: Mapping[str, object]  # config.json, or the training arguments, as plain values
    tensors: Mapping[tuple[str, str], Stored]  # (unit, name) -> tensor
    objects: Mapping[str, int]  # names of stored things that are no tensors (pickled states) -> bytes
    stamps: tuple[Stamp, ...]  # every file that was looked at, sorted by name
    digest: str  # hex digest of all headers and metadata that were read
    notes: Mapping[str, str]  # facts about the checkpoint for `inspect`: "iteration" -> "1000", ...
    program: str = ""  # of a Megatron checkpoint: the program that means its arguments, where that is known, as a requirement
    era: str = ""  # of Megatron's store: what its form says of the release, "<0.19" or ">=0.19"; of a job that runs, "==0.16"
    accept: tuple[str, ...] = ()  # Megatron's arguments, or keys of a config, whose effect a person does without
    family: str | None = None  # the one that a person names
    adapter: "Checkpoint | None" = None  # of another folder, whose files are lent: what is added to its weights
    also: str | None = None  # what a person wants to go along with the weights: "optimizer"
    training: Training | None = None  # how far the training is, where that was asked for and is said
    trained_as: tuple[str, ...] = ()  # schemes, as --quantize calls them, under which ModelOpt trained or calibrated weights
    pruned: bool = False  # as ModelOpt's state says
    head: Mapping[str, object] | None = None  # what that says of a head of EAGLE beside the model


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a C-contiguous array.

    >>> dense_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """Return a tensor as another shape of the same elements in the same order.

    Raises NotSupported where a chunk is not a run of elements, as one of some columns.

    >>> rows = Stored("", "w", "bf16", (2, 6), (Chunk(Box((0, 0), (2, 6)), "f", 64, (6, 1)),))
    >>> [(chunk.box, chunk.strides) for chunk in reshaped(rows, (3, 2, 2)).chunks]
    [(Box(start=(0, 0, 0), shape=(3, 2, 2)), (4, 2, 1))]
    """
    chunks = tuple(part for chunk in stored.chunks for part in _reshaped(stored, chunk, shape))
    return replace(stored, shape=shape, chunks=chunks)


def _reshaped(stored: Stored, chunk: Chunk, shape: tuple[int, ...]) -> Iterator[Chunk]:
    """Yield the boxes of another shape that a chunk's run of elements is."""
    steps, whole = dense_strides(stored.shape), dense_strides(shape)
    low = sum(start * step for start, step in zip(chunk.box.start, steps, strict=True))
    high = low + math.prod(chunk.box.shape)
    reach = 1 + sum((length - 1) * step for length, step in zip(chunk.box.shape, steps, strict=True))
    if chunk.strides != dense_strides(chunk.box.shape) or (high > low and reach != high - low):
        facts = {"tensor": stored.name, "chunk": f"{list(chunk.box.shape)} of {list(stored.shape)}", "needed": list(shape)}
        raise NotSupported("a chunk is not one run of the tensor's elements", facts)
    for spans in within(shape, whole, 0, low, high):
        start = tuple(first for first, _ in spans)
        skip = sum(first * step for first, step in zip(start, whole, strict=True)) - low
        box = Box(start, tuple(count for _, count in spans))
        yield Chunk(box, chunk.file, chunk.offset + skip * BY_NAME[stored.dtype].nbytes, whole)


def run_in_box(stored: Stored, offset: int, box: Box) -> Iterator[Chunk]:
    """Yield what a run of elements holds from one on, as the box of a tensor.

    >>> run = Stored("", "w", "f32", (8,), (Chunk(Box((0,), (8,)), "f", 0, (1,)),))
    >>> [(chunk.box, chunk.offset) for chunk in run_in_box(run, 2, Box((4, 0), (2, 3)))]
    [(Box(start=(4, 0), shape=(2, 3)), 8)]
    """
    size, flat = math.prod(box.shape), list[Chunk]()
    for chunk in stored.chunks:
        begin = chunk.box.start[0]
        low, high = (min(max(edge - offset, 0), size) for edge in (begin, begin + chunk.box.shape[0]))
        if low < high:
            skip = (low + offset - begin) * BY_NAME[stored.dtype].nbytes
            flat.append(Chunk(Box((low,), (high - low,)), chunk.file, chunk.offset + skip, (1,)))
    for chunk in reshaped(Stored("", stored.name, stored.dtype, (size,), tuple(flat)), box.shape).chunks:
        start = tuple(a + b for a, b in zip(box.start, chunk.box.start, strict=True))
        yield replace(chunk, box=Box(start, chunk.box.shape))
