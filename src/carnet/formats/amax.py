"""What calibration found: a safetensors file of f32 scalars, named after the modules of the Hugging Face model."""

import struct
from math import isfinite, prod

from carnet.errors import BadRequest
from carnet.formats.safetensors import read_header
from carnet.storage.protocol import read_at
from carnet.storage.schemes import PathLike, file_at


def read_amax(path: PathLike) -> dict[str, float]:
    """Return every scalar of a file: ``model.layers.0.self_attn.q_proj.input_amax`` -> the largest magnitude seen.

    Raises BadRequest where one is not an f32 scalar, or no magnitude.
    """
    folder, name = file_at(path)
    header, file = read_header(folder, name), folder.open(name)
    found = {}
    for stored in header.tensors:
        if stored.dtype != "f32" or prod(stored.shape) != 1:
            facts = {
                "where": path,
                "tensor": stored.name,
                "expected": "one f32",
                "found": f"{stored.dtype} {list(stored.shape)}",
            }
            raise BadRequest("the file of calibration holds something else", facts)
        (value,) = struct.unpack("<f", read_at(file, stored.chunks[0].offset, 4))
        if not (isfinite(value) and value > 0):
            raise BadRequest(
                "the file of calibration holds no magnitude", {"where": path, "tensor": stored.name, "found": value}
            )
        found[stored.name] = value
    return found
