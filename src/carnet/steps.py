"""A *plan* is data: which bytes of the source become which bytes of the target. A *step* is one of its rows.

These records are the whole contract between the planner, which opens no file, and the executor, which knows no architecture.
A step moves one box of one canonical tensor. Its two places give, per axis of that box, the stride in the source and in the
target, so that the move is ``target[...] = source[...]`` on two strided arrays of the same shape::

    source  offset, strides (8, 2, 1)     target  offset, strides (4, 2, 1)     shape (3, 2, 2)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# bytes of a file; its codes where two are in a byte; no file but memory: where a matrix is assembled that is quantized, or an adapter's
Space = Literal["file", "packed", "scratch", "factors"]
Function = Literal["dequantize", "quantize"]
# what is computed of each number alone and rounded once: carnet.executor.functions says how
Elementwise = Literal["", "minus_exp"]
Computed = Elementwise | Literal["tail", "product"]  # how a tensor is computed: the last indices of an axis, or a Product, too


@dataclass(frozen=True, slots=True)
class Place:
    """Where a box lies in a space: its offset and strides count what the space is made of."""

    file: str  # path below the root of the source, or below the target
    offset: int  # from the start of the file to the box's first element: bytes; in a "packed" file weights
    strides: tuple[int, ...]  # elements, per axis of the step's shape
    dtype: str  # carnet's name of the element type
    space: Space = "file"


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a matrix is kept as codes, in the source or in the target."""

    recipe: str  # "modelopt/fp8": carnet.quantize.recipes
    shape: tuple[int, int]  # rows and columns of the matrix, in weights
    first: int  # offset of its first code, as a place counts it; row follows row
    scales: Place  # of the scale of each block, with strides down and along the blocks
    outer: Place | None  # of the scale of the whole tensor that stands over them


@dataclass(frozen=True, slots=True)
class Move:
    """Move a box. Into another floating type it is rounded to nearest even; what is added is added in f32, before.

    Where there is a function, its results are moved and not the numbers.
    """

    tensor: str  # canonical name
    start: tuple[int, ...]  # first index of the box, per canonical axis
    shape: tuple[int, ...]  # elements, per canonical axis
    source: Place
    target: Place
    add: float = 0.0  # norms that one side stores less one
    function: Elementwise = ""  # what a target holds of a tensor in its place


@dataclass(frozen=True, slots=True)
class Make:
    """Compute a box from several operands.

    ``dequantize``: numbers of a box of codes of the source, each times the scale of its block, as the program does that wrote them,
    then rounded. ``quantize``: codes and scales of a matrix that moves assemble in the scratch space.
    """

    function: Function
    tensor: str  # canonical name; the stored one of what is quantized
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place  # codes ("packed" where two are in a byte; "u8", whatever they are stored as), or the whole matrix in scratch space
    target: Place  # numbers, or the codes
    encoding: Encoding  # of the source, or of the target
    amax: tuple[str, ...] = ()  # what has to be measured first: the scale of the whole tensor is that of the largest of these
    given: float | None = None  # the scale of the whole tensor, where it is known and not measured: as it is stored


@dataclass(frozen=True, slots=True)
class Product:
    """Write products of pairs of matrices, of the operands rounded to the target's type: each the nearest to the true sum.

    ``target[b, r, c] = sum over d of factor[b, d, r] * source[b, d, c]``
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]  # b, r, c
    source: Place  # at d = 0, with strides of b, none, c
    factor: Place  # at d = 0, with strides of b, r, none
    target: Place
    along: tuple[int, int, int]  # the length of d, and its strides in the source and in the factor


@dataclass(frozen=True, slots=True)
class Same:
    """Check that two places of the source hold the same bytes: copies on several ranks, tied tensors."""

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place  # the copy that other steps read
    other: Place  # the copy that nothing else reads


@dataclass(frozen=True, slots=True)
class Measure:
    """Find the largest magnitude in a box of the source, before anything is written: what a scale follows from."""

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Place
    amax: str  # the name under which others ask for it: a canonical tensor, or one expert of it
    encoding: Encoding | None = None  # where the source holds codes


@dataclass(frozen=True, slots=True)
class Fill:
    """Write zeros where the target pads (rows of the vocabulary up to a multiple of the world)."""

    tensor: str  # canonical name of the tensor that is padded
    shape: tuple[int, ...]  # elements
    target: Place


@dataclass(frozen=True, slots=True)
class Put:
    """Write numbers that are known: a scale that was measured elsewhere, a shape."""

    tensor: str  # stored name
    shape: tuple[int, ...]
    target: Place  # dense
    values: tuple[float, ...]  # one for each element, or one for all


Step = Move | Make | Product | Same | Measure | Fill | Put


def kind(step: Step) -> str:
    """Return in a word what it does: "copy", "cast", "add", a function ("quantize", "minus_exp"), or what it is: "product", "same"."""
    match step:
        case Move():
            return step.function or ("add" if step.add else "copy" if step.source.dtype == step.target.dtype else "cast")
        case Make():
            return step.function
        case Product() | Same() | Measure() | Fill() | Put():
            return type(step).__name__.lower()


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of a target file. Tensors of a file are contiguous, row-major and follow each other."""

    name: str
    dtype: str  # carnet's name
    shape: tuple[int, ...]  # elements
    offset: int  # bytes, from the start of the file (header included)


SPACES: Mapping[str, Space] = {"scratch": "scratch", "factors": "factors"}  # kinds of what is no file -> the space that it is


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One file of tensors to write."""

    name: str  # path below the target
    nbytes: int  # size of the whole file, header included
    tensors: tuple[TargetTensor, ...]  # in the order in which they lie
    metadata: Mapping[str, str]  # the header's __metadata__; empty for none
    # or "torch_dist": what stands around the tensors follows from their types, shapes and offsets; or one of SPACES
    kind: str = "safetensors"

    @property
    def space(self) -> Space:
        """Return the space that its tensors lie in."""
        return SPACES.get(self.kind, "file")


NO_SCRATCH = TargetFile("scratch", 0, (), {}, "scratch")
NO_FACTORS = TargetFile("factors", 0, (), {}, "factors")


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to a weight, ``scale * (b @ a)``: both are factors of the plan, assembled in f32 and not written."""

    tensor: str  # canonical name of the weight: experts, outputs | inputs
    a: str  # factor, rank | inputs, or one for each expert
    b: str  # factor, outputs | rank, or one for each expert
    scale: float  # f32
    experts: bool  # whether the first axis of the weight is that of experts
    outputs: int  # how many axes of the weight are outputs
    magnitude: str = ""  # factor, outputs, of DoRA: how long each row, or that of an expert, is made afterwards; "" for none


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
