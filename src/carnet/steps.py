"""A *plan* is data: which bytes of the source become which bytes of the target. A *step* is one of its rows.

This record is the whole contract between the planner, which opens no file, and the executor, which knows no architecture.
A step moves one box of one canonical tensor. Its two places give, per axis of that box, the stride in the source and in the
target, so that the move is ``target[...] = source[...]`` on two strided arrays of the same shape::

    source  offset, strides (8, 2, 1)     target  offset, strides (4, 2, 1)     shape (3, 2, 2)
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a box lies in a file."""

    file: str  # path below the root of the source, or below the target
    offset: int  # bytes, from the start of the file to the box's first element
    strides: tuple[int, ...]  # elements, per axis of the step's shape
    dtype: str  # carnet's name of the element type


@dataclass(frozen=True, slots=True)
class Copy:
    """Move a box as it is: same dtype on both sides, so it is a move of bytes."""

    tensor: str  # canonical name
    start: tuple[int, ...]  # first index of the box, per canonical axis
    shape: tuple[int, ...]  # elements, per canonical axis
    source: Place
    target: Place


@dataclass(frozen=True, slots=True)
class Cast:
    """Move a box into another floating type, rounding to nearest even."""

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place
    target: Place


@dataclass(frozen=True, slots=True)
class Add:
    """Add a constant to a box in f32, then round to the target's type: norms that one side stores less one."""

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place
    target: Place
    value: float


@dataclass(frozen=True, slots=True)
class Fill:
    """Write zeros where the target pads (rows of the vocabulary up to a multiple of the world)."""

    tensor: str  # canonical name of the tensor that is padded
    shape: tuple[int, ...]  # elements
    target: Place


@dataclass(frozen=True, slots=True)
class Same:
    """Check that two places of the source hold the same bytes: copies on several ranks, tied tensors."""

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place  # the copy that other steps read
    other: Place  # the copy that nothing else reads


Move = Copy | Cast | Add
Step = Move | Fill | Same


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of a target file. Tensors of a file are contiguous, row-major and follow each other."""

    name: str
    dtype: str  # carnet's name
    shape: tuple[int, ...]  # elements
    offset: int  # bytes, from the start of the file (header included)


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One file of tensors to write."""

    name: str  # path below the target
    nbytes: int  # size of the whole file, header included
    tensors: tuple[TargetTensor, ...]  # in the order in which they lie
    metadata: Mapping[str, str]  # the header's __metadata__; empty for none
    kind: str = "safetensors"  # or "torch_dist": what stands around the tensors follows from their types, shapes and offsets


@dataclass(frozen=True, slots=True)
class TextFile:
    """One small text file to write, with its whole content: config.json, an index."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class RawFile:
    """One file to write whose bytes are known: the metadata of a store."""

    name: str  # path below the target
    data: bytes


@dataclass(frozen=True, slots=True)
class AssetFile:
    """One file taken over as it is, from outside the checkpoint's tensors: a tokenizer."""

    name: str  # path below the target
    path: str  # absolute path to read
    nbytes: int
    digest: str  # xxh3-128 of the content, hex


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a crossing will do."""

    source: str  # absolute path of the checkpoint's root
    fingerprint: str  # of the source's headers, sizes and times: a run refuses another one
    request: Mapping[str, object]  # what was asked for: target dialect, tp, pp, dtype, drop ... as given
    family: str  # name of the family that ties both sides
    files: tuple[TargetFile, ...]
    texts: tuple[TextFile, ...]  # written last
    assets: tuple[AssetFile, ...]
    steps: tuple[Step, ...]
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names of what is left behind
    proof: Mapping[str, int]  # counts that the coverage proof established
    memory: int  # bytes: the promised peak of private memory
    window: int  # bytes of one buffer
    threads: int  # workers, each with its own buffer
    raws: tuple[RawFile, ...] = ()  # a store's metadata
