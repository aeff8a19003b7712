"""The element types that cross, and how each program spells them.

One row a type. carnet's own name is the short one that the command line takes (``bf16``); everything else is looked up from
the row, so that no other file knows a spelling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from carnet.errors import BadRequest, NotSupported

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True)
class DType:
    """One element type."""

    name: str  # carnet's word, as in ``--dtype bf16``
    nbytes: int  # bytes an element
    safetensors: str  # as in a safetensors header
    torch: str  # as in ``torch.bfloat16``, without the prefix
    storage: str  # the storage class that torch pickles name: ``torch.BFloat16Storage``
    numpy: str  # dtype name in numpy or in ml_dtypes


# safetensors spellings: safetensors/src/tensor.rs; storage classes: torch/storage.py
DTYPES = (
    DType("f64", 8, "F64", "float64", "DoubleStorage", "float64"),
    DType("f32", 4, "F32", "float32", "FloatStorage", "float32"),
    DType("f16", 2, "F16", "float16", "HalfStorage", "float16"),
    DType("bf16", 2, "BF16", "bfloat16", "BFloat16Storage", "bfloat16"),
    DType("f8_e4m3", 1, "F8_E4M3", "float8_e4m3fn", "Float8_e4m3fnStorage", "float8_e4m3fn"),
    DType("f8_e5m2", 1, "F8_E5M2", "float8_e5m2", "Float8_e5m2Storage", "float8_e5m2"),
    DType("i64", 8, "I64", "int64", "LongStorage", "int64"),
    DType("i32", 4, "I32", "int32", "IntStorage", "int32"),
    DType("i16", 2, "I16", "int16", "ShortStorage", "int16"),
    DType("i8", 1, "I8", "int8", "CharStorage", "int8"),
    DType("u8", 1, "U8", "uint8", "ByteStorage", "uint8"),
    DType("bool", 1, "BOOL", "bool", "BoolStorage", "bool"),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_TORCH = {dtype.torch: dtype for dtype in DTYPES}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES}

# the types a trained weight can be cast between without a scale
FLOATS = ("f64", "f32", "f16", "bf16")


def named(word: str) -> DType:
    """Return the row of a name that a person or a config wrote: ``bf16``, ``BF16``, ``bfloat16``, ``torch.bfloat16``.

    >>> named("torch.bfloat16").name, named("F32").nbytes
    ('bf16', 4)
    """
    plain = word.removeprefix("torch.")
    found = BY_NAME.get(plain) or BY_TORCH.get(plain) or BY_SAFETENSORS.get(plain)
    if found is None:
        raise BadRequest(f"no element type is called {word!r}", {"known": ", ".join(BY_NAME)})
    return found


def array_type(name: str) -> "numpy.dtype[numpy.generic]":
    """Return the numpy dtype in which elements of this type can be computed with.

    >>> array_type("bf16").itemsize
    2
    """
    import ml_dtypes
    import numpy

    spelled = BY_NAME[name].numpy
    extended = getattr(ml_dtypes, spelled, None)
    if extended is None and not hasattr(numpy, spelled):
        raise NotSupported(f"numpy has no type for {name}")
    return numpy.dtype(extended if extended is not None else spelled)
