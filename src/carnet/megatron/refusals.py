"""Refusals where megatron-core's own code fails too: each is also of the type that is raised there, for scripts that catch that.

What megatron-core asserts or checks has one type. Where it does not check, torch or Python stop it in the middle, and the type depends
on the operation that met the value first: these refusals are of each of them.
"""

from pickle import UnpicklingError

from carnet.errors import BadCheckpoint, BadRequest


class Refused(BadRequest, AssertionError):
    """What Megatron's export asserts: the call is not one that it can answer."""


class Untold(BadRequest, AttributeError):
    """An argument that is missing, and is None there until something of it is asked for."""


class Unmapped(BadRequest, ValueError):
    """A name or a word that has no meaning."""


class Uneven(BadRequest, RuntimeError, IndexError, ValueError):
    """A size that the ranks cannot share: ``reshape``, the parts that ``chunk`` did not make, and their unpacking."""


class Pattern(BadRequest, ValueError, AssertionError, ZeroDivisionError):
    """Marks of layers that are no marks of these layers."""


class Missing(BadCheckpoint, KeyError):
    """A tensor that the state dict has to have."""


class Misshapen(BadCheckpoint, RuntimeError, IndexError, ValueError):
    """A tensor that is not of the shape that its layer has."""


class NoScales(BadRequest, KeyError):
    """No state beside the weights has a scale, and FP8 needs them."""


class NoTensor(Refused, AttributeError, TypeError):
    """A value that is not a tensor: asserted where ranks convert, asked for its shape elsewhere."""


class NoState(BadCheckpoint, RuntimeError, AttributeError, KeyError, IndexError, UnpicklingError):
    """A state beside the weights that is damaged, or none: no file, not one of torch's, without the entries or the numbers."""
