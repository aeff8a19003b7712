"""Casts between floating types, to nearest even, in bounded temporary memory.

bf16 is the upper half of f32. Widening is a shift; narrowing adds half of the last kept bit (less one where that bit is even)
and drops the rest: a few integer passes, several times faster than ml_dtypes' element loop and the same bits.
"""

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type
from carnet.errors import BadRequest

Array = NDArray[np.generic]
Bytes = NDArray[np.uint8]

PER_ELEMENT = 8  # bytes of temporary memory
SAFE = 0x7F7F8000  # f32 bits from which on a magnitude rounds to infinity in bf16, or is infinite, or no number


def cast(source: Array, target: Array, names: tuple[str, str], temporary: Bytes) -> bool:
    """Round each element of ``source`` into ``target``; say whether every finite element stayed finite.

    Both arrays hold unsigned integers of the element's size: the bits. Names are carnet's element types.
    """
    if source.size * PER_ELEMENT > temporary.size and source.ndim:
        half = source.shape[0] // 2
        if half == 0 or source.shape[0] == 1:
            return cast(source[0], target[0], names, temporary)
        return cast(source[:half], target[:half], names, temporary) & cast(source[half:], target[half:], names, temporary)
    if names == ("bf16", "f32"):
        widen(source, target)
        return True
    if names == ("f32", "bf16"):
        return narrow(source, target, temporary)
    floats = temporary[: source.size * 4].view(np.uint32).reshape(source.shape)
    if names[0] == "bf16":
        widen(source, floats)
        return _any(floats, target, ("f32", names[1]))
    if names == ("f16", "bf16"):
        _any(source, floats, ("f16", "f32"))
        return narrow(floats, target, temporary[source.size * 4 :])
    return _any(source, target, names)


def out_of_range(what: str, tensor: str, found: str, dtype: str, where: str = "") -> BadRequest:
    """Return the error of a finite number that a type cannot hold: what it is, of which tensor, how it was ``found``, in which file."""
    facts = {"tensor": tensor, **({"where": where} if where else {}), "found": f"{found} beyond the largest of {dtype}"}
    return BadRequest(f"{what} is out of range for {dtype}", facts, remedy="ask for another --dtype")


def shift(source: Array, target: Array, names: tuple[str, str], value: float) -> bool:
    """Add a value to each element in f32 and round the sum; say whether every finite element stayed finite."""
    total = source.view(array_type(names[0])).astype(np.float32) + np.float32(value)
    return _any(total.view(np.uint32), target, ("f32", names[1]))


def widen(source: Array, target: Array) -> None:
    """Make f32 bits of bf16 bits."""
    np.copyto(target, source)
    np.left_shift(target, np.uint32(16), out=target)


def narrow(source: Array, target: Array, temporary: Bytes) -> bool:
    """Make bf16 bits of f32 bits; say whether every finite element stayed finite."""
    if _magnitude(source) >= SAFE:
        return _any(source, target, ("f32", "bf16"))
    bits = temporary[: source.size * 4].view(np.uint32).reshape(source.shape)
    np.right_shift(source, np.uint32(16), out=bits)
    np.bitwise_and(bits, np.uint32(1), out=bits)
    np.add(bits, source, out=bits)
    np.add(bits, np.uint32(0x7FFF), out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.copyto(target, bits, casting="unsafe")
    return True


def _magnitude(bits: Array) -> int:
    """Return the largest of all f32 bits without their signs, with no temporary array."""
    positive = int(bits.view(np.int32).max())
    return max(positive, int(bits.max()) & 0x7FFFFFFF)


def _any(source: Array, target: Array, names: tuple[str, str]) -> bool:
    before, after = source.view(array_type(names[0])), target.view(array_type(names[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(after, before, casting="unsafe")
        infinite = np.isinf(after)
        return not infinite.any() or bool(np.isinf(before[infinite]).all())
